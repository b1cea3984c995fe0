"""A person with several identities: rows of all of them as one sequence, the same in the ranking server and in replay."""

from collections.abc import Sequence as Seq

import numpy as np
import xxhash

from features.actions import EVENT_DTYPE
from features.domain import Domain
from features.sequence import NEVER_ERASED, Events, decode_row, definition, merge_rows

IDENTITIES_MAX = 4
"""Most further identities of a request."""


def events_of_rows(domain: Domain, sequence: str, user_ids: Seq[int], rows: Seq[bytes]) -> tuple[Events, int]:
    """(events EVENT_DTYPE [n] ascending, erased_before_ms) of a person whose identities have these rows, in the same order; b"" is none.

    An erasure reaches the identity that it names: its row holds nothing older already. What batch tables say of the person must be newer
    than the last erasure of any of them, so erased_before_ms is the greatest, milliseconds, NEVER_ERASED for none.

    Raises:
        SequenceCorruptError: a row is damaged, or of another user than its place says.
    """
    decoded = [decode_row(row, user_id) for user_id, row in zip(user_ids, rows, strict=True) if row]
    erased_before_ms = max((row.erased_before_ms for row in decoded), default=NEVER_ERASED)
    if not decoded:
        return np.zeros(0, EVENT_DTYPE), erased_before_ms
    if len(decoded) == 1:  # a row obeys the law already
        return decoded[0].events, erased_before_ms
    return merge_rows(definition(domain, sequence), rows), erased_before_ms


def rows_digest(rows: Seq[bytes]) -> int:
    """`RankingRecord.row_digest`: xxh3-64 of the one row, or of all, each behind its length (8 bytes little-endian)."""
    if len(rows) == 1:
        return xxhash.xxh3_64_intdigest(rows[0])
    return xxhash.xxh3_64_intdigest(b"".join(part for row in rows for part in (len(row).to_bytes(8, "little"), row)))

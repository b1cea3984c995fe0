"""Who was erased and when: the ledger that builders of tables and training data read, so that nothing built later knows an erased past.

The ledger is one JSON object a line, appended and synced by the erasure job. It names users by id, and nothing else of them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from features.ids import U64
from features.sequence import NEVER_ERASED

LEDGER = "erasures.jsonl"
"""Name of the ledger in the home folder."""

Erased = Mapping[int, int]
"""Append time of each erased user's last erasure, milliseconds, by user id."""

NOBODY: Erased = {}
_HEXADECIMAL = ("user_id", "event_id", "log_epoch")


class LedgerError(ValueError):
    """A ledger with a line that cannot be read; names the file and the line."""


@dataclass(frozen=True)
class Erasure:
    """One erasure record of the actions topic. append_time_ms: milliseconds since 1970-01-01 UTC."""

    user_id: int
    event_id: int
    log_epoch: int
    partition: int
    offset: int
    append_time_ms: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Ids as 16 hexadecimal digits: JSON numbers end at 2^53 in many readers."""
        return {name: f"{value:016x}" if name in _HEXADECIMAL else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Erasure":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {name: int(value, 16) if name in _HEXADECIMAL else value for name, value in said.items()}
        return cls(**fields)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where it is not there. A last line without its end was cut by a crash and is left out.

    Raises:
        LedgerError: another line cannot be read.
    """
    found = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise LedgerError(f"{path}: line {number}: {error}") from error
    return found


def append_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Appends JSON lines and syncs them to disk. What a crash left of a last line is cut off first."""
    data = b"".join(json.dumps(said).encode() + b"\n" for said in objects)
    if not data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_ledger(path: Path) -> list[Erasure]:
    """Every erasure of a ledger, in its order; none where there is no ledger. Raises LedgerError."""
    return [Erasure.from_json(said) for said in read_lines(path)]


def erased_users(erasures: Iterable[Erasure]) -> dict[int, int]:
    """`Erased` of some erasures."""
    users: dict[int, int] = {}
    for erasure in erasures:
        users[erasure.user_id] = max(users.get(erasure.user_id, NEVER_ERASED), erasure.append_time_ms)
    return users


def ledger_fingerprint(erased: Erased) -> str:
    """Identity of the known erasures, 16 hexadecimal digits: what was built under another one may hold what has been erased since."""
    return xxhash.xxh3_64_hexdigest(repr(sorted(erased.items())).encode())


def erased_before_ms(erased: Erased, users: U64) -> npt.NDArray[np.int64]:
    """When each of users uint64 [n] was erased last: int64 [n], NEVER_ERASED where never."""
    if not erased:
        return np.full(len(users), NEVER_ERASED, np.int64)
    known = np.array(sorted(erased), np.uint64)
    times = np.array([erased[user] for user in known.tolist()], np.int64)
    place = known.searchsorted(users).clip(max=len(known) - 1)
    return np.where(known[place] == users, times[place], NEVER_ERASED)

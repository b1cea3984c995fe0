"""One person's history, split over identities at will, is ranked as if it had been one user's."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequence import DEFINITIONS, fold, records, to_batch

from features import person
from features.actions import ACTION, encode_action
from features.person import events_of_rows, rows_digest
from features.ports import SequenceCorruptError
from features.sequence import NEVER_ERASED, Definition, decode_row, law


def merged(what, users, rows):
    """`events_of_rows` under a definition of the test's own."""
    domain = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(person, "definition", lambda *_: what)
        return events_of_rows(domain, "main", users, rows)


@settings(max_examples=60, deadline=None)
@given(what=DEFINITIONS, log=records(), data=st.data())
def test_split_histories_merge_to_the_law_over_the_union(what, log, data):
    """Every action goes to one of five identities, or to several; whoever they were first, the union obeys the law."""
    what = replace(what, evict_age_ms=None)
    batch = to_batch([row for row in log if b"test" not in row[2]])
    events = batch.events[batch.verdict == ACTION]
    owners = data.draw(st.lists(st.sets(st.integers(1, 5), min_size=1, max_size=2), min_size=len(events), max_size=len(events)))
    split = [
        (user, 99, encode_action(user_id=user, **{name: event[name].item() for name in events.dtype.names}))
        for event, users in zip(events, owners, strict=True)
        for user in sorted(users)
    ]
    rows = fold(what, [to_batch(split)]) if split else {}
    users = data.draw(st.permutations(range(1, 6)))
    found, erased_before_ms = merged(what, users, [rows.get(user, b"") for user in users])
    assert found.tobytes() == law(what, events).tobytes()
    assert erased_before_ms == NEVER_ERASED


@settings(max_examples=60, deadline=None)
@given(what=DEFINITIONS, log=records())
def test_each_identity_obeys_its_own_erasures(what, log):
    rows = fold(what, [to_batch(log)])
    users = sorted(rows)
    found, erased_before_ms = merged(what, users, [rows[user] for user in users])
    alive = [event for user in users for event in decode_row(rows[user]).events]
    assert found.tobytes() == law(what, np.array(alive, found.dtype)).tobytes()
    erasures = [append_ms for _, append_ms, value in log if b"test" in value]
    assert erased_before_ms == max(erasures, default=NEVER_ERASED)


def test_a_row_of_somebody_else_is_refused():
    rows = fold(
        Definition(7, 4),
        [to_batch([(1, 50, encode_action(user_id=1, entity_kind=1, entity_id=1, action=1, event_time_ms=45, event_id=1))])],
    )
    with pytest.raises(SequenceCorruptError, match="another user"):
        merged(Definition(7, 4), [2, 3], [rows[1], b""])


def test_the_digest_of_one_row_is_what_it_always_was_and_of_several_tells_them_apart():
    assert rows_digest([b"row"]) == xxhash.xxh3_64_intdigest(b"row")
    assert len({rows_digest(rows) for rows in ([b"ab", b""], [b"", b"ab"], [b"a", b"b"], [b"ab"], [b"ab", b"", b""])}) == 5

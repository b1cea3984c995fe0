"""A base under a log: the bulk fold of history, whatever its order and pieces, and what the log makes of its rows, are the naive fold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequence import DEFINITIONS, records, to_batch

from features.actions import EVENT_DTYPE, REJECTED
from features.base import Base, BaseRecords, Erasures, is_accepted, take_records
from features.logs import LoggedActions
from features.oracle import history_batch, naive_fold
from features.parity import PartitionLog
from features.sequence import (
    _sorted_distinct,
    apply_batch,
    as_read,
    clock_after,
    cut_history,
    decode_row,
    fold_history,
    sort_history,
    touched_users,
)

TOLERANCE_MS = 10


def logged(batch):
    """What an export of these records holds: rejected ones, too, as they are."""
    n = len(batch)
    none = np.zeros(n, np.uint64), np.full(n, -1, np.int32), np.full(n, -1, np.int64)
    return LoggedActions(batch.users, batch.events, batch.append_time_ms, *none, batch.verdict == 2)


def base_rows(what, history, random, pieces):
    """The loader's steps on one bucket: (rows by user, clock)."""
    history = take_records(history, np.array(random.sample(range(len(history)), len(history)), np.int64))
    accepted = is_accepted(history, TOLERANCE_MS)
    clock_ms = int(history.append_time_ms.max(initial=0, where=accepted))
    erasures = Erasures()
    where = accepted & history.erase
    erasures.add(history.users[where], history.append_time_ms[where])
    alive = np.flatnonzero(accepted & erasures.survives(history))
    users, events = np.zeros(0, np.uint64), np.zeros(0, EVENT_DTYPE)
    for piece in np.array_split(alive, pieces):
        users, events = sort_history(np.concatenate((users, history.users[piece])), np.concatenate((events, history.events[piece])))
        users, events = cut_history([what], users, events)
    found, rows = fold_history(what, users, events, erasures.of(), clock_ms=clock_ms, log_epoch=9, partition=0)
    return dict(zip(found.tolist(), rows, strict=True)), clock_ms, erasures


@settings(max_examples=300, deadline=None)
@given(
    what=DEFINITIONS,
    past=records(),
    log=records(),
    random=st.randoms(use_true_random=False),
    pieces=st.integers(1, 4),
    overlap=st.integers(0, 20),
)
def test_base_and_log_are_the_naive_fold(what, past, log, random, pieces, overlap):
    history = logged(to_batch(past))
    history = take_records(history, np.flatnonzero(history.users > 0))
    log = [*past[len(past) - overlap :], *log]  # the log may begin with what the history has already
    rows, clock_ms, erasures = base_rows(what, history, random, pieces)
    before = history_batch(take_records(history, np.flatnonzero(is_accepted(history, TOLERANCE_MS))), 9, 0)

    alone = naive_fold([before], clock_ms)
    for user, naive in alone.items():
        expected = naive.sequence(what)
        if user in rows:
            row = decode_row(rows[user], user)
            assert row.events.tobytes() == expected.tobytes()
            assert (row.offset, row.erased_before_ms) == (-1, max((at for _, at in naive.erasures), default=-1))
        else:
            assert not len(expected)
            assert not naive.erasures
    assert rows.keys() <= alone.keys()

    base = Base((), 0, 0, 0, clock_ms, TOLERANCE_MS, ())
    kept = BaseRecords(base, {1, 2, 3}, erasures, [history])
    for user in (1, 2, 3):
        assert kept.row(what, user, 9, 0) == rows.get(user), "replay rebuilds the loader's row"

    batch = to_batch(log)
    users = touched_users(batch).tolist()
    folded = {**rows, **dict(zip(users, apply_batch(what, batch, [rows.get(user) for user in users], clock_ms), strict=True))}
    for user, naive in naive_fold([before, batch], clock_ms).items():
        if user in folded:
            assert decode_row(folded[user], user).events.tobytes() == naive.sequence(what).tobytes()
        else:
            assert not len(naive.sequence(what))
    replayed = PartitionLog({1, 2, 3}, base_clock_ms=clock_ms, base_row=lambda what, user: kept.row(what, user, 9, 0))
    replayed.add(batch)
    for user in (1, 2, 3):
        readings = [as_read(what, rows.get(user, b""), clock_ms), as_read(what, folded.get(user, b""), clock_after(batch, clock_ms))]
        assert replayed.rows_at(what, user, [-1, len(log)]) == readings
    assert (replayed.clock_at(-1), replayed.clock_at(len(log))) == (clock_ms, clock_after(batch, clock_ms))


@settings(max_examples=200, deadline=None)
@given(past=records(), spread=st.sampled_from([1, 2**40, 2**62 - 2]))
def test_sort_history_is_the_plain_sort(past, spread):
    """Also where times are so far apart that user and time do not fit into 64 bits."""
    batch = to_batch(past)
    where = np.flatnonzero(batch.verdict != REJECTED)
    users, events = batch.users[where], batch.events[where].copy()
    events["event_time_ms"][::3] = np.minimum(events["event_time_ms"][::3] * spread, 2**62 - 1)
    order = np.argsort(users, kind="stable")
    found_users, found = sort_history(users, events)
    expected, group = _sorted_distinct(events[order], np.unique(users[order], return_inverse=True)[1].astype(np.int64))
    assert found.tobytes() == expected.tobytes()
    assert found_users.tolist() == np.unique(users)[group].tolist()


def test_the_id_is_of_everything_that_rows_depend_on():
    base = Base((), 1, 2, 3, 4, 5, ((1, 2**64 - 1),))
    assert Base.from_json(base.to_json("here"), "x") == (base, "here")
    assert len({base.id, *(Base((), *[n + (i == j) for j, n in enumerate((1, 2, 3, 4, 5))], base.fingerprints).id for i in range(5))}) == 6
    with pytest.raises(ValueError, match="x: the manifest was changed"):
        Base.from_json(base.to_json("here").replace('"events": 1', '"events": 7'), "x")
    with pytest.raises(ValueError, match="x: not the manifest of a base"):
        Base.from_json("{}", "x")

"""The law against its naive oracle: duplicates, disorder, erasures, caps, eviction, unknown actions, any cut into batches."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from features.actions import ACTION, EVENT_DTYPE, decode_batch, encode_action, encode_erase
from features.ids import user_key
from features.oracle import NaiveUser, naive_fold
from features.sequence import (
    Definition,
    _sorted_distinct,
    apply_batch,
    as_read,
    clock_after,
    decode_row,
    law,
    merge_rows,
    touched_users,
)

HOUR_MS = 3_600_000
DEFINITIONS = st.builds(
    Definition,
    fingerprint=st.just(7),
    length=st.integers(1, 6),
    caps=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=2, unique_by=lambda cap: cap[0]).map(tuple),
    evict_age_ms=st.sampled_from([None, 0, 5, 20]),
)


@st.composite
def records(draw, size=40):
    """Few users, times and ids, so that ties, duplicates, late and future events are the rule; or times that mostly rise with the log."""
    rows, late_of_10 = [], draw(st.sampled_from([0, 1, 10]))
    for offset in range(draw(st.integers(1, size))):
        user, append_ms = draw(st.integers(1, 3)), 50 + offset // 2 if late_of_10 < 10 else draw(st.integers(50, 90))
        is_late = draw(st.integers(1, 10)) <= late_of_10
        if draw(st.integers(0, 9)) == 0:
            rows.append((user, append_ms, encode_erase(user_id=user, event_id=offset, reason="test")))
            continue
        value = encode_action(
            user_id=user,
            entity_kind=1,
            entity_id=draw(st.sampled_from([1, 255, 256, 2**64 - 1])),
            action=draw(st.integers(1, 4)),
            event_time_ms=draw(st.integers(40, 99)) if is_late else append_ms - draw(st.integers(0, 1)),
            event_id=draw(st.integers(0, 2)),
            surface=draw(st.sampled_from([0, 1, 256])),
            value=draw(st.sampled_from([float("nan"), 0.0, -0.0, 1.5])),
        )
        rows.append((user, append_ms, value))
    return rows


def to_batch(rows, first_offset=0):
    return decode_batch(
        log_epoch=9,
        partition=0,
        offsets=np.arange(first_offset, first_offset + len(rows)),
        keys=[user_key(user) for user, _, _ in rows],
        values=[value for _, _, value in rows],
        append_times_ms=np.array([append_ms for _, append_ms, _ in rows], np.int64),
        future_tolerance_ms=10,
        partition_count=1,
    )


def fold(what, batches):
    rows, clock_ms = {}, 0
    for batch in batches:
        users = touched_users(batch).tolist()
        new = apply_batch(what, batch, [rows.get(user) for user in users], clock_ms)
        rows.update(zip(users, new, strict=True))
        clock_ms = clock_after(batch, clock_ms)
    return rows


@settings(max_examples=300, deadline=None)
@given(what=DEFINITIONS, log=records(), cuts=st.sets(st.integers(1, 39), max_size=6))
def test_fold_is_the_law_whatever_the_batches(what, log, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut < len(log)), len(log)]
    batches = [to_batch(log[start:end], start) for start, end in itertools.pairwise(edges)]
    rows = fold(what, batches)
    expected = naive_fold(batches)
    assert rows.keys() == expected.keys()
    for user, row in rows.items():
        decoded = decode_row(row, user)
        assert decoded.events.tobytes() == expected[user].sequence(what).tobytes()
        assert (decoded.fingerprint, decoded.log_epoch) == (7, 9)
    assert fold(what, [to_batch(log)]) == rows, "how the log is cut into batches must not show in a single byte"
    for users_max in (1, 2):
        parts = list(to_batch(log).parts(users_max))
        assert all(len(touched_users(part)) <= users_max for part in parts)
        assert fold(what, parts) == rows
    assert fold(what, [to_batch([record], i) for i, record in enumerate(log)]) == rows


@settings(max_examples=100, deadline=None)
@given(log=records(), spread=st.sampled_from([1, 2**40, 2**56]))
def test_the_law_holds_for_times_far_apart(log, spread):
    """Whether group and time fit into one sort key or not."""
    batch = to_batch(log)
    is_action = batch.verdict == ACTION
    events = batch.events[is_action].copy()
    events["event_time_ms"] *= spread
    _, group = np.unique(batch.users[is_action], return_inverse=True)
    found, found_group = _sorted_distinct(events, group)
    expected = sorted({(int(g), int(e["event_time_ms"]), int(e["event_id"]), e.tobytes()[16:]) for g, e in zip(group, events, strict=True)})
    assert [(g, e.tobytes()) for g, e in zip(found_group.tolist(), found, strict=True)] == [
        (g, time_ms.to_bytes(8, "little") + event_id.to_bytes(8, "little") + tail) for g, time_ms, event_id, tail in expected
    ]


@settings(max_examples=200, deadline=None)
@given(what=DEFINITIONS, log=records(), order=st.randoms(use_true_random=False))
def test_union_is_idempotent_commutative_associative(what, log, order):
    events = to_batch(log).events[to_batch(log).verdict == ACTION]
    whole = law(what, events)
    assert law(what, whole).tobytes() == whole.tobytes()
    shuffled = events[order.sample(range(len(events)), len(events))]
    assert law(what, np.concatenate((shuffled, events))).tobytes() == whole.tobytes()
    a, b, c = np.array_split(shuffled, 3)
    left = law(what, np.concatenate((law(what, np.concatenate((a, b))), c)))
    right = law(what, np.concatenate((a, law(what, np.concatenate((b, c))))))
    assert left.tobytes() == right.tobytes() == whole.tobytes()


@settings(max_examples=150, deadline=None)
@given(what=DEFINITIONS, log=records(), stretch=st.tuples(st.integers(0, 39), st.integers(1, 40)))
def test_records_that_a_row_includes_change_no_byte_of_it_when_they_come_again(what, log, stretch):
    again = log[stretch[0] : stretch[1]]
    twice = [to_batch(log), to_batch(again, first_offset=stretch[0])] if again else [to_batch(log)]
    assert fold(what, twice) == fold(what, [to_batch(log)])


@settings(max_examples=100, deadline=None)
@given(log=records(), cut=st.integers(0, 39))
def test_redelivery_of_what_is_applied_changes_nothing_but_what_the_offset_guard_stops(log, cut):
    """Records behind the last erasure may come twice: the union absorbs them even without the offset guard."""
    actions = [row for row in log if b"test" not in row[2]] or log[:1]
    what = Definition(7, 4)
    once = fold(what, [to_batch(actions)])
    twice = fold(what, [to_batch(actions), to_batch(actions[cut:], first_offset=cut)] if cut < len(actions) else [to_batch(actions)])
    for user, row in once.items():
        assert decode_row(twice[user]).events.tobytes() == decode_row(row).events.tobytes()


@settings(max_examples=100, deadline=None)
@given(what=DEFINITIONS, log=records())
def test_two_identities_merge_by_the_law(what, log):
    rows = fold(replace(what, evict_age_ms=None), [to_batch(log)])
    events = np.concatenate([decode_row(row).events for row in rows.values()] or [np.zeros(0, EVENT_DTYPE)])
    person = NaiveUser(events=[(0, event.tobytes()) for event in events])
    expected = person.sequence(replace(what, evict_age_ms=None))
    assert merge_rows(what, list(rows.values())).tobytes() == expected.tobytes()


def test_erase_reaches_back_and_forward():
    def click(time_ms, append_ms, event_id):
        return 1, append_ms, encode_action(user_id=1, entity_kind=1, entity_id=5, action=1, event_time_ms=time_ms, event_id=event_id)

    erase = (1, HOUR_MS, encode_erase(user_id=1, event_id=1, reason="asked"))
    log = [click(10, 20, 1), click(HOUR_MS + 5, HOUR_MS, 2), erase, click(HOUR_MS, HOUR_MS + 9, 3), click(HOUR_MS + 1, HOUR_MS + 9, 4)]
    row = decode_row(fold(Definition(7, 10), [to_batch(log)])[1])
    assert row.events["event_id"].tolist() == [4], "before in the log, or at or before the erasure's append time: gone"
    assert row.erased_before_ms == HOUR_MS


@settings(max_examples=400, deadline=None)
@given(
    what=DEFINITIONS,
    log=records(),
    cuts=st.sets(st.integers(1, 39), max_size=8),
    trimmed=st.sets(st.tuples(st.integers(0, 9), st.integers(1, 3))),
)
def test_idle_rows_may_leave_the_store_at_any_time_and_no_reading_knows(what, log, cuts, trimmed):
    """`trimmed`: behind which batch which user's row is put into the form that readings give it, as the background eviction does."""
    edges = [0, *sorted(cut for cut in cuts if cut < len(log)), len(log)]
    batches = [to_batch(log[start:end], start) for start, end in itertools.pairwise(edges)]
    whole, thinned, clock_ms = {}, {}, 0
    for number, batch in enumerate(batches):
        users = touched_users(batch).tolist()
        for rows in (whole, thinned):
            rows.update(zip(users, apply_batch(what, batch, [rows.get(user) for user in users], clock_ms), strict=True))
        clock_ms = clock_after(batch, clock_ms)
        expected = naive_fold(batches[: number + 1])
        for user in (1, 2, 3):
            if (number, user) in trimmed:
                thinned[user] = as_read(what, thinned.get(user) or b"", clock_ms)
            reading = as_read(what, whole.get(user) or b"", clock_ms)
            assert as_read(what, thinned.get(user) or b"", clock_ms) == reading, "to the byte"
            events = expected[user].reading(what, clock_ms) if user in expected else None
            assert (decode_row(reading, user).events.tobytes() if reading else None) == (None if events is None else events.tobytes())
            if reading and expected[user].erasures:
                assert decode_row(reading).erased_before_ms == max(append_ms for _, append_ms in expected[user].erasures)


@settings(max_examples=200, deadline=None)
@given(log=records(), age_ms=st.sampled_from([5, 15]), grace_ms=st.sampled_from([10, 20]), late_ms=st.integers(0, 20))
def test_what_a_reading_leaves_out_no_allowed_request_could_see(log, age_ms, grace_ms, late_ms):
    """The server refuses requests from more than the grace behind the log's clock; the others see events of the maximum age at most."""
    what = Definition(7, 6, evict_age_ms=age_ms + grace_ms)
    batch = to_batch(log)
    clock_ms = clock_after(batch, 0)
    for row in fold(what, [batch]).values():
        reading = as_read(what, row, clock_ms)
        kept = decode_row(reading).events if reading else np.zeros(0, EVENT_DTYPE)
        gone = set(decode_row(row).events["event_time_ms"].tolist()) - set(kept["event_time_ms"].tolist())
        request_time_ms = clock_ms - min(late_ms, grace_ms)
        assert all(time_ms < request_time_ms - age_ms for time_ms in gone)

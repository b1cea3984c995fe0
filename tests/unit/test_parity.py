"""Rebuilding rows at watermarks, edit distance, freshness skew and the verdict."""

import json
from dataclasses import replace

import numpy as np
import pytest

from features.actions import EVENT_DTYPE, decode_batch, encode_action, encode_erase
from features.domain import parse_domain
from features.ids import user_key
from features.oracle import naive_fold
from features.pack import Packer, RankInputs
from features.parity import ACCEPTED, EXCLUSIONS, PartitionLog, Tally, bytes_different, edit_distance, missing_events
from features.sequence import Definition, clock_after, decode_row, definition
from features.tables import Member, TableSet, write_generation
from protos.v1.ranking_pb2 import TIER_MODEL, RankingRecord

WHAT = Definition(fingerprint=7, length=4, caps=((2, 2),), evict_age_ms=60)
USERS = (1, 2, 3)


def batch_of(rows, first_offset=0):
    """Rows are (user, append_time_ms, value)."""
    return decode_batch(
        log_epoch=9,
        partition=0,
        offsets=np.arange(first_offset, first_offset + len(rows)),
        keys=[user_key(user) for user, _, _ in rows],
        values=[value for _, _, value in rows],
        append_times_ms=np.array([append_ms for _, append_ms, _ in rows], np.int64),
        future_tolerance_ms=1_000,
        partition_count=1,
    )


def action(user, time_ms, event_id, *, kind=1, entity=5, action=1):
    return encode_action(user_id=user, entity_kind=kind, entity_id=entity, action=action, event_time_ms=time_ms, event_id=event_id)


def random_log(seed, size=120):
    rng, rows = np.random.default_rng(seed), []
    for offset in range(size):
        user, append_ms = int(rng.choice(USERS)), 1_000 + offset + int(rng.integers(0, 40))
        roll = rng.random()
        if roll < 0.05:
            value = encode_erase(user_id=user, event_id=offset, reason="test")
        elif roll < 0.1:
            value, append_ms = b"garbage", append_ms + 10_000  # rejected: its append time must not move the clock
        else:
            value = action(user, append_ms - int(rng.integers(-5, 90)), int(rng.integers(0, 5)), action=int(rng.integers(1, 4)))
        rows.append((user, append_ms, value))
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_rows_at_any_watermark_are_the_naive_fold_up_to_it(seed):
    rows = random_log(seed)
    log = PartitionLog(USERS[:2])
    for start in range(0, len(rows), 17):
        log.add(batch_of(rows[start : start + 17], start))
    watermarks = [-1, 0, 3, 30, 30, 31, 77, len(rows) - 1]
    for user in USERS[:2]:
        for offset, row in zip(watermarks, log.rows_at(WHAT, user, watermarks), strict=True):
            before = batch_of(rows[: offset + 1])
            clock_ms = clock_after(before, 0)
            assert log.clock_at(offset) == clock_ms
            known = naive_fold([before]).get(user)
            expected = None if known is None else known.reading(WHAT, clock_ms)
            assert bool(row) == (expected is not None)
            if expected is not None:
                assert decode_row(row, user).events.tobytes() == expected.tobytes()
    assert log.rows_at(WHAT, 3, [len(rows)]) == [b""], "nothing of users that were not asked for is kept"


def test_erasures_and_later_events_are_found_by_offset_and_time():
    erase = encode_erase(user_id=1, event_id=1, reason="asked")
    rows = [(1, 10, action(1, 5, 1)), (1, 20, erase), (2, 21, action(2, 9, 7)), (1, 30, action(1, 25, 2)), (1, 40, action(1, 35, 3))]
    log = PartitionLog([1, 4])
    log.add(batch_of(rows))
    assert (log.last_erasure(1), log.last_erasure(2), log.last_erasure(4)) == (1, -1, -1)
    assert log.later_events(1, 1, 34)["event_id"].tolist() == [2]
    assert log.later_events(1, 0, 99)["event_id"].tolist() == [2, 3], "an erasure is no event"
    assert log.later_events(1, 4, 99)["event_id"].tolist() == []
    assert len(log.later_events(4, -1, 99)) == 0


def events_of(*ids):
    events = np.zeros(len(ids), EVENT_DTYPE)
    events["event_id"] = ids
    return events


@pytest.mark.parametrize(
    ("served", "rebuilt", "distance"),
    [
        ((1, 2, 3), (1, 2, 3), (0, 0)),
        ((1, 2, 3), (1, 3), (0, 1)),
        ((1, 3), (1, 2, 3), (1, 0)),
        ((1, 2, 3), (1, 4, 3), (1, 1)),
        ((3, 1, 2), (1, 2, 3), (1, 1)),
        ((1, 1, 2), (1, 2), (0, 1)),
        ((), (1, 2), (2, 0)),
        ((1, 2), (), (0, 2)),
    ],
)
def test_edit_distance_counts_inserts_and_deletes_apart(served, rebuilt, distance):
    assert edit_distance(events_of(*served), events_of(*rebuilt)) == distance


def test_events_that_differ_in_any_byte_are_different_events():
    changed = events_of(1, 2)
    changed["surface"][1] = 1
    assert edit_distance(events_of(1, 2), changed) == (1, 1)


def test_bytes_different_counts_places_and_missing_ends():
    assert bytes_different(b"abcd", b"abcd") == 0
    assert bytes_different(b"abcd", b"aXcY") == 2
    assert bytes_different(b"abcd", b"aX") == 3
    assert bytes_different(b"", b"abc") == 3


DOMAIN = """
name = "shop"
[entities]
product = 1
[actions.click]
id = 1
kind = "positive"
[sequence.main]
id = 1
length = 3
age_days_max = 1
[ranker.home]
sequence = "main"
sequence_length = 2
item_space = "two_tower"
embedding_dimension = 2
heads.click.actions = ["click"]
"""


@pytest.fixture(scope="module")
def packer(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    items = Member(ids=np.array([5], np.uint64), vectors=np.ones((1, 2), np.float16))
    write_generation(root, "two_tower", 1_000, {"item.product": items})
    domain = parse_domain(DOMAIN, source="test")
    return Packer(domain, "home", TableSet.open(root, domain, "home"))


def inputs_at(time_ms, events):
    return RankInputs(1, time_ms, events, np.array([5], np.uint64), np.array([1], np.uint8))


def clicks(*times):
    rows = [(1, 200_000_000, action(1, time_ms, time_ms)) for time_ms in times]
    return batch_of(rows).events


def test_freshness_skew_counts_what_a_complete_sequence_would_have_shown(packer):
    what = definition(packer.domain, "main")
    now_ms = 100_000_000
    served = clicks(now_ms - 50, now_ms - 40, now_ms - 30)
    visible, missing = missing_events(what, packer, inputs_at(now_ms, served), clicks(now_ms - 60, now_ms - 35, now_ms - 1))
    assert visible == 2, "the model sees two"
    assert missing.tolist() == [now_ms - 1], "it has -30 already; -35 and older would not be shown"
    assert missing_events(what, packer, inputs_at(now_ms, served), served[:0])[1].tolist() == []
    too_old = clicks(now_ms - 90_000_000)
    assert missing_events(what, packer, inputs_at(now_ms, served[:0]), too_old) == (0, pytest.approx([]))


def test_freshness_skew_leaves_out_what_an_erasure_reaches(packer):
    log = PartitionLog([1])
    log.add(batch_of([(1, 1_000, encode_erase(user_id=1, event_id=1, reason="asked"))]))
    row = decode_row(log.rows_at(definition(packer.domain, "main"), 1, [0])[0])
    inputs = replace(inputs_at(2_000, row.events), erased_before_ms=row.erased_before_ms)
    visible, missing = missing_events(definition(packer.domain, "main"), packer, inputs, clicks(1_000, 1_500))
    assert (visible, missing.tolist()) == (1, [1_500])


def served(packer, inputs, *, inline):
    packed = packer.pack(inputs)
    record = RankingRecord(digest=packer.digest(packed.tensors), tensor_digests=packer.tensor_digests(packed.tensors), tier=TIER_MODEL)
    record.request.request_time_ms = inputs.request_time_ms
    record.inline = inline
    if inline:
        for name, tensor in packed.tensors.items():
            record.inline_tensors[name] = tensor.tobytes()
    return record, packed


@pytest.mark.parametrize("inline", [False, True])
def test_a_difference_names_its_tensors_and_counts_bytes(packer, inline):
    record, packed = served(packer, inputs_at(5_000, clicks(1_000)), inline=inline)
    tally = Tally()
    assert tally.compare(record, b"", packer, packed)
    _, other = served(packer, inputs_at(5_000, clicks(1_001)), inline=False)
    assert not tally.compare(record, b"", packer, other)
    report = tally.finish(elapsed_s=2.0, scoring_s=1.0)
    assert report.tensors_different == {"sequence_age_ms": 1}
    assert report.bytes_different == (1 if inline else 16), "exact where the bytes were logged, else the whole tensor"
    assert (report.digests_equal, report.digests_different, report.rankings_different) == (1, 1, 1)
    assert report.hours == {"1970-01-01T00": [2, 1]}
    assert report.requests_per_s == pytest.approx(2.0)
    assert not report.ok
    assert report.examples[0]["tensors_different"] == ["sequence_age_ms"]


def test_inline_bytes_that_are_not_those_of_the_digest_are_a_difference(packer):
    record, packed = served(packer, inputs_at(5_000, clicks(1_000)), inline=True)
    record.inline_tensors["sequence_action"] = b"\1" * 8
    tally = Tally()
    assert not tally.compare(record, b"", packer, packed)
    assert tally.report.tensors_different == {"sequence_action": 1}


@pytest.mark.parametrize(
    ("change", "different"),
    [({}, 0), ({"click": 0.5001}, 1), ({"click": 0.50001}, 0), ({"click": float("nan")}, 1), ({"other": 0.5}, 1), ({"": 0.6}, 1)],
)
def test_scores_are_compared_within_the_tolerance(change, different):
    record, tally = RankingRecord(), Tally()
    logged = {"click": 0.5, "": 0.5, **change}
    for name, value in logged.items():
        data = np.full(3, value, np.float32).tobytes()
        if name:
            record.head_scores[name] = data
        else:
            record.scores = data
    values = np.full(3, 0.5, np.float32)
    tally.compare_scores(record, {"click": (values, 5e-5), "": (values, 5e-5)})
    assert (tally.report.scores_compared, tally.report.scores_different) == (1, different)


def test_what_makes_a_replay_pass(packer):
    record, packed = served(packer, inputs_at(5_000, clicks(1_000)), inline=True)
    assert not Tally().finish(elapsed_s=1.0, scoring_s=0.0).ok, "nothing was replayed"
    for reason in EXCLUSIONS:
        alone, tally = Tally(), Tally()
        alone.exclude(reason, "why", record)
        assert not alone.finish(elapsed_s=1.0, scoring_s=0.0).ok
        tally.exclude(reason, "why", record)
        tally.compare(record, b"", packer, packed)
        report = tally.finish(elapsed_s=1.0, scoring_s=0.0)
        assert report.ok == (reason in ACCEPTED)
        assert json.loads(report.to_json())["excluded"] == {reason: 1}
        assert reason in report.to_text()
        assert report.to_text().startswith("OK" if report.ok else "FAILED")

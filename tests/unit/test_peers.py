"""What the Python peers of `freshrank bench peers` do with a record is what freshrank does: else it would compare unlike things."""

import importlib.util
from pathlib import Path

import numpy as np
from rich.console import Console

from deploy import bench_peers
from features.actions import ACTION, EVENT_DTYPE, Batch, decode_batch, encode_action, encode_erase
from features.ids import partition_of, user_key
from features.oracle import naive_fold
from features.sequence import Definition
from protos.v1.actions_pb2 import Action

SCRIPTS = Path(bench_peers.__file__).parents[1] / "tests" / "bench" / "peers"
NOW_MS, TOLERANCE_MS = 1_700_000_000_000, 60_000
USER = 0x0123456789ABCDEF


def peer():
    spec = importlib.util.spec_from_file_location("peer", SCRIPTS / "peer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def action(**given):
    fields = {"user_id": USER, "entity_kind": 1, "entity_id": 5, "action": 2, "event_time_ms": NOW_MS, "event_id": 9, "value": 1.5}
    return encode_action(**{**fields, **given})


def changed(**given):
    message = Action.FromString(action())
    for name, value in given.items():
        setattr(message, name, value)
    return message.SerializeToString()


def without(name):
    message = Action.FromString(action())
    message.ClearField(name)
    return message.SerializeToString()


def test_records_are_judged_and_decoded_as_freshrank_does():
    canonical = action()
    values = [
        canonical,
        action(value=float("nan")),
        action(event_time_ms=NOW_MS + TOLERANCE_MS),
        canonical[9:] + canonical[:9],
        canonical + b"\x72\x06\x0a\x01a\x12\x01b",
        b"\xb8\x06\x96\x01" + canonical,
        without("value"),
        without("request_id"),
        without("entity_id"),
        without("event_id"),
        changed(event_time_ms=NOW_MS + TOLERANCE_MS + 1),
        changed(event_time_ms=0),
        changed(event_time_ms=2**63),
        changed(entity_kind=256),
        changed(action=0),
        changed(surface=65536),
        changed(value=float("inf")),
        changed(user_id=1),
        canonical[:58],
        b"\xff" * 65,
        b"",
    ]
    key = user_key(USER)
    batch = decode_batch(
        log_epoch=1,
        partition=partition_of(key, 4),
        offsets=np.arange(len(values)),
        keys=[key] * len(values),
        values=values,
        append_times_ms=np.full(len(values), NOW_MS),
        future_tolerance_ms=TOLERANCE_MS,
        partition_count=4,
    )
    expected = [event.tobytes() if verdict == ACTION else None for event, verdict in zip(batch.events, batch.verdict, strict=True)]
    assert 5 < sum(event is None for event in expected) < len(values) - 5
    decode = peer().decode
    assert [decode(key, value, NOW_MS, TOLERANCE_MS) for value in values] == expected
    assert decode(key, encode_erase(user_id=USER, event_id=1, reason="asked"), NOW_MS, TOLERANCE_MS) is None


def test_a_row_is_the_naive_fold():
    random = np.random.default_rng(1)
    fold, n, length = peer().fold, 60, 8
    cut = doubled = 0
    for _ in range(50):
        events = np.zeros(n, EVENT_DTYPE)
        events["event_time_ms"] = np.arange(n) + 1 - random.integers(0, 12, n) * (random.random(n) < 0.3)
        events["event_time_ms"] = events["event_time_ms"].clip(1)
        events["event_id"], events["entity_id"] = random.integers(0, 3, n), random.integers(0, 3, n)
        repeats = np.flatnonzero(random.random(n) < 0.1)
        events[repeats] = events[np.maximum(repeats - 1, 0)]
        row = b""
        for event in events:
            after = fold(row, event.tobytes(), length)
            doubled += after is row
            row = after
        batch = Batch(1, 0, np.arange(n), np.arange(n), np.full(n, ACTION, np.uint8), np.full(n, USER, np.uint64), events, {})
        assert row == naive_fold([batch])[USER].sequence(Definition(1, length)).tobytes()
        cut += len(row) == length * EVENT_DTYPE.itemsize
    assert cut
    assert doubled
    assert fold(row, None, length) is row


def test_kafka_streams_is_left_out_where_there_is_no_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_peers._prepare_kafka_streams(tmp_path, Console()) == ()
    assert "no javac" in capsys.readouterr().out

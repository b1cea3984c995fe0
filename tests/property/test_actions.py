"""Both decoders agree on every valid encoding; every wrong record is rejected by name and hurts nobody else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.actions import (
    ACTION,
    CANONICAL_BYTES,
    ERASE,
    REJECTED,
    append_time_ms,
    decode_batch,
    encode_action,
    encode_erase,
    encode_events,
)
from features.ids import partition_of, user_key
from protos.v1.actions_pb2 import Action

U64 = st.integers(0, 2**64 - 1)
FIELDS = st.fixed_dictionaries(
    {
        "user_id": U64,
        "entity_kind": st.integers(1, 255),
        "entity_id": U64,
        "action": st.integers(1, 255),
        "event_time_ms": st.integers(1, 10_000),
        "event_id": U64,
        "request_id": U64,
        "surface": st.integers(0, 65535),
        "value": st.floats(width=32, allow_infinity=False),
    }
)


def decode(values, users, append_ms=10_000, partition_count=1):
    return decode_batch(
        log_epoch=1,
        partition=0,
        offsets=np.arange(len(values)),
        keys=[user if isinstance(user, bytes) else user_key(user) for user in users],
        values=values,
        append_times_ms=np.full(len(values), append_ms, np.int64),
        future_tolerance_ms=1_000,
        partition_count=partition_count,
    )


def reencoded(canonical, order):
    """The same message in another valid encoding: fields in another order, an attribute, a field of a newer schema."""
    pieces, at = [], 0
    while at < len(canonical):
        width = 9 if canonical[at] & 7 == 1 else 5
        pieces.append(canonical[at : at + width])
        at += width
    order.shuffle(pieces)
    extra = Action(attributes=[{"name": "a", "value": "b"}]).SerializeToString() + b"\xfa\x7f\x01x"
    return b"".join(pieces) + extra


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(FIELDS, min_size=1, max_size=8), order=st.randoms(use_true_random=False))
def test_fast_and_slow_decoder_agree(rows, order):
    canonical = [encode_action(**row) for row in rows]
    users = [row["user_id"] for row in rows]
    assert {len(value) for value in canonical} == {CANONICAL_BYTES}
    fast, slow = decode(canonical, users), decode([reencoded(value, order) for value in canonical], users)
    assert fast.verdict.tolist() == [ACTION] * len(rows)
    for a, b in ((fast.events, slow.events), (fast.users, slow.users), (fast.verdict, slow.verdict)):
        assert a.tobytes() == b.tobytes()
    assert encode_events(fast.users, fast.events) == [encode_action(**row | {"value": float(np.float32(row["value"]))}) for row in rows]


GOOD = {"user_id": 7, "entity_kind": 1, "entity_id": 3, "action": 2, "event_time_ms": 9_000, "event_id": 4}


def without(name):
    message = Action.FromString(encode_action(**GOOD))
    message.ClearField(name)
    return message.SerializeToString()


def changed(**fields):
    message = Action.FromString(encode_action(**GOOD))
    for name, value in fields.items():
        setattr(message, name, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        (None, 7, "tombstone"),
        (b"\xff\xff garbage", 7, "not a freshrank.v1.Action"),
        (b"", 7, "user_id: missing"),
        *((without(name), 7, f"{name}: missing") for name in ("entity_id", "event_time_ms", "event_id", "entity_kind", "action")),
        (changed(action=0), 7, "action: 0"),
        (changed(action=256), 7, "action: 256 is above 255"),
        (changed(entity_kind=0), 7, "entity_kind: must be 1"),
        (changed(entity_kind=256), 7, "entity_kind: 256"),
        (changed(surface=65536), 7, "surface: 65536"),
        (changed(event_time_ms=0), 7, "event_time_ms: must be above 0"),
        (changed(event_time_ms=11_001), 7, "ahead of its append time"),
        (changed(event_time_ms=2**63), 7, "event_time_ms"),
        (changed(value=float("inf")), 7, "value: must be finite"),
        (encode_action(**GOOD), 8, "key: not the user id"),
        (encode_action(**GOOD), b"7", "key: not the user id"),
        (encode_action(**GOOD), b"000000000000000G", "key: not the user id"),
        (encode_erase(user_id=7, event_id=1, reason="x"), 8, "key: not the user id"),
    ],
)
def test_each_wrong_record_is_rejected_by_name_and_alone(value, key, reason):
    good = encode_action(**GOOD)
    batch = decode([good, value, good], [7, key, 7])
    assert batch.verdict.tolist() == [ACTION, REJECTED, ACTION]
    assert list(batch.reasons) == [1]
    assert reason in batch.reasons[1]
    assert not batch.events[1].tobytes().strip(b"\0")


def test_edge_of_the_future_tolerance_is_accepted_and_erase_is_told_apart():
    batch = decode([changed(event_time_ms=11_000), encode_erase(user_id=7, event_id=1, reason="asked")], [7, 7])
    assert batch.verdict.tolist() == [ACTION, ERASE]


def test_append_time_comes_from_the_header_of_tools_or_the_broker():
    assert append_time_ms(5, None) == 5
    assert append_time_ms(500, [("other", b"9"), ("freshrank-append-time-ms", b"123")]) == 123
    assert append_time_ms(5, [("freshrank-append-time-ms", b"6")]) == -1, "after the broker took it"
    assert append_time_ms(5, [("freshrank-append-time-ms", b"-1")]) == -1
    assert decode([encode_action(**GOOD)], [7], append_ms=-1).verdict.tolist() == [REJECTED]


@pytest.mark.parametrize("field", ["entity_kind", "action", "surface", "event_time_ms", "user_id"])
def test_the_producer_side_refuses_what_the_worker_would_reject(field):
    with pytest.raises(ValueError, match=field):
        encode_action(**GOOD | {field: -1})


def test_a_record_in_another_partition_than_its_keys_is_rejected():
    good = encode_action(**GOOD)
    others = [decode_in(partition, good) for partition in range(4)]
    assert [batch.verdict[0] == ACTION for batch in others] == [partition_of(user_key(7), 4) == partition for partition in range(4)]
    assert any("murmur2" in reason for batch in others for reason in batch.reasons.values())


def decode_in(partition, value):
    return decode_batch(
        log_epoch=1,
        partition=partition,
        offsets=np.array([0]),
        keys=[user_key(7)],
        values=[value],
        append_times_ms=np.array([10_000]),
        future_tolerance_ms=0,
        partition_count=4,
    )

"""Both decoders agree on every valid encoding; every wrong record is rejected by name and hurts nobody else."""

import json

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from features.actions import (
    ACTION,
    CANONICAL_BYTES,
    ERASE,
    EVENT_DTYPE,
    REJECTED,
    append_time_ms,
    decode_batch,
    encode_action,
    encode_erase,
    encode_events,
)
from features.domain import ENCODINGS
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


def decode(values, users, append_ms=10_000, partition_count=1, encodings=()):
    return decode_batch(
        log_epoch=1,
        partition=0,
        offsets=np.arange(len(values)),
        keys=[user if isinstance(user, bytes) else user_key(user) for user in users],
        values=values,
        append_times_ms=np.full(len(values), append_ms, np.int64),
        future_tolerance_ms=1_000,
        partition_count=partition_count,
        encodings=encodings,
    )


@st.composite
def reencoded(draw, row):
    """An action in another valid encoding: fields in any order, some twice (the last one counts), defaults left out, attributes, and fields
    of a newer schema of every wire type in between.
    """
    fields = dict(pieces(encode_action(**row)))
    defaults = {5: row["request_id"] == 0, 8: row["surface"] == 0, 9: np.isnan(row["value"])}
    parts = [field for number, field in fields.items() if not (defaults.get(number) and draw(st.booleans()))]
    parts = draw(st.permutations(parts))
    overruled = draw(st.lists(st.sampled_from(sorted(fields)), max_size=2))
    parts = [dict(pieces(encode_action(**OTHER)))[number] for number in overruled if fields[number] in parts] + parts
    extras = [Action(attributes=[{"name": "a", "value": "b"}]).SerializeToString(), b"\xf8\x07\x2a", b"\xfa\x07\x01x"]
    extras += [b"\xf9\x07" + bytes(8), b"\xfd\x07" + bytes(4)]
    for extra in draw(st.lists(st.sampled_from(extras), max_size=3)):
        parts.insert(draw(st.integers(0, len(parts))), extra)
    return b"".join(parts)


def pieces(canonical):
    """(number, bytes) of each field."""
    at = 0
    while at < len(canonical):
        width = 9 if canonical[at] & 7 == 1 else 5
        yield canonical[at] >> 3, canonical[at : at + width]
        at += width


OTHER = {"user_id": 1, "entity_kind": 2, "entity_id": 3, "action": 4, "event_time_ms": 5, "event_id": 6, "request_id": 7, "surface": 8}
OTHER |= {"value": 9.0}


def is_canonical(value):
    return len(value) == CANONICAL_BYTES and [number for number, _ in pieces(value)] == list(range(1, 10))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.lists(FIELDS, min_size=1, max_size=8))
def test_fast_and_slow_decoder_agree(data, rows):
    """Each record alone in its batch, or beside records of the other kind: what it means depends on its fields alone."""
    canonical = [encode_action(**row) for row in rows]
    users = [row["user_id"] for row in rows]
    assert all(map(is_canonical, canonical))
    fast = decode(canonical, users)
    assert fast.verdict.tolist() == [ACTION] * len(rows)
    for i, row in enumerate(rows):
        expected = {name: row[name] for name in EVENT_DTYPE.names} | {"value": float(np.float32(row["value"]))}
        assert repr(dict(zip(EVENT_DTYPE.names, fast.events[i].tolist(), strict=True))) == repr(expected)
    others = [data.draw(reencoded(row)) for row in rows]
    mixed = [data.draw(st.sampled_from(pair)) for pair in zip(canonical, others, strict=True)]
    for values in (others, mixed):
        slow = decode(values, users)
        assert not slow.reasons
        for a, b in ((fast.events, slow.events), (fast.users, slow.users), (fast.verdict, slow.verdict)):
            assert a.tobytes() == b.tobytes()
    assert encode_events(fast.users, fast.events) == [encode_action(**row | {"value": float(np.float32(row["value"]))}) for row in rows]


def framed(value, indexes=(), schema_id=7):
    """Behind the frame of a Schema Registry; no index: the first message of the file."""
    numbers = [len(indexes), *indexes] if indexes else [0]
    return b"\0" + schema_id.to_bytes(4, "big") + b"".join(map(varint, numbers)) + value


def varint(number):
    number, found = number << 1, bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


@st.composite
def as_json(draw, message):
    """The message as JSON of one style or another: ids as texts or numbers, names of both kinds, spaces, fields that nobody knows."""
    fields = MessageToDict(message, preserving_proto_field_name=draw(st.booleans()))
    if np.isfinite(message.value) and "value" in fields:  # its shortest text may be above the greatest float32, which protobuf refuses
        fields["value"] = message.value
    if draw(st.booleans()):
        fields = {name: int(value) if isinstance(value, str) and name != "value" else value for name, value in fields.items()}
    fields |= draw(st.sampled_from([{}, {"client": {"version": [1, "2"]}}, {"attributes": [{"name": "a", "value": "b"}], "request": None}]))
    items = draw(st.permutations(list(fields.items())))
    return json.dumps(dict(items), indent=draw(st.sampled_from([None, 1])), ensure_ascii=draw(st.booleans())).encode()


FRAMES = st.tuples(st.lists(st.integers(0, 300), max_size=3), st.integers(0, 2**32 - 1))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.lists(FIELDS, min_size=1, max_size=6))
def test_an_action_or_erasure_is_the_same_in_every_encoding(data, rows):
    users = [row["user_id"] for row in rows]
    plain = [encode_action(**row) for row in rows]
    erased = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    for i, erase in enumerate(erased):
        if erase:
            plain[i] = encode_erase(user_id=users[i], event_id=1, reason=data.draw(st.sampled_from(["", "asked", "\u0416"])))
    expected = decode(plain, users)
    assert expected.verdict.tolist() == [ERASE if erase else ACTION for erase in erased]
    others = [
        data.draw(
            st.one_of(as_json(Action.FromString(value)), FRAMES.map(lambda frame, value=value: framed(value, *frame)), st.just(value))
        )
        for value in plain
    ]
    found = decode(others, users, encodings=ENCODINGS)
    assert not found.reasons
    for a, b in ((expected.events, found.events), (expected.users, found.users), (expected.verdict, found.verdict)):
        assert a.tobytes() == b.tobytes()
    assert decode(plain, users, encodings=ENCODINGS).events.tobytes() == expected.events.tobytes()


ODD_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["\ud800", "NaN", "1e5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*Action.DESCRIPTOR.fields_by_name, "reason", "x"]), inner),
    max_leaves=6,
)
NEARLY = st.one_of(
    st.binary(max_size=80),
    st.binary(max_size=80).map(lambda tail: b"\0" + tail),
    st.binary(max_size=80).map(lambda tail: b"{" + tail),
    st.dictionaries(st.sampled_from([*Action.DESCRIPTOR.fields_by_name, "userId", "x"]), ODD_JSON).map(
        lambda odd: json.dumps(odd).encode()
    ),
)


@settings(max_examples=400, deadline=None)
@given(values=st.lists(NEARLY, min_size=1, max_size=4), encodings=st.sets(st.sampled_from(ENCODINGS)))
def test_whatever_the_bytes_are_they_hurt_nobody_else(values, encodings):
    good = encode_action(**GOOD)
    batch = decode([good, *values, good], [7] * (len(values) + 2), encodings=encodings)
    assert batch.verdict[[0, -1]].tolist() == [ACTION, ACTION]
    assert set(batch.reasons) == set(np.flatnonzero(batch.verdict == REJECTED).tolist())
    for reason in batch.reasons.values():
        assert len(reason.encode()) < 400, "it goes into a dead letter"


def test_two_records_that_only_together_have_the_canonical_length_are_told_apart():
    """A decoder that looked at the joined bytes alone would read two actions here."""
    joined = encode_action(**GOOD) * 2
    for cut in range(CANONICAL_BYTES - 9, CANONICAL_BYTES + 10):
        values = [joined[:cut], joined[cut:]]
        assert decode(values, [7, 7]).verdict.tolist() == [decode([value], [7]).verdict[0] for value in values]


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


JSON = json.dumps(GOOD).encode()
DEEP = b'{"x":' + b"[" * 100_000


@pytest.mark.parametrize(
    ("value", "encodings", "reason"),
    [
        (JSON, (), 'add "json" to encodings'),
        (JSON, ("schema_registry",), 'add "json" to encodings'),
        (framed(encode_action(**GOOD)), (), 'add "schema_registry" to encodings'),
        (framed(encode_action(**GOOD)), ("json",), 'add "schema_registry" to encodings'),
        (framed(JSON), ENCODINGS, "value: not a freshrank.v1.Action behind"),
        (framed(framed(encode_action(**GOOD))), ENCODINGS, "value: not a freshrank.v1.Action behind"),
        (framed(b"", range(17)) + encode_action(**GOOD), ENCODINGS, "value: not a Schema Registry frame"),
        (b"\0\0\0", ENCODINGS, "value: not a Schema Registry frame"),
        (b"\0\0\0\0\7", ENCODINGS, "value: not a Schema Registry frame"),
        (b"\0\0\0\0\7\1", ENCODINGS, "value: not a Schema Registry frame"),
        (b"\0\0\0\0\7\2", ENCODINGS, "value: not a Schema Registry frame"),
        (b"\0\0\0\0\7" + b"\xff" * 9, ENCODINGS, "value: not a Schema Registry frame"),
        (framed(b""), ENCODINGS, "user_id: missing"),
        (framed(changed(action=256)), ENCODINGS, "action: 256 is above 255"),
        (b"{", ENCODINGS, "value: not the JSON of a freshrank.v1.Action"),
        (b'{"user_id": 7, "user_id": 7}', ENCODINGS, "value: not the JSON"),
        (b"{\xff}", ENCODINGS, "value: not the JSON"),
        (json.dumps(GOOD | {"user_id": 2**64}).encode(), ENCODINGS, "value: not the JSON"),
        (json.dumps(GOOD | {"user_id": 1.5}).encode(), ENCODINGS, "value: not the JSON"),
        (json.dumps(GOOD | {"action": "click"}).encode(), ENCODINGS, "value: not the JSON"),
        (json.dumps(GOOD | {"attributes": [{"name": "\ud800"}]}).encode(), ENCODINGS, "value: not the JSON"),
        (json.dumps(GOOD | {"value": "Infinity"}).encode(), ENCODINGS, "value: must be finite"),
        (json.dumps(GOOD | {"event_id": None}).encode(), ENCODINGS, "event_id: missing"),
        (json.dumps(GOOD | {"erase": ""}).encode(), ENCODINGS, "value: erase must be an object"),
        (json.dumps(GOOD | {"erase": []}).encode(), ENCODINGS, "value: erase must be an object"),
        (DEEP, ENCODINGS, "value: JSON with more than 200"),
    ],
)
def test_a_malformed_or_unexpected_encoding_is_rejected_with_what_to_do(value, encodings, reason):
    batch = decode([encode_action(**GOOD), value], [7, 7], encodings=encodings)
    assert batch.verdict.tolist() == [ACTION, REJECTED]
    assert batch.reasons[1].startswith(reason) or reason in batch.reasons[1]


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

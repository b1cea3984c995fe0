"""Bytes that must never change by accident: wire records and rows, of this version and of the one before."""

import numpy as np
import pytest

from features.actions import ACTION, CANONICAL_BYTES, EVENT_DTYPE, Batch, decode_batch, encode_action, encode_erase
from features.ports import SequenceCorruptError
from features.sequence import HEADER_DTYPE, Definition, Row, apply_batch, decode_row, encode_row
from protos.v1.actions_pb2 import Action

ACTION_HEX = (
    "092a000000000000001107000000000000001900e876481700000021630000000000000029000000000000000035010000003d0200000045030000004d0000c03f"
)
ERASE_HEX = "092a000000000000002163000000000000007a070a0561736b6564"
# The wire before `request_id` and `value` existed.
ACTION_BEFORE_HEX = "092a000000000000001107000000000000001900e876481700000021630000000000000035010000003d020000004503000000"
ROW_HEX = (
    "46525351d8cba76b01000200280002002a0000000000000008070605040302010900000000000000d204000000000000ffff"
    "ffffffffffff0300000000000000e8030000000000000b00000000000000070000000000000063000000000000000000c03f"
    "03000102d0070000000000000c00000000000000080000000000000000000000000000000000c07f00000101"
)
# Schema 1 of the row, before `request_id` existed: records of 32 bytes.
ROW_BEFORE_HEX = (
    "46525351f5fad74601000100200002002a0000000000000008070605040302010900000000000000d204000000000000ffff"
    "ffffffffffff0300000000000000e8030000000000000b0000000000000007000000000000000000c03f03000102d0070000"
    "000000000c0000000000000008000000000000000000c07f00000101"
)
ROW_EVENTS = [(1_000, 11, 7, 99, 1.5, 3, 1, 2), (2_000, 12, 8, 0, float("nan"), 0, 1, 1)]


def golden_row():
    return Row(42, 0x0102030405060708, 9, 3, 1234, -1, np.array(ROW_EVENTS, EVENT_DTYPE))


def test_canonical_action_bytes():
    data = encode_action(user_id=42, entity_kind=1, entity_id=7, action=2, event_time_ms=100_000_000_000, event_id=99, surface=3, value=1.5)
    assert data.hex() == ACTION_HEX
    assert len(data) == CANONICAL_BYTES == 65
    assert encode_erase(user_id=42, event_id=99, reason="asked").hex() == ERASE_HEX


def test_row_bytes():
    assert encode_row(golden_row()).hex() == ROW_HEX
    assert decode_row(bytes.fromhex(ROW_HEX), 42).events.tobytes() == golden_row().events.tobytes()
    assert len(encode_row(golden_row())) == HEADER_DTYPE.itemsize + 2 * EVENT_DTYPE.itemsize == 64 + 2 * 40


def test_row_of_the_older_schema_is_read():
    row = decode_row(bytes.fromhex(ROW_BEFORE_HEX), 42)
    assert row.events["entity_id"].tolist() == [7, 8]
    assert row.events["request_id"].tolist() == [0, 0], "schema 1 had no request_id"
    assert row.events["action"].tolist() == [2, 1]
    assert (row.offset, row.partition, row.log_epoch) == (1234, 3, 9)


def test_a_batch_is_folded_into_a_row_of_the_older_schema():
    event = np.array([(3_000, 13, 9, 5, 2.5, 0, 1, 1)], EVENT_DTYPE)
    batch = Batch(9, 3, np.array([1235]), np.array([3_000]), np.array([ACTION], np.uint8), np.array([42], np.uint64), event, {})
    (row,) = apply_batch(Definition(0x0102030405060708, 10), batch, [bytes.fromhex(ROW_BEFORE_HEX)], 0)
    events = decode_row(row, 42).events
    assert events["entity_id"].tolist() == [7, 8, 9]
    assert events["request_id"].tolist() == [0, 0, 5]


def test_action_of_the_older_schema_is_read():
    message = Action.FromString(bytes.fromhex(ACTION_BEFORE_HEX))
    assert (message.user_id, message.action) == (42, 2)
    batch = decode_batch(
        log_epoch=1,
        partition=0,
        offsets=np.array([0]),
        keys=[b"000000000000002a"],
        values=[bytes.fromhex(ACTION_BEFORE_HEX)],
        append_times_ms=np.array([100_000_000_000]),
        future_tolerance_ms=0,
        partition_count=1,
    )
    event = batch.events[0]
    assert (batch.verdict[0], event["entity_id"], event["request_id"], event["surface"]) == (ACTION, 7, 0, 3)
    assert np.isnan(event["value"])


def test_every_single_bit_flip_is_detected():
    good = encode_row(golden_row())
    for bit in range(len(good) * 8):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SequenceCorruptError):
            decode_row(bytes(damaged), 42)


def test_a_row_never_answers_for_another_user_and_truncation_is_seen():
    good = encode_row(golden_row())
    with pytest.raises(SequenceCorruptError, match="another user"):
        decode_row(good, 43)
    for size in (0, 10, 63, 64, len(good) - 1):
        with pytest.raises(SequenceCorruptError):
            decode_row(good[:size], 42)

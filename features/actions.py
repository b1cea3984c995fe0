"""Actions and their one decoder.

A record of the actions topic becomes one row of `EVENT_DTYPE`, or an erasure, or is rejected with a reason. The verdict depends on the
record (key, value, append time) and on the domain's future tolerance alone, never on a clock or on state, so that a replay repeats it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from features.ids import partitions_of, user_key, user_keys
from protos.v1.actions_pb2 import Action

EVENT_DTYPE = np.dtype(
    [
        ("event_time_ms", "<i8"),
        ("event_id", "<u8"),
        ("entity_id", "<u8"),
        ("request_id", "<u8"),
        ("value", "<f4"),
        ("surface", "<u2"),
        ("entity_kind", "u1"),
        ("action", "u1"),
    ]
)
"""One event of a sequence, 40 bytes, little-endian, no gaps. The same bytes stand in rows, replies and golden files."""

APPEND_TIME_HEADER = "freshrank-append-time-ms"
"""Record header with the original append time (ASCII decimal), set only by import, re-drive, archive and migration tools."""

_WIRE = np.dtype(
    [
        *(
            field
            for n, name in enumerate(("user_id", "entity_id", "event_time_ms", "event_id", "request_id"), 1)
            for field in ((f"t{n}", "u1"), (name, "<u8"))
        ),
        *(field for n, name in enumerate(("entity_kind", "action", "surface"), 6) for field in ((f"t{n}", "u1"), (name, "<u4"))),
        ("t9", "u1"),
        ("value", "<f4"),
    ]
)
CANONICAL_BYTES = _WIRE.itemsize
_TAGS = {f"t{n}": (n << 3) | (1 if n <= 5 else 5) for n in range(1, 10)}
_REQUIRED = ("user_id", "entity_id", "event_time_ms", "event_id", "entity_kind", "action")
TIME_MS_MAX = 2**62
"""No event time is this or later."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)

REJECTED, ACTION, ERASE = 0, 1, 2
FORGOTTEN = 3
"""Only in archives, where a user was erased since: the record was accepted and moves the clock, and touches nobody any more."""


@dataclass(frozen=True)
class Batch:
    """Decoded records of one partition, in offset order. All arrays have one entry a record.

    verdict uint8 (REJECTED, ACTION, ERASE); users uint64 (0 where rejected); events EVENT_DTYPE (zeros unless ACTION);
    append_time_ms int64 (-1 where the record has none that can be read); reasons: why, by index, for the rejected ones.
    """

    log_epoch: int
    partition: int
    offsets: npt.NDArray[np.int64]
    append_time_ms: npt.NDArray[np.int64]
    verdict: npt.NDArray[np.uint8]
    users: npt.NDArray[np.uint64]
    events: npt.NDArray[np.void]
    reasons: dict[int, str]

    def __len__(self) -> int:
        return len(self.offsets)


def encode_action(
    *,
    user_id: int,
    entity_kind: int,
    entity_id: int,
    action: int,
    event_time_ms: int,
    event_id: int,
    request_id: int = 0,
    surface: int = 0,
    value: float = float("nan"),
) -> bytes:
    """Canonical bytes of one action: every field written, in order, CANONICAL_BYTES long. Raises ValueError naming a field out of range."""
    limits = {"entity_kind": (entity_kind, 1, 255), "action": (action, 1, 255), "surface": (surface, 0, 65535)}
    limits["event_time_ms"] = (event_time_ms, 1, TIME_MS_MAX - 1)
    for name, number in (("user_id", user_id), ("entity_id", entity_id), ("event_id", event_id), ("request_id", request_id)):
        limits[name] = (number, 0, 2**64 - 1)
    for name, (number, low, high) in limits.items():
        if not low <= number <= high:
            raise ValueError(f"{name}: {number} is not in {low}..{high}")
    if np.isnan(value):
        value = float("nan")  # one NaN: its bits are part of the canonical bytes
    elif not abs(value) <= _FLOAT32_MAX:
        raise ValueError("value: must be a finite float32, or NaN for none")
    message = Action(user_id=user_id, entity_id=entity_id, event_time_ms=event_time_ms, event_id=event_id, request_id=request_id)
    message.entity_kind, message.action, message.surface, message.value = entity_kind, action, surface, value
    return bytes(message.SerializeToString(deterministic=True))


def encode_erase(*, user_id: int, event_id: int, reason: str) -> bytes:
    """Bytes of an erasure record."""
    message = Action(user_id=user_id, event_id=event_id)
    message.erase.reason = reason
    return bytes(message.SerializeToString(deterministic=True))


def encode_events(users: npt.NDArray[np.uint64], events: npt.NDArray[np.void]) -> list[bytes]:
    """Canonical bytes of many actions at once: users uint64 [n], events EVENT_DTYPE [n]; equal to `encode_action` of each."""
    wire = np.zeros(len(events), _WIRE)
    for tag, value in _TAGS.items():
        wire[tag] = value
    wire["user_id"] = users
    for name in EVENT_DTYPE.names or ():
        wire[name] = events[name]
    data = wire.tobytes()
    return [data[start : start + CANONICAL_BYTES] for start in range(0, len(data), CANONICAL_BYTES)]


def append_time_ms(timestamp_ms: int, headers: Seq[tuple[str, bytes | None]] | None) -> int:
    """The record's append time: the header of import and re-drive tools where present, else the broker's.

    -1: the header cannot be read, or claims a time after the broker took the record.
    """
    for name, value in headers or ():
        if name == APPEND_TIME_HEADER:
            text = value or b""
            claimed = int(text) if text.isdigit() and len(text) < 19 else -1
            return claimed if claimed <= timestamp_ms else -1
    return timestamp_ms


def decode_batch(
    *,
    log_epoch: int,
    partition: int,
    offsets: npt.NDArray[np.int64],
    keys: Seq[bytes | None],
    values: Seq[bytes | None],
    append_times_ms: npt.NDArray[np.int64],
    future_tolerance_ms: int,
    partition_count: int,
) -> Batch:
    """Decodes records of one partition of a topic with `partition_count` partitions.

    Canonical bytes are read by NumPy from the joined values; any other valid encoding takes the generated class and gives the same events.
    """
    n = len(values)
    events = np.zeros(n, EVENT_DTYPE)
    users = np.zeros(n, np.uint64)
    verdict = np.zeros(n, np.uint8)
    reasons: dict[int, str] = {}
    fast = np.fromiter((value is not None and len(value) == CANONICAL_BYTES for value in values), bool, n)
    if fast.any():
        index = np.flatnonzero(fast)
        wire = np.frombuffer(b"".join(value for value, is_fast in zip(values, fast, strict=True) if is_fast and value is not None), _WIRE)
        canonical = np.ones(len(wire), bool)
        for tag, expected in _TAGS.items():
            canonical &= wire[tag] == expected
        narrow = canonical & (wire["entity_kind"] < 256) & (wire["action"] < 256) & (wire["surface"] < 65536)
        narrow &= wire["event_time_ms"] < TIME_MS_MAX
        index, wire = index[narrow], wire[narrow]
        users[index] = wire["user_id"]
        for name in EVENT_DTYPE.names or ():
            events[name][index] = wire[name]
        verdict[index] = ACTION
        fast[:] = False
        fast[index] = True
    for i in np.flatnonzero(~fast).tolist():
        _decode_slow(i, values[i], users, events, verdict, reasons)
    _judge(keys, users, events, verdict, append_times_ms, future_tolerance_ms, reasons)
    accepted = np.flatnonzero(verdict != REJECTED)
    misplaced = partitions_of(users[accepted], partition_count) != partition
    for i in accepted[misplaced].tolist():  # a reader would look for this user elsewhere, and an erasure would miss
        reasons.setdefault(i, f"partition: murmur2 of the key says another one than {partition}; set partitioner=murmur2_random")
    rejected = np.fromiter(reasons, np.int64, len(reasons))
    verdict[rejected], users[rejected] = REJECTED, 0
    events[verdict != ACTION] = np.zeros((), EVENT_DTYPE)
    value = events["value"]
    value[np.isnan(value)] = np.float32(np.nan)
    return Batch(log_epoch, partition, offsets, append_times_ms, verdict, users, events, reasons)


def _decode_slow(
    i: int,
    value: bytes | None,
    users: npt.NDArray[np.uint64],
    events: npt.NDArray[np.void],
    verdict: npt.NDArray[np.uint8],
    reasons: dict[int, str],
) -> None:
    if value is None:
        reasons[i] = "value: empty (a tombstone); erase a user with an erase record"
        return
    try:
        message = Action.FromString(value)
    except DecodeError:
        reasons[i] = "value: not a freshrank.v1.Action"
        return
    if message.HasField("erase"):
        if not message.HasField("user_id"):
            reasons[i] = "user_id: missing"
        users[i], verdict[i] = message.user_id, ERASE
        return
    missing = [name for name in _REQUIRED if not message.HasField(name)]
    if missing:
        reasons[i] = f"{missing[0]}: missing"
        return
    for name, number, high in (
        ("entity_kind", message.entity_kind, 255),
        ("action", message.action, 255),
        ("surface", message.surface, 65535),
        ("event_time_ms", message.event_time_ms, TIME_MS_MAX - 1),
    ):
        if number > high:
            reasons[i] = f"{name}: {number} is above {high}"
            return
    users[i], verdict[i] = message.user_id, ACTION
    row = events[i]
    for name in EVENT_DTYPE.names or ():
        row[name] = getattr(message, name)
    if not message.HasField("value"):
        row["value"] = np.nan


def _judge(
    keys: Seq[bytes | None],
    users: npt.NDArray[np.uint64],
    events: npt.NDArray[np.void],
    verdict: npt.NDArray[np.uint8],
    append_times_ms: npt.NDArray[np.int64],
    future_tolerance_ms: int,
    reasons: dict[int, str],
) -> None:
    """The checks that both decoders share; adds to `reasons`."""
    is_action = verdict == ACTION
    time_ms = events["event_time_ms"]
    for i in np.flatnonzero(append_times_ms < 0):
        reasons.setdefault(int(i), f"header {APPEND_TIME_HEADER}: not a time in milliseconds up to the broker's")
    for i in np.flatnonzero((verdict != REJECTED) & ~_keys_agree(keys, users)):
        reasons.setdefault(int(i), f"key: not the user id as 16 hexadecimal digits, {user_key(int(users[i])).decode()}")
    for bad, reason in (
        (time_ms <= 0, "event_time_ms: must be above 0"),
        (time_ms - future_tolerance_ms > append_times_ms, f"event_time_ms: more than {future_tolerance_ms} ms ahead of its append time"),
        (events["action"] == 0, "action: 0 is padding"),
        (events["entity_kind"] == 0, "entity_kind: must be 1 to 255"),
        (np.isinf(events["value"]), "value: must be finite, or NaN for none"),
    ):
        for i in np.flatnonzero(is_action & bad):
            reasons.setdefault(int(i), reason)


def _keys_agree(keys: Seq[bytes | None], users: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    right_length = np.fromiter((key is not None and len(key) == 16 for key in keys), bool, len(keys))
    found = np.zeros((len(keys), 16), np.uint8)
    joined = b"".join(key for key, right in zip(keys, right_length, strict=True) if right and key is not None)
    found[right_length] = np.frombuffer(joined, np.uint8).reshape(-1, 16)
    agree: npt.NDArray[np.bool_] = right_length & (found == user_keys(users)).all(axis=1)
    return agree

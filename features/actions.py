"""Actions and their one decoder.

A record of the actions topic becomes one row of `EVENT_DTYPE`, or an erasure, or is rejected with a reason. The verdict depends on the
record (key, value, append time) and on the domain's future tolerance and encodings alone, never on a clock or on state, so that a replay
repeats it.
"""

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from features.domain import Encoding
from features.encodings import FRAME, FRAME_BYTES, read_action
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
_TAG_PLACES = tuple((_WIRE.fields[name][1], tag) for name, tag in _TAGS.items()) if _WIRE.fields else ()
_KEY_BYTES = 16
_NO_KEY = bytes(_KEY_BYTES)
_NOT_CANONICAL = bytes(CANONICAL_BYTES)
_REQUIRED = ("user_id", "entity_id", "event_time_ms", "event_id", "entity_kind", "action")
TIME_MS_MAX = 2**62
"""No event time is this or later."""
_HIGHEST = {"entity_kind": 255, "action": 255, "surface": 65535, "event_time_ms": TIME_MS_MAX - 1}
_OPTIONAL = (("request_id", 0), ("surface", 0), ("value", float("nan")))
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

    def parts(self, users_max: int) -> Iterator["Batch"]:
        """The batch cut into stretches of the log with at most `users_max` users each; as a rule it is one, itself."""
        if len(self) < 2 or len(self.by_user.users) <= users_max:
            yield self
            return
        middle = len(self) // 2
        for part in (slice(0, middle), slice(middle, len(self))):
            columns = (self.offsets[part], self.append_time_ms[part], self.verdict[part], self.users[part], self.events[part])
            reasons = {i - part.start: reason for i, reason in self.reasons.items() if part.start <= i < part.stop}
            yield from Batch(self.log_epoch, self.partition, *columns, reasons).parts(users_max)

    @cached_property
    def by_user(self) -> "ByUser":
        """The records that were not rejected, user by user."""
        live = np.flatnonzero(self.verdict != REJECTED)
        users = self.users[live]
        order = np.argsort(users, kind="stable")
        users = users[order]
        is_first = np.ones(len(users), bool)
        np.not_equal(users[1:], users[:-1], out=is_first[1:])
        starts = np.flatnonzero(is_first)
        return ByUser(users[starts], live[order], starts, np.append(starts, len(users))[1:])


@dataclass(frozen=True)
class ByUser:
    """Records grouped by user: those of users[i] (uint64, ascending) are order[starts[i]:ends[i]], indices of the batch in offset order."""

    users: npt.NDArray[np.uint64]
    order: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


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
    encodings: Collection[Encoding] = (),
) -> Batch:
    """Decodes records of one partition of a topic with `partition_count` partitions. `encodings`: the domain file's.

    Canonical bytes are read by NumPy from the joined values; any other valid encoding takes the generated class and gives the same events.
    """
    n = len(values)
    reasons: dict[int, str] = {}
    plain = [_behind_frame(value) for value in values] if "schema_registry" in encodings else values
    # Where a value cannot be canonical, bytes of zeros stand in for it: then no step below needs an index.
    if None in plain or set(map(len, plain)) - {CANONICAL_BYTES}:  # type: ignore[arg-type]
        wire_values = [value if value is not None and len(value) == CANONICAL_BYTES else _NOT_CANONICAL for value in plain]
        wire = np.frombuffer(b"".join(wire_values), _WIRE)
    else:
        wire = np.frombuffer(b"".join(plain), _WIRE)  # type: ignore[arg-type]
    users, events, verdict = wire["user_id"].astype("<u8"), _events_of(wire), np.full(n, ACTION, np.uint8)
    other = np.flatnonzero(~_canonical(wire))
    if len(other):
        verdict[other], users[other], events[other] = REJECTED, 0, np.zeros((), EVENT_DTYPE)
        _decode_other(other, values, encodings, users, events, verdict, reasons)
    _judge(keys, users, events, verdict, append_times_ms, future_tolerance_ms, reasons)
    misplaced = np.flatnonzero((partitions_of(users, partition_count) != partition) & (verdict != REJECTED))
    for i in misplaced.tolist():  # a reader would look for this user elsewhere, and an erasure would miss
        reasons.setdefault(i, f"partition: murmur2 of the key says another one than {partition}; set partitioner=murmur2_random")
    if reasons:
        rejected = np.fromiter(reasons, np.int64, len(reasons))
        verdict[rejected], users[rejected], events[rejected] = REJECTED, 0, np.zeros((), EVENT_DTYPE)
    value = events["value"]
    none = np.isnan(value)
    if none.any():
        value[none] = np.float32(np.nan)
    return Batch(log_epoch, partition, offsets, append_times_ms, verdict, users, events, reasons)


def _behind_frame(value: bytes | None) -> bytes | None:
    """What may be canonical behind a Schema Registry's frame; other values as they are, for `read_action`."""
    if value is not None and len(value) == FRAME_BYTES + CANONICAL_BYTES and value[0] == FRAME and value[FRAME_BYTES - 1] == 0:
        return value[FRAME_BYTES:]
    return value


def _canonical(wire: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Which records have the canonical layout and fit EVENT_DTYPE."""
    octets = wire.view(np.uint8).reshape(-1, CANONICAL_BYTES)
    fine = np.ones(len(wire), bool)
    for at, tag in _TAG_PLACES:
        fine &= octets[:, at] == tag
    for name, high in _HIGHEST.items():
        fine &= wire[name] <= high
    return fine


def _events_of(wire: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    events = np.empty(len(wire), EVENT_DTYPE)
    for name in EVENT_DTYPE.names or ():
        events[name] = wire[name]
    return events


def _decode_other(
    other: npt.NDArray[np.int64],
    values: Seq[bytes | None],
    encodings: Collection[Encoding],
    users: npt.NDArray[np.uint64],
    events: npt.NDArray[np.void],
    verdict: npt.NDArray[np.uint8],
    reasons: dict[int, str],
) -> None:
    """Decodes the records `other` by the generated class, which writes actions anew in canonical bytes."""
    where, recoded = [], []
    for i in other.tolist():
        found = _recode(values[i], encodings)
        if isinstance(found, str):
            reasons[i] = found
        elif isinstance(found, bytes):
            where.append(i)
            recoded.append(found)
        else:
            users[i], verdict[i] = found, ERASE
    wire = np.frombuffer(b"".join(recoded), _WIRE)
    index, fits = np.array(where, np.int64), _canonical(wire)
    for i, record in zip(index[~fits].tolist(), wire[~fits], strict=True):
        reasons[i] = next(f"{name}: {record[name]} is above {high}" for name, high in _HIGHEST.items() if record[name] > high)
    index, wire = index[fits], wire[fits]
    users[index], events[index], verdict[index] = wire["user_id"], _events_of(wire), ACTION


def _recode(value: bytes | None, encodings: Collection[Encoding]) -> bytes | int | str:
    """Canonical bytes of an action in any valid encoding; the user whom it erases; or why it is neither."""
    if value is None:
        return "value: empty (a tombstone); erase a user with an erase record"
    message = read_action(value, encodings)
    if isinstance(message, str):
        return message
    has = message.HasField
    if has("erase"):
        return int(message.user_id) if has("user_id") else "user_id: missing"
    for name in _REQUIRED:
        if not has(name):
            return f"{name}: missing"
    for name, default in _OPTIONAL:
        if not has(name):
            setattr(message, name, default)
    message.ClearField("attributes")
    message.DiscardUnknownFields()
    return bytes(message.SerializeToString())


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
    if None in keys or set(map(len, keys)) - {_KEY_BYTES}:  # type: ignore[arg-type]
        keys = [key if key is not None and len(key) == _KEY_BYTES else _NO_KEY for key in keys]
    found = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)  # type: ignore[arg-type]
    expected = user_keys(users).view("<u8")
    agree: npt.NDArray[np.bool_] = (found[:, 0] == expected[:, 0]) & (found[:, 1] == expected[:, 1])
    return agree

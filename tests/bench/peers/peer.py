"""What the Python peers share: the job that `deploy/bench_peers.py` wrote, the meter, one event's decoding, and the fold of one user.

A peer is started with the path of its job, lines of `name=value`. It folds the topic's `records` records, measures itself over the last
two thirds of them, and writes `result` (lines of `name=value`) and `rows` (lines of "key row", both in hexadecimal) for the users that
`keys` names.
"""

import math
import os
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from google.protobuf.message import DecodeError

from protos.v1.actions_pb2 import Action

_WIRE = struct.Struct("<BQBQBQBQBQBIBIBIBf")
_TAGS = tuple((n << 3) | (1 if n <= 5 else 5) for n in range(1, 10))
_EVENT = struct.Struct("<qQQQfHBB")
EVENT_BYTES = _EVENT.size
_ORDER = struct.Struct("<qQ")
_REQUIRED = ("user_id", "entity_id", "event_time_ms", "event_id", "entity_kind", "action")
_TIME_MS_MAX = 2**62


@dataclass(frozen=True)
class Job:
    """What to fold, and where the result goes. `state`: folder of the peer's store. `length`: events kept of a user."""

    bootstrap: str
    topic: str
    group: str
    partitions: int
    records: int
    length: int
    tolerance_ms: int
    state: Path
    keys: Path
    result: Path
    rows: Path

    @staticmethod
    def from_argv() -> "Job":
        given = dict(line.split("=", 1) for line in Path(sys.argv[1]).read_text("utf-8").splitlines())
        return Job(**{field.name: field.type(given[field.name]) for field in fields(Job)})

    def write_rows(self, row_of: Callable[[bytes], bytes | None]) -> None:
        """Writes the rows of the sampled users: `row_of(key)` reads one from the peer's store."""
        keys = [bytes.fromhex(line) for line in self.keys.read_text("ascii").split()]
        self.rows.write_text("".join(f"{key.hex()} {(row_of(key) or b'').hex()}\n" for key in keys), "ascii")


class Meter:
    """CPU of all threads of this process and wall time, from the first third of the records to the closing commit."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._steady_from = job.records // 3
        self.count = 0
        self._start: tuple[float, float, int] | None = None

    def add(self, count: int) -> None:
        """So many more records are folded."""
        self.count += count
        if self._start is None and self.count >= self._steady_from:
            self._start = time.monotonic(), time.process_time(), self.count

    @property
    def is_complete(self) -> bool:
        return self.count >= self._job.records

    def finish(self) -> None:
        """Everything is folded and committed: writes the result."""
        wall_s, cpu_s = time.monotonic(), time.process_time()
        if self.count != self._job.records or self._start is None:
            raise SystemExit(f"{self.count} records folded, the topic holds {self._job.records}")
        pages = Path("/proc/self/statm").read_text("ascii").split()
        resident_bytes = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
        lines = {"wall_s": wall_s - self._start[0], "cpu_s": cpu_s - self._start[1], "records": self.count - self._start[2]}
        lines["resident_mb"] = resident_bytes / 1e6
        self._job.result.write_text("".join(f"{name}={value}\n" for name, value in lines.items()), "ascii")


def decode(key: bytes, value: bytes, append_ms: int, tolerance_ms: int) -> bytes | None:
    """One record's event, 40 bytes as freshrank keeps them; None: the record does not keep the contract."""
    tags: tuple[int, ...] = ()
    if len(value) == _WIRE.size:
        t1, user, t2, entity, t3, time_ms, t4, event_id, t5, request, t6, kind, t7, action, t8, surface, t9, number = _WIRE.unpack(value)
        tags = (t1, t2, t3, t4, t5, t6, t7, t8, t9)
    if tags != _TAGS:
        try:
            message = Action.FromString(value)
        except DecodeError:
            return None
        if message.HasField("erase") or not all(message.HasField(name) for name in _REQUIRED):
            return None
        user, entity, time_ms, event_id = message.user_id, message.entity_id, message.event_time_ms, message.event_id
        request, kind, action, surface = message.request_id, message.entity_kind, message.action, message.surface
        number = message.value if message.HasField("value") else math.nan
    if key != b"%016x" % user or not 0 < time_ms < _TIME_MS_MAX or time_ms - tolerance_ms > append_ms:
        return None
    if not 0 < kind < 256 or not 0 < action < 256 or surface > 65535 or math.isinf(number):
        return None
    return _EVENT.pack(time_ms, event_id, entity, request, number, surface, kind, action)


def fold(row: bytes, event: bytes | None, length: int) -> bytes:
    """The row with the event in it: ascending by (event_time_ms, event_id, bytes), each event once, the newest `length` of them.

    The same object where nothing changes.
    """
    if event is None:
        return row
    if not row:
        return event
    new = _order(event)
    at = len(row)
    while at:  # from the newest: nearly every event belongs at the end or close to it
        old = row[at - EVENT_BYTES : at]
        if old == event:
            return row
        if _order(old) < new:
            break
        at -= EVENT_BYTES
    if not at and len(row) == length * EVENT_BYTES:
        return row
    return (row[:at] + event + row[at:])[-length * EVENT_BYTES :]


def _order(event: bytes) -> tuple[int, int, bytes]:
    return (*_ORDER.unpack_from(event), event[_ORDER.size :])

"""What a ranking reads of a person: the sequences of all identities as one, within the deadline, or none where no state answers."""

import asyncio
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from features.actions import EVENT_DTYPE
from features.lineage import Lineage
from features.person import events_of_rows
from features.ports import Origin, Position, Reading, SequenceSource, SequenceUnavailableError
from features.request import RequestError
from features.sequence import NEVER_ERASED, Events, row_fingerprint
from features.waiting import ask_until
from inference.served import Served
from protos.v1.actions_pb2 import Position as WirePosition
from protos.v1.ranking_pb2 import RankRequest


class NotKeptError(ValueError):
    """The request looks back at a moment that the store no longer keeps, or at a state of another definition."""


@dataclass(frozen=True)
class Person:
    """What was read. readings: of user_id and then of each further identity; none at all where no state answered.

    events EVENT_DTYPE [n] ascending; erased_before_ms: last erasure of any identity, milliseconds; after_reached: whether the readings
    include every position of `after`.
    """

    readings: tuple[Reading, ...] = ()
    events: Events = field(default_factory=lambda: np.zeros(0, EVENT_DTYPE))
    erased_before_ms: int = NEVER_ERASED
    after_reached: bool = True

    @property
    def rows(self) -> list[bytes]:
        """The rows as read, b"" where there is none."""
        return [reading.row for reading in self.readings] or [b""]

    @property
    def origin(self) -> Origin:
        """The worst of the readings'."""
        return max((reading.origin for reading in self.readings), default=Origin.NONE)

    @property
    def state_age_ms(self) -> int:
        """The oldest of the readings'; -1 where one is not known."""
        ages_ms = [reading.state_age_ms for reading in self.readings]
        return -1 if min(ages_ms, default=-1) < 0 else max(ages_ms)

    @property
    def is_cold(self) -> bool:
        """Whether the person is known to have no action."""
        return bool(self.readings) and not len(self.events)

    def watermark(self) -> list[WirePosition]:
        """The watermark of each reading, for answer and log."""
        return [wire_position(reading.watermark) for reading in self.readings]


def wire_position(position: Position) -> WirePosition:
    """A position as it goes over the wire."""
    return WirePosition(log_epoch=position.log_epoch, partition=position.partition, offset=position.offset)


async def read_person(
    source: SequenceSource, served: Served, request: RankRequest, lineage: Lineage, *, read_by_s: float, wait_until_s: float
) -> Person:
    """Reads user_id and the further identities; waits for `after` until `wait_until_s`, and for an answer until `read_by_s` (both by
    time.monotonic).

    Where any identity's state does not answer there is no sequence of the person: part of one would be another one.

    Raises:
        RequestError: a position of `after` is of none of the identities.
        NotKeptError: see there.
        SequenceCorruptError: a row is damaged, or of another user.
    """
    users = [request.user_id, *request.identities]
    after = [Position(at.log_epoch, at.partition, at.offset) for at in request.after]

    async def ask() -> list[Reading]:
        now_s = time.monotonic()
        more = {"after": after, "wait_s": max(0.0, min(wait_until_s, read_by_s) - now_s)} if after else {}
        return await source.read(served.ranker.sequence, users, timeout_s=read_by_s - now_s, **more)  # type: ignore[arg-type]

    try:
        readings = await ask_until(
            ask, lambda found: _reached(after, found, lineage), wait_until_s, clock=time.monotonic, sleep=asyncio.sleep
        )
    except SequenceUnavailableError:
        return Person(after_reached=not after)
    events, erased_before_ms = events_of_rows(served.domain, served.ranker.sequence, users, [reading.row for reading in readings])
    for reading in readings:  # whose rows are whole
        _check_kept(served, request, reading)
    return Person(tuple(readings), events, erased_before_ms, _reached(after, readings, lineage))


def _reached(after: Seq[Position], readings: Seq[Reading], lineage: Lineage) -> bool:
    """Whether the readings include every position. Raises RequestError where one is not of their logs, or of those that led to them."""
    if not after:
        return True
    offsets: dict[int, int] = {}
    for reading in readings:
        at = reading.watermark
        offsets[at.partition] = min(at.offset, offsets.get(at.partition, at.offset))
    log_epoch = readings[0].watermark.log_epoch
    wanted = [(position.partition, _offset_of(i, position, log_epoch, offsets, lineage)) for i, position in enumerate(after)]
    return all(offsets.get(partition, -1) >= offset for partition, offset in wanted)


def _offset_of(i: int, position: Position, log_epoch: int, partitions: dict[int, int], lineage: Lineage) -> int:
    """The offset that after[i] asks for. Raises RequestError if it is not a place in the person's log, or in one that led to it."""
    included = lineage.includes(log_epoch, position)
    if included:
        return -1
    if included is False:
        raise RequestError(f"after[{i}].offset", f"{position.offset} of partition {position.partition} came after that log was left")
    if position.log_epoch not in (0, log_epoch):
        raise RequestError(f"after[{i}].log_epoch", f"{position.log_epoch} is not the log's, {log_epoch}; 0 is the current one")
    if position.partition not in partitions:
        holding = ", ".join(map(str, sorted(partitions)))
        raise RequestError(f"after[{i}].partition", f"{position.partition} does not hold this user, {holding} does")
    return position.offset


def _check_kept(served: Served, request: RankRequest, reading: Reading) -> None:
    if served.late_ms_max is not None and request.request_time_ms < reading.log_clock_ms - served.late_ms_max:
        kept_ms = reading.log_clock_ms - served.late_ms_max
        raise NotKeptError(f"request_time_ms: {request.request_time_ms} is older than what the store keeps; not before {kept_ms}")
    if reading.row and row_fingerprint(reading.row) != served.sequence_fingerprint:
        raise NotKeptError(
            f"ranker: release {served.release.release_id} reads sequences of definition {served.sequence_fingerprint:016x}, "
            f"the store keeps {row_fingerprint(reading.row):016x}: publish a release for this state"
        )

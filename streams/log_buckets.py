"""Both logs cut into archives of some users each, so that what needs all records of a user at once can go on in bounded memory.

A bucket is an archive as `streams.archive` has it, with the rankings of some users and every record of the users whom these rankings name.
Replay gives for them what it gives from the whole logs. A row as it was read depends on the partition's clock, which all users' records
move; so where a record or a watermark of the bucket follows one that moved the clock, that record is in the bucket as well.
"""

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from google.protobuf.message import DecodeError

from features.actions import ACTION, ERASE, REJECTED, Batch
from features.ids import U64
from features.logs import LoggedActions
from protos.v1.ranking_pb2 import RankingRecord
from streams.archive import SCHEMA, DecodingRules, RecordLog, Records, decode_records, file_name, table_of

I64 = npt.NDArray[np.int64]


def bucket_of(users: U64, count: int) -> I64:
    """The bucket of each user's own rankings and records: int64 [n]."""
    mixed = users * np.uint64(0x9E3779B97F4A7C15)
    bucket: I64 = ((mixed >> np.uint64(40)) % np.uint64(count)).astype(np.int64)
    return bucket


_PAIR = np.dtype([("key", "<u8"), ("bucket", "<i8")])
_READ = np.dtype([("offset", "<i8"), ("bucket", "<i8")])


@dataclass
class Reading:
    """Who is in which bucket, as the rankings say: made by `spill_rankings`, needed by `spill_actions`.

    identities: (identity, bucket) of each further identity whose own bucket is another one, ascending. watermarks: (offset, bucket) that
    rankings read, ascending, by partition of the actions. 16 bytes each, in memory. releases: ids of those that ranked.
    """

    count: int
    identities: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(0, _PAIR))
    watermarks: dict[int, npt.NDArray[np.void]] = field(default_factory=dict)
    releases: set[str] = field(default_factory=set)

    def note(self, records: Seq[RankingRecord], buckets: Seq[int]) -> None:
        """Notes whom and what rankings of these buckets name."""
        identities, watermarks = [], dict[int, list[tuple[int, int]]]()
        for record, bucket in zip(records, buckets, strict=True):
            self.releases.add(record.release_id)
            identities += [(identity, bucket) for identity in record.request.identities]
            for position in record.watermark:
                watermarks.setdefault(position.partition, []).append((position.offset, bucket))
        found = np.array(identities, _PAIR)
        elsewhere = bucket_of(found["key"], self.count) != found["bucket"]
        self.identities = np.unique(np.concatenate([self.identities, found[elsewhere]])) if elsewhere.any() else self.identities
        for partition, offsets in watermarks.items():
            there = self.watermarks.get(partition, np.zeros(0, _READ))
            self.watermarks[partition] = np.unique(np.concatenate([there, np.array(offsets, _READ)]))


def spill_rankings(
    log: RecordLog, folders: Seq[Path], wanted: Callable[[RankingRecord], bool], read: Callable[[int], None], memory_bytes: int
) -> Reading:
    """Copies the rankings that are `wanted` into the buckets' archives, by the hash of their user. `read` is told of records read."""
    found = Reading(len(folders))
    for partition in sorted(log.partitions):
        with _Writers(folders, partition, memory_bytes) as writers:
            for records in _pieces(log.read(partition)):
                decoded = [(i, record) for i, record in enumerate(map(_ranking, records.values)) if record is not None and wanted(record)]
                mine = [record for _, record in decoded]
                buckets = bucket_of(np.array([record.request.user_id for record in mine], np.uint64), len(folders))
                found.note(mine, buckets.tolist())
                writers.add(records, np.array([i for i, _ in decoded], np.int64), buckets)
                read(len(records))
    return found


_RANKINGS_AT_ONCE = 4_096
"""A parsed record takes several kilobytes."""


def _pieces(pieces: Iterator[Records]) -> Iterator[Records]:
    for records in pieces:
        for start in range(0, len(records), _RANKINGS_AT_ONCE):
            yield records.take(np.arange(start, min(start + _RANKINGS_AT_ONCE, len(records))))


def _ranking(value: bytes | None) -> RankingRecord | None:
    try:
        return None if value is None else RankingRecord.FromString(value)
    except DecodeError:
        return None


def spill_actions(
    log: RecordLog,
    folders: Seq[Path],
    reading: Reading,
    rules: Collection[DecodingRules],
    clock_ms: int,
    decoded: Callable[[Batch], None],
    memory_bytes: int,
) -> None:
    """Copies the actions into the buckets' archives: those of each user into their own, and into those that name them.

    rules: of the releases that ranked; the first is the caller's own, by which `decoded` gets every batch. clock_ms: of the base.
    """
    for partition in sorted(log.partitions):
        noted = reading.watermarks.get(partition, np.zeros(0, _READ))
        clocks = [_Clock(clock_ms) for _ in rules]
        seen = 0
        with _Writers(folders, partition, memory_bytes) as writers:
            for records in log.read(partition):
                batches = [decode_records(log, partition, records, each) for each in rules]
                decoded(batches[0])
                rows, buckets = _records_of(batches, reading)
                # A watermark counts for the last record up to it, which may be one of the piece before.
                until = int(noted["offset"].searchsorted(records.offsets[-1], "right"))
                read_at = records.offsets.searchsorted(noted["offset"][seen:until], "right") - 1
                needed, of = np.concatenate([rows, read_at]), np.concatenate([buckets, noted["bucket"][seen:until]])
                seen = until
                steps = [clock.steps(batch, needed) for clock, batch in zip(clocks, batches, strict=True)]
                _carry(clocks, [of[step < 0] for step in steps], writers)
                steps_of = [of[step >= 0] for step in steps]
                steps = [step[step >= 0] for step in steps]
                writers.add(records, np.concatenate([rows, *steps]), np.concatenate([buckets, *steps_of]))
                for clock in clocks:
                    clock.advance(records)
            _carry(clocks, [noted["bucket"][seen:]] * len(clocks), writers)


def _records_of(batches: Seq[Batch], reading: Reading) -> tuple[I64, I64]:
    """(record, bucket) of the records that any rules accept."""
    rows, buckets = [], []
    pairs = reading.identities
    for batch in batches:
        own = np.flatnonzero((batch.verdict == ACTION) | (batch.verdict == ERASE))
        low, high = (pairs["key"].searchsorted(batch.users[own], side) for side in ("left", "right"))
        times = high - low
        place = np.arange(times.sum()) + np.repeat(low - (np.cumsum(times) - times), times)
        rows += [own, np.repeat(own, times)]
        buckets += [bucket_of(batch.users[own], reading.count), pairs["bucket"][place]]
    return np.concatenate(rows), np.concatenate(buckets)


class _Clock:
    """The records that moved a partition's clock, as one set of rules accepts them."""

    def __init__(self, clock_ms: int) -> None:
        self._clock_ms = self._next_ms = clock_ms
        self._step = -1
        self.last: Records | None = None
        """The record of an earlier piece that moved it last."""

    def steps(self, batch: Batch, needed: I64) -> I64:
        """The record that moved the clock last up to each needed record; -1: `last`."""
        counted = np.where(batch.verdict == REJECTED, 0, batch.append_time_ms)
        clock_ms = np.maximum(np.maximum.accumulate(counted), self._clock_ms)
        moves = np.diff(clock_ms, prepend=self._clock_ms) > 0
        last = np.maximum.accumulate(np.where(moves, np.arange(len(moves)), -1))
        self._step, self._next_ms = int(last[-1]), int(clock_ms[-1])
        return np.where(needed >= 0, last[needed], -1)

    def advance(self, records: Records) -> None:
        """Behind the piece that `steps` was asked about."""
        self._clock_ms = self._next_ms
        if self._step >= 0:
            self.last = records.take(np.array([self._step]))


def _carry(clocks: Seq[_Clock], buckets: Seq[I64], writers: "_Writers") -> None:
    """Writes the record that moved each clock last into these buckets, where it is not there already."""
    for clock, of in sorted(zip(clocks, buckets, strict=True), key=lambda one: -1 if one[0].last is None else one[0].last.offsets[0]):
        if clock.last is not None:
            missing = [bucket for bucket in np.unique(of).tolist() if writers.end(bucket) <= clock.last.offsets[0]]
            writers.add(clock.last, np.zeros(len(missing), np.int64), np.array(missing, np.int64))


class _Writers:
    """The files of one partition, one in each bucket's archive; together they hold back about a quarter of `memory_bytes`."""

    def __init__(self, folders: Seq[Path], partition: int, memory_bytes: int) -> None:
        self._stack = ExitStack()
        self._files: list[Any] = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            self._files.append(self._stack.enter_context(pq.ParquetWriter(folder / file_name(partition), SCHEMA, compression="zstd")))
        self._held: list[list[Records]] = [[] for _ in folders]
        self._ends = [0] * len(folders)
        self._held_bytes, self._held_bytes_max = 0, memory_bytes // 4

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._stack.close()

    def end(self, bucket: int) -> int:
        """Offset behind the last record that was added to a bucket."""
        return self._ends[bucket]

    def add(self, records: Records, rows: I64, buckets: I64) -> None:
        """Adds records to buckets, each record once to a bucket; all of them are behind those added before."""
        pairs = np.unique(np.stack([buckets, rows], axis=1), axis=0)
        found, starts = np.unique(pairs[:, 0], return_index=True)
        for bucket, mine in zip(found.tolist(), np.split(pairs[:, 1], starts[1:]), strict=False):
            taken = records.take(mine)
            self._held[bucket].append(taken)
            self._held_bytes += sum(_ROW_BYTES + len(value or b"") for value in taken.values)
            self._ends[bucket] = int(taken.offsets[-1]) + 1
        if self._held_bytes > self._held_bytes_max:
            self._flush()

    def _flush(self) -> None:
        for held, file in zip(self._held, self._files, strict=True):
            for records in _joined(held):
                file.write_table(table_of(records))
            held.clear()
        self._held_bytes = 0


_ROW_BYTES = 250
"""What a record takes beside its value: key, offset, time, and the objects that hold them."""


def _joined(parts: list[Records]) -> Iterator[Records]:
    if parts:
        keys, values = [key for part in parts for key in part.keys], [value for part in parts for value in part.values]
        forgotten = [np.zeros(len(part), bool) if part.forgotten is None else part.forgotten for part in parts]
        offsets, append_time_ms = (np.concatenate([getattr(part, name) for part in parts]) for name in ("offsets", "append_time_ms"))
        yield Records(offsets, append_time_ms, keys, values, np.concatenate(forgotten))


def logged_actions(batch: Batch) -> LoggedActions:
    """A decoded batch's actions and erasures as a canonical log has them."""
    kept = np.flatnonzero((batch.verdict == ACTION) | (batch.verdict == ERASE))
    n = len(kept)
    place = np.full(n, batch.log_epoch, np.uint64), np.full(n, batch.partition, np.int32), batch.offsets[kept]
    return LoggedActions(batch.users[kept], batch.events[kept], batch.append_time_ms[kept], *place, batch.verdict[kept] == ERASE)

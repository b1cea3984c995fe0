"""Bootstrap: a state's partitions in bulk from offline history, in bounded memory, on all cores.

 1. read: processes take row groups in turn; each accepted action goes to the bucket of its partition and user range, a file on disk.
    Ranges are cut by a sample of the users, so that buckets are of about one size and their rows stand side by side in key order.
 2. fold: processes take buckets in turn; a bucket's events are sorted, the law is applied to all its users at once, and the rows are
    written, ascending, as one SST file for each sequence.
 3. load: a partition's files become its database. They do not overlap, so RocksDB takes them as they are into its last level, and nothing
    is written twice. The meta row comes last.
Everything is made in a folder beside the state, and moved in when whole.
"""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.actions import EVENT_DTYPE
from features.base import Base, BaseError, Erasures, is_accepted
from features.domain import Domain
from features.ids import partitions_of
from features.sequence import Definition, Events, cut_history, fold_history, sort_history
from streams.archive import RecordLog
from streams.errors import StateError
from streams.history import History, RowGroup
from streams.state import Meta, definitions, fingerprints, row_keys
from streams.store import RocksStore, initial_meta, write_table

BUCKET_EVENTS = 1 << 19
"""About how many events a process folds at once: some 200 MB of memory, twice as much where a bucket came out larger."""

_SPILLED = np.dtype([("user", "<u8"), ("event", EVENT_DTYPE)])
_OPAQUE = np.dtype(f"V{_SPILLED.itemsize}")
_OPAQUE_EVENT = np.dtype(f"V{EVENT_DTYPE.itemsize}")
_BUCKETS_MAX = 1 << 15
_WORK = ".bootstrap"
_U64 = npt.NDArray[np.uint64]
Progress = Callable[[str, int, int], None]
"""Called with the step ("read", "fold"), what is done and what there is: events, buckets."""


class Buckets(NamedTuple):
    """How pairs of partition and user range are numbered. bounds uint64 [ranges - 1]: first user of every range but the first."""

    partition_count: int
    bounds: _U64

    @property
    def ranges(self) -> int:
        """Ranges of users in each partition."""
        return len(self.bounds) + 1

    def of(self, users: _U64) -> npt.NDArray[np.int64]:
        """Bucket of each user: int64 [n]."""
        ranges = np.searchsorted(self.bounds, users, "right")
        found: npt.NDArray[np.int64] = partitions_of(users, self.partition_count).astype(np.int64) * self.ranges + ranges
        return found


@dataclass(frozen=True)
class Counts:
    """Records of a piece of history, and the greatest append time of the accepted ones."""

    events: int = 0
    erasures: int = 0
    rejected: int = 0
    clock_ms: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        sums = self.events + other.events, self.erasures + other.erasures, self.rejected + other.rejected
        return Counts(*sums, max(self.clock_ms, other.clock_ms))


@dataclass(frozen=True)
class Target:
    """What rows of a base carry: definitions by sequence id, the base's clock, and the log that they stand before.

    starts: by partition, the first record that the log still has; 0 where it is not named.
    """

    kept: Mapping[int, Definition]
    clock_ms: int
    log_epoch: int
    starts: Mapping[int, int] = field(default_factory=dict)

    def meta(self, partition: int) -> Meta:
        """Meta of a partition that holds the base and no record of the log."""
        return replace(initial_meta(partition, self.log_epoch, self.kept, self.starts.get(partition, 0)), log_clock_ms=self.clock_ms)


def bootstrap(
    source: str,
    domain: Domain,
    state_folder: Path,
    partition_count: int,
    log_epoch_of: Callable[[str], int],
    *,
    starts: Mapping[int, int] = MappingProxyType({}),
    check: Callable[[Base], None] = lambda _: None,
    processes: int | None = None,
    progress: Progress = lambda *_: None,
    bucket_events: int = BUCKET_EVENTS,
) -> Base:
    """Builds every partition's store from history; returns the base, whose id the caller hands to every process as `Topics.base`.

    `source`: see `streams.history.History`. `log_epoch_of`: epoch of the log on a base, by the base's id. `starts`: by partition, the
    first record that the log still has, 0 where absent. `check` may refuse a base before anything is built from it. A partition whose state
    stands on this base already is left as it is.

    Raises:
        BaseError: the history cannot be read or holds no action, or `check` refused it.
        StateError: the state folder holds a state that does not stand on this base.
    """
    kept = definitions(domain)
    work = state_folder / _WORK
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    (work / "spill").mkdir(parents=True)
    with History(source) as history:
        try:
            groups = history.row_groups()
            erasures = history.erasures(groups, domain.future_tolerance_ms)
            total = sum(group.rows for group in groups)
            buckets = cut_buckets(history.sample_users(groups), total, partition_count, bucket_events)
            job = _Job(history, work, buckets, erasures, domain.future_tolerance_ms, bucket_events)
            with _Processes(job, processes) as pool:
                counts = Counts()
                done = 0
                hashed = pool.each(_describe, history.files)
                for group, found in pool.each(_scatter, groups):
                    counts, done = counts + found, done + group.rows
                    progress("read", done, total)
                files = tuple(described for _, described in sorted(hashed))
                if not counts.events:
                    raise BaseError(f"{source}: holds no action that the log would take ({counts.rejected} were rejected)")
                places = counts.events, counts.erasures, counts.rejected, counts.clock_ms
                base = Base(files, *places, domain.future_tolerance_ms, fingerprints(kept))
                check(base)
                target = Target(kept, base.clock_ms, log_epoch_of(base.id), dict(starts))
                missing = _missing(state_folder, target, partition_count)
                wanted = [(target, p * buckets.ranges + i) for p in missing for i in range(buckets.ranges)]
                tables: dict[int, list[Path]] = {partition: [] for partition in missing}
                for done, ((_, bucket), made) in enumerate(pool.each(_fold, wanted), 1):
                    tables[bucket // buckets.ranges] += made
                    progress("fold", done, len(wanted))
            for partition, paths in tables.items():
                load_partition(work / "stores", target, partition, paths)
            for partition in missing:
                (work / "stores" / str(partition)).rename(state_folder / str(partition))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return base


def cut_buckets(sample: _U64, total: int, partition_count: int, bucket_events: int = BUCKET_EVENTS) -> Buckets:
    """Ranges of about `bucket_events` events in each partition. `sample`: users by their records, uint64 [n], ascending."""
    ranges = min(-(-total // (partition_count * bucket_events)) or 1, _BUCKETS_MAX // partition_count or 1)
    cuts = np.arange(1, ranges) * len(sample) // ranges
    return Buckets(partition_count, np.unique(sample[cuts]) if len(sample) else np.zeros(0, np.uint64))


def write_rows(
    target: Target, partition: int, users: _U64, events: Events, erased: Mapping[int, int], folder: Path, name: str
) -> list[Path]:
    """Folds sorted history (`sort_history`) of one partition and writes a table for each sequence; returns those that have rows."""
    made = []
    for sequence_id, what in target.kept.items():
        owners, rows = fold_history(what, users, events, erased, clock_ms=target.clock_ms, log_epoch=target.log_epoch, partition=partition)
        if rows:
            made.append(folder / f"{sequence_id}-{name}.sst")
            write_table(made[-1], row_keys(sequence_id, owners), rows)
    return made


def load_partition(folder: Path, target: Target, partition: int, tables: Iterable[Path]) -> None:
    """Makes a partition's database below `folder` of tables that `write_rows` wrote; the tables are moved."""
    store = RocksStore(folder, target.kept, cache_bytes=8 << 20, write_buffer_bytes=8 << 20)
    held = store.open(partition, target.log_epoch)
    try:
        held.load(tables, target.meta(partition))
    finally:
        held.close()


def _missing(state_folder: Path, target: Target, partition_count: int) -> list[int]:
    """Partitions that have no state yet. Raises StateError where one has another."""
    missing = []
    store = RocksStore(state_folder, target.kept, cache_bytes=8 << 20, write_buffer_bytes=8 << 20, lock_wait_s=0.0)
    for partition in range(partition_count):
        folder = state_folder / str(partition)
        if not folder.exists():
            missing.append(partition)
            continue
        try:
            held = store.open(partition, target.log_epoch)
        except StateError as error:
            raise StateError(f"{error}. Bootstrap builds beside no other state: move {state_folder} away, then run it again") from error
        empty = held.meta == initial_meta(partition, target.log_epoch, target.kept)  # as a worker leaves it that found no base
        held.close()
        if empty:
            shutil.rmtree(folder)
            missing.append(partition)
    return missing


@dataclass(frozen=True)
class _Job:
    """What every process needs to know; it is handed over once."""

    history: History
    work: Path
    buckets: Buckets
    erasures: Erasures
    future_tolerance_ms: int
    bucket_events: int

    @cached_property
    def erased(self) -> dict[int, dict[int, int]]:
        """Append time of erasures by user, by bucket."""
        found: dict[int, dict[int, int]] = {}
        erased = self.erasures.of()
        users = np.fromiter(erased, np.uint64, len(erased))
        for bucket, (user, time_ms) in zip(self.buckets.of(users).tolist(), erased.items(), strict=True):
            found.setdefault(bucket, {})[user] = time_ms
        return found


class _Processes:
    """Processes that share one job; an error in one of them ends all work."""

    def __init__(self, job: _Job, count: int | None) -> None:
        self._pool = ProcessPoolExecutor(count or os.cpu_count(), multiprocessing.get_context("spawn"), _take_job, (job,))

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def each(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, result) of each item, as they come; the work begins now."""
        futures = {self._pool.submit(function, item): item for item in items}
        return ((futures[future], future.result()) for future in as_completed(futures))


_job: _Job | None = None


def _take_job(job: _Job) -> None:
    global _job
    _job = job


def _current() -> _Job:
    assert _job is not None
    return _job


def _describe(name: str) -> Any:
    return _current().history.describe(name)


def _scatter(group: RowGroup) -> Counts:
    """Appends the accepted actions of a row group to the files of their buckets."""
    job = _current()
    counts = Counts()
    for records in job.history.read(group):
        accepted = is_accepted(records, job.future_tolerance_ms)
        erasures = int((accepted & records.erase).sum())
        events = int(accepted.sum()) - erasures
        clock_ms = int(records.append_time_ms.max(initial=0, where=accepted))
        counts += Counts(events, erasures, len(records) - events - erasures, clock_ms)
        where = np.flatnonzero(accepted & job.erasures.survives(records))
        if not len(where):
            continue
        users = records.users[where]
        bucket = job.buckets.of(users).astype(np.uint16)
        order = np.argsort(bucket, kind="stable")
        spilled = np.empty(len(where), _SPILLED)
        spilled["user"] = users[order]
        # As opaque bytes: NumPy copies a structure field by field, 15 times slower.
        spilled.view(np.dtype([("user", "<u8"), ("event", _OPAQUE_EVENT)]))["event"] = records.events.view(_OPAQUE_EVENT)[where[order]]
        found, starts = np.unique(bucket[order], return_index=True)
        for number, start, end in zip(found.tolist(), starts.tolist(), [*starts[1:].tolist(), len(where)], strict=True):
            with (job.work / "spill" / f"{number}-{os.getpid()}").open("ab") as file:
                file.write(spilled[start:end].view(np.uint8).data)
    return counts


def _fold(wanted: tuple[Target, int]) -> list[Path]:
    """Makes the tables of one bucket and removes its files."""
    target, bucket = wanted
    job = _current()
    users, events = np.zeros(0, np.uint64), np.zeros(0, EVENT_DTYPE)
    paths = sorted((job.work / "spill").glob(f"{bucket}-*"))
    for piece in _pieces(paths, 2 * job.bucket_events):
        users, events = sort_history(
            np.concatenate((users, piece["user"])), np.concatenate((events.view(_OPAQUE_EVENT), _events_of(piece))).view(EVENT_DTYPE)
        )
        users, events = cut_history(target.kept.values(), users, events)
    for path in paths:
        path.unlink()
    partition, number = divmod(bucket, job.buckets.ranges)
    folder = job.work / "tables" / str(partition)
    folder.mkdir(parents=True, exist_ok=True)
    return write_rows(target, partition, users, events, job.erased.get(bucket, {}), folder, f"{number:06d}")


def _pieces(paths: list[Path], count: int) -> Iterator[npt.NDArray[np.void]]:
    """What was spilled, at most `count` at a time: a user with a very long past must not need as much memory."""
    for path in paths:
        at, size = 0, path.stat().st_size // _SPILLED.itemsize
        while at < size:
            yield np.fromfile(path, _SPILLED, count, offset=at * _SPILLED.itemsize)
            at += count


def _events_of(spilled: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    found: npt.NDArray[np.void] = spilled.view(np.dtype([("user", "<u8"), ("event", _OPAQUE_EVENT)]))["event"]
    return found


def check_continues(base: Base, actions: RecordLog, tolerance_ms: int) -> str | None:
    """What is missing between a base and a log, in words; None where nothing is.

    The log may begin before the history ends. It must not begin later than `tolerance_ms` after: what happened between is in neither. A
    partition whose first records are gone (retention) must by itself reach back to the history's end. A log without a record is no gap.
    """
    firsts: dict[int, int] = {}
    for partition, span in actions.partitions.items():
        records = next(iter(actions.read(partition)), None)
        if records is None:
            continue
        firsts[partition] = int(records.append_time_ms[0])
        if span.start > 0 and firsts[partition] > base.clock_ms + tolerance_ms:
            return _gap(base, firsts[partition], f"partition {partition} now begins at offset {span.start}")
    if firsts and min(firsts.values()) > base.clock_ms + tolerance_ms:
        return _gap(base, min(firsts.values()), "the log begins")
    return None


def _gap(base: Base, first_ms: int, what: str) -> str:
    end, first = (np.datetime64(time_ms, "ms") for time_ms in (base.clock_ms, first_ms))
    return f"the history ends at {end}Z and {what} at {first}Z: actions of {(first_ms - base.clock_ms) / 1000:,.0f} s are in neither"

"""The worker without Kafka: partitions opened, batches folded into store and view, damage repaired, owners fenced.

`streams.batch_loop` feeds it from a broker, the simulation in tests/simulation from a log of its own; both drive exactly this code.

Of each partition's records, in offset order:
 1. decode: every record is an action, an erasure, or rejected with a reason (features.actions);
 2. dead letters: the rejected ones are buried, and acknowledged there, before anything passes them;
 3. fold: the stored rows of the touched users and the batch become their new rows (features.sequence);
 4. store: rows, applied offset and log clock in one WriteBatch;
 5. view: the same rows and meta in one transaction, which readers see as one moment, unless a newer owner has taken the view over.
A crash between any two steps repeats what the store had not flushed, which gives the same rows again; the view, which is ahead then, stays
as it is until the store reaches it. Anything unexpected leaves `apply` as an exception, before the store passes the record.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from features.actions import Batch, append_time_ms, decode_batch
from features.domain import Domain
from features.ports import SequenceCorruptError, SequenceForeignError
from features.sequence import Definition, apply_batch, clock_after, row_bytes_max, touched_users
from protos.v1.actions_pb2 import DeadLetter
from streams.errors import FencedError, SnapshotError, StateError
from streams.eviction import EvictionPass
from streams.health import lag_s
from streams.purge import ErasurePass
from streams.records import Records
from streams.state import Meta, check_base, definitions, row_keys
from streams.store import PartitionStore, Store
from streams.view import View

log = logging.getLogger(__name__)

RetentionPolicy = Literal["fail", "earliest", "latest"]
_RESTORE_AHEAD_RECORDS = 1_000_000
"""How far a snapshot must be ahead of a state to be worth its download."""
_FLUSH_AGE_S = 30.0
"""A killed worker reads at most this much of the log again, however few the actions are; where they are many, RocksDB flushes before."""
_WRITE_BYTES_MAX = 16 << 20
"""Most bytes of rows in one write: what a batch is when users repeat in it, and several writes where each record has its own user."""


@dataclass(frozen=True)
class Log:
    """The log that a core follows. `first_and_next`: of a partition, the first offset there is and the offset of the next record."""

    topic: str
    epoch: int
    partition_count: int
    first_and_next: Callable[[int], tuple[int, int]]
    base: str = ""
    """The base that its states stand on (`features.base`)."""


@dataclass
class Held:
    """A partition that is open here."""

    store: PartitionStore
    view: View
    end_offset: int
    """Offset of the next record of the log, as last seen."""
    opened_end: int
    """The log's end when it was opened."""
    progress_s: float = field(default_factory=time.monotonic)
    end_asked_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """When a broker was last asked for the log's end that answered it."""
    caught_up_ms: int = 0
    """The latest such time at which the state included the log's end."""

    @property
    def next_offset(self) -> int:
        """The offset that the state waits for."""
        return self.store.meta.applied_offset + 1

    @property
    def lag(self) -> int:
        """Records of the log that the state does not include yet."""
        return max(0, self.end_offset - self.next_offset)


@dataclass(frozen=True)
class Applied:
    """What a batch did, for whoever observes: step_seconds by name (decode, fold, store, view)."""

    partition: int
    batch: Batch
    rows: int
    lag: int
    step_seconds: Mapping[str, float]


def old_rows(store: PartitionStore, keys: Seq[bytes], view: View | None) -> list[bytes | None]:
    """The stored rows of some keys, None where there is none: from the view where that shows the store's moment, and so the same rows.

    The store has the last word on who has no row: nothing vouches for a key that the view lacks.
    """
    rows = None if view is None else view.rows(keys, store.meta)
    if rows is None:
        return store.get(keys)
    missing = [i for i, row in enumerate(rows) if row is None]
    for i, row in zip(missing, store.get([keys[i] for i in missing]), strict=True):
        rows[i] = row
    return rows


def fold_batch(
    kept: Mapping[int, Definition], store: PartitionStore, batch: Batch, leader_epoch: int = -1, view: View | None = None
) -> tuple[list[bytes], list[bytes], Meta]:
    """What a batch makes of the stored rows: (keys, new rows, new meta), to be written together. `kept`: definitions by sequence id.

    `view`: where the old rows come from if they are whole there (`old_rows`); None: from the store.

    Raises:
        SequenceCorruptError: a stored row is damaged.
    """
    before = store.meta
    users = touched_users(batch)
    keys: list[bytes] = []
    rows: list[bytes] = []
    for sequence_id, what in kept.items():
        own = row_keys(sequence_id, users)
        keys += own
        try:
            rows += apply_batch(what, batch, old_rows(store, own, view), before.log_clock_ms)
        except SequenceCorruptError as error:
            if view is None:
                raise
            log.warning("partition %d: the view is damaged, the store's rows are taken: %s", before.partition, error)
            rows += apply_batch(what, batch, store.get(own), before.log_clock_ms)
    clock_ms, last = clock_after(batch, before.log_clock_ms), int(batch.offsets[-1])
    return keys, rows, replace(before, applied_offset=last, log_clock_ms=clock_ms, leader_epoch=leader_epoch)


class WorkerCore:
    """The partitions that one worker holds. One thread opens, applies and closes; `statistics`, `health` and `partitions` may be called
    from others.
    """

    def __init__(
        self,
        domain: Domain,
        store: Store,
        open_view: Callable[[int], View],
        bury: Callable[[Seq[tuple[bytes, bytes]]], None],
        *,
        offset_below_retention: RetentionPolicy = "fail",
        at: Callable[[str], None] = lambda _: None,
        observe: Callable[[Applied], None] = lambda _: None,
        erasures: ErasurePass | None = None,
        folds_on_view: bool = True,
    ) -> None:
        """`bury` stores dead letters, (key, value) each, and returns when they are safe.

        `at` is told the step that a batch has reached: decoded, stored, viewed. `erasures` takes the bytes of erased users out of the
        files; a state without files has none. `folds_on_view`: see `fold_batch`.
        """
        self._folds_on_view = folds_on_view
        self._future_tolerance_ms, self._encodings = domain.future_tolerance_ms, domain.encodings
        self._kept = definitions(domain)
        self._users_max = max(1, _WRITE_BYTES_MAX // sum(row_bytes_max(what.length) for what in self._kept.values()))
        self._store, self._open_view, self._bury = store, open_view, bury
        self._policy: RetentionPolicy = offset_below_retention
        self._at, self._observe = at, observe
        self._erasures, self._eviction = erasures, EvictionPass(self._kept)
        self._replaced: dict[int, tuple[int | None, int]] = {}
        self._log: Log | None = None
        self._held: dict[int, Held] = {}
        self.is_restoring = False
        """Whether the thread that applies is busy with a restore, which may take long: it is not stuck."""
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(
            ("batches", "events", "dead_letters", "rows_written", "offset_gaps", "records_missed", "repairs", "fenced"), 0
        )
        self._seconds = dict.fromkeys(("decode", "fold", "store", "view"), 0.0)

    def follow(self, what: Log) -> None:
        """Says which log the partitions belong to; called before any is opened, and again where it may have changed.

        Raises:
            StateError: it is another log than that of the partitions which are open.
        """
        if self._held and what.epoch != self._following.epoch:
            raise StateError(
                f"topic {what.topic}: is now log {what.epoch:016x}, the open state belongs to log {self._following.epoch:016x} (its "
                "cluster, topic id or number of partitions changed): move the state to the new log, or start with a new state folder"
            )
        self._log = what

    def open(self, partition: int) -> int:
        """`prepare` and `hold` in one. Returns the offset to read from."""
        return self.hold(partition, self.prepare(partition))

    def prepare(self, partition: int) -> Held:
        """Opens a partition's state, restores it where it is missing or damaged, and takes its view over: in any thread, at length.

        Raises:
            StateError: the log does not continue the state, and the policy is to fail; or another process holds it.
            FencedError: another worker has taken the view over meanwhile; prepare it again where the group still says so.
        """
        epoch = self._following.epoch
        try:
            store = self._continue(self._store.open(partition, epoch))
        except SequenceCorruptError as error:  # of this state, or of snapshots that were put in its place, none of which could be opened
            store = self._replace(partition, f"cannot be opened: {error}")
        return self._prepare_from(store)

    def _prepare_from(self, store: PartitionStore) -> Held:
        partition = store.meta.partition
        try:
            view = self._open_view(partition)
        except BaseException:
            store.close()
            raise
        try:
            end_offset = self._following.first_and_next(partition)[1]  # asked now that no other owner can write beyond it
            copied = view.sync(store.meta, store.scan, end_offset)
        except SequenceCorruptError as error:
            view.close()
            store.close()
            return self._prepare_from(self._replace(partition, str(error)))
        except BaseException:
            view.close()
            store.close()
            raise
        if copied:
            log.info("partition %d: %d rows copied from the store to the view", partition, copied)
        return Held(store, view, end_offset=end_offset, opened_end=end_offset)

    def hold(self, partition: int, held: Held) -> int:
        """Takes a prepared partition among those that are open. Returns the offset to read from."""
        if self._erasures is not None:
            self._erasures.opened(partition, held.store)
        with self._lock:
            self._held[partition] = held
        return held.next_offset

    def _continue(self, store: PartitionStore) -> PartitionStore:
        """The state that waits for a record which the log has: this one, a snapshot, or as the policy says where retention removed some."""
        meta = store.meta
        try:
            first, following = self._following.first_and_next(meta.partition)
        except BaseException:
            store.close()
            raise
        wanted = meta.applied_offset + 1
        if wanted > following:
            store.close()
            raise StateError(
                f"partition {meta.partition}: the state includes offset {meta.applied_offset}, the log ends before {following}: it lost "
                "records (or is another one). Give the worker new folders for state and view to rebuild from this log"
            )
        is_needed = wanted < first or (bool(self._following.base) and not wanted and not meta.log_clock_ms)  # behind, or a base is missing
        ahead = -1 if is_needed else _RESTORE_AHEAD_RECORDS if wanted else 0
        snapshot = None
        if following - wanted > ahead:  # otherwise none can be; a usual restart needs no snapshot store
            try:
                snapshot = self._newest_snapshot(meta.partition, is_needed=is_needed)
            except SnapshotError:
                store.close()
                raise
        if snapshot is not None and first <= snapshot + 1 <= following and snapshot - meta.applied_offset > ahead:
            store.close()
            restored = self._restored(meta.partition, first, skip=0)
            if restored is not None:
                return restored
            store = self._store.open(meta.partition, meta.log_epoch)
            meta, wanted = store.meta, store.meta.applied_offset + 1
        try:
            check_base(meta, self._following.base, f"partition {meta.partition}")
        except StateError:
            store.close()
            raise
        if wanted >= first:
            return store
        store.close()
        what = f"the state ends at offset {meta.applied_offset}" if wanted else "there is no state"
        gap = f"partition {meta.partition}: {what} and the log now starts at {first}: retention removed {first - wanted} records"
        if self._policy == "fail":
            raise StateError(
                f"{gap}. Restore a newer snapshot, or start over from what the log still has (offset_below_retention = earliest) or from "
                "its end (latest)"
            )
        return self._start_over(meta.partition, wanted, gap)

    def _start_over(self, partition: int, wanted: int, why: str) -> PartitionStore:
        """An empty state that waits for the first record that the log still has, or, as the policy says, for the next one."""
        first, following = self._following.first_and_next(partition)
        start = following if first and self._policy == "latest" else first
        if start:
            log.error("%s; STARTING OVER at offset %d (%s): earlier actions and erasures are not in the state", why, start, self._policy)
        with self._lock:
            self._counters["records_missed"] += start - wanted
        return self._store.start_over(partition, self._following.epoch, start)

    def _restored(self, partition: int, first: int, *, skip: int) -> PartitionStore | None:
        """A snapshot that a log from `first` on continues; None: none could be restored, and what was there still is."""
        try:
            return self._store.restore(partition, self._following.epoch, first=first, skip=skip)
        except (StateError, SnapshotError):
            log.exception("partition %d: no snapshot could be restored", partition)
            return None

    def _newest_snapshot(self, partition: int, *, is_needed: bool) -> int | None:
        """Raises SnapshotError where the snapshots cannot be reached and the log alone does not do."""
        try:
            return self._store.newest_snapshot(partition, self._following.epoch)
        except SnapshotError as error:
            if is_needed:
                raise
            log.warning("partition %d: goes on without snapshots: %s", partition, error)
            return None

    def close(self, partitions: Seq[int] | None = None) -> None:
        """Closes some partitions, or all; those that are not open are passed over."""
        for partition in list(self._held) if partitions is None else partitions:
            with self._lock:
                held = self._held.pop(partition, None)
            if held is not None:
                if self._erasures is not None:
                    self._erasures.closed(partition, held.store)
                self._eviction.forget(partition)
                held.view.close()
                held.store.close()

    def tend(self, partition: int) -> bool:
        """A bounded step of what is due between batches: idle users' rows leave, erased users' bytes leave the files.

        True: the state was found damaged and replaced by an older one; read on from `held()[partition].next_offset`.
        """
        held = self._held[partition]
        try:
            try:
                if self._erasures is None or not self._erasures.is_purging(partition):  # a flush may wait for a compaction
                    held.store.flush_old(_FLUSH_AGE_S)
                for each in (self._eviction, self._erasures):
                    if each is not None and each.due(partition, held.store):
                        each.run(partition, held.store, held.view)
            except SequenceForeignError as error:
                raise StateError(f"partition {partition}: {error}") from error
            except SequenceCorruptError as error:
                return self._repair(partition, str(error)) is not None
        except FencedError as error:
            self._fenced(partition, error)
        return False

    def reopen(self, partition: int) -> int:
        """Closes and opens a partition again, where the log no longer has what its state waits for. As `open`."""
        with self._restoring():
            self.close([partition])
            return self.open(partition)

    def apply(self, partition: int, records: Records) -> int | None:
        """Folds records of a partition; those that the state includes already are passed over.

        The caller vouches that nothing of the log between the state's offset and the first record is left out; a log may have holes.
        Returns the offset that the state waits for now: not the one behind the batch where a damaged state was replaced by an older one.
        None: the partition is not held (any more), its owner reads these records.

        Raises:
            StateError: the stored state is damaged, and neither a snapshot nor the log can replace it.
        """
        held = self._held.get(partition)
        if held is None:
            return None
        records = records.from_offset(held.next_offset)
        if not len(records):
            return held.next_offset
        try:
            try:
                for part in records.cut_behind(held.view.adopted):
                    self._fold(partition, held, part)
            except SequenceForeignError as error:
                raise StateError(f"partition {partition}: {error}") from error
            except SequenceCorruptError as error:
                return self._repair(partition, str(error))
        except FencedError as error:
            self._fenced(partition, error)
            return None
        return held.next_offset

    def _fenced(self, partition: int, error: FencedError) -> None:
        log.warning("partition %d: %s; closed here", partition, error)
        with self._lock:
            self._counters["fenced"] += 1
        self.close([partition])

    def saw_end(self, partition: int, end_offset: int, asked_ms: int | None = None) -> None:
        """Tells where the log ends. `asked_ms`: the time at which a broker was asked that answered it; readers are then told that the state
        included the log's end at that time, where it does. A remembered end proves nothing about the present.
        """
        held = self._held.get(partition)
        if held is None:
            return
        held.end_offset = max(held.end_offset, end_offset)
        if asked_ms is not None:
            held.end_asked_ms = asked_ms
        if held.lag:
            return
        held.progress_s = time.monotonic()
        if asked_ms is not None:
            held.caught_up_ms = asked_ms
            try:
                held.view.beat(asked_ms)
            except FencedError as error:
                self._fenced(partition, error)

    def held(self) -> Mapping[int, Held]:
        """What is open now, by partition: for the thread that applies."""
        return self._held

    def partitions(self) -> list[int]:
        """The partitions that are open now, ascending."""
        with self._lock:
            return sorted(self._held)

    def statistics(self) -> dict[str, float]:
        """Counters and seconds spent in each step since start."""
        with self._lock:
            found = {**self._counters, **{f"{name}_s": seconds for name, seconds in self._seconds.items()}}
        return {**found, **self._eviction.statistics(), **(self._erasures.statistics() if self._erasures else {})}

    def progress(self) -> dict[int, dict[str, float]]:
        """By partition: applied_offset, end_offset (of the log's next record), lag (records), lag_s (`streams.health.lag_s`), log_clock_ms,
        start_offset, no_progress_s, log_end_age_s (since a broker said where the log ends).
        """
        now_s, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        with self._lock:
            return {
                partition: {
                    "applied_offset": held.next_offset - 1,
                    "end_offset": held.end_offset,
                    "lag": held.lag,
                    "lag_s": lag_s(held.lag, held.store.meta.log_clock_ms, held.caught_up_ms, now_ms),
                    "log_end_age_s": max(0, now_ms - held.end_asked_ms) / 1000,
                    "log_clock_ms": held.store.meta.log_clock_ms,
                    "start_offset": held.store.meta.start_offset,
                    "no_progress_s": round(now_s - held.progress_s, 3),
                }
                for partition, held in sorted(self._held.items())
            }

    @property
    def _following(self) -> Log:
        assert self._log is not None, "follow() comes before open()"
        return self._log

    def _fold(self, partition: int, held: Held, records: Records) -> None:
        started_s = time.perf_counter()
        batch = self._decode(partition, records)
        if batch.reasons:
            self._bury_rejected(batch, records)
        self._at("decoded")
        for part in batch.parts(self._users_max):
            # The leader epoch is that of the last record; in between none is known, and an older one would look like a truncated log.
            is_last = part.offsets[-1] == batch.offsets[-1]
            self._fold_part(partition, held, part, records.leader_epoch if is_last else -1, started_s)
            started_s = time.perf_counter()

    def _fold_part(self, partition: int, held: Held, batch: Batch, leader_epoch: int, started_s: float) -> None:
        expected = held.next_offset
        decoded_s = time.perf_counter()
        keys, rows, meta = fold_batch(self._kept, held.store, batch, leader_epoch, held.view if self._folds_on_view else None)
        folded_s = time.perf_counter()
        if self._erasures is not None:
            self._erasures.note(partition, batch)
        held.store.write(keys, rows, meta)
        self._at("stored")
        stored_s = time.perf_counter()
        held.end_offset = max(held.end_offset, held.next_offset)
        if not held.view.write(keys, rows, meta):
            log.error("partition %d: THE LOG LOST RECORDS that readers have seen; the view is made anew", partition)
            held.view.rebuild(held.store.scan(), meta)
        self._at("viewed")
        viewed_s = time.perf_counter()
        held.progress_s = time.monotonic()
        steps_s = dict(
            zip(self._seconds, (decoded_s - started_s, folded_s - decoded_s, stored_s - folded_s, viewed_s - stored_s), strict=True)
        )
        with self._lock:
            self._counters["batches"] += 1
            self._counters["events"] += len(batch)
            self._counters["rows_written"] += len(rows)
            self._counters["offset_gaps"] += int(batch.offsets[0] != expected or batch.offsets[-1] - batch.offsets[0] + 1 != len(batch))
            for name, seconds in steps_s.items():
                self._seconds[name] += seconds
        self._observe(Applied(partition, batch, len(rows), held.lag, steps_s))

    def _decode(self, partition: int, records: Records) -> Batch:
        if len(records) > 1 and not (records.offsets[1:] > records.offsets[:-1]).all():
            raise AssertionError(f"partition {partition}: offsets of a batch do not ascend")
        append_times_ms = records.broker_times_ms
        if records.headers:
            append_times_ms = append_times_ms.copy()
            for i, headers in records.headers.items():
                append_times_ms[i] = append_time_ms(int(append_times_ms[i]), headers)
        return decode_batch(
            log_epoch=self._following.epoch,
            partition=partition,
            offsets=records.offsets,
            keys=records.keys,
            values=records.values,
            append_times_ms=append_times_ms,
            partition_count=self._following.partition_count,
            future_tolerance_ms=self._future_tolerance_ms,
            encodings=self._encodings,
        )

    def _bury_rejected(self, batch: Batch, records: Records) -> None:
        topic = self._following.topic
        letters = []
        for i, reason in batch.reasons.items():
            offset = int(records.offsets[i])
            letter = DeadLetter(
                reason=reason,
                source_topic=topic,
                source_partition=batch.partition,
                source_offset=offset,
                key=records.keys[i],
                value=records.values[i],
                append_time_ms=int(batch.append_time_ms[i]),
                broker_time_ms=int(records.broker_times_ms[i]),
                log_epoch=batch.log_epoch,
            )
            letters.append((f"{topic}:{batch.partition}:{offset}".encode(), letter.SerializeToString()))
        self._bury(letters)
        with self._lock:
            self._counters["dead_letters"] += len(letters)

    def _repair(self, partition: int, reason: str) -> int:
        with self._restoring():
            self.close([partition])
            return self.hold(partition, self._prepare_from(self._replace(partition, reason)))

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        self.is_restoring = True
        try:
            yield
        finally:
            self.is_restoring = False

    def _replace(self, partition: int, reason: str) -> PartitionStore:
        """A state to go on from in place of a damaged one: a snapshot, or an empty one where the log, on no base, has everything. The
        damaged one stays aside.

        Raises:
            StateError: neither is there, and the policy is to fail: nothing was touched.
        """
        first, following = self._following.first_and_next(partition)
        snapshot = self._newest_snapshot(partition, is_needed=first > 0)
        log.error("partition %d: DAMAGED STATE, to be set aside and restored: %s", partition, reason)
        newest, skip = self._replaced.get(partition, (None, 0))
        skip = skip if newest == snapshot else 0  # the snapshot that a damaged state came from may be damaged, too
        self._replaced[partition] = snapshot, skip + 1
        with self._lock:
            self._counters["repairs"] += 1
        if snapshot is not None and first <= snapshot + 1 <= following:
            restored = self._restored(partition, first, skip=skip)
            if restored is not None:
                return restored
        if self._following.base and (self._policy == "fail" or not first):
            raise StateError(
                f"partition {partition}: the state is damaged ({reason}) and there is no snapshot to restore. Move its folder away and "
                f"run `freshrank bootstrap` with the history of base {self._following.base}"
            )
        if first and self._policy == "fail":
            raise StateError(
                f"partition {partition}: the state is damaged ({reason}), there is no snapshot to restore, and the log starts at {first}. "
                "Restore the folder from a backup, or start over with offset_below_retention = earliest or latest"
            )
        return self._start_over(partition, 0, f"partition {partition}: the damaged state cannot be restored")

"""The worker's side of snapshots: when one is due, the checkpoint in the worker's thread, the upload in one of its own."""

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from features.ports import SequenceCorruptError
from streams.errors import StreamError
from streams.snapshots import Snapshots
from streams.state import Meta

log = logging.getLogger(__name__)

_FLUSHED_S = 1.0
"""Between the start of a flush and the checkpoint: what is left in memory then is little."""
_RETRY_S = 60.0
_WAITING_MAX = 2


class Checkpointed(Protocol):
    """A partition that checkpoints are made of: `streams.store.RocksPartition`."""

    meta: Meta

    def start_flush(self) -> None:
        """Begins to write what is in memory to files, without waiting."""
        ...

    def checkpoint(self, path: Path) -> None:
        """A copy of this moment at `path`."""
        ...


@dataclass
class _Known:
    """What is known of a partition's snapshots. at_ms: when the newest one was, or would have been, the state of that moment."""

    next_s: float
    offset: int | None = None
    at_ms: int | None = None
    flushing_s: float | None = None


class SnapshotService:
    """Takes a snapshot of each partition every `every_s`. Nothing that goes wrong here stops the worker: it is logged, counted, retried.

    `upkeep` belongs to the thread that writes the partitions; `statistics` and `partitions` may be called from any.
    """

    def __init__(self, snapshots: Snapshots, scratch: Path, *, every_s: float, keep: int) -> None:
        """`scratch`: a folder of this worker alone, on the disk of its databases. `keep`: see `Snapshots.expire`."""
        self._snapshots, self._scratch, self._every_s, self._keep = snapshots, scratch, every_s, keep
        self._known: dict[int, _Known] = {}
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(
            ("snapshots_taken", "snapshots_failed", "snapshot_files_uploaded", "snapshot_bytes_uploaded", "snapshots_expired"), 0
        )
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING_MAX)
        self._stopping = threading.Event()
        self._expired_s = time.monotonic()
        shutil.rmtree(scratch, ignore_errors=True)  # of a worker that was killed
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def upkeep(self, stores: Iterable[Checkpointed]) -> None:
        """Begins what is due for the partitions that are held now; called often, it takes about 5 ms where a checkpoint is due."""
        held = {store.meta.partition: store for store in stores}
        with self._lock:
            for partition in self._known.keys() - held.keys():
                del self._known[partition]
        for partition, store in held.items():
            try:
                self._look_after(partition, store)
            except (StreamError, SequenceCorruptError, OSError) as error:
                self._failed(partition, error)

    def statistics(self) -> dict[str, float]:
        """Counters since start, and the bytes of the restores that run now, done and in all."""
        running = list(self._snapshots.restoring.values())
        with self._lock:
            done = {"restore_done_bytes": sum(done for done, _ in running), "restore_total_bytes": sum(total for _, total in running)}
            return {**self._counters, **done}

    def partitions(self) -> dict[int, dict[str, float]]:
        """By partition that has a snapshot: offset of the newest one, and age_s, for how long it has not been the state any more."""
        now_ms = _now_ms()
        with self._lock:
            return {
                partition: {"offset": known.offset, "age_s": max(0, now_ms - known.at_ms) / 1000}
                for partition, known in sorted(self._known.items())
                if known.offset is not None and known.at_ms is not None
            }

    def restores(self) -> dict[int, float]:
        """Share that is done of each restore that runs now, by partition."""
        return {partition: done / max(total, 1) for partition, (done, total) in list(self._snapshots.restoring.items())}

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the upload that runs, behind the file that it is at; what it has uploaded is used by the next one."""
        self._stopping.set()
        while True:
            try:
                self._jobs.get_nowait()
            except queue.Empty:
                break
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("a snapshot's upload does not end in %.0f s and is left to itself", timeout_s)

    def _look_after(self, partition: int, store: Checkpointed) -> None:
        now_s, meta = time.monotonic(), store.meta
        known = self._known.get(partition)
        if known is None:
            if self._submit(lambda: self._look_up(meta)):
                with self._lock:
                    self._known[partition] = _Known(float("inf"))  # until the newest one is known
            return
        if now_s < known.next_s or meta.applied_offset < meta.start_offset:
            return
        if known.offset == meta.applied_offset:
            with self._lock:
                known.next_s, known.at_ms, known.flushing_s = now_s + self._every_s, _now_ms(), None
        elif self._jobs.full():
            return
        elif known.flushing_s is None:
            known.flushing_s = now_s
            store.start_flush()
        elif now_s - known.flushing_s >= _FLUSHED_S:
            known.flushing_s = None
            known.next_s = float("inf")
            folder = self._scratch / f"{partition}-{meta.applied_offset}"
            self._scratch.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            store.checkpoint(folder)
            at_ms = _now_ms()
            if not self._submit(lambda: self._upload(folder, meta, at_ms)):
                raise AssertionError("the queue had room, and this thread alone fills it")

    def _submit(self, job: Callable[[], None]) -> bool:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    # The background thread.

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stopping.is_set():
            job()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _look_up(self, meta: Meta) -> None:
        try:
            newest = self._snapshots.newest(meta.partition, meta.log_epoch, meta.fingerprints)
        except Exception as error:  # whatever it is: see the class
            self._failed(meta.partition, error)
            return
        # Partitions that are due at once after a start come one after the other: the queue is short.
        age_s = (_now_ms() - newest.created_ms) / 1000 if newest else float("inf")
        with self._lock:
            if known := self._known.get(meta.partition):
                known.next_s = time.monotonic() + min(max(0.0, self._every_s - age_s), self._every_s)
                if newest:
                    known.offset, known.at_ms = newest.applied_offset, newest.created_ms

    def _upload(self, folder: Path, meta: Meta, at_ms: int) -> None:
        started_s = time.monotonic()
        try:
            taken = self._snapshots.take(folder, meta, cancelled=self._stopping.is_set)
        except Exception as error:
            self._failed(meta.partition, error)
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            self._counters["snapshots_taken"] += 1
            self._counters["snapshot_files_uploaded"] += taken.files_uploaded
            self._counters["snapshot_bytes_uploaded"] += taken.bytes_uploaded
            if known := self._known.get(meta.partition):
                known.next_s, known.offset, known.at_ms = time.monotonic() + self._every_s, meta.applied_offset, at_ms
        log.info(
            "partition %d: snapshot at offset %d, %d files and %.1f MB uploaded in %.1f s",
            meta.partition,
            meta.applied_offset,
            taken.files_uploaded,
            taken.bytes_uploaded / 1e6,
            time.monotonic() - started_s,
        )
        self._expire(meta.partition)

    def _expire(self, partition: int) -> None:
        if time.monotonic() - self._expired_s < self._every_s:
            return
        self._expired_s = time.monotonic()
        try:
            expired = self._snapshots.expire(self._keep)
        except Exception as error:
            self._failed(partition, error)
            return
        with self._lock:
            self._counters["snapshots_expired"] += expired.manifests

    def _failed(self, partition: int, error: Exception) -> None:
        if self._stopping.is_set():
            return
        log.warning("partition %d: no snapshot: %s", partition, error)
        with self._lock:
            self._counters["snapshots_failed"] += 1
            if known := self._known.get(partition):
                known.next_s, known.flushing_s = time.monotonic() + min(self._every_s, _RETRY_S), None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

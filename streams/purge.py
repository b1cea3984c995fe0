"""The worker's part of an erasure behind the record itself: the user's old bytes leave the files of its stores and views.

The fold has taken the user's past from the row already; older files of RocksDB and LMDB's free space still hold it. A file in
each partition's state folder, written before the store passes an erasure, says what is still to be purged, so that no crash forgets one. It
lies in the folder that it speaks of: a folder restored from a snapshot has none, and is purged whole.
"""

import json
import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from features.actions import ERASE, Batch
from streams.state import row_key
from streams.store import PartitionStore

PURGED_FILE = "erasures.json"
"""In a partition's state folder: {"log_epoch", "purged_offset", "pending"}; `read_purged` reads it for the audit."""

VIEW_ROWS_PER_RUN = 2_000
USERS_COMPACTED_ONE_BY_ONE_MAX = 100
"""More erased users at once are purged by one compaction of everything, which then costs less."""


class ScrubbedView(Protocol):
    """The part of `streams.view.PartitionView` that the purge needs."""

    def scrub(self, rows_max: int) -> bool:
        """Copies up to `rows_max` more rows into a fresh file; True once the file has taken the view's place."""
        ...


@dataclass
class Purged:
    """What a state folder says of itself. `pending`: (user id, offset of the erasure) of what is still to be purged.

    purged_offset: nothing that was erased up to this offset is in the files; -1 where `whole`: the folder's past is not known.
    """

    log_epoch: int
    purged_offset: int
    pending: list[tuple[int, int]] = field(default_factory=list)
    whole: bool = False


def read_purged(path: Path) -> Purged | None:
    """Reads a PURGED_FILE; None where there is none that can be read."""
    try:
        said = json.loads(path.read_text("utf-8"))
        return Purged(int(said["log_epoch"], 16), said["purged_offset"], [(u, o) for u, o in said["pending"]], said["whole"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class _Cycle:
    """One purge under way: first the store, in a thread, then the view, in steps."""

    done_offset: int
    compaction: Future[None]


@dataclass
class _Held:
    path: Path
    purged: Purged
    not_before_s: float
    cycle: _Cycle | None = None


class ErasurePass:
    """One for a worker. `opened` and `closed` frame a partition; `note` goes before the store's write; `run` when `due` says so."""

    def __init__(
        self,
        state_folder: Path,
        sequence_ids: Seq[int],
        *,
        wait_s: float = 3600.0,
        view_rows_per_run: int = VIEW_ROWS_PER_RUN,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`state_folder` holds a folder a partition. `wait_s`: how long erasures are collected, since a purge rewrites files."""
        self._folder, self._sequence_ids = Path(state_folder), tuple(sequence_ids)
        self._wait_s, self._view_rows_per_run, self._now_s = wait_s, view_rows_per_run, now_s
        self._held: dict[int, _Held] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="purge")
        self._counters = dict.fromkeys(("purges", "users_purged"), 0)

    def opened(self, partition: int, store: PartitionStore) -> None:
        """Takes up what the partition's folder still has to purge. A folder with rows and without the file is purged whole."""
        path = self._folder / str(partition) / PURGED_FILE
        purged = read_purged(path)
        if purged is None or purged.log_epoch != store.meta.log_epoch:
            purged = Purged(store.meta.log_epoch, -1, [], whole=store.meta.applied_offset >= 0)
            _save(path, purged)
        self._held[partition] = _Held(path, purged, self._now_s() + self._wait_s)

    def note(self, partition: int, batch: Batch) -> None:
        """Remembers a batch's erasures, durably: call it before the store's write, so that none can be applied and forgotten."""
        erased = np.flatnonzero(batch.verdict == ERASE)
        if not len(erased):
            return
        held = self._held[partition]
        known = set(held.purged.pending)
        found = list(zip(batch.users[erased].tolist(), batch.offsets[erased].tolist(), strict=True))
        new = [place for place in found if place[1] > held.purged.purged_offset and place not in known]
        if not new:
            return
        if not known:
            held.not_before_s = self._now_s() + self._wait_s
        held.purged.pending += new
        _save(held.path, held.purged)

    def due(self, partition: int, store: PartitionStore) -> bool:
        """Whether a purge is under way, or is to begin."""
        held = self._held.get(partition)
        if held is None:
            return False
        if held.cycle is not None:
            return True
        return bool(held.purged.whole or self._ready(held, store)) and self._now_s() >= held.not_before_s

    def is_purging(self, partition: int) -> bool:
        """Whether a purge of the partition is under way."""
        held = self._held.get(partition)
        return held is not None and held.cycle is not None

    def run(self, partition: int, store: PartitionStore, view: ScrubbedView) -> bool:
        """The next step: begins the compaction in a thread, then copies the view; True when a purge has come to its end.

        Raises:
            FencedError: another worker has taken the view over.
            ViewError: the view cannot be copied.
        """
        held = self._held[partition]
        if held.cycle is None:
            held.cycle = self._begin(held, store)
        if not held.cycle.compaction.done():
            return False
        held.cycle.compaction.result()
        if not view.scrub(self._view_rows_per_run):
            return False
        done_offset = held.cycle.done_offset
        self._counters["purges"] += 1
        self._counters["users_purged"] += len({user for user, offset in held.purged.pending if offset <= done_offset})
        left = [(user, offset) for user, offset in held.purged.pending if offset > done_offset]
        held.purged = Purged(held.purged.log_epoch, max(done_offset, held.purged.purged_offset), left)
        held.cycle, held.not_before_s = None, self._now_s() + self._wait_s
        _save(held.path, held.purged)
        return True

    def closed(self, partition: int, store: PartitionStore) -> None:
        """The partition is about to be closed: its compaction is stopped. A purge that is not at its end begins anew."""
        held = self._held.pop(partition, None)
        if held is not None and held.cycle is not None and not held.cycle.compaction.cancel():
            store.stop_purge()
            held.cycle.compaction.exception()

    def statistics(self) -> dict[str, float]:
        """Since start: purges, users_purged; now: users_pending."""
        pending = sum(len(held.purged.pending) for held in list(self._held.values()))
        return {**self._counters, "users_pending": pending}

    def _begin(self, held: _Held, store: PartitionStore) -> _Cycle:
        users = sorted({user for user, _ in self._ready(held, store)})
        keys = None
        if not held.purged.whole and len(users) <= USERS_COMPACTED_ONE_BY_ONE_MAX:
            keys = [row_key(number, user) for number in self._sequence_ids for user in users]
        return _Cycle(store.meta.applied_offset, self._executor.submit(store.purge, keys))

    @staticmethod
    def _ready(held: _Held, store: PartitionStore) -> list[tuple[int, int]]:
        """The erasures that the store has applied."""
        return [place for place in held.purged.pending if place[1] <= store.meta.applied_offset]


def _save(path: Path, purged: Purged) -> None:
    said = {
        "log_epoch": f"{purged.log_epoch:016x}",
        "purged_offset": purged.purged_offset,
        "pending": purged.pending,
        "whole": purged.whole,
    }
    partial = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        json.dump(said, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

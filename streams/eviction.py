"""The background eviction: idle users' rows leave the store, which so stays as large as the users of the last age need.

A row is folded only when a record touches it, so an idle user's row would stay for ever. `features.sequence.as_read` says what a reading
gives for a row by the log's clock; this pass puts exactly that in the row's place, or nothing, a bounded number of rows at a time. When it
does so no reading, no replay and no later fold can tell: worker's clocks and restarts decide nothing.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from features.sequence import Definition, as_read, decode_row, is_whole
from streams.store import PartitionStore

ROWS_PER_RUN = 500
"""About 2 ms of the worker's thread with full sequences: 500 rows of 3 kB read, and those that are idle deleted."""

_PASSES_PER_AGE = 50
"""A pass starts when the log's clock has moved by the eviction age over this: the store holds at most 2 % more than the age needs."""


class TrimmedView(Protocol):
    """The part of `streams.view.PartitionView` that a pass needs."""

    def trim(self, keys: Seq[bytes], before: Seq[bytes], after: Seq[bytes]) -> None:
        """Puts rows in place of others that read the same, only where the view still holds `before`; an empty row is none."""
        ...


@dataclass
class _Progress:
    clock_ms: int = 0
    """The log's clock when the newest pass began."""
    after: bytes | None = None
    """Key that the pass has come to; None: none is under way."""


class EvictionPass:
    """One for a worker. Call `run` between batches while `due` says so; `forget` when a partition is closed."""

    def __init__(self, kept: Mapping[int, Definition], *, rows_per_run: int = ROWS_PER_RUN) -> None:
        """`kept`: definitions by sequence id (`streams.state.definitions`)."""
        self._kept = dict(kept)
        self._rows_per_run = rows_per_run
        self._progress: dict[int, _Progress] = {}
        ages_ms = [what.evict_age_ms for what in self._kept.values() if what.evict_age_ms is not None]
        self._step_ms = max(1, min(ages_ms) // _PASSES_PER_AGE) if ages_ms else None
        self._counters = dict.fromkeys(("passes", "rows_read", "rows_dropped"), 0)

    def due(self, partition: int, store: PartitionStore) -> bool:
        """Whether there is something to do: a pass is under way, or the log's clock has moved on since the last one."""
        if self._step_ms is None or store.meta.log_clock_ms <= 0:
            return False
        progress = self._progress.setdefault(partition, _Progress())
        return progress.after is not None or store.meta.log_clock_ms >= progress.clock_ms + self._step_ms

    def run(self, partition: int, store: PartitionStore, view: TrimmedView) -> int:
        """Looks at the next rows of a partition; returns how many were dropped or emptied.

        Raises:
            SequenceCorruptError: a row that would go is damaged.
            FencedError: another worker has taken the view over.
        """
        progress = self._progress.setdefault(partition, _Progress())
        clock_ms = store.meta.log_clock_ms
        if progress.after is None:
            progress.clock_ms, progress.after = clock_ms, self._skip(b"\x01")
        chunk = list(islice(store.scan(progress.after), self._rows_per_run))
        keys, before, after = [], [], []
        for key, row in chunk:
            reading = as_read(self._kept[key[0]], row, clock_ms)
            if reading is not row:
                if not is_whole(row):  # a damaged time says nothing about age
                    decode_row(row)
                keys.append(key)
                before.append(row)
                after.append(reading)
        if keys:
            # The view first: a crash between the two leaves a row in the store, which the next pass finds, and none in the view alone.
            view.trim(keys, before, after)
            store.trim(keys, after)
        if len(chunk) < self._rows_per_run:
            progress.after = None
            self._counters["passes"] += 1
        else:
            progress.after = self._skip(chunk[-1][0])
        self._counters["rows_read"] += len(chunk)
        self._counters["rows_dropped"] += len(keys)
        return len(keys)

    def forget(self, partition: int) -> None:
        """The partition was closed: a pass begins anew when it is opened again."""
        self._progress.pop(partition, None)

    def statistics(self) -> dict[str, float]:
        """Since start: passes (whole ones), rows_read, rows_dropped (emptied rows of erased users too)."""
        return dict(self._counters)

    def _skip(self, after: bytes) -> bytes:
        """The key to go on behind: past the rows of sequences that evict nothing."""
        number = after[0]
        while (what := self._kept.get(number)) is not None and what.evict_age_ms is None:
            number += 1
        return after if number == after[0] else bytes((number,)) if number < 256 else b"\xff" * 9

"""What each step of the hot path costs, without Kafka: `python tests/bench/ingest_profile.py`.

The load of `freshrank bench ingest` goes through the worker's own functions as it would come from a consumer that is behind: 80,000 records
at once, 20,000 of each partition. Times are CPU of the worker's thread; what RocksDB's threads take stands apart, and is the process's CPU
less all of ours.
"""

import argparse
import gc
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

from deploy.bench_ingest import DOMAIN, make_load
from features.actions import decode_batch, encode_events
from features.domain import parse_domain
from features.ids import partitions_of, user_keys
from features.sequence import apply_batch, clock_after, touched_users
from streams.core import old_rows
from streams.kafka import by_partition, records_of
from streams.state import definitions, row_keys
from streams.store import RocksStore
from streams.view import PartitionView

PARTITIONS = 4
EPOCH = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=3_000_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=80_000)
    parser.add_argument("--runs-of", type=int, default=20_000, help="records of one partition that come in a row; 0: evenly mixed")
    parser.add_argument("--store", action="store_true", help="old rows from the store, as with direct reads, not from the view")
    options = parser.parse_args()
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)  # as the worker does
    with tempfile.TemporaryDirectory(prefix="freshrank-profile-") as folder:
        Profile(Path(folder), from_view=not options.store).run(options.events, options.users, options.batch, options.runs_of)


class Profile:
    """The worker's partitions in `folder`, and what each step on them took."""

    def __init__(self, folder: Path, *, from_view: bool) -> None:
        self._domain = parse_domain(DOMAIN, source="profile")
        self._kept, self._from_view = definitions(self._domain), from_view
        rocks = RocksStore(folder / "state", self._kept)
        self._stores = [rocks.open(p, EPOCH) for p in range(PARTITIONS)]
        self._views = [PartitionView(folder / "view", p) for p in range(PARTITIONS)]
        self._cpu_s: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        begin_s = time.thread_time()
        yield
        self._cpu_s[name] += time.thread_time() - begin_s

    def run(self, event_count: int, user_count: int, batch_events: int, runs_of: int) -> None:
        """Folds the load; measures behind its first third, and prints."""
        users, events = make_load(event_count, user_count, 1)
        partition = partitions_of(users, PARTITIONS)
        offsets = np.empty(event_count, np.int64)
        for p in range(PARTITIONS):
            offsets[partition == p] = np.arange(int((partition == p).sum()))
        order = np.arange(event_count) if not runs_of else np.lexsort((partition, offsets // runs_of))
        now_ms = time.time_ns() // 1_000_000
        measured = 0
        for start in range(0, event_count, batch_events):
            if start <= event_count // 3 < start + batch_events:
                self._cpu_s.clear()
                self._counts.clear()
                measured = event_count - start
                usage = resource.getrusage(resource.RUSAGE_THREAD)
                process_s, thread_s, begin_s = time.process_time(), time.thread_time(), time.perf_counter()
            chosen = order[start : start + batch_events]
            values = encode_events(users[chosen], events[chosen])
            keys = [key.tobytes() for key in user_keys(users[chosen])]
            messages = [
                Message("t", p, o, key, value, None, None, (TIMESTAMP_LOG_APPEND_TIME, now_ms))
                for p, o, key, value in zip(partition[chosen].tolist(), offsets[chosen].tolist(), keys, values, strict=True)
            ]
            with self._step("sort out"):
                taken, _ = by_partition(messages)
            for p, own in taken.items():
                self._fold(p, own)
            with self._step("free messages"):
                del messages, taken, own
        wall_s = time.perf_counter() - begin_s
        background_s = (time.process_time() - process_s) - (time.thread_time() - thread_s)
        used = resource.getrusage(resource.RUSAGE_THREAD)
        self._report(measured, wall_s, background_s, used.ru_minflt - usage.ru_minflt, used.ru_stime - usage.ru_stime)
        for each in (*self._stores, *self._views):
            each.close()

    def _fold(self, p: int, messages: list[Message]) -> None:
        """What `streams.core` does with the records of one partition, step by step."""
        store, view = self._stores[p], self._views[p]
        with self._step("columns"):
            records = records_of(messages)
        with self._step("decode"):
            batch = decode_batch(
                log_epoch=EPOCH,
                partition=p,
                offsets=records.offsets,
                keys=records.keys,
                values=records.values,
                append_times_ms=records.broker_times_ms,
                partition_count=PARTITIONS,
                future_tolerance_ms=self._domain.future_tolerance_ms,
            )
        with self._step("touched"):
            touched = touched_users(batch)
        keys, rows = [], []
        for sequence_id, what in self._kept.items():
            with self._step("row keys"):
                row_names = row_keys(sequence_id, touched)
            with self._step("get"):
                old = old_rows(store, row_names, view if self._from_view else None)
            with self._step("apply"):
                keys += row_names
                rows += apply_batch(what, batch, old, store.meta.log_clock_ms)
        with self._step("clock"):
            clock_ms = clock_after(batch, store.meta.log_clock_ms)
        meta = replace(store.meta, applied_offset=int(batch.offsets[-1]), log_clock_ms=clock_ms)
        with self._step("store.write"):
            store.write(keys, rows, meta)
        with self._step("view.write"):
            view.write(keys, rows, meta)
        self._counts.update(batches=1, rows=len(rows), bytes=sum(map(len, rows)))
        with self._step("free messages"):
            del records

    def _report(self, measured: int, wall_s: float, background_s: float, faults: int, system_s: float) -> None:
        own_s, counts = sum(self._cpu_s.values()), self._counts
        for name, seconds in self._cpu_s.items():
            print(f"{name:14} {seconds / measured * 1e6:7.3f} us/event {seconds / counts['rows'] * 1e6:7.2f} us/row")
        print(f"{'own thread':14} {own_s / measured * 1e6:7.3f}")
        print(f"{'RocksDB':14} {background_s / measured * 1e6:7.3f}")
        print(f"{'all':14} {(own_s + background_s) / measured * 1e6:7.3f} in {wall_s:.1f} s")
        print(f"this thread: {system_s / measured * 1e6:.3f} us/event in the system, {faults / measured:.3f} page faults an event")
        print(
            f"{measured} events, {counts['batches']} batches, {counts['rows'] / measured:.3f} rows an event, "
            f"{counts['bytes'] / counts['rows']:.0f} bytes a row, {counts['bytes'] / measured:.0f} bytes an event"
        )


if __name__ == "__main__":
    main()

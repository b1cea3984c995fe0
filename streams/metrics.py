"""Prometheus metrics of a worker: what `observe` saw of each batch, and what its parts report when a scrape comes.

`METRICS` is the whole list: name, kind, labels and help of each. Dashboards, alerts and the documentation's table are checked against it. A
metric whose source has nothing to say yet (no snapshot was taken, nothing is restored) is exposed without a sample.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from features.actions import APPEND_TIME_HEADER, REJECTED
from features.described import Described, Histogram, exposed
from streams.core import Applied
from streams.dead_letters import kind_of
from streams.rates import Rate

PREFIX = "freshrank_worker_"

VISIBLE_BOUNDS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000)
BATCH_BOUNDS_EVENTS = (1, 10, 100, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)

REASON_KINDS = (
    "partition",
    "key",
    "value",
    f"header {APPEND_TIME_HEADER}",
    "user_id",
    "entity_id",
    "event_time_ms",
    "event_id",
    "entity_kind",
    "action",
    "surface",
)
"""Kinds of reasons that features.actions gives. They are exposed as 0 from the start: a rate cannot see a counter's first value."""

METRICS = (
    Described("events_total", "counter", "partition", "Records folded into the state, dead letters included."),
    Described("rows_written_total", "counter", "partition", "Rows written to the store."),
    Described("dead_letters_total", "counter", "reason", "Records written to the dead-letter topic, by the kind of the reason."),
    Described("step_seconds_total", "counter", "step", "Time spent in each step of a batch: decode, fold, store, view."),
    Described("batch_events", "histogram", "", "Records in a batch of one partition."),
    Described(
        "visible_seconds", "histogram", "", "From the append time of a record until readers see it; imports count from the old time."
    ),
    Described("lag_events", "gauge", "partition", "Records of the log that the state does not include yet.", "lag"),
    Described("lag_seconds", "gauge", "partition", "No record older than this is missing from the state; 0 at the log's end.", "lag_s"),
    Described(
        "no_progress_seconds", "gauge", "partition", "Since the last batch, or since the state was at the log's end.", "no_progress_s"
    ),
    Described("log_end_age_seconds", "gauge", "", "Since the broker last said where the log ends; lag is as old as this.", "log_end_age_s"),
    Described("snapshot_age_seconds", "gauge", "partition", "For how long the newest snapshot has not been the state any more."),
    Described("snapshots_taken_total", "counter", "", "Snapshots that were complete.", "snapshots_taken"),
    Described("snapshots_failed_total", "counter", "", "Snapshots that were not; the log says why.", "snapshots_failed"),
    Described("restore_progress_ratio", "gauge", "partition", "Share of a running restore that is done, 0 to 1."),
    Described("records_missed_total", "counter", "", "Records that retention removed before they were read.", "records_missed"),
    Described("repairs_total", "counter", "", "Damaged states that were replaced.", "repairs"),
    Described("fenced_total", "counter", "", "Partitions closed because another worker has taken them over.", "fenced"),
    Described("rebalances_total", "counter", "", "Assignments of partitions to this worker.", "rebalances"),
    Described("offset_gaps_total", "counter", "", "Batches whose offsets had gaps: compaction or transactions.", "offset_gaps"),
    Described("partitions", "gauge", "", "Partitions that this worker owns now."),
    Described("healthy", "gauge", "", "1: assigned, no partition stalled, the log's end known."),
    Described("caught_up", "gauge", "", "1: the state has reached the log's end of the moment of assignment."),
    Described("window_events_per_second", "gauge", "partition", "Rate of the last full window of the Faust table."),
    Described("window_visible_seconds_max", "gauge", "partition", "Longest time until visible in the last full window of the Faust table."),
    Described("rocksdb_stall_seconds_total", "counter", "", "Time that writers waited for RocksDB.", "rocksdb_stall_s"),
    Described("rocksdb_write_stopped", "gauge", "", "Partitions whose RocksDB takes no writes now.", "rocksdb_write_stopped"),
    Described("rocksdb_block_cache_hits_total", "counter", "", "Blocks found in the block cache.", "rocksdb_cache_hits"),
    Described("rocksdb_block_cache_misses_total", "counter", "", "Blocks read from the page cache or the disk.", "rocksdb_cache_misses"),
    Described("rocksdb_block_cache_bytes", "gauge", "", "Block cache in use, all partitions.", "rocksdb_cache_bytes"),
    Described("rocksdb_memtable_bytes", "gauge", "", "Write buffers in use, all partitions.", "rocksdb_memtable_bytes"),
    Described("rocksdb_files_bytes", "gauge", "", "Table files on disk, all partitions.", "rocksdb_files_bytes"),
    Described("rocksdb_compaction_pending_bytes", "gauge", "", "What compaction still has to rewrite.", "rocksdb_pending_bytes"),
    Described("rocksdb_written_bytes_total", "counter", "", "Bytes written by flushes and compactions.", "rocksdb_written_bytes"),
    Described("resident_memory_bytes", "gauge", "", "Resident memory of the worker's process."),
    Described("cpu_seconds_total", "counter", "", "CPU time of the worker's process, all threads."),
)


def exposed_names() -> set[str]:
    """Every name that a query may use."""
    return exposed(PREFIX, METRICS)


class WorkerMetrics(Collector):
    """Collects and exposes. `observe` is called by the hot path once a batch; a scrape may come from any thread.

    health: `BatchLoop.health`, whose partitions carry the sources of METRICS, with snapshots (age_s) and restores (share) by partition;
    statistics: flat numbers of the parts; windows: the last full one of the Faust table, by partition.
    """

    def __init__(
        self,
        health: Callable[[], Mapping[str, Any]],
        statistics: Callable[[], Mapping[str, float]],
        windows: Callable[[], Mapping[int, Rate]] = dict,
    ) -> None:
        self._health, self._statistics, self._windows = health, statistics, windows
        self._lock = threading.Lock()
        self._visible_ms, self._batch_events = Histogram(VISIBLE_BOUNDS_MS), Histogram(BATCH_BOUNDS_EVENTS)
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("events_total", "rows_written_total", "dead_letters_total", "step_seconds_total")
        }
        self._counts["dead_letters_total"].update(dict.fromkeys(REASON_KINDS, 0))
        self._process = psutil.Process()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def observe(self, applied: Applied) -> None:
        """Takes a batch that readers see since now."""
        now_ms, batch, partition = time.time_ns() // 1_000_000, applied.batch, str(applied.partition)
        accepted = batch.append_time_ms if not batch.reasons else batch.append_time_ms[batch.verdict != REJECTED]
        delays_ms = np.maximum(now_ms - accepted, 0)
        with self._lock:
            self._visible_ms.add_all(delays_ms)
            self._batch_events.add(len(batch))
            self._counts["events_total"][partition] += len(batch)
            self._counts["rows_written_total"][partition] += applied.rows
            for name, seconds in applied.step_seconds.items():
                self._counts["step_seconds_total"][name] += seconds  # type: ignore[assignment]
            for reason in batch.reasons.values():
                self._counts["dead_letters_total"][kind_of(reason)] += 1

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client's Collector."""
        health, statistics = self._health(), self._statistics()
        found: dict[str, Mapping[str, float]] = {}
        partitions: Mapping[str, Mapping[str, Any]] = health["partitions"]
        for metric in METRICS:
            if metric.source and metric.label == "partition":
                values = {number: state[metric.source] for number, state in partitions.items() if state.get(metric.source) is not None}
                found[metric.name] = values
            elif metric.source:
                value = statistics.get(metric.source, health.get(metric.source))
                found[metric.name] = {} if value is None else {"": value}
        windows = self._windows()
        found["window_events_per_second"] = {str(number): rate.events_per_s for number, rate in windows.items()}
        late = {str(number): rate.visible_ms_max / 1000 for number, rate in windows.items() if rate.visible_ms_max >= 0}
        found["window_visible_seconds_max"] = late
        found["snapshot_age_seconds"] = {str(number): kept["age_s"] for number, kept in health.get("snapshots", {}).items()}
        found["restore_progress_ratio"] = {str(number): share for number, share in health.get("restores", {}).items()}
        found["partitions"] = {"": len(partitions)}
        found["healthy"], found["caught_up"] = {"": float(health["healthy"])}, {"": float(health["caught_up"])}
        with self._process.oneshot():
            times = self._process.cpu_times()
            found["resident_memory_bytes"] = {"": self._process.memory_info().rss}
            found["cpu_seconds_total"] = {"": times.user + times.system}
        with self._lock:
            found |= {name: dict(counts) for name, counts in self._counts.items()}
            for metric in METRICS:
                yield self._family(metric, found.get(metric.name, {}))

    def _family(self, metric: Described, values: Mapping[str, float]) -> Metric:
        name = PREFIX + metric.name
        if metric.kind == "histogram":
            histogram, scale = (self._visible_ms, 1e-3) if metric.name == "visible_seconds" else (self._batch_events, 1.0)
            return HistogramMetricFamily(name, metric.help, buckets=histogram.buckets(scale), sum_value=histogram.total * scale)
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(name, metric.help, labels=[metric.label] if metric.label else None)
        for label, value in sorted(values.items()):
            family.add_metric([label] if metric.label else [], float(value))
        return family

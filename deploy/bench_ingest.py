"""Benchmark `ingest`: how fast a worker folds a waiting topic into its state, and what it costs.

The load: 4 partitions, 50,000 users by Zipf 1.05, sequences of 100, records in the wire format, a few of them late or doubled. The topic is
filled first; then a worker in a process of its own starts on an empty state. Rate and CPU (all threads of the worker, the broker apart) are
taken over the last two thirds of the records. At the end the sequences of sampled users are compared with the naive fold.
"""

import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.kafka_server import KafkaServer
from features.actions import ACTION, EVENT_DTYPE, Batch
from features.domain import parse_domain
from features.oracle import naive_fold
from features.sequence import decode_row, definition
from streams.batch_loop import WorkerConfig
from streams.kafka import KafkaConfig, Topics, ensure_topics
from streams.producer import ActionProducer
from streams.view_reader import ViewReader
from streams.worker import run_worker

ZIPF_EXPONENT = 1.05
LATE_SHARE, DOUBLED_SHARE = 0.02, 0.005
_PRODUCE_ROWS = 50_000
_WORKER_TIMEOUT_S = 300.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

DOMAIN = """
name = "bench"
[entities]
item = 1
[actions.click]
id = 1
kind = "positive"
[sequence.main]
id = 1
length = 100
[ranker.home]
sequence = "main"
item_space = "items"
[ranker.home.heads.click]
actions = ["click"]
"""


class BenchError(RuntimeError):
    """The benchmark's result is wrong, or the worker did not finish."""


def bench_ingest(
    folder: str | Path, *, event_count: int = 3_000_000, user_count: int = 50_000, runs: int = 3, sampled_users: int = 200, seed: int = 1
) -> dict[str, Any]:
    """Runs the benchmark in `folder`, which it fills, and returns medians and every run.

    Raises:
        BenchError: a sampled user's sequence is not the naive fold of the records, or the worker ended.
    """
    folder = Path(folder)
    domain = parse_domain(DOMAIN, source="bench domain")
    users, events = make_load(event_count, user_count, seed)
    results = []
    with KafkaServer(folder / "kafka") as server:
        kafka, topics = KafkaConfig(server.bootstrap), Topics()
        identity = ensure_topics(kafka, topics, partition_count=4)
        started_s = time.monotonic()
        producer = ActionProducer(kafka, domain, topics.actions, timeout_s=60.0)
        for start in range(0, event_count, _PRODUCE_ROWS):
            producer.produce_many(users[start : start + _PRODUCE_ROWS], events[start : start + _PRODUCE_ROWS])
        producer.close()
        produced_s = time.monotonic() - started_s
        for run in range(runs):
            place = folder / f"run-{run}"
            config = WorkerConfig(
                kafka, topics, domain, place / "state", place / "view", group=f"bench-{run}", instance=f"bench-{run}", log_level="WARNING"
            )
            results.append(fold_once(config, identity.partition_count, event_count))
            _check(config, identity.partition_count, users, events, sampled_users, seed)
    figures: dict[str, Any] = {"produce_events_per_s": round(event_count / produced_s)}
    for name in results[0]:
        values = [result[name] for result in results]
        figures[name] = round(statistics.median(values), 3)
        figures[f"{name}_spread"] = [round(min(values), 3), round(max(values), 3)]
    return {"name": "ingest", "figures": figures, "runs": results}


def make_load(event_count: int, user_count: int, seed: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.void]]:
    """Users uint64 [n] by Zipf, and their events EVENT_DTYPE [n] in the order of production, ending now."""
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, user_count + 1) ** ZIPF_EXPONENT
    ids = random.integers(0, 2**64, user_count, np.uint64)
    users = ids[np.searchsorted(np.cumsum(weights / weights.sum()), random.random(event_count)).clip(max=user_count - 1)]
    events = np.zeros(event_count, EVENT_DTYPE)
    events["event_time_ms"] = time.time_ns() // 1_000_000 - event_count + np.arange(event_count)
    late = random.random(event_count) < LATE_SHARE
    events["event_time_ms"][late] -= random.integers(0, 3_600_000, int(late.sum()))
    events["event_id"] = random.integers(0, 2**64, event_count, np.uint64)
    events["entity_id"] = random.integers(0, 2**64, event_count, np.uint64)
    events["request_id"] = random.integers(0, 2**64, event_count, np.uint64)
    events["entity_kind"], events["action"], events["surface"] = 1, 1, 3
    events["value"] = random.random(event_count, np.float32)
    doubled = np.flatnonzero(random.random(event_count) < DOUBLED_SHARE)
    source = np.maximum(doubled - random.integers(1, 1000, len(doubled)), 0)
    events[doubled], users[doubled] = events[source], users[source]
    return users, events


def fold_once(config: WorkerConfig, partition_count: int, event_count: int) -> dict[str, float]:
    """Starts a worker on a topic of `event_count` records and measures it: events_per_s, cpu_us_per_event, resident_mb. Its view stays."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(config,))
    process.start()
    assert process.pid is not None
    reader = ViewReader(config.view_folder, config.domain, partition_count)
    deadline_s = time.monotonic() + _WORKER_TIMEOUT_S
    steady: tuple[float, float, int] | None = None
    try:
        while True:
            applied = sum(position.offset + 1 for position in reader.positions())
            if steady is None and applied >= event_count // 3:
                steady = time.monotonic(), _cpu_s(process.pid), applied
            if applied >= event_count:
                break
            if not process.is_alive() or time.monotonic() > deadline_s:
                raise BenchError(f"the worker stopped at record {applied} of {event_count}: see its output")
            time.sleep(0.005)
        assert steady is not None
        wall_s, cpu_s = time.monotonic() - steady[0], _cpu_s(process.pid) - steady[1]
        resident_mb = _resident_bytes(process.pid) / 1e6
    finally:
        reader.close()
        process.terminate()
        process.join(30)
        if process.is_alive():
            process.kill()
    count = event_count - steady[2]
    return {"events_per_s": count / wall_s, "cpu_us_per_event": cpu_s / count * 1e6, "resident_mb": resident_mb}


def _work(config: WorkerConfig) -> None:
    raise SystemExit(run_worker(config))


def _cpu_s(pid: int) -> float:
    """User and system seconds of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def _resident_bytes(pid: int) -> int:
    """Resident bytes without file pages that are shared with readers."""
    pages = Path(f"/proc/{pid}/statm").read_text("ascii").split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def _check(
    config: WorkerConfig, partition_count: int, users: npt.NDArray[np.uint64], events: npt.NDArray[np.void], sampled: int, seed: int
) -> None:
    sample = np.random.default_rng(seed).choice(np.unique(users), sampled, replace=False)
    own = np.isin(users, sample)
    n = int(own.sum())
    order = np.arange(n)
    batch = Batch(1, 0, order, order, np.full(n, ACTION, np.uint8), users[own], events[own], {})
    expected = naive_fold([batch])
    what = definition(config.domain, "main")
    reader = ViewReader(config.view_folder, config.domain, partition_count)
    try:
        for reading in reader.read("main", [int(user) for user in sample]):
            if decode_row(reading.row).events.tobytes() != expected[reading.user_id].sequence(what).tobytes():
                raise BenchError(f"user {reading.user_id:016x}: the sequence is not the naive fold of the records")
    finally:
        reader.close()

"""Benchmark `restore`: a worker without its folders back to fresh, and a standby that becomes owner.

restore_s_per_gb: the state of USERS users with full sequences, its snapshots in a folder on the same disk, and a log of REPLAY_RECORDS
behind them. A worker starts on empty folders; the time runs from the start of its process until readers see the log's end, and is divided
by the snapshots' size. Then sampled users are compared with the naive fold.

standby_ready_s: an owner and a standby under EVENTS_PER_S; the owner is killed. detection_s is what the group needs to notice, with a
session time-out of SESSION_TIMEOUT_MS; standby_ready_s is the time from then, when the standby is assigned everything, until readers of its
view see the end that the log had at that moment.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console
from rich.progress import Progress

from deploy.bench_ingest import DOMAIN, ZIPF_EXPONENT, BenchError
from deploy.kafka_server import KafkaServer
from features.actions import ACTION, EVENT_DTYPE, Batch
from features.domain import Domain, parse_domain
from features.ids import partitions_of
from features.oracle import naive_fold
from features.sequence import NEVER_ERASED, Row, decode_row, definition, encode_row
from streams.batch_loop import WorkerConfig
from streams.kafka import KafkaConfig, LogIdentity, Topics, end_offsets, ensure_topics
from streams.producer import ActionProducer
from streams.snapshots import Snapshots
from streams.state import definitions, row_keys
from streams.store import RocksStore
from streams.view_reader import ViewReader
from streams.worker import run_worker

USERS = 2_000_000
REPLAY_RECORDS = 3_000_000
"""Ten minutes at 5,000 events/s."""
PARTITIONS = 4
EVENTS_PER_S = 5_000
STANDBY_RECORDS = 200_000
"""What owner and standby have folded before the owner is killed."""
SESSION_TIMEOUT_MS = 6_000
SAMPLED_USERS = 200
SEED = 1
_LENGTH, _CHUNK_USERS, _PRODUCE_ROWS = 100, 5_000, 50_000
_TIMEOUT_S = 1_200.0
_U64 = npt.NDArray[np.uint64]
_Events = npt.NDArray[np.void]


def bench_restore(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Runs both parts in `folder`, which it fills; one dictionary of figures a run.

    Raises:
        BenchError: a sampled user's sequence is not the naive fold, or a worker ended or was not ready in time.
    """
    domain = parse_domain(DOMAIN, source="bench domain")
    with KafkaServer(folder / "kafka") as server:
        kafka = KafkaConfig(server.bootstrap)
        restored = _bench_restore(kafka, domain, runs, folder, console)
        console.print(f"standby: {EVENTS_PER_S} events/s, the owner is killed, session time-out {SESSION_TIMEOUT_MS / 1000:.0f} s")
        ready = [_standby_run(kafka, domain, folder / f"standby-{run}", f"standby-{run}") for run in range(runs)]
    return [{**one, **other} for one, other in zip(restored, ready, strict=True)]


# Restore.


def _bench_restore(kafka: KafkaConfig, domain: Domain, runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    topics = Topics()
    identity = ensure_topics(kafka, topics, partition_count=PARTITIONS)
    random = np.random.default_rng(SEED)
    # The first one of each partition is the user of the record at offset 0, the moment of the snapshots.
    users = np.unique(random.integers(1, 2**63, USERS + 1_000, np.uint64))[:USERS]
    partitions = partitions_of(users, PARTITIONS)
    first = np.array([users[partitions == partition][0] for partition in range(PARTITIONS)])
    sample = random.choice(users[~np.isin(users, first)], min(SAMPLED_USERS, len(users) - PARTITIONS), replace=False)
    producer = ActionProducer(kafka, domain, topics.actions, timeout_s=60.0)
    producer.produce_many(first, _events(random, PARTITIONS))
    producer.flush()
    url = str(folder / "snapshots")
    base = _make_snapshots(domain, identity, users, partitions, sample, folder / "made", url, console)
    log_users, log_events = _load(random, users, REPLAY_RECORDS)
    with Progress(console=console, transient=True) as bar:
        for start in bar.track(range(0, REPLAY_RECORDS, _PRODUCE_ROWS), description="fills the log"):
            producer.produce_many(log_users[start : start + _PRODUCE_ROWS], log_events[start : start + _PRODUCE_ROWS])
    producer.close()
    own = np.isin(log_users, sample)
    expected = _expected(domain, base, log_users[own], log_events[own])
    size_gb = sum(manifest.size for manifest in Snapshots(url).manifests()) / 1e9
    found = []
    for run in range(runs):
        place = folder / f"restore-{run}"
        config = WorkerConfig(
            kafka,
            topics,
            domain,
            place / "state",
            place / "view",
            group=f"restore-{run}",
            instance="restored",
            snapshot_url=url,
            snapshot_every_s=1e6,
            log_level="WARNING",
        )
        opened_s, seconds, cpu_s = _restore_run(config, end_offsets(kafka, topics.actions, range(PARTITIONS)), expected)
        console.print(
            f"{size_gb:.2f} GB: restored and in the view after {opened_s:.1f} s, {REPLAY_RECORDS} records behind it after {seconds:.1f} s "
            f"(worker's CPU {cpu_s:.1f} s)"
        )
        found.append({"restore_s_per_gb": seconds / size_gb, "restore_s": seconds, "restore_cpu_s": cpu_s, "restore_gb": size_gb})
        shutil.rmtree(place)
    return found


def _make_snapshots(
    domain: Domain,
    identity: LogIdentity,
    users: _U64,
    partitions: npt.NDArray[np.int32],
    sample: _U64,
    folder: Path,
    url: str,
    console: Console,
) -> dict[int, _Events]:
    """Writes the state as of offset 0 of each partition, and its snapshots; returns the events of the sampled users."""
    what, wanted, base = definition(domain, "main"), set(sample.tolist()), {}
    store, snapshots = RocksStore(folder, definitions(domain)), Snapshots(url)
    random = np.random.default_rng(SEED + 1)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("makes state and snapshots", total=len(users))
        for partition in range(PARTITIONS):
            held = store.open(partition, identity.epoch)
            meta = replace(held.meta, applied_offset=0, log_clock_ms=time.time_ns() // 1_000_000)
            own = users[partitions == partition]
            for start in range(0, len(own), _CHUNK_USERS):
                chunk = own[start : start + _CHUNK_USERS]
                events = _events(random, len(chunk) * _LENGTH).reshape(len(chunk), _LENGTH)
                rows = [
                    encode_row(Row(int(user), what.fingerprint, identity.epoch, partition, 0, NEVER_ERASED, own_events))
                    for user, own_events in zip(chunk, events, strict=True)
                ]
                base.update({int(user): own_events for user, own_events in zip(chunk, events, strict=True) if int(user) in wanted})
                held.write(row_keys(1, chunk), rows, meta)
                bar.update(task, advance=len(chunk))
            held.checkpoint(folder / "checkpoint")
            held.close()
            snapshots.take(folder / "checkpoint", meta)
            shutil.rmtree(folder / "checkpoint")
            shutil.rmtree(folder / str(partition))
    return base


def _events(random: np.random.Generator, count: int) -> _Events:
    """Events in the law's order, the last one now."""
    events = np.zeros(count, EVENT_DTYPE)
    events["event_time_ms"] = time.time_ns() // 1_000_000 - 86_400_000 + np.arange(count) * 86_400_000 // count
    for name in ("event_id", "entity_id", "request_id"):
        events[name] = random.integers(1, 2**63, count, np.uint64)
    events["entity_kind"], events["action"], events["surface"] = 1, 1, 3
    events["value"] = random.random(count, np.float32)
    return events


def _load(random: np.random.Generator, users: _U64, count: int) -> tuple[_U64, _Events]:
    """Users by Zipf, and their events, in the order of production."""
    weights = 1.0 / np.arange(1, len(users) + 1) ** ZIPF_EXPONENT
    shuffled = random.permutation(users)
    return shuffled[np.searchsorted(np.cumsum(weights / weights.sum()), random.random(count)).clip(max=len(users) - 1)], _events(
        random, count
    )


def _expected(domain: Domain, base: dict[int, _Events], users: _U64, events: _Events) -> dict[int, bytes]:
    """The sampled users' sequences by the oracle."""
    all_users = np.concatenate([np.repeat(np.fromiter(base, np.uint64, len(base)), _LENGTH), users])
    all_events = np.concatenate([*base.values(), events])
    n = len(all_users)
    order = np.arange(n)
    folded = naive_fold([Batch(1, 0, order, order, np.full(n, ACTION, np.uint8), all_users, all_events, {})])
    return {user: folded[user].sequence(definition(domain, "main")).tobytes() for user in base}


def _restore_run(config: WorkerConfig, ends: dict[int, int], expected: dict[int, bytes]) -> tuple[float, float, float]:
    """Seconds until readers see all partitions, until they see the log's end, and of the worker's CPU until then."""
    reader = ViewReader(config.view_folder, config.domain, PARTITIONS)
    started_s = time.monotonic()
    try:
        with _worker(config) as (process, _):
            _until(lambda: len(reader.positions()) == PARTITIONS, process, "all partitions")
            opened_s = time.monotonic() - started_s
            _until(lambda: {p.partition: p.offset + 1 for p in reader.positions()} == ends, process, "the log's end")
            seconds = time.monotonic() - started_s
            used = psutil.Process(process.pid).cpu_times()
            for reading in reader.read("main", list(expected)):
                if decode_row(reading.row).events.tobytes() != expected[reading.user_id]:
                    raise BenchError(f"user {reading.user_id:016x}: the sequence is not the naive fold of snapshot and log")
    finally:
        reader.close()
    return opened_s, seconds, used.user + used.system


# Standby.


def _standby_run(kafka: KafkaConfig, domain: Domain, folder: Path, name: str) -> dict[str, float]:
    topics = Topics(*(f"{name}-{kind}" for kind in ("actions", "dead-letters", "rankings", "announcements")))
    ensure_topics(kafka, topics, partition_count=PARTITIONS)
    config = WorkerConfig(
        kafka,
        topics,
        domain,
        folder / "owner" / "state",
        folder / "view",
        group=name,
        instance="owner",
        session_timeout_ms=SESSION_TIMEOUT_MS,
        log_level="ERROR",
    )
    second = replace(config, state_folder=folder / "standby" / "state", view_folder=folder / "standby" / "view", standby=True)
    second = replace(second, instance="standby")
    random = np.random.default_rng(SEED)
    users, events = _load(random, random.integers(1, 2**63, 50_000, np.uint64), STANDBY_RECORDS)
    producer = ActionProducer(kafka, domain, topics.actions, timeout_s=60.0)
    producer.produce_many(users, events)
    producer.flush()
    stop = threading.Event()
    producing = threading.Thread(target=_produce_steadily, args=(producer, users, events, stop))
    reader = ViewReader(second.view_folder, domain, PARTITIONS)

    def reached(ends: dict[int, int]) -> bool:
        positions = {position.partition: position.offset + 1 for position in reader.positions()}
        return all(positions.get(partition, -1) >= end for partition, end in ends.items())

    try:
        with _worker(config) as (owner, owner_ready), _worker(second) as (standby, standby_ready):
            owner_ready()
            address = standby_ready()["health"]
            _until(lambda: len(_owned(address)) == PARTITIONS // 2, standby, "half of the partitions each")
            producing.start()
            _until(lambda: reached(end_offsets(kafka, topics.actions, range(PARTITIONS))), standby, "the standby at the log's end")
            assert owner.pid is not None
            os.kill(owner.pid, signal.SIGKILL)
            killed_s = time.monotonic()
            _until(lambda: len(_owned(address)) == PARTITIONS, standby, "the standby's assignment")
            assigned_s = time.monotonic()
            ends = end_offsets(kafka, topics.actions, range(PARTITIONS))
            _until(lambda: reached(ends), standby, "the log's end")
            ready_s = time.monotonic()
    finally:
        stop.set()
        if producing.ident is not None:
            producing.join()
        producer.close()
        reader.close()
    return {"standby_ready_s": ready_s - assigned_s, "detection_s": assigned_s - killed_s}


def _produce_steadily(producer: ActionProducer, users: _U64, events: _Events, stop: threading.Event) -> None:
    """EVENTS_PER_S, open loop, 50 times a second."""
    size, begin_s, i = EVENTS_PER_S // 50, time.monotonic(), 0
    while not stop.wait(max(0.0, begin_s + i / 50 - time.monotonic())):
        start = i * size % (len(users) - size)
        now = events[start : start + size].copy()
        now["event_time_ms"] = time.time_ns() // 1_000_000
        producer.produce_many(users[start : start + size], now)
        i += 1


def _owned(address: str) -> list[str]:
    """The partitions that the group has assigned to a worker."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            report = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        report = json.loads(error.read())
    except OSError:
        return []
    return [number for number, partition in report["partitions"].items() if partition["role"] == "owner"]


# Both.


@contextmanager
def _worker(config: WorkerConfig) -> Iterator[tuple[BaseProcess, Callable[[], dict[str, Any]]]]:
    """A worker in a process of its own, and what waits until it is ready."""
    context = multiprocessing.get_context("spawn")
    told: SimpleQueue[dict[str, Any]] = context.SimpleQueue()
    process = context.Process(target=_work, args=(config, told))
    process.start()

    def ready() -> dict[str, Any]:
        _until(lambda: not told.empty(), process, "a worker that is ready")
        return told.get()

    try:
        yield process, ready
    finally:
        process.terminate()
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()


def _work(config: WorkerConfig, told: "SimpleQueue[dict[str, Any]]") -> None:
    raise SystemExit(run_worker(config, told.put))


def _until(condition: Callable[[], bool], process: BaseProcess, what: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        if not process.is_alive() or time.monotonic() > deadline_s:
            raise BenchError(f"the worker did not come to {what}: see its output")
        time.sleep(0.005)

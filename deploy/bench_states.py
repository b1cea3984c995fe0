"""States of any size for benchmarks, and a real worker measured on them.

A state is built as `freshrank bootstrap` builds one, from history that is made up in the processes that fold it: reading Parquet
and sorting it apart is the benchmark `bootstrap`. The worker then starts once to make the view, and a second time on a topic that was
filled meanwhile; rate, CPU and bytes are those of the second time, behind the first quarter of the records.
"""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from deploy.bench_bootstrap import random_events
from deploy.bench_ingest import DOMAIN, ZIPF_EXPONENT, BenchError
from features.actions import ACTION, Batch
from features.base import Base
from features.domain import parse_domain
from features.ids import partitions_of
from features.logs import LoggedActions
from features.oracle import history_batch, naive_fold
from features.sequence import Events, decode_row, definition, sort_history
from streams.batch_loop import WorkerConfig
from streams.bootstrap import BUCKET_EVENTS, Target, load_partition, write_rows
from streams.kafka import KafkaConfig, LogIdentity, Topics, ensure_topics
from streams.producer import ActionProducer
from streams.state import definitions
from streams.view_reader import ViewReader
from streams.worker import run_worker

_U64 = npt.NDArray[np.uint64]
_PRODUCE_ROWS = 50_000
_READY_S_MAX = 600.0
_DAY_MS, _PAST_END_MS = 86_400_000, 1_700_000_000_000
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_SECTOR_BYTES = 512
_SAMPLED_USERS = 200


@dataclass(frozen=True)
class StateSize:
    """How large a state is. Each user has `actions` actions in the past."""

    users: int
    actions: int
    partitions: int = 4

    def ids(self) -> _U64:
        """The users: uint64, ascending."""
        return np.unique(np.random.default_rng(self.users).integers(0, 2**64, self.users, np.uint64))

    def base(self) -> Base:
        """The base that the state stands on."""
        kept = definitions(parse_domain(DOMAIN, source="bench domain"))
        fingerprints = tuple((number, what.fingerprint) for number, what in kept.items())
        return Base((), self.users * self.actions, 0, 0, _PAST_END_MS, 600_000, fingerprints)


def past_of(users: _U64, actions: int, clock_ms: int) -> tuple[_U64, Events]:
    """The past of some users, sorted: the same for the same users. users uint64 [n * actions], events EVENT_DTYPE [n * actions]."""
    random = np.random.default_rng(int(users[0] & np.uint64(2**63 - 1)))
    times_ms = clock_ms - random.integers(1, 90 * _DAY_MS, len(users) * actions)
    return sort_history(np.repeat(users, actions), random_events(random, times_ms))


def _build_bucket(size: StateSize, target: Target, partition: int, number: int, users: _U64, folder: Path) -> list[Path]:
    owners, events = past_of(users, size.actions, target.clock_ms)
    return write_rows(target, partition, owners, events, {}, folder, f"{partition}-{number:06d}")


def _buckets(size: StateSize) -> Iterator[tuple[int, int, _U64]]:
    """(partition, number, users) of each bucket; a user's past is made with its bucket's."""
    ids = size.ids()
    partitions = partitions_of(ids, size.partitions)
    users_max = max(BUCKET_EVENTS // size.actions, 1)
    for partition in range(size.partitions):
        own = ids[partitions == partition]
        for number, start in enumerate(range(0, len(own), users_max)):
            yield partition, number, own[start : start + users_max]


def build_state(size: StateSize, state: Path, epoch: int, console: Console) -> None:
    """Builds every partition's store below `state`."""
    kept = definitions(parse_domain(DOMAIN, source="bench domain"))
    target = Target(kept, size.base().clock_ms, epoch)
    tables: dict[int, list[Path]] = {partition: [] for partition in range(size.partitions)}
    folder = state / ".tables"
    folder.mkdir(parents=True)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_build_bucket, size, target, *bucket, folder): bucket[0] for bucket in _buckets(size)}
        what = f"state of {size.users:,} users"
        for future in track(as_completed(futures), what, len(futures), console=console, transient=True):
            tables[futures[future]] += future.result()
    for partition, paths in tables.items():
        load_partition(state, target, partition, paths)
    shutil.rmtree(folder)


@contextmanager
def _working(config: WorkerConfig) -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(config,))
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()


def _work(config: WorkerConfig) -> None:
    raise SystemExit(run_worker(config))


def measure(
    size: StateSize, events: int, folder: Path, kafka: KafkaConfig, console: Console, *, seconds_max: float = 120.0, **worker: object
) -> dict[str, float]:
    """Builds a state in `folder`, which is removed at the end, and folds `events` Zipf events into it with a real worker.

    `worker`: settings of `streams.batch_loop.WorkerConfig`. The measurement ends after `seconds_max` where the events last longer.

    Raises:
        BenchError: a sampled user's sequence is not the naive fold of past and topic, or the worker ended.
    """
    domain = parse_domain(DOMAIN, source="bench domain")
    name = folder.name
    topics = Topics(f"{name}.actions", f"{name}.dead", f"{name}.rankings", f"{name}.news", base=size.base().id)
    identity = ensure_topics(kafka, topics, partition_count=size.partitions)
    config = WorkerConfig(kafka, topics, domain, folder / "state", folder / "view", group=name, log_level="WARNING", **worker)  # type: ignore[arg-type]
    try:
        started_s = time.monotonic()
        build_state(size, config.state_folder, identity.epoch, console)
        built_s = time.monotonic() - started_s
        started_s = time.monotonic()
        with _working(config) as process:
            _wait(config, identity, process, 0, _READY_S_MAX)
        view_s = time.monotonic() - started_s
        users, load = zipf_load(size.ids(), events)
        _produce(config, users, load, console)
        os.sync()  # what building left in the page cache must not be written at the worker's expense
        found = _measure_worker(config, identity, events, seconds_max)
        found |= {"build_events_per_s": size.users * size.actions / built_s, "view_s": view_s}
        found |= {"disk_mb": _size_mb(config.state_folder), "view_disk_mb": _size_mb(config.view_folder)}
        if found.pop("finished"):
            _check(size, config, identity, users, load)
        console.print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in found.items()))
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def zipf_load(ids: _U64, count: int) -> tuple[_U64, Events]:
    """Users uint64 [count] by Zipf over all of `ids`, the frequent ones anywhere among them, and their events, ending now."""
    random = np.random.default_rng(7)
    weights = np.cumsum(1.0 / np.arange(1, len(ids) + 1) ** ZIPF_EXPONENT)
    ranks = np.searchsorted(weights / weights[-1], random.random(count)).clip(max=len(ids) - 1)
    times_ms = time.time_ns() // 1_000_000 - count + np.arange(count)
    return random.permutation(ids)[ranks], random_events(random, times_ms)


def _produce(config: WorkerConfig, users: _U64, events: Events, console: Console) -> None:
    producer = ActionProducer(config.kafka, config.domain, config.topics.actions, timeout_s=60.0)
    for start in track(range(0, len(users), _PRODUCE_ROWS), "filling the topic", console=console, transient=True):
        producer.produce_many(users[start : start + _PRODUCE_ROWS], events[start : start + _PRODUCE_ROWS])
    producer.close()


def _wait(config: WorkerConfig, identity: LogIdentity, process: BaseProcess, events: int, seconds_max: float) -> int:
    """Waits until the view has every partition and `events` records; returns how many it has."""
    deadline_s = time.monotonic() + seconds_max
    reader = ViewReader(config.view_folder, config.domain, identity.partition_count)
    try:
        while True:
            positions = reader.positions()
            applied = sum(position.offset + 1 for position in positions)
            if len(positions) == identity.partition_count and applied >= events:
                return applied
            if not process.is_alive():
                raise BenchError(f"the worker ended at record {applied} of {events}: see its output")
            if time.monotonic() > deadline_s:
                return applied
            time.sleep(0.005)
    finally:
        reader.close()


def _measure_worker(config: WorkerConfig, identity: LogIdentity, events: int, seconds_max: float) -> dict[str, float]:
    with _working(config) as process:
        assert process.pid is not None
        pid = process.pid
        first = _wait(config, identity, process, events // 4, seconds_max)
        before = _counters(pid, config.state_folder)
        last = _wait(config, identity, process, events, seconds_max)
        counted = {name: value - before[name] for name, value in _counters(pid, config.state_folder).items()}
        count = last - first
        if count <= 0:
            raise BenchError(f"the worker made no progress behind record {first} within {seconds_max:.0f} s")
        rest = counted["write_bytes"] - counted["table_bytes"]
        return {
            "events_per_s": count / counted["wall_s"],
            "cpu_us_per_event": counted["cpu_s"] / count * 1e6,
            "bytes_written_per_event": counted["write_bytes"] / count,
            "bytes_read_per_event": counted["read_bytes"] / count,
            "table_bytes_written_per_event": counted["table_bytes"] / count,
            "view_bytes_written_per_event": max(rest, 0) / count,
            "resident_mb": _memory_mb(pid, "RssAnon"),
            "mapped_mb": _memory_mb(pid, "RssFile"),
            "finished": float(last >= events),
        }


def _counters(pid: int, state: Path) -> dict[str, float]:
    """What is counted over the measurement: seconds, CPU seconds of all threads, and bytes.

    write_bytes: what the disk was given, by whomever: nothing else writes there meanwhile. (The kernel counts a process's own by the folio:
    64 kB where 4 kB of a large one were made dirty.) read_bytes: what the process made the disk read. table_bytes: what RocksDB's flushes
    and compactions say they wrote.
    """
    device = state.stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    if not disk.exists():
        raise BenchError(f"{state}: no disk whose writes the kernel counts (a tmpfs or an overlay?): set TMPDIR to a folder on one")
    sectors = disk.read_text("ascii").split()[6]
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    found = {"wall_s": time.monotonic(), "cpu_s": (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS}
    lines = Path(f"/proc/{pid}/io").read_text("ascii").splitlines()
    found["read_bytes"] = next(float(line.removeprefix("read_bytes:")) for line in lines if line.startswith("read_bytes:"))
    found |= {"write_bytes": float(sectors) * _SECTOR_BYTES, "table_bytes": 0.0}
    for path in state.glob("*/LOG"):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            _, mark, text = line.partition("EVENT_LOG_v1 ")
            event = json.loads(text) if mark else {}
            if event.get("event") == "table_file_creation":
                found["table_bytes"] += event["file_size"]
    return found


def _memory_mb(pid: int, name: str) -> float:
    """RssAnon: its own memory; RssFile: pages of mapped files, the view's, which it shares with readers."""
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) / 1e6


def _check(size: StateSize, config: WorkerConfig, identity: LogIdentity, users: _U64, events: Events) -> None:
    """Sampled users' sequences are the naive fold of past and topic."""
    clock_ms = size.base().clock_ms
    bucket = next(own for partition, _, own in _buckets(size) if partition == size.partitions - 1)
    past = LoggedActions.imported(*past_of(bucket, size.actions, clock_ms), np.zeros(len(bucket) * size.actions, np.int64))
    seen = np.flatnonzero(np.isin(users, bucket))
    sample = np.unique(np.concatenate((users[seen][:_SAMPLED_USERS], bucket[:_SAMPLED_USERS])))
    own, before = seen[np.isin(users[seen], sample)], np.flatnonzero(np.isin(past.users, sample))
    order = np.arange(len(own))
    batch = Batch(identity.epoch, 0, order, order, np.full(len(own), ACTION, np.uint8), users[own], events[own], {})
    history = LoggedActions.imported(past.users[before], past.events[before], past.append_time_ms[before])
    expected = naive_fold([history_batch(history, identity.epoch, 0), batch], clock_ms)
    what = definition(config.domain, "main")
    reader = ViewReader(config.view_folder, config.domain, identity.partition_count)
    try:
        for reading in reader.read("main", sample.tolist()):
            if decode_row(reading.row).events.tobytes() != expected[reading.user_id].sequence(what).tobytes():
                raise BenchError(f"user {reading.user_id:016x}: the sequence is not the naive fold of past and topic")
    finally:
        reader.close()

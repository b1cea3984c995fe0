"""`freshrank chaos`: real processes are killed, frozen and starved under load, and nothing may be lost or counted twice.

Three brokers (replication 3), two workers of one group on one set of views, one gRPC reader, and a producer that waits for every
acknowledgement. Every fault is followed by a probe: how long until an action that is produced then can be read. At the end the log is
read back and folded naively; every user's sequence must equal that, and every acknowledged action must be in the log.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from deploy.kafka_server import kafka_cluster
from deploy.processes import kafka_config, topics
from deploy.settings import Settings, load_settings
from deploy.stack import process
from deploy.supervisor import Child, Supervisor, free_ports
from features.actions import REJECTED, Batch, decode_batch
from features.domain import Domain, load_domain
from features.oracle import naive_fold
from features.ports import Position, SequenceUnavailableError
from features.sequence import decode_row, definition
from streams.errors import ProduceError
from streams.kafka import TopicPartition, end_offsets, ensure_topics, log_identity, new_reader, records_of
from streams.producer import ActionProducer
from streams.view_reader import ViewReader

PARTITIONS, USERS, EVENTS_PER_S = 4, 300, 300
SESSION_TIMEOUT_MS = 3_000
FRESH_WITHIN_S = 90.0
DISK_MB = 96
WORKERS = ("a", "b")
_DOMAIN = Path(__file__).parents[1] / "domains" / "simulator.toml"


@dataclass
class ChaosReport:
    """What was done and what came of it. Times in seconds."""

    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    other_faults: dict[str, int] = field(default_factory=dict)
    not_exercised: list[str] = field(default_factory=list)
    acknowledged: int = 0
    refused: int = 0
    users_compared: int = 0
    lost: int = 0
    counted_twice: int = 0
    different: int = 0
    watermarks_back: int = 0
    fresh_again_s: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing lost, nothing doubled, no answer that differs from the fold, and everything was exercised."""
        return not (self.lost or self.counted_twice or self.different or self.watermarks_back or self.not_exercised) and bool(
            self.acknowledged and self.users_compared
        )

    def to_text(self) -> str:
        """For a person."""
        lines = [
            f"seed {self.seed}: {sum(self.kills.values())} kills {self.kills}, and {self.other_faults}",
            f"{self.acknowledged} actions acknowledged ({self.refused} refused while no broker could take them), {self.users_compared} "
            f"users compared with the naive fold of the log",
            f"lost: {self.lost}, counted twice: {self.counted_twice}, sequences that differ: {self.different}, "
            f"watermarks that went back: {self.watermarks_back}",
        ]
        for fault, seconds in self.fresh_again_s.items():
            lines.append(
                f"fresh again after {fault}: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s ({len(seconds)})"
            )
        lines += [f"NOT EXERCISED: {what}" for what in self.not_exercised]
        return "\n".join([*lines, "OK" if self.ok else "FAILED"])

    def to_json(self) -> str:
        """For a program."""
        return json.dumps({**asdict(self), "ok": self.ok}, indent=1) + "\n"


def run_chaos(kills: int, seed: int, console: Console, *, outage_s: float = 60.0) -> ChaosReport:
    """Kills processes `kills` times, and exercises each other fault once in 50 kills, at least once.

    `outage_s`: how long no broker runs. The folder with all logs stays where anything did not hold.
    """
    folder = Path(tempfile.mkdtemp(prefix="freshrank-chaos-"))
    with contextlib.ExitStack() as stack:
        try:
            report = _Chaos(folder, seed, console, stack).run(kills, outage_s)
        except BaseException:
            console.print(f"state and logs: {folder}", soft_wrap=True)
            raise
    if report.ok:
        shutil.rmtree(folder)
    else:
        console.print(f"state and logs: {folder}", soft_wrap=True)
    return report


class _Load:
    """Produces at a constant rate, and remembers what was acknowledged."""

    def __init__(self, producer: ActionProducer, seed: int) -> None:
        self._producer, self._random = producer, np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.acknowledged: dict[tuple[int, int], int] = {}
        """Event id by (partition, offset)."""
        self.refused = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()

    def produce(self) -> tuple[int, int, Future[Position]]:
        """One action of a random user: (user, event id, position)."""
        with self._lock:
            user_id, event_id = int(self._random.integers(1, USERS + 1)), int(self._random.integers(1, 2**63))
            late_ms = int(self._random.integers(0, 60_000)) if self._random.random() < 0.1 else 0
        future = self._producer.produce(
            user_id=user_id,
            entity_kind="item",
            entity_id=int(event_id % 1_000) + 1,
            action="click",
            event_id=event_id,
            event_time_ms=time.time_ns() // 1_000_000 - late_ms,
        )
        future.add_done_callback(lambda done: self._note(done, event_id))
        return user_id, event_id, future

    def _note(self, done: Future[Position], event_id: int) -> None:
        with self._lock:
            if done.exception() is None:
                at = done.result()
                self.acknowledged[at.partition, at.offset] = event_id
            else:
                self.refused += 1

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            due_s += 1 / EVENTS_PER_S
            with contextlib.suppress(ProduceError):  # a full queue during an outage: the caller would try again
                self.produce()

    def stop(self) -> None:
        """Stops, and waits for what is on its way."""
        self._stop.set()
        self._thread.join()


class _Chaos:
    def __init__(self, folder: Path, seed: int, console: Console, stack: contextlib.ExitStack) -> None:
        self._random, self._console = np.random.default_rng(seed), console
        self.report = ChaosReport(seed)
        self._folder, self._home = folder, folder / "home"
        self._disk = stack.enter_context(_small_disk(self._home / "state" / WORKERS[1]))  # outlives the worker that holds it
        self._supervisor = stack.enter_context(Supervisor(folder / "supervisor", on_event=lambda *_: None))
        servers = kafka_cluster(folder)
        self._brokers = [self._supervisor.start(server.command()) for server in servers]
        for broker in self._brokers:
            broker.wait_ready()
        self._settings = self._new_settings(",".join(server.bootstrap for server in servers))
        self.domain: Domain = load_domain(self._settings.domain)
        ensure_topics(
            kafka_config(self._settings), topics(self._settings), partition_count=PARTITIONS, replication_factor=3, timeout_s=30.0
        )
        self._workers = {name: self._start("worker", worker_instance=name) for name in WORKERS}
        self._reader = self._start("reader")
        for child in (*self._workers.values(), self._reader):
            child.wait_ready()
        self._view = ViewReader(self._settings.home / "view", self.domain, PARTITIONS)
        stack.callback(self._view.close)
        self._producer = ActionProducer(kafka_config(self._settings), self.domain, self._settings.topic_actions, timeout_s=300.0)
        stack.callback(self._producer.close)
        self._load = _Load(self._producer, seed)
        stack.callback(self._load.stop)
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch_watermarks, name="watermarks")
        self._watcher.start()
        stack.callback(self._stop_watching)

    def _new_settings(self, bootstrap: str) -> Settings:
        (port,) = free_ports(1)
        return load_settings(
            home=self._home,
            domain=_DOMAIN,
            kafka_bootstrap=bootstrap,
            partitions=PARTITIONS,
            reader_port=port,
            worker_session_timeout_ms=SESSION_TIMEOUT_MS,
            rocksdb_write_buffer_mb=8,
            rocksdb_cache_mb=16,
            view_map_mb=1024,
            snapshot_url=str(self._folder / "snapshots"),
            snapshot_every_s=5.0,
        )

    def _start(self, name: str, **given: Any) -> Child:
        settings = self._settings.model_copy(update=given)
        command = process(name, settings)
        label = f"{name}-{given['worker_instance']}" if given else name
        return self._supervisor.start(type(command)(label, command.argv, command.env, ready_within_s=300))

    def run(self, kills: int, outage_s: float) -> ChaosReport:
        """All faults in a random order, then the comparison."""
        special: dict[str, Callable[[], None]] = {
            "a frozen worker": self._freeze,
            "a rebalance while restoring": self._rebalance_while_restoring,
            "a full disk": self._fill_disk,
            f"{outage_s:.0f} s without brokers": lambda: self._outage(outage_s),
        }
        if self._disk is None:
            del special["a full disk"]
            self.report.not_exercised.append("a full disk: mounting a small file system needs root")
        plain = {"worker": self._kill_worker, "reader": self._kill_reader, "broker": self._kill_broker}
        plan = [name for name in special for _ in range(max(1, kills // 50))]
        plan += list(self._random.choice(list(plain), max(0, kills - 2 * max(1, kills // 50)), p=[0.6, 0.1, 0.3]))
        self._random.shuffle(plan)
        kinds: Counter[str] = Counter()
        with Progress(console=self._console, transient=True) as progress:
            task = progress.add_task("chaos", total=len(plan))
            self._probe("start")
            for name in plan:
                progress.update(task, description=name)
                if name in special:
                    special[name]()
                    kinds[name] += 1
                else:
                    plain[name]()
                    self._probe(f"a killed {name}")
                progress.advance(task)
            while sum(self.report.kills.values()) < kills:
                self._kill_worker()
                self._probe("a killed worker")
        self.report.other_faults = dict(kinds)
        self._load.stop()
        self._compare()
        return self.report

    # Faults.

    def _kill(self, child: Child, kind: str) -> None:
        _await_process(child)  # it may be being restarted, from an earlier fault
        child.kill()
        self.report.kills[kind] = self.report.kills.get(kind, 0) + 1

    def _kill_worker(self) -> None:
        self._kill(self._workers[str(self._random.choice(WORKERS))], "worker")

    def _kill_reader(self) -> None:
        self._kill(self._reader, "reader")
        _await_ready(self._reader)

    def _kill_broker(self) -> None:
        """The leader of a partition: with three brokers, each leads some."""
        broker = self._brokers[int(self._random.integers(len(self._brokers)))]
        self._kill(broker, "broker")
        _await_ready(broker)

    def _freeze(self) -> None:
        """Longer than its session: the other worker takes over meanwhile, and the frozen one comes back into its half-done batch."""
        child = self._workers[str(self._random.choice(WORKERS))]
        _await_ready(child)
        pid = child.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            self._probe("a frozen worker")
        finally:
            os.kill(pid, signal.SIGCONT)
        self._probe("a frozen worker that is back")

    def _rebalance_while_restoring(self) -> None:
        """A worker has lost its state and restores it from snapshots and the log; the other one dies meanwhile."""
        restoring, other = self._workers["a"], self._workers["b"]
        self._kill(restoring, "worker")
        for number in range(PARTITIONS):
            shutil.rmtree(self._home / "state" / "a" / str(number), ignore_errors=True)
        _await_process(restoring)
        time.sleep(float(self._random.uniform(0.5, 3.0)))  # somewhere between its start and its being ready
        self._kill(other, "worker")
        self._probe("a rebalance while restoring")

    def _fill_disk(self) -> None:
        """The state's disk is full until its worker gives up; then there is room again, and it must go on by itself."""
        assert self._disk is not None
        child = self._workers["b"]
        _await_ready(child)
        restarts = child.statistics()["restarts"]
        filler = self._disk / "filler"
        free_bytes = shutil.disk_usage(self._disk).free
        with filler.open("wb") as file, contextlib.suppress(OSError):
            file.write(b"\x00" * free_bytes)
        deadline_s = time.monotonic() + 120
        while child.statistics()["restarts"] == restarts and time.monotonic() < deadline_s:
            time.sleep(0.1)
        if child.statistics()["restarts"] == restarts:
            self.report.not_exercised.append("a full disk: the worker did not notice within 120 s")
        filler.unlink()
        self._probe("a full disk")

    def _outage(self, outage_s: float) -> None:
        for broker in self._brokers:
            broker.stop()
        time.sleep(outage_s)  # the fault itself: nothing to wait for
        for broker in self._brokers:
            broker.start()
        for broker in self._brokers:
            _await_ready(broker)
        self._probe("an outage of all brokers")

    # What must hold.

    def _probe(self, fault: str) -> None:
        """Seconds from now until an action of every partition that is produced now can be read."""
        started_s, missing, waiting = time.monotonic(), set(range(PARTITIONS)), []
        while missing:
            user_id, event_id, future = self._load.produce()
            try:
                position = future.result(timeout=FRESH_WITHIN_S)
            except TimeoutError:
                raise RuntimeError(f"seed {self.report.seed}: an action is not acknowledged {FRESH_WITHIN_S:.0f} s after {fault}") from None
            missing.discard(position.partition)
            waiting.append((user_id, event_id))
        while waiting:
            user_id, event_id = waiting[-1]
            if self._sees(user_id, event_id):
                waiting.pop()
            elif time.monotonic() - started_s > FRESH_WITHIN_S:
                raise RuntimeError(f"seed {self.report.seed}: not fresh {FRESH_WITHIN_S:.0f} s after {fault}: {self._view.positions()}")
            else:
                time.sleep(0.005)
        if fault != "start":
            self.report.fresh_again_s.setdefault(fault, []).append(round(time.monotonic() - started_s, 3))

    def _sees(self, user_id: int, event_id: int) -> bool:
        try:
            (reading,) = self._view.read("main", [user_id])
        except SequenceUnavailableError:
            return False
        return bool(reading.row) and event_id in decode_row(reading.row, user_id).events["event_id"].tolist()

    def _watch_watermarks(self) -> None:
        """Readers never go back while owners change."""
        highest = dict.fromkeys(range(PARTITIONS), -1)
        while not self._watching.wait(0.01):
            for position in self._view.positions():
                self.report.watermarks_back += position.offset < highest[position.partition]
                highest[position.partition] = max(highest[position.partition], position.offset)

    def _stop_watching(self) -> None:
        self._watching.set()
        self._watcher.join()

    def _compare(self) -> None:
        self._producer.flush(FRESH_WITHIN_S)
        ends = end_offsets(kafka_config(self._settings), self._settings.topic_actions, range(PARTITIONS))
        deadline_s = time.monotonic() + FRESH_WITHIN_S
        while {at.partition: at.offset + 1 for at in self._view.positions()} != ends:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"seed {self.report.seed}: the view did not reach the log's end {ends}: {self._view.positions()}")
            time.sleep(0.05)
        report, what = self.report, definition(self.domain, "main")
        report.acknowledged, report.refused = len(self._load.acknowledged), self._load.refused
        in_log: dict[tuple[int, int], int] = {}
        for batch in self._read_log(ends):
            ids = batch.events["event_id"].tolist()
            in_log |= {(batch.partition, offset): ids[i] for i, offset in enumerate(batch.offsets.tolist()) if batch.verdict[i] != REJECTED}
            for user_id, naive in naive_fold([batch]).items():
                (reading,) = self._view.read("main", [user_id])
                events = decode_row(reading.row, user_id).events
                report.users_compared += 1
                report.different += events.tobytes() != naive.sequence(what).tobytes()
                report.counted_twice += len(events) - len(np.unique(events["event_id"]))
        report.lost = sum(in_log.get(place) != event_id for place, event_id in self._load.acknowledged.items())

    def _read_log(self, ends: dict[int, int]) -> Iterator[Batch]:
        kafka, topic = kafka_config(self._settings), self._settings.topic_actions
        identity = log_identity(kafka, topic)
        for partition, end in ends.items():
            consumer = new_reader(kafka, "chaos")
            consumer.assign([TopicPartition(topic, partition, 0)])
            messages: list[Any] = []
            while not messages or messages[-1].offset() + 1 < end:
                messages += [message for message in consumer.consume(10_000, 0.5) if message.error() is None]
            consumer.close()
            records = records_of([message for message in messages if message.offset() < end])
            yield decode_batch(
                log_epoch=identity.epoch,
                partition=partition,
                offsets=records.offsets,
                keys=records.keys,
                values=records.values,
                append_times_ms=records.broker_times_ms,
                future_tolerance_ms=self.domain.future_tolerance_ms,
                partition_count=PARTITIONS,
                encodings=self.domain.encodings,
            )


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A small file system mounted at `folder`; None where that is not allowed."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "freshrank-chaos", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _await_process(child: Child) -> None:
    """Until a child that its supervisor may be restarting has a process."""
    deadline_s = time.monotonic() + FRESH_WITHIN_S
    while child.pid is None:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{child.command.name}: not started again within {FRESH_WITHIN_S:.0f} s: see {child.log_path}")
        time.sleep(0.01)


def _await_ready(child: Child) -> None:
    """Until a child serves that its supervisor may be restarting, several times if it must."""
    deadline_s = time.monotonic() + FRESH_WITHIN_S
    while not child.statistics()["ready"]:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{child.command.name}: not ready within {FRESH_WITHIN_S:.0f} s: see {child.log_path}")
        time.sleep(0.05)

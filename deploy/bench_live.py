"""What the benchmarks of a running worker share: broker, worker with a filled state, reader service, and an open-loop producer.

Everything that works has a process of its own, so that nothing that is measured shares an interpreter with what makes the load. Clocks are
CLOCK_MONOTONIC, which all processes of a machine share: what is due when is agreed on beforehand.
"""

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console

from deploy.bench_ingest import DOMAIN, BenchError, make_load
from deploy.kafka_server import KafkaServer
from deploy.scheduling import set_slice
from deploy.settings import load_settings
from features.actions import encode_events
from features.domain import Domain, parse_domain
from features.ids import user_key
from streams.batch_loop import WorkerConfig
from streams.kafka import KafkaConfig, Topics, end_offsets, ensure_topics, new_producer
from streams.producer import LINGER_MS, ActionProducer
from streams.reader_service import ReaderConfig, run_reader
from streams.view_reader import ViewReader
from streams.worker import run_worker

PARTITIONS, USERS, HISTORY = 4, 50_000, 1_000_000
"""The load of `bench ingest`: users by Zipf, sequences of 100. HISTORY: events that the state holds when the measurement begins."""
EVENTS_PER_S = 5_000
HALF_LOAD_EVENTS_PER_S = 125_000
"""Half of what a worker folds on the 2 cores that the bars are for (`bench ingest`, events_per_s)."""
WARM_UP_S = 20.0
"""A broker that has just started spends a third of a core on compiling itself for about this long."""
TICK_S = 0.002
"""The producer sends what is due this often."""

_LATE_S_MAX = 1.0
_START_DELAY_S = 5.0  # for a process that follows the load, and computes it first
_CATCH_UP_TIMEOUT_S = 180.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Load:
    """One open-loop load: what is due within a tick is sent together at the tick's begin, which counts from begin_s (CLOCK_MONOTONIC)."""

    events_per_s: int
    seconds: float
    seed: int
    begin_s: float

    @property
    def count(self) -> int:
        """Events in all."""
        return int(self.events_per_s * self.seconds)

    def due_s(self, i: int) -> float:
        """When event i is to be handed to the producer."""
        return self.begin_s + i // self.per_tick * self.per_tick / self.events_per_s

    @property
    def per_tick(self) -> int:
        """Events that are sent together."""
        return max(1, round(self.events_per_s * TICK_S))

    def events(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.void]]:
        """Users uint64 [n] and their events EVENT_DTYPE [n]: the same in every process, but for the event times."""
        users, events = make_load(self.count, USERS, 1)
        random = np.random.default_rng(self.seed)
        events["event_id"] = random.integers(0, 2**64, self.count, np.uint64)
        events["event_time_ms"] = time.time_ns() // 1_000_000 + np.arange(self.count) * 1000 // self.events_per_s
        return random.permutation(users), events


@dataclass
class Live:
    """A broker with a topic, a worker that has folded HISTORY events, and a reader service."""

    kafka: KafkaConfig
    topics: Topics
    worker: WorkerConfig
    reader_address: str
    pool: ProcessPoolExecutor
    seed: int = 1

    @property
    def domain(self) -> Domain:
        """The domain of the benchmarks."""
        return self.worker.domain

    def load(self, events_per_s: int, seconds: float) -> Load:
        """The next load; it begins when its producer has been told."""
        self.seed += 1
        return Load(events_per_s, seconds, self.seed, 0.0)

    @contextlib.contextmanager
    def producing(self, load: Load) -> Iterator[Load]:
        """Produces a load in another process; gives it with its begin. Leaves when everything was sent and folded.

        Raises:
            BenchError: the producer or the worker did not keep up, so that the load was not what the figures say.
        """
        ready: Queue[float] = multiprocessing.get_context("spawn").Queue()
        ends = sum(end_offsets(self.kafka, self.topics.actions, range(PARTITIONS)).values())
        process = start(_produce, self.kafka, self.topics.actions, load, ready)
        try:
            begun = Load(load.events_per_s, load.seconds, load.seed, _get(ready, process))
            yield begun
            late_s = _get(ready, process)
        finally:
            stop(process)
        self.wait_applied(ends + load.count)
        if late_s > _LATE_S_MAX:
            raise BenchError(f"the producer was {late_s:.1f} s late at {load.events_per_s} events/s: this machine cannot make the load")

    def wait_applied(self, count: int) -> None:
        """Returns when readers see the state of `count` records of the topic."""
        wait_applied(self.worker, count)

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs a function of a module in the measuring process."""
        found: Future[Result] = self.pool.submit(function, *arguments)
        return found.result()


@contextlib.contextmanager
def live(folder: Path, console: Console, **given: Any) -> Iterator[Live]:
    """Starts everything in `folder` and stops it at the end. `given`: fields of the worker's configuration."""
    console.print(f"starts a broker and a worker of {PARTITIONS} partitions, and folds {HISTORY:,} events of {USERS:,} users")
    domain = parse_domain(DOMAIN, source="bench domain")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(KafkaServer(folder / "kafka"))
        kafka, topics = KafkaConfig(server.bootstrap), Topics()
        ensure_topics(kafka, topics, partition_count=PARTITIONS)
        config = WorkerConfig(kafka, topics, domain, folder / "state", folder / "view", log_level="WARNING", **given)
        stack.callback(stop, start(work, config))
        producer = ActionProducer(kafka, domain, topics.actions, timeout_s=60.0)
        producer.produce_many(*make_load(HISTORY, USERS, 1))
        producer.close()
        wait_applied(config, HISTORY)
        ready: Queue[str] = multiprocessing.get_context("spawn").Queue()
        reader = start(_serve, ReaderConfig(domain, config.view_folder, PARTITIONS, log_level="WARNING"), ready)
        stack.callback(stop, reader)
        address = _get(ready, reader)
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_measure))
        world = Live(kafka, topics, config, address, pool)
        console.print(f"lets the broker's compiler come to rest: {WARM_UP_S:.0f} s of {EVENTS_PER_S} events/s")
        with world.producing(world.load(EVENTS_PER_S, WARM_UP_S)):
            pass
        yield world


def wait_applied(config: WorkerConfig, count: int) -> None:
    """Returns when readers see the state of `count` records in all. Raises BenchError: not in time."""
    reader = ViewReader(config.view_folder, config.domain, PARTITIONS)
    deadline_s = time.monotonic() + _CATCH_UP_TIMEOUT_S
    try:
        while (applied := sum(position.offset + 1 for position in reader.positions())) < count:
            if time.monotonic() > deadline_s:
                raise BenchError(f"the worker has folded {applied} of {count} records in {_CATCH_UP_TIMEOUT_S:.0f} s: see its output")
            time.sleep(0.05)
    finally:
        reader.close()


def quiet_process() -> None:
    """No collection of cyclic garbage in a process that measures or makes a load."""
    gc.collect()
    gc.freeze()
    gc.disable()


def sleep_until(due_s: float) -> None:
    """Waits for a moment of CLOCK_MONOTONIC; returns at once where it is past."""
    left_s = due_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of its own for a function of a module."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


def stop(process: BaseProcess) -> None:
    """SIGTERM, wait, SIGKILL if needed."""
    process.terminate()
    process.join(30)
    if process.is_alive():
        process.kill()
        process.join()


def _get(queue: "Queue[Any]", process: BaseProcess) -> Any:
    while True:
        try:
            return queue.get(timeout=0.5)
        except Empty:
            if not process.is_alive():
                raise BenchError(f"process {process.name} ended with {process.exitcode}: see its output") from None


def work(config: WorkerConfig) -> None:
    """A worker, in a process of its own."""
    raise SystemExit(run_worker(config))


def _serve(config: ReaderConfig, ready: "Queue[str]") -> None:
    set_slice(load_settings().serving_slice_ms)
    raise SystemExit(run_reader(config, lambda details: ready.put(details["address"])))


def _measure() -> None:
    """A process that reads as the ranking server does."""
    quiet_process()
    set_slice(load_settings().serving_slice_ms)


def _produce(kafka: KafkaConfig, topic: str, load: Load, ready: "Queue[float]") -> None:
    """Sends a load; puts its begin, and at the end by how much the last tick was late.

    Everything is encoded before the begin, so that making the load costs the machine as little as it can.
    """
    users, events = load.events()
    values, keys = encode_events(users, events), {user: user_key(user) for user in set(users.tolist())}
    records = [(value, keys[user]) for value, user in zip(values, users.tolist(), strict=True)]
    producer = new_producer(kafka, "bench", linger_ms=LINGER_MS, queue_buffering_max_messages=1_000_000)
    producer.list_topics(topic, timeout=10)
    quiet_process()
    begin_s = time.monotonic() + _START_DELAY_S
    ready.put(begin_s)
    begun = Load(load.events_per_s, load.seconds, load.seed, begin_s)
    late_s = 0.0
    for first in range(0, load.count, load.per_tick):
        due_s = begun.due_s(first)
        sleep_until(due_s)
        late_s = time.monotonic() - due_s
        for value, key in records[first : first + load.per_tick]:
            producer.produce(topic, value, key)
        producer.poll(0)
    producer.flush(60)
    ready.put(late_s)

"""What tests of streams share: a topic set of their own, a worker in a process of its own, and the log read back for the oracle."""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import faust
import numpy as np

from features.actions import EVENT_DTYPE, Batch, append_time_ms, decode_batch
from features.domain import Domain, parse_domain
from features.oracle import naive_fold
from features.sequence import decode_row, definition
from streams.batch_loop import WorkerConfig
from streams.kafka import KafkaConfig, LogIdentity, TopicPartition, Topics, end_offsets, ensure_topics, new_reader
from streams.view_reader import ViewReader
from streams.worker import run_worker

DEADLINE_S = 60.0

DOMAIN_TOML = """
name = "test"
[entities]
item = 1
product = 2
[surfaces]
home = 3
[actions.view]
id = 1
kind = "impression"
[actions.click]
id = 2
kind = "positive"
[sequence.main]
id = 1
length = 20
[sequence.few_views]
id = 2
length = 10
caps = { view = 3 }
[ranker.home]
sequence = "main"
sequence_length = 20
item_space = "items"
[ranker.home.heads.click]
actions = ["click"]
"""
DOMAIN = parse_domain(DOMAIN_TOML, source="test")


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = DEADLINE_S) -> Any:
    """The first true value of `condition`; fails after the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


@dataclass
class World:
    """Topics of one test, and the worker's configuration for them."""

    kafka: KafkaConfig
    topics: Topics
    identity: LogIdentity
    config: WorkerConfig

    @property
    def domain(self) -> Domain:
        return self.config.domain

    def reader(self) -> ViewReader:
        return ViewReader(self.config.view_folder, self.domain, self.identity.partition_count)

    def ends(self) -> dict[int, int]:
        return end_offsets(self.kafka, self.topics.actions, range(self.identity.partition_count))

    def wait_applied(self, reader: ViewReader) -> None:
        """Until the view includes everything that the topic has now."""
        ends = self.ends()
        eventually(lambda: {p.partition: p.offset + 1 for p in reader.positions()} == ends, f"view at {ends}, is at {reader.positions()}")


def new_world(kafka: KafkaConfig | str, folder: Path, name: str, partition_count: int = 3) -> World:
    kafka = KafkaConfig(kafka) if isinstance(kafka, str) else kafka
    topics = Topics(*(f"{name}-{kind}" for kind in ("actions", "dead-letters", "rankings", "announcements", "rates")))
    identity = ensure_topics(kafka, topics, partition_count=partition_count)
    config = WorkerConfig(
        kafka, topics, DOMAIN, folder / "state", folder / "view", group=name, cache_bytes=8 << 20, write_buffer_bytes=8 << 20
    )
    return World(kafka, topics, identity, config)


@dataclass
class Worker:
    """A worker process. `ready` has what `on_ready` was called with, once it was."""

    process: BaseProcess
    connection: Connection

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ready(self) -> dict[str, Any]:
        assert self.connection.poll(DEADLINE_S), "the worker is not ready in time"
        return self.connection.recv()

    def wait(self) -> int:
        self.process.join(DEADLINE_S)
        assert self.process.exitcode is not None, "the worker does not end"
        return self.process.exitcode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL


@contextmanager
def worker(
    config: WorkerConfig,
    *,
    die_at: tuple[str, int] | None = None,
    slow_at: tuple[str, float] | None = None,
    faust_hangs: bool = False,
) -> Iterator[Worker]:
    """A worker in a process of its own; `die_at` ("stored", 2): it kills itself when a batch reaches that step for the second time;
    `slow_at` ("decoded", 0.1): each batch takes so many seconds longer from there to the next step, as on a slow disk;
    `faust_hangs`: Faust's app never comes to its end, as where the coordinator of its group is gone.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(config, child, die_at, slow_at, faust_hangs))
    process.start()
    child.close()
    found = Worker(process, parent)
    try:
        yield found
    finally:
        if process.is_alive():
            process.terminate()
            process.join(30)
        if process.is_alive():
            process.kill()
            process.join()
        parent.close()


def _work(
    config: WorkerConfig, connection: Connection, die_at: tuple[str, int] | None, slow_at: tuple[str, float] | None, faust_hangs: bool
) -> None:
    reached = dict.fromkeys(("decoded", "stored", "viewed"), 0)

    def at(step: str) -> None:
        reached[step] += 1
        if die_at == (step, reached[step]):
            os.kill(os.getpid(), signal.SIGKILL)
        if slow_at and step == slow_at[0]:
            time.sleep(slow_at[1])

    if faust_hangs:

        async def stop(_: faust.App) -> None:
            await asyncio.Event().wait()

        faust.App.stop = stop
    raise SystemExit(run_worker(config, connection.send, at=at))


def random_load(count: int, user_count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Users and events with ties in time, doubled events and actions that the domain does not know."""
    random = np.random.default_rng(seed)
    users = random.integers(1, user_count + 1, count).astype(np.uint64)
    events = np.zeros(count, EVENT_DTYPE)
    events["event_time_ms"] = 1_000_000 + np.arange(count) // 7 * 10 - 5_000 * (random.random(count) < 0.1)
    events["event_id"], events["entity_id"] = random.integers(0, 2**63, count), random.integers(0, 2**63, count)
    events["entity_kind"], events["action"] = random.integers(1, 3, count), random.choice([1, 1, 2, 200], count)
    events["value"] = np.where(random.random(count) < 0.5, np.nan, random.random(count))
    doubled = np.flatnonzero(random.random(count) < 0.05)
    events[doubled], users[doubled] = events[doubled // 2], users[doubled // 2]
    return users, events


def read_topic(kafka: KafkaConfig, topic: str, ends: dict[int, int]) -> dict[int, list[Any]]:
    """All messages by partition, up to the given end offsets."""
    consumer = new_reader(kafka, "test")
    found: dict[int, list[Any]] = {partition: [] for partition in ends}
    try:
        consumer.assign([TopicPartition(topic, partition, 0) for partition, end in ends.items() if end])
        deadline_s = time.monotonic() + DEADLINE_S
        while any(not messages or messages[-1].offset() + 1 < ends[p] for p, messages in found.items() if ends[p]):
            assert time.monotonic() < deadline_s, f"topic {topic}: not read to {ends}"
            for message in consumer.consume(10_000, 0.2):
                assert message.error() is None
                found[message.partition()].append(message)
    finally:
        consumer.close()
    return found


def read_log(world: World) -> list[Batch]:
    """The actions topic, decoded."""
    found = []
    for partition, messages in read_topic(world.kafka, world.topics.actions, world.ends()).items():
        stamps = [append_time_ms(message.timestamp()[1], message.headers()) for message in messages]
        found.append(
            decode_batch(
                log_epoch=world.identity.epoch,
                partition=partition,
                offsets=np.array([message.offset() for message in messages], np.int64),
                keys=[message.key() for message in messages],
                values=[message.value() for message in messages],
                append_times_ms=np.array(stamps, np.int64),
                future_tolerance_ms=world.domain.future_tolerance_ms,
                partition_count=world.identity.partition_count,
                encodings=world.domain.encodings,
            )
        )
    return found


def check_fold(world: World, reader: ViewReader) -> int:
    """Every user's sequences are the naive fold of the log; returns how many users were compared."""
    world.wait_applied(reader)
    compared = 0
    for batch in read_log(world):
        for user_id, naive in naive_fold([batch]).items():
            for name in world.domain.sequence:
                (reading,) = reader.read(name, [user_id])
                assert decode_row(reading.row, user_id).events.tobytes() == naive.sequence(definition(world.domain, name)).tobytes(), (
                    user_id
                )
            compared += 1
    return compared


def other_topic(world: World, **names: str) -> WorkerConfig:
    """The worker's configuration with other topic names."""
    return replace(world.config, topics=replace(world.topics, **names))

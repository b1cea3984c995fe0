"""What the worker holds in memory has a limit: a slow disk and a broker that does not answer leave the rest in the log."""

import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
from streams_world import World, check_fold, end_offsets, eventually, new_world, read_topic, worker

from deploy.kafka_server import KafkaServer
from features.actions import encode_action
from features.ids import user_key
from protos.v1.actions_pb2 import Action
from streams.kafka import new_producer
from streams.view_reader import ViewReader

pytestmark = pytest.mark.servers

QUEUE_BYTES = 8 << 20
RECORDS, RECORD_BYTES, USERS = 20_000, 8 << 10, 200
GROWTH_BYTES_MAX = 12 * QUEUE_BYTES
"""The log has twenty times the queue. Held at once: the queue and one answer of the broker, as much again as a batch, that batch as dead
letters, the queue of dead letters, and 16 MB of RocksDB; 9 times the queue, and what malloc keeps."""


def fill(world: World, make: Callable[[int], bytes]) -> None:
    """Produces RECORDS records of about RECORD_BYTES each."""
    producer = new_producer(world.kafka, "test", linger_ms=20)
    for n in range(RECORDS):
        producer.produce(world.topics.actions, make(n), user_key(n % USERS))
        producer.poll(0)
    assert producer.flush(30) == 0


def large_action(n: int) -> bytes:
    canonical = encode_action(user_id=n % USERS, entity_kind=1, entity_id=n, action=2, event_time_ms=1_000 + n, event_id=n)
    return canonical + Action(attributes=[{"name": "note", "value": "x" * RECORD_BYTES}]).SerializeToString()


class Growth:
    """How much a process has grown at most since this was made, as far as `look` saw it."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self.most = self._process.memory_info().rss

    def look(self) -> int:
        self.most = max(self.most, self._process.memory_info().rss)
        return self.most - self._before


def is_live(address: str) -> bool:
    try:
        return urllib.request.urlopen(address.replace("/health/", "/live/"), timeout=10).status == 200
    except urllib.error.HTTPError:
        return False


def has_caught_up(growth: Growth, reader: ViewReader, ends: dict[int, int]) -> bool:
    assert growth.look() < GROWTH_BYTES_MAX
    return {at.partition: at.offset + 1 for at in reader.positions()} == ends


def buried(world: World) -> int:
    return end_offsets(world.kafka, world.topics.dead_letters, [0])[0]


def test_a_slow_disk_leaves_the_backlog_in_the_log(kafka, tmp_path):
    world = new_world(kafka.bootstrap, tmp_path, "slow-disk")
    config = replace(world.config, queue_bytes_max=QUEUE_BYTES, batch_events_max=400)
    with worker(config, slow_at=("decoded", 0.1)) as running:
        running.ready()
        growth, reader = Growth(running.pid), world.reader()
        fill(world, large_action)
        ends = world.ends()
        assert not has_caught_up(growth, reader, ends), "it is slower than the producer, or this shows nothing"
        eventually(lambda: has_caught_up(growth, reader, ends), "the state at the log's end")
        print(f"grew by {growth.look() >> 20} MB")
        assert check_fold(world, reader) == USERS
        reader.close()


def test_a_broker_that_takes_no_dead_letters_stops_the_worker_at_its_place(tmp_path):
    with KafkaServer(tmp_path / "kafka") as server:
        world = new_world(server.bootstrap, tmp_path, "dead-broker", partition_count=1)
        config = replace(world.config, queue_bytes_max=QUEUE_BYTES, stalled_s=1.0)
        with worker(config, slow_at=("decoded", 0.2)) as running:
            address = running.ready()["health"]
            growth, reader = Growth(running.pid), world.reader()
            fill(world, lambda _: b"\xff" * RECORD_BYTES)
            last = new_producer(world.kafka, "test")
            last.produce(world.topics.actions, large_action(7), user_key(7))
            assert last.flush(30) == 0
            eventually(lambda: buried(world) > 0, "the first dead letter")
            os.kill(server.pid, signal.SIGSTOP)
            try:
                eventually(lambda: growth.look() and not is_live(address), "the worker waits for the broker")
            finally:
                os.kill(server.pid, signal.SIGCONT)
            ends = world.ends()
            assert not has_caught_up(growth, reader, ends), "there was nothing left to bury"
            eventually(lambda: has_caught_up(growth, reader, ends), "the state at the log's end")
            print(f"grew by {growth.look() >> 20} MB")
            eventually(lambda: is_live(address), "live again")
            assert check_fold(world, reader) == 1
            reader.close()
        (letters,) = read_topic(world.kafka, world.topics.dead_letters, {0: buried(world)}).values()
        assert {message.key() for message in letters} == {f"{world.topics.actions}:0:{offset}".encode() for offset in range(RECORDS)}

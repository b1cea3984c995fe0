"""What the worker holds in memory has a limit: a slow disk and a broker that does not answer leave the rest in the log."""

import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
from streams_world import World, check_fold, end_offsets, eventually, new_world, read_topic, worker

from deploy.kafka_server import KafkaServer
from features.actions import encode_action
from features.ids import user_key
from protos.v1.actions_pb2 import Action
from streams.kafka import new_producer

pytestmark = pytest.mark.servers

QUEUE_BYTES = 8 << 20
RECORDS, RECORD_BYTES, USERS = 20_000, 8 << 10, 200
GROWTH_BYTES_MAX = 64 << 20
"""Two queues, one answer of the broker, a batch with its dead letters, 16 MB of RocksDB, and what malloc keeps; the log has 160 MB."""


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


def resident_bytes(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


@contextmanager
def growth_of(pid: int) -> Iterator[Callable[[], int]]:
    """How much the process has grown at most since here, as seen by the calls: each looks once."""
    before = most = resident_bytes(pid)

    def look() -> int:
        nonlocal most
        most = max(most, resident_bytes(pid))
        return most - before

    yield look


def is_live(address: str) -> bool:
    try:
        return urllib.request.urlopen(address.replace("/health/", "/live/"), timeout=10).status == 200
    except urllib.error.HTTPError as error:
        assert error.code == 503
        return False


def test_a_slow_disk_leaves_the_backlog_in_the_log(kafka, tmp_path):
    world = new_world(kafka.bootstrap, tmp_path, "slow-disk")
    config = replace(world.config, queue_bytes_max=QUEUE_BYTES, batch_events_max=400)
    with worker(config, slow_at=("decoded", 0.1)) as running, growth_of(running.pid) as _:
        running.ready()
        with growth_of(running.pid) as growth:
            fill(world, large_action)
            reader, ends = world.reader(), world.ends()
            assert sum(ends.values()) == RECORDS

            def has_caught_up() -> bool:
                assert growth() < GROWTH_BYTES_MAX
                return {at.partition: at.offset + 1 for at in reader.positions()} == ends

            assert not has_caught_up(), "it is slower than the producer, or this shows nothing"
            eventually(has_caught_up, "the state at the log's end")
        print(f"grew by {growth() >> 20} MB")
        assert check_fold(world, reader) == USERS
        reader.close()


def test_a_broker_that_takes_no_dead_letters_stops_the_worker_at_its_place(tmp_path):
    with KafkaServer(tmp_path / "kafka") as server:
        world = new_world(server.bootstrap, tmp_path, "dead-broker", partition_count=1)
        config = replace(world.config, queue_bytes_max=QUEUE_BYTES, stalled_s=1.0)
        with worker(config, slow_at=("decoded", 0.2)) as running:
            address = running.ready()["health"]
            with growth_of(running.pid) as growth:
                fill(world, lambda n: b"\xff" * RECORD_BYTES)
                last = new_producer(world.kafka, "test")
                last.produce(world.topics.actions, large_action(7), user_key(7))
                assert last.flush(30) == 0
                eventually(lambda: buried(world) > 0, "the first dead letter")
                os.kill(server.pid, signal.SIGSTOP)
                try:
                    eventually(lambda: growth() and not is_live(address), "the worker waits for the broker")
                finally:
                    os.kill(server.pid, signal.SIGCONT)
                reader, ends = world.reader(), world.ends()

                def has_caught_up() -> bool:
                    assert growth() < GROWTH_BYTES_MAX
                    return {at.partition: at.offset + 1 for at in reader.positions()} == ends

                assert not has_caught_up(), "there was nothing left to bury"
                eventually(has_caught_up, "the state at the log's end")
            print(f"grew by {growth() >> 20} MB")
            assert eventually(lambda: is_live(address), "live again")
            assert check_fold(world, reader) == 1
            reader.close()
            (letters,) = read_topic(world.kafka, world.topics.dead_letters, {0: buried(world)}).values()
            places = {message.key() for message in letters}
            assert places == {f"{world.topics.actions}:0:{offset}".encode() for offset in range(RECORDS)}


def buried(world: World) -> int:
    return end_offsets(world.kafka, world.topics.dead_letters, [0])[0]

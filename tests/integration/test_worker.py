"""The worker on a real broker: the fold, dead letters, erasure, crashes, refusals."""

import asyncio
import json
import multiprocessing
import signal
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from streams_world import DOMAIN, World, check_fold, end_offsets, eventually, new_world, other_topic, random_load, read_topic, worker

import streams.worker
from features.actions import APPEND_TIME_HEADER, EVENT_DTYPE, encode_action, encode_events
from features.ids import partition_of, user_key
from features.sequence import decode_row
from protos.v1.actions_pb2 import DeadLetter
from streams.kafka import KafkaConfig, new_producer
from streams.producer import ActionProducer
from streams.state import definitions
from streams.store import RocksStore
from streams.view import PartitionView

pytestmark = pytest.mark.servers


@pytest.fixture
def world(kafka, tmp_path, request) -> World:
    return new_world(kafka.bootstrap, tmp_path, request.node.name.translate(str.maketrans("[] ,", "----")).strip("-"))


@pytest.fixture
def producer(world):
    found = ActionProducer(world.kafka, world.domain, world.topics.actions)
    yield found
    found.close()


def action(user_id: int, time_ms: int, **other) -> bytes:
    return encode_action(
        **{"user_id": user_id, "entity_kind": 1, "entity_id": 7, "action": 2, "event_time_ms": time_ms, "event_id": time_ms, **other}
    )


def health(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


def test_state_is_the_naive_fold_of_the_topic(world, producer):
    users, events = random_load(5_000, 60, seed=1)
    producer.produce_many(users[:3_000], events[:3_000])
    producer.flush()
    with worker(world.config) as running:
        address = running.ready()["health"]
        for user_id in (1, 2, 3):
            producer.erase(user_id, "asked for")
        producer.produce_many(users[3_000:], events[3_000:])
        producer.flush()
        reader = world.reader()
        assert check_fold(world, reader) == 60
        report = health(address)
        assert report["healthy"]
        assert report["statistics"]["events"] == 5_003
        assert {n: p["applied_offset"] + 1 for n, p in report["partitions"].items()} == {str(n): end for n, end in world.ends().items()}
        reader.close()
        started_s = time.monotonic()
        running.process.terminate()
        assert running.wait() == 0
        assert time.monotonic() - started_s < 10


def test_undecodable_records_are_dead_letters_and_stop_nothing(world, producer):
    now_ms = time.time_ns() // 1_000_000
    good = action(42, now_ms)
    partition = partition_of(user_key(42), 3)
    header = [(APPEND_TIME_HEADER, b"yesterday")]
    bad = [
        ("key", b"42", good, None),
        ("value", user_key(42), b"garbage", None),
        ("value", user_key(42), None, None),
        ("event_time_ms", user_key(42), action(42, now_ms + 3_600_000), None),
        ("header", user_key(42), good, header),
    ]
    raw = new_producer(world.kafka, "test")
    raw.produce(world.topics.actions, good, user_key(42), partition=(partition + 1) % 3)  # a client with another partitioner
    for _, key, value, headers in bad:
        raw.produce(world.topics.actions, value, key, partition=partition, headers=headers)
    raw.flush()
    with worker(world.config) as running:
        address = running.ready()["health"]
        last = producer.produce(user_id=42, entity_kind="item", entity_id=9, action="click").result()
        reader = world.reader()
        eventually(lambda: reader.position(42) == last, "the good record behind the bad ones")
        (reading,) = reader.read("main", [42])
        assert decode_row(reading.row).events["entity_id"].tolist() == [9]
        reader.close()
        counts = {"key": 1, "value": 2, "event_time_ms": 1, "header freshrank-append-time-ms": 1, "partition": 1}
        eventually(lambda: health(address)["dead_letters"] == counts, "the agent's counts")
    (letters,) = read_topic(world.kafka, world.topics.dead_letters, end_offsets(world.kafka, world.topics.dead_letters, [0])).values()
    found = {message.key().decode(): DeadLetter.FromString(message.value()) for message in letters}
    assert len(found) == 6
    for offset, (kind, key, value, _) in enumerate(bad):
        letter = found[f"{world.topics.actions}:{partition}:{offset}"]
        assert letter.reason.startswith(kind)
        assert (letter.source_topic, letter.source_partition, letter.source_offset) == (world.topics.actions, partition, offset)
        assert (letter.key, letter.value) == (key, value or b"")
    moved = found[f"{world.topics.actions}:{(partition + 1) % 3}:0"]
    assert moved.reason.startswith("partition:")
    assert moved.append_time_ms >= now_ms


def test_dead_letters_that_cannot_be_stored_stop_the_worker_before_it_passes_the_record(world, producer):
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient({"bootstrap.servers": world.kafka.bootstrap})
    tiny = f"{world.topics.dead_letters}-tiny"
    admin.create_topics([NewTopic(tiny, 1, 1, config={"max.message.bytes": "100"})])[tiny].result()
    position = producer.produce(user_id=42, entity_kind="item", entity_id=9, action="click").result()
    raw = new_producer(world.kafka, "test")
    raw.produce(world.topics.actions, b"garbage" * 100, user_key(42))
    raw.flush()
    config = other_topic(world, dead_letters=tiny)
    with worker(config) as running:
        assert running.wait() == 1
    held = RocksStore(config.state_folder, definitions(DOMAIN)).open(position.partition, world.identity.epoch)
    assert held.meta.applied_offset <= position.offset
    held.close()


def test_an_erased_user_is_gone_for_good(world, producer):
    user = {"user_id": 42, "entity_kind": "item", "action": "click"}
    now_ms = time.time_ns() // 1_000_000
    with worker(world.config) as running:
        running.ready()
        producer.produce(**user, entity_id=1, event_time_ms=now_ms - 1_000).result()
        producer.produce(**user, entity_id=2, event_time_ms=now_ms + 300_000).result()
        erased = producer.erase(42, "asked for").result()
        reader = world.reader()
        eventually(lambda: reader.position(42) == erased, "the erasure")
        assert decode_row(reader.read("main", [42])[0].row).events.size == 0
        producer.produce(**user, entity_id=3, event_time_ms=now_ms - 500).result()
        after = producer.produce(**user, entity_id=4, event_time_ms=now_ms + 60_000).result()
        eventually(lambda: reader.position(42) == after, "what came behind it")
        assert decode_row(reader.read("main", [42])[0].row).events["entity_id"].tolist() == [4]
        check_fold(world, reader)
        reader.close()


def test_sigkill_in_mid_ingest_loses_and_doubles_nothing(world, producer):
    users, events = random_load(60_000, 500, seed=2)
    producer.produce_many(users, events)
    producer.flush()
    config = replace(world.config, batch_events_max=500)
    reader = world.reader()
    with worker(config) as running:
        eventually(lambda: sum(position.offset for position in reader.positions()) > 5_000, "a part of the topic")
        running.kill()
    reached = sum(position.offset + 1 for position in reader.positions())
    assert 5_000 < reached < 60_000
    with worker(config) as running:
        started_s = time.monotonic()
        running.ready()
        assert time.monotonic() - started_s < 20
        assert check_fold(world, reader) == 500
    reader.close()


def test_a_stop_flushes_the_state_and_ends_though_faust_does_not(world, producer):
    producer.produce_many(*random_load(3_000, 50, seed=3))
    producer.flush()
    with worker(world.config, faust_hangs=True) as running:
        running.ready()
        running.process.terminate()
        assert running.wait() == 0
    assert agreeing(world, world.config), "what was applied is in RocksDB"


@pytest.mark.parametrize("step", ["decoded", "stored", "viewed"])
def test_store_and_view_agree_after_a_crash_between_two_steps(world, producer, step):
    users, events = random_load(3_000, 50, seed=3)
    producer.produce_many(users, events)
    producer.flush()
    config = replace(world.config, batch_events_max=400)
    with worker(config, die_at=(step, 3)) as running:
        assert running.wait() == -signal.SIGKILL
    assert not agreeing(world, config), "RocksDB had flushed nothing yet: the view alone has what readers saw"
    reader = world.reader()
    seen = reader.positions()
    assert sum(position.offset + 1 for position in seen) > 0
    with worker(config) as running:
        running.ready()
        assert all(now.offset >= before.offset for now, before in zip(reader.positions(), seen, strict=True))
        assert check_fold(world, reader) == 50
        reader.close()
        running.process.terminate()
        assert running.wait() == 0
    assert agreeing(world, config)


def agreeing(world: World, config) -> bool:
    """Whether store and view stand at the same moment in every partition, and hold the same rows if so."""
    store, agree = RocksStore(config.state_folder, definitions(DOMAIN)), True
    for partition in range(world.identity.partition_count):
        held, view = store.open(partition, world.identity.epoch), PartitionView(config.view_folder, partition)
        if view.meta() == held.meta:
            with view._environment.begin() as transaction:
                assert [item for item in transaction.cursor() if not item[0].startswith(b"\x00")] == list(held.scan())
        else:
            agree = False
        view.close()
        held.close()
    return agree


def test_the_state_of_another_log_is_refused(world, producer, kafka, tmp_path, capfd):
    producer.produce(user_id=1, entity_kind="item", entity_id=1, action="click").result()
    with worker(world.config) as running:
        running.ready()
        reader = world.reader()
        world.wait_applied(reader)
        reader.close()
    other = new_world(kafka.bootstrap, tmp_path, f"{world.config.group}-other")
    with worker(other.config) as running:
        assert running.wait() == 1
    assert "belongs to log" in capfd.readouterr().err


def test_a_gap_between_state_and_log_is_an_error(world, producer, capfd):
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    users = np.full(10, 42, np.uint64)
    events = random_load(10, 1, seed=4)[1]
    producer.produce_many(users, events)
    producer.flush()
    with worker(world.config) as running:
        running.ready()
    producer.produce_many(users, events)
    position = producer.produce(user_id=42, entity_kind="item", entity_id=1, action="click").result()
    admin = AdminClient({"bootstrap.servers": world.kafka.bootstrap})
    place = TopicPartition(world.topics.actions, position.partition, position.offset)
    next(iter(admin.delete_records([place]).values())).result()
    with worker(world.config) as running:
        assert running.wait() == 1
    error = capfd.readouterr().err
    assert "the state ends at offset 9 and the log now starts at 20" in error
    assert "offset_below_retention" in error


def test_the_worker_says_when_there_is_no_broker(world, capfd):
    config = replace(world.config, kafka=KafkaConfig("127.0.0.1:1"), answer_timeout_s=1.0)
    with worker(config) as running:
        assert running.wait() == 1
    assert "Kafka at 127.0.0.1:1 does not answer" in capfd.readouterr().err


def test_an_imported_log_keeps_its_append_times(world, producer):
    users, events = np.full(3, 42, np.uint64), np.zeros(3, EVENT_DTYPE)
    events["event_time_ms"], events["entity_kind"], events["action"], events["event_id"] = [1_000, 2_000, 99_000_000], 1, 2, [1, 2, 3]
    producer.produce_many(users[:2], events[:2], append_time_ms=np.array([1_000, 2_000]))
    producer.flush()
    raw = new_producer(world.kafka, "test")
    raw.produce(world.topics.actions, encode_events(users, events)[2], user_key(42), headers=[(APPEND_TIME_HEADER, b"3000")])
    raw.flush()
    with worker(world.config) as running:
        running.ready()
        reader = world.reader()
        world.wait_applied(reader)
        (reading,) = reader.read("main", [42])
        assert decode_row(reading.row).events["event_id"].tolist() == [1, 2]  # the third is a day ahead of its append time,
        assert reading.log_clock_ms == 2_000  # and what is rejected moves no clock
        reader.close()


def never_ending_services(config):
    """A worker whose Faust services wait for ever when they are to stop, as they do for a coordinator that is gone."""

    async def wait(_):
        await asyncio.Event().wait()

    streams.worker.RateSender.on_stop = wait
    streams.worker._STOP_TIMEOUT_S = 1.0
    raise SystemExit(streams.worker.run_worker(config))


def test_a_worker_whose_services_do_not_end_ends_nevertheless(world, producer, kafka, tmp_path, capfd):
    producer.produce(user_id=1, entity_kind="item", entity_id=1, action="click").result()
    with worker(world.config) as running:
        running.ready()
        reader = world.reader()
        world.wait_applied(reader)
        reader.close()
    other = new_world(kafka.bootstrap, tmp_path, f"{world.config.group}-stuck")  # the state of another log: the hot path fails
    process = multiprocessing.get_context("spawn").Process(target=never_ending_services, args=(other.config,))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 1
    assert "services do not end within 1 s" in capfd.readouterr().err

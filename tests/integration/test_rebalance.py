"""Several workers on a real broker: they share partitions, take over from each other, stand by, and never mix their writes."""

import json
import os
import signal
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streams_world import World, check_fold, eventually, new_world, random_load, worker

from features.sequence import decode_row
from streams.batch_loop import WorkerConfig
from streams.producer import ActionProducer

pytestmark = pytest.mark.servers

SESSION_MS = 2_000


@pytest.fixture
def world(kafka, tmp_path, request) -> World:
    name = request.node.name.translate(str.maketrans("[] ,", "----")).strip("-")
    return new_world(kafka.bootstrap, tmp_path, name, partition_count=4)


@pytest.fixture
def producer(world):
    found = ActionProducer(world.kafka, world.domain, world.topics.actions)
    yield found
    found.close()


def member(world: World, name: str, **other) -> WorkerConfig:
    """The configuration of one of several workers: a state folder of its own, the machine's views."""
    folder = world.config.state_folder.parent / name
    return replace(world.config, instance=name, state_folder=folder / "state", session_timeout_ms=SESSION_MS, **other)


def health(ready: dict) -> dict:
    try:
        with urllib.request.urlopen(ready["health"], timeout=10) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return json.loads(error.read())


def owned(ready: dict) -> list[int]:
    return [int(number) for number, partition in health(ready)["partitions"].items() if partition["role"] == "owner"]


def produce(producer: ActionProducer, seed: int, count: int = 2_000) -> None:
    producer.produce_many(*random_load(count, 60, seed=seed))
    producer.flush()


def test_workers_share_partitions_and_take_over_from_a_killed_one(world, producer):
    produce(producer, 1)
    reader = world.reader()
    with worker(member(world, "a")) as a:
        at_a = a.ready()
        world.wait_applied(reader)
        assert owned(at_a) == [0, 1, 2, 3]
        with worker(member(world, "b")) as b:
            at_b = b.ready()
            eventually(lambda: len(owned(at_a)) == 2 == len(owned(at_b)), "two partitions each")
            assert sorted(owned(at_a) + owned(at_b)) == [0, 1, 2, 3]
            produce(producer, 2)
            assert check_fold(world, reader) == 60
            b.kill()
            produce(producer, 3)
            eventually(lambda: owned(at_a) == [0, 1, 2, 3], "all partitions back")
            assert check_fold(world, reader) == 60
            assert health(at_a)["statistics"]["fenced"] == 0
    reader.close()


def test_a_worker_that_was_frozen_beyond_its_session_harms_nothing(world, producer):
    produce(producer, 1)
    reader = world.reader()
    with worker(member(world, "a")) as a:
        a.ready()
        world.wait_applied(reader)
        with worker(member(world, "b")) as b:
            at_b = b.ready()
            eventually(lambda: len(owned(at_b)) == 2, "two partitions each")
            os.kill(a.pid, signal.SIGSTOP)
            try:
                produce(producer, 2)
                eventually(lambda: owned(at_b) == [0, 1, 2, 3], "the other one takes over")
                world.wait_applied(reader)
            finally:
                os.kill(a.pid, signal.SIGCONT)
            eventually(lambda: len(owned(at_b)) == 2, "it is a member again")
            produce(producer, 3)
            assert check_fold(world, reader) == 60
    reader.close()


def test_watermarks_never_go_back_while_owners_change(world, producer):
    reader = world.reader()
    highest = np.full(4, -1)

    def look() -> None:
        for position in reader.positions():
            assert position.offset >= highest[position.partition]
            highest[position.partition] = position.offset

    produce(producer, 1)
    with ExitStack() as stack:
        first = stack.enter_context(worker(member(world, "a")))
        first.ready()
        eventually(lambda: look() or highest.sum() + 4 == sum(world.ends().values()), "the topic")
        second = stack.enter_context(worker(member(world, "b")))  # has no state of its own yet: the view is ahead of it
        at_second = second.ready()
        eventually(lambda: look() or len(owned(at_second)) == 2, "two partitions moved")
        first.kill()
        produce(producer, 2)
        eventually(lambda: look() or highest.sum() + 4 == sum(world.ends().values()), "the rest of the topic")
        assert check_fold(world, reader) == 60
    reader.close()


def test_a_standby_has_the_state_and_takes_over(world, producer):
    produce(producer, 1)
    views: Path = world.config.state_folder.parent / "standby-view"
    reader, standby_reader = world.reader(), replace_view(world, views).reader()
    with worker(member(world, "a")) as a:
        a.ready()
        world.wait_applied(reader)
        # A member of the group too: it gets half of the partitions, and follows the others.
        with worker(member(world, "b", standby=True, view_folder=views)) as b:
            at_b = b.ready()
            produce(producer, 2)
            world.wait_applied(standby_reader)
            eventually(lambda: len(owned(at_b)) == 2, "two partitions of its own")
            assert len(health(at_b)["partitions"]) == 4
            a.kill()
            rebalances = health(at_b)["statistics"]["rebalances"]
            eventually(lambda: owned(at_b) == [0, 1, 2, 3], "the standby owns everything")
            produce(producer, 3)
            assert check_fold(world, standby_reader) == 60
            assert health(at_b)["statistics"]["rebalances"] > rebalances
    reader.close()
    standby_reader.close()


def replace_view(world: World, views: Path) -> World:
    return replace(world, config=replace(world.config, view_folder=views))


@pytest.mark.parametrize("policy", ["earliest", "latest"])
def test_where_retention_went_past_the_state_the_policy_decides(world, producer, policy):
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    config = replace(world.config, offset_below_retention=policy)
    clicks = {"user_id": 42, "entity_kind": "item", "action": "click"}
    first = producer.produce(**clicks, entity_id=1).result()
    reader = world.reader()
    with worker(config) as running:
        running.ready()
        eventually(lambda: reader.position(42) == first, "the first action")
    removed = [producer.produce(**clicks, entity_id=2).result() for _ in range(3)][-1]
    kept = producer.produce(**clicks, entity_id=3).result()
    admin = AdminClient({"bootstrap.servers": world.kafka.bootstrap})
    place = TopicPartition(world.topics.actions, removed.partition, removed.offset + 1)
    next(iter(admin.delete_records([place]).values())).result()
    with worker(config) as running:
        at = running.ready()
        last = producer.produce(**clicks, entity_id=4).result()
        eventually(lambda: reader.position(42) == last, "the last action")
        items = decode_row(reader.read("main", [42])[0].row).events["entity_id"].tolist()
        # What the removed records said is unknown, an erasure perhaps: so nothing of the old state stays.
        assert items == ([3, 4] if policy == "earliest" else [4])
        report = health(at)
        assert report["statistics"]["records_missed"] == (3 if policy == "earliest" else 4)
        assert report["partitions"][str(kept.partition)]["start_offset"] == kept.offset + (policy == "latest")
    reader.close()


def test_the_age_is_not_refreshed_by_a_broker_that_does_not_answer(world, producer):
    produce(producer, 1)
    reader = world.reader()
    with worker(member(world, "a")) as a:
        a.ready()
        world.wait_applied(reader)
        os.kill(a.pid, signal.SIGSTOP)
        try:
            stopped_s = time.monotonic()
            ages = [reading.state_age_ms for reading in reader.read("main", [1, 2, 3, 4])]
            eventually(lambda: time.monotonic() - stopped_s > 0.5, "half a second")
            later = [reading.state_age_ms for reading in reader.read("main", [1, 2, 3, 4])]
        finally:
            os.kill(a.pid, signal.SIGCONT)
        assert all(after - before >= 400 for before, after in zip(ages, later, strict=True))
    reader.close()

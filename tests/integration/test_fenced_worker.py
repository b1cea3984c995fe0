"""A broker that refuses a worker as a second one of its name: the worker stops where there is another, and goes on where there is none."""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from streams_world import DOMAIN, World, eventually, new_world

import streams.batch_loop
from streams.batch_loop import BatchLoop
from streams.errors import KafkaUnavailableError
from streams.kafka import KafkaError, Message, new_group_consumer
from streams.producer import ActionProducer

pytestmark = pytest.mark.servers
_SAID = KafkaError(KafkaError.FENCED_INSTANCE_ID).str()
FENCED = f"Fatal error: {_SAID}: OffsetCommit failed: {_SAID}"


@pytest.fixture
def world(kafka, tmp_path, request) -> World:
    return new_world(kafka.bootstrap, tmp_path, re.sub(r"\W+", "-", request.node.name))


@contextmanager
def running(loop: BatchLoop) -> Iterator[list[BaseException]]:
    """The loop in a thread; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except KafkaUnavailableError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield raised
    finally:
        loop.stop()
        thread.join(60)
        assert not thread.is_alive()


class Doomed:
    """A group's consumer that gives its membership up when `fence` is set, and then is fenced as by a commit of that membership."""

    def __init__(self, consumer, loop) -> None:
        self._consumer, self._loop, self.lost = consumer, loop, False
        self.fence, self.closed, self.commits = threading.Event(), False, 0

    def __getattr__(self, name):
        return getattr(self._consumer, name)

    def memberid(self) -> str:
        return "" if self.lost else self._consumer.memberid()

    def consume(self, *arguments):
        if not self.fence.is_set():
            return self._consumer.consume(*arguments)
        self.lost = True
        self._loop._on_lost(self, [])
        error = KafkaError(KafkaError._FATAL, FENCED, fatal=True)
        return [Message(error=error)]

    def commit(self, **settings) -> None:
        self.commits += 1
        self._consumer.commit(**settings)

    def close(self) -> None:
        self.closed = True
        self._consumer.close()


def test_a_worker_that_was_fenced_by_its_own_late_commit_joins_anew(world, monkeypatch):
    made, loop = [], BatchLoop(world.config)

    def new(*arguments, **settings):
        consumer = new_group_consumer(*arguments, **settings)
        made.append(consumer if made else Doomed(consumer, loop))
        return made[-1]

    monkeypatch.setattr(streams.batch_loop, "new_group_consumer", new)
    click = {"entity_kind": "item", "entity_id": 1, "action": "click"}
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)

    def is_applied() -> bool:
        return {number: held.next_offset for number, held in loop.core.held().items()} == world.ends()

    with running(loop) as raised:
        eventually(loop.caught_up.is_set, "the first consumer has its partitions")
        producer.produce(user_id=1, **click).result()
        eventually(is_applied, "the first record is in the state")
        made[0].fence.set()
        producer.produce(user_id=2, **click).result()
        eventually(is_applied, "the second one, too")
        assert loop.partitions() == [0, 1, 2]
    assert not raised
    assert made[0].closed
    assert len(made) == 2
    producer.close()


def test_nothing_is_committed_without_a_membership(world, monkeypatch):
    made, loop = [], BatchLoop(world.config)

    def new(*arguments, **settings):
        made.append(Doomed(new_group_consumer(*arguments, **settings), loop))
        return made[-1]

    monkeypatch.setattr(streams.batch_loop, "new_group_consumer", new)
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)
    with running(loop) as raised:
        eventually(loop.caught_up.is_set, "it has its partitions")
        made[0].lost = True  # the session timed out, and the loop does not know it yet
        producer.produce(user_id=1, entity_kind="item", entity_id=1, action="click").result()
        eventually(lambda: {number: held.next_offset for number, held in loop.core.held().items()} == world.ends(), "it is applied")
    assert made[0].commits == 0  # the loop has ended: its batch, too
    assert not raised
    producer.close()


@pytest.mark.parametrize("timed_out", [False, True], ids=["at_any_time", "after_a_time_out"])
def test_a_worker_whose_name_another_one_took_stops(world, timed_out):
    loop, config = BatchLoop(world.config), world.config
    with running(loop) as raised:
        eventually(loop.caught_up.is_set, "it has its partitions")
        if timed_out:
            loop._late_until_s = math.inf
        settings = {"session_timeout_ms": config.session_timeout_ms, "queue_bytes_max": config.queue_bytes_max}
        other = new_group_consumer(config.kafka, config.group, f"{config.group}-{config.instance}", **settings, on_error=lambda _: None)
        other.subscribe([config.topics.actions])
        eventually(lambda: other.poll(0.1) is None and raised, "the first one was fenced")
        assert KafkaError(KafkaError.FENCED_INSTANCE_ID).str() in str(raised[0])
        other.close()

"""A move to more partitions on a real broker: no answer changes, erasures stay, and the new log goes on from there."""

import time
from dataclasses import replace

import numpy as np
import pytest
from streams_world import DOMAIN, eventually, new_world, random_load, worker

from deploy.commands_move import move_state
from deploy.processes import MOVE_KEY
from deploy.settings import load_settings
from features.lineage import Lineage, Predecessor
from features.ports import Position
from features.sequence import decode_row
from streams.broadcast import Announcements
from streams.errors import StateError
from streams.kafka import end_offsets, log_identity
from streams.producer import ActionProducer
from streams.view_reader import ViewReader

pytestmark = pytest.mark.servers

DOMAIN_FILE = """
name = "test"
entities = { item = 1, product = 2 }
surfaces = { home = 3 }
actions.view = { id = 1, kind = "impression" }
actions.click = { id = 2, kind = "positive" }
sequence.main = { id = 1, length = 20 }
sequence.few_views = { id = 2, length = 10, caps = { view = 3 } }
ranker.home = { sequence = "main", sequence_length = 20, item_space = "items", heads.click.actions = ["click"] }
"""


def answers(reader: ViewReader, users: list[int]) -> dict[str, list[tuple[bytes, int]]]:
    return {
        name: [
            (decode_row(reading.row).events.tobytes(), decode_row(reading.row).erased_before_ms) if reading.row else (b"", -1)
            for reading in reader.read(name, users)
        ]
        for name in DOMAIN.sequence
    }


def test_more_partitions_change_no_answer(kafka, tmp_path):
    world = new_world(kafka.bootstrap, tmp_path, "move")
    (tmp_path / "domain-file.toml").write_text(DOMAIN_FILE)
    old_home = tmp_path / "old"
    settings = load_settings(
        home=old_home,
        domain=tmp_path / "domain-file.toml",
        kafka_bootstrap=kafka.bootstrap,
        **{f"topic_{name}": getattr(world.topics, name) for name in ("actions", "dead_letters", "rankings", "announcements")},
    )
    users = list(range(1, 81))
    config = replace(world.config, state_folder=old_home / "state" / "worker-0", view_folder=old_home / "view")
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)
    producer.produce_many(*random_load(6_000, 78, seed=5))
    producer.flush()
    for user in (3, 4):
        producer.erase(user, "asked")
    now_ms = time.time_ns() // 1_000_000
    last = producer.produce(user_id=3, entity_kind="item", entity_id=5, action="click", event_time_ms=now_ms + 60_000).result()
    reader = ViewReader(config.view_folder, DOMAIN, 3)
    with worker(config) as running:
        running.ready()
        eventually(lambda: {p.partition: p.offset + 1 for p in reader.positions()} == world.ends(), "the log's end")
        before = answers(reader, users)
    reader.close()
    assert before["main"][2][0]
    assert before["main"][3] == (b"", before["few_views"][3][1])

    new_home = tmp_path / "new"
    moved = move_state(settings, new_home, "move-actions-v2", 8, kafka.bootstrap)
    topics = replace(world.topics, actions="move-actions-v2", base=moved["log_base"])
    new = log_identity(world.kafka, topics.actions, topics.base)
    assert (new.partition_count, new.epoch) == (8, moved["log_epoch"])
    config = replace(config, topics=topics, state_folder=new_home / "state" / "worker-0", view_folder=new_home / "view", group="moved")
    reader = ViewReader(config.view_folder, DOMAIN, 8)
    with worker(config) as running:
        running.ready()
        assert answers(reader, users) == before
        again = ActionProducer(world.kafka, DOMAIN, topics.actions, base=topics.base)
        # Old actions of an erased user stay out, new ones of everybody come in; the same event again changes nothing.
        again.produce(user_id=4, entity_kind="item", entity_id=9, action="click", event_time_ms=now_ms - 60_000).result()
        again.produce_many(*random_load(6_000, 78, seed=5))
        again.flush()
        at = again.produce(user_id=80, entity_kind="item", entity_id=6, action="click").result()
        ends = end_offsets(world.kafka, topics.actions, range(8))
        eventually(lambda: {p.partition: p.offset + 1 for p in reader.positions()} == ends, "the new log's end")
        after = answers(reader, users)
        assert [after[name][:79] for name in after] == [before[name][:79] for name in before]
        assert np.frombuffer(after["main"][79][0], np.uint8).size
        again.close()
    producer.close()
    reader.close()

    announced = Announcements(world.kafka, world.topics.announcements)
    (value,) = [value for key, value in announced.values().items() if key.startswith(MOVE_KEY)]
    announced.close()
    lineage = Lineage()
    lineage.add(Predecessor.decode(value))
    assert lineage.includes(at.log_epoch, last) is True
    assert lineage.includes(at.log_epoch, Position(last.log_epoch, last.partition, last.offset + 1)) is False


def test_a_state_that_is_behind_is_not_moved(kafka, tmp_path):
    world = new_world(kafka.bootstrap, tmp_path, "move-behind")
    (tmp_path / "domain-file.toml").write_text(DOMAIN_FILE)
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)
    producer.produce(user_id=3, entity_kind="item", entity_id=5, action="click").result()
    producer.close()
    names = {f"topic_{name}": getattr(world.topics, name) for name in ("actions", "dead_letters", "rankings", "announcements")}
    settings = load_settings(home=tmp_path / "old", domain=tmp_path / "domain-file.toml", kafka_bootstrap=kafka.bootstrap, **names)
    with pytest.raises(StateError, match="let the worker reach the end"):
        move_state(settings, tmp_path / "new", "move-behind-v2", None, kafka.bootstrap)

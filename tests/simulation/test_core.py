"""What the simulation found in the worker core, each said plainly."""

import random
from concurrent.futures import Future

import numpy as np
import pytest
from google.protobuf.json_format import MessageToJson
from simulation.plan import EPOCH, TOPIC, draw_plan
from simulation.world import Disk, Machine, Process, SimStore, SimView, Snapshot
from streams_world import DOMAIN_TOML

from features.actions import encode_action
from features.domain import parse_domain
from features.ids import user_key
from features.sequence import decode_row
from protos.v1.actions_pb2 import Action, DeadLetter
from streams.batch_loop import BatchLoop, WorkerConfig
from streams.core import Log, RetentionPolicy, WorkerCore
from streams.errors import FencedError
from streams.kafka import KafkaConfig, Topics
from streams.memory import MemoryStore
from streams.records import Records
from streams.state import META_KEY, definitions, row_key


class Nothing:
    """An observer of a world in which nothing happens."""

    def point(self, process, where):
        pass

    def committed(self, partition, before, after):
        pass


class World:
    """One worker over a log of one partition that is there as a whole."""

    def __init__(self, seed: int = 3, policy: RetentionPolicy = "fail") -> None:
        self.first = 0
        self.plan = next(plan for i in range(seed, 100) if len(plan := draw_plan(random.Random(i)).partitions) == 1)[0]
        self.process = Process(Machine("here"), "worker")
        self.disks: dict[int, Disk] = {}
        self.snapshots: dict[int, dict[int, Snapshot]] = {0: {}}
        self.store = SimStore(self.disks, self.snapshots, self.plan.kept, self.process, Nothing())
        self.core = WorkerCore(
            self.plan.domain, self.store, self.open_view, lambda _: None, offset_below_retention=policy, folds_on_view=False
        )
        self.core.follow(Log(TOPIC, EPOCH, 1, lambda _: (self.first, self.plan.offsets[-1] + 1)))

    def open_view(self, partition: int) -> SimView:
        return SimView(self.process, partition, Nothing())

    def apply_all(self) -> int | None:
        return self.core.apply(0, self.plan.records(0, len(self.plan.offsets)))

    def damaged_content(self) -> dict[bytes, bytes]:
        """What the disk has, with one bit of each row flipped."""
        return {key: row if key == META_KEY else row[:-1] + bytes((row[-1] ^ 1,)) for key, row in self.disks[0].content.items()}


def test_the_domain_file_says_what_records_may_be_in():
    domain, letters = parse_domain(f'encodings = ["json"]\n{DOMAIN_TOML}', source="test"), []
    canonical = encode_action(user_id=7, entity_kind=1, entity_id=3, action=2, event_time_ms=1_000, event_id=4)
    values = [MessageToJson(Action.FromString(canonical)).encode(), b"\0\0\0\0\7\0" + canonical]
    core = WorkerCore(
        domain, MemoryStore(definitions(domain)), lambda n: SimView(Process(Machine("here"), "w"), n, Nothing()), letters.extend
    )
    core.follow(Log(TOPIC, EPOCH, 1, lambda _: (0, 2)))
    core.open(0)
    assert core.apply(0, Records(np.arange(2), [user_key(7)] * 2, values, np.full(2, 2_000))) == 2
    (letter,) = [DeadLetter.FromString(value) for _, value in letters]
    assert (letter.source_offset, letter.value) == (1, values[1])
    assert 'add "schema_registry" to encodings' in letter.reason
    (row, _) = core.held()[0].store.get([row_key(1, 7), row_key(2, 7)])
    assert decode_row(row).events["entity_id"].tolist() == [3]


def test_snapshots_with_damaged_rows_do_not_stand_in_the_way_of_the_log():
    world = World()
    world.core.open(0)
    end = world.apply_all()
    world.core.close()
    content = world.damaged_content()
    world.disks[0] = Disk(content, content)
    world.snapshots[0] = {end - 1: Snapshot(content), 3: Snapshot(content)}
    world.process.machine.views.clear()
    assert world.core.open(0) == 0, "the newest snapshot, the one before, then the log"
    assert world.apply_all() == end
    assert world.core.statistics()["repairs"] == 3


def test_a_snapshot_that_cannot_be_restored_does_not_stand_in_the_way_of_the_log():
    world = World()
    world.snapshots[0] = {5: Snapshot({}, is_incomplete=True)}
    assert world.core.open(0) == 0


def test_a_repair_that_leaves_out_what_retention_removed_counts_it():
    world = World(policy="earliest")
    world.core.open(0)
    world.core.apply(0, world.plan.records(0, 5))
    world.disks[0].content = world.damaged_content()
    world.first = world.plan.offsets[4]
    assert world.apply_all() == world.first
    assert world.core.statistics()["records_missed"] == world.first


@pytest.fixture
def rival(monkeypatch):
    """Another worker takes a view over right after this one has opened it, once."""

    def take_over(world: World) -> None:
        real = SimView.sync

        def sync(view, *arguments):
            monkeypatch.undo()
            world.open_view(0)
            return real(view, *arguments)

        world.process.machine.views.clear()
        monkeypatch.setattr(SimView, "sync", sync)

    return take_over


def test_a_view_taken_over_during_a_repair_is_no_reason_to_end(rival):
    world = World()
    world.core.open(0)
    world.core.apply(0, world.plan.records(0, 5))
    world.disks[0].content = world.damaged_content()
    rival(world)
    assert world.apply_all() is None
    assert world.core.partitions() == []
    assert world.core.statistics()["fenced"] == 1
    assert world.core.open(0) == 0


def test_a_view_taken_over_while_it_is_opened_is_taken_again_later(rival, tmp_path):
    world = World()
    rival(world)
    with pytest.raises(FencedError) as fenced:
        world.core.prepare(0)
    config = WorkerConfig(KafkaConfig("nowhere:1"), Topics(), world.plan.domain, tmp_path, tmp_path)
    loop = BatchLoop(config, store=MemoryStore(definitions(world.plan.domain)))
    loop._owned, loop._opening[0] = {0}, Future()
    loop._opening[0].set_exception(fenced.value)
    loop._finish_opening(None)
    assert loop._opening == {}
    assert loop.health()["not_open"] == [0]
    assert world.core.open(0) == 0

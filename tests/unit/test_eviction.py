"""The background eviction over real RocksDB and LMDB: the store is bounded, and no reader can tell."""

from dataclasses import replace

import numpy as np
import pytest

from features.actions import ACTION, ERASE, EVENT_DTYPE, Batch
from features.domain import parse_domain
from features.sequence import decode_row
from streams.core import fold_batch
from streams.eviction import EvictionPass
from streams.state import definitions, row_key
from streams.store import RocksStore
from streams.view import PartitionView
from streams.view_reader import ViewReader

EPOCH, DAY_MS = 5, 86_400_000
DOMAIN = parse_domain(
    """
name = "test"
[entities]
item = 1
[actions.click]
id = 1
kind = "positive"
[sequence.fresh]
id = 2
length = 3
age_days_max = 9
evict = "log_clock"
[sequence.historic]
id = 1
length = 3
[ranker.home]
sequence = "fresh"
sequence_length = 3
item_space = "items"
[ranker.home.heads.click]
actions = ["click"]
""",
    source="test",
)
KEPT = definitions(DOMAIN)
USERS = list(range(1, 41))
ERASED, LATE = 7, 8


class World:
    """One partition, written as the worker writes it."""

    def __init__(self, folder):
        self.store = RocksStore(folder / "state", KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
        self.view = PartitionView(folder / "view", 0, map_bytes=1 << 24)
        self.view.sync(self.store.meta, self.store.scan, 0)
        self.folder, self.offset = folder, 0

    def act(self, users, append_ms, *, verdict=ACTION, event_ms=None):
        n = len(users)
        events = np.zeros(n, EVENT_DTYPE)
        if verdict == ACTION:
            events["event_time_ms"] = append_ms if event_ms is None else event_ms
            events["event_id"], events["action"], events["entity_kind"] = self.offset + np.arange(n), 1, 1
        offsets = self.offset + np.arange(n)
        stamps = np.full(n, append_ms, np.int64)
        batch = Batch(EPOCH, 0, offsets, stamps, np.full(n, verdict, np.uint8), np.array(users, np.uint64), events, {})
        keys, rows, meta = fold_batch(KEPT, self.store, batch)
        self.store.write(keys, rows, meta)
        self.view.write(keys, rows, meta)
        self.offset += n

    def evict(self, eviction):
        runs = 0
        while eviction.due(0, self.store):
            eviction.run(0, self.store, self.view)
            runs += 1
        return runs

    def readings(self):
        """What readers get, with the view closed meanwhile: LMDB opens a file once in a process."""
        self.view.close()
        reader = ViewReader(self.folder / "view", DOMAIN, 1)
        found = {name: {reading.user_id: reading.row for reading in reader.read(name, USERS)} for name in DOMAIN.sequence}
        reader.close()
        self.view = PartitionView(self.folder / "view", 0, map_bytes=1 << 24)
        return found

    def rows(self):
        return dict(self.store.scan())

    def close(self):
        self.view.close()
        self.store.close()


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    yield found
    found.close()


def test_idle_users_leave_and_no_reading_changes(world):
    world.act(USERS, DAY_MS)
    world.act([ERASED], 2 * DAY_MS, verdict=ERASE)
    world.act(USERS[30:], 14 * DAY_MS)
    before = world.readings()
    assert [user for user, row in before["fresh"].items() if row] == [ERASED, *USERS[30:]], "by the log's clock already"
    assert all(before["historic"].values())
    eviction = EvictionPass(KEPT, rows_per_run=7)
    assert world.evict(eviction) > 3, "a bounded number of rows at a time"
    assert world.readings() == before
    left = {int.from_bytes(key[1:], "big") for key in world.rows() if key[0] == 2}
    assert left == {ERASED, *USERS[30:]}
    assert sum(key[0] == 1 for key in world.rows()) == len(USERS), "a sequence that evicts nothing keeps everything"
    assert eviction.statistics() == {"passes": 1, "rows_read": len(USERS), "rows_dropped": 29}
    assert not eviction.due(0, world.store), "until the log's clock moves on"


def test_an_erased_user_stays_erased_and_late_events_stay_dropped(world):
    world.act([ERASED], DAY_MS)
    world.act([ERASED], 2 * DAY_MS, verdict=ERASE)
    world.act([ERASED], 2 * DAY_MS + 1)
    world.act([1], 30 * DAY_MS)
    world.evict(EvictionPass(KEPT))
    row = decode_row(world.readings()["fresh"][ERASED])
    assert (len(row.events), row.erased_before_ms) == (0, 2 * DAY_MS)
    world.act([ERASED, LATE], 30 * DAY_MS, event_ms=2 * DAY_MS)
    rows = world.readings()["fresh"]
    assert decode_row(rows[ERASED]).events.size == 0
    assert rows[LATE] == b"", "older than the age, of a user who never had a row"
    world.act([LATE], 30 * DAY_MS)
    assert len(decode_row(world.readings()["fresh"][LATE]).events) == 1


def test_a_fold_onto_an_evicted_row_is_the_fold_onto_the_kept_one(tmp_path):
    rows = []
    for evicting in (False, True):
        world = World(tmp_path / str(evicting))
        world.act(USERS, DAY_MS)
        world.act([ERASED], 2 * DAY_MS, verdict=ERASE)
        world.act([1], 13 * DAY_MS)
        if evicting:
            world.evict(EvictionPass(KEPT))
            assert len(world.rows()) < 2 * len(USERS)
        world.act(USERS, 13 * DAY_MS, event_ms=5 * DAY_MS)
        rows.append((world.rows(), world.readings()))
        world.close()
    assert rows[0] == rows[1]


def test_a_view_of_a_later_moment_keeps_its_later_rows(world):
    world.act(USERS[:2], DAY_MS)
    world.act([9], 12 * DAY_MS)
    later = decode_row(world.rows()[row_key(2, 1)])
    ahead = b"a row that another owner wrote since" + bytes(later.events)
    world.view.write([row_key(2, 1)], [ahead], replace(world.store.meta, applied_offset=world.store.meta.applied_offset + 5))
    world.evict(EvictionPass(KEPT))
    with world.view._environment.begin() as transaction:
        assert transaction.get(row_key(2, 1)) == ahead
        assert transaction.get(row_key(2, 2)) is None
    assert row_key(2, 1) not in world.rows()


def test_nothing_is_due_without_an_evicting_sequence_or_without_a_record(world):
    assert not EvictionPass({1: KEPT[1]}).due(0, world.store)
    eviction = EvictionPass(KEPT)
    assert not eviction.due(0, world.store)
    world.act([1], DAY_MS)
    assert eviction.due(0, world.store)

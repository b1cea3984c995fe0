"""An erased user's bytes leave the files of the store and the view, whatever happens in between."""

import multiprocessing
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest

from features.actions import ACTION, ERASE, EVENT_DTYPE, Batch
from features.domain import parse_domain
from features.ports import SequenceUnavailableError
from features.sequence import decode_row
from streams.core import Log, WorkerCore, fold_batch
from streams.errors import FencedError
from streams.purge import PURGED_FILE, ErasurePass, Purged, read_purged
from streams.state import definitions, row_key
from streams.store import RocksStore
from streams.view import PartitionView
from streams.view_reader import ViewReader

EPOCH, ERASED = 5, 777
DOMAIN = parse_domain(
    """
name = "test"
[entities]
item = 1
[actions.click]
id = 1
kind = "positive"
[sequence.main]
id = 1
length = 20
[ranker.home]
sequence = "main"
sequence_length = 20
item_space = "items"
[ranker.home.heads.click]
actions = ["click"]
""",
    source="test",
)
KEPT = definitions(DOMAIN)
USERS = np.arange(1_000, dtype=np.uint64)


class World:
    """One partition and the pass beside it, driven as the worker drives them."""

    def __init__(self, folder, name="", **options):
        self.state, self.views = folder / f"state{name}", folder / f"view{name}"
        self.options = {"wait_s": 0.0, "view_rows_per_run": 300, **options}
        self.random, self.offset, self.events = np.random.default_rng(3), 0, []
        self.open()

    def open(self):
        self.store = RocksStore(self.state, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
        self.view = PartitionView(self.views, 0, map_bytes=1 << 26)
        self.view.sync(self.store.meta, self.store.scan, self.offset)
        self.erasures = ErasurePass(self.state, list(KEPT), **self.options)
        self.erasures.opened(0, self.store)

    def close(self):
        self.erasures.closed(0, self.store)
        self.view.close()
        self.store.close()

    def write(self, batch):
        self.erasures.note(0, batch)
        keys, rows, meta = fold_batch(KEPT, self.store, batch)
        self.store.write(keys, rows, meta)
        self.view.write(keys, rows, meta)
        self.offset += len(batch)

    def batch(self, users, verdict=ACTION):
        n = len(users)
        events, offsets = np.zeros(n, EVENT_DTYPE), self.offset + np.arange(n)
        if verdict == ACTION:
            events["event_time_ms"], events["action"], events["entity_kind"] = 1_000 + offsets, 1, 1
            events["event_id"], events["entity_id"] = self.random.integers(2**62, 2**63, (2, n))
        return Batch(EPOCH, 0, offsets, 1_000 + offsets, np.full(n, verdict, np.uint8), np.array(users, np.uint64), events, {})

    def act(self):
        """Three rounds of actions of everybody; those of ERASED are remembered by their distinctive ids."""
        for _ in range(3):
            batch = self.batch(USERS)
            self.events += [int(batch.events[name][ERASED]) for name in ("event_id", "entity_id")]
            self.write(batch)

    def erase(self, user=ERASED):
        self.write(self.batch([user], ERASE))

    def purge(self):
        runs = 0
        while self.erasures.due(0, self.store):
            self.erasures.run(0, self.store, self.view)
            runs += 1
        return runs

    def found(self, *folders):
        """Files that hold any id of the erased user's actions, in either byte order."""
        ids = [number.to_bytes(8, order) for number in self.events for order in ("little", "big")]
        found = set()
        for path in (path for folder in folders or (self.state, self.views) for path in folder.rglob("*") if path.is_file()):
            with suppress(FileNotFoundError):  # RocksDB unlinks what it no longer needs at any time
                data = path.read_bytes()
                found |= {path.name} if any(bytes_of_id in data for bytes_of_id in ids) else set()
        return found


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    yield found
    found.close()


def test_erased_bytes_are_in_no_file_after_the_purge(world):
    world.act()
    world.close()  # what was in memory goes into a table
    world.open()
    world.erase()
    assert world.found(world.state)
    assert world.found(world.views) == {"data.mdb"}
    before = list(world.store.scan())
    world.purge()
    assert world.found() == set()
    assert list(world.store.scan()) == before
    assert read_purged(world.state / "0" / PURGED_FILE) == Purged(EPOCH, world.offset - 1)
    world.act()
    assert not world.erasures.due(0, world.store), "until the next erasure"
    with world.view._environment.begin() as transaction:
        shown = [(key, row) for key, row in transaction.cursor() if key[0]]
    assert shown == list(world.store.scan()), "the view went along"
    assert len(decode_row(dict(shown)[row_key(1, ERASED)]).events) == 3, "what the user did since"
    assert world.erasures.statistics() == {"purges": 1, "users_purged": 1, "users_pending": 0}


def test_writes_during_the_scrub_are_in_the_fresh_file(world):
    world.act()
    world.erase()
    while not world.erasures._held[0].cycle or not world.view._fresh:
        world.erasures.run(0, world.store, world.view)
    world.write(world.batch([1, 998, ERASED]))
    keys = [row_key(1, 2), row_key(1, 997)]
    world.view.trim(keys, world.store.get(keys), [b"", b""])
    world.store.trim(keys, [b"", b""])
    world.view.beat(77)
    world.purge()
    assert world.view._fresh is None
    with world.view._environment.begin() as transaction:
        assert [(key, row) for key, row in transaction.cursor() if key[0]] == list(world.store.scan())
    assert world.view.meta() == world.store.meta
    assert world.found() == set()


@pytest.mark.parametrize("crash", ["noted", "stored", "compacted", "copied"])
def test_a_crash_forgets_no_erasure(tmp_path, crash):
    world = World(tmp_path)
    world.act()
    batch = world.batch([ERASED], ERASE)
    world.erasures.note(0, batch)
    if crash == "noted":  # the record comes again
        world.close()
        world.open()
        assert not world.erasures.due(0, world.store), "not before the store has applied it"
    world.write(batch)
    if crash in ("compacted", "copied"):
        while not world.erasures._held[0].cycle or (crash == "copied" and not world.view._fresh):
            world.erasures.run(0, world.store, world.view)
    world.close()
    world.open()
    assert read_purged(world.state / "0" / PURGED_FILE).pending == [(ERASED, int(batch.offsets[0]))]
    world.purge()
    assert world.found() == set()
    assert not list(world.views.glob("0.*"))
    world.close()


def test_a_restored_folder_is_purged_whole(world, tmp_path):
    """A snapshot holds RocksDB's files and no word of what was purged; it may have been taken before the purge."""
    world.act()
    world.store.purge([])  # flushes: what the log alone holds would not outlive the copy
    world.erase()
    world.store.close()
    shutil.copytree(world.state, tmp_path / "statecopy", ignore=shutil.ignore_patterns(PURGED_FILE))
    world.store = RocksStore(world.state, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
    restored = World(tmp_path, "copy")
    restored.events = world.events
    assert restored.found(restored.state)
    assert restored.purge()
    assert restored.found() == set()
    restored.close()


def test_many_users_are_purged_at_once(world):
    world.act()
    for user in range(700, 850):
        world.erase(user)
    world.purge()
    assert world.found() == set()
    assert world.erasures.statistics()["users_purged"] == 150


def test_erasures_are_collected_before_files_are_rewritten(tmp_path):
    now_s = [0.0]
    world = World(tmp_path, wait_s=100.0, now_s=lambda: now_s[0])
    world.act()
    now_s[0] = 500.0
    world.erase()
    assert not world.erasures.due(0, world.store)
    now_s[0] = 601.0
    assert world.erasures.due(0, world.store)
    world.purge()
    world.erase()
    assert not world.erasures.due(0, world.store)
    world.close()


def test_an_owner_who_was_replaced_does_not_exchange_the_view(world):
    world.act()
    world.erase()
    world.view.scrub(10)
    owner = """
import sys
from pathlib import Path
from streams.view import PartitionView
PartitionView(Path(sys.argv[1]), 0, map_bytes=1 << 26).close()
"""
    subprocess.run([sys.executable, "-c", owner, str(world.views)], check=True, timeout=60)
    with pytest.raises(FencedError, match="taken the view over"):
        world.view.scrub(10_000)
    assert not list(world.views.glob("*.fresh")), "the new owner threw the copy away"


def take_over(folder, waiting, done):
    lock = PartitionView._lock

    def lock_late(view):
        waiting.set()  # the files are open, and the lock is next
        return lock(view)

    PartitionView._lock = lock_late
    view = PartitionView(folder, 0, map_bytes=1 << 26, lock_wait_s=60.0)
    view.beat(4_242)
    done.put((view._token, view.meta().applied_offset))
    view.close()


def test_who_waits_for_the_view_during_the_exchange_gets_the_fresh_file(world, monkeypatch):
    world.act()
    context = multiprocessing.get_context("spawn")
    waiting, done = context.Event(), context.Queue()
    opener = context.Process(target=take_over, args=(world.views, waiting, done))
    writing = world.view._writing

    @contextmanager
    def writing_with_somebody_waiting():
        with writing() as transaction:
            if world.view._fresh is not None and not waiting.is_set():  # not at the copy's begin, but at the exchange
                opener.start()
                assert waiting.wait(60)
            yield transaction

    monkeypatch.setattr(world.view, "_writing", writing_with_somebody_waiting)
    assert world.view.scrub(10_000)
    monkeypatch.undo()
    token, applied = done.get(timeout=60)
    opener.join(60)
    assert opener.exitcode == 0
    assert (token, applied) == (world.view._token + 1, world.store.meta.applied_offset)
    with pytest.raises(FencedError):
        world.view.beat(1)


def read_for_ever(folder, ready, stop, result):
    reader, reads, unavailable = ViewReader(folder, DOMAIN, 1), 0, 0
    while not stop.is_set():
        try:
            (reading,) = reader.read("main", [5])
            assert decode_row(reading.row, 5).offset <= reading.watermark.offset
        except SequenceUnavailableError:
            unavailable += 1
        reads += 1
        ready.set()
    result.put((reads, unavailable, reader.statistics()["reopened"]))
    reader.close()


def test_readers_of_another_process_see_no_gap(world):
    world.act()
    context = multiprocessing.get_context("spawn")
    ready, stop, result = context.Event(), context.Event(), context.Queue()
    reading = context.Process(target=read_for_ever, args=(world.views, ready, stop, result))
    reading.start()
    try:
        assert ready.wait(60)
        for _ in range(20):
            while not world.view.scrub(500):
                pass
            world.view.write([], [], replace(world.store.meta))
    finally:
        stop.set()
    reads, unavailable, reopened = result.get(timeout=60)
    reading.join(60)
    assert (reading.exitcode, unavailable) == (0, 0)
    assert reads > 0
    assert 0 < reopened <= 20


def test_no_flush_by_age_waits_for_a_purge(tmp_path):
    """A flush may wait for the end of a compaction that takes minutes, and the worker's only loop with it."""

    class Purging(ErasurePass):
        def is_purging(self, _):
            return under_way

    flushed, under_way = [], True
    store = RocksStore(tmp_path / "state", KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
    views = lambda partition: PartitionView(tmp_path / "view", partition, map_bytes=1 << 26)  # noqa: E731
    core = WorkerCore(DOMAIN, store, views, lambda _: None, erasures=Purging(tmp_path / "state", list(KEPT)))
    core.follow(Log("actions", EPOCH, 1, lambda _: (0, 1)))
    core.open(0)
    core.held()[0].store.flush_old = flushed.append
    core.tend(0)
    assert not flushed
    under_way = False
    core.tend(0)
    assert flushed == [30.0]
    core.close()

"""One suite over every store: RocksDB and the one in memory keep the same promises."""

import dataclasses
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context

import numpy as np
import pytest

from features.ports import SequenceCorruptError
from features.sequence import Definition
from streams.errors import StateError
from streams.memory import MemoryStore
from streams.snapshots import Snapshots
from streams.state import Meta, row_key, row_keys
from streams.store import RocksStore, is_held

KEPT = {1: Definition(fingerprint=11, length=3), 2: Definition(fingerprint=22, length=5)}
EPOCH = 77


@pytest.fixture(params=["rocksdb", "memory"])
def new_store(request, tmp_path):
    """`new_store(kept)`: the same place opened again, as a restarted process would."""
    if request.param == "rocksdb":
        return lambda kept=KEPT: RocksStore(tmp_path, kept, cache_bytes=1 << 20, write_buffer_bytes=1 << 20, lock_wait_s=0.0)
    stores = MemoryStore(KEPT)

    def again(kept=KEPT):
        stores._kept = dict(kept)
        return stores

    return again


def after(meta: Meta, offset: int) -> Meta:
    return dataclasses.replace(meta, applied_offset=offset, log_clock_ms=offset * 10)


def test_a_new_partition_has_applied_nothing(new_store):
    held = new_store().open(3, EPOCH)
    assert held.meta == Meta(EPOCH, 3, -1, 0, ((1, 11), (2, 22)))
    assert held.get([row_key(1, 5)]) == [None]
    assert list(held.scan()) == []
    held.close()


def test_rows_and_meta_are_there_after_reopening(new_store):
    held = new_store().open(0, EPOCH)
    users = np.array([1, 2**64 - 1], np.uint64)
    held.write(row_keys(1, users), [b"one", b"last"], after(held.meta, 4))
    held.write(row_keys(2, users[:1]), [b"two"], after(held.meta, 9))
    held.close()
    again = new_store().open(0, EPOCH)
    assert again.meta == Meta(EPOCH, 0, 9, 90, ((1, 11), (2, 22)))
    assert again.get([row_key(1, 1), row_key(2, 1), row_key(1, 2**64 - 1), row_key(2, 2)]) == [b"one", b"two", b"last", None]
    assert list(again.scan()) == [(row_key(1, 1), b"one"), (row_key(1, 2**64 - 1), b"last"), (row_key(2, 1), b"two")]
    again.close()


def test_a_failed_write_changes_nothing(new_store):
    held = new_store().open(0, EPOCH)
    held.write([row_key(1, 1)], [b"kept"], after(held.meta, 1))
    with pytest.raises(ValueError, match="shorter"):
        held.write([row_key(1, 1), row_key(1, 2)], [b"lost"], after(held.meta, 2))
    assert held.meta.applied_offset == 1
    assert held.get([row_key(1, 1)]) == [b"kept"]
    held.close()
    again = new_store().open(0, EPOCH)
    assert again.meta.applied_offset == 1
    again.close()


def test_partitions_are_apart(new_store):
    store = new_store()
    first, second = store.open(0, EPOCH), store.open(1, EPOCH)
    first.write([row_key(1, 1)], [b"of 0"], after(first.meta, 1))
    assert second.get([row_key(1, 1)]) == [None]
    assert second.meta.applied_offset == -1
    first.close()
    second.close()


def test_an_open_partition_is_held(new_store):
    held = new_store().open(0, EPOCH)
    with pytest.raises(StateError, match="another worker holds it"):
        new_store().open(0, EPOCH)
    held.close()
    new_store().open(0, EPOCH).close()


def test_another_log_is_refused(new_store):
    held = new_store().open(0, EPOCH)
    held.write([], [], after(held.meta, 0))
    held.close()
    with pytest.raises(StateError, match=r"belongs to log 000000000000004d, the topic is now log 000000000000004e.*new state folder"):
        new_store().open(0, EPOCH + 1)
    new_store().open(0, EPOCH).close()


@pytest.mark.parametrize("changed", [{1: Definition(12, 3), 2: KEPT[2]}, {1: KEPT[1]}])
def test_other_definitions_are_refused(new_store, changed):
    held = new_store().open(0, EPOCH)
    held.write([], [], after(held.meta, 0))
    held.close()
    with pytest.raises(StateError, match=r"other \[sequence\] definitions"):
        new_store(changed).open(0, EPOCH)


def test_a_damaged_meta_row_is_refused_and_names_the_folder():
    meta = Meta(EPOCH, 0, 5, 50, ((1, 11),))
    data = bytearray(meta.encode())
    assert Meta.decode(bytes(data), "here") == meta
    for i in range(len(data)):
        data[i] ^= 1
        with pytest.raises(SequenceCorruptError, match="here: "):
            Meta.decode(bytes(data), "here")
        data[i] ^= 1


def test_mixed_up_folders_are_refused(tmp_path):
    store = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
    held = store.open(0, EPOCH)
    held.write([], [], after(held.meta, 0))
    held.close()
    (tmp_path / "0").rename(tmp_path / "1")
    with pytest.raises(StateError, match="holds partition 0, not 1"):
        store.open(1, EPOCH)


def test_row_keys_sort_as_users_do():
    users = np.array([0, 1, 255, 256, 2**63, 2**64 - 1], np.uint64)
    keys = row_keys(7, users)
    assert keys == sorted(keys)
    assert keys == [row_key(7, int(user)) for user in users]


def test_trimmed_rows_are_replaced_or_gone_and_the_moment_stays(new_store):
    held = new_store().open(0, EPOCH)
    users = np.arange(1, 6, dtype=np.uint64)
    keys = row_keys(1, users)
    held.write(keys, [b"row %d" % user for user in users], after(held.meta, 4))
    held.trim(keys[1:4], [b"", b"less", b""])
    expected = [(keys[0], b"row 1"), (keys[2], b"less"), (keys[4], b"row 5")]
    assert list(held.scan()) == expected
    assert list(held.scan(after=keys[0])) == expected[1:], "behind a key, not from it on"
    held.close()
    again = new_store().open(0, EPOCH)
    assert list(again.scan()) == expected
    assert again.meta == after(again.meta, 4)
    again.close()


@pytest.mark.parametrize("everything", [False, True])
def test_what_rows_held_before_is_in_no_file_after_a_purge(new_store, tmp_path, everything):
    """Three generations of every row, so that old values stand in write-ahead logs and on several levels; then one user is emptied."""
    random, marker, secret = np.random.default_rng(1), row_key(1, 777), b"\xde\xad\xbe\xef secret of a user"
    held = new_store().open(0, EPOCH)
    users = np.arange(2_000, dtype=np.uint64)
    for generation in range(3):
        for part in np.array_split(users, 4):
            rows = [(secret if user == 777 else b"") + random.bytes(800) for user in part.tolist()]
            held.write(row_keys(1, part), rows, after(held.meta, generation))
    held.write([marker], [b"emptied"], after(held.meta, 3))

    def in_files():
        found = False
        for path in (path for path in tmp_path.rglob("*") if path.is_file()):
            with suppress(FileNotFoundError):  # RocksDB unlinks what it no longer needs at any time
                found |= secret in path.read_bytes()
        return found

    assert in_files() == any(tmp_path.iterdir()), "otherwise the test shows nothing"
    others = [row for key, row in held.scan() if key != marker]
    held.purge(None if everything else [marker])
    assert not in_files()
    assert held.get([marker]) == [b"emptied"]
    assert [row for key, row in held.scan() if key != marker] == others
    held.close()
    assert not in_files()


# What a crash leaves of RocksDB's state: a copy of its files at that moment.


@pytest.fixture
def rocks(tmp_path):
    """`rocks(name)`: the store in that folder."""
    return lambda name: RocksStore(tmp_path / name, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20, lock_wait_s=0.0)


def crashed(tmp_path, rocks, name):
    """The meta row that a process finds after this one was killed now."""
    shutil.copytree(tmp_path / "state", tmp_path / name)
    held = rocks(name).open(0, EPOCH)
    held.close()
    return held.meta


def test_a_crash_goes_back_to_the_last_flush(tmp_path, rocks):
    held = rocks("state").open(0, EPOCH)
    held.write([row_key(1, 1)], [b"row"], after(held.meta, 5))
    held.flush_old(3600.0)
    assert crashed(tmp_path, rocks, "young").applied_offset == -1
    held.flush_old(0.0)
    held.checkpoint(tmp_path / "checkpoint")  # waits for the flush
    assert crashed(tmp_path, rocks, "flushed").applied_offset == 5
    assert not sum(path.stat().st_size for path in (tmp_path / "state").rglob("*.log")), "RocksDB writes a log"
    held.close()


def test_where_a_state_started_over_stays_through_a_crash(tmp_path, rocks):
    held = rocks("state").start_over(0, EPOCH, 50)
    assert crashed(tmp_path, rocks, "crashed").start_offset == 50
    held.close()


def test_figures_are_there_while_partitions_are_closed(rocks):
    store, stopped, wrong = rocks("state"), threading.Event(), []

    def ask():
        while not stopped.is_set():
            try:
                store.statistics()
            except Exception as error:
                wrong.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for offset in range(20):
        held = store.open(0, EPOCH)
        held.write(row_keys(1, np.arange(2_000, dtype=np.uint64)), [bytes(1_000)] * 2_000, after(held.meta, offset))
        held.close()
    stopped.set()
    asking.join()
    assert not wrong


# Damage in RocksDB's files.

LARGE = np.arange(20_000, dtype=np.uint64)


def flip(path, share=0.4):
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 1
    path.write_bytes(data)


@pytest.fixture
def with_a_damaged_block(tmp_path):
    """A store whose partition has one damaged block, and the keys of its rows."""
    store = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20, lock_wait_s=0.0)
    held = store.open(0, EPOCH)
    for part in np.split(LARGE, 10):
        held.write(row_keys(1, part), [bytes(50) + key for key in row_keys(1, part)], after(held.meta, int(part[-1])))
    held.checkpoint(tmp_path / "checkpoint")  # everything is in tables now
    held.close()
    flip(max((tmp_path / "0").glob("*.sst"), key=lambda path: path.stat().st_size))
    return store


def test_a_damaged_block_is_an_error_of_its_own(with_a_damaged_block):
    held = with_a_damaged_block.open(0, EPOCH)
    errors = []
    for part in np.split(LARGE, 200):
        try:
            assert held.get(row_keys(1, part)) == [bytes(50) + key for key in row_keys(1, part)]
        except SequenceCorruptError as error:
            errors.append(str(error))
    assert 0 < len(errors) < 20
    assert all("0: a file of the state is damaged: Corruption: block checksum mismatch" in error for error in errors)
    held.close()


def test_a_scan_says_where_it_cannot_go_on_and_the_folder_is_free_at_once(with_a_damaged_block):
    held = with_a_damaged_block.open(0, EPOCH)
    rows = []
    with pytest.raises(SequenceCorruptError, match="block checksum mismatch") as found:
        rows.extend(key for key, _ in held.scan())
    assert len(rows) < len(LARGE)
    held.close()
    with_a_damaged_block.open(0, EPOCH).close()  # nothing that the traceback holds keeps it open
    assert found.tb is not None


def test_writes_after_a_compaction_met_damage_are_refused_as_damage(with_a_damaged_block, tmp_path):
    held = with_a_damaged_block.open(0, EPOCH)

    def write_on():
        for i in range(100):
            held.write(row_keys(1, LARGE[::50]), [b"new"] * 400, after(held.meta, 100_000 + i))
            held.checkpoint(tmp_path / f"checkpoint-{i}")

    with pytest.raises(SequenceCorruptError, match="block checksum mismatch"):
        write_on()
    held.close()
    with_a_damaged_block.open(0, EPOCH).close()


@pytest.mark.parametrize(
    ("file", "how"), [("*.sst", "gone"), ("*.sst", "shorter"), ("MANIFEST*", "bit"), ("CURRENT", "gone"), ("CURRENT", "bit")]
)
def test_a_damaged_folder_is_refused_when_it_is_opened(tmp_path, file, how):
    store = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20, lock_wait_s=0.0)
    held = store.open(0, EPOCH)
    held.write(row_keys(1, LARGE), [bytes(50)] * len(LARGE), after(held.meta, 5))
    held.checkpoint(tmp_path / "checkpoint")
    held.close()
    path = max((tmp_path / "0").glob(file), key=lambda path: path.stat().st_size)
    if how == "gone":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        flip(path)
    tables = {path.name for path in (tmp_path / "0").glob("*.sst")}
    with pytest.raises((SequenceCorruptError, StateError), match=str(tmp_path)):
        store.open(0, EPOCH)
    assert {path.name for path in (tmp_path / "0").glob("*.sst")} == tables


def test_a_held_folder_is_known(tmp_path):
    folder = tmp_path / "0"
    assert not is_held(folder)
    held = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # the lock is one between processes
        assert pool.submit(is_held, folder).result()
        held.close()
        assert not pool.submit(is_held, folder).result()


def test_a_store_restores_and_keeps_what_it_replaces(tmp_path):
    snapshots = Snapshots(str(tmp_path / "snapshots"))
    store = RocksStore(tmp_path / "state", KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20, lock_wait_s=0.0, snapshots=snapshots)
    assert store.newest_snapshot(0, EPOCH) is None
    held = store.open(0, EPOCH)
    held.write([row_key(1, 1)], [b"early"], after(held.meta, 5))
    held.checkpoint(tmp_path / "checkpoint")
    snapshots.take(tmp_path / "checkpoint", held.meta)
    held.write([row_key(1, 1)], [b"late"], after(held.meta, 9))
    held.close()
    assert store.newest_snapshot(0, EPOCH) == 5
    with pytest.raises(StateError, match="no snapshot"):
        store.restore(0, EPOCH, first=7)
    held = store.restore(0, EPOCH)
    assert (held.meta.applied_offset, held.get([row_key(1, 1)])) == (5, [b"early"])
    held.close()
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["0", "0.aside-1"]

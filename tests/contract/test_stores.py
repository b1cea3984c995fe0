"""One suite over every store: RocksDB and the one in memory keep the same promises."""

import dataclasses

import numpy as np
import pytest

from features.ports import SequenceCorruptError
from features.sequence import Definition
from streams.errors import StateError
from streams.memory import MemoryStore
from streams.state import Meta, row_key, row_keys
from streams.store import RocksStore

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

"""State read for a person: what is found, counted and refused, from both kinds of folders."""

import numpy as np
import pytest
from streams_world import DOMAIN

from features.actions import EVENT_DTYPE
from features.ports import SequenceUnavailableError
from features.sequence import Row, definition, encode_row
from streams.errors import StateError
from streams.inspection import find_user, opened, partitions_below, summarise
from streams.state import Meta, definitions, fingerprints, row_key
from streams.store import RocksStore
from streams.view import PartitionView

KEPT = definitions(DOMAIN)


def row(user_id: int, count: int, offset: int, erased_before_ms: int = -1) -> bytes:
    events = np.zeros(count, EVENT_DTYPE)
    events["event_time_ms"] = np.arange(count) + 1
    return encode_row(Row(user_id, definition(DOMAIN, "main").fingerprint, 7, 1, offset, erased_before_ms, events))


@pytest.fixture(params=["view", "store"])
def filled(request, tmp_path):
    """Partition 0 without a record, partition 1 with five users."""
    meta = Meta(7, 1, 90, 1_000, fingerprints(KEPT))
    rows = [row(1, 0, 10, erased_before_ms=5), row(2, 1, 20), row(3, 7, 90), row(4, 20, 80), row(5, 20, 70)]
    keys = [row_key(1, user) for user in range(1, 6)]
    if request.param == "store":
        store = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
        store.open(0, 7).close()
        held = store.open(1, 7)
        held.write(keys, rows, meta)
        held.close()
    else:
        for partition, items in ((0, []), (1, list(zip(keys, rows, strict=True)))):
            view = PartitionView(tmp_path, partition, map_bytes=1 << 20)
            view.rebuild(items, meta if items else Meta(7, 0, -1, 0, fingerprints(KEPT)))
            view.beat(1_234)
            view.close()
    (tmp_path / "1.aside").mkdir()
    return request.param, tmp_path


def test_a_user_is_found_in_whatever_partition_has_them(filled):
    where, folder = filled
    assert partitions_below(folder) == [0, 1]
    main, few_views = find_user(where, folder, 3, [1, 2])
    assert main.row is not None
    assert (len(main.row.events), main.row.offset, main.meta.applied_offset) == (7, 90, 90)
    assert (few_views.row, few_views.row_bytes) == (None, 0)
    assert find_user(where, folder, 99, [1, 2]) == []


def test_a_partition_is_counted_by_its_headers(filled):
    where, folder = filled
    found = summarise(where, folder, 1, rows_max=1_000)
    sequence = found.sequences[1]
    assert (sequence.rows, sequence.events, sequence.erased, sequence.newest_offset) == (5, 48, 1, 90)
    assert sequence.row_bytes == 5 * 64 + 48 * 40
    assert sequence.lengths.tolist() == [1, 1, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
    assert found.complete
    assert found.disk_bytes > 0
    assert (found.meta.log_epoch, found.meta.log_clock_ms) == (7, 1_000)
    part = summarise(where, folder, 1, rows_max=2)
    assert (part.complete, part.sequences[1].rows) == (False, 2)
    empty = summarise(where, folder, 0, rows_max=10)
    assert (empty.meta.applied_offset, empty.sequences, empty.complete) == (-1, {}, True)


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(SequenceUnavailableError, match="no view of partition 3"), opened("view", tmp_path, 3):
        pass
    with pytest.raises(StateError, match="no state of partition 3"), opened("store", tmp_path, 3):
        pass


def test_looking_at_a_store_writes_nothing(tmp_path):
    store = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
    held = store.open(1, 7)
    held.write([row_key(1, 2)], [row(2, 1, 20)], Meta(7, 1, 20, 5, fingerprints(KEPT)))
    held.close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir() if not path.name.startswith("LOG")}
    with opened("store", tmp_path, 1) as source:
        assert [key for key, _ in source.scan()] == [row_key(1, 2)]
    assert {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir() if not path.name.startswith("LOG")} == files


def test_a_stores_statistics_move(tmp_path):
    store = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
    held, other = store.open(1, 7), store.open(2, 7)
    before = store.statistics()
    for partition in (held, other):
        users = np.arange(1, 2_001)
        keys, rows = [row_key(1, int(user)) for user in users], [row(int(user), 20, 20) for user in users]
        for offset in range(3):
            partition.write(keys, rows, Meta(7, partition.meta.partition, offset, 5, fingerprints(KEPT)))
        assert None not in partition.get(keys)
    after = store.statistics()
    assert before.keys() == after.keys()
    for name in ("rocksdb_memtable_bytes", "rocksdb_cache_bytes", "rocksdb_written_bytes", "rocksdb_files_bytes", "rocksdb_cache_misses"):
        assert after[name] > before[name], name
    held.close()
    assert store.statistics()["rocksdb_files_bytes"] < after["rocksdb_files_bytes"] + 1  # a closed partition is left out, not an error
    other.close()

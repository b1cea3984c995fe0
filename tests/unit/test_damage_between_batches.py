"""What is due between batches meets damage: nothing of it may be taken for an old row, or for a purge that was done."""

import numpy as np
import pytest

from features.actions import EVENT_DTYPE
from features.ports import SequenceCorruptError
from features.sequence import NEVER_ERASED, Definition, Row, encode_row
from streams.errors import StateError
from streams.eviction import EvictionPass
from streams.memory import MemoryStore
from streams.state import Meta, row_key, row_keys
from streams.store import RocksStore

DAY_MS = 24 * 3600 * 1000
KEPT = {1: Definition(fingerprint=11, length=3, evict_age_ms=DAY_MS)}
EPOCH = 77


class NoView:
    def trim(self, *_: object) -> None:
        raise AssertionError("nothing may leave")


def test_a_damaged_time_does_not_make_a_row_old():
    held = MemoryStore(KEPT).open(0, EPOCH)
    events = np.zeros(1, EVENT_DTYPE)
    events["event_time_ms"] = 100 * DAY_MS
    row = bytearray(encode_row(Row(7, 11, EPOCH, 0, 0, NEVER_ERASED, events)))
    row[64 + 4] = 0  # a young event looks months old
    held.write([row_key(1, 7)], [bytes(row)], Meta(EPOCH, 0, 0, 100 * DAY_MS, ((1, 11),)))
    eviction = EvictionPass(KEPT)
    assert eviction.due(0, held)
    with pytest.raises(SequenceCorruptError, match="checksum"):
        eviction.run(0, held, NoView())
    assert held.get([row_key(1, 7)]) == [bytes(row)]


def test_a_purge_that_could_not_rewrite_a_table_is_not_done(tmp_path):
    store = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
    held = store.open(0, EPOCH)
    users = np.arange(20_000, dtype=np.uint64)
    held.write(row_keys(1, users), [bytes(50)] * len(users), Meta(EPOCH, 0, 1, 1, ((1, 11),)))
    held.checkpoint(tmp_path / "checkpoint")  # everything is in tables now
    held.close()
    table = max((tmp_path / "0").glob("*.sst"), key=lambda path: path.stat().st_size)
    data = bytearray(table.read_bytes())
    data[len(data) // 3] ^= 1
    table.write_bytes(data)
    held = store.open(0, EPOCH)
    with pytest.raises((SequenceCorruptError, StateError)):
        held.purge(None)
    held.close()


def test_a_purge_that_was_stopped_is_not_done(tmp_path):
    held = RocksStore(tmp_path, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
    held.write([row_key(1, 7)], [bytes(50)], Meta(EPOCH, 0, 1, 1, ((1, 11),)))
    held.checkpoint(tmp_path / "checkpoint")
    held.stop_purge()
    with pytest.raises(StateError):
        held.purge([row_key(1, 7)])
    held.close()

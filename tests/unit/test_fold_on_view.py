"""A batch takes the old rows from the view where that shows the store's moment and is whole, else from the store."""

import numpy as np
import pytest
from streams_world import DOMAIN

from features.actions import encode_action
from features.ids import user_key
from features.sequence import decode_row
from streams.core import Log, WorkerCore
from streams.memory import MemoryStore
from streams.records import Records
from streams.state import definitions, row_key
from streams.view import PartitionView

USER, NOW_MS = 7, 1_000_000
KEY = row_key(1, USER)


@pytest.fixture(params=[True, False])
def core(request, tmp_path):
    found = WorkerCore(
        DOMAIN,
        MemoryStore(definitions(DOMAIN)),
        lambda partition: PartitionView(tmp_path, partition, map_bytes=1 << 20),
        lambda _: None,
        folds_on_view=request.param,
    )
    found.follow(Log("actions", 7, 1, lambda _: (0, 100)))
    found.open(0)
    yield found
    found.close()


def act(core, offset):
    value = encode_action(user_id=USER, entity_kind=1, entity_id=offset, action=1, event_time_ms=NOW_MS + offset, event_id=offset)
    core.apply(0, Records(np.array([offset]), [user_key(USER)], [value], np.array([NOW_MS + offset])))
    held = core.held()[0]
    (stored,), (seen,) = held.store.get([KEY]), held.view.rows([KEY], held.store.meta)
    assert stored == seen
    return decode_row(stored).events["entity_id"].tolist()


def test_both_give_the_same(core):
    assert [act(core, offset) for offset in range(3)] == [[0], [0, 1], [0, 1, 2]]


def test_a_damaged_view_is_no_damaged_state_and_is_written_anew(core):
    act(core, 0)
    held = core.held()[0]
    (row,) = held.store.get([KEY])
    held.view._put([(KEY, row[:-1] + bytes((row[-1] ^ 1,)))])
    assert act(core, 1) == [0, 1]
    assert core.statistics()["repairs"] == 0


def test_a_view_of_another_moment_is_not_asked(core):
    act(core, 0)
    held = core.held()[0]
    assert held.view.rows([KEY], held.store.meta) is not None
    act(core, 1)
    before = held.store.meta
    act(core, 2)
    assert held.view.rows([KEY], before) is None


def test_a_row_that_the_view_lacks_is_the_stores(core):
    act(core, 0)
    core.held()[0].view._delete([KEY])
    assert act(core, 1) == [0, 1]


def test_a_view_that_cannot_be_read_is_not_asked(core):
    act(core, 0)
    held = core.held()[0]
    held.view._environment.close()
    assert held.view.rows([KEY], held.store.meta) is None

"""What the core opens where there are snapshots, or should be: with a store in memory whose snapshots are as each test says."""

from dataclasses import replace

import pytest
from streams_world import DOMAIN

from features.ports import SequenceCorruptError
from streams.core import Log, WorkerCore
from streams.errors import SnapshotError, StateError
from streams.memory import MemoryStore
from streams.state import definitions
from streams.view import PartitionView

EPOCH = 7
FAR = 2_000_000


class Store(MemoryStore):
    """`snapshots`: offsets, newest first, or the error of asking for them; `damaged`: offsets of those whose rows cannot be read."""

    def __init__(self, snapshots=(), damaged=(), corrupt_on_open=False):
        super().__init__(definitions(DOMAIN))
        self.snapshots, self.damaged, self.corrupt_on_open = snapshots, damaged, corrupt_on_open
        self.asked = 0

    def start(self, offset):
        held = MemoryStore.open(self, 0, EPOCH)
        held.write([], [], replace(held.meta, applied_offset=offset))
        held.close()

    def open(self, partition, log_epoch):
        if self.corrupt_on_open:
            self.corrupt_on_open = False
            raise SequenceCorruptError("a block")
        return super().open(partition, log_epoch)

    def start_over(self, partition, log_epoch, start_offset):
        self.corrupt_on_open = False  # what could not be opened is set aside
        return super().start_over(partition, log_epoch, start_offset)

    def newest_snapshot(self, *_):
        self.asked += 1
        if isinstance(self.snapshots, Exception):
            raise self.snapshots
        return self.snapshots[0] if self.snapshots else None

    def restore(self, partition, log_epoch, *, first=0, skip=0):
        usable = [offset for offset in self.snapshots if offset + 1 >= first][skip:]
        if not usable:
            raise StateError("no snapshot could be restored")
        self._partitions.pop(partition, None)
        held = super().open(partition, log_epoch)
        held.write([], [], replace(held.meta, applied_offset=usable[0]))
        if usable[0] in self.damaged:
            held.scan = broken_scan
        return held


def broken_scan():
    raise SequenceCorruptError("a block of the snapshot")


@pytest.fixture
def opened(tmp_path):
    """`opened(store, first, following)`: the offset that the core reads from."""
    views = []

    def open_view(partition):
        views.append(PartitionView(tmp_path, partition, map_bytes=1 << 20))
        return views[-1]

    def open_with(store, first=0, following=FAR, policy="fail"):
        core = WorkerCore(DOMAIN, store, open_view, lambda _: None, offset_below_retention=policy)
        core.follow(Log("actions", EPOCH, 1, lambda _: (first, following)))
        try:
            return core.open(0)
        finally:
            core.close()

    return open_with


def test_a_usual_restart_asks_for_no_snapshot(opened):
    assert opened(Store(SnapshotError("unreachable")), following=0) == 0
    store = Store(SnapshotError("unreachable"))
    store.start(500)
    assert opened(store, following=1_000) == 501
    assert store.asked == 0


def test_an_empty_state_starts_from_the_newest_snapshot(opened):
    assert opened(Store([900, 400])) == 901


def test_a_state_is_replaced_only_by_a_snapshot_far_ahead(opened):
    store = Store([900])
    store.start(100)
    assert opened(store) == 101
    store = Store([1_500_000])
    store.start(100)
    assert opened(store) == 1_500_001


def test_snapshots_that_cannot_be_reached_matter_only_where_the_log_alone_does_not_do(opened):
    store = Store(SnapshotError("unreachable"))
    assert opened(store) == 0
    store.start(100)
    assert opened(store) == 101
    for policy in ("fail", "earliest"):  # never start over where a snapshot may be
        with pytest.raises(SnapshotError):
            opened(store, first=200, policy=policy)
    assert opened(Store(SnapshotError("unreachable"), corrupt_on_open=True)) == 0
    with pytest.raises(SnapshotError):
        opened(Store(SnapshotError("unreachable"), corrupt_on_open=True), first=200)


def test_where_no_snapshot_can_be_restored_the_log_does_if_it_has_everything(opened):
    store = Store([900])
    store.restore = broken_restore
    assert opened(store) == 0
    store.start(100)
    with pytest.raises(StateError, match="retention removed"):
        opened(store, first=200)


def broken_restore(*_, **__):
    raise StateError("all damaged")


@pytest.mark.parametrize("corrupt_on_open", [False, True])
def test_snapshots_whose_rows_are_damaged_are_tried_once_each(opened, corrupt_on_open):
    assert opened(Store([900, 800, 700], damaged={900, 800}, corrupt_on_open=corrupt_on_open)) == 701
    assert opened(Store([1_900_000, 700], damaged={1_900_000}, corrupt_on_open=corrupt_on_open)) == 701
    assert opened(Store([900, 800], damaged={900, 800}, corrupt_on_open=corrupt_on_open)) == 0
    with pytest.raises(StateError, match="the log starts at 750"):
        opened(Store([900, 700], damaged={900}, corrupt_on_open=corrupt_on_open), first=750)


def test_a_snapshot_ahead_of_the_log_is_not_restored(opened):
    assert opened(Store([900], corrupt_on_open=True), following=500) == 0


def test_where_the_last_snapshot_put_in_place_cannot_be_opened_the_log_does(opened):
    """All snapshots are whole files of damaged states: the last one tried stands where the own state was."""

    def broken_in_place(*_, **__):
        store.corrupt_on_open = True
        store._partitions.pop(0, None)
        raise StateError("no snapshot could be restored")

    store = Store([1_500_000])
    store.start(100)
    store.restore = broken_in_place
    assert opened(store) == 0
    store = Store([900])
    store.start(100)
    store.restore = broken_in_place
    with pytest.raises(StateError, match="the log starts at 200"):
        opened(store, first=200)

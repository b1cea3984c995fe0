"""When snapshots are taken, and that nothing that goes wrong with them stops the worker."""

import threading
import time
from dataclasses import replace

import pytest

from features.sequence import Definition
from streams.errors import SnapshotError
from streams.snapshot_service import SnapshotService
from streams.snapshots import Snapshots
from streams.state import row_key
from streams.store import RocksStore

KEPT = {1: Definition(fingerprint=11, length=3)}


def eventually(condition, what):
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(str(tmp_path / "snapshots"), grace_s=0.0)


@pytest.fixture
def held(tmp_path):
    found = RocksStore(tmp_path / "state", KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, 77)
    found.write([row_key(1, 1)], [b"row"], replace(found.meta, applied_offset=5))
    yield found
    found.close()


@pytest.fixture
def new_service(tmp_path, snapshots, monkeypatch):
    monkeypatch.setattr("streams.snapshot_service._FLUSHED_S", 0.0)
    started = []

    def start(**given):
        started.append(SnapshotService(snapshots, tmp_path / "state" / "checkpoints", **{"every_s": 3600.0, "keep": 2, **given}))
        return started[-1]

    yield start
    for service in started:
        service.close()


def run(service, held, until):
    def reached():
        service.upkeep([held])
        return until()

    eventually(reached, service.statistics())


def test_a_partition_without_a_snapshot_gets_one_at_once_and_then_in_time(new_service, snapshots, held, tmp_path):
    service = new_service()
    run(service, held, lambda: service.statistics()["snapshots_taken"] == 1)
    assert [m.applied_offset for m in snapshots.manifests()] == [5]
    assert service.partitions()[0]["offset"] == 5
    assert 0 <= service.partitions()[0]["age_s"] < 20
    assert service.statistics()["snapshot_bytes_uploaded"] == snapshots.manifests()[0].size
    held.write([], [], replace(held.meta, applied_offset=6))
    for _ in range(20):
        service.upkeep([held])
    service.close()
    assert service.statistics()["snapshots_taken"] == 1
    assert not (tmp_path / "state" / "checkpoints").exists()


def test_a_restarted_worker_goes_on_from_the_age_of_the_newest_one(new_service, snapshots, held, tmp_path):
    held.checkpoint(tmp_path / "checkpoint")
    snapshots.take(tmp_path / "checkpoint", held.meta)
    held.write([], [], replace(held.meta, applied_offset=6))
    service = new_service()
    run(service, held, lambda: service.partitions().get(0, {}).get("offset") == 5)
    for _ in range(20):
        service.upkeep([held])
    service.close()
    assert service.statistics()["snapshots_taken"] == 0


def test_snapshots_repeat_and_expire_but_not_without_news(new_service, snapshots, held):
    service = new_service(every_s=0.01)
    for offset in range(6, 10):
        held.write([row_key(1, 1)], [b"row"], replace(held.meta, applied_offset=offset))
        run(service, held, lambda offset=offset: service.partitions().get(0, {}).get("offset") == offset)
    run(service, held, lambda: service.statistics()["snapshots_expired"] >= 2)
    taken = service.statistics()["snapshots_taken"]
    for _ in range(50):
        service.upkeep([held])
        time.sleep(0.001)  # more than every_s in all
    assert service.statistics()["snapshots_taken"] == taken
    assert [m.applied_offset for m in snapshots.manifests()] == [9, 8]


def test_failures_are_counted_and_tried_again(new_service, snapshots, held, monkeypatch):
    monkeypatch.setattr("streams.snapshot_service._RETRY_S", 0.01)
    take, fails = snapshots.take, [SnapshotError("unreachable"), RuntimeError("a bug")]
    monkeypatch.setattr(snapshots, "take", lambda *args, **given: take(*args, **given) if not fails else (_ for _ in ()).throw(fails.pop()))
    service = new_service()
    run(service, held, lambda: service.statistics()["snapshots_taken"] == 1)
    assert service.statistics()["snapshots_failed"] == 2


def test_a_checkpoint_that_fails_stops_nothing(new_service, held, monkeypatch):
    monkeypatch.setattr("streams.snapshot_service._RETRY_S", 0.01)
    checkpoint, fails = held.checkpoint, [OSError("no space")]
    monkeypatch.setattr(held, "checkpoint", lambda path: checkpoint(path) if not fails else (_ for _ in ()).throw(fails.pop()))
    service = new_service()
    run(service, held, lambda: service.statistics()["snapshots_taken"] == 1)
    assert service.statistics()["snapshots_failed"] == 1


def test_while_an_upload_takes_long_the_worker_goes_on_and_can_end(new_service, snapshots, held, monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    def slow(*_, cancelled, **__):
        entered.set()
        assert leave.wait(20)
        assert cancelled()
        raise SnapshotError("cancelled")

    monkeypatch.setattr(snapshots, "take", slow)
    service = new_service(every_s=0.01)
    run(service, held, entered.is_set)
    started_s = time.monotonic()
    for offset in range(6, 106):
        held.write([row_key(1, 1)], [b"row"], replace(held.meta, applied_offset=offset))
        service.upkeep([held])
    service.close(timeout_s=0.01)
    assert time.monotonic() - started_s < 5
    leave.set()


def test_what_is_not_held_any_more_is_forgotten(new_service, held):
    service = new_service()
    run(service, held, lambda: service.statistics()["snapshots_taken"] == 1)
    service.upkeep([])
    assert service.partitions() == {}

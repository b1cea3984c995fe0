"""A worker that lost its state, or meets damage in it, on a real broker: it restores, and its state is the naive fold again."""

import json
import shutil
import urllib.request
from dataclasses import replace

import pytest
from streams_world import World, check_fold, eventually, new_world, random_load, worker

from streams.producer import ActionProducer
from streams.snapshots import Snapshots

pytestmark = pytest.mark.servers


@pytest.fixture
def world(kafka, tmp_path, request) -> World:
    found = new_world(kafka.bootstrap, tmp_path, request.node.name.translate(str.maketrans("[] ,", "----")).strip("-"))
    config = replace(found.config, snapshot_url=str(tmp_path / "snapshots"), snapshot_every_s=3600.0)
    return replace(found, config=config)


@pytest.fixture
def producer(world):
    found = ActionProducer(world.kafka, world.domain, world.topics.actions)
    yield found
    found.close()


def produce(producer: ActionProducer, seed: int, count: int = 3_000) -> None:
    producer.produce_many(*random_load(count, 60, seed=seed))
    producer.flush()


def health(ready: dict) -> dict:
    with urllib.request.urlopen(ready["health"], timeout=10) as answer:
        return json.loads(answer.read())


def snapshot_offsets(world: World) -> dict[int, int]:
    found: dict[int, int] = {}
    for manifest in Snapshots(world.config.snapshot_url).manifests():
        found.setdefault(manifest.partition, manifest.applied_offset)
    return found


def run_until_snapshots(world: World, count: int = 3) -> dict[int, int]:
    """Runs a worker until it has snapshots of all partitions; returns their offsets."""
    with worker(world.config) as running:
        running.ready()
        eventually(lambda: len(snapshot_offsets(world)) == count, "a snapshot of each partition")
        running.process.terminate()
        assert running.wait() == 0
    return snapshot_offsets(world)


def test_a_killed_worker_without_its_folders_restores_and_reads_only_the_rest(world, producer):
    produce(producer, 1)
    offsets = run_until_snapshots(world)
    with worker(world.config) as running:
        running.ready()
        produce(producer, 2)
        reader = world.reader()
        world.wait_applied(reader)
        reader.close()
        running.kill()
    shutil.rmtree(world.config.state_folder)
    shutil.rmtree(world.config.view_folder)
    with worker(world.config) as running:
        report = health(running.ready())
        reader = world.reader()
        assert check_fold(world, reader) == 60
        assert report["statistics"]["events"] == sum(world.ends().values()) - sum(offset + 1 for offset in offsets.values())
        assert {int(n): snapshot["offset"] for n, snapshot in report["snapshots"].items()} in ({}, offsets)
        reader.close()


@pytest.mark.parametrize("met", ["on open", "in a batch"])
def test_a_damaged_block_is_set_aside_and_the_state_restored(world, producer, met, capfd):
    produce(producer, 1)
    run_until_snapshots(world)
    for partition in range(3):
        table = max((world.config.state_folder / str(partition)).glob("*.sst"), key=lambda path: path.stat().st_size)
        data = bytearray(table.read_bytes())
        for place in range(len(data) // 8, len(data) // 2, 4_096):
            data[place] ^= 1
        table.write_bytes(data)
    if met == "on open":  # the view is made anew: every row is read
        shutil.rmtree(world.config.view_folder)
    with worker(world.config) as running:
        at = running.ready()
        produce(producer, 2)
        reader = world.reader()
        assert check_fold(world, reader) == 60
        assert health(at)["statistics"]["repairs"] == 3
        reader.close()
    assert {path.name for path in world.config.state_folder.glob("*.aside-*")} == {f"{n}.aside-1" for n in range(3)}
    error = capfd.readouterr().err
    assert "DAMAGED STATE" in error
    assert "block checksum mismatch" in error


def test_without_a_snapshot_a_damaged_state_is_made_again_from_the_log(world, producer):
    world = replace(world, config=replace(world.config, snapshot_url=""))
    produce(producer, 1)
    with worker(world.config) as running:
        running.ready()
        running.process.terminate()
        assert running.wait() == 0
    for partition in range(3):
        (world.config.state_folder / str(partition) / "CURRENT").write_text("MANIFEST-")
    with worker(world.config) as running:
        assert health(running.ready())["statistics"]["repairs"] == 3
        reader = world.reader()
        assert check_fold(world, reader) == 60
        reader.close()


def test_where_retention_removed_the_start_a_snapshot_is_the_state(world, producer, capfd):
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    produce(producer, 1)
    offsets = run_until_snapshots(world)
    produce(producer, 2)
    with worker(world.config) as running:
        running.ready()
        reader = world.reader()
        assert check_fold(world, reader) == 60
        expected = reader.read("main", list(range(1, 61)))
        running.process.terminate()
        assert running.wait() == 0
    admin = AdminClient({"bootstrap.servers": world.kafka.bootstrap})
    places = [TopicPartition(world.topics.actions, partition, offset + 1) for partition, offset in offsets.items()]
    for future in admin.delete_records(places).values():
        future.result()
    shutil.rmtree(world.config.state_folder)
    shutil.rmtree(world.config.view_folder)
    with worker(world.config) as running:
        running.ready()
        world.wait_applied(reader)
        again = reader.read("main", list(range(1, 61)))
        assert [(r.row, r.watermark) for r in again] == [(r.row, r.watermark) for r in expected]
        running.process.terminate()
        assert running.wait() == 0
    reader.close()
    for manifest in Snapshots(world.config.snapshot_url).manifests():
        (world.config.state_folder.parent / "snapshots" / manifest.name).unlink()
    shutil.rmtree(world.config.state_folder)
    with worker(world.config) as running:
        assert running.wait() == 1
    assert "there is no state and the log now starts at" in capfd.readouterr().err


def test_snapshots_that_cannot_be_reached_stop_no_worker(world, producer):
    options = {"client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}, "key": "someone", "secret": "hidden"}
    options["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    world = replace(world, config=replace(world.config, snapshot_url="s3://bucket/state", snapshot_options=options))
    produce(producer, 1)
    with worker(world.config) as running:
        at = running.ready()
        reader = world.reader()
        assert check_fold(world, reader) == 60
        eventually(lambda: health(at)["statistics"]["snapshots_failed"], "an attempt")
        produce(producer, 2)
        assert check_fold(world, reader) == 60
        assert health(at)["healthy"]
        reader.close()

"""Sequences read from wherever they are, while real workers on two "machines" come, stand by and die; and a watch of one of them."""

import queue
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
from readers_world import Routed, serving
from streams_world import World, eventually, new_world, random_load, read_log, worker
from typer.testing import CliRunner

from deploy import cli
from features.oracle import naive_fold
from features.ports import Origin, Position, SequenceUnavailableError
from features.sequence import decode_row, definition
from streams.broadcast import Announcements
from streams.owners import Owners
from streams.producer import ActionProducer
from streams.reader_service import ReaderConfig
from streams.remote_reader import RemoteReader

pytestmark = pytest.mark.servers

USERS = list(range(1, 61))


class Machine:
    """A view, the reader beside it, and the configuration of the worker that writes it."""

    def __init__(self, world: World, folder, name: str, stack: ExitStack, **given) -> None:
        view = folder / name / "view"
        self.reader = stack.enter_context(ExitStack())
        self.address = self.reader.enter_context(serving(ReaderConfig(world.domain, view, 4)))
        own = {"instance": name, "state_folder": folder / name / "state", "view_folder": view, "session_timeout_ms": 2_000}
        self.config = replace(world.config, **own, reader_address=self.address, **given)


def check(world: World, source: Routed) -> None:
    """What the source reads now is the naive fold of the log, up to its end."""
    for batch in read_log(world):
        end = Position(world.identity.epoch, batch.partition, int(batch.offsets[-1]))
        for user, naive in naive_fold([batch]).items():
            (reading,) = source.read("main", [user], after=[end], wait_s=20.0)
            assert reading.watermark == end
            assert decode_row(reading.row, user).events.tobytes() == naive.sequence(definition(world.domain, "main")).tobytes()


def test_owners_are_found_while_they_change_and_die(kafka, tmp_path):
    world = new_world(kafka.bootstrap, tmp_path, "anywhere", partition_count=4)
    producer, owners = ActionProducer(world.kafka, world.domain, world.topics.actions), Owners()
    producer.produce_many(*random_load(1_000, 60, seed=1))
    producer.flush()

    def of_all(address: str) -> bool:
        return {owners.route(partition).owner for partition in range(4)} == {address}

    with ExitStack() as stack:
        stack.callback(producer.close)
        news = Announcements(world.kafka, world.topics.announcements, on_change=owners.take)
        stack.callback(news.close)
        source = Routed(tmp_path / "none", owners, domain=world.domain, partition_count=4, fresh_ms=5_000)
        stack.callback(source.close)
        with pytest.raises(SequenceUnavailableError, match="none is announced"):
            source.read("main", USERS)
        a, b = Machine(world, tmp_path, "a", stack), Machine(world, tmp_path, "b", stack, standby=True)
        first = stack.enter_context(worker(a.config))
        first.ready()
        eventually(lambda: of_all(a.address), "the first worker says that it owns everything")
        check(world, source)
        stack.enter_context(worker(b.config)).ready()
        eventually(lambda: sum(owners.route(p).owner == b.address for p in range(4)) == 2, "two partitions were handed over")
        eventually(lambda: all(owners.route(p).standbys or owners.route(p).formers for p in range(4)), "and all have a second place")
        for partition in range(4):
            route = owners.route(partition)
            assert (route.standbys, route.formers) == (((b.address,), ()) if route.owner == a.address else ((), (a.address,)))

        watched = watch(b.address, world, 7)  # who owns the partition or follows it, either is watched
        first_row = watched.get(timeout=30)
        producer.produce(user_id=7, entity_kind="item", entity_id=2, action="click").result()
        while (row := watched.get(timeout=30)).events["entity_id"][-1:].tolist() != [2]:
            assert row.user_id == first_row.user_id == 7
        check(world, source)
        command = ["watch", "--user", "7", "--address", b.address, "--changes", "0", "--json", "--home", str(tmp_path)]
        shown = CliRunner().invoke(cli.app, [*command, "--domain", str(domain_file(tmp_path))])
        assert shown.exit_code == 0, shown.output
        assert '"watermark": "' in shown.stdout

        first.kill()
        a.reader.close()
        found = source.read("main", USERS, timeout_s=10.0)
        assert {reading.origin for reading in found} <= {Origin.OWNER, Origin.OLDER}
        assert [reading.user_id for reading in found] == USERS
        eventually(lambda: of_all(b.address), "the second worker owns everything")
        producer.produce_many(*random_load(500, 60, seed=2))
        producer.flush()
        check(world, source)
        assert {reading.origin for reading in source.read("main", USERS)} == {Origin.OWNER}
        assert source.statistics()["corrupt"] == 0
        b.reader.close()
        while watched.get(timeout=30) is not None:
            pass  # what the load did; the end says that a watch ends when its service drains


def domain_file(folder):
    from streams_world import DOMAIN_TOML

    path = folder / "domain.toml"
    path.write_text(DOMAIN_TOML)
    return path


def watch(address: str, world: World, user: int) -> queue.Queue:
    """The user's rows as they are told; None at the end."""
    rows: queue.Queue = queue.Queue()

    def run() -> None:
        reader = RemoteReader(address, world.domain)
        try:
            for reading in reader.watch("main", user):
                rows.put(decode_row(reading.row, user))
            rows.put(None)
        finally:
            reader.close()

    threading.Thread(target=run, daemon=True).start()
    return rows

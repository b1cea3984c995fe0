"""What only the routed source can get wrong: where it reads, what it does when a place is late, gone, or not what was announced."""

import asyncio
import multiprocessing
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from readers_world import (
    DOMAIN,
    EPOCH,
    PARTITIONS,
    USERS,
    OracleReader,
    Routed,
    announced,
    batches,
    build_view,
    partition_for,
    say,
    serving,
)

from features.actions import EVENT_DTYPE
from features.ports import Origin, Position, SequenceCorruptError, SequenceUnavailableError
from features.sequence import NEVER_ERASED, Row, definition, encode_row
from protos.v1 import sequence_pb2, sequence_pb2_grpc
from streams.core import fold_batch
from streams.memory import MemoryStore
from streams.owners import FORMER, OWNER, STANDBY
from streams.reader_service import ReaderConfig
from streams.state import definitions
from streams.view import PartitionView

FOLDED = batches(1)
OLD = [batch for batch in FOLDED if batch.offsets[0] == 0]
"""The first half of each partition's log: offsets to 39."""
NOWHERE = "127.0.0.1:1"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Reader services that stay: of the whole log, of its first half, of nothing; and folders like theirs (a process opens a view once)."""
    whole, old, none = (tmp_path_factory.mktemp(name) for name in ("whole", "old", "none"))
    build_view(whole, FOLDED, caught_up_ms=now_ms() + 3_600_000)
    build_view(old, OLD, caught_up_ms=now_ms() - 60_000)
    folders = [Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-here"))) for folder in (whole, old, none)]
    with (
        serving(ReaderConfig(DOMAIN, whole, PARTITIONS)) as at_whole,
        serving(ReaderConfig(DOMAIN, old, PARTITIONS)) as at_old,
        serving(ReaderConfig(DOMAIN, none, PARTITIONS)) as at_none,
    ):
        yield {"whole": at_whole, "old": at_old, "none": at_none, "folders": folders}


@contextmanager
def routed(folder, owners, **given):
    found = Routed(folder, owners, **given)
    try:
        yield found
    finally:
        found.close()


def origins(readings) -> set[Origin]:
    return {reading.origin for reading in readings}


def of_partition(number: int) -> list[int]:
    return [user for user in USERS if partition_for(user) == number]


def test_a_local_state_that_is_up_to_date_is_read_without_a_call(places):
    whole, old, _ = places["folders"]
    with routed(whole, announced(("a", places["old"], OWNER))) as reader:
        assert origins(reader.read("main", USERS)) == {Origin.LOCAL}
        assert reader.statistics()["calls"] == 0
    with routed(old, announced(("a", places["whole"], OWNER))) as reader:
        found = reader.read("main", USERS)
        assert (origins(found), found) == ({Origin.OWNER}, OracleReader(FOLDED).read("main", USERS))
        assert reader.statistics()["calls"] == 1, "one call for all users of an owner"
        assert reader.statistics()["owner"] == len(USERS)


@pytest.mark.parametrize("role", [STANDBY, FORMER])
def test_a_dead_owner_is_answered_for_by_the_furthest_older_state(places, role):
    _, old, none = places["folders"]
    owners = announced(("old", places["old"], FORMER), ("b", places["whole"], role), ("dead", NOWHERE, OWNER))
    with routed(old, owners) as reader:
        found = reader.read("main", USERS, timeout_s=10.0)
        assert (origins(found), found) == ({Origin.OLDER}, OracleReader(FOLDED).read("main", USERS))
        statistics = reader.statistics()
        assert (statistics["older"], statistics["links_tripped"], statistics["trips"]) == (len(USERS), 1, 1)
        started_s = time.monotonic()
        for _ in range(5):
            reader.read("main", USERS, timeout_s=10.0)
        assert time.monotonic() - started_s < 5.0
    with routed(old, announced(("dead", NOWHERE, OWNER))) as reader:
        found = reader.read("main", USERS, timeout_s=10.0)
        assert (origins(found), found) == ({Origin.OLDER}, OracleReader(OLD).read("main", USERS)), "this machine's, however old it is"
        assert all(reading.state_age_ms >= 60_000 for reading in found)
    with routed(none, announced(("dead", NOWHERE, OWNER))) as reader:
        with pytest.raises(SequenceUnavailableError, match=f"neither its owner .{NOWHERE}. nor an older state"):
            reader.read("main", USERS, timeout_s=10.0)
        assert reader.statistics()["unavailable"] > 0


def test_an_owner_that_is_late_is_passed_by_a_standby_that_is_not(places):
    none = places["folders"][2]
    with routed(none, announced(("a", places["whole"], STANDBY), ("late", places["old"], OWNER))) as reader:
        found = reader.read("main", USERS)
        assert (origins(found), found) == ({Origin.OLDER}, OracleReader(FOLDED).read("main", USERS))
    with routed(none, announced(("a", places["whole"], FORMER), ("late", places["old"], OWNER))) as reader:
        assert origins(reader.read("main", USERS)) == {Origin.OWNER}, "who gave it up is not asked while an owner answers"
        assert {reading.watermark.offset for reading in reader.read("main", USERS)} == {39}


def test_a_stale_announcement_leads_on_to_the_next(places):
    """Its address has another log's state, another partition's, or none."""
    whole, _, none = places["folders"]
    owners = announced(("a", places["whole"], STANDBY), ("stale", places["none"], OWNER))
    with routed(none, owners) as reader:
        found = reader.read("main", USERS)
        assert (origins(found), found) == ({Origin.OLDER}, OracleReader(FOLDED).read("main", USERS))
        assert reader.statistics()["links_tripped"] == 0, "the service is well, it only has no state"
    with routed(whole, announced(("other", places["whole"], OWNER), log_epoch=EPOCH + 1)) as reader:
        with pytest.raises(SequenceUnavailableError, match="another log"):
            reader.read("main", USERS)
        assert reader.statistics()["stale"] >= 2, "neither the view nor the address is of the owner's log"
    owners = announced(("a", places["whole"], OWNER))
    say(owners, "stale", places["none"], OWNER, 1)
    say(owners, "b", places["old"], STANDBY, 1)
    with routed(none, owners) as reader:
        found = reader.read("main", USERS)
        by_partition = {reading.watermark.partition: reading.origin for reading in found}
        assert by_partition == {0: Origin.OWNER, 1: Origin.OLDER}
        assert [reading.user_id for reading in found] == USERS


class Answering(sequence_pb2_grpc.SequenceReaderServicer):
    """A service that answers as it is told: with rows, whosever they are, or not before it is released."""

    def __init__(self, rows=(), *, partition=0, hangs=False) -> None:
        self.rows, self.partition, self.hangs = rows, partition, hangs
        self.ended, self.calls = threading.Event(), 0

    def GetSequences(self, _, context):  # noqa: N802
        self.calls += 1
        if self.hangs:
            context.add_callback(self.ended.set)
            self.ended.wait(30)
        at = sequence_pb2.UserSequence().watermark.__class__(log_epoch=EPOCH, partition=self.partition, offset=99)
        return sequence_pb2.GetSequencesResponse(sequences=[sequence_pb2.UserSequence(user_id=7, row=r, watermark=at) for r in self.rows])


@contextmanager
def answering(servicer):
    server = grpc.server(ThreadPoolExecutor(2))
    sequence_pb2_grpc.add_SequenceReaderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        servicer.ended.set()
        server.stop(None).wait()


def row_of(user: int) -> bytes:
    return encode_row(Row(user, definition(DOMAIN, "main").fingerprint, EPOCH, 0, 3, NEVER_ERASED, np.zeros(1, EVENT_DTYPE)))


def test_a_row_of_another_user_is_never_an_answer(places):
    none, (user, *_), other = places["folders"][2], of_partition(0), of_partition(1)[0]
    for rows in ([row_of(other)], [row_of(user)[:-1] + b"\xff"], [], [row_of(user)] * 2):
        with answering(Answering(rows)) as lying:
            with routed(none, announced(("a", places["whole"], STANDBY), ("lying", lying, OWNER))) as reader:
                assert reader.read("main", [user]) == OracleReader(FOLDED).read("main", [user])
                assert reader.statistics()["corrupt"] == 1
            with routed(none, announced(("lying", lying, OWNER))) as reader, pytest.raises(SequenceCorruptError, match="trusted"):
                reader.read("main", [user])
    with (
        answering(Answering([row_of(user)], partition=1)) as elsewhere,
        routed(none, announced(("a", elsewhere, OWNER))) as reader,
        pytest.raises(SequenceUnavailableError, match="another log"),
    ):
        reader.read("main", [user])


def test_an_owner_that_hangs_takes_half_of_the_time_and_is_then_not_asked(places):
    none, (user, *_) = places["folders"][2], of_partition(0)
    with answering(hanging := Answering(hangs=True)) as address:  # noqa: SIM117
        with routed(none, announced(("a", places["whole"], STANDBY), ("hangs", address, OWNER))) as reader:
            started_s = time.monotonic()
            assert origins(reader.read("main", [user], timeout_s=1.0)) == {Origin.OLDER}
            assert time.monotonic() - started_s < 1.0
            assert hanging.ended.wait(10), "the call ends with its deadline, at the owner too"
            calls = hanging.calls
            assert origins(reader.read("main", [user], timeout_s=1.0)) == {Origin.OLDER}
            assert (hanging.calls, reader.statistics()["trips"]) == (calls, 1)


def test_a_caller_that_goes_away_takes_its_call_along(places):
    none, (user, *_) = places["folders"][2], of_partition(0)
    with answering(hanging := Answering(hangs=True)) as address, routed(none, announced(("hangs", address, OWNER))) as reader:
        reading = asyncio.run_coroutine_threadsafe(reader.source.read("main", [user], timeout_s=30.0), reader.loop)
        deadline_s = time.monotonic() + 10
        while not hanging.calls:
            assert time.monotonic() < deadline_s
        reading.cancel()
        assert hanging.ended.wait(10)
        assert reader.statistics()["links_tripped"] == 0, "it says nothing about the owner"


def test_an_owner_that_comes_back_is_asked_again_and_one_that_is_withdrawn_is_let_go(places, tmp_path):
    none = places["folders"][2]
    build_view(tmp_path, FOLDED)
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        owners = announced(("a", address, OWNER))
        with routed(none, owners) as reader:
            with pytest.raises(SequenceUnavailableError):
                reader.read("main", USERS, timeout_s=5.0)
            held.close()
            with serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS, port=int(address.rpartition(":")[2]))):
                deadline_s = time.monotonic() + 20
                while True:
                    try:
                        assert origins(reader.read("main", USERS)) == {Origin.OWNER}
                        break
                    except SequenceUnavailableError:
                        assert time.monotonic() < deadline_s
                assert (reader.statistics()["links"], reader.statistics()["links_tripped"]) == (1, 0)
                for partition in range(PARTITIONS):
                    owners.take(f"owner/{partition}/a", None)
                with pytest.raises(SequenceUnavailableError, match="none is announced"):
                    reader.read("main", USERS)
                assert reader.statistics()["links"] == 0


def test_a_wait_ends_at_its_bound_with_what_there_is_and_does_not_poll_the_network(places):
    none, (user, *_) = places["folders"][2], of_partition(0)
    beyond = [Position(0, 0, 80)]
    for owners in (announced(("a", places["whole"], OWNER)), announced(("a", places["whole"], STANDBY), ("dead", NOWHERE, OWNER))):
        with routed(none, owners) as reader:
            reader.read("main", [user])
            calls, started_s = reader.statistics()["calls"], time.monotonic()
            (reading,) = reader.read("main", [user], after=beyond, wait_s=0.4)
            assert reading.watermark.offset == 79
            assert 0.05 < time.monotonic() - started_s < 5.0
            assert reader.statistics()["calls"] - calls <= 2
            others = [Position(EPOCH, 0, 79), Position(EPOCH, 1, 999), Position(5, 0, 999)]
            reader.read("main", [user], after=others, wait_s=9.0)
            assert time.monotonic() - started_s < 8.0, "what is included, and what cannot be compared, is not waited for"


def _advance(folders) -> None:
    """The worker folds the second half of partition 0's log."""
    held = MemoryStore(definitions(DOMAIN)).open(0, EPOCH)
    for batch in (batch for batch in FOLDED if batch.partition == 0):
        held.write(*fold_batch(definitions(DOMAIN), held, batch))
    for folder in folders:
        view = PartitionView(folder, 0, map_bytes=1 << 24)
        view.sync(held.meta, held.scan, 1_000_000)
        view.close()


def test_a_wait_ends_when_the_state_has_the_position(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    build_view(here, OLD, caught_up_ms=now_ms() + 3_600_000)
    build_view(there, OLD)
    (user, *_) = of_partition(0)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        owners = announced(("a", stack.enter_context(serving(ReaderConfig(DOMAIN, there, PARTITIONS, wait_s_max=60.0))), OWNER))
        readers = [stack.enter_context(routed(folder, owners)) for folder in (here, tmp_path / "none")]
        waits = [pool.submit(reader.read, "main", [user], 60.0, after=[Position(0, 0, 79)], wait_s=50.0) for reader in readers]
        process = multiprocessing.get_context("spawn").Process(target=_advance, args=((here, there),))
        process.start()
        found = [wait.result(60)[0] for wait in waits]
        process.join(30)
        assert [(reading.watermark.offset, reading.origin) for reading in found] == [(79, Origin.LOCAL), (79, Origin.OWNER)]
        assert [reader.statistics()["calls"] for reader in readers] == [0, 1], "one call waits, at the owner"

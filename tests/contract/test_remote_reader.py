"""What only a remote reader can get wrong: deadline, retries, trust, limits. What all readers have in common is in test_readers.py."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import lmdb
import numpy as np
import pytest
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from readers_world import DOMAIN, EPOCH, PARTITIONS, USERS, OracleReader, batches, build_view, partition_for, serving

from deploy.door import Doorkeeper
from deploy.guard import Tokens
from deploy.tls import server_credentials
from features.actions import EVENT_DTYPE
from features.ports import Door, SequenceCorruptError, SequenceUnavailableError
from features.sequence import NEVER_ERASED, Row, definition, encode_row
from protos.v1 import sequence_pb2, sequence_pb2_grpc
from streams.reader_service import ReaderConfig
from streams.remote_reader import RemoteReader
from streams.state import Meta, definitions, fingerprints, row_key
from streams.view import PartitionView

CHECK = health_pb2.HealthCheckRequest(service="freshrank.v1.SequenceReader")


def config(folder, **given) -> ReaderConfig:
    return ReaderConfig(DOMAIN, folder, PARTITIONS, **given)


@contextmanager
def remote(address: str, **given):
    reader = RemoteReader(address, given.pop("domain", DOMAIN), **{"timeout_s": 30.0, **given})
    try:
        yield reader
    finally:
        reader.close()


def longer(length: int):
    """The domain with another length of the sequence `main`."""
    return DOMAIN.model_copy(
        update={"sequence": {**DOMAIN.sequence, "main": DOMAIN.sequence["main"].model_copy(update={"length": length})}}
    )


@pytest.fixture
def free_port():
    """A port that nobody else gets while the test runs: it is bound, and shared only with who asks for it (SO_REUSEPORT)."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_without_a_service_the_deadline_ends_the_read(free_port):
    with remote(f"127.0.0.1:{free_port}", timeout_s=0.4) as reader:
        started_s = time.monotonic()
        with pytest.raises(SequenceUnavailableError, match=f"sequence reader 127.0.0.1:{free_port}: UNAVAILABLE"):
            reader.read("main", USERS)
        with pytest.raises(SequenceUnavailableError, match="UNAVAILABLE"):
            reader.position(USERS[0])
        assert time.monotonic() - started_s < 10
        found = reader.statistics()
        assert (found["calls"], found["unavailable"], found["reads"]) == (2, 2, 0)
        assert found["retries"] >= 2


def test_a_read_waits_for_a_service_that_is_not_ready_yet(tmp_path):
    with serving(config(tmp_path)) as address, remote(address) as reader, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, "main", USERS)
        while reader.statistics()["retries"] < 2:
            assert not reading.done()
        build_view(tmp_path, batches(1))
        assert reading.result(30) == OracleReader(batches(1)).read("main", USERS)
        assert reader.statistics()["unavailable"] == 0


def test_a_service_that_comes_back_is_found(tmp_path):
    build_view(tmp_path, batches(1))
    with ExitStack() as stack:
        with serving(config(tmp_path)) as address:
            reader = stack.enter_context(remote(address))
            before = reader.read("main", USERS)
        with serving(config(tmp_path, port=int(address.rpartition(":")[2]))):
            assert reader.read("main", USERS) == before


def test_a_service_without_a_view_says_so(tmp_path):
    with serving(config(tmp_path)) as address, remote(address, timeout_s=0.3) as reader:
        with pytest.raises(SequenceUnavailableError, match="is the worker running"):
            reader.read("main", USERS)
        with pytest.raises(SequenceUnavailableError, match="is the worker running"):
            reader.position(1)


def test_damage_in_the_state_is_corrupt_and_not_asked_for_again(tmp_path):
    build_view(tmp_path, batches(1))
    user = next(user for user in USERS if partition_for(user) == 0)
    with lmdb.open(str(tmp_path / "0"), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        row = transaction.get(row_key(1, user))
        transaction.put(row_key(1, user), row[:-1] + bytes([row[-1] ^ 1]))
    with serving(config(tmp_path)) as address, remote(address) as reader:
        with pytest.raises(SequenceCorruptError, match="checksum differs"):
            reader.read("main", [user])
        assert (reader.statistics()["corrupt"], reader.statistics()["retries"]) == (1, 0)


class Lying(sequence_pb2_grpc.SequenceReaderServicer):
    """A service whose answers are not what was asked for."""

    def __init__(self, rows: list[bytes]) -> None:
        self.rows = rows

    def GetSequences(self, request, context):  # noqa: N802
        del request, context
        return sequence_pb2.GetSequencesResponse(sequences=[sequence_pb2.UserSequence(user_id=7, row=row) for row in self.rows])


def row_of(user: int) -> bytes:
    return encode_row(Row(user, definition(DOMAIN, "main").fingerprint, EPOCH, 0, 3, NEVER_ERASED, np.zeros(1, EVENT_DTYPE)))


@pytest.mark.parametrize(
    ("rows", "says"),
    [([row_of(8)], "another user"), ([row_of(7)[:-1] + b"\xff"], "checksum differs"), ([b"short"], "trusted"), ([], "shorter")],
)
def test_an_answer_is_checked(rows, says):
    server = grpc.server(ThreadPoolExecutor(1))
    sequence_pb2_grpc.add_SequenceReaderServicer_to_server(Lying(rows), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with remote(f"127.0.0.1:{port}") as reader:
            with pytest.raises(SequenceCorruptError, match=says):
                reader.read("main", [7])
            assert reader.statistics()["corrupt"] == 1
            with pytest.raises(SequenceUnavailableError, match="UNIMPLEMENTED"):  # a service of before GetPosition
                reader.position(7)
    finally:
        server.stop(None).wait()


def test_a_service_of_other_definitions_is_not_read(tmp_path):
    build_view(tmp_path, batches(1))
    with serving(config(tmp_path)) as address, remote(address, domain=longer(5)) as reader:
        with pytest.raises(SequenceUnavailableError, match=r"other \[sequence\] definitions"):
            reader.read("main", USERS)
        assert reader.read("clicks", USERS) == OracleReader(batches(1)).read("clicks", USERS)


def test_after_close_nothing_is_read(tmp_path):
    with serving(config(tmp_path)) as address, remote(address) as reader:
        reader.close()
        with pytest.raises(SequenceUnavailableError, match="CANCELLED"):
            reader.read("main", USERS)


def test_only_calls_with_the_token_are_answered(tmp_path):
    build_view(tmp_path, batches(1))
    with serving(config(tmp_path, door=Door((Doorkeeper(Tokens("right"), 9),)))) as address:
        with remote(address, token="right") as reader:
            assert reader.read("main", USERS) == OracleReader(batches(1)).read("main", USERS)
            assert reader.position(USERS[0]).offset == 79
        for token in ("wrong", None):
            with remote(address, token=token) as reader:
                with pytest.raises(SequenceUnavailableError, match="UNAUTHENTICATED: authorization"):
                    reader.read("main", USERS)
                with pytest.raises(SequenceUnavailableError, match="UNAUTHENTICATED: authorization"):
                    reader.position(1)
                assert reader.statistics()["retries"] == 0
        with grpc.insecure_channel(address) as channel:
            health_pb2_grpc.HealthStub(channel).Check(CHECK, timeout=30)


def test_with_a_certificate_it_serves_beyond_loopback_and_only_encrypted(tmp_path):
    (tmp_path / "view").mkdir()
    build_view(tmp_path / "view", batches(1))
    chain, key = Authority("reader").files(tmp_path, "certificate")
    door = Door(credentials=server_credentials("0.0.0.0", chain, key))
    with serving(config(tmp_path / "view", host="0.0.0.0", door=door)) as bound:
        address = bound.replace("0.0.0.0", "127.0.0.1")
        with remote(address, root_certificate=tmp_path / "certificate.authority.pem") as reader:
            assert reader.read("main", USERS) == OracleReader(batches(1)).read("main", USERS)
        with remote(address, timeout_s=0.3) as reader, pytest.raises(SequenceUnavailableError, match="UNAVAILABLE"):
            reader.read("main", USERS)


def test_more_calls_at_once_than_allowed_are_refused(tmp_path):
    build_view(tmp_path, batches(1))
    with serving(config(tmp_path, calls_max=1)) as address, grpc.insecure_channel(address) as channel, remote(address) as patient:
        watching = health_pb2_grpc.HealthStub(channel).Watch(CHECK, timeout=60)
        next(watching)
        with remote(address, timeout_s=0.2) as reader, pytest.raises(SequenceUnavailableError, match="RESOURCE_EXHAUSTED"):
            reader.read("main", USERS)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(patient.read, "main", USERS)
            while not patient.statistics()["retries"]:
                assert not reading.done()
            watching.cancel()
            assert reading.result(30) == OracleReader(batches(1)).read("main", USERS)


def test_the_longest_rows_fit_the_answer_of_one_call(tmp_path):
    """Rows of 40 kB: fewer users a call, so that neither end meets the transport's limit."""
    domain, events, users = longer(1000), np.zeros(1000, EVENT_DTYPE), list(range(500))
    what = definition(domain, "main").fingerprint
    view = PartitionView(tmp_path, 0, map_bytes=1 << 26)
    rows = [encode_row(Row(user, what, EPOCH, 0, 3, NEVER_ERASED, events)) for user in users]
    view.write([row_key(1, user) for user in users], rows, Meta(EPOCH, 0, 3, 1, fingerprints(definitions(domain))))
    view.close()
    with serving(ReaderConfig(domain, tmp_path, 1)) as address, remote(address, domain=domain) as reader:
        assert [reading.row for reading in reader.read("main", users)] == rows
        assert reader.statistics()["calls"] == 2
        request = sequence_pb2.GetSequencesRequest(sequence="main", user_ids=np.array(users, "<u8").tobytes())
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            sequence_pb2_grpc.SequenceReaderStub(channel).GetSequences(request, timeout=30)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_threads_share_a_reader(tmp_path):
    build_view(tmp_path, batches(1))
    expected, start = OracleReader(batches(1)).read("main", USERS), threading.Barrier(4)

    def read(reader) -> bool:
        start.wait(30)
        return all(reader.read("main", USERS) == expected for _ in range(20))

    with serving(config(tmp_path)) as address, remote(address) as reader, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [reader] * 4))
        assert reader.statistics()["reads"] == 80

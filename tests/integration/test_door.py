"""The door of the gRPC servers, on real ones: the ranking server, and the sequence reader with the erasure service."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread

import grpc
import numpy as np
import pytest
import readers_world
from certificates import Authority, replace
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from joserfc import jwt
from joserfc.jwk import ECKey
from serving_world import NOW_MS, VIDEO, ImmediateSource, ListSink, MemoryReader, make_events, write_ranker, write_tables
from streams_world import eventually
from worker_world import scraped

from deploy.door import Doorkeeper, door
from deploy.guard import ADMIN, RANK, Tokens
from deploy.settings import Settings, SettingsError, load_settings
from deploy.tls import ServerIdentity, server_credentials
from features.ids import partition_of, user_key
from features.ports import Door, Position, SequenceCorruptError, SequenceUnavailableError
from inference.client import RankError, RankingClient, channel_credentials
from inference.server import RankingServer, ServerConfig
from inference.server_metrics import PREFIX, ServerMetrics
from inference.telemetry import Telemetry
from protos.v1.erasure_pb2 import EraseRequest, ErasureStatusRequest
from protos.v1.erasure_pb2_grpc import ErasureStub
from protos.v1.ranking_pb2 import RankRequest
from protos.v1.sequence_pb2 import GetPositionRequest
from protos.v1.sequence_pb2_grpc import SequenceReaderStub
from streams.erasure_audit import AUDIT
from streams.erasure_service import ErasureServiceConfig
from streams.kafka import KafkaConfig, Topics
from streams.reader_service import ReaderConfig
from streams.remote_reader import RemoteReader

TOKEN = "a-static-token-that-nobody-guesses"
KEY = ECKey.generate_key("P-256", {"kid": "k"}, True)
USER = 0xC0FFEE_DECADE
"""12 hexadecimal digits, 15 decimal ones: found in a log only if it was put there."""
AT_ONCE = 3
HELD_S = 150.0
"""How long a call that waits for a position may last: longer than all that a test does meanwhile, whose bounds add up to 120 s (60 until
all wait, then three calls of at most 20)."""


def signed(name: str, scope: str, *, live_s: int = 600) -> str:
    claims = {"sub": name, "scope": scope, "iss": "issuer", "aud": "freshrank", "exp": int(time.time()) + live_s}
    return jwt.encode({"alg": "ES256", "kid": "k"}, claims, KEY, algorithms=["ES256"])


def bearer(token: str | None) -> list[tuple[str, str]]:
    return [] if token is None else [("authorization", f"Bearer {token}")]


@dataclass
class World:
    settings: Settings
    ranking: str
    reader: str
    rows: MemoryReader
    keeper: Doorkeeper
    server: RankingServer

    def rank(self, token: str | None = TOKEN, *, timeout_s: float = 20, **given):
        with RankingClient(self.ranking, timeout_s=timeout_s, token=token) as client:
            request = {"ranker": "home", "user_id": USER, "candidates": [1, 2, 3], "kinds": VIDEO, "request_time_ms": NOW_MS}
            return client.rank(**request | given)

    def wait_for_calls(self, count: int) -> None:
        """Until so many are under way. Between two looks the interpreter is the server's and the clients', which run in this process."""
        eventually(lambda: self.keeper.statistics()["calls"] >= count, f"{count} calls are under way")

    def code(self, **given) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(RankError) as caught:
            self.rank(**given)
        return caught.value.code, str(caught.value)


@contextmanager
def running_loop():
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    """Servers as `deploy` makes them from settings; Triton is away, so the embedding tier answers."""
    folder = tmp_path_factory.mktemp("door")
    (folder / "jwks.json").write_text(json.dumps({"keys": [KEY.as_dict(private=False)]}))
    secrets = {"server_token": TOKEN, "auth_jwks": folder / "jwks.json", "auth_issuer": "issuer", "auth_audience": "freshrank"}
    settings = load_settings(home=folder, calls_per_client_max=AT_ONCE, **secrets)
    write_ranker(folder / "releases", write_tables(folder / "tables"), "home")
    (folder / "view").mkdir()
    readers_world.build_view(folder / "view", readers_world.batches(1))
    rows = MemoryReader()
    rows.put(USER, make_events(5))
    config = ServerConfig(
        releases=folder / "releases",
        tables=folder / "tables",
        repository=folder / "repository",
        triton="127.0.0.1:1",
        door=door(settings, "127.0.0.1"),
        timeout_s=10.0,
        deadline_s_max=HELD_S,
        after_wait_s_max=HELD_S,
        message_bytes_max=1 << 20,
    )
    erasure = ErasureServiceConfig(KafkaConfig("127.0.0.1:1"), Topics(), readers_world.DOMAIN, folder / AUDIT, 1)
    reading = ReaderConfig(
        readers_world.DOMAIN, folder / "view", readers_world.PARTITIONS, door=door(settings, "127.0.0.1"), erasure=erasure, reflection=True
    )
    with running_loop() as run, readers_world.serving(reading) as reader:
        server = RankingServer(config, ImmediateSource(rows), ListSink())
        yield World(settings, run(server.start()), reader, rows, config.door.interceptors[0], server)
        run(server.stop())


@pytest.fixture(autouse=True)
def as_it_was(world):
    yield
    world.rows.error, world.rows.offset = None, 10


def calls(ranking, reader) -> dict[str, tuple]:
    """Each guarded method, called: name to (call, request)."""
    sequences, erasures = SequenceReaderStub(reader), ErasureStub(reader)
    request = RankRequest(ranker="home", user_id=USER, candidate_ids=np.arange(1, 4, dtype="<u8").tobytes(), candidate_kind=VIDEO)
    return {
        "rank": (ranking.unary_unary("/freshrank.v1.Ranking/Rank", RankRequest.SerializeToString), request),
        "read_sequences": (sequences.GetPosition, GetPositionRequest(user_id=100)),
        "erase": (erasures.Status, ErasureStatusRequest(user_id=100)),
    }


@pytest.mark.parametrize("permission", ["rank", "read_sequences", "erase"])
def test_each_service_asks_for_a_token_with_its_permission(world, permission):
    with grpc.insecure_channel(world.ranking) as ranking, grpc.insecure_channel(world.reader) as reader:
        call, request = calls(ranking, reader)[permission]
        others = " ".join({"rank", "read_sequences", "erase"} - {permission})
        bad = {
            None: grpc.StatusCode.UNAUTHENTICATED,
            "other": grpc.StatusCode.UNAUTHENTICATED,
            signed("feed", permission, live_s=-1): grpc.StatusCode.UNAUTHENTICATED,
            signed("feed", others): grpc.StatusCode.PERMISSION_DENIED,
        }
        for token, code in bad.items():
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=bearer(token), timeout=20)
            assert caught.value.code() == code
        for token in (TOKEN, signed("feed", permission), signed("feed", f"{others} {permission}")):
            call(request, metadata=bearer(token), timeout=20)


def test_health_needs_no_token_and_is_not_counted(world):
    for address, service in ((world.ranking, "freshrank.v1.Ranking"), (world.reader, "freshrank.v1.SequenceReader")):
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watching = [health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60) for _ in range(AT_ONCE + 1)]
            states = [next(stream).status for stream in watching]
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert {*states, answer.status} <= {health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING}
            assert len(states) == AT_ONCE + 1  # more than a client may have of other calls
            for stream in watching:
                stream.cancel()


def services(address, token):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = stub.ServerReflectionInfo(iter([request]), metadata=bearer(token), timeout=20)
    return [service.name for service in reply.list_services_response.service]


def test_reflection_is_off_unless_enabled_and_then_needs_its_permission(world):
    assert not world.settings.reflection
    with pytest.raises(grpc.RpcError) as caught:
        services(world.ranking, TOKEN)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    for token, code in ((None, grpc.StatusCode.UNAUTHENTICATED), (signed("feed", "rank"), grpc.StatusCode.PERMISSION_DENIED)):
        with pytest.raises(grpc.RpcError) as caught:
            services(world.reader, token)
        assert caught.value.code() == code
    assert "freshrank.v1.SequenceReader" in services(world.reader, signed("operator", "reflect"))


# Limits.


@pytest.mark.parametrize("client", ["by name", "by address"])
def test_one_client_does_not_take_all_places(world, client):
    """Calls wait for a position. One caller gets AT_ONCE places; another one, and the same one later, get theirs."""
    # Signed here: a token made when tests are collected may have expired by the time that a long run comes to this one.
    token = signed("greedy", "rank") if client == "by name" else TOKEN
    waiting = {"after": [Position(0, partition_of(user_key(USER), 4), 11)]}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        held = [pool.submit(world.rank, token, timeout_s=HELD_S, **waiting) for _ in range(AT_ONCE)]
        world.wait_for_calls(AT_ONCE)
        code, text = world.code(token=token)
        assert (code, f"{AT_ONCE} calls of this client" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert world.rank(signed("modest", "rank")).after_reached
        assert world.keeper.statistics()["calls"] == AT_ONCE
        world.rows.offset = 11
        assert all(call.result(20).after_reached for call in held)
    assert world.rank(token, **waiting).after_reached
    found = world.keeper.statistics()
    assert (found["calls"], found["clients"]) == (0, 0)


def test_refused_calls_are_counted_by_reason(world):
    def refused():
        return scraped(metrics.exposition().decode())[0][f"{PREFIX}refused_total"]

    metrics = ServerMetrics(Telemetry(), world.server.figures, dict, lambda: True)
    before = refused()
    waiting = {"after": [Position(0, partition_of(user_key(USER), 4), 11)]}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        held = [pool.submit(world.rank, timeout_s=HELD_S, **waiting) for _ in range(AT_ONCE)]
        world.wait_for_calls(AT_ONCE)
        assert world.code()[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        world.rows.offset = 11
        assert all(call.result(20) for call in held)
    assert [world.code(token=token)[0] for token in (None, "another")] == [grpc.StatusCode.UNAUTHENTICATED] * 2
    assert world.code(token=signed("feed", "explain"))[0] == grpc.StatusCode.PERMISSION_DENIED
    assert {dict(labels)["reason"]: count - before[labels] for labels, count in refused().items()} == {
        "client_calls": 1,
        "unauthenticated": 2,
        "forbidden": 1,
    }


def test_metadata_and_messages_are_bounded(world):
    with pytest.raises(RankError) as caught:
        world.rank("x" * (world.settings.metadata_bytes_max + 1))
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    with grpc.insecure_channel(world.ranking) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/freshrank.v1.Ranking/Rank")(bytes(5 << 20), metadata=bearer(TOKEN), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with grpc.insecure_channel(world.reader) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/freshrank.v1.SequenceReader/GetSequences")(bytes(1 << 20), metadata=bearer(TOKEN), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_who_pings_all_the_time_is_disconnected(world):
    options = (("grpc.keepalive_time_ms", 50), ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0))
    connected, ended = Event(), Event()

    def on_change(state):
        if state is grpc.ChannelConnectivity.READY:
            connected.set()
        elif connected.is_set():
            ended.set()

    with grpc.insecure_channel(world.ranking, options=(*options, ("grpc.use_local_subchannel_pool", 1))) as channel:
        channel.subscribe(on_change, try_to_connect=True)
        assert connected.wait(20)
        assert ended.wait(20)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("candidate_ids", {"candidates": range(1, 302)}),
        ("candidate_features", {"candidate_features": {f"f{i}": [1.0] * 3 for i in range(100)}}),
        ("request_features", {"request_features": {f"f{i}": 1.0 for i in range(100)}}),
        ("head_weights", {"head_weights": {f"h{i}": 1.0 for i in range(100)}}),
        ("after", {"after": [Position(0, partition_of(user_key(USER), 4), 1)] * 65}),
    ],
)
def test_a_request_has_no_more_of_anything_than_the_ranker_takes(world, field, given):
    code, text = world.code(**given)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith(f"INVALID_ARGUMENT: {field}")


# What nobody may learn.


def test_a_bug_shows_the_caller_a_reference_that_the_log_explains(world, caplog):
    world.rows.error = ArithmeticError(f"a bug that knows user {USER} and {TOKEN}")
    code, text = world.code()
    assert code == grpc.StatusCode.INTERNAL
    reference = text.rsplit(" ", 1)[1]
    assert len(reference) == 16
    assert "Arithmetic" not in text
    (record,) = [record for record in caplog.records if reference in record.getMessage() and record.levelno >= logging.INFO]
    assert "ArithmeticError at " in record.getMessage()
    assert "serving_world.py" in record.getMessage()
    assert str(USER) not in record.getMessage()


def test_no_log_at_info_knows_users_or_tokens(world, caplog):
    """Real calls, good and bad ones, of every service; then every line that was logged is searched."""
    caplog.set_level(logging.INFO)
    forged = signed("feed", "rank")[:-6] + "forged"
    for token in (TOKEN, signed("feed", "rank"), forged, "wrong-token-of-someone", signed("feed", "erase"), None):
        for user in (USER, USER + 1):
            for given in ({}, {"candidates": []}, {"candidates": [7, 7]}, {"after": [Position(9, 0, 5)]}, {"ranker": "nowhere"}):
                with suppress(RankError):
                    world.rank(token, user_id=user, **given)
    world.rows.error = SequenceUnavailableError("no view")
    world.rank(TOKEN, user_id=USER)  # ranked without a sequence
    for error in (SequenceCorruptError("checksum differs"), KeyError(USER)):
        world.rows.error = error
        world.code()
    world.rows.error, whole = None, world.rows.rows[USER]
    world.rows.rows[USER + 1] = whole  # another user's row
    assert world.code(user_id=USER + 1)[0] == grpc.StatusCode.DATA_LOSS
    with grpc.insecure_channel(world.reader) as reader:
        tokens = (TOKEN, signed("feed", "read_sequences erase"), forged, None)
        for call, request in (
            (SequenceReaderStub(reader).GetPosition, GetPositionRequest(user_id=USER)),
            (ErasureStub(reader).Erase, EraseRequest(user_id=USER)),
            (ErasureStub(reader).Status, ErasureStatusRequest(user_id=USER)),
        ):
            for token in tokens:
                with suppress(grpc.RpcError):
                    call(request, metadata=bearer(token), timeout=20)
    said = "\n".join(f"{record.getMessage()} {record.exc_text or ''} {record.exc_info or ''}" for record in caplog.records)
    said = (said + caplog.text).lower()
    assert "state is damaged" in said
    secrets = [TOKEN, "wrong-token-of-someone", forged.rsplit(".", 1)[1], KEY.as_dict(private=True)["d"]]
    secrets += [form for user in (USER, USER + 1) for form in (str(user), f"{user:x}", user.to_bytes(8, "little").hex())]
    assert [secret for secret in secrets if secret.lower() in said] == []


# Methods that somebody adds.


@contextmanager
def serving_methods(guard, **methods):
    async def start():
        server = grpc.aio.server(interceptors=(Doorkeeper(guard, 9),))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    with running_loop() as run:
        server, port = run(start())
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        run(server.stop(0))


async def fails(_request, _context):
    raise KeyError("inside")


async def answers(request, _context):
    return request


async def streams_and_fails(request, _context):
    yield request
    raise KeyError("inside")


def test_a_method_that_nobody_put_into_the_table_is_denied_and_a_failure_tells_nothing():
    table = {"/a.B/Fails": RANK, "/a.B/Streams": RANK, "/a.B/Admin": ADMIN}
    methods = {
        "Fails": grpc.unary_unary_rpc_method_handler(fails),
        "Streams": grpc.unary_stream_rpc_method_handler(streams_and_fails),
        "Admin": grpc.unary_unary_rpc_method_handler(answers),
        "New": grpc.unary_unary_rpc_method_handler(answers),
    }

    def outcome(call):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        return caught.value.code(), caught.value.details()

    with serving_methods(Tokens(permissions=table), **methods) as channel:
        for name in ("New", "Admin"):
            assert outcome(partial(channel.unary_unary(f"/a.B/{name}"), b"", timeout=20))[0] == grpc.StatusCode.PERMISSION_DENIED
        stream = channel.unary_stream("/a.B/Streams")(b"x", timeout=20)
        assert next(stream) == b"x"
        for code, text in (outcome(stream.__next__), outcome(partial(channel.unary_unary("/a.B/Fails"), b"", timeout=20))):
            assert code == grpc.StatusCode.INTERNAL
            assert "reference" in text
            assert "inside" not in text
            assert "KeyError" not in text
        assert outcome(partial(channel.unary_unary("/a.B/None"), b"", timeout=20))[0] == grpc.StatusCode.UNIMPLEMENTED
    with serving_methods(Tokens(permissions=table, admin=True), **methods) as channel:
        assert channel.unary_unary("/a.B/Admin")(b"y", timeout=20) == b"y"


# TLS.


@pytest.fixture
def tls(tmp_path):
    """(folder, the servers' authority, the clients' authority), with a server's certificate in the folder."""
    servers, clients = Authority("of servers"), Authority("of clients")
    servers.files(tmp_path, "server")
    clients.files(tmp_path, "client")
    return tmp_path, servers, clients


@contextmanager
def secured(folder, *, mutual=True):
    """A real ranking server without a release, and a reader, behind one identity; yields their addresses."""
    authority = folder / "client.authority.pem" if mutual else None
    doors = [Door(credentials=server_credentials("0.0.0.0", folder / "server.pem", folder / "server.key", authority)) for _ in range(2)]
    paths = {"releases": folder / "releases", "tables": folder / "tables", "repository": folder / "repository"}
    config = ServerConfig(**paths, triton="127.0.0.1:1", host="0.0.0.0", door=doors[0])
    reading = ReaderConfig(readers_world.DOMAIN, folder / "view", readers_world.PARTITIONS, door=doors[1])
    (folder / "view").mkdir()
    readers_world.build_view(folder / "view", readers_world.batches(1))
    with running_loop() as run, readers_world.serving(reading) as reader:
        server = RankingServer(config, ImmediateSource(MemoryReader()), ListSink())
        yield run(server.start()).replace("0.0.0.0", "127.0.0.1"), reader
        run(server.stop())


def reached(addresses, *, root_certificate=None, certificate=None, key=None) -> list[bool]:
    """Whether a client with these files gets an answer of the ranking server, and of the reader. It does not try twice."""
    credentials, found = channel_credentials(root_certificate, certificate, key), []
    for address in addresses:
        with grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials) as channel:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
                found.append(True)
            except grpc.RpcError as error:
                found.append(error.code() is not grpc.StatusCode.UNAVAILABLE)
    return found


def test_clients_must_present_a_certificate_of_the_authority(tls):
    folder, servers, clients = tls
    root = folder / "server.authority.pem"
    own = dict(zip(("certificate", "key"), clients.files(folder, "client"), strict=True))
    with secured(folder) as addresses:
        with RankingClient(addresses[0], timeout_s=20, root_certificate=root, **own) as client, pytest.raises(RankError, match="publish a"):
            client.rank("home", 1, [1])
        remote = RemoteReader(addresses[1], readers_world.DOMAIN, timeout_s=20, root_certificate=root, **own)
        assert remote.read("main", [100])[0].row
        remote.close()
        assert reached(addresses, root_certificate=root, **own) == [True, True]
        assert reached(addresses, root_certificate=root) == [False, False]
        assert reached(addresses) == [False, False]
        other = dict(zip(("certificate", "key"), servers.files(folder, "other"), strict=True))
        assert reached(addresses, root_certificate=root, **other) == [False, False]
        expired = dict(zip(("certificate", "key"), clients.files(folder, "old", expired=True), strict=True))
        assert reached(addresses, root_certificate=root, **expired) == [False, False]
        assert reached(addresses, root_certificate=folder / "client.authority.pem", **own) == [False, False]


def test_rotated_certificates_are_seen_by_new_connections_without_a_restart(tls, caplog):
    folder, servers, _ = tls
    first, second = folder / "first.pem", folder / "second.pem"
    first.write_bytes(servers.pem)
    newer = Authority("newer")
    second.write_bytes(newer.pem)
    with secured(folder, mutual=False) as addresses:
        with RankingClient(addresses[0], timeout_s=20, root_certificate=first) as stays:

            def still() -> bool:
                with pytest.raises(RankError) as caught:
                    stays.rank("home", 1, [1])
                return caught.value.code == grpc.StatusCode.INVALID_ARGUMENT

            assert still()
            assert reached(addresses, root_certificate=second) == [False, False]
            replace(folder / "server.pem", b"half written")
            assert reached(addresses, root_certificate=first) == [True, True]  # what cannot be used changes nothing
            newer.files(folder, "server")
            assert reached(addresses, root_certificate=second) == [True, True]
            assert reached(addresses, root_certificate=first) == [False, False]
            assert still()  # an open connection stays
        newer.files(folder, "server", expired=True)
        assert reached(addresses, root_certificate=second) == [False, False]
    assert "cannot be used, what was read before stays in use" in caplog.text


def test_another_authority_of_clients_counts_from_the_next_connection_on(tls):
    folder, _, clients = tls
    root = folder / "server.authority.pem"
    old = dict(zip(("certificate", "key"), clients.files(folder, "old"), strict=True))
    newer = Authority("newer clients")
    new = dict(zip(("certificate", "key"), newer.files(folder, "new"), strict=True))
    with secured(folder) as addresses:
        assert reached(addresses, root_certificate=root, **new) == [False, False]
        replace(folder / "client.authority.pem", newer.pem)
        assert reached(addresses, root_certificate=root, **new) == [True, True]
        assert reached(addresses, root_certificate=root, **old) == [False, False]


def test_files_that_do_not_belong_together_stop_the_start(tls):
    folder, servers, _ = tls
    _, other = servers.files(folder, "other")
    for files in ((folder / "server.pem", other), (folder / "absent", other), (folder / "server.pem", folder / "server.pem")):
        with pytest.raises(SettingsError, match="tls_certificate"):
            ServerIdentity(*files)
    with pytest.raises(SettingsError, match="tls_client_authority"):
        ServerIdentity(folder / "server.pem", folder / "server.key", folder / "server.key")


@pytest.mark.parametrize("host", ["0.0.0.0", "example.org", "[::]", "10.0.0.1"])
def test_an_address_that_others_reach_needs_a_certificate(host):
    with pytest.raises(SettingsError, match="tls_certificate"):
        server_credentials(host, None, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1.2.3"])
def test_loopback_needs_none(host, tmp_path):
    assert server_credentials(host, None, None) is None
    with pytest.raises(SettingsError, match="tls_key"):
        server_credentials(host, tmp_path / "x", None)


def test_a_client_names_its_certificate_with_its_key_and_whom_it_trusts(tmp_path):
    for given in ({"key": tmp_path}, {"certificate": tmp_path, "key": tmp_path}):
        with pytest.raises(ValueError, match="certificate, key"):
            RankingClient("127.0.0.1:1", **given)
        with pytest.raises(ValueError, match="certificate, key"):
            RemoteReader("127.0.0.1:1", readers_world.DOMAIN, **given)


def test_an_answer_that_cannot_be_sent_any_more_is_no_bug(caplog):
    async def gone(_request, _context):
        raise grpc.aio.InternalError("the call has ended")  # what abort() raises then

    methods = {"Gone": grpc.unary_unary_rpc_method_handler(gone)}
    with serving_methods(Tokens(TOKEN, permissions={"/a.B/Gone": RANK}), **methods) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/a.B/Gone")(b"", metadata=bearer(TOKEN), timeout=0.5)
    assert "bug" not in caplog.text

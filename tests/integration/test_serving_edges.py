"""The client's second try, and a server's life without a model: empty, encrypted, stopped."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_world import VIDEO, ImmediateSource, ListSink, MemoryReader

from inference.client import RankError, RankingClient
from inference.server import RankingServer, ServerConfig
from protos.v1.ranking_pb2 import RankRequest, RankResponse
from protos.v1.ranking_pb2_grpc import RankingServicer, add_RankingServicer_to_server


class Scripted(RankingServicer):
    """Fails with each status of the script, then answers."""

    def __init__(self, *script: grpc.StatusCode) -> None:
        self.script, self.calls = list(script), 0

    def Rank(self, request, context):  # noqa: N802 - the name of the service's method
        self.calls += 1
        if self.script:
            context.abort(self.script.pop(0), "scripted")
        return RankResponse(request_id=request.request_id)


@contextmanager
def scripted(*script):
    servicer = Scripted(*script)
    server = grpc.server(ThreadPoolExecutor(2))
    add_RankingServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with RankingClient(f"127.0.0.1:{port}", timeout_s=10) as client:
        yield servicer, client
    server.stop(None).wait()


def test_unavailable_is_tried_once_more():
    with scripted(grpc.StatusCode.UNAVAILABLE) as (servicer, client):
        assert client.call(RankRequest(request_id=5)).request_id == 5
        assert servicer.calls == 2


@pytest.mark.parametrize(
    ("script", "calls"),
    [([grpc.StatusCode.UNAVAILABLE] * 3, 2), ([grpc.StatusCode.INVALID_ARGUMENT], 1), ([grpc.StatusCode.RESOURCE_EXHAUSTED], 1)],
)
def test_other_failures_and_a_second_one_are_the_callers(script, calls):
    with scripted(*script) as (servicer, client):
        with pytest.raises(RankError, match="scripted") as caught:
            client.call(RankRequest())
        assert caught.value.code == script[0]
        assert servicer.calls == calls


def test_a_server_that_is_not_there_is_unavailable_when_the_deadline_is_over():
    with scripted() as (_, client):
        pass
    with RankingClient("127.0.0.1:1", timeout_s=0.3) as client, pytest.raises(RankError, match="connect") as caught:
        client.call(RankRequest())
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE


def config_of(folder) -> ServerConfig:
    return ServerConfig(releases=folder / "releases", tables=folder / "tables", repository=folder / "repository", triton="127.0.0.1:1")


def server_of(config) -> RankingServer:
    return RankingServer(config, ImmediateSource(MemoryReader()), ListSink())


def with_server(config, check):
    """Runs `check(address)` in a thread beside a server, then stops it."""

    async def run():
        server = server_of(config)
        address = await server.start()
        await asyncio.wait_for(server.warm(), 20)
        try:
            await asyncio.to_thread(check, address)
        finally:
            await asyncio.wait_for(server.stop(), 20)

    asyncio.run(run())


def test_without_a_release_it_runs_and_says_what_to_do(tmp_path):
    def check(address):
        with grpc.insecure_channel(address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        with (
            RankingClient(address) as client,
            pytest.raises(RankError, match=r"ranker: 'home' .* served: none; publish") as caught,
        ):
            client.rank("home", 1, [1], kinds=VIDEO)
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT

    with_server(config_of(tmp_path), check)


def test_a_damaged_release_stops_the_start_and_is_named(tmp_path):
    folder = tmp_path / "releases" / "home-20231114T221320Z-00000000"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=folder.name):
        asyncio.run(server_of(config_of(tmp_path)).start())


def test_a_server_that_stops_says_so_before_its_port_closes(tmp_path):
    """A new connection, made after the server was told to stop, is answered still."""

    async def run():
        server = server_of(replace(config_of(tmp_path), leave_s=0.5))
        address = await server.start()
        stopping = asyncio.create_task(server.stop())
        async with grpc.aio.insecure_channel(address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert not stopping.done()
        await asyncio.wait_for(stopping, 20)
        return answer.status

    assert asyncio.run(run()) == health_pb2.HealthCheckResponse.NOT_SERVING

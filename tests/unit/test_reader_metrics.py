"""What a reader and the erasure service refuse moves its metrics, which the manual lists as they are."""

import asyncio
import urllib.request
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from readers_world import DOMAIN, PARTITIONS, USERS, batches, build_view, serving_pages
from worker_world import scraped

from deploy.door import Doorkeeper
from deploy.guard import Tokens
from deploy.server_pages import reader_pages
from features.ports import Door
from protos.v1.erasure_pb2 import ErasureStatusRequest
from protos.v1.erasure_pb2_grpc import ErasureStub
from protos.v1.sequence_pb2 import GetPositionRequest, WatchRequest
from protos.v1.sequence_pb2_grpc import SequenceReaderStub
from streams.erasure_audit import AUDIT
from streams.erasure_service import ErasureServiceConfig
from streams.errors import StreamError
from streams.kafka import KafkaConfig, Topics
from streams.reader_metrics import METRICS, PREFIX, Calls, ReaderMetrics, exposed_names
from streams.reader_service import ReaderConfig, serve_reader
from streams.view_reader import ViewReader

READER, ERASURE = "freshrank.v1.SequenceReader", "freshrank.v1.Erasure"
TOKEN = [("authorization", "Bearer right")]


def read(url: str) -> dict[str, dict[str, float]]:
    """Values of the reader's metrics by their label."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
        samples, types = scraped(answer.read().decode())
    assert {name: types[name.removesuffix("_total")] for name in samples} == dict.fromkeys(exposed_names(), "counter")
    return {name.removeprefix(PREFIX): {labels[0][1]: value for labels, value in found.items()} for name, found in samples.items()}


@pytest.fixture
def serving(tmp_path):
    """Makes (channel, url of the pages) of a reader with limits, which also serves the erasure service."""

    @contextmanager
    def make(per_client: int, **limits) -> Iterator[tuple[grpc.Channel, str]]:
        keeper = Doorkeeper(Tokens("right"), per_client)
        erasure = ErasureServiceConfig(KafkaConfig("127.0.0.1:1"), Topics(), DOMAIN, tmp_path / AUDIT, 1)
        door = Door((keeper,), statistics=keeper.statistics)
        web = partial(reader_pages, "127.0.0.1", 0)
        config = ReaderConfig(DOMAIN, tmp_path, PARTITIONS, erasure=erasure, door=door, web=web, **limits)
        with serving_pages(config) as found, grpc.insecure_channel(found["address"]) as channel:
            yield channel, found["web"]

    return make


def watching(channel: grpc.Channel) -> grpc.Call:
    """A call that lasts, and has begun."""
    call = SequenceReaderStub(channel).Watch(WatchRequest(sequence="main", user_id=USERS[0]), metadata=TOKEN, timeout=60)
    next(call)
    return call


def codes(channel: grpc.Channel, metadata=TOKEN) -> list[grpc.StatusCode]:
    """What one call of each service is answered."""
    found = []
    for call, request in (
        (SequenceReaderStub(channel).GetPosition, GetPositionRequest(user_id=USERS[0])),
        (ErasureStub(channel).Status, ErasureStatusRequest(user_id=USERS[0])),
    ):
        found.append(call.future(request, metadata=metadata, timeout=20).code())
    return found


ROOM = {"per_client": 9, "calls_max": 9, "watches_max": 9}
FULL, OK = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("limits", "client_calls"), [({"calls_max": 1}, 0), ({"per_client": 1}, 2)], ids=["calls of all clients", "calls of one client"]
)
def test_calls_that_find_no_room_are_counted_by_service(tmp_path, serving, limits, client_calls):
    build_view(tmp_path, batches(1))
    with serving(**ROOM | limits) as (channel, url):
        assert codes(channel) == [OK, OK]
        assert read(url) == {
            "shed_total": {READER: 0, ERASURE: 0},
            "refused_total": {"client_calls": 0, "forbidden": 0, "unauthenticated": 0},
        }
        held = watching(channel)
        assert codes(channel) == [FULL, FULL]
        held.cancel()
        found = read(url)
        assert found["shed_total"] == {READER: 1, ERASURE: 1}
        assert found["refused_total"]["client_calls"] == client_calls


def test_watches_that_find_no_room_are_counted(tmp_path, serving):
    build_view(tmp_path, batches(1))
    with serving(**ROOM | {"watches_max": 1}) as (channel, url):
        held = watching(channel)
        with pytest.raises(grpc.RpcError) as caught:
            watching(channel)
        assert caught.value.code() == FULL
        assert codes(channel) == [OK, OK]
        held.cancel()
        assert read(url)["shed_total"] == {READER: 1, ERASURE: 0}


def test_callers_that_are_refused_are_counted_by_reason(tmp_path, serving):
    build_view(tmp_path, batches(1))
    with serving(**ROOM) as (channel, url):
        assert codes(channel, None) == [grpc.StatusCode.UNAUTHENTICATED] * 2
        assert read(url) == {
            "shed_total": {READER: 0, ERASURE: 0},
            "refused_total": {"client_calls": 0, "forbidden": 0, "unauthenticated": 2},
        }


def test_pages_say_whether_the_views_can_be_read(tmp_path, serving):
    build_view(tmp_path, batches(1))
    with serving(**ROOM) as (channel, url):
        checks = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert any(check.status == health_pb2.HealthCheckResponse.SERVING for check in checks)
        for page in ("live/", "ready/"):
            with urllib.request.urlopen(f"{url}/{page}", timeout=20) as answer:
                assert answer.status == 200
        port = int(url.rpartition(":")[2])
        taken = ReaderConfig(DOMAIN, tmp_path, PARTITIONS, web=partial(reader_pages, "127.0.0.1", port))
        with pytest.raises(StreamError, match=f"reader_web_port: 127.0.0.1:{port} cannot be bound"):
            asyncio.run(serve_reader(taken))


def test_pages_are_closed_last_and_their_failure_skips_nothing(tmp_path, monkeypatch):
    build_view(tmp_path, batches(1))
    found, closed, close = [], [], ViewReader.close
    monkeypatch.setattr(ViewReader, "close", lambda reader: (closed.append("reader"), close(reader)))

    @asynccontextmanager
    async def failing(_, ready):
        found.append(ready)
        try:
            yield "http://127.0.0.1:1"
        finally:
            closed.append(f"pages, ready: {ready()}")
            raise RuntimeError("the pages' task failed")

    async def serve_and_stop() -> None:
        told = asyncio.Future()
        serving = asyncio.create_task(serve_reader(ReaderConfig(DOMAIN, tmp_path, PARTITIONS, web=failing), told.set_result))
        address = (await told)["address"]
        async with grpc.aio.insecure_channel(address) as channel:
            async for check in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60):
                if check.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            assert found[0]()
        serving.cancel()
        with pytest.raises(RuntimeError, match="the pages' task failed"):
            await serving
        host, port = address.split(":")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))

    asyncio.run(serve_and_stop())
    assert closed == ["reader", "pages, ready: False"]


def test_a_reader_without_a_view_is_not_ready():
    metrics = ReaderMetrics(Calls(1, (READER,)), dict)
    assert not metrics.ready
    samples, _ = scraped(metrics.exposition().decode())
    assert samples == {f"{PREFIX}shed_total": {(("service", READER),): 0}}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_manual_lists_every_metric_as_it_is(metric):
    manual = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert f"| {PREFIX}{metric.name} | {metric.kind} | {metric.label} | {metric.help} |" in manual
    assert metric.help.endswith(".")

"""The sync and the asyncio client against real gRPC servers: one behaviour, safe retries, what goes along, several connections."""

import asyncio
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest

from features.ports import Position
from inference.async_client import AsyncRankingClient
from inference.client import RankError, RankingClient
from protos.v1.ranking_pb2 import TIER_EMBEDDING, RankRequest, RankResponse
from protos.v1.ranking_pb2_grpc import RankingServicer, add_RankingServicer_to_server

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Scripted(RankingServicer):
    """Fails with each status of the script, then answers with the candidates as they came; keeps what it was asked with."""

    script: list[grpc.StatusCode] = field(default_factory=list)
    asked: list[RankRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)

    def Rank(self, request, context):  # noqa: N802 - the name of the service's method
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.append(context.peer())
        self.left_s.append(context.time_remaining())
        if self.script:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "50"),))
            context.abort(self.script.pop(0), "field: scripted")
        scores = np.zeros(len(request.candidate_ids) // 8, "<f4").tobytes()
        return RankResponse(request_id=request.request_id, ranked_ids=request.candidate_ids, scores=scores, tier=TIER_EMBEDDING)


@contextmanager
def serving(servicer, port=0, reuse=0):
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", reuse)])
    add_RankingServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(None).wait()


@pytest.fixture(params=["sync", "asyncio"])
def run(request):
    """`run(address, calls, **settings)`: makes a client of either kind, and the calls, (method, arguments, settings), in order."""

    def with_sync(address, calls, **settings):
        with RankingClient(address, **settings) as client:
            return [getattr(client, method)(*arguments, **given) for method, arguments, given in calls]

    def with_asyncio(address, calls, **settings):
        async def all_of() -> list:
            async with AsyncRankingClient(address, **settings) as client:
                return [await getattr(client, method)(*arguments, **given) for method, arguments, given in calls]

        return asyncio.run(all_of())

    return with_sync if request.param == "sync" else with_asyncio


def test_answers_are_typed_and_the_request_is_what_was_said(run):
    servicer = Scripted()
    with serving(servicer) as port:
        fields = {"kinds": [1, 2], "candidate_features": {"price": [1.5, 2.5]}, "request_features": {"hour": "night"}, "request_id": 9}
        fields |= {"head_weights": {"hide": -2.0}, "after": [Position(5, 1, 17)], "request_time_ms": 1_700_000_000_000}
        calls = [("rank", ("home", 7, [3, 2**64 - 1]), {**fields, "timeout_s": 5.0, "traceparent": TRACEPARENT})]
        (ranking,) = run(f"127.0.0.1:{port}", calls, token="secret")
    assert (ranking.ids.tolist(), ranking.tier, ranking.request_id) == ([3, 2**64 - 1], "embedding", 9)
    (asked,) = servicer.asked
    assert (asked.ranker, asked.user_id, asked.candidate_kinds, asked.head_weights["hide"]) == ("home", 7, b"\1\2", -2.0)
    assert (asked.after[0].log_epoch, asked.after[0].partition, asked.after[0].offset) == (5, 1, 17)
    assert np.frombuffer(asked.candidate_features["price"].number, "<f4").tolist() == [1.5, 2.5]
    assert len(asked.request_features["hour"].category) == 8
    assert servicer.metadata[0]["traceparent"] == TRACEPARENT
    assert servicer.metadata[0]["authorization"] == "Bearer secret"
    assert 1.0 < servicer.left_s[0] <= 5.5  # gRPC rounds a deadline up


def test_a_token_of_one_call_stands_in_for_the_clients(run):
    servicer = Scripted()
    with serving(servicer) as port:
        run(f"127.0.0.1:{port}", [("call", (RankRequest(),), {"token": "other"}), ("call", (RankRequest(),), {})], token="own")
    assert [metadata["authorization"] for metadata in servicer.metadata] == ["Bearer other", "Bearer own"]


@pytest.mark.parametrize(
    ("script", "tries"),
    [
        ([grpc.StatusCode.UNAVAILABLE], 2),
        ([grpc.StatusCode.UNAVAILABLE] * 2, 2),
        ([grpc.StatusCode.CANCELLED], 2),
        ([grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE], 2),
        ([grpc.StatusCode.RESOURCE_EXHAUSTED], 2),
        ([grpc.StatusCode.RESOURCE_EXHAUSTED] * 2, 2),
        ([grpc.StatusCode.INTERNAL], 1),
    ],
)
def test_unavailable_and_a_refusal_with_a_hint_are_tried_again_and_once(run, script, tries):
    servicer = Scripted(list(script))
    with serving(servicer) as port:
        call = [("call", (RankRequest(request_id=5),), {})]
        if len(script) < tries:
            assert run(f"127.0.0.1:{port}", call, timeout_s=10.0)[0].request_id == 5
        else:
            with pytest.raises(RankError, match="field: scripted") as caught:
                run(f"127.0.0.1:{port}", call, timeout_s=10.0)
            assert (caught.value.code, caught.value.message, caught.value.retry_after_s) == (script[-1], "field: scripted", 0.05)
    assert len(servicer.asked) == tries


def test_nobody_there_is_unavailable_within_the_deadline(run):
    with serving(Scripted()) as port:
        pass
    with pytest.raises(RankError) as caught:
        run(f"127.0.0.1:{port}", [("call", (RankRequest(),), {"timeout_s": 0.3})])
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE


def test_a_server_that_is_away_is_looked_for_more_often_than_grpc_would(run):
    """By its own measure gRPC would connect the third time after 2 s at the earliest."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(2.0)

        def refuse() -> int:
            for _ in range(4):
                listener.accept()[0].close()
            listener.close()
            return 4

        refused = pool.submit(refuse)
        with pytest.raises(RankError, match="UNAVAILABLE"):
            run(f"127.0.0.1:{listener.getsockname()[1]}", [("call", (RankRequest(),), {"timeout_s": 1.5})])
        assert refused.result() == 4


def test_a_client_that_is_closed_does_not_try_again():
    servicer = Scripted()
    entered, go_on = threading.Event(), threading.Event()

    def wait(_request, _context):
        entered.set()
        go_on.wait(10)
        return RankResponse()

    servicer.Rank = wait
    with serving(servicer) as port, ThreadPoolExecutor(1) as pool:
        client = RankingClient(f"127.0.0.1:{port}", timeout_s=10.0)
        called = pool.submit(client.call, RankRequest())
        assert entered.wait(10)
        client.close()
        with pytest.raises(RankError, match="CANCELLED"):
            called.result(10)
        go_on.set()


def test_channels_are_connections_of_their_own_used_in_turn(run):
    servicer = Scripted()
    with serving(servicer) as port:
        run(f"127.0.0.1:{port}", [("call", (RankRequest(),), {})] * 12, channels=4, timeout_s=10.0)
        assert sorted(Counter(servicer.peers).values()) == [3, 3, 3, 3]
        with pytest.raises(ValueError, match="channels"):
            run(f"127.0.0.1:{port}", [], channels=0)


def test_channels_reach_several_servers_of_one_port():
    """SO_REUSEPORT chooses a server by the connection's ports: 32 connections all at one of two would be chance of 2^-31."""
    with ExitStack() as stack:
        servicers = [Scripted(), Scripted()]
        port = stack.enter_context(serving(servicers[0], reuse=1))
        stack.enter_context(serving(servicers[1], port, reuse=1))
        client = stack.enter_context(RankingClient(f"127.0.0.1:{port}", channels=32, timeout_s=10.0))
        for _ in range(32):
            client.call(RankRequest())
    assert sum(len(servicer.asked) for servicer in servicers) == 32
    assert all(servicer.asked for servicer in servicers)


@pytest.mark.parametrize("throttled", [True, False])
def test_a_client_holds_back_calls_that_would_only_be_refused(throttled):
    servicer = Scripted([grpc.StatusCode.RESOURCE_EXHAUSTED] * 1000)

    with serving(servicer) as port, RankingClient(f"127.0.0.1:{port}", timeout_s=10.0, throttled=throttled) as client:
        for _ in range(200):
            with pytest.raises(RankError) as caught:
                client.call(RankRequest())
            assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    if throttled:
        assert len(servicer.asked) < 80  # five, a few by chance, and a tenth of second tries
    else:
        assert len(servicer.asked) == 200

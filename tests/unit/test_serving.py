"""Parts of the ranking server by themselves: scores, the gate before a model, requests, addresses, columns."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from serving_world import DOMAIN, NOW_MS, ImmediateSource, ListSink, MemoryReader, make_events, write_ranker, write_tables
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from deploy.serving import server_config
from deploy.settings import load_settings
from features.ids import string_id
from features.request import RequestError
from inference.client import feature_column
from inference.release import Release
from inference.scoring import best_first, embedding_scores, final_scores, head_weights
from inference.served import ModelGate, Releases
from inference.server import RankingServer, ServerConfig
from inference.service import STATUS, RankingService, is_sampled, parse_request
from inference.telemetry import STAGES, Timings
from inference.triton import ModelTimeoutError, ModelUnavailableError, TritonModels
from protos.v1.ranking_pb2 import (
    TIER_CALLER_ORDER,
    TIER_MODEL,
    TIER_SMALL,
    TIER_UNSPECIFIED,
    Arm,
    Experiment,
    FeatureColumn,
    RankRequest,
)

RELEASE = Release(Path(), "related-20231114T221320Z-00000000", "related", NOW_MS, DOMAIN, {}, {}, {})
REQUEST = {"candidate_embedding": np.zeros((3, 16), np.float16)}
CONFIG = ServerConfig(releases=Path(), tables=Path(), repository=Path(), triton="127.0.0.1:1")


def test_a_requests_weights_replace_those_of_the_heads_they_name():
    ranker = DOMAIN.ranker["home"]
    assert head_weights(ranker, {}).tolist() == [1.0, -0.5]
    assert head_weights(ranker, {"hide": -3.0}).tolist() == [1.0, -3.0]
    with pytest.raises(KeyError, match="like"):
        head_weights(ranker, {"like": 1.0})


def test_final_scores_are_weighted_sums_in_float32():
    probability = np.array([[0.5, 0.25], [0.125, 1.0]], np.float32)
    scores = final_scores(probability, np.array([1.0, -0.5]))
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.375, -0.375]


def test_equal_scores_keep_the_callers_order():
    assert best_first(np.array([1, 2, 1, 2, 3], np.float32)).tolist() == [4, 1, 3, 0, 2]


def test_embedding_scores_are_dot_products_in_float32():
    tensors = {"candidate_embedding": np.full((2, 3), 300, np.float16), "user_embedding": np.full(3, 300, np.float16)}
    assert embedding_scores(tensors).tolist() == [270_000.0, 270_000.0]  # beyond float16


def test_the_sampled_share_of_users_is_by_hash():
    sampled = [is_sampled(user, 0.1) for user in range(5000)]
    assert 400 < sum(sampled) < 600
    assert sampled == [is_sampled(user, 0.1) for user in range(5000)]
    assert all(is_sampled(user, 0.2) for user, is_in in enumerate(sampled) if is_in)
    assert not any(is_sampled(user, 0.0) for user in range(100))
    assert all(is_sampled(user, 1.0) for user in range(100))


def test_an_oversized_request_names_its_largest_field():
    request = RankRequest(ranker="home", candidate_ids=bytes(800))
    request.candidate_features["price"].CopyFrom(FeatureColumn(number=bytes(2000)))
    assert parse_request(request.SerializeToString(), 4000) == request
    with pytest.raises(RequestError) as caught:
        parse_request(request.SerializeToString(), 1000)
    assert caught.value.field == "candidate_features"


def test_each_error_has_one_status():
    kinds = [kind for kind, _ in STATUS]
    assert len(kinds) == len(set(kinds))
    assert len({code for _, code in STATUS}) == len(STATUS)
    for i, kind in enumerate(kinds):
        assert not any(issubclass(kind, earlier) for earlier in kinds[:i])


def test_timings_show_percentiles_of_the_newest():
    timings = Timings()
    assert timings.percentiles() == {"p50": 0.0, "p99": 0.0, "max": 0.0}
    for ms in range(1, 102):
        timings.add(ms / 1000)
    assert timings.percentiles() == pytest.approx({"p50": 51.0, "p99": 100.0, "max": 101.0})


def test_columns_are_encoded_by_what_they_hold():
    assert np.frombuffer(feature_column([1.5, float("nan")]).number, "<f4").tolist()[0] == 1.5
    texts = feature_column(["day", "", "night"])
    assert np.frombuffer(texts.category, "<u8").tolist() == [string_id("day"), 0, string_id("night")]
    lists = feature_column([["a"], [], ["b", "c"]])
    assert np.frombuffer(lists.list_length, "<u4").tolist() == [1, 0, 2]
    assert np.frombuffer(lists.category, "<u8").tolist() == [string_id(text) for text in "abc"]


class ScriptedTriton:
    """Answers what the script says: an error to raise, or probabilities; loads are counted."""

    def __init__(self) -> None:
        self.answer: object = None
        self.loaded = False
        self.loads = 0
        self.trips: list[str] = []

    async def ready(self, _model: str) -> bool:
        return self.loaded

    async def load(self, _model: str, **_: float) -> None:
        if isinstance(self.answer, Exception):
            raise self.answer
        self.loads += 1
        self.loaded = True

    async def infer(self, _model, tensors, _output, **_):
        if isinstance(self.answer, Exception):
            raise self.answer
        given = self.answer if self.answer is not None else 0.5
        return np.full((len(tensors["candidate_embedding"]), 1), given, np.float32)


def gated(scenario):
    async def run() -> None:
        triton = ScriptedTriton()
        gate = ModelGate(triton, RELEASE, lambda: triton.trips.append(RELEASE.release_id))
        await gate.bring_up()
        try:
            await scenario(triton, gate)
        finally:
            await gate.close()

    asyncio.run(run())


def test_a_lost_model_is_not_asked_until_a_probe_has_loaded_it_again():
    async def scenario(triton, gate):
        assert (await gate.infer(REQUEST, timeout_s=1)).tolist() == [[0.5]] * 3
        triton.answer, triton.loaded = ModelUnavailableError("gone"), False
        with pytest.raises(ModelUnavailableError, match="gone"):
            await gate.infer(REQUEST, timeout_s=1)
        with pytest.raises(ModelUnavailableError, match="not asked"):
            await gate.infer(REQUEST, timeout_s=1)
        assert triton.trips == [gate.model]
        triton.answer = None
        await asyncio.wait_for(gate.opened.wait(), 5)
        assert triton.loads == 2
        assert len(await gate.infer(REQUEST, timeout_s=1)) == 3

    gated(scenario)


class Call:
    def time_remaining(self):
        return 3600.0

    def invocation_metadata(self):
        return ()


@asynccontextmanager
async def ranking_service(tmp_path, triton, reader, **changes) -> AsyncIterator[RankingService]:
    """One that ranks `related` with a warm model."""
    folders = {name: tmp_path / name for name in ("releases", "tables", "repository")}
    config = dataclasses.replace(CONFIG, **folders, **changes)
    write_ranker(config.releases, write_tables(config.tables), "related")
    releases = Releases(config.releases, config.tables, config.repository, triton)
    await releases.start()
    await asyncio.wait_for(releases.warm(), 10)
    yield RankingService(config, releases, ImmediateSource(reader), ListSink())
    await releases.close()


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_model_is_told_where_to_compute(tmp_path, monkeypatch, device):
    monkeypatch.setenv("FRESHRANK_MODEL_DEVICE", device)
    config = server_config(load_settings(home=tmp_path))
    write_ranker(config.releases, write_tables(config.tables), "related")
    server = RankingServer(config, ImmediateSource(MemoryReader()), ListSink())

    async def scenario() -> None:
        await server.start()
        await server.stop()

    asyncio.run(scenario())
    (described,) = config.repository.glob("*/config.pbtxt")
    assert f'parameters {{ key: "device" value: {{ string_value: "{device}" }} }}' in described.read_text()


def rank_request(**changes) -> RankRequest:
    fields = {"ranker": "related", "user_id": 7, "candidate_ids": np.arange(1, 4, dtype="<u8").tobytes(), "candidate_kind": 1}
    return RankRequest(**fields, request_time_ms=NOW_MS, **changes)


def test_a_far_deadline_neither_waits_nor_asks_for_so_long(tmp_path):
    class Hurried(ScriptedTriton):
        async def infer(self, *arguments, timeout_s):
            self.timeout_s = timeout_s
            return await super().infer(*arguments)

    async def scenario() -> None:
        triton, reader = Hurried(), MemoryReader()
        async with ranking_service(tmp_path, triton, reader, after_wait_s_max=0.05, deadline_s_max=1.0) as service:
            request = rank_request()
            at = reader.position(7)
            request.after.add(partition=at.partition, offset=at.offset + 1)
            response = await asyncio.wait_for(service.rank(request.SerializeToString(), Call()), 0.9)
            assert not response.after_reached
            assert response.tier == TIER_MODEL
            assert 0.5 < triton.timeout_s <= 0.95

    asyncio.run(scenario())


def test_an_explanation_is_in_no_figure_of_rankings(tmp_path):
    async def scenario() -> None:
        reader = MemoryReader()
        reader.put(7, make_events(5))
        async with ranking_service(tmp_path, ScriptedTriton(), reader) as service:
            absent = Arm(name="absent", release_id="related-20990101T000000Z-00000000", share=10_000)
            service.experiments.set("related", Experiment(name="exp", arms=[absent]))
            request = rank_request()
            at = reader.position(7)
            request.after.add(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset)
            found = await service.explain(request.SerializeToString(), Call())
            assert found.by_model
            assert any(action.left_out for action in found.actions)
            assert service.telemetry.counts() == {"explained": 1}
            assert {stage: sum(histogram.counts) for stage, histogram in service.telemetry.stages().items()} == dict.fromkeys(STAGES, 0)

    asyncio.run(scenario())


def test_a_tier_that_was_asked_for_is_no_degraded_one_and_a_lower_one_is(tmp_path):
    async def scenario() -> None:
        triton = ScriptedTriton()
        async with ranking_service(tmp_path, triton, MemoryReader()) as service:

            async def rank(tier=TIER_UNSPECIFIED):
                answer = await service.rank(rank_request(tier=tier).SerializeToString(), Call())
                return answer.tier, service.telemetry.counts()["rankings_degraded"]

            assert await rank() == (TIER_MODEL, 0)
            assert await rank(TIER_CALLER_ORDER) == (TIER_CALLER_ORDER, 0)
            service.experiments.set("related", Experiment(name="exp", arms=[Arm(name="noop", noop=True, share=10_000)]))
            assert await rank() == (TIER_CALLER_ORDER, 0)
            service.experiments.set("related", None)
            triton.answer = ModelUnavailableError("gone")
            assert await rank() == (TIER_CALLER_ORDER, 1)
            assert await rank(TIER_SMALL) == (TIER_CALLER_ORDER, 2)  # there is no small model

    asyncio.run(scenario())


def test_only_fair_timeouts_in_a_row_count_against_a_model():
    async def scenario(triton, gate):
        async def time_out(times, timeout_s):
            triton.answer = ModelTimeoutError("slow")
            for _ in range(times):
                with pytest.raises(ModelTimeoutError):
                    await gate.infer(REQUEST, timeout_s=timeout_s)

        await time_out(10, 0.01)
        assert gate.open
        await time_out(2, 1.0)
        triton.answer = None
        await gate.infer(REQUEST, timeout_s=1)
        await time_out(2, 1.0)
        assert gate.open
        await time_out(1, 1.0)
        assert not gate.open

    gated(scenario)


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), np.zeros(2, np.float32)])
def test_an_answer_that_is_no_probability_is_no_answer(answer):
    async def scenario(triton, gate):
        triton.answer = answer
        if isinstance(answer, np.ndarray):

            async def infer(_model, _tensors, _output, **_):
                return answer

            triton.infer = infer
        with pytest.raises(ModelUnavailableError):
            await gate.infer(REQUEST, timeout_s=1)
        assert not gate.open

    gated(scenario)


def test_a_request_to_triton_says_what_is_in_it_whatever_was_asked_before():
    random = np.random.default_rng(1)
    asked = [{"a": random.random((n, 2)).astype(np.float16), "b": random.integers(0, 9, 3).astype(np.int64)} for n in (1, 2, 1)]
    asked.append({"a": asked[0]["a"].astype(np.float32), "b": asked[0]["b"]})

    async def scenario():
        seen = []

        async def answer(data, _context):
            seen.append(data)
            return ModelInferResponse(
                outputs=[{"name": "p", "datatype": "FP32", "shape": [1, 1]}], raw_output_contents=[np.float32([0.5]).tobytes()]
            )

        method = grpc.unary_unary_rpc_method_handler(answer, ModelInferRequest.FromString, ModelInferResponse.SerializeToString)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method}),))
        triton = TritonModels(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        for tensors in asked:
            assert await triton.infer("m", tensors, "p", timeout_s=5) == [0.5]
        await triton.close()
        await server.stop(None)
        return seen

    types = {"float16": "FP16", "float32": "FP32", "int64": "INT64"}
    for tensors, got in zip(asked, asyncio.run(scenario()), strict=True):
        assert got == ModelInferRequest(
            model_name="m",
            inputs=[{"name": name, "datatype": types[str(x.dtype)], "shape": (1, *x.shape)} for name, x in tensors.items()],
            outputs=[{"name": "p"}],
            raw_input_contents=[x.tobytes() for x in tensors.values()],
        )

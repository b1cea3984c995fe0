"""Every tier of the ranking service against a real Triton: asked for, and when parts or time are missing; callers who go away."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from serving_stack import CANDIDATES, STRANGER, USER, Stack, serving
from serving_world import DOMAIN, ITEMS, NOW_MS, PRODUCT, VIDEO, write_ranker

from features.tables import Member, write_generation
from inference import ladder
from inference.client import RankError, typed
from inference.popularity import SPACE
from inference.release import load_small, open_release, release_folder
from inference.small import SmallInputs, small_shapes
from protos.v1.ranking_pb2 import (
    TIER_CALLER_ORDER,
    TIER_EMBEDDING,
    TIER_FEWER,
    TIER_MODEL,
    TIER_POPULARITY,
    TIER_SMALL,
    RankRequest,
    Tier,
)
from protos.v1.ranking_pb2_grpc import RankingStub

pytestmark = pytest.mark.servers
SOLD = np.arange(1, ITEMS + 1, dtype=np.float32)


def small_weights() -> bytes:
    from safetensors.numpy import save

    random = np.random.default_rng(4)
    shapes = small_shapes(SmallInputs(DOMAIN, "home"), 2)
    return save({name: random.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("tiers")
    ids = np.arange(1, ITEMS + 1, dtype=np.uint64)
    write_generation(folder / "tables", SPACE, NOW_MS, {"item.video": Member(ids, features={"popularity": SOLD})})
    with serving(folder, small=small_weights()) as stack:
        yield stack


def rank(stack: Stack, tier: int = 0, *, ranker="home", user_id=USER, candidates=CANDIDATES, kinds=VIDEO, timeout_s=20.0):
    ids = np.array(list(candidates), "<u8").tobytes()
    request = RankRequest(ranker=ranker, user_id=user_id, candidate_ids=ids, candidate_kind=kinds, request_time_ms=NOW_MS, tier=tier)
    with stack.client() as client:
        return typed(client.call(request, timeout_s=timeout_s))


def until(true, timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def counted(stack: Stack, name: str) -> float:
    return stack.server.statistics().get(name, 0)


@pytest.mark.parametrize(
    ("tier", "ranker", "user", "answered"),
    [
        (0, "home", USER, "model"),
        (TIER_MODEL, "home", STRANGER, "model"),
        (TIER_SMALL, "home", USER, "small"),
        (TIER_SMALL, "home", STRANGER, "small"),
        (TIER_EMBEDDING, "home", USER, "embedding"),
        (TIER_EMBEDDING, "home", STRANGER, "popularity"),  # no vector of the user: the next one
        (TIER_POPULARITY, "home", USER, "popularity"),
        (TIER_CALLER_ORDER, "home", USER, "caller_order"),
        (TIER_SMALL, "related", USER, "popularity"),  # neither a small model nor user vectors
    ],
)
def test_a_tier_that_is_asked_for_or_the_next_one_answers_is_named_and_counted(stack, tier, ranker, user, answered):
    before = counted(stack, f"tier_{answered}")
    ranking = rank(stack, tier, ranker=ranker, user_id=user)
    assert ranking.tier == answered
    assert counted(stack, f"tier_{answered}") == before + 1
    assert Tier.Name(stack.record().tier) == f"TIER_{answered.upper()}"
    assert sorted(ranking.ids.tolist()) == CANDIDATES
    assert set(ranking.head_scores) == (set(DOMAIN.ranker[ranker].heads) if answered in ("model", "small") else set())


def test_the_small_models_answer_is_that_of_its_release(stack):
    ranking = rank(stack, TIER_SMALL)
    record = stack.record()
    served = stack.server.releases._served["home"]
    small = load_small(open_release(release_folder(stack.config.releases, ranking.release_id)))
    from features.request import inputs_from_request
    from features.sequence import decode_row

    packed = served.packer.pack(inputs_from_request(DOMAIN, record.request, decode_row(stack.reader.rows[USER]).events))
    probability = small.probabilities(packed.tensors)
    scores = (probability[:, 0] - 0.5 * probability[:, 1]).astype(np.float32)
    np.testing.assert_allclose(np.frombuffer(record.scores, "<f4"), scores, atol=1e-6)
    assert ranking.ids.tolist() == [CANDIDATES[i] for i in np.argsort(-scores, kind="stable")]


def test_popularity_is_how_often_and_unknown_items_are_last(stack):
    ranking = rank(stack, TIER_POPULARITY, candidates=[3, 400, 9999, 17])
    assert ranking.ids.tolist() == [400, 17, 3, 9999]
    assert ranking.scores.tolist() == [400.0, 17.0, 3.0, 0.0]
    assert rank(stack, TIER_POPULARITY, candidates=[3, 400], kinds=PRODUCT).scores.tolist() == [0.0, 0.0]  # no member of that kind


@pytest.mark.parametrize("tier", [TIER_FEWER, 99])
def test_a_tier_that_cannot_be_asked_for_is_refused_by_name(stack, tier):
    with pytest.raises(RankError, match=r"tier: .* cannot be asked for; allowed: TIER_MODEL, TIER_SMALL") as refused:
        rank(stack, tier)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_with_little_time_the_model_scores_the_candidates_that_look_best(stack):
    whole, small = rank(stack), rank(stack, TIER_SMALL)
    gate = stack.server.releases._served["home"].gate

    async def slow_down() -> None:  # as if a candidate took 100 ms: the time of a call is enough for 60 of them
        gate._cost_s, gate._cost_at_s = 0.1, time.monotonic()

    stack.run(slow_down())
    try:
        before = counted(stack, "tier_fewer")
        ranking, none = rank(stack, timeout_s=7.6), rank(stack, timeout_s=1.5)
    finally:
        gate._cost_s = 0.0
    assert (ranking.tier, none.tier) == ("fewer", "small")
    assert counted(stack, "tier_fewer") == before + 1
    asked = ~np.isnan(ranking.head_scores["click"])
    assert 8 <= asked.sum() < len(CANDIDATES)
    assert asked[: asked.sum()].all()  # the rest stands behind
    assert (np.diff(ranking.scores) <= 0).all()
    # What was asked is what the small model thinks best, with the model's own scores; the rest is in the small model's order.
    assert set(ranking.ids[asked].tolist()) == set(small.ids[: asked.sum()].tolist())
    score_of = dict(zip(whole.ids.tolist(), whole.scores.tolist(), strict=True))
    np.testing.assert_allclose([score_of[item] for item in ranking.ids[asked].tolist()], ranking.scores[asked], atol=1e-5)
    assert ranking.ids[~asked].tolist() == small.ids[asked.sum() :].tolist()


@pytest.mark.parametrize("given", [[3.0, 2.0, float(np.finfo(np.float32).min)], [3e8, 2e8, 1e8], [-1e30, 2.0, 1.0]])
def test_behind_what_the_model_scored_every_place_is_one_of_its_own(stack, given):
    served = stack.server.releases._served["home"]
    rank(stack, candidates=range(1, 41))
    from features.request import inputs_from_request
    from features.sequence import decode_row

    packed = served.packer.pack(inputs_from_request(DOMAIN, stack.record().request, decode_row(stack.reader.rows[USER]).events))
    chosen = np.array([5, 10, 20])
    promising = [place for place in ladder._promising(served, packed).tolist() if place not in chosen]
    scored = ladder._behind(chosen, np.array(promising), np.full((3, 2), 0.5, np.float32), np.array(given, np.float32))
    order = np.argsort(-scored.scores, kind="stable")
    assert len(np.unique(scored.scores)) == 40
    numbers = [place for place, score in zip(chosen, given, strict=True) if score > np.finfo(np.float32).min]
    assert set(order[: len(numbers)]) == set(numbers)
    assert order[len(numbers) : len(numbers) + 37].tolist() == promising


def test_requests_that_come_together_get_the_answers_they_would_get_alone(stack):
    sizes = [1, 100, 7, 300, 33, 64, 2, 129]
    alone = [rank(stack, candidates=range(1, size + 1)) for size in sizes]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = list(pool.map(lambda size: rank(stack, candidates=range(1, size + 1)), sizes))
            for one, other in zip(alone, together, strict=True):
                assert other.tier == "model"
                np.testing.assert_allclose(other.scores, one.scores, atol=1e-5)
                assert sorted(other.ids.tolist()) == sorted(one.ids.tolist())


def test_a_caller_who_goes_away_ends_the_work_everywhere_and_is_counted(stack):
    before = counted(stack, "cancelled")
    ids = np.array(CANDIDATES, "<u8").tobytes()
    request = RankRequest(ranker="home", user_id=USER, candidate_ids=ids, candidate_kind=VIDEO, request_time_ms=NOW_MS)
    request.after.add(log_epoch=0, partition=stack.reader.position(USER).partition, offset=10**6)
    with grpc.insecure_channel(stack.address) as channel:
        call = RankingStub(channel).Rank.future(request, timeout=10.0)
        until(lambda: counted(stack, "in_flight") == 1)
        call.cancel()
        until(lambda: counted(stack, "cancelled") == before + 1 and counted(stack, "in_flight") == 0)
    assert counted(stack, "cancelled") == before + 1
    assert rank(stack).tier == "model"  # and nobody's place is lost


def test_without_triton_the_small_model_answers_and_the_model_returns_by_itself(stack):
    rank(stack)
    stack.triton.kill()
    try:
        tiers = {rank(stack).tier for _ in range(20)}
        cold = rank(stack, ranker="related").tier
    finally:
        stack.triton.start()
    assert tiers == {"small"}
    assert cold == "popularity"
    assert stack.eventually_tier("model").tier == "model"


def test_a_model_that_fails_right_after_its_return_rests_longer_each_time(stack):
    gate = stack.server.releases._served["related"].gate

    async def trips() -> list[float]:
        from inference.triton import ModelUnavailableError

        rests = []
        for _ in range(3):
            await gate.opened.wait()
            gate._trip(ModelUnavailableError("fails under load, not when probed"))
            rests.append(gate._rest_s)
        gate._rest_s = 0.0
        await gate.opened.wait()
        return rests

    rests = stack.run(trips())
    assert rests[2] == 2 * rests[1] > rests[0]


def test_nothing_of_a_change_of_tables_blocks_the_event_loop(stack):
    """A generation of 200 MB is checked, mapped and switched to while rankings go on: the loop is late by its own work only."""
    random = np.random.default_rng(9)
    vectors = random.normal(size=(1_000_000, 16)).astype(np.float16).repeat(6, axis=0)
    members = {"item.video": Member(np.arange(1, len(vectors) + 1, dtype=np.uint64), vectors)}
    generation = write_generation(stack.config.tables, "related_items", NOW_MS + 1000, members).name
    del vectors, members
    release_id = rank(stack, ranker="related").release_id
    lag = stack.server.service.telemetry.histograms()["loop_lag_seconds"]
    before, begun_s = list(lag.counts), time.monotonic()
    switching = asyncio.run_coroutine_threadsafe(stack.server.switch("related", release_id, {"related_items": generation}), stack.loop)
    while not switching.done():
        assert rank(stack, TIER_SMALL).tier == "small"
    switching.result()
    took_s = time.monotonic() - begun_s
    longest_s = max(
        (bound for bound, count, earlier in zip((*lag.bounds, 10.0), lag.counts, before, strict=True) if count > earlier), default=0.0
    )
    assert rank(stack, ranker="related").generations["related_items"] == generation
    assert longest_s <= max(0.2, took_s / 2)  # on the loop, the checksum alone would have taken nearly all of that time


def test_a_release_without_a_small_model_still_serves(stack):
    release = write_ranker(stack.config.releases, stack.generations, "related", created_ms=NOW_MS + 1000, seed=5)
    stack.run(stack.server.switch("related", release.release_id))
    assert rank(stack, ranker="related").release_id == release.release_id

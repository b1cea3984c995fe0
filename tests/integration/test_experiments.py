"""Arms, controls, shadows and explanations on a real server with a real Triton."""

import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from serving_stack import CANDIDATES, STRANGER, USER, Stack, serving
from serving_world import DOMAIN, NOW_MS, VIDEO, make_events, write_ranker

from features.request import inputs_from_request
from features.sequence import decode_row
from inference.experiments import choose, shuffled
from inference.explain import ACTIONS_MAX, kendall_tau
from inference.release import open_release, release_folder
from inference.rescore import Rescorer
from inference.scoring import best_first
from inference.telemetry import Telemetry
from protos.v1.ranking_pb2 import TIER_CALLER_ORDER, TIER_MODEL, Arm, Experiment, RankRequest, Shadow
from protos.v1.ranking_pb2_grpc import RankingStub

pytestmark = pytest.mark.servers
ALL = 10_000
KEEP = Experiment(name="exp", arms=[Arm(name="keep", release_id="x", share=1)])


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    with serving(tmp_path_factory.mktemp("experiments"), rankers=("home",), model_device="cpu") as stack:
        yield stack


@pytest.fixture(scope="module")
def other(stack) -> str:
    """A release that is there and not served."""
    return write_ranker(stack.config.releases, stack.generations, "home", created_ms=NOW_MS + 60_000, seed=5).release_id


@pytest.fixture(autouse=True)
def nothing_runs(stack, other):
    """Before each test: an experiment that keeps `other` loaded, which takes seconds, and gives it to none of the tests' users."""
    assert not any(choose(KEEP, user).arm for user in (*range(1, 31), USER, STRANGER))
    run(stack, Arm(name="keep", release_id=other, share=1))


def until(true, timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def run(stack: Stack, *arms: Arm, shadows=()) -> Experiment:
    """Announces an experiment and waits until all that it names is in use."""
    experiment = Experiment(ranker="home", name="exp", arms=arms, shadows=shadows)
    stack.server.experiment("home", experiment)
    beside = stack.server.releases.beside
    until(lambda: stack.server.service.experiments.running.get("home") == experiment)
    until(lambda: beside.statistics()["beside"] == beside.statistics()["beside_in_use"])
    return experiment


def counted(stack: Stack, name: str) -> float:
    return stack.server.statistics().get(name, 0)


def request(**changes) -> RankRequest:
    fields = {"ranker": "home", "user_id": USER, "candidate_ids": np.array(CANDIDATES, "<u8").tobytes(), "candidate_kind": VIDEO}
    return RankRequest(**{**fields, "request_time_ms": NOW_MS, **changes})


def ids(response) -> list[int]:
    return np.frombuffer(response.ranked_ids, "<u8").tolist()


def call(stack: Stack, **changes):
    with stack.client() as client:
        return client.call(request(**changes))


def test_users_of_an_arm_get_its_release_and_the_rest_the_served_one(stack, other):
    served = call(stack).release_id
    experiment = run(stack, Arm(name="canary", release_id=other, share=ALL // 2))
    arms = {user: choose(experiment, user).arm for user in range(1, 31)}
    assert set(arms.values()) == {"canary", ""}
    for user, arm in arms.items():
        answer = call(stack, user_id=user)
        record = stack.record()
        assert (answer.experiment, answer.arm, answer.tier) == ("exp", arm, TIER_MODEL)
        assert answer.release_id == record.release_id == (other if arm else served)
        assert (record.experiment, record.arm, record.shadow) == ("exp", arm, False)
    scores = Rescorer(open_release(release_folder(stack.config.releases, other)))
    by_canary = next(user for user, arm in arms.items() if arm)
    call(stack, user_id=by_canary)
    record = stack.record()
    packer = stack.server.releases.beside.find("home", other).packer
    tensors = packer.pack(inputs_from_request(DOMAIN, record.request, make_events(0))).tensors
    np.testing.assert_allclose(np.frombuffer(record.scores, "<f4"), scores.scores(tensors, {})[""][0], atol=1e-4)


def test_noop_answers_in_the_callers_order(stack, other):
    run(stack, Arm(name="noop", noop=True, share=ALL - 1), Arm(name="keep", release_id=other, share=1))
    answer = call(stack)
    assert (answer.arm, answer.tier, ids(answer)) == ("noop", TIER_CALLER_ORDER, CANDIDATES)
    ranking = stack.rank()
    assert (ranking.experiment, ranking.arm, ranking.tier) == ("exp", "noop", "caller_order")


def test_shuffle_moves_the_models_order_within_its_bound(stack, other):
    model = call(stack)
    run(stack, Arm(name="shuffle3", shuffle=3, share=ALL - 1), Arm(name="keep", release_id=other, share=1))
    answer = call(stack, request_id=77)
    record = stack.record()
    assert (answer.arm, answer.tier, record.shuffle_bound) == ("shuffle3", TIER_MODEL, 3)
    place = {item: i for i, item in enumerate(ids(model))}
    moved = [abs(place[item] - i) for i, item in enumerate(ids(answer))]
    assert 0 < max(moved) <= 3
    assert ids(call(stack, request_id=77)) == ids(answer)
    # The log's scores, bound and request_id say what was answered; each score stands beside its candidate.
    order = shuffled(best_first(np.frombuffer(record.scores, "<f4")), record.shuffle_bound, 77)
    assert ids(answer) == [CANDIDATES[i] for i in order]
    by_item = dict(zip(ids(model), np.frombuffer(model.scores, "<f4"), strict=True))
    np.testing.assert_allclose([by_item[item] for item in ids(answer)], np.frombuffer(answer.scores, "<f4"), atol=1e-6)


def test_an_arm_whose_release_is_not_there_falls_back_and_is_counted(stack, other):
    served, before = call(stack).release_id, counted(stack, "arm_fallbacks")
    arms = [Arm(name="lost", release_id="home-20200101T000000Z-00000000", share=ALL - 1), Arm(name="keep", release_id=other, share=1)]
    stack.server.experiment("home", Experiment(ranker="home", name="exp", arms=arms))
    until(lambda: counted(stack, "releases_beside_failures") > 0)
    answer = call(stack)
    assert (answer.arm, answer.release_id, answer.tier) == ("lost", served, TIER_MODEL)
    assert stack.server.releases.beside.find("home", "home-20200101T000000Z-00000000") is None
    assert counted(stack, "arm_fallbacks") == before + 1


def test_a_request_that_only_the_served_release_can_answer_falls_back(stack, other):
    served, before = call(stack).release_id, counted(stack, "arm_fallbacks")
    run(stack, Arm(name="canary", release_id=other, share=ALL))
    found = stack.server.releases.beside.find("home", other)
    kept, found.sequence_fingerprint = found.sequence_fingerprint, 1
    try:
        assert call(stack).release_id == served
    finally:
        found.sequence_fingerprint = kept
    assert counted(stack, "arm_fallbacks") == before + 1
    assert call(stack).release_id == other


def test_a_shadow_is_scored_from_the_same_sequence_and_logged_beside_the_answer(stack, other):
    served = call(stack).release_id
    run(stack, shadows=[Shadow(release_id=other, share=ALL)])
    before, rankings, logged = counted(stack, "shadow_logged"), counted(stack, "rankings"), len(stack.logged())
    answer = call(stack)
    until(lambda: counted(stack, "shadow_logged") == before + 1)
    ranking, shadow = stack.logged()[logged:]
    assert counted(stack, "rankings") == rankings + 1
    assert answer.release_id == ranking.release_id == served
    assert (ranking.shadow, shadow.shadow) == (False, True)
    assert (shadow.release_id, shadow.tier, shadow.request) == (other, TIER_MODEL, ranking.request)
    assert (shadow.watermark, shadow.row_digest, shadow.digest) == (ranking.watermark, ranking.row_digest, ranking.digest)
    assert shadow.scores != ranking.scores
    assert 0 < ranking.latency_us < 20e6
    assert 0 < shadow.latency_us < 20e6
    rescorer = Rescorer(open_release(release_folder(stack.config.releases, other)))
    packer = stack.server.releases.beside.find("home", other).packer
    events = decode_row(stack.reader.rows[USER]).events
    tensors = packer.pack(inputs_from_request(DOMAIN, shadow.request, events)).tensors
    np.testing.assert_allclose(np.frombuffer(shadow.scores, "<f4"), rescorer.scores(tensors, {})[""][0], atol=1e-4)


def test_shadows_give_way_to_rankings_that_wait(stack, other):
    run(stack, shadows=[Shadow(release_id=other, share=ALL)])
    admission, before = stack.server.service._admission, counted(stack, "shadow_dropped")

    async def rank_while_one_waits() -> None:
        person = await stack.server.service._read(stack.server.releases.served["home"], request(), time.monotonic() + 5, Telemetry())
        admission._waiting.append(stack.loop.create_future())
        try:
            stack.server.service._shadows.offer(request(request_id=5), person, answer, [other])
        finally:
            admission._waiting.pop()

    logged = counted(stack, "shadow_logged")
    answer = call(stack)
    until(lambda: counted(stack, "shadow_logged") == logged + 1)
    stack.run(rank_while_one_waits())
    assert counted(stack, "shadow_dropped") == before + 1
    assert counted(stack, "shadow_logged") == logged + 1


def explain(stack: Stack, **changes):
    with grpc.insecure_channel(stack.address) as channel:
        return RankingStub(channel).Explain(request(**changes), timeout=20.0)


def test_explain_gives_the_answer_its_sequence_features_and_the_effect_of_each_recent_action(stack):
    answer = call(stack, request_id=9)
    logged = len(stack.logged())
    rankings = counted(stack, "rankings")
    found = explain(stack, request_id=9)
    assert (found.by_model, ids(found.response)) == (True, ids(answer))
    np.testing.assert_allclose(np.frombuffer(found.response.scores, "<f4"), np.frombuffer(answer.scores, "<f4"), atol=1e-5)
    assert len(stack.logged()) == logged, "an explanation is no ranking"
    assert counted(stack, "rankings") == rankings

    events = decode_row(stack.reader.rows[USER]).events
    assert len(found.actions) == len(events) == 100
    newest = found.actions[0]
    assert (newest.entity_id, newest.event_time_ms) == (events[-1]["entity_id"], events[-1]["event_time_ms"])
    assert newest.action in ("click", "like")
    assert (newest.kind, newest.age_ms, newest.seen) == ("video", NOW_MS - int(events[-1]["event_time_ms"]), True)
    assert [action.left_out for action in found.actions] == [True] * ACTIONS_MAX + [False] * (100 - ACTIONS_MAX)

    # The effect of the third newest, from the release's weights and a sequence without it.
    served = stack.server.releases.served["home"]
    rescorer = Rescorer(served.release)
    whole, without = (
        rescorer.scores(served.packer.pack(inputs_from_request(DOMAIN, request(), some)).tensors, {})[""][0]
        for some in (events, np.delete(events, -3))
    )
    order = [CANDIDATES.index(item) for item in ids(found.response)]
    effect = np.frombuffer(found.actions[2].effect, "<f4")
    assert np.abs(effect).max() > 0
    np.testing.assert_allclose(effect, (whole - without)[order], atol=1e-4)
    assert found.actions[2].kendall_tau == pytest.approx(kendall_tau(whole, without), abs=0.02)
    assert len({action.effect for action in found.actions[:ACTIONS_MAX]}) == ACTIONS_MAX

    features = {feature.name: feature for feature in found.features}
    assert {name: feature.side for name, feature in features.items()} == {
        "age": "user",
        "tags": "item",
        "hour": "request",
        "price": "candidate",
    }
    assert len(np.frombuffer(features["age"].number, "<f4")) == 1
    assert np.isnan(np.frombuffer(features["price"].number, "<f4")).all()
    tags = np.frombuffer(features["tags"].code, "<i4").reshape(len(CANDIDATES), features["tags"].width)
    packed = served.packer.pack(inputs_from_request(DOMAIN, request(), events))
    np.testing.assert_array_equal(tags, packed.tensors["item_list_tags"][order])


def test_explain_without_the_model_says_so(stack):
    found = explain(stack, tier=TIER_CALLER_ORDER)
    assert not found.by_model
    assert not any(action.left_out for action in found.actions)
    assert ids(found.response) == CANDIDATES


def test_explain_refuses_what_rank_refuses_and_more_than_its_places(stack):
    with pytest.raises(grpc.RpcError) as refused:
        explain(stack, ranker="nobody")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    explainer = stack.server.service._explainer
    with explainer.place(), explainer.place(), pytest.raises(grpc.RpcError) as refused:
        explain(stack)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "explanations" in refused.value.details()
    assert explain(stack, user_id=STRANGER).by_model


def test_releases_stay_loaded_while_an_experiment_or_the_server_needs_them(stack, other):
    """The last one: another release serves from here on."""
    served, ready = call(stack).release_id, stack.server._triton.ready
    run(stack, Arm(name="before", release_id=served, share=ALL // 2), Arm(name="canary", release_id=other, share=ALL // 2))
    stack.run(stack.server.switch("home", other))
    until(lambda: not stack.server.releases._retiring)
    assert (stack.run(ready(served)), stack.run(ready(other))) == (True, True)
    stack.server.experiment("home", None)
    until(lambda: not stack.server.releases._retiring)
    assert (stack.run(ready(served)), stack.run(ready(other))) == (True, True)  # the one before stays, for going back
    answer = call(stack)
    assert (answer.release_id, answer.tier, answer.experiment) == (other, TIER_MODEL, "")

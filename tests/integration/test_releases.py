"""Releases and formulas that change under a running server, with a real Triton and broker: what serves, what scores, what is kept."""

import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from serving_stack import CANDIDATES, USER, Stack, serving
from serving_world import DOMAIN, DOMAIN_TOML, ITEMS, NOW_MS, VIDEO, ImmediateSource, ListSink, make_model, write_ranker, write_tables
from typer.testing import CliRunner

from deploy import cli
from deploy.announcing import News, announce_release, announced, formulas_of, releases_of
from deploy.bench_release import Proof, some_requests
from deploy.load import Load, run_load
from deploy.processes import kafka_config, topics
from deploy.settings import Settings, load_settings
from features.domain import parse_domain
from features.erasures import LEDGER, Erasure, append_lines
from features.samples import read_samples
from features.tables import Member, write_generation
from features.tensors import tensor_fingerprint
from inference.client import RankError
from inference.release import ReleaseError, write_release
from inference.server import RankingServer
from inference.warmup import Samples
from protos.v1.ranking_pb2 import TIER_MODEL, RankingRecord, RankRequest
from streams.broadcast import Announcements
from streams.kafka import ensure_topics

pytestmark = pytest.mark.servers
SPACE = "home_items"
SCORED = "click - 2*hide + 0.01*log1p(price)"
WITH_SCORE = DOMAIN_TOML.replace("candidates_max = 300", 'candidates_max = 300\nscore = "click + hide"')


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("home")
    # Models stay in Triton: loading one takes seconds. That they leave it is shown in test_server.py.
    with serving(folder, rankers=("home",), samples=folder, unload_delay_s=600.0, model_device="cpu") as stack:
        stack.server.service.samples._every_s = 0.0
        yield stack


@pytest.fixture(scope="module")
def first(stack) -> str:
    return stack.server.releases.served["home"].release.release_id


@pytest.fixture(scope="module")
def second(stack) -> str:
    """Its domain file has a formula."""
    return another(stack, make_model("home", seed=2), 2, domain_toml=WITH_SCORE)


@pytest.fixture(scope="module")
def broken(stack) -> str:
    """Its model answers a blank request, but none with an item that has tags."""
    model = make_model("home", seed=3)
    with torch.no_grad():
        model.state_dict()["features.item.lists.tags.weight"][1:] = float("nan")
    return another(stack, model, 3)


@pytest.fixture(autouse=True)
def as_it_was(stack, first) -> Iterator[None]:
    yield
    stack.server.announce_formula("home", "")
    forget_samples(stack)
    stack.run(stack.server.switch("home", first, stack.generations))


def forget_samples(stack) -> None:
    async def forget() -> None:  # on the loop, where a request that was answered is kept only after its answer
        for kept in stack.server.service.samples._kept.values():
            kept.clear()

    stack.run(forget())


def another(stack, model, seconds: int, domain_toml: str = DOMAIN_TOML) -> str:
    return write_release(
        stack.config.releases,
        model=model,
        domain_toml=domain_toml,
        ranker="home",
        created_ms=NOW_MS + seconds * 1000,
        generations=stack.generations,
        metrics={},
    ).release_id


def scored(ranking, text) -> np.ndarray:
    """What a formula gives, by NumPy."""
    heads = {name: values.astype(np.float64) for name, values in ranking.head_scores.items()}
    return eval(text, {"where": np.where, "log1p": np.log1p}, heads)


def test_the_requests_formula_scores_and_is_answered_and_logged(stack):
    price = np.linspace(1, 50, len(CANDIDATES))
    ranking = stack.rank(candidate_features={"price": price}, score_formula=SCORED)
    of = dict(zip(CANDIDATES, price, strict=True))
    prices = np.log1p(np.float32([of[item] for item in ranking.ids.tolist()]))
    np.testing.assert_allclose(ranking.scores, scored(ranking, "click - 2*hide") + 0.01 * prices, atol=1e-6)
    assert (np.diff(ranking.scores) <= 0).all()
    assert ranking.score_formula == stack.record().score_formula == stack.record().request.score_formula == SCORED
    assert stack.rank().score_formula == stack.record().score_formula == ""
    assert stack.rank(tier="embedding", score_formula=SCORED).score_formula == "", "a tier without a model computes no formula"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"score_formula": "clicks"},
            "score_formula: 'clicks': 'clicks' is neither a head nor a number of the ranker; allowed: click, hide",
        ),
        ({"score_formula": "click", "head_weights": {"hide": -1.0}}, "score_formula: not together with head_weights"),
        ({"score_formula": "click + " * 99 + "click"}, "score_formula: a formula has 1 to 500 characters"),
    ],
)
def test_a_wrong_formula_is_refused_by_field(stack, fields, why):
    with pytest.raises(RankError) as refused:
        stack.rank(**fields)
    assert refused.value.code.name == "INVALID_ARGUMENT"
    assert why in refused.value.message


def test_request_before_announcement_before_domain_file_before_utilities(stack, second):
    assert stack.rank().score_formula == ""
    domain = parse_domain(WITH_SCORE, source="test")
    assert tensor_fingerprint(domain, "home") == tensor_fingerprint(DOMAIN, "home"), "older releases keep their interface"
    with pytest.raises(ReleaseError, match=r"ranker.home.score: 'clicks': 'clicks' is neither a head"):
        another(stack, make_model("home"), 9, WITH_SCORE.replace("click + hide", "clicks"))
    stack.run(stack.server.switch("home", second))
    by_domain = stack.rank()
    assert by_domain.score_formula == "click + hide"
    np.testing.assert_allclose(by_domain.scores, scored(by_domain, "click + hide"), atol=1e-6)
    stack.server.announce_formula("home", "hide")
    by_announcement = stack.rank()
    assert by_announcement.score_formula == "hide"
    np.testing.assert_allclose(by_announcement.scores, by_announcement.head_scores["hide"], atol=1e-6)
    assert stack.rank(score_formula="-click").score_formula == "-click"
    weighted = stack.rank(head_weights={"hide": -3.0})  # a caller who gives weights asks for the sum
    assert weighted.score_formula == ""
    np.testing.assert_allclose(weighted.scores, scored(weighted, "click - 3*hide"), atol=1e-6)
    refused = stack.server.statistics().get("formula_refused", 0)
    stack.server.announce_formula("home", "likes + 1")
    assert stack.rank().score_formula == "hide", "what cannot be used leaves the former one in force"
    assert stack.server.statistics()["formula_refused"] == refused + 1, "counted once, not for each request"
    stack.server.announce_formula("home", "")
    assert stack.rank().score_formula == "click + hide"


def test_going_back_takes_what_was_kept_and_the_next_switch_drops_it(stack, first, second, broken):
    releases = stack.server.releases
    before, scores = releases.served["home"], stack.rank().scores.tolist()
    stack.run(stack.server.switch("home", second))
    between = releases.served["home"]
    started_s = time.monotonic()
    stack.run(stack.server.switch("home", first))
    assert time.monotonic() - started_s < 2.0, "nothing is loaded or verified"
    assert releases.served["home"] is before
    assert stack.rank().scores.tolist() == scores
    stack.run(stack.server.switch("home", second))
    assert releases.served["home"] is between
    forget_samples(stack)
    stack.run(stack.server.switch("home", broken))
    assert releases._kept["home"] is between, "the first one is dropped"
    newer = write_tables(stack.config.tables, created_ms=NOW_MS + 5_000, seed=12)
    stack.run(stack.server.switch("home", second, stack.generations))
    stack.run(stack.server.switch("home", second, newer))
    assert stack.rank().generations["home_items"] == newer["home_items"]
    assert releases._kept["home"].release.release_id == broken, "other generations of one release keep nothing"
    stack.run(stack.server.switch("home", first, newer))
    stack.run(stack.server.switch("home", second, stack.generations))  # kept, but with other generations
    assert stack.rank().generations["home_items"] == stack.generations["home_items"]
    assert stack.rank().tier == "model"


def test_a_release_is_asked_sampled_requests_before_it_serves(stack, second, broken):
    stack.rank()
    stack.rank(candidates=CANDIDATES[:3], candidate_features={"price": [1.0, 5.0, 2.0]}, request_time_ms=0)
    asked = stack.server.statistics().get("warm_requests", 0)
    stack.run(stack.server.switch("home", second))
    after = stack.server.statistics()
    assert after["warm_requests"] == asked + 2
    assert after.get("warm_failures", 0) == 0
    with pytest.raises(RuntimeError, match="not a number"):
        stack.run(stack.server.switch("home", broken))
    assert stack.rank().release_id == second
    assert stack.server.statistics()["warm_failures"] == 2


def test_a_start_is_warmed_by_what_the_last_process_left_but_no_erased_user(stack):
    erased = 4_711
    stack.rank()
    stack.rank(user_id=erased)
    stack.rank(user_id=8, identities=[erased])
    append_lines(stack.config.samples / LEDGER, [Erasure(erased, 1, 1, 0, 5, NOW_MS).to_json()])
    stack.run(stack.server.service.samples.write())
    left = read_samples(stack.config.samples / "warm" / "home.pb")
    assert {request.user_id for request in left} == {USER}
    assert len(stack.server.service.samples.of("home")) == len(left), "they are forgotten in memory, too"
    server = RankingServer(replace(stack.config, port=0), ImmediateSource(stack.reader), ListSink())
    stack.run(server.start())
    stack.run(server.warm(), 60)
    assert server.statistics()["warm_requests"] == len(left)
    stack.run(server.stop())


def test_samples_are_bounded_and_a_damaged_file_is_read_as_far_as_it_goes(tmp_path):
    samples = Samples(every_s=60.0)
    for user in range(3):
        samples.offer("home", RankRequest(user_id=user).SerializeToString())
    assert len(samples.of("home")) == 1, "one in a minute"
    samples = Samples(every_s=0.0)
    samples.offer("home", bytes(1 << 20))
    for user in range(100):
        samples.offer("home", RankRequest(user_id=user).SerializeToString())
    users = [RankRequest.FromString(data).user_id for data in samples.of("home")]
    assert users == list(range(99, 67, -1))
    path = tmp_path / "home.pb"
    path.write_bytes(b"\x09\x11" + (5).to_bytes(8, "little") + b"\x09\x11cut")
    assert [request.user_id for request in read_samples(path)] == [5]


def test_under_traffic_no_request_fails_and_no_ranking_is_mixed(stack, first, second):
    """Both models are loaded before, since the load is short; loading one under traffic: test_server.py."""
    vectors = np.random.default_rng(7).normal(size=(ITEMS, 32)).astype(np.float16)
    names = ("item.video", "item.product", "user")
    members = {name: Member(np.arange(1, ITEMS + 1, dtype=np.uint64), vectors) for name in names}
    generations = [stack.generations[SPACE], write_generation(stack.config.tables, SPACE, NOW_MS + 9_000, members).name]
    pairs = list(itertools.product((first, second), generations))
    requests = some_requests(np.random.default_rng(3), ITEMS, NOW_MS, 8)
    for request in requests:
        request.candidate_kind = VIDEO
    proof = Proof(stack.config.releases, stack.config.tables, SPACE, pairs, requests, stack.generations)
    stack.run(stack.server.switch("home", second, stack.generations))
    stack.run(stack.server.switch("home", first, stack.generations))
    data, begin = tuple(request.SerializeToString() for request in requests), len(stack.logged())
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(run_load, Load(stack.address, data, 50.0, 4.0, "constant", timeout_s=10.0))
        until = begin
        for release, generation in itertools.cycle([pairs[i] for i in (1, 0, 2, 3, 1, 0)]):
            while len(stack.sink.records) < until and not loading.done():  # a few rankings of each
                time.sleep(0.02)
            if loading.done():
                break
            stack.run(stack.server.switch("home", release, {**stack.generations, SPACE: generation}))
            until = len(stack.sink.records) + 4
        outcome = loading.result()
    records = stack.logged()[begin:]
    of_model = [record for record in records if record.tier == TIER_MODEL]
    assert {status: len(times) for status, times in outcome.latency_ms.items()} == {"OK": len(records)}
    assert len(of_model) > len(records) / 2
    assert {(record.release_id, record.generations[SPACE]) for record in of_model} == set(pairs), "the load met each of them"
    assert all(proof.holds(record) for record in of_model)
    mixed = RankingRecord.FromString(of_model[0].SerializeToString())
    mixed.release_id = second if mixed.release_id == first else first
    assert not proof.holds(mixed), "the proof sees a record that names one release and holds another's scores"
    mixed = RankingRecord.FromString(of_model[0].SerializeToString())
    mixed.generations[SPACE] = next(name for name in generations if name != mixed.generations[SPACE])
    assert not proof.holds(mixed)


@pytest.fixture
def settings(stack, kafka, tmp_path) -> Settings:
    """The stack's home, and a topic of this test."""
    path = tmp_path / "domain.toml"
    path.write_text(DOMAIN_TOML)
    names = {f"topic_{name}": f"{name}-{tmp_path.name}" for name in ("actions", "dead_letters", "rankings", "announcements", "rates")}
    found = load_settings(home=stack.config.releases.parent, domain=path, kafka_bootstrap=kafka.bootstrap, **names)
    ensure_topics(kafka_config(found), topics(found), partition_count=1)
    return found


def command(settings: Settings, *arguments: str) -> Any:
    """Runs a freshrank command; returns what it printed."""
    result = CliRunner().invoke(cli.app, arguments, env=settings.as_environment() | {"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in arguments else result.output


def starts_with(stack, settings) -> str:
    """The release that a server which starts now serves."""
    known = announced(settings)
    server = RankingServer(replace(stack.config, port=0, samples=None), ImmediateSource(stack.reader), ListSink())
    stack.run(server.start(releases_of(known), formulas_of(known)))
    found = server.releases.served["home"].release.release_id
    stack.run(server.stop())
    return found


def test_commands_change_what_serves_and_a_restart_keeps_to_it(stack, first, second, broken, settings):
    assert starts_with(stack, settings) == broken, "nothing is announced: the folder's newest"
    news = News()
    topic = Announcements(kafka_config(settings), settings.topic_announcements, on_change=news.take)
    try:
        news.attach(stack.server)
        now_ms = time.time_ns() // 1_000_000
        for release in (first, second):
            announce_release(settings, "home", release, now_ms)
        serves(stack, second)
        with pytest.raises(ValueError, match="neither a head nor a number"):
            command(settings, "formula", "--ranker", "home", "clicks - 1")
        command(settings, "formula", "--ranker", "home", "click - 3*hide")
        eventually(lambda: stack.rank().score_formula == "click - 3*hide")
        assert f"{second} -> {first}" in command(settings, "rollback", "--ranker", "home")
        serves(stack, first)
        assert starts_with(stack, settings) == first, "the rollback outlives a restart, though there are newer ones"
        with pytest.raises(ValueError, match=f"older than {first}"):
            command(settings, "rollback")
        listed = command(settings, "releases", "--json")
        status = {row["release_id"]: row["status"] for row in listed["releases"]}
        assert (status[first], status[second], listed["formulas"]) == ("announced", "before", {"home": "click - 3*hide"})
        command(settings, "rollback", "--to", second)
        serves(stack, second)
        command(settings, "formula", "--clear")
        eventually(lambda: stack.rank().score_formula == "click + hide")
        made = write_ranker(stack.config.releases, stack.generations, "home", created_ms=now_ms + 3_600_000, seed=72)
        assert starts_with(stack, settings) == made.release_id, "published behind the announcement, without a running stack"
    finally:
        topic.close()


def serves(stack, release_id: str) -> None:
    eventually(lambda: stack.rank().release_id == release_id)


def eventually(condition, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)

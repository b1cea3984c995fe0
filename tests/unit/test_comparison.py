"""Two releases compared from ranking records: against plain loops, and as a person sees it."""

import json
from itertools import combinations

import numpy as np
import pytest

from deploy.commands_compare import comparison_tables
from inference.comparison import FINAL, Comparison, correlation, top_overlap
from inference.explain import kendall_tau
from inference.plots import plot_releases
from protos.v1.ranking_pb2 import TIER_CALLER_ORDER, TIER_MODEL, RankingRecord, RankRequest


def record(release, request_id, scores, *, shadow=False, latency_us=0, tier=TIER_MODEL, arm=None, user_id=7):
    scores = np.array(scores, np.float32)
    return RankingRecord(
        request=RankRequest(request_id=request_id, user_id=user_id),
        release_id=release,
        tier=tier,
        scores=scores.tobytes(),
        head_scores={"click": (scores / 2).tobytes()} if tier == TIER_MODEL else {},
        shadow=shadow,
        latency_us=latency_us,
        experiment="exp" if arm is not None else "",
        arm=arm or "",
    )


def naive_tau(a, b):
    pairs = list(combinations(range(len(a)), 2))
    product = sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs)
    return product / np.sqrt(sum(a[i] != a[j] for i, j in pairs) * sum(b[i] != b[j] for i, j in pairs))


def test_agreement_is_that_of_plain_loops():
    random = np.random.default_rng(5)
    for size in (2, 3, 10, 60):
        a, b = random.integers(0, 8, (2, size)).astype(np.float32) + np.array([0, 1], np.float32) @ np.zeros((2, size), np.float32)
        a[0], b[0] = 20, 30
        assert kendall_tau(a, b) == pytest.approx(naive_tau(a, b))
        assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    ascending = np.arange(9, dtype=np.float32)
    assert (kendall_tau(ascending, ascending), kendall_tau(ascending, -ascending)) == (1, -1)
    assert np.isnan(kendall_tau(ascending, np.ones(9, np.float32)))
    assert np.isnan(correlation(ascending, np.ones(9, np.float32)))
    assert (top_overlap(ascending, ascending), top_overlap(ascending, -ascending), top_overlap(ascending[:2], -ascending[:2])) == (1, 0, 1)
    assert top_overlap(ascending, ascending * [1, 1, 1, 1, 1, 1, 1, 1, -1]) == pytest.approx(2 / 3)


@pytest.fixture
def comparison():
    found = Comparison("a", "b")
    for i in range(1, 11):
        found.add(record("a", i, [3, 2, 1, 0], latency_us=1_000 * i, arm=""))
        found.add(record("b", i, [3, 2, 0, 1], shadow=True, latency_us=500))
    found.add(record("b", 11, [1, 0], latency_us=9_000, arm="canary"))
    found.add(record("a", 12, [0, 0], tier=TIER_CALLER_ORDER, latency_us=100, arm="noop"))
    found.add(record("b", 12, [1, 0], shadow=True, latency_us=500))
    found.add(record("c", 1, [9, 9, 9, 9]))
    return found


def test_pairs_are_by_request_and_arms_stand_side_by_side(comparison):
    result = comparison.result()
    assert result["pairs"] == 11
    assert set(result["scores"]) == {FINAL, "click"}
    figures = result["scores"][FINAL]
    assert figures["kendall_tau"]["mean"] == pytest.approx(4 / 6)
    assert figures["correlation"]["p50"] == pytest.approx(0.8)
    assert figures["top3_overlap"]["p90"] == pytest.approx(2 / 3)
    base, other = result["base"], result["other"]
    assert (base["rankings"], base["shadows"], other["rankings"], other["shadows"]) == (11, 0, 1, 11)
    assert base["tiers"] == {"TIER_CALLER_ORDER": 1, "TIER_MODEL": 10}
    assert base["latency_ms"]["p50"] == 5
    assert other["latency_ms"] == {"p50": 9, "p99": 9}
    assert other["shadow_latency_ms"] == {"p50": 0.5, "p99": 0.5}
    arms = [(arm["arm"], arm["release_id"], arm["rankings"]) for arm in result["arms"]]
    assert arms == [
        ("-", "a", 10),
        ("canary", "b", 1),
        ("noop", "a", 1),
    ]


def test_records_of_different_users_or_without_a_shadow_are_no_pair():
    found = Comparison("a", "b")
    found.add(record("a", 1, [1, 0], user_id=1))
    found.add(record("b", 1, [1, 0], user_id=2, shadow=True))
    found.add(record("a", 2, [1, 0]))
    found.add(record("b", 2, [1, 0]))
    assert found.result()["pairs"] == 0


def test_the_report_can_be_read_as_tables_as_json_and_as_a_plot(comparison, tmp_path):
    result = comparison.result()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    agreement, sides, arms = comparison_tables(result)
    assert list(agreement.columns[2].cells) == ["0.667 (0.667 to 0.667)"] * 2
    assert list(sides.columns[0].cells) == ["a", "b"]
    assert list(arms.columns[0].cells) == ["exp / - / a", "exp / canary / b", "exp / noop / a"]
    plot_releases(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    empty = Comparison("a", "b").result()
    plot_releases(empty, tmp_path / "empty.png")
    assert len(comparison_tables(empty)) == 2

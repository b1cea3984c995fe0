"""Metrics against slow naive versions."""

import itertools
import math

import numpy as np
import pytest

from inference import metrics


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, labels, request rows in mixed order; request 3 stays empty."""
    random = np.random.default_rng(seed)
    rows = random.choice([0, 1, 2, 4], 18)
    rows[:4] = [0, 1, 2, 4]
    return random.integers(0, 4, 18) / 4, random.random(18) < 0.4, rows


def naive_expected(scores: np.ndarray, labels: np.ndarray, gain: list[float]) -> float:
    """Mean over every order that sorts the scores."""
    orders = itertools.permutations(range(len(scores)))
    allowed = [order for order in orders if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))]
    return float(np.mean([sum(g for g, item in zip(gain, order, strict=False) if labels[item]) for order in allowed]))


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs(seed: int) -> None:
    scores, labels, _ = random_case(seed)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert metrics.auc(scores, labels) == pytest.approx(np.mean(pairs))


def test_auc_weights_repeat_examples() -> None:
    scores, labels, _ = random_case(3)
    times = np.random.default_rng(1).integers(0, 4, len(scores))
    assert metrics.auc(scores, labels, times) == pytest.approx(metrics.auc(np.repeat(scores, times), np.repeat(labels, times)))


def test_auc_without_one_class_is_undefined() -> None:
    assert math.isnan(metrics.auc(np.array([0.1, 0.2]), np.array([True, True])))
    assert math.isnan(metrics.auc(np.array([0.1, 0.2]), np.array([False, False])))


@pytest.mark.parametrize("seed", range(4))
def test_hits_and_ndcg_are_expected_values_over_ties(seed: int) -> None:
    scores, labels, rows = random_case(seed)
    hits, ndcg = metrics.hits(scores, labels, rows, 3), metrics.ndcg(scores, labels, rows, 2)
    assert len(hits) == len(ndcg) == 5
    for request in range(5):
        mine = rows == request
        chosen = np.flatnonzero(mine)[:6]
        if mine.sum() > 6:  # the naive version tries every order
            few = np.isin(np.arange(18), chosen)
            scores, labels, rows = scores[few | ~mine], labels[few | ~mine], rows[few | ~mine]
            hits, ndcg = metrics.hits(scores, labels, rows, 3), metrics.ndcg(scores, labels, rows, 2)
            mine = rows == request
        assert hits[request] == pytest.approx(naive_expected(scores[mine], labels[mine], [1.0, 1.0, 1.0]) if mine.any() else 0.0)
        discounts = [1 / math.log2(2), 1 / math.log2(3)]
        if labels[mine].any():
            best = sum(discounts[: int(labels[mine].sum())])
            assert ndcg[request] == pytest.approx(naive_expected(scores[mine], labels[mine], discounts) / best)
        else:
            assert math.isnan(ndcg[request])


def test_hit_weighs_users_alike() -> None:
    scores = np.array([9, 8, 7, 6, 9, 8, 5, 5], float)
    labels = np.array([1, 0, 1, 1, 0, 1, 0, 0], bool)
    rows = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    user_of_request = np.array([2**63 + 1, 2**63 + 1, 7], np.uint64)
    assert metrics.hits(scores, labels, rows).tolist() == [2.0, 1.0, 0.0]
    assert metrics.hit_at(scores, labels, rows, user_of_request) == pytest.approx((1.5 + 0.0) / 2)


def test_a_constant_score_gains_nothing_from_the_order_given() -> None:
    labels = np.array([1, 0, 0, 0, 0, 0], bool)
    rows = np.zeros(6, np.int64)
    assert metrics.hits(np.ones(6), labels, rows)[0] == pytest.approx(0.5)
    assert metrics.hits(np.ones(6), labels[::-1], rows)[0] == pytest.approx(0.5)
    assert metrics.auc(np.ones(6), labels) == 0.5


def test_log_loss_is_bounded_and_exact() -> None:
    assert metrics.log_loss(np.array([0.9, 0.2]), np.array([True, False])) == pytest.approx(-(math.log(0.9) + math.log(0.8)) / 2)
    assert metrics.log_loss(np.array([0.0]), np.array([True])) == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_head_metrics_names_every_head_and_json_has_no_nan() -> None:
    scores, labels, rows = random_case(1)
    both = np.stack([scores, 1 - scores], 1)
    figures = metrics.head_metrics(both, np.stack([labels, np.zeros(18, bool)], 1), rows, np.arange(5, dtype=np.uint64), ("click", "hide"))
    assert figures["click"].auc == metrics.auc(scores, labels)
    assert figures["click"].hit == pytest.approx(metrics.hits(scores, labels, rows).mean())
    assert figures["click"].label_rate == pytest.approx(labels.mean())
    assert figures["hide"].as_dict()["auc"] is None
    assert figures["hide"].hit == 0.0


def test_bootstrap_pairs_users() -> None:
    random = np.random.default_rng(0)
    base = {user: float(random.normal(0, 100)) for user in range(200)}
    better = {user: value + 1 + float(random.normal(0, 0.5)) for user, value in base.items()}
    mean, low, high = metrics.bootstrap_difference({**better, 999: 1.0}, base)
    assert 0.8 < low < mean < high < 1.2
    assert metrics.bootstrap_difference(better, base) == (mean, low, high)
    assert math.isnan(metrics.bootstrap_difference({1: 1.0}, {2: 1.0})[0])

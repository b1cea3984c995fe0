"""Metrics against slow versions that follow their definitions word by word."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import metrics

Case = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def cases(draw: st.DrawFn, requests: int = 4, rows: int = 14) -> Case:
    """Scores with many ties, labels, request rows in any order; requests may be empty."""
    n = draw(st.integers(1, rows))
    scores = np.array(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))) / 4
    labels = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    row = np.array(draw(st.lists(st.integers(0, requests - 1), min_size=n, max_size=n)))
    return scores, labels, row


def naive_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    return float(np.mean(pairs)) if pairs else math.nan


@settings(max_examples=200, deadline=None)
@given(cases(rows=30))
def test_grouped_auc_is_the_mean_of_each_group_s_auc(case: Case) -> None:
    scores, labels, row = case
    users = np.array([2**63 + 5, 7, 9, 11], np.uint64)[row]
    expected = {user: naive_auc(scores[users == user], labels[users == user]) for user in np.unique(users).tolist()}
    expected = {user: value for user, value in expected.items() if not math.isnan(value)}
    found, values = metrics.group_auc(scores, labels, users)
    assert dict(zip(found.tolist(), values.tolist(), strict=True)) == pytest.approx(expected)
    mean = metrics.grouped_auc(scores, labels, users)
    assert math.isnan(mean) if not expected else mean == pytest.approx(np.mean(list(expected.values())))
    assert metrics.auc(scores, labels) == pytest.approx(naive_auc(scores, labels), nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(cases(requests=2, rows=7))
def test_reciprocal_rank_is_its_mean_over_every_order(case: Case) -> None:
    scores, labels, row = case
    found = metrics.reciprocal_ranks(scores, labels, row)
    assert len(found) == row.max() + 1
    for request in range(len(found)):
        mine = np.flatnonzero(row == request)
        if not labels[mine].any():
            assert math.isnan(found[request])
            continue
        orders = [order for order in itertools.permutations(mine) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))]
        expected = np.mean([1 / (1 + next(place for place, item in enumerate(order) if labels[item])) for order in orders])
        assert found[request] == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(cases(rows=40), st.integers(1, 20))
def test_calibration_error_is_of_bins_that_no_order_changes(case: Case, bins: int) -> None:
    p, labels, _ = case
    of_bin = metrics.bin_of(p, bins)
    assert of_bin.min(initial=0) >= 0
    assert of_bin.max(initial=0) < bins
    ordered = np.sort(p)
    for value in np.unique(p):
        assert set(of_bin[p == value].tolist()) == {int(np.searchsorted(ordered, value)) * bins // len(p)}
    expected = sum(
        (of_bin == bin_).sum() / len(p) * abs(p[of_bin == bin_].mean() - labels[of_bin == bin_].mean()) for bin_ in set(of_bin.tolist())
    )
    assert metrics.calibration_error(p, labels, bins) == pytest.approx(expected)
    shuffled = np.random.default_rng(0).permutation(len(p))
    assert metrics.calibration_error(p[shuffled], labels[shuffled], bins) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 6), st.integers(0, 1000))
def test_diversity_is_of_the_pairs_and_categories_of_the_top(case: Case, k: int, seed: int) -> None:
    scores, _, row = case
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(len(scores), 3)) * (random.random((len(scores), 1)) < 0.8)
    categories = random.integers(0, 3, len(scores))
    top = metrics.top_rows(scores, row, k)
    distance, entropy = metrics.intra_list_distance(vectors[top], row[top]), metrics.category_entropy(categories[top], row[top])
    for request in range(row.max() + 1):
        mine = sorted(np.flatnonzero(row == request).tolist(), key=lambda i: (-scores[i], i))[:k]
        assert sorted(mine) == sorted(top[row[top] == request].tolist())

        def cosine(a: int, b: int) -> float:
            length = np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
            return float(vectors[a] @ vectors[b] / length) if length else 0.0

        pairs = [1 - cosine(a, b) for a, b in itertools.combinations(mine, 2)]
        assert distance[request] == pytest.approx(np.mean(pairs)) if pairs else math.isnan(distance[request])
        shares = [np.mean(categories[mine] == category) for category in set(categories[mine].tolist())]
        assert entropy[request] == pytest.approx(-sum(s * math.log(s) for s in shares), abs=1e-12) if mine else math.isnan(entropy[request])


def test_nothing_to_measure_is_undefined() -> None:
    none = np.zeros(0), np.zeros(0, bool), np.zeros(0, np.int64)
    assert math.isnan(metrics.grouped_auc(*none))
    assert math.isnan(metrics.calibration_error(none[0], none[1]))
    assert len(metrics.reciprocal_ranks(*none)) == len(metrics.top_rows(none[0], none[2], 3)) == 0
    assert math.isnan(metrics.known_mean(none[0]))
    assert math.isnan(metrics.bootstrap(none[0]).mean)


def test_the_interval_s_p_says_how_often_nothing_differs() -> None:
    random = np.random.default_rng(0)
    assert metrics.bootstrap(random.normal(0.5, 1.0, 400)).p < 0.01
    assert metrics.bootstrap(random.normal(0.0, 1.0, 400)).p > 0.05
    assert metrics.bootstrap(np.zeros(5)).p == 1.0
    found = metrics.interval(0.5, [float("nan"), 1.0, 0.0])
    assert 0.0 <= found.low < found.high <= 1.0

"""Ranking metrics a head: AUC, NDCG@k, HIT@k, log loss. Equal scores never profit from the order they came in.

Every function takes one head's scores float [N], labels bool [N] and request rows int64 [N] (any order) and is vectorised.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[np.generic]

HIT_AT = 3
NDCG_AT = 10


@dataclass(frozen=True)
class HeadMetrics:
    """One head's figures. NaN where they are not defined (no label, say)."""

    auc: float
    ndcg: float
    hit: float
    log_loss: float
    label_rate: float
    examples: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: NaN becomes None."""
        return {name: None if value != value else value for name, value in self.__dict__.items()}


def auc(scores: Array, labels: Array, weights: Array | None = None) -> float:
    """Probability that a random positive scores above a random negative, ties counting half; NaN without one of the two.

    `weights` float [N] >= 0: how often each example counts (1 where None).
    """
    _, group = np.unique(scores, return_inverse=True)
    weight = np.ones(len(scores)) if weights is None else weights.astype(np.float64)
    is_positive = labels.astype(bool)
    positives, negatives = np.bincount(group, weight * is_positive), np.bincount(group, weight * ~is_positive)
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives / 2  # negatives below each distinct score, and half of the equal ones
    return float((positives * below).sum() / pairs) if pairs else float("nan")


def log_loss(probabilities: Array, labels: Array) -> float:
    """Mean negative log likelihood; probabilities are kept 1e-7 away from 0 and 1."""
    if not len(labels):
        return float("nan")
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels.astype(bool), np.log(p), np.log1p(-p))))


def hits(scores: Array, labels: Array, request_row: Array, k: int = HIT_AT) -> F64:
    """Labelled items in the top k of each request, float64 [requests]; expected value over the orders of equal scores."""
    return _gain(scores, labels, request_row, np.ones(k))


def hit_at(scores: Array, labels: Array, request_row: Array, user_of_request: Array, k: int = HIT_AT) -> float:
    """HIT@k: a request's labelled items in its top k, averaged over a user's requests, then over users.

    Higher is better for positive actions, lower for negative ones.
    Paper: TransAct, section 4.1. Deviates: a user's requests are averaged, so that heavy users do not outweigh the rest.
    """
    return float(np.mean(user_means(hits(scores, labels, request_row, k), user_of_request)[1])) if len(user_of_request) else float("nan")


def user_means(per_request: Array, user_of_request: Array) -> tuple[Array, F64]:
    """Users and the mean of their requests' figures, NaN figures left out: (users, float64 [users])."""
    values = per_request.astype(np.float64)
    known = ~np.isnan(values)
    users, row = np.unique(user_of_request[known], return_inverse=True)
    return users, np.bincount(row, values[known], minlength=len(users)) / np.bincount(row, minlength=len(users))


def ndcg(scores: Array, labels: Array, request_row: Array, k: int = NDCG_AT) -> F64:
    """NDCG@k of each request, float64 [requests]; NaN where a request has no label. Equal scores: expected value."""
    discount = 1.0 / np.log2(np.arange(k) + 2.0)
    requests = int(request_row.max()) + 1 if len(request_row) else 0
    found = np.bincount(request_row[labels.astype(bool)], minlength=requests)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(found, k)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(found > 0, _gain(scores, labels, request_row, discount) / ideal, np.nan), np.float64)


def head_metrics(
    probabilities: Array, labels: Array, request_row: Array, user_of_request: Array, heads: tuple[str, ...]
) -> dict[str, HeadMetrics]:
    """Every figure of every head.

    Args:
        probabilities: float [N, H].
        labels: bool [N, H].
        request_row: int64 [N], rows into `user_of_request`.
        user_of_request: uint64 [R].
        heads: H names.
    """
    figures = {}
    for column, head in enumerate(heads):
        scores, label = probabilities[:, column], labels[:, column]
        per_request = ndcg(scores, label, request_row)
        figures[head] = HeadMetrics(
            auc=auc(scores, label),
            ndcg=float(np.nanmean(per_request)) if np.isfinite(per_request).any() else float("nan"),
            hit=hit_at(scores, label, request_row, user_of_request),
            log_loss=log_loss(scores, label),
            label_rate=float(label.mean()) if len(label) else float("nan"),
            examples=len(label),
        )
    return figures


def bootstrap_difference(
    first: Mapping[int, float], second: Mapping[int, float], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of first - second over the users that both have, with the 2.5 and 97.5 per cent points of a paired bootstrap over users."""
    users = sorted(first.keys() & second.keys())
    if not users:
        return float("nan"), float("nan"), float("nan")
    difference = np.array([first[user] - second[user] for user in users])
    random = np.random.default_rng(seed)
    means = [difference[random.integers(0, len(users), len(users))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def _gain(scores: Array, labels: Array, request_row: Array, discount: F64) -> F64:
    """Sum of discount[place] over a request's labelled items; items of equal score share the mean discount of their places."""
    if not len(request_row):
        return np.zeros(0)
    order = np.lexsort((-scores.astype(np.float64), request_row))
    request, score = request_row[order].astype(np.int64), scores[order]
    first_of_request = np.concatenate([[True], request[1:] != request[:-1]])
    starts = np.flatnonzero(first_of_request)
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    tie = np.cumsum(first_of_request | np.concatenate([[True], score[1:] != score[:-1]])) - 1
    of_place = np.where(place < len(discount), discount[np.minimum(place, len(discount) - 1)], 0.0)
    of_tie = np.bincount(tie, of_place) / np.bincount(tie)
    gain = of_tie[tie] * labels[order].astype(bool)
    return np.asarray(np.bincount(request, gain, minlength=int(request.max()) + 1), np.float64)

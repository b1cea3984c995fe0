"""Ranking metrics a head: AUC, grouped AUC, NDCG@k, MRR, HIT@k, log loss, calibration error; and how diverse the top of a ranking is.

Every function takes one head's scores float [N], labels bool [N] and request rows int64 [N] (any order) and is vectorised. Equal scores
never profit from the order they came in: what depends on it is the expected value over all orders, except for diversity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[np.generic]

HIT_AT = 3
NDCG_AT = 10
DIVERSITY_AT = 10
BINS = 15


@dataclass(frozen=True)
class HeadMetrics:
    """One head's figures. NaN where they are not defined (no label, say)."""

    auc: float
    grouped_auc: float
    ndcg: float
    mrr: float
    hit: float
    log_loss: float
    calibration_error: float
    label_rate: float
    examples: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: NaN becomes None."""
        return {name: None if value != value else value for name, value in self.__dict__.items()}


def auc(scores: Array, labels: Array, weights: Array | None = None) -> float:
    """Probability that a random positive scores above a random negative, ties counting half; NaN without one of the two.

    `weights` float [N] >= 0: how often each example counts (1 where None).
    """
    return auc_of_groups(np.unique(scores, return_inverse=True)[1], labels, weights)


def auc_of_groups(group: npt.NDArray[np.int64], labels: Array, weights: Array | None = None) -> float:
    """`auc` of scores whose order is known: `group` int64 [N] counts the distinct ones up from 0."""
    weight = np.ones(len(group)) if weights is None else weights.astype(np.float64)
    is_positive = labels.astype(bool)
    positives, negatives = np.bincount(group, weight * is_positive), np.bincount(group, weight * ~is_positive)
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives / 2  # negatives below each distinct score, and half of the equal ones
    return float((positives * below).sum() / pairs) if pairs else float("nan")


def group_auc(scores: Array, labels: Array, group: Array) -> tuple[Array, F64]:
    """AUC within each group (the user of each example, say), which has to have both classes: (groups, float64 [groups])."""
    if not len(scores):
        return np.asarray(group)[:0], np.zeros(0)
    groups, row = np.unique(group, return_inverse=True)
    order, of_row, _, tie = _in_order(scores, row)
    label = labels[order].astype(bool)
    positives, negatives = np.bincount(tie, label), np.bincount(tie, ~label)
    of_tie = of_row[np.flatnonzero(np.diff(tie, prepend=-1))]
    above = np.cumsum(negatives) - negatives  # negatives of better score; those of the groups before are taken off
    total = np.bincount(of_tie, negatives)
    above -= (np.cumsum(total) - total)[of_tie]
    wins = np.bincount(of_tie, positives * (total[of_tie] - above - negatives / 2))
    pairs = np.bincount(of_tie, positives) * total
    known = pairs > 0
    return groups[known], wins[known] / pairs[known]


def grouped_auc(scores: Array, labels: Array, group: Array) -> float:
    """Mean of `group_auc` over the groups that have both classes; NaN where none has.

    Paper: DIN (KDD 2018, arXiv 1706.06978), section 6.2. Deviates: groups weigh alike, as the users of HIT@k do.
    """
    found = group_auc(scores, labels, group)[1]
    return float(found.mean()) if len(found) else float("nan")


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


def reciprocal_ranks(scores: Array, labels: Array, request_row: Array) -> F64:
    """1 / rank of each request's best labelled item, float64 [requests]; NaN without a label. Equal scores: expected value."""
    requests = int(request_row.max()) + 1 if len(request_row) else 0
    found = np.full(requests, np.nan)
    if not requests:
        return found
    order, request, place, tie = _in_order(scores, request_row)
    first = np.flatnonzero(np.diff(tie, prepend=-1))
    size, labelled = np.bincount(tie), np.bincount(tie, labels[order].astype(bool))
    hit = np.flatnonzero(labelled > 0)
    of_request, best = np.unique(request[first[hit]], return_index=True)  # the first such tie of each request
    chosen = hit[best]
    m, r, start = size[chosen], labelled[chosen], place[first[chosen]]
    # Chance that the first labelled one of m equal items, r of them labelled, is at place j.
    chance, left, expected = r / m, 1 - r / m, np.zeros(len(chosen))
    for j in range(int(m.max(initial=0))):
        expected += chance / (start + j + 1)
        rest = m - j - 1
        chance = np.where(rest > 0, left * r / np.maximum(rest, 1), 0.0)
        left = left - chance
    found[of_request] = expected
    return found


def bin_of(values: Array, bins: int) -> npt.NDArray[np.int64]:
    """Bin of each value, int64 [N]: about as many values in each of `bins` bins, in their order, equal ones in one bin."""
    _, row, count = np.unique(values, return_inverse=True, return_counts=True)
    before = np.cumsum(count) - count
    return np.asarray((before * bins // max(1, len(row)))[row], np.int64)


def reliability(probabilities: Array, labels: Array, bins: int = BINS) -> tuple[F64, F64, F64]:
    """What was predicted and what happened, by bins of about equal size: (mean probability, share of labels, examples), float64 each."""
    of_bin = bin_of(probabilities, bins)
    count = np.bincount(of_bin).astype(np.float64)
    used = count > 0
    predicted, happened = (np.bincount(of_bin, part.astype(np.float64))[used] / count[used] for part in (probabilities, labels))
    return predicted, happened, count[used]


def calibration_error(probabilities: Array, labels: Array, bins: int = BINS) -> float:
    """Expected calibration error: mean over examples of the distance between a bin's mean probability and its share of labels.

    Paper: Naeini et al. (AAAI 2015). Deviates: bins of equal size; of equal width, a rare head would have all probabilities in the first.
    """
    predicted, happened, count = reliability(probabilities, labels, bins)
    return float((np.abs(predicted - happened) * count).sum() / count.sum()) if len(count) else float("nan")


def top_rows(scores: Array, request_row: Array, k: int) -> npt.NDArray[np.int64]:
    """Rows of each request's top k, int64; equal scores in the order given, as the server ranks them."""
    order, _, place, _ = _in_order(scores, request_row)
    return np.asarray(order[place < k], np.int64)


def intra_list_distance(vectors: Array, request_row: Array) -> F64:
    """Mean of 1 - cosine over the pairs of each list, float64 [requests]; NaN below two items. vectors float [N, D], zero: no direction.

    Paper: Ziegler et al. (WWW 2005), as a distance.
    """
    requests = int(request_row.max()) + 1 if len(request_row) else 0
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit = vectors / np.where(length > 0, length, 1.0)
    total = np.zeros((requests, vectors.shape[1]))
    np.add.at(total, request_row.astype(np.int64), unit)
    count = np.bincount(request_row, minlength=requests)
    pairs = count * (count - 1)
    alike = (total**2).sum(1) - np.bincount(request_row, (unit**2).sum(1), minlength=requests)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(pairs > 0, 1 - alike / pairs, np.nan), np.float64)


def category_entropy(categories: Array, request_row: Array) -> F64:
    """Entropy (nats) of the categories int [N] of each list, float64 [requests]; NaN of an empty one."""
    requests = int(request_row.max()) + 1 if len(request_row) else 0
    size = np.bincount(request_row, minlength=requests)
    pairs, count = np.unique(np.stack([request_row.astype(np.int64), categories.astype(np.int64)], 1), axis=0, return_counts=True)
    share = count / size[pairs[:, 0]]
    return np.asarray(np.where(size > 0, np.bincount(pairs[:, 0], -share * np.log(share), minlength=requests), np.nan), np.float64)


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
        figures[head] = HeadMetrics(
            auc=auc(scores, label),
            grouped_auc=grouped_auc(scores, label, user_of_request[request_row]),
            ndcg=known_mean(ndcg(scores, label, request_row)),
            mrr=known_mean(reciprocal_ranks(scores, label, request_row)),
            hit=hit_at(scores, label, request_row, user_of_request),
            log_loss=log_loss(scores, label),
            calibration_error=calibration_error(scores, label),
            label_rate=float(label.mean()) if len(label) else float("nan"),
            examples=len(label),
        )
    return figures


def known_mean(values: F64) -> float:
    """Mean of the values that are not NaN; NaN where all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True)
class Interval:
    """A mean difference with the 2.5 and 97.5 per cent points of its bootstrap; p: two-sided chance of none, by the same draws."""

    mean: float
    low: float
    high: float
    p: float


def bootstrap_difference(
    first: Mapping[int, float], second: Mapping[int, float], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of first - second over the users that both have, with the 2.5 and 97.5 per cent points of a paired bootstrap over users."""
    users = sorted(first.keys() & second.keys())
    found = bootstrap(np.array([first[user] - second[user] for user in users]), draws=draws, seed=seed)
    return found.mean, found.low, found.high


def bootstrap(differences: F64, *, draws: int = 1000, seed: int = 0) -> Interval:
    """The interval of the mean of `differences`, one a user; NaN where there is no user."""
    n = len(differences)
    if not n:
        return Interval(*[float("nan")] * 4)
    random = np.random.default_rng(seed)
    return interval(float(differences.mean()), [differences[random.integers(0, n, n)].mean() for _ in range(draws)])


def interval(mean: float, drawn: Sequence[float]) -> Interval:
    """The interval of a difference, from those of the draws; NaN draws are left out."""
    known = np.array([value for value in drawn if value == value])
    if not len(known):
        return Interval(mean, float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    beyond = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return Interval(mean, float(low), float(high), min(1.0, 2 * (beyond + 1) / (len(known) + 1)))


def _in_order(scores: Array, request_row: Array) -> tuple[npt.NDArray[np.int64], ...]:
    """Rows by request and falling score: (rows, request of each, place in it, number of its tie), int64 [N] each."""
    order = np.lexsort((-scores.astype(np.float64), request_row))
    request, score = np.asarray(request_row)[order].astype(np.int64), scores[order]
    first_of_request = np.diff(request, prepend=-1) != 0
    starts = np.flatnonzero(first_of_request)
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    tie = np.cumsum(first_of_request | np.concatenate([[True], score[1:] != score[:-1]])[: len(order)]) - 1
    return order, request, place, tie


def _gain(scores: Array, labels: Array, request_row: Array, discount: F64) -> F64:
    """Sum of discount[place] over a request's labelled items; items of equal score share the mean discount of their places."""
    if not len(request_row):
        return np.zeros(0)
    order, request, place, tie = _in_order(scores, request_row)
    of_place = np.where(place < len(discount), discount[np.minimum(place, len(discount) - 1)], 0.0)
    of_tie = np.bincount(tie, of_place) / np.bincount(tie)
    gain = of_tie[tie] * labels[order].astype(bool)
    return np.asarray(np.bincount(request, gain, minlength=int(request.max()) + 1), np.float64)

"""The baseline that practitioners respect: gradient boosted trees on counters, without embeddings being learned or sequences being read.

LightGBM, either LambdaMART (one ranking objective a head) or plain classification (`gbdt`), over the same requests, candidates, parts and
features as the models, plus what a careful person would count: smoothed rates of an item over 1, 7 and 30 days, its counts and age, the
user's rates, the overlap of the candidate with the user's last 100 actions. Everything is as of the request: only records appended before
its time, as in `inference.dataset`. Random search over the usual parameters has the time that a cell's training has. `rates` learns
nothing: it is the sum of the logits of the item's and the user's smoothed rate.

Embeddings are left out on purpose. They are factorised from the whole training part, so on its requests a dot product or cosine knows some
of the answers; trees trust such a column on sight, and were worse with it than the sum of the rates (KuaiRand, AUC of click 0.678).
Vectors of a ranker with `refresh` know nothing that came after: of these, cells that ask for them (`vectors`) get the cosines.

LightGBM is optional: `pip install freshrank[baseline]`.

Paper: LambdaMART (Burges, MSR-TR-2010-82); LightGBM (NeurIPS 2017).

Symbols: R requests, N candidates, F columns, H heads, n records.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from features.as_of import AsOf
from features.domain import Domain
from features.erasures import NOBODY, Erased, erased_before_ms
from features.logs import read_actions
from features.tensors import SIDES, feature_names
from inference.calibration import fit_platt, logit
from inference.dataset import Dataset, ranker_requests
from inference.evaluate import item_categories
from inference.history import ragged, starts_of

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Array = npt.NDArray[Any]

DAY_MS = 24 * 3600 * 1000
DAYS = (1, 7, 30)
USER_DAYS = DAYS[-1]
PRIOR = 20.0
"""Impressions with the log's own rate that every rate begins with."""
LATEST = 100
"""Actions of a user that the overlap is counted over."""
CODES_MAX = 512
"""Categories with more codes are left out: an item's own rates say what they would."""
LIST_ROWS_MIN = 4.0
"""Candidates a request, on average, from which LambdaMART compares within a request; below, within GROUP_ROWS that follow each other."""
GROUP_ROWS = 500
"""Of all users: within one user's day, say, a request's label is in the user's rates of the later ones, and trees find it there."""
TREES_MAX, STOP_AFTER = 2000, 50
_REQUESTS_AT_ONCE = 512


class BaselineError(ValueError):
    """The baseline cannot be trained; says what to do."""


@dataclass(frozen=True)
class Columns:
    """Inputs of the trees: values float32 [N, F], NaN missing; names of the columns; which of them are categories."""

    names: tuple[str, ...]
    values: F32
    categories: tuple[str, ...]


@dataclass(frozen=True)
class _Records:
    """The log's actions in the order of appending, and the candidates, with items and users as codes from 0."""

    item: I64
    user: I64
    action: npt.NDArray[np.uint8]
    time_ms: I64
    candidate_item: I64
    candidate_user: I64


def columns_of(
    domain: Domain, ranker_name: str, log: str | Path, dataset: Dataset, *, cosines: bool = False, erased: Erased = NOBODY
) -> Columns:
    """The inputs of every candidate of the dataset. cosines: with those of the vectors, which have to be refreshed ones.

    Raises:
        BaselineError: the log is not the one that the dataset was packed from.
    """
    records = _records(domain, ranker_name, log, dataset, erased)
    moment = np.repeat(dataset.request_time_ms, np.diff(dataset.starts))  # [N]
    found: dict[str, Array] = {}
    _add_rates(found, domain, ranker_name, records, moment)
    _add_overlap(found, domain, ranker_name, dataset, records, moment)
    categories = _add_features(found, domain, ranker_name, dataset)
    if cosines:
        _add_cosines(found, dataset)
    return Columns(tuple(found), np.stack([values.astype(np.float32) for values in found.values()], 1), categories)


def _records(domain: Domain, ranker_name: str, log: str | Path, dataset: Dataset, erased: Erased) -> _Records:
    batches = list(read_actions(log, domain))
    users = np.concatenate([batch.users for batch in batches])
    events = np.concatenate([batch.events for batch in batches])
    time_ms = np.concatenate([batch.append_time_ms for batch in batches])
    keep = ~np.concatenate([batch.erase for batch in batches])
    keep &= np.minimum(time_ms, events["event_time_ms"]) > erased_before_ms(erased, users)
    keep = np.flatnonzero(keep)
    keep = keep[np.argsort(time_ms[keep], kind="stable")]
    kinds, ids = _candidates(domain, ranker_name, log, erased)
    if len(ids) != len(dataset.labels):
        raise BaselineError(f"{log}: {len(ids)} candidates, the dataset has {len(dataset.labels)}: pack it again")
    item = _codes(np.concatenate([events["entity_kind"][keep], kinds]), np.concatenate([events["entity_id"][keep], ids]))
    candidate_user = np.repeat(dataset.user_id, np.diff(dataset.starts))
    user = np.unique(np.concatenate([users[keep], candidate_user]), return_inverse=True)[1].astype(np.int64)
    n = len(keep)
    return _Records(item[:n], user[:n], events["action"][keep], time_ms[keep], item[n:], user[n:])


def _candidates(domain: Domain, ranker_name: str, log: str | Path, erased: Erased) -> tuple[npt.NDArray[np.uint8], U64]:
    """Kinds and ids of the ranker's candidates, in the order of the log, as `build_dataset` takes them."""
    found = [(batch.entity_kind, batch.entity_id) for batch in ranker_requests(domain, ranker_name, log, erased)]  # not their features
    return np.concatenate([kinds for kinds, _ in found]), np.concatenate([ids for _, ids in found])


def _codes(kinds: npt.NDArray[np.uint8], ids: U64) -> I64:
    row = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    codes: I64 = np.unique(row * 256 + kinds, return_inverse=True)[1].astype(np.int64)
    return codes


def _add_rates(found: dict[str, Array], domain: Domain, ranker_name: str, records: _Records, moment: I64) -> None:
    """Counts, smoothed rates and age of the item; counts and rates of the user."""
    impressions = np.isin(records.action, [action.id for action in domain.actions.values() if action.kind == "impression"])
    heads = domain.ranker[ranker_name].heads
    acted = {name: np.isin(records.action, [domain.actions[action].id for action in head.actions]) for name, head in heads.items()}
    everybody = np.zeros(len(moment), np.int64)
    shown_ever = AsOf(np.zeros(int(impressions.sum()), np.int64), records.time_ms[impressions]).before(everybody, moment)
    base = {
        name: (AsOf(np.zeros(int(chosen.sum()), np.int64), records.time_ms[chosen]).before(everybody, moment) + 0.5) / (shown_ever + 1.0)
        for name, chosen in acted.items()
    }
    for side, group, asked, windows in (
        ("item", records.item, records.candidate_item, DAYS),
        ("user", records.user, records.candidate_user, (USER_DAYS,)),
    ):
        shown = AsOf(group[impressions], records.time_ms[impressions])
        acting = {name: AsOf(group[chosen], records.time_ms[chosen]) for name, chosen in acted.items()}
        for days in windows:
            count = shown.before(asked, moment, moment - days * DAY_MS)
            found[f"{side}_impressions_{days}d"] = np.log1p(count)
            for name, of in acting.items():
                hits = of.before(asked, moment, moment - days * DAY_MS)
                found[f"{side}_{name}_rate_{days}d"] = (hits + PRIOR * np.minimum(base[name], 1.0)) / (np.maximum(count, hits) + PRIOR)
    ever = AsOf(records.item, records.time_ms)
    found["item_records"] = np.log1p(ever.before(records.candidate_item, moment))
    age_ms = moment - ever.first(records.candidate_item)
    found["item_age_hours"] = np.where(age_ms > 0, age_ms / 3_600_000, np.nan)  # not seen yet: no age


def _add_overlap(found: dict[str, Array], domain: Domain, ranker_name: str, dataset: Dataset, records: _Records, moment: I64) -> None:
    """How often the candidate, and its category, is among the user's last LATEST actions."""
    order = np.argsort(records.user, kind="stable")  # by user, in the order of appending
    starts = np.flatnonzero(np.diff(records.user[order], prepend=-1))
    ordinal = np.empty(len(order), np.int64)
    ordinal[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    upto = AsOf(records.user, records.time_ms).before(records.candidate_user, moment)  # ordinal of the first action not seen yet
    found["user_records"] = np.log1p(upto)

    def overlap(of_record: I64, of_candidate: I64) -> I64:
        pairs = np.concatenate([np.stack([records.user, of_record], 1), np.stack([records.candidate_user, of_candidate], 1)])
        code = np.unique(pairs[:, 0] * (int(pairs[:, 1].max(initial=0)) + 2) + pairs[:, 1] + 1, return_inverse=True)[1].astype(np.int64)
        counts = AsOf(code[: len(of_record)], ordinal)
        asked = code[len(of_record) :]
        return counts.before(asked, upto, upto - LATEST)

    found["same_item_of_latest"] = overlap(records.item, records.candidate_item)
    categories = item_categories(domain, ranker_name, dataset)
    if categories is not None:
        of_item = np.full(int(max(records.item.max(initial=0), records.candidate_item.max(initial=0))) + 1, -1, np.int64)
        of_item[records.candidate_item] = categories
        found["same_category_of_latest"] = overlap(of_item[records.item], categories)


def _add_features(found: dict[str, Array], domain: Domain, ranker_name: str, dataset: Dataset) -> tuple[str, ...]:
    """The ranker's own features; returns which columns are categories."""
    request = np.repeat(np.arange(len(dataset)), np.diff(dataset.starts))
    categories = []

    def of_side(side: str, name: str) -> Array:
        return dataset.of_candidate[name] if side in ("item", "candidate") else dataset.of_request[name][request]

    for side in SIDES:
        for kind in ("number", "category"):
            for column, name in enumerate(feature_names(domain, ranker_name, side, kind)):
                if kind == "category" and domain.features[name].cardinality > CODES_MAX:
                    continue
                found[name] = of_side(side, f"{side}_{kind}")[:, column]
                categories += [name] * (kind == "category")
        for name in (*feature_names(domain, ranker_name, side, "list"), *feature_names(domain, ranker_name, side, "weighted_list")):
            if domain.features[name].cardinality <= CODES_MAX:
                found[name] = of_side(side, f"{side}_list_{name}")[:, 0]
                categories.append(name)
        for name in feature_names(domain, ranker_name, side, "vector"):
            values = of_side(side, f"{side}_vector_{name}")
            found |= {f"{name}.{i}": values[:, i] for i in range(values.shape[1])}
    return tuple(categories)


def _add_cosines(found: dict[str, Array], dataset: Dataset) -> None:
    """Cosine of the candidate with the user's vector, the newest action's, and the mean and the greatest over the sequence's; NaN where one
    of both has no vector."""
    candidate, sizes = _unit(dataset.of_candidate["candidate_embedding"]), np.diff(dataset.starts)
    request = np.repeat(np.arange(len(dataset)), sizes)
    if "user_embedding" in dataset.of_request:
        found["cosine_user"] = (candidate * _unit(dataset.of_request["user_embedding"])[request]).sum(1)
    of_sequence = {name: np.full(len(candidate), np.nan, np.float32) for name in ("newest", "mean", "greatest")}
    for first in range(0, len(dataset), _REQUESTS_AT_ONCE):
        last = min(first + _REQUESTS_AT_ONCE, len(dataset))
        low, high = dataset.sequence_starts[[first, last]]
        actions = _unit(dataset.of_sequence["sequence_embedding"][low:high])
        has = ~np.isnan(actions).any(1)
        starts = starts_of(has)[dataset.sequence_starts[first : last + 1] - low]  # of the actions that have a vector
        rows = np.arange(*dataset.starts[[first, last]])
        rows = rows[np.diff(starts)[request[rows] - first] > 0]
        if len(rows):
            own = request[rows] - first
            cosines = (candidate[rows].repeat(np.diff(starts)[own], 0) * actions[has][ragged(starts, own)]).sum(1)
            begins = starts_of(np.diff(starts)[own])[:-1]
            of_sequence["newest"][rows] = cosines[begins]
            of_sequence["mean"][rows] = np.add.reduceat(cosines, begins) / np.diff(starts)[own]
            of_sequence["greatest"][rows] = np.maximum.reduceat(cosines, begins)
    found |= {f"cosine_{name}": values for name, values in of_sequence.items()}


def _unit(vectors: Array) -> F32:
    """Rows [n, D] of length 1; NaN where a row is zero: there is no vector."""
    values = vectors.astype(np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.where(length > 0, values / np.maximum(length, np.float32(1e-12)), np.float32(np.nan))


def boosted(
    kind: str,
    columns: Columns,
    dataset: Dataset,
    parts: Mapping[str, I64],
    heads: tuple[str, ...],
    *,
    seconds_max: float,
    seed: int = 0,
    threads: int = 2,
) -> tuple[F32, dict[str, Any]]:
    """Trains trees for each head and scores the test part.

    Args:
        kind: "lambdamart", "gbdt" or "rates".
        columns: of every candidate of the dataset.
        dataset: gives labels, requests and their order.
        parts: requests of "train", "validation" and "test".
        heads: names, in the order of the labels.
        seconds_max: for all heads together: trials go on until it is spent.
        seed: of the trials and of the trees.
        threads: of LightGBM.

    Returns probabilities float32 [N, H] of the test part, in the dataset's order (Platt's correction, fitted on the validation part, makes
    them of LambdaMART's scores, too), and what was tried.

    Raises:
        BaselineError: LightGBM is not installed.
    """
    rows = {name: dataset.candidate_rows(np.sort(part)) for name, part in parts.items()}
    groups = _groups(dataset)
    found = np.empty((len(rows["test"]), len(heads)), np.float32)
    about: dict[str, Any] = {"columns": list(columns.names), "heads": {}}
    if kind == "lambdamart":
        about["compares_within"] = "request" if _long_lists(dataset) else f"{GROUP_ROWS} candidates"
    for head, name in enumerate(heads):
        labels = dataset.labels[:, head]
        train, validation = labels[rows["train"]], labels[rows["validation"]]
        if not 0 < train.sum() < len(train) or not 0 < validation.sum() < len(validation):
            found[:, head] = (train.sum() + 0.5) / (len(train) + 1)
            about["heads"][name] = {"trials": 0}
            continue
        if kind == "rates":
            item, user = (logit(columns.values[:, columns.names.index(f"{side}_{name}_rate_{USER_DAYS}d")]) for side in ("item", "user"))
            scores = {part: (item + user)[of_part] for part, of_part in rows.items()}
        else:
            ndcg_at = 10 if _long_lists(dataset) else GROUP_ROWS // 5
            search = _Search(kind, columns, labels, rows, groups, ndcg_at=ndcg_at, seed=seed, threads=threads)
            scores, about["heads"][name] = search.run(time.monotonic() + seconds_max / len(heads))
        slope, offset = fit_platt(scores["validation"], validation)
        found[:, head] = 1 / (1 + np.exp(-(slope * scores["test"] + offset)))
    return found, about


def _long_lists(dataset: Dataset) -> bool:
    return len(dataset.labels) >= LIST_ROWS_MIN * len(dataset)


def _groups(dataset: Dataset) -> I64:
    """What LambdaMART compares within, int64 [N]: the request, or, of a log of short ones, GROUP_ROWS candidates."""
    if _long_lists(dataset):
        return np.repeat(np.arange(len(dataset)), np.diff(dataset.starts))
    return np.arange(len(dataset.labels)) // GROUP_ROWS


class _Search:
    """Random search for one head: trials until the time is over, the best one by the validation part."""

    def __init__(
        self,
        kind: str,
        columns: Columns,
        labels: npt.NDArray[np.bool_],
        rows: Mapping[str, I64],
        groups: I64,
        *,
        ndcg_at: int,
        seed: int,
        threads: int,
    ) -> None:
        try:
            import lightgbm
        except ImportError as error:
            raise BaselineError("LightGBM is not installed: pip install freshrank[baseline]") from error
        self._lightgbm = lightgbm
        self._columns, self._rows = columns, rows
        self._random = np.random.default_rng(seed)
        self._ranks = kind == "lambdamart"
        self._fixed = {"objective": "binary", "metric": "binary_logloss"}
        if self._ranks:
            self._fixed = {"objective": "lambdarank", "metric": "ndcg", "lambdarank_truncation_level": str(GROUP_ROWS)}
            self._fixed["eval_at"] = str(ndcg_at)
        self._fixed |= {
            "verbosity": "-1",
            "seed": str(seed),
            "num_threads": str(threads),
            "deterministic": "true",
            "force_row_wise": "true",
        }
        self._sets: dict[str, Any] = {}
        for name in ("train", "validation"):
            order = rows[name][np.argsort(groups[rows[name]], kind="stable")] if self._ranks else rows[name]
            sizes = np.diff(np.flatnonzero(np.diff(groups[order], prepend=-1, append=-1))) if self._ranks else None
            self._sets[name] = lightgbm.Dataset(
                columns.values[order],
                labels[order].astype(np.float32),
                group=sizes,
                feature_name=list(columns.names),
                categorical_feature=list(columns.categories),
                reference=self._sets.get("train"),
                params={"feature_pre_filter": False, "verbosity": -1},  # trials differ in how few rows a leaf may have
                free_raw_data=False,
            )

    def run(self, end_s: float) -> tuple[dict[str, F64], dict[str, Any]]:
        """Raw scores of the validation and the test part, float64, and what was found; `end_s` by time.monotonic."""
        best: Any = None
        tried = 0
        while best is None or time.monotonic() < end_s:
            parameters = self._drawn() if tried else {}
            booster = self._lightgbm.train(
                {**self._fixed, **parameters},
                self._sets["train"],
                num_boost_round=TREES_MAX,
                valid_sets=[self._sets["validation"]],
                callbacks=[self._lightgbm.early_stopping(STOP_AFTER, verbose=False), self._until(end_s)],
            )
            (value,) = next(iter(booster.best_score.values())).values()
            better = best is None or (value > best[0]) == self._ranks
            tried += 1
            if better:
                best = value, booster, parameters
        value, booster, parameters = best
        trees = booster.best_iteration
        scores = {
            name: booster.predict(self._columns.values[self._rows[name]], raw_score=True, num_iteration=trees)
            for name in ("validation", "test")
        }
        gain = booster.feature_importance("gain", iteration=trees)
        most = [self._columns.names[i] for i in np.argsort(-gain)[:10]]
        return scores, {"trials": tried, "trees": trees, "validation": float(value), "parameters": parameters, "most_gain": most}

    def _drawn(self) -> dict[str, Any]:
        draw = self._random
        return {
            "learning_rate": float(10 ** draw.uniform(-2, -0.5)),
            "num_leaves": int(2 ** draw.uniform(3, 7)),
            "min_data_in_leaf": int(10 ** draw.uniform(1, 2.7)),
            "feature_fraction": float(draw.uniform(0.5, 1.0)),
            "bagging_fraction": float(draw.uniform(0.6, 1.0)),
            "bagging_freq": 1,
            "lambda_l2": float(10 ** draw.uniform(-2, 1.5)),
        }

    def _until(self, end_s: float) -> Any:
        def stop(now: Any) -> None:
            if time.monotonic() >= end_s:
                raise self._lightgbm.callback.EarlyStopException(now.iteration, now.evaluation_result_list)

        stop.order = 20  # type: ignore[attr-defined]  # behind the early stopping, which notes the best round
        return stop

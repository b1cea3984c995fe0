"""What the realtime sequence is worth: the trained model against the same model trained without it, on the temporal test part.

Both see the same requests, features and embeddings, so that the difference is the sequence's alone. Intervals come from a bootstrap over
users, paired: the same users are drawn for both models. Candidates are those of the log, as they were shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from features.domain import Domain
from features.erasures import NOBODY, Erased
from features.tensors import feature_names
from inference import metrics
from inference.checkpoints import TrainError
from inference.dataset import Dataset, build_dataset
from inference.packed import default_cache
from inference.plots import FIGURES, plot_comparison
from inference.scoring import final_scores, head_weights
from inference.train import EVALUATION_ROWS, TIME_MS_MAX, TrainOptions, load_trained, predict, train
from inference.transact import TransActRanker

Comparison = dict[str, dict[str, dict[str, Any]]]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
AUC_DRAWS = 200


@dataclass(frozen=True)
class Scored:
    """What one model says of some requests, in the dataset's order: of two models over the same log, row by row the same examples.

    probabilities float32 [N, H]; labels bool [N, H]; request_row int64 [N], rows into users uint64 [R]; rows int64 [N] of the dataset.
    """

    probabilities: F32
    labels: npt.NDArray[np.bool_]
    request_row: I64
    users: npt.NDArray[np.uint64]
    rows: I64


def evaluate(
    domain: Domain,
    ranker_name: str,
    log: str | Path,
    tables_root: str | Path,
    trained: str | Path,
    out: str | Path,
    *,
    options: TrainOptions | None = None,
    dataset: Dataset | None = None,
    erased: Erased = NOBODY,
) -> dict[str, Any]:
    """Trains the model without the sequence, measures both, writes `evaluation.json` and `evaluation.png` into `out`.

    Args:
        domain: the product.
        ranker_name: which of its rankers.
        log: the log that the model was trained on.
        tables_root: folder of the spaces it was trained with.
        trained: folder that `train` wrote.
        out: folder to write to; the model without the sequence goes to `out`/without_sequence.
        options: budget, threads and progress bar of the second training; the rest is taken from the first.
        dataset: what `build_dataset` made of the same arguments, to save packing it again.
        erased: users whose past is left out (`features.erasures`).

    Returns what evaluation.json holds; `comparison_table` prints it.

    Raises:
        TrainError: `trained` holds no finished training of this ranker with the sequence.
    """
    model, about = load_trained(domain, ranker_name, trained)
    if not model.use_sequence:
        raise TrainError(f"{trained}: was trained without the sequence; evaluate compares one trained with it")
    options = options or TrainOptions()
    same = {name: about["options"][name] for name in options.what_decides() if name in about["options"]}
    options = replace(options, **{**same, "fractions": tuple(same["fractions"]), "use_sequence": False})
    out, generations = Path(out), about["generations"]
    if dataset is None:
        cache = default_cache(log)
        dataset, _ = build_dataset(domain, ranker_name, log, tables_root, generations=generations, erased=erased, cache=cache)
    without = train(domain, ranker_name, log, tables_root, out / "without_sequence", options, dataset=dataset, generations=generations)
    test = dataset.part(about["parts"]["test"]["from_ms"], TIME_MS_MAX)
    scored = scores_of(model, dataset, test)
    others, labels, request_row, users = (
        scores_of(without.model, dataset, test).probabilities,
        scored.labels,
        scored.request_row,
        scored.users,
    )
    sides = {"with": scored.probabilities, "without": others}
    comparison = {
        head: compare(scored.probabilities[:, i], others[:, i], labels[:, i], request_row, users) for i, head in enumerate(model.head_names)
    }
    result = {
        "ranker": ranker_name,
        "test": about["parts"]["test"],
        "users": len(np.unique(users)),
        "requests_longer_than_hit_at": int((np.bincount(request_row) > metrics.HIT_AT).sum()),
        "heads": comparison,
        "verdict": {head: verdict(rows) for head, rows in comparison.items()},
        "lower_is_better": [head for head in model.head_names if lower_is_better(domain, ranker_name, head)],
        "calibration_error": {
            head: {side: _json(metrics.calibration_error(p[:, i], labels[:, i])) for side, p in sides.items()}
            for i, head in enumerate(model.head_names)
        },
        "diversity": {side: diversity(domain, ranker_name, dataset, replace(scored, probabilities=p)) for side, p in sides.items()},
    }
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    plot_comparison(comparison, out / "evaluation.png")
    return result


def compare(
    scores: npt.NDArray[np.float32],
    others: npt.NDArray[np.float32],
    labels: npt.NDArray[np.bool_],
    request_row: npt.NDArray[np.int64],
    users: npt.NDArray[np.uint64],
) -> dict[str, dict[str, Any]]:
    """One head's figures with and without, by metric: {with, without, difference, low, high}, None where not defined.

    scores, others: probabilities [N] of the model with and without the sequence; users [R].
    """
    own, other = per_user(scores, labels, request_row, users), per_user(others, labels, request_row, users)
    rows = {}
    for metric in own:
        difference, low, high = metrics.bootstrap_difference(own[metric], other[metric])
        rows[metric] = _row(_mean(own[metric]), _mean(other[metric]), difference, low, high)
    pair = metrics.auc(scores, labels), metrics.auc(others, labels)
    found = auc_interval([(scores, others)], labels, users[request_row])
    rows["auc"] = _row(*pair, pair[0] - pair[1], found.low, found.high)
    return {metric: rows[metric] for metric in FIGURES}


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """ahead, behind or no difference shown, by the AUC's interval."""
    low, high = rows["auc"]["low"], rows["auc"]["high"]
    if low is None or low <= 0 <= high:
        return "no difference shown"
    return "ahead" if low > 0 else "behind"


def scores_of(model: TransActRanker, dataset: Dataset, requests: I64) -> Scored:
    """What the model says of these requests of the dataset."""
    probabilities, labels, request_row, users = predict(model, dataset, requests)
    visited = np.concatenate(dataset.batches(requests, EVALUATION_ROWS, None))  # as `predict` does
    order = np.argsort(dataset.candidate_rows(visited), kind="stable")
    back = np.argsort(visited, kind="stable")
    place = np.empty(len(back), np.int64)
    place[back] = np.arange(len(back))
    rows = dataset.candidate_rows(visited)[order]
    return Scored(probabilities[order], labels[order], place[request_row[order]], users[back], rows)


def diversity(domain: Domain, ranker_name: str, dataset: Dataset, scored: Scored) -> dict[str, float | None]:
    """How diverse the first ten by the weighted sum of the heads are (a formula is left aside), mean over requests of two or more.

    intra_list_distance: of the candidates' embeddings. category_entropy: nats, of the ranker's first category or list feature of an item
    (its first value); None without one.
    """
    ranker = domain.ranker[ranker_name]
    final = final_scores(scored.probabilities, head_weights(ranker, {}))
    top = metrics.top_rows(final, scored.request_row, metrics.DIVERSITY_AT)
    several = np.bincount(scored.request_row)[scored.request_row[top]] > 1
    top = top[several]
    rows, requests = scored.rows[top], np.unique(scored.request_row[top], return_inverse=True)[1]
    found = {"intra_list_distance": metrics.intra_list_distance(dataset.of_candidate["candidate_embedding"][rows], requests)}
    codes = item_categories(domain, ranker_name, dataset)
    if codes is not None:
        found["category_entropy"] = metrics.category_entropy(codes[rows], requests)
    means = {name: metrics.known_mean(values) for name, values in found.items()}
    return {name: _json(means.get(name, float("nan"))) for name in ("intra_list_distance", "category_entropy")}


def item_categories(domain: Domain, ranker_name: str, dataset: Dataset) -> I64 | None:
    """Code of the ranker's first category or list feature of an item (its first value), int64 [N]; None without one."""
    for name in domain.ranker[ranker_name].features:
        feature = domain.features[name]
        if feature.side != "item" or feature.kind not in ("category", "list", "weighted_list"):
            continue
        if feature.kind != "category":
            return dataset.of_candidate[f"item_list_{name}"][:, 0].astype(np.int64)
        column = feature_names(domain, ranker_name, "item", "category").index(name)
        return dataset.of_candidate["item_category"][:, column].astype(np.int64)
    return None


def lower_is_better(domain: Domain, ranker_name: str, head: str) -> bool:
    """Whether a head's label is something bad: all of its actions are negative."""
    return all(domain.actions[action].kind == "negative" for action in domain.ranker[ranker_name].heads[head].actions)


def comparison_table(result: dict[str, Any]) -> Table:
    """The evaluation as a table for the terminal."""
    table = Table(title=f"ranker {result['ranker']}: with the realtime sequence and without, {result['test']['requests']} later requests")
    for column in ("head", "metric", "with", "without", "difference", "95 % interval", "verdict (AUC)"):
        table.add_column(column, justify="left" if column in ("head", "metric") else "right")
    lower = result["lower_is_better"]
    for head, rows in result["heads"].items():
        for metric, row in rows.items():
            if row["difference"] is None:
                table.add_row(head, FIGURES[metric], "no label", "", "", "", "")
                continue
            interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
            about = result["verdict"][head] if metric == "auc" else "lower is better" if metric == "hit" and head in lower else ""
            table.add_row(
                head, FIGURES[metric], f"{row['with']:.4f}", f"{row['without']:.4f}", f"{row['difference']:+.4f}", interval, about
            )
    return table


def per_user(scores: F32, labels: npt.NDArray[np.bool_], request_row: I64, users: npt.NDArray[np.uint64]) -> dict[str, dict[int, float]]:
    """HIT@3, NDCG, MRR and log loss of each user, requests of a user averaged, and the AUC of the user's examples."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.where(labels, np.log(p), np.log1p(-p))
    per_request = {
        "hit": metrics.hits(scores, labels, request_row),
        "ndcg": metrics.ndcg(scores, labels, request_row),
        "mrr": metrics.reciprocal_ranks(scores, labels, request_row),
        "log_loss": np.bincount(request_row, loss) / np.bincount(request_row),
    }
    means = {name: metrics.user_means(values, users) for name, values in per_request.items()}
    means["grouped_auc"] = metrics.group_auc(scores, labels, users[request_row])
    return {name: dict(zip(who.tolist(), values.tolist(), strict=True)) for name, (who, values) in means.items()}


def auc_interval(pairs: Sequence[tuple[F32, F32]], labels: npt.NDArray[np.bool_], user_of_row: npt.NDArray[np.uint64]) -> metrics.Interval:
    """Difference of AUC, first - second, with its interval over draws of users. Several pairs (one a seed) count by their mean."""
    distinct, row = np.unique(user_of_row, return_inverse=True)
    random = np.random.default_rng(0)
    # The scores are sorted once; a draw changes only how often each example counts.
    sides = [[np.unique(scores, return_inverse=True)[1] for scores in pair] for pair in pairs]

    def difference(times: F64 | None) -> float:
        return float(np.mean([metrics.auc_of_groups(a, labels, times) - metrics.auc_of_groups(b, labels, times) for a, b in sides]))

    drawn = [
        difference(np.bincount(random.integers(0, len(distinct), len(distinct)), minlength=len(distinct))[row].astype(np.float64))
        for _ in range(AUC_DRAWS)
    ]
    return metrics.interval(difference(None), drawn)


def _mean(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")


def _row(with_: float, without: float, difference: float, low: float, high: float) -> dict[str, Any]:
    values = {"with": with_, "without": without, "difference": difference, "low": low, "high": high}
    return {name: _json(value) for name, value in values.items()}


def _json(value: float) -> float | None:
    return None if value != value else value

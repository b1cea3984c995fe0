"""What the realtime sequence is worth: the trained model against the same model trained without it, on the temporal test part.

Both see the same requests, features and embeddings, so that the difference is the sequence's alone. Intervals come from a bootstrap over
users, paired: the same users are drawn for both models.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from features.domain import Domain
from features.erasures import NOBODY, Erased
from inference import metrics
from inference.checkpoints import TrainError
from inference.dataset import Dataset, build_dataset
from inference.packed import default_cache
from inference.plots import FIGURES, plot_comparison
from inference.train import TIME_MS_MAX, TrainOptions, load_trained, predict, train

Comparison = dict[str, dict[str, dict[str, Any]]]
AUC_DRAWS = 200


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
    probabilities, labels, request_row, users = predict(model, dataset, test)
    others, *_ = predict(without.model, dataset, test)
    comparison = {
        head: compare(probabilities[:, i], others[:, i], labels[:, i], request_row, users) for i, head in enumerate(model.head_names)
    }
    result = {
        "ranker": ranker_name,
        "test": about["parts"]["test"],
        "users": len(np.unique(users)),
        "requests_longer_than_hit_at": int((np.bincount(request_row) > metrics.HIT_AT).sum()),
        "heads": comparison,
        "verdict": {head: verdict(rows) for head, rows in comparison.items()},
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
    own, other = _per_user(scores, labels, request_row, users), _per_user(others, labels, request_row, users)
    rows = {}
    for metric in own:
        difference, low, high = metrics.bootstrap_difference(own[metric], other[metric])
        rows[metric] = _row(_mean(own[metric]), _mean(other[metric]), difference, low, high)
    pair = metrics.auc(scores, labels), metrics.auc(others, labels)
    rows["auc"] = _row(*pair, pair[0] - pair[1], *_auc_interval(scores, others, labels, users[request_row]))
    return {metric: rows[metric] for metric in FIGURES}


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """ahead, behind or no difference shown, by the AUC's interval."""
    low, high = rows["auc"]["low"], rows["auc"]["high"]
    if low is None or low <= 0 <= high:
        return "no difference shown"
    return "ahead" if low > 0 else "behind"


def comparison_table(result: dict[str, Any]) -> Table:
    """The evaluation as a table for the terminal."""
    table = Table(title=f"ranker {result['ranker']}: with the realtime sequence and without, {result['test']['requests']} later requests")
    for column in ("head", "metric", "with", "without", "difference", "95 % interval", "verdict (AUC)"):
        table.add_column(column, justify="left" if column in ("head", "metric") else "right")
    for head, rows in result["heads"].items():
        for metric, row in rows.items():
            if row["difference"] is None:
                table.add_row(head, FIGURES[metric], "no label", "", "", "", "")
                continue
            interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
            about = result["verdict"][head] if metric == "auc" else ""
            table.add_row(
                head, FIGURES[metric], f"{row['with']:.4f}", f"{row['without']:.4f}", f"{row['difference']:+.4f}", interval, about
            )
    return table


def _per_user(
    scores: npt.NDArray[np.float32], labels: npt.NDArray[np.bool_], request_row: npt.NDArray[np.int64], users: npt.NDArray[np.uint64]
) -> dict[str, dict[int, float]]:
    """HIT@3, NDCG and log loss of each user, requests of a user averaged."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.where(labels, np.log(p), np.log1p(-p))
    per_request = {
        "hit": metrics.hits(scores, labels, request_row),
        "ndcg": metrics.ndcg(scores, labels, request_row),
        "log_loss": np.bincount(request_row, loss) / np.bincount(request_row),
    }
    means = {name: metrics.user_means(values, users) for name, values in per_request.items()}
    return {name: dict(zip(who.tolist(), values.tolist(), strict=True)) for name, (who, values) in means.items()}


def _auc_interval(
    scores: npt.NDArray[np.float32], others: npt.NDArray[np.float32], labels: npt.NDArray[np.bool_], user_of_row: npt.NDArray[np.uint64]
) -> tuple[float, float]:
    """2.5 and 97.5 per cent points of the AUC difference over draws of users."""
    distinct, row = np.unique(user_of_row, return_inverse=True)
    random = np.random.default_rng(0)
    differences = []
    for _ in range(AUC_DRAWS):
        times = np.bincount(random.integers(0, len(distinct), len(distinct)), minlength=len(distinct))[row]
        differences.append(metrics.auc(scores, labels, times) - metrics.auc(others, labels, times))
    known = [difference for difference in differences if difference == difference]
    return (float(np.quantile(known, 0.025)), float(np.quantile(known, 0.975))) if known else (float("nan"), float("nan"))


def _mean(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")


def _row(with_: float, without: float, difference: float, low: float, high: float) -> dict[str, Any]:
    values = {"with": with_, "without": without, "difference": difference, "low": low, "high": high}
    return {name: None if value != value else value for name, value in values.items()}

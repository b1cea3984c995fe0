"""What an ablation says: mean and spread over seeds, differences to a table's reference with their significance, beside the paper's lifts.

The spread is the standard deviation over seeds. Intervals and p are of a bootstrap over users, paired: both cells have the same users, each
with the mean over its seeds. So an interval says what other users could have changed, the spread what another seed could have.

Where candidates were drawn by item and by popularity, MRR has a table of its own for each kind: of the clicked candidate and that kind
alone, in requests that have some. These lists are shorter than the mixed ones: their figures tell the kinds apart, not more.

HIT@3 is of lists with more than three candidates; in a shorter one nobody can be wrong. MRR's columns are means over requests, its
lifts are those of the mean over users, as HIT@3's is: whoever asks more often counts no more.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from features.domain import Domain
from features.logs import AS_LOGGED, POPULAR, UNIFORM
from inference import metrics
from inference.ablate import Results
from inference.ablations import UNKNOWN, AblationTable
from inference.evaluate import auc_interval, lower_is_better

F64 = npt.NDArray[np.float64]
HOUR_MS = 3_600_000
OF_HEAD = {
    "auc": "AUC",
    "grouped_auc": "grouped AUC",
    "ndcg": "NDCG@10",
    "mrr": "MRR",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
}
COLUMNS = [
    *("cell", "AUC", "difference (95 %)", "p", "HIT@3", "HIT@3 lift % (95 %)", "p", "paper %", "grouped AUC", "NDCG@10", "MRR"),
    *("MRR lift % (95 %)", "p", "log loss", "calibration error", "list distance", "entropy", "epochs"),
]
SHOWN = ("cell", "AUC", "difference (95 %)", "HIT@3 lift % (95 %)", "MRR lift % (95 %)", "paper %", "log loss")
"""Of COLUMNS, those of the terminal."""
OF_USER = {"hit": metrics.hits, "mrr": metrics.reciprocal_ranks}
"""Figures of a request that are compared by user."""
OF_DRAWN = {"mrr_uniform": UNIFORM, "mrr_popular": POPULAR}
"""MRR among negatives of one kind alone, of a log that has both."""
DRAWN_COLUMNS = ["cell", *("MRR, uniform alone", "lift % (95 %)", "p"), *("MRR, popularity-matched alone", "lift % (95 %)", "p")]
ByHead = Mapping[str, list[list[F64]]]
"""A cell's figures by metric of `metrics_of`, head and seed: one a request, or one a user."""


def summary(domain: Domain, ranker_name: str, results: Results, tables: Mapping[str, AblationTable]) -> dict[str, Any]:
    """Everything that ablation.json holds: figures by cell, and by table and head the differences to the reference."""
    heads = tuple(domain.ranker[ranker_name].heads)
    cells = dict.fromkeys(name for name, _ in results.of)
    of_requests = {name: {metric: _of_requests(results, name, metric) for metric in metrics_of(results)} for name in cells}
    by_user = {name: {metric: _by_user(results, of[metric]) for metric in of} for name, of in of_requests.items()}
    found: dict[str, Any] = {
        "about": results.about | {"lists_longer_than_hit_at": int(_long(results).sum())},
        "skipped": dict(results.skipped),
        "lower_is_better": [head for head in heads if lower_is_better(domain, ranker_name, head)],
        "cells": {name: _cell(results, name, heads, of_requests[name], by_user[name]["hit"]) for name in cells},
        "tables": {},
    }
    differences: dict[tuple[str, str], dict[str, Any]] = {}
    for key, table in tables.items():
        if table.reference not in cells:
            found["skipped"][f"table {key}"] = f"its reference {table.reference} is left out"
            continue
        rows = [name for name in table.rows if name in cells]
        for name in rows:
            if (name, table.reference) not in differences and name != table.reference:
                differences[name, table.reference] = {
                    head: _difference(results, name, table.reference, column, by_user) for column, head in enumerate(heads)
                }
        found["tables"][key] = {
            "title": table.title,
            "reference": table.reference,
            "rows": {
                name: {"paper": list(table.rows.get(name, UNKNOWN)), "against_reference": differences.get((name, table.reference))}
                for name in rows
            },
        }
    return found


def _seeds(results: Results, name: str) -> list[int]:
    return sorted(seed for cell, seed in results.of if cell == name)


def metrics_of(results: Results) -> tuple[str, ...]:
    """The metrics that are compared by user: OF_USER, and OF_DRAWN where the log has both kinds."""
    both = results.drawn is not None and all((results.drawn == kind).any() for kind in OF_DRAWN.values())
    return (*OF_USER, *(OF_DRAWN if both else ()))


def _cell(results: Results, name: str, heads: tuple[str, ...], of_requests: ByHead, hits: list[list[F64]]) -> dict[str, Any]:
    of_seed = [results.of[name, seed][0] for seed in _seeds(results, name)]
    figures = {head: {metric: _spread([run["heads"][head][metric] for run in of_seed]) for metric in OF_HEAD} for head in heads}
    for column, head in enumerate(heads):
        figures[head]["hit"] = _spread([float(values.mean()) if len(values) else None for values in hits[column]])
        for metric in set(of_requests) & set(OF_DRAWN):
            figures[head][metric] = _spread([metrics.known_mean(values) for values in of_requests[metric][column]])
    return {
        "heads": figures,
        "diversity": {key: _spread([run["diversity"][key] for run in of_seed]) for key in of_seed[0]["diversity"]},
        "seeds": _seeds(results, name),
        "runs": [{key: value for key, value in run.items() if key not in ("heads", "diversity")} for run in of_seed],
    }


def _spread(values: list[float | None]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; None where a figure is not defined."""
    known = [value for value in values if value is not None and value == value]
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)) if known else None, "spread": deviation, "values": values}


def _long(results: Results) -> npt.NDArray[np.bool_]:
    return np.asarray(np.bincount(results.truth.request_row) > metrics.HIT_AT)


def _of_requests(results: Results, name: str, metric: str) -> list[list[F64]]:
    """A metric of `metrics_of` by head and seed, float64 [R] each; NaN where a request has no list for it."""
    truth = results.truth
    rows, without = np.ones(len(truth.labels), bool), np.zeros(len(truth.users), bool)
    if results.drawn is not None and metric in OF_DRAWN:
        without = np.bincount(truth.request_row, results.drawn == OF_DRAWN[metric]) == 0
        rows = np.isin(results.drawn, (AS_LOGGED, OF_DRAWN[metric]))
    elif metric == "hit":
        without = ~_long(results)
    of = OF_USER.get(metric, metrics.reciprocal_ranks)

    def found(head: int, seed: int) -> F64:
        per_request = of(results.of[name, seed][1][rows, head], truth.labels[rows, head], truth.request_row[rows])
        return np.where(without, np.nan, per_request)

    return [[found(head, seed) for seed in _seeds(results, name)] for head in range(truth.labels.shape[1])]


def _by_user(results: Results, of_requests: list[list[F64]]) -> list[list[F64]]:
    """The means of each user who has a list for the metric; the same users in the same order for every cell."""
    return [[metrics.user_means(values, results.truth.users)[1] for values in of_head] for of_head in of_requests]


def _difference(
    results: Results, name: str, reference: str, head: int, by_user: Mapping[str, ByHead]
) -> dict[str, dict[str, float | None]]:
    """AUC: difference; metrics of `metrics_of`: difference, and lift in per cent of the reference's mean; with interval and p."""
    labels, user_of_row = results.truth.labels[:, head], results.truth.users[results.truth.request_row]
    seeds = [seed for seed in _seeds(results, name) if (reference, seed) in results.of]
    pairs = [(results.of[name, seed][1][:, head], results.of[reference, seed][1][:, head]) for seed in seeds]
    both = bool(labels.any() and not labels.all() and pairs)
    found = {"auc": auc_interval(pairs, labels, user_of_row) if both else metrics.Interval(*[float("nan")] * 4)}
    for metric in metrics_of(results):
        own, other = np.mean(by_user[name][metric][head], 0), np.mean(by_user[reference][metric][head], 0)
        found[metric] = metrics.bootstrap(own - other)
        found[f"{metric}_lift_percent"] = _lift(found[metric], float(other.mean()) if len(other) else 0.0)
    return {metric: _known(asdict(interval)) for metric, interval in found.items()}


def _lift(difference: metrics.Interval, base: float) -> metrics.Interval:
    """A difference in per cent of `base`."""
    scale = 100 / base if base else float("nan")
    return metrics.Interval(scale * difference.mean, scale * difference.low, scale * difference.high, difference.p)


def _known(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if value != value else value for name, value in values.items()}


def rows_of(found: dict[str, Any], key: str, head: str) -> list[list[str]]:
    """One table's rows for one head, as texts in the order of COLUMNS; the paper's lift of hide stands beside heads that should be low."""
    rows = []
    side = 1 if head in found["lower_is_better"] else 0
    for name, row in found["tables"][key]["rows"].items():
        cell = found["cells"][name]
        figures, against = cell["heads"][head], (row["against_reference"] or {}).get(head)
        epochs = [run["epochs"] for run in cell["runs"] if "epochs" in run]
        paper = row["paper"][side]
        rows.append(
            [
                name,
                _of(figures["auc"]),
                _interval(against and against["auc"], "+.4f"),
                _p(against and against["auc"]),
                _of(figures["hit"]),
                _interval(against and against["hit_lift_percent"], "+.1f"),
                _p(against and against["hit"]),
                "" if paper is None else f"{paper:+.2f}",
                *(_of(figures[metric]) for metric in ("grouped_auc", "ndcg", "mrr")),
                _interval(against and against["mrr_lift_percent"], "+.1f"),
                _p(against and against["mrr"]),
                *(_of(figures[metric]) for metric in ("log_loss", "calibration_error")),
                *(_of(cell["diversity"][name], 3) for name in ("intra_list_distance", "category_entropy")),
                f"{np.mean(epochs):.1f}" if epochs else "",
            ]
        )
    return rows


def drawn_rows(found: dict[str, Any], key: str, head: str) -> list[list[str]]:
    """The same in the order of DRAWN_COLUMNS; empty where the log has no two kinds of negatives."""
    rows = []
    for name, row in found["tables"][key]["rows"].items():
        figures, against = found["cells"][name]["heads"][head], (row["against_reference"] or {}).get(head) or {}
        rows.append([name])
        for metric in (metric for metric in OF_DRAWN if metric in figures):
            rows[-1] += [_of(figures[metric]), _interval(against.get(f"{metric}_lift_percent"), "+.1f"), _p(against.get(metric))]
    return [row for row in rows if len(row) > 1]


def terminal_tables(found: dict[str, Any]) -> list[Table]:
    """For the terminal, in few columns: one a table and head."""
    tables = []
    for key, table in found["tables"].items():
        for head in next(iter(found["cells"].values()))["heads"]:
            shown = Table(title=f"{table['title']}; head {_head(found, head)}")
            kept = [COLUMNS.index(column) for column in SHOWN]
            for column in kept:
                shown.add_column(COLUMNS[column], justify="right" if column else "left", overflow="fold", no_wrap=not column)
            for row in rows_of(found, key, head):
                shown.add_row(*(row[column] for column in kept))
            tables.append(shown)
    return tables


def markdown(found: dict[str, Any], command: str) -> str:
    """For docs/: what was run, and one table a table and head."""
    about = found["about"]
    lines = [
        f"`{command}`",
        "",
        f"Ranker {about['ranker']}; {about['seeds']} seeds, {_budget(about)} a run, {about['threads']} threads. Test part (temporal):",
        f"{about['requests']} requests of {about['users']} users, {about['candidates']} candidates{_candidates(about['negatives'])};",
        f"{about['lists_longer_than_hit_at']} lists of more than three, which HIT@3 is of. Mean over seeds ± their standard deviation;",
        "intervals and p: bootstrap over users, paired with the reference. `paper %`: lift of HIT@3 on the paper's own data.",
    ]
    for name, reason in found["skipped"].items():
        lines += ["", f"Left out: {name}: {reason}"]
    for key, table in found["tables"].items():
        for head in next(iter(found["cells"].values()))["heads"]:
            lines += ["", f"**{table['title']}**; head {_head(found, head)}", "", "| " + " | ".join(COLUMNS) + " |"]
            lines.append("|" + " --- |" * len(COLUMNS))
            lines += ["| " + " | ".join(row) + " |" for row in rows_of(found, key, head)]
            if by_kind := drawn_rows(found, key, head):
                lines += ["", "| " + " | ".join(DRAWN_COLUMNS) + " |", "|" + " --- |" * len(DRAWN_COLUMNS)]
                lines += ["| " + " | ".join(row) + " |" for row in by_kind]
        lines += ["", f"![{table['title']}]({key}.png)"]
    return "\n".join(lines) + "\n"


def _candidates(negatives: Mapping[str, Any] | None) -> str:
    """Where the candidates come from: the log, or its domain file's `negatives`."""
    if negatives is None:
        return " as the log has them, none sampled"
    kinds = [f"{negatives[kind]} {how}" for kind, how in (("uniform", "by item"), ("popular", "by popularity")) if negatives[kind]]
    return f": what was clicked, and sampled negatives, {' and '.join(kinds)}, of the {negatives['window_ms'] / HOUR_MS:g} h before"


def _budget(about: Mapping[str, Any]) -> str:
    return f"{about['epochs_max']} epochs at most" if about["seconds_max"] is None else f"{about['seconds_max']:g} s"


def _head(found: dict[str, Any], head: str) -> str:
    return f"{head} (lower is better)" if head in found["lower_is_better"] else head


def _of(figure: Mapping[str, Any], digits: int = 4) -> str:
    if figure["mean"] is None:
        return "-"
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread}"


def _interval(figure: Mapping[str, float | None] | None, form: str) -> str:
    if not figure or figure["mean"] is None:
        return ""
    if figure["low"] is None or figure["high"] is None:
        return format(figure["mean"], form)
    return f"{figure['mean']:{form}} ({figure['low']:{form}} to {figure['high']:{form}})"


def _p(figure: Mapping[str, float | None] | None) -> str:
    return "" if not figure or figure["p"] is None else f"{figure['p']:.3f}"

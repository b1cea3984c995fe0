"""The report of a training: one HTML file that needs nothing else, with curves, tables and calibration."""

import io
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from inference.metrics import calibration_error, reliability
from inference.plots import FIGURES

REPORT = "report.html"
BINS = 10
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}h2{margin-top:2rem}"""


def reliability_bins(probabilities: npt.NDArray[Any], labels: npt.NDArray[np.bool_], bins: int = BINS) -> dict[str, Any]:
    """How one head's probabilities [N] compare with its labels [N], in bins of equally many candidates, by rising probability.

    {"bins": [{"predicted", "observed", "rows"}], "error"}: means of each bin, and the mean distance of the two over all candidates (the
    expected calibration error; None without candidates).
    """
    predicted, observed, rows = reliability(probabilities, labels, bins)
    found = [{"predicted": float(p), "observed": float(o), "rows": int(n)} for p, o, n in zip(predicted, observed, rows, strict=True)]
    return {"bins": found, "error": calibration_error(probabilities, labels, bins) if found else None}


def write_report(metrics: Mapping[str, Any], path: Path) -> None:
    """Writes the report of what `train` found."""
    title = f"training of ranker {escape(metrics['ranker'])}"
    parts = [f"<h1>{title}</h1>", *_about(metrics), *_curves(metrics), *_heads(metrics), *_calibration(metrics)]
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>\n<body>\n'
    path.write_text(page + "\n".join(parts) + "\n</body></html>\n", "utf-8")


def _about(metrics: Mapping[str, Any]) -> Iterator[str]:
    epochs = metrics["epochs"]
    rows_per_s = [epoch["rows_per_second"] for epoch in epochs]
    waited = [epoch["data_wait_share"] for epoch in epochs]
    yield (
        f"<p>{len(epochs)} epochs, the best is {metrics['best_epoch']}; {metrics['training_seconds']:.0f} s, "
        f"{np.mean(rows_per_s):,.0f} samples/s, {np.mean(waited):.1%} of the time waiting for data.</p>"
    )
    yield _table(
        ("part", "requests", "candidates", "from", "until"),
        [
            (name, f"{of['requests']:,}", f"{of['rows']:,}", _day(of["from_ms"]), _day(of["until_ms"]))
            for name, of in metrics["parts"].items()
        ],
    )
    yield "<details><summary>options and tables</summary>"
    yield _table(("option", "value"), [(name, str(value)) for name, value in metrics["options"].items()])
    yield _table(("space", "generation"), sorted(metrics["generations"].items()))
    yield "</details>"


def _curves(metrics: Mapping[str, Any]) -> Iterator[str]:
    epochs = metrics["epochs"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    by_step, by_epoch, of_auc = figure.subplots(1, 3)
    if metrics["curve"]:
        by_step.plot(*zip(*metrics["curve"], strict=True), linewidth=1)
    by_step.set(title="loss a row, training", xlabel="step")
    numbers = [epoch["epoch"] for epoch in epochs]
    for name, label in (("train_loss", "training"), ("loss", "validation")):
        by_epoch.plot(numbers, [epoch[name] for epoch in epochs], marker="o", label=label)
    for head in metrics["test"]["heads"]:
        values = [epoch["heads"][head]["auc"] for epoch in epochs]
        of_auc.plot(numbers, [np.nan if value is None else value for value in values], marker="o", label=head)
    for axis, title in ((by_epoch, "loss a row"), (of_auc, "AUC, validation")):
        axis.set(title=title, xlabel="epoch", xticks=numbers)
        axis.legend(fontsize="small")
    yield "<h2>Curves</h2>"
    yield _svg(figure)


def _heads(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Test part</h2>"
    for title, key in (("the model", "test"), ("the small model", "test_small")):
        if key in metrics:
            rows = [
                (head, *(_number(of[name]) for name in FIGURES), _number(of["label_rate"]), f"{of['examples']:,}")
                for head, of in metrics[key]["heads"].items()
            ]
            yield f"<h3>{title}</h3>"
            yield _table(("head", *FIGURES.values(), "label rate", "candidates"), rows)


def _calibration(metrics: Mapping[str, Any]) -> Iterator[str]:
    heads = metrics["reliability"]
    figure = Figure(figsize=(3.4 * len(heads), 3.4), layout="constrained")
    for axis, (head, of) in zip(np.atleast_1d(figure.subplots(1, len(heads))), heads.items(), strict=True):
        predicted, observed = ([each[name] for each in of["bins"]] for name in ("predicted", "observed"))
        most = max([*predicted, *observed, 1e-6]) * 1.05
        axis.plot([0, most], [0, most], color="0.7", linestyle=":")
        axis.plot(predicted, observed, marker="o")
        axis.set(title=f"{head}: error {_number(of['error'])}", xlabel="predicted", ylabel="observed", xlim=(0, most), ylim=(0, most))
    yield "<h2>Calibration, test part</h2>"
    yield (
        "<p>Ten bins of equally many candidates by rising probability. Heads are trained with the domain file's weights: "
        "one whose positive examples weigh more predicts more than is observed.</p>"
    )
    yield _svg(figure)
    for head, of in heads.items():
        rows = [(f"{each['predicted']:.4f}", f"{each['observed']:.4f}", f"{each['rows']:,}") for each in of["bins"]]
        yield f"<h3>{escape(head)}</h3>"
        yield _table(("predicted", "observed", "candidates"), rows)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "freshrank"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["".join(f"<td>{escape(value)}</td>" for value in row) for row in rows]
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{names}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _day(time_ms: int) -> str:
    return str(np.datetime64(time_ms, "ms")).replace("T", " ")[:16]

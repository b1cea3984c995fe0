"""Plots of training and evaluation, as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

AGREEMENT = {"correlation": "score correlation", "kendall_tau": "Kendall tau", "top3_overlap": "top-3 overlap"}
FIGURES = {"auc": "AUC", "grouped_auc": "grouped AUC", "ndcg": "NDCG@10", "mrr": "MRR", "hit": "HIT@3", "log_loss": "log loss"}


def plot_curves(metrics: dict[str, Any], path: str | Path) -> None:
    """Loss, AUC, NDCG and HIT@3 of the validation part by epoch, one line a head; `metrics` as `train` writes it."""
    epochs = [epoch["epoch"] for epoch in metrics["epochs"]]
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    for name, label in (("train_loss", "train"), ("loss", "validation")):
        axes[0].plot(epochs, [epoch[name] for epoch in metrics["epochs"]], marker="o", label=label)
    axes[0].set_title("loss a row")
    for axis, name in zip(axes[1:], ("auc", "ndcg", "hit"), strict=True):
        for head in metrics["test"]["heads"]:
            values = [epoch["heads"][head][name] for epoch in metrics["epochs"]]
            axis.plot(epochs, [float("nan") if value is None else value for value in values], marker="o", label=head)
        axis.set_title(f"{FIGURES[name]}, validation")
    for axis in axes:
        axis.axvline(metrics["best_epoch"], color="0.7", linestyle=":")
        axis.set_xlabel("epoch")
        axis.set_xticks(epochs)
        axis.legend(fontsize="small")
    _save(figure, path)


def plot_comparison(comparison: dict[str, dict[str, dict[str, Any]]], path: str | Path) -> None:
    """Difference that the realtime sequence makes, with its 95 % interval, a panel a metric; `comparison` by head and metric."""
    figure = Figure(figsize=(16, 1.2 + 0.45 * len(comparison)), layout="constrained")
    axes = figure.subplots(1, len(FIGURES), sharey=True)
    for axis, (metric, title) in zip(axes, FIGURES.items(), strict=True):
        for place, rows in enumerate(comparison.values()):
            row = rows[metric]
            if row["difference"] is None:
                continue
            axis.plot([row["low"], row["high"]], [place, place], color="C0", linewidth=2)
            axis.plot(row["difference"], place, "o", color="C0")
        axis.axvline(0, color="0.6", linestyle=":")
        axis.set_title(f"{title}, with - without", fontsize="small")
        axis.tick_params(axis="x", labelsize="small", rotation=30)
        axis.set_yticks(range(len(comparison)), list(comparison))
    axes[0].invert_yaxis()
    _save(figure, path)


def plot_decay(result: dict[str, Any], path: str | Path) -> None:
    """AUC by days since the training, a panel a head, a line a variant; `result` as `inference.decay.decay` gives it."""
    days = result["days"]
    heads = list(days[0]["heads"])
    figure = Figure(figsize=(4.2 * len(heads), 3.4), layout="constrained")
    axes = figure.subplots(1, len(heads), squeeze=False)[0]
    for axis, head in zip(axes, heads, strict=True):
        for variant in days[0]["heads"][head]:
            values = [day["heads"][head][variant]["auc"] for day in days]
            known = [float("nan") if value is None else value for value in values]
            axis.plot([day["days_since"] for day in days], known, marker="o", label=variant)
        axis.set_title(f"{head}: AUC")
        axis.set_xlabel("days since the training")
        axis.legend(fontsize="small")
    _save(figure, path)


def plot_releases(comparison: dict[str, Any], path: str | Path) -> None:
    """Two releases side by side; `comparison` as `inference.comparison.Comparison.result` gives it: agreement by head, and latency."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    heads = comparison["scores"]
    for axis, (name, title) in zip(axes, AGREEMENT.items(), strict=False):
        for place, figures in enumerate(heads.values()):
            row = figures[name]
            if row["mean"] is not None:
                axis.plot([row["p10"], row["p90"]], [place, place], color="C0", linewidth=2)
                axis.plot(row["mean"], place, "o", color="C0")
        axis.set_title(f"{title}, mean and p10 to p90", fontsize="small")
        axis.set_yticks(range(len(heads)), list(heads))
        axis.set_xlim(-0.05 if name == "top3_overlap" else -1.05, 1.05)
        axis.invert_yaxis()
    for place, side in enumerate(("base", "other")):
        for kind, shift, color in (("latency_ms", -0.18, "C0"), ("shadow_latency_ms", 0.18, "C1")):
            p50, p99 = (comparison[side][kind][name] for name in ("p50", "p99"))
            if p50 is not None:
                axes[3].barh(place + shift, p50, height=0.3, color=color)
                axes[3].plot([p50, p99], [place + shift] * 2, color="0.3", linewidth=1.5, marker="|")
    axes[3].set_yticks((0, 1), ("base", "other"))
    axes[3].invert_yaxis()
    axes[3].set_title("ms, p50 to p99 (orange: shadow)", fontsize="small")
    figure.suptitle(f"{comparison['base']['release_id']} against {comparison['other']['release_id']}, {comparison['pairs']} pairs")
    _save(figure, path)


def plot_reliability(calibration: dict[str, Any], path: str | Path) -> None:
    """What was predicted against what happened, a panel a head; `calibration` as `inference.calibration.calibrate` gives it."""
    figure = Figure(figsize=(1 + 3.2 * len(calibration), 3.6), layout="constrained")
    for axis, (head, sides) in zip(figure.subplots(1, len(calibration), squeeze=False)[0], calibration.items(), strict=True):
        for side, found in sides.items():
            predicted, happened, _ = found["curve"]
            axis.plot(predicted, happened, marker="o", markersize=3, label=f"{side}, error {found['error']:.4f}")
        most = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([0, most], [0, most], color="0.6", linestyle=":")
        axis.set_title(head)
        axis.set_xlabel("mean probability of a bin")
        axis.set_ylabel("share with the label")
        axis.legend(fontsize="small")
    _save(figure, path)


def plot_ablation(found: dict[str, Any], key: str, path: str | Path) -> None:
    """One table of an ablation (`inference.ablation_report.summary`): a row of panels a head, the last one with the paper's lifts."""
    table, heads = found["tables"][key], list(next(iter(found["cells"].values()))["heads"])
    names = list(table["rows"])
    figure = Figure(figsize=(16, (0.9 + 0.32 * len(names)) * len(heads) + 0.4), layout="constrained")
    panels = figure.subplots(len(heads), 4, squeeze=False, sharey=True)
    for axes, head in zip(panels, heads, strict=True):
        lower = head in found["lower_is_better"]
        for place, row in enumerate(table["rows"].values()):
            against = (row["against_reference"] or {}).get(head, {})
            for axis, metric in zip(axes, ("auc", "hit_lift_percent", "mrr_lift_percent"), strict=False):
                measured = against.get(metric)
                if measured and measured["mean"] is not None:
                    if measured["low"] is not None:
                        axis.plot([measured["low"], measured["high"]], [place, place], color="C0", linewidth=2)
                    axis.plot(measured["mean"], place, "o", color="C0")
            if row["paper"][lower] is not None:
                axes[3].plot(row["paper"][lower], place, "D", color="C1")
        paper = "hide" if lower else "repin"
        titles = (f"{head}: AUC", f"{head}: HIT@3, lift %", f"{head}: MRR, lift %", f"paper: {paper} HIT@3, lift %")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title, fontsize="small")
            axis.axvline(0, color="0.6", linestyle=":")
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(labelsize="small")
        axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(f"{table['title']} (differences to {table['reference']}, 95 % intervals over users)", fontsize="medium")
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path)

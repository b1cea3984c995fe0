"""Plots of training and evaluation, as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

AGREEMENT = {"correlation": "score correlation", "kendall_tau": "Kendall tau", "top3_overlap": "top-3 overlap"}
FIGURES = {"auc": "AUC", "ndcg": "NDCG@10", "hit": "HIT@3", "log_loss": "log loss"}


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
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(comparison)), layout="constrained")
    axes = figure.subplots(1, len(FIGURES), sharey=True)
    for axis, (metric, title) in zip(axes, FIGURES.items(), strict=True):
        for place, rows in enumerate(comparison.values()):
            row = rows[metric]
            if row["difference"] is None:
                continue
            axis.plot([row["low"], row["high"]], [place, place], color="C0", linewidth=2)
            axis.plot(row["difference"], place, "o", color="C0")
        axis.axvline(0, color="0.6", linestyle=":")
        axis.set_title(f"{title}, with - without")
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


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path)

"""Plots of training and evaluation, as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

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


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path)

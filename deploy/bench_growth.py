"""Benchmark `growth`: what an event costs, and what a state takes, from 10 thousand to 10 million users and from 4 to 64 partitions.

Every user has 10 actions of the past (sequences of at most 100), so that 10 million users fit the disk; the load is Zipf 1.05 over all
users of the cell. Cells of users have 4 partitions; cells of partitions have 1 million users.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from deploy.bench_states import StateSize, measure
from deploy.kafka_server import KafkaServer
from streams.kafka import KafkaConfig

ACTIONS, EVENTS = 10, 1_000_000
USERS = {"10k": 10_000, "1m": 1_000_000, "10m": 10_000_000}
PARTITIONS = {"4p": 4, "64p": 64}
CELL_S_MAX = 60.0
"""Most seconds that the worker of one cell is measured."""
FIGURES = {
    "cpu_us_per_event": "CPU, us an event",
    "events_per_s": "events/s",
    "resident_mb": "resident, MB",
    "disk_mb": "store on disk, MB",
    "view_disk_mb": "view on disk, MB",
}


def bench_growth(
    runs: int,
    folder: Path,
    console: Console,
    *,
    users: dict[str, int] = USERS,
    partitions: dict[str, int] = PARTITIONS,
    events: int = EVENTS,
) -> list[dict[str, float]]:
    """Figures of each run, their names ending in the cell's. Needs 15 GB of disk below `folder`."""
    cells = {name: StateSize(count, ACTIONS) for name, count in users.items()}
    middle = sorted(users.values())[len(users) // 2]
    cells |= {name: StateSize(middle, ACTIONS, count) for name, count in partitions.items()}
    found = []
    with KafkaServer(folder / "kafka") as server:
        for run in range(runs):
            figures: dict[str, float] = {}
            measured: dict[StateSize, dict[str, float]] = {}
            for name, size in cells.items():
                if size not in measured:
                    place = folder / f"growth-{name}-{run}"
                    measured[size] = measure(size, events, place, KafkaConfig(server.bootstrap), console, seconds_max=CELL_S_MAX)
                figures |= {f"{figure}_{name}": measured[size][figure] for figure in FIGURES}
            found.append(figures)
    return found


def plot_growth(result: dict[str, Any], path: Path) -> None:
    """Draws what `freshrank bench growth` measured: a panel a figure, users on the left, partitions on the right."""
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    axes = figure.subplots(2, len(FIGURES))
    for row, (cells, label) in enumerate(((USERS, "users"), (PARTITIONS, "partitions"))):
        for axis, (name, title) in zip(axes[row], FIGURES.items(), strict=True):
            draw(axis, result, name, cells, label, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw(axis: Any, result: dict[str, Any], name: str, cells: dict[str, int], label: str, title: str) -> None:
    """One figure of a benchmark over the cells that its name ends in: median, with the spread as bars."""
    values = [result["figures"][f"{name}_{cell}"] for cell in cells]
    middle = [value["median"] for value in values]
    below, above = zip(*((value["median"] - value["min"], value["max"] - value["median"]) for value in values), strict=True)
    axis.errorbar(list(cells.values()), middle, yerr=[below, above], marker="o", capsize=3)
    axis.set_xscale("log")
    axis.set_xticks(list(cells.values()), list(cells))
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel(label)
    axis.set_title(title, fontsize="medium")

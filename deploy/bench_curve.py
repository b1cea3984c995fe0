"""Benchmark `curve`: what a ranking costs by the number of candidates, and by the number of items and users in the tables.

The service with a no-op model, as in the benchmark `service`. Tables have random contents, vectors and every feature of the domain file,
for as many items as users; they are memory mapped. Users who ask, the items of their histories and the candidates lie all over the tables.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from deploy.bench import CANDIDATES, world
from deploy.bench_growth import draw
from deploy.bench_service import RATE_PER_S, WARM_S, Measured, answered, measured_server, requests_of
from deploy.load import Load, run_load
from inference.transact import NoopRanker

SIZES = {"10k": 10_000, "100k": 100_000, "1m": 1_000_000, "10m": 10_000_000}
CANDIDATE_COUNTS = {"c10": 10, "c100": 100, "c300": 300, "c1000": 1_000}
"""Candidates of a ranking, with tables of the smallest size."""
SECONDS = 10.0
FIGURES = {"service_ms_p50": "server p50, ms", "service_ms_p99": "server p99, ms", "join_pack_ms_p50": "join and pack p50, ms"}


def bench_curve(
    runs: int,
    folder: Path,
    console: Console,
    *,
    sizes: dict[str, int] = SIZES,
    candidate_counts: dict[str, int] = CANDIDATE_COUNTS,
    seconds: float = SECONDS,
) -> list[dict[str, float]]:
    """Figures of each run, their names ending in the cell's. The largest tables need 6 GB of disk below `folder`, and as much memory."""
    console.print(f"{RATE_PER_S} rankings/s, Poisson, {seconds:.0f} s each, no-op model, as many users as items")
    found: list[dict[str, float]] = [{} for _ in range(runs)]
    for name, size in sizes.items():
        place = folder / name
        place.mkdir(parents=True)
        cells = {CANDIDATES: [name]}
        for cell, count in candidate_counts.items() if size == min(sizes.values()) else ():
            cells.setdefault(count, []).append(cell)
        with world(place, ("worker",), model=NoopRanker, items=size, users=size) as running:
            loads = {count: requests_of(running, count) for count in cells}
            with measured_server(running.settings, "local") as server:
                run_load(Load(server.address, loads[CANDIDATES], RATE_PER_S, WARM_S))
                for seed, figures in enumerate(found):
                    for count, requests in loads.items():
                        measured = _measure(server, requests, seconds, seed)
                        figures |= {f"{figure}_{cell}": value for figure, value in measured.items() for cell in cells[count]}
                        shown = ", ".join(f"{title} {measured[figure]:.2f}" for figure, title in FIGURES.items())
                        console.print(f"  {size:,} items and users, {count} candidates: {shown}")
    return found


def plot_curve(result: dict[str, Any], path: Path) -> None:
    """Draws what `freshrank bench curve` measured: a panel a figure, sizes of tables above, candidates below."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(FIGURES))
    for row, (cells, label) in enumerate(((SIZES, "items, and as many users"), (CANDIDATE_COUNTS, "candidates"))):
        for axis, (name, title) in zip(axes[row], FIGURES.items(), strict=True):
            draw(axis, result, name, cells, label, title)
            if cells is CANDIDATE_COUNTS:
                axis.set_xscale("linear")
                axis.set_xticks(list(cells.values()), [f"{count:,}" for count in cells.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _measure(server: Measured, requests: tuple[bytes, ...], seconds: float, seed: int) -> dict[str, float]:
    server.begin()
    answered(run_load(Load(server.address, requests, RATE_PER_S, seconds, seed=seed)))
    found = server.end()
    return {
        "service_ms_p50": found["total_ms_p50"],
        "service_ms_p99": found["total_ms_p99"],
        "join_pack_ms_p50": found["join_pack_ms_p50"],
    }

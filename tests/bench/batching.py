"""How many requests should share a Triton batch, and how long should one wait for others? `python tests/bench/batching.py`

For the no-op model and the real one in the paper's size: rankings/s of a closed loop and the p99 of a Poisson load at 60 % of it, by the
most requests of a batch and the delay. What was found, and the defaults that follow from it, stand in docs/serving.md.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.bench import world
from deploy.bench_service import measured_server, requests_of
from deploy.load import Load, closed_loop, run_load
from inference.transact import NoopRanker, TransActRanker

CHOICES = ((1, 0), (8, 0), (8, 500), (8, 2_000))
SECONDS, SHARE = 8.0, 0.6


def main() -> None:
    """Prints the table."""
    console, table = Console(), Table("model", "candidates", "requests a batch", "delay us", "rankings/s", "p50 ms", "p99 ms at 60 %")
    for model, name in ((NoopRanker, "no-op"), (TransActRanker, "real")):
        for requests_max, delay_us in CHOICES:
            with (
                tempfile.TemporaryDirectory(prefix="freshrank-bench-") as folder,
                world(
                    Path(folder),
                    ("worker", "reader"),
                    model=model,
                    torch_threads=2,
                    model_batch_requests_max=requests_max,
                    model_batch_delay_us=delay_us,
                ) as running,
                measured_server(running.settings, "local") as server,
            ):
                for candidates in (20, 100):
                    load = Load(server.address, requests_of(running, candidates), 0.0, SECONDS, timeout_s=5.0)
                    closed_loop(replace(load, seconds=2.0), 8)
                    capacity = closed_loop(load, 8).answered_per_s
                    found = run_load(replace(load, calls_per_s=SHARE * capacity))
                    times = [f"{found.percentile('OK', percent):.1f}" for percent in (50, 99)]
                    table.add_row(name, str(candidates), str(requests_max), str(delay_us), f"{capacity:.0f}", *times)
    console.print(table)


if __name__ == "__main__":
    main()

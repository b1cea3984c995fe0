"""Benchmark `scale`: from one worker to four and back, under load; how long an action takes to be seen meanwhile.

New workers begin without state: they read their partitions' log, while readers keep the view that the old owner left. Workers that are
stopped are static members: their partitions wait for one session time-out, which is most of the way back.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from rich.console import Console

from deploy.bench_freshness import follow
from deploy.bench_live import EVENTS_PER_S, Live, live, sleep_until, start, stop, work

SECONDS, CHANGE_AT_S = 15.0, 2.0
SESSION_TIMEOUT_MS = 3_000
MORE_WORKERS = 3


def bench_scale(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Visible times with one worker, while three more come, with four, and while three go. Every event must have been folded at the end."""
    console.print(f"{EVENTS_PER_S} events/s, open loop, {SECONDS:.0f} s each; session time-out {SESSION_TIMEOUT_MS} ms")
    with live(folder, console, session_timeout_ms=SESSION_TIMEOUT_MS) as world:
        return [_run(world, folder, run, console) for run in range(runs)]


def _run(world: Live, folder: Path, run: int, console: Console) -> dict[str, float]:
    workers: list[BaseProcess] = []

    def grow() -> None:
        for i in range(MORE_WORKERS):
            config = replace(world.worker, instance=f"more-{run}-{i}", state_folder=folder / f"more-{run}-{i}")
            workers.append(start(work, config))

    def shrink() -> None:
        stopping = [threading.Thread(target=stop, args=(process,)) for process in workers]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    try:
        found = {
            "1_worker": _phase(world, lambda: None),
            "growing": _phase(world, grow),
            "4_workers": _phase(world, lambda: None),
            "shrinking": _phase(world, shrink),
        }
    finally:
        shrink()
    figures = {f"visible_ms_p99_{name}": float(np.percentile(times_ms, 99)) for name, times_ms in found.items()}
    figures |= {f"dip_ms_{name}": max(found[name]) for name in ("growing", "shrinking")}
    console.print("  " + ", ".join(f"{name} {value:.0f}" for name, value in figures.items()))
    return figures


def _phase(world: Live, change: Callable[[], None]) -> list[float]:
    with world.producing(world.load(EVENTS_PER_S, SECONDS)) as load:

        def later() -> None:
            sleep_until(load.begin_s + CHANGE_AT_S)
            change()

        changing = threading.Thread(target=later, name="change")
        changing.start()
        times_ms = world.call(follow, world.worker.view_folder, world.domain, load)
        changing.join()
    return times_ms

"""Benchmark `overload`: a server that is asked for more than it can do.

With the real model in the paper's size at OVERLOAD_MODEL times what it can do, and with the no-op model at OVERLOAD_NOOP times. Capacity is
what a closed loop gets answered; the unloaded p99 is that of UNLOADED_SHARE of it with the same arrivals. Goodput and p99 of accepted calls
are measured from SETTLE_S after the load's begin: the limit has to find its place first. Figures without a suffix are the worst of the
real model with the project's throttled client over Poisson arrivals and bursts; `_noop` of the no-op model; `_unthrottled` with a client
that does not hold back.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from deploy.bench import CANDIDATES, World, world
from deploy.bench_service import Measured, measured_server, requests_of
from deploy.ghz import GhzError, run_ghz
from deploy.load import Arrivals, Load, Outcome, closed_loop, run_load
from inference.transact import NoopRanker, TransActRanker

OVERLOAD_MODEL, OVERLOAD_NOOP = 10.0, 2.0
UNLOADED_SHARE = 0.3
SECONDS, SETTLE_S, CAPACITY_S = 20.0, 5.0, 10.0
TIMEOUT_S = 2.0
_ARRIVALS: tuple[Arrivals, ...] = ("poisson", "bursts")


def bench_overload(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Goodput and latency of accepted calls under overload, against capacity and the unloaded latency."""
    found: list[dict[str, float]] = [{} for _ in range(runs)]
    for model, name, times, concurrency in ((TransActRanker, "", OVERLOAD_MODEL, 3), (NoopRanker, "_noop", OVERLOAD_NOOP, 8)):
        home = folder / f"model{name}"
        home.mkdir()
        with world(home, ("worker", "reader"), model=model, torch_threads=2) as running:
            for figures in found:  # a server of its own each run: what it has learned of its latency is part of what is measured
                with measured_server(running.settings, "local") as server:
                    figures |= _run(running, server, name, times, concurrency, console)
    return found


def _run(running: World, server: Measured, name: str, times: float, concurrency: int, console: Console) -> dict[str, float]:
    load = Load(server.address, requests_of(running, CANDIDATES), 0.0, SECONDS, timeout_s=TIMEOUT_S)
    closed_loop(replace(load, seconds=3.0), concurrency)
    capacity = closed_loop(replace(load, seconds=CAPACITY_S), concurrency).answered_per_s
    figures = {f"capacity_per_s{name}": capacity}
    worst: dict[str, float] = {}
    for throttled in (True, False):
        suffix = name if throttled else f"{name}_unthrottled"
        for arrivals in _ARRIVALS:
            calm = run_load(replace(load, calls_per_s=UNLOADED_SHARE * capacity, arrivals=arrivals, throttled=throttled))
            busy = run_load(replace(load, calls_per_s=times * capacity, seconds=SECONDS + SETTLE_S, arrivals=arrivals, throttled=throttled))
            late = busy.since(SETTLE_S)
            goodput, p99, unloaded = late.answered_per_s / capacity, late.percentile("OK", 99), calm.percentile("OK", 99)
            shed = late.percentile("RESOURCE_EXHAUSTED", 99)
            console.print(
                f"  {arrivals}{suffix}: capacity {capacity:.0f}/s, asked {times:.0f} times; goodput {100 * goodput:.0f} %, accepted p99 "
                f"{p99:.0f} ms (unloaded {unloaded:.0f}), refused p99 {shed:.0f} ms; {_listed(late)}"
            )
            for figure, value, keep in (
                (f"goodput_ratio{suffix}", goodput, min),
                (f"accepted_p99_ratio{suffix}", p99 / unloaded, max),
                (f"shed_ms_p99{suffix}", shed, max),
            ):
                worst[figure] = keep(value, worst.get(figure, value))
    try:
        found = run_ghz(server.address, load.requests[0], calls_per_s=round(times * capacity), seconds=SECONDS, timeout_s=TIMEOUT_S)
    except GhzError as error:
        console.print(f"  ghz is left out: {error}")
    else:
        console.print(f"  ghz, constant{name}: {found.count}, p50 {found.p50_ms:.0f} and p99 {found.p99_ms:.0f} ms of all calls")
    return figures | worst


def _listed(outcome: Outcome) -> str:
    return ", ".join(f"{status} {len(found)}" for status, found in sorted(outcome.latency_ms.items()))

"""Benchmark `freshness`: from an action's produce() to the answer of a reader in another process that contains it.

Every so often an event is followed: from when it was due at the producer, so that a late producer counts, until the reader, which asks for
the users of all events that it waits for again and again, in one call, finds it. Followed are users of few actions: the sequences of the
busiest ones are pushed on within milliseconds.
"""

import time
from pathlib import Path

import numpy as np
from rich.console import Console

from deploy.bench_ingest import BenchError
from deploy.bench_live import EVENTS_PER_S, HALF_LOAD_EVENTS_PER_S, PARTITIONS, Live, Load, live, sleep_until
from features.domain import Domain
from streams.view_reader import ViewReader

SECONDS, FOLLOWED_PER_S, ACTIONS_MAX = 15.0, 100, 50
_POLL_S = 0.001
_TIMEOUT_S = 10.0


def bench_freshness(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Action to visible at a usual load, and at half of what the worker can do."""
    loads = f"{EVENTS_PER_S} and {HALF_LOAD_EVENTS_PER_S} events/s"
    console.print(f"{loads}, open loop, {SECONDS:.0f} s each; produce() to the answer of a reader in another process")
    with live(folder, console) as world:
        return [_run(world, console) for _ in range(runs)]


def _run(world: Live, console: Console) -> dict[str, float]:
    figures: dict[str, float] = {}
    for events_per_s, suffix in ((EVENTS_PER_S, ""), (HALF_LOAD_EVENTS_PER_S, "_half_load")):
        with world.producing(world.load(events_per_s, SECONDS)) as load:
            found_ms = world.call(follow, world.worker.view_folder, world.domain, load)
        p50, p99 = np.percentile(found_ms, (50, 99))
        figures |= {f"visible_ms_p50{suffix}": float(p50), f"visible_ms_p99{suffix}": float(p99)}
        console.print(f"  {events_per_s} events/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms, greatest {max(found_ms):.1f} ms")
    return figures


def follow(view_folder: Path, domain: Domain, load: Load) -> list[float]:
    """How long each followed event took to be seen, ms, counted from when it was due.

    Raises:
        BenchError: an event was not seen in time.
    """
    users, events = load.events()
    _, group, counts = np.unique(users, return_inverse=True, return_counts=True)
    quiet = np.flatnonzero(counts[group] <= ACTIONS_MAX)
    slots = np.arange(0, load.count, load.events_per_s // FOLLOWED_PER_S)
    followed = np.unique(quiet[np.searchsorted(quiet, slots).clip(max=len(quiet) - 1)]).tolist()
    if time.monotonic() > load.begin_s:
        raise BenchError("the load began before this process was ready to follow it")
    waiting: dict[int, tuple[int, bytes, float]] = {}
    reader, found_ms, started = ViewReader(view_folder, domain, PARTITIONS), list[float](), 0
    while started < len(followed) or waiting:
        while started < len(followed) and load.due_s(followed[started]) <= time.monotonic():
            i = followed[started]
            waiting[i] = int(users[i]), events["event_id"][i].tobytes(), load.due_s(i)
            started += 1
        readings = reader.read("main", [user_id for user_id, _, _ in waiting.values()])
        seen_s = time.monotonic()
        for (i, (_, event_id, due_s)), reading in zip(list(waiting.items()), readings, strict=True):
            late_s = seen_s - due_s
            if event_id in reading.row:
                found_ms.append(late_s * 1e3)
                del waiting[i]
            elif late_s > _TIMEOUT_S:
                raise BenchError(
                    f"an event is not visible after {_TIMEOUT_S:.0f} s: the worker cannot keep up with {load.events_per_s} events/s here"
                )
        if waiting or started < len(followed):
            sleep_until(time.monotonic() + _POLL_S if waiting else load.due_s(followed[started]))
    reader.close()
    return found_ms

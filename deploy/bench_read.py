"""Benchmark `read`: how long a read of sequence and watermark takes, alone and while a worker writes.

A reader in a process of its own reads random users at constant intervals. Latencies count from when a read was due, so that a read that
waits behind another one, or for a core, counts in full. The reader's thread wakes SPIN_S before that and runs when the read is due, as
a server's thread is when its request asks for a sequence; where the wake-up comes later, the delay counts.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from deploy.bench_ingest import make_load
from deploy.bench_live import EVENTS_PER_S, HALF_LOAD_EVENTS_PER_S, PARTITIONS, USERS, Live, live, sleep_until
from features.domain import Domain
from streams.remote_reader import RemoteReader
from streams.view_reader import ViewReader

READS_PER_S, CALLS_PER_S, SECONDS, USERS_AT_ONCE = 500, 200, 10.0, 100
"""Local reads of one user; reads of USERS_AT_ONCE, and gRPC calls."""
SPIN_S = 0.0003
_FIRST_S = 0.5
_MARGIN_S = 1.0


def bench_read(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Latencies of the local reader and of gRPC, without and with ingest."""
    console.print(f"{READS_PER_S} reads/s ({CALLS_PER_S} a second of {USERS_AT_ONCE} users and by gRPC), open loop, {SECONDS:.0f} s each")
    console.print(f"ingest at {EVENTS_PER_S} and {HALF_LOAD_EVENTS_PER_S} events/s")
    with live(folder, console) as world:
        return [_run(world, console) for _ in range(runs)]


def _run(world: Live, console: Console) -> dict[str, float]:
    view = world.worker.view_folder, world.domain
    figures: dict[str, float] = {}

    def measure(name: str, function: Callable[..., list[float]], *arguments: Any) -> None:
        found = world.call(function, *arguments)
        p50, p99 = np.percentile(found, (50, 99))
        figures[f"{name}_ms_p50"], figures[f"{name}_ms_p99"] = float(p50), float(p99)
        console.print(f"  {name}: p50 {p50:.3f} ms, p99 {p99:.3f} ms, greatest {max(found):.3f} ms")

    measure("store", read_local, *view, 1)
    with world.producing(world.load(EVENTS_PER_S, 3 * (SECONDS + _FIRST_S) + 3 * _MARGIN_S)) as load:
        sleep_until(load.begin_s)
        measure("local", read_local, *view, 1)
        measure("local_100", read_local, *view, USERS_AT_ONCE)
        measure("grpc", read_grpc, world.reader_address, world.domain)
    with world.producing(world.load(HALF_LOAD_EVENTS_PER_S, SECONDS + _FIRST_S + _MARGIN_S)) as load:
        sleep_until(load.begin_s)
        measure("local_half_load", read_local, *view, 1)
    for part in ("p50", "p99"):
        figures[f"local_ms_{part}_half_load"] = figures.pop(f"local_half_load_ms_{part}")
    return figures


def read_local(view_folder: Path, domain: Domain, users_at_once: int) -> list[float]:
    """Latencies of a local reader, ms."""
    reader = ViewReader(view_folder, domain, PARTITIONS)
    try:
        return _open_loop(lambda users: reader.read("main", users), users_at_once, READS_PER_S if users_at_once == 1 else CALLS_PER_S)
    finally:
        reader.close()


def read_grpc(address: str, domain: Domain) -> list[float]:
    """Latencies of a remote reader, ms, for one user a call."""
    reader = RemoteReader(address, domain)
    try:
        return _open_loop(lambda users: reader.read("main", users), 1, CALLS_PER_S)
    finally:
        reader.close()


def _open_loop(read: Callable[[list[int]], Any], users_at_once: int, reads_per_s: int) -> list[float]:
    count = int(reads_per_s * SECONDS)
    users = np.unique(make_load(10 * USERS, USERS, 1)[0])
    asked = np.random.default_rng(2).choice(users, (count, users_at_once)).tolist()
    read(asked[0])
    begin_s, found_ms = time.monotonic() + _FIRST_S, []
    for i, of in enumerate(asked):
        due_s = begin_s + i / reads_per_s
        sleep_until(due_s - SPIN_S)
        while time.monotonic() < due_s:
            pass
        read(of)
        found_ms.append((time.monotonic() - due_s) * 1e3)
    return found_ms

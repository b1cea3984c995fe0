"""Benchmark `drain`: calls that fail while the processes of a server are replaced under load.

Two processes answer at one port, with a model that does nothing in a real Triton. Both Python clients call at constant intervals, over
several connections each, while SIGHUP restarts the processes one after the other (SIGTERM, drain, start) and, apart from that, while one
process is killed. Every call counts from when it was due.
"""

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console

from deploy.bench import ITEMS, USERS, write_untrained_release
from deploy.settings import load_settings
from deploy.stack import Stack
from inference.async_client import AsyncRankingClient
from inference.client import RankError, RankingClient, rank_request
from inference.transact import NoopRanker
from protos.v1.ranking_pb2 import TIER_MODEL, RankRequest

CALLS_PER_S, CHANNELS, TIMEOUT_S = 80.0, 8, 2.0
PROCESSES, RESTARTS, KILLS = 2, 2, 2
QUIET_S = 1.0
"""Load before and after each restart."""
_RESTART_WITHIN_S = 120.0
_SIMULATOR = Path(__file__).parents[1] / "domains" / "simulator.toml"


def bench_drain(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Figures of each run: failed calls of restarts and of kills, calls from a lower tier than the model, latencies."""
    console.print(
        f"{PROCESSES} processes at one port, {CALLS_PER_S:.0f} calls/s at constant intervals, half by each client over {CHANNELS} "
        f"connections; {RESTARTS} rolling restarts and {KILLS} kills a run"
    )
    home, random = folder / "home", np.random.default_rng(1)
    settings = load_settings(home=home, domain=_SIMULATOR, kafka_bootstrap="", triton_url="", server_processes=PROCESSES, server_port=0)
    write_untrained_release(home, _SIMULATOR, random, model=NoopRanker)
    with Stack(settings, serving=("worker", "server")) as stack:
        pid = stack.supervisor.children["server"].pid
        assert pid is not None
        port = stack.settings.server_address.rpartition(":")[2]
        processes = Processes(pid, home / "run" / "server.json", home / "servers" / port)
        requests = [bench_request(random) for _ in range(200)]
        with Traffic(stack.settings.server_address, lambda i: requests[i % len(requests)]):
            time.sleep(QUIET_S)  # the first calls of all open connections and read tables: not what is measured
        return [_run(stack.settings.server_address, processes, requests, console) for _ in range(runs)]


def bench_request(random: np.random.Generator, candidates: int = 100) -> RankRequest:
    """Random candidates of `write_untrained_release` for a random user."""
    return rank_request(
        "home",
        int(random.integers(1, USERS + 1)),
        random.choice(ITEMS, candidates, replace=False).astype(np.uint64) + np.uint64(1),
        candidate_features={"retrieval_score": random.random(candidates)},
        request_features={"device": "phone"},
    )


def _run(address: str, processes: "Processes", requests: list[RankRequest], console: Console) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, times in (("restart", RESTARTS), ("kill", KILLS)):
        with Traffic(address, lambda i: requests[i % len(requests)]) as traffic:
            for i in range(times):
                time.sleep(QUIET_S)
                processes.kill(i % PROCESSES) if name == "kill" else processes.restart()
            time.sleep(QUIET_S)
        both = (traffic.sync, traffic.asyncio)
        for of in both:
            for text, count in of.failures.items():
                console.print(f"  [red]{count} times {text}")
        figures["failed_requests" if name == "restart" else "failed_requests_kill"] = float(sum(of.failed for of in both))
        figures[f"{name}_requests"] = float(sum(of.failed + of.tiers.total() for of in both))
        figures[f"{name}_lower_tier"] = float(sum(of.tiers.total() - of.tiers[TIER_MODEL] for of in both))
        found_ms = np.concatenate([of.latency_ms for of in both])
        p50, p99 = np.percentile(found_ms, (50, 99))
        figures |= {f"{name}_ms_p50": float(p50), f"{name}_ms_p99": float(p99), f"{name}_ms_max": float(found_ms.max())}
        console.print("  " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if name in key or key == "failed_requests"))
    return figures


@dataclass
class Answers:
    """What became of the calls: answers by tier, failures by text, milliseconds from due to answer."""

    tiers: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    latency_ms: list[float] = field(default_factory=list)

    def add(self, due_s: float, tier: int | None, error: BaseException | None = None) -> None:
        """Counts one call, from any thread."""
        self.latency_ms.append((time.monotonic() - due_s) * 1e3)
        if error is not None:
            self.failures[f"{type(error).__name__}: {error}"] += 1
        elif tier is not None:
            self.tiers[tier] += 1

    @property
    def failed(self) -> int:
        """Calls without an answer."""
        return self.failures.total()


class Traffic:
    """Calls of `RankingClient` and `AsyncRankingClient`, half of them each, as a context manager; ends with the last answer.

    Args:
        address: the servers' "host:port".
        request: makes the i-th request; called from two threads.
        calls_per_s: of both together, at constant intervals.
    """

    def __init__(self, address: str, request: Callable[[int], RankRequest], calls_per_s: float = CALLS_PER_S) -> None:
        self._address, self._request, self._every_s = address, request, 2 / calls_per_s
        self._end = threading.Event()
        self.sync, self.asyncio = Answers(), Answers()
        self._threads = [threading.Thread(target=run, name=run.__name__) for run in (self._send_sync, self._send_asyncio)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @property
    def answered(self) -> int:
        """Answers so far."""
        return self.sync.tiers.total() + self.asyncio.tiers.total()

    def _due(self) -> Iterator[tuple[int, float]]:
        begin_s, i = time.monotonic(), 0
        while not self._end.is_set():
            yield i, begin_s + i * self._every_s
            i += 1

    def _send_sync(self) -> None:
        def call(i: int, due_s: float) -> None:
            try:
                self.sync.add(due_s, client.call(self._request(i)).tier)
            except (RankError, ValueError) as error:
                self.sync.add(due_s, None, error)

        with RankingClient(self._address, timeout_s=TIMEOUT_S, channels=CHANNELS) as client, ThreadPoolExecutor(32) as pool:
            for i, due_s in self._due():
                time.sleep(max(0.0, due_s - time.monotonic()))
                pool.submit(call, i, due_s)

    def _send_asyncio(self) -> None:
        async def call(client: AsyncRankingClient, i: int, due_s: float) -> None:
            try:
                self.asyncio.add(due_s, (await client.call(self._request(i))).tier)
            except (RankError, asyncio.CancelledError) as error:
                self.asyncio.add(due_s, None, error)

        async def run() -> None:
            async with AsyncRankingClient(self._address, timeout_s=TIMEOUT_S, channels=CHANNELS) as client, asyncio.TaskGroup() as calls:
                for i, due_s in self._due():
                    await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                    calls.create_task(call(client, i, due_s))

        asyncio.run(run())


class Processes:
    """The processes of a running `freshrank server` with several. `ready`: its ready file; `children`: the folder of theirs."""

    def __init__(self, pid: int, ready: Path, children: Path) -> None:
        self._pid, self._ready, self._children = pid, ready, children

    def pids(self) -> list[int]:
        """Those of the newest start or restart, as the server said them."""
        return list(json.loads(self._ready.read_text("utf-8"))["pids"])

    def restart(self) -> list[int]:
        """Restarts all, one after the other; returns the new pids. Raises RuntimeError: not within two minutes."""
        before = self.pids()
        os.kill(self._pid, signal.SIGHUP)
        self._wait(lambda: not set(before) & set(self.pids()))
        return self.pids()

    def kill(self, number: int) -> int:
        """Kills one process; returns the pid of the one that came back in its place. Raises as `restart`."""
        before = self._pid_of(number)
        os.kill(before, signal.SIGKILL)
        self._wait(lambda: self._pid_of(number) not in (0, before))
        return self._pid_of(number)

    def _pid_of(self, number: int) -> int:
        try:
            return int(json.loads((self._children / "run" / f"server-{number}.json").read_text("utf-8"))["pid"])
        except FileNotFoundError:  # between two of them
            return 0

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _RESTART_WITHIN_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the processes were not restarted within {_RESTART_WITHIN_S:.0f} s: see {self._children}/logs")
            time.sleep(0.05)

"""Open-loop load on a ranking server: what the benchmarks send, in a process of its own.

Calls are due at moments that do not depend on the answers, and a latency counts from when its call was due, so a server that answers late
cannot make itself look fast by being asked less. Arrivals: "constant", "poisson", or "bursts" of 4 to 16 at once with the same mean rate.
"""

import asyncio
import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from inference.throttle import Throttle
from protos.v1.ranking_pb2 import RankResponse

Arrivals = Literal["constant", "poisson", "bursts"]
METHOD = "/freshrank.v1.Ranking/Rank"
LEAD_S = 0.5
"""Between the start of a load and its first call."""


@dataclass(frozen=True)
class Load:
    """What to send: `requests` are serialized RankRequests, taken in turn."""

    address: str
    requests: tuple[bytes, ...]
    calls_per_s: float
    seconds: float
    arrivals: Arrivals = "poisson"
    timeout_s: float = 1.0
    channels: int = 4
    throttled: bool = False
    """Whether the client holds itself back as `inference.throttle` says."""
    seed: int = 0

    def due_s(self) -> npt.NDArray[np.float64]:
        """When each call is due, seconds from the begin, ascending: float64 [n]."""
        random, count = np.random.default_rng(self.seed), int(self.calls_per_s * self.seconds)
        if self.arrivals == "constant":
            return np.arange(count) / self.calls_per_s
        if self.arrivals == "poisson":
            return np.cumsum(random.exponential(1 / self.calls_per_s, count))
        sizes = random.integers(4, 17, count)
        starts = np.cumsum(random.exponential(sizes / self.calls_per_s))
        return np.repeat(starts, sizes)[:count]


@dataclass
class Outcome:
    """What became of the calls. Milliseconds from when each was due, by gRPC status name; "throttled": never sent. `tiers`: of answers."""

    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    due_s: dict[str, list[float]] = field(default_factory=dict)
    """When each of them was due, seconds from the begin, in the same order."""
    tiers: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    late_ms_p99: float = 0.0
    """By how much the generator itself sent calls late."""

    def count(self, status: str) -> int:
        """Calls that ended with a status."""
        return len(self.latency_ms.get(status, ()))

    def percentile(self, status: str, percent: float) -> float:
        """Of the latencies, milliseconds; 0 where there is none."""
        return float(np.percentile(self.latency_ms[status], percent)) if self.count(status) else 0.0

    def since(self, begin_s: float) -> "Outcome":
        """The calls that were due from `begin_s` on."""
        late = Outcome(tiers=self.tiers, seconds=self.seconds - begin_s, late_ms_p99=self.late_ms_p99)
        for status, due_s in self.due_s.items():
            kept = [i for i, due in enumerate(due_s) if due >= begin_s]
            late.due_s[status] = [due_s[i] for i in kept]
            late.latency_ms[status] = [self.latency_ms[status][i] for i in kept]
        return late

    @property
    def answered_per_s(self) -> float:
        """Goodput."""
        return self.count("OK") / self.seconds if self.seconds else 0.0


def run_load(load: Load) -> Outcome:
    """Sends a load from a process of its own. Raises RuntimeError: that process failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_in_process, args=(load, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise RuntimeError("the load generator ended without a result: see its output") from None
    finally:
        process.join()
    assert isinstance(found, Outcome)
    return found


def closed_loop(load: Load, concurrency: int) -> Outcome:
    """The same requests, `concurrency` at a time as fast as they are answered: what a server can do at most."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_loop_in_process, args=(load, concurrency, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    finally:
        process.join()
    assert isinstance(found, Outcome)
    return found


def _send_in_process(load: Load, answer: Connection) -> None:
    answer.send(asyncio.run(_send(load)))


def _loop_in_process(load: Load, concurrency: int, answer: Connection) -> None:
    answer.send(asyncio.run(_loop(load, concurrency)))


class _Caller:
    """Channels of its own (each a connection), and what became of the calls."""

    def __init__(self, load: Load) -> None:
        self.load, self.outcome, self.begin_s = load, Outcome(), 0.0
        self.throttle = Throttle(seed=load.seed) if load.throttled else None
        self.channels = [
            grpc.aio.insecure_channel(load.address, options=(("grpc.use_local_subchannel_pool", 1), ("freshrank.channel", i)))
            for i in range(load.channels)
        ]
        self.calls = [channel.unary_unary(METHOD, response_deserializer=RankResponse.FromString) for channel in self.channels]

    async def call(self, i: int, due_s: float) -> None:
        if self.throttle is not None and not self.throttle.allows():
            self._note("throttled", due_s)
            return
        try:
            answer = await self.calls[i % len(self.calls)](self.load.requests[i % len(self.load.requests)], timeout=self.load.timeout_s)
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        else:
            status = "OK"
            self.outcome.tiers[answer.tier] += 1
        if self.throttle is not None and status not in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
            self.throttle.accepted()
        self._note(status, due_s)

    def _note(self, status: str, due_s: float) -> None:
        self.outcome.latency_ms.setdefault(status, []).append((time.monotonic() - due_s) * 1e3)
        self.outcome.due_s.setdefault(status, []).append(due_s - self.begin_s)


async def _send(load: Load) -> Outcome:
    caller = _Caller(load)
    await asyncio.gather(*(channel.channel_ready() for channel in caller.channels))
    begin_s = caller.begin_s = time.monotonic() + LEAD_S
    late_ms, tasks = [], []
    for i, due_s in enumerate((begin_s + load.due_s()).tolist()):
        left_s = due_s - time.monotonic()
        if left_s > 0 or i % 16 == 0:  # also when late: answers must be taken in
            await asyncio.sleep(max(left_s, 0))
        late_ms.append((time.monotonic() - due_s) * 1e3)
        tasks.append(asyncio.create_task(caller.call(i, due_s)))
    await asyncio.gather(*tasks)
    caller.outcome.seconds, caller.outcome.late_ms_p99 = load.seconds, float(np.percentile(late_ms, 99))
    await asyncio.gather(*(channel.close() for channel in caller.channels))
    return caller.outcome


async def _loop(load: Load, concurrency: int) -> Outcome:
    caller = _Caller(load)
    await asyncio.gather(*(channel.channel_ready() for channel in caller.channels))
    begin_s, sent = time.monotonic(), 0
    caller.begin_s = begin_s

    async def one() -> None:
        nonlocal sent
        while time.monotonic() < begin_s + load.seconds:
            sent += 1
            await caller.call(sent, time.monotonic())

    await asyncio.gather(*(one() for _ in range(concurrency)))
    caller.outcome.seconds = time.monotonic() - begin_s
    await asyncio.gather(*(channel.close() for channel in caller.channels))
    return caller.outcome

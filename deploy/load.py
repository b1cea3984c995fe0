"""Open-loop load on a ranking server: what the benchmarks send, in a process of its own.

Calls are due at moments that do not depend on the answers, and a latency counts from when its call was due, so a server that answers late
cannot make itself look fast by being asked less. Calls that failed and calls that the throttle held back are counted apart.
Arrivals: "constant", "poisson", or "bursts" of 4 to 16 at once with the same mean rate.
"""

import asyncio
import multiprocessing
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
SWITCH_S = 0.0002
"""How long the event loop may keep the thread that says when a call is due from running."""


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
    begin_s: float = 0.0
    seconds: float = 0.0
    """From begin_s to the end of the load; in a closed loop to the last answer."""
    late_ms_p99: float = 0.0
    """By how much the generator itself sent calls late."""
    cpu_s: float = 0.0
    """CPU time of the generator for these calls, which a server on the same cores did not have."""

    def count(self, status: str) -> int:
        """Calls that ended with a status."""
        return len(self.latency_ms.get(status, ()))

    def percentile(self, status: str, percent: float) -> float:
        """Of the latencies of calls that ended so, milliseconds; 0 where there is none. Look at `count` of the others, too."""
        return float(np.percentile(self.latency_ms[status], percent)) if self.count(status) else 0.0

    def since(self, begin_s: float) -> "Outcome":
        """The calls that were due from `begin_s` on."""
        late = replace(self, latency_ms={}, due_s={}, begin_s=begin_s, seconds=self.begin_s + self.seconds - begin_s)
        for status, due_s in self.due_s.items():
            kept = [i for i, due in enumerate(due_s) if due >= begin_s]
            late.due_s[status] = [due_s[i] for i in kept]
            late.latency_ms[status] = [self.latency_ms[status][i] for i in kept]
        return late

    @property
    def answered_per_s(self) -> float:
        """Goodput: answers while the load went on. Those that a server gives after its end are none."""
        end_s = np.array(self.due_s.get("OK", ())) + np.array(self.latency_ms.get("OK", ())) / 1e3
        return float((end_s <= self.begin_s + self.seconds).sum()) / self.seconds if self.seconds else 0.0


class Caller:
    """Sends the calls of a load by gRPC over channels of its own (each a connection), and notes what became of them."""

    def __init__(self, load: Load) -> None:
        self.load, self.outcome = load, Outcome()
        self.begin_s = 0.0
        self.late_ms: list[float] = []
        self.throttle = Throttle(seed=load.seed) if load.throttled else None

    async def open(self) -> None:
        """Connects; before anything is timed."""
        self.channels = [
            grpc.aio.insecure_channel(self.load.address, options=(("grpc.use_local_subchannel_pool", 1), ("freshrank.channel", i)))
            for i in range(self.load.channels)
        ]
        self.calls = [channel.unary_unary(METHOD, response_deserializer=RankResponse.FromString) for channel in self.channels]
        await asyncio.gather(*(channel.channel_ready() for channel in self.channels))

    async def send(self, i: int) -> str:
        """Makes call i and returns its status."""
        call, request = self.calls[i % len(self.calls)], self.load.requests[i % len(self.load.requests)]
        try:
            answer = await call(request, timeout=self.load.timeout_s)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        self.outcome.tiers[answer.tier] += 1
        return "OK"

    async def close(self) -> None:
        """Closes the connections."""
        await asyncio.gather(*(channel.close() for channel in self.channels))

    async def call(self, i: int, due_s: float) -> None:
        """Call i, which is due at a time of time.monotonic()."""
        self.late_ms.append((time.monotonic() - due_s) * 1e3)
        if self.throttle is not None and not self.throttle.allows():
            self._note("throttled", due_s)
            return
        status = await self.send(i)
        if self.throttle is not None and status != "RESOURCE_EXHAUSTED":
            self.throttle.accepted()
        self._note(status, due_s)

    def _note(self, status: str, due_s: float) -> None:
        self.outcome.latency_ms.setdefault(status, []).append((time.monotonic() - due_s) * 1e3)
        self.outcome.due_s.setdefault(status, []).append(due_s - self.begin_s)


def run_load(load: Load, caller: Callable[[Load], Caller] = Caller) -> Outcome:
    """Sends a load from a process of its own. `caller`: another way to call, of a module. Raises RuntimeError: that process failed."""
    return _in_process(load, caller, 0)


def closed_loop(load: Load, concurrency: int, caller: Callable[[Load], Caller] = Caller) -> Outcome:
    """The same requests, `concurrency` at a time as fast as they are answered: what a server can do at most. Raises as `run_load`."""
    return _in_process(load, caller, concurrency)


def _in_process(load: Load, caller: Callable[[Load], Caller], concurrency: int) -> Outcome:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(load, caller, concurrency, theirs))
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


def _answer(load: Load, caller: Callable[[Load], Caller], concurrency: int, answer: Connection) -> None:
    answer.send(asyncio.run(_measure(caller(load), concurrency)))


async def _measure(caller: Caller, concurrency: int) -> Outcome:
    await caller.open()
    begun_s = time.process_time()
    await (_loop(caller, concurrency) if concurrency else _send(caller))
    caller.outcome.cpu_s = time.process_time() - begun_s
    caller.outcome.late_ms_p99 = float(np.percentile(caller.late_ms, 99)) if caller.late_ms else 0.0
    await caller.close()
    return caller.outcome


async def _send(caller: Caller) -> None:
    """A thread waits for each moment: the event loop's own timer is up to a millisecond late, which would count as latency."""
    sys.setswitchinterval(SWITCH_S)
    loop, tasks = asyncio.get_running_loop(), []
    begin_s = caller.begin_s = time.monotonic() + LEAD_S
    due_s = (begin_s + caller.load.due_s()).tolist()
    caller.outcome.seconds = due_s[-1] - begin_s + 1 / caller.load.calls_per_s
    all_sent = asyncio.Event()

    def start(i: int) -> None:
        tasks.append(loop.create_task(caller.call(i, due_s[i])))
        if i == len(due_s) - 1:
            all_sent.set()

    def pace() -> None:
        for i, moment_s in enumerate(due_s):
            left_s = moment_s - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)
            loop.call_soon_threadsafe(start, i)

    pacing = threading.Thread(target=pace, name="pace", daemon=True)
    pacing.start()
    await all_sent.wait()
    await asyncio.gather(*tasks)
    pacing.join()


async def _loop(caller: Caller, concurrency: int) -> None:
    begin_s, sent = time.monotonic(), 0
    caller.begin_s = begin_s

    async def one() -> None:
        nonlocal sent
        while time.monotonic() < begin_s + caller.load.seconds:
            sent += 1
            await caller.call(sent, time.monotonic())

    await asyncio.gather(*(one() for _ in range(concurrency)))
    caller.outcome.seconds = time.monotonic() - begin_s

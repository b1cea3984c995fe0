"""What the ranking server counts and times: the one place that its parts report to.

A request makes about twenty of these calls on the event loop, so each stays near a microsecond: a list item or a dictionary entry.
"""

import asyncio
import time
from collections import Counter, deque
from contextvars import ContextVar

import numpy as np

from features.described import Histogram
from features.pack import Packed

STAGES = ("admission", "wait_after", "read", "join_pack", "triton", "log", "total")

STAGE_BOUNDS_S = (0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_AGE_BOUNDS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, 86_400, 604_800)
HISTOGRAMS = {
    "loop_lag_seconds": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
    "candidates": (1, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000),
    "sequence_age_seconds": _AGE_BOUNDS_S,
    "state_age_seconds": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *_AGE_BOUNDS_S),
}
"""What `Telemetry.observe` takes, with the upper bounds of its buckets."""


LOOP_LOOK_S = 0.05


async def watch_loop(telemetry: "Telemetry") -> None:
    """Observes, for ever, how late the event loop is to a timer: what blocks it makes every ranking wait."""
    while True:
        due_s = time.monotonic() + LOOP_LOOK_S
        await asyncio.sleep(LOOP_LOOK_S)
        telemetry.observe("loop_lag_seconds", max(0.0, time.monotonic() - due_s))


class CallLaps:
    """The stages of one call, in the order in which they ended: (stage, end by time.monotonic(), seconds)."""

    __slots__ = ("laps",)

    def __init__(self) -> None:
        self.laps: list[tuple[str, float, float]] = []


LAPS: ContextVar[CallLaps | None] = ContextVar("laps", default=None)
"""Set by who wants to see the stages of the present call; see `inference.watch`."""


class Timings:
    """Durations of one stage: their histogram since start, and percentiles of the newest."""

    __slots__ = ("_newest_ms", "count", "histogram")

    def __init__(self) -> None:
        self.count = 0
        self.histogram = Histogram(STAGE_BOUNDS_S)
        self._newest_ms: deque[float] = deque(maxlen=4096)

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self.count += 1
        self.histogram.add(seconds)
        self._newest_ms.append(seconds * 1e3)

    def forget(self) -> None:
        """Drops the newest durations; count and histogram stay."""
        self._newest_ms.clear()

    def percentiles(self) -> dict[str, float]:
        """p50, p99 and greatest of the newest 4,096, milliseconds; 0 before the first."""
        newest = np.array(self._newest_ms or [0.0])
        p50, p99 = np.percentile(newest, (50, 99))
        return {"p50": float(p50), "p99": float(p99), "max": float(newest.max())}


class Telemetry:
    """Counters, histograms and stage timings of one ranking service. Called on the event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._timings = {stage: Timings() for stage in STAGES}
        self._histograms = {name: Histogram(bounds) for name, bounds in HISTOGRAMS.items()}

    def count(self, name: str, times: int = 1) -> None:
        """Adds to a counter."""
        self._counts[name] += times

    def time(self, stage: str, seconds: float) -> None:
        """Counts one duration of a stage of STAGES, which ends now."""
        self._timings[stage].add(seconds)
        call = LAPS.get()
        if call is not None:
            call.laps.append((stage, time.monotonic(), seconds))

    def restart(self) -> None:
        """Forgets the newest durations of every stage: a measurement begins. Counters and histograms go on."""
        for timings in self._timings.values():
            timings.forget()

    def observe(self, name: str, value: float) -> None:
        """Counts one value of a histogram of HISTOGRAMS."""
        self._histograms[name].add(value)

    def observe_inputs(self, packed: Packed, state_age_ms: int) -> None:
        """What one ranking was made of; state_age_ms: -1 where it is not known."""
        self.observe("candidates", len(packed.tensors["candidate_embedding"]))
        self.count("sequence_items", packed.sequence_count)
        if packed.sequence_age_ms >= 0:
            self.observe("sequence_age_seconds", packed.sequence_age_ms / 1e3)
        if state_age_ms >= 0:
            self.observe("state_age_seconds", state_age_ms / 1e3)

    def counts(self) -> dict[str, int]:
        """Counters since start; one that nothing was added to may be absent."""
        return dict(self._counts)

    def stages(self) -> dict[str, Histogram]:
        """Histogram of each stage, seconds."""
        return {stage: timings.histogram for stage, timings in self._timings.items()}

    def histograms(self) -> dict[str, Histogram]:
        """Those of HISTOGRAMS."""
        return self._histograms

    def statistics(self) -> dict[str, float]:
        """Counters since start, and percentiles of the stages in milliseconds."""
        figures: dict[str, float] = dict(self._counts)
        for stage, timings in self._timings.items():
            figures |= {f"{stage}_ms_{name}": value for name, value in timings.percentiles().items()}
        return figures

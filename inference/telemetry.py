"""What the ranking server counts and times: the one place that its parts report to."""

from collections import Counter, deque

import numpy as np

STAGES = ("wait_after", "read", "join_pack", "triton", "log", "total")


class Timings:
    """Durations of one stage: count and percentiles of the newest."""

    def __init__(self) -> None:
        self.count = 0
        self._newest_ms: deque[float] = deque(maxlen=4096)

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self.count += 1
        self._newest_ms.append(seconds * 1e3)

    def percentiles(self) -> dict[str, float]:
        """p50, p99 and greatest of the newest 4,096, milliseconds; 0 before the first."""
        newest = np.array(self._newest_ms or [0.0])
        p50, p99 = np.percentile(newest, (50, 99))
        return {"p50": float(p50), "p99": float(p99), "max": float(newest.max())}


class Telemetry:
    """Counters and stage timings of one ranking service. Called on the event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._timings = {stage: Timings() for stage in STAGES}

    def count(self, name: str, times: int = 1) -> None:
        """Adds to a counter."""
        self._counts[name] += times

    def time(self, stage: str, seconds: float) -> None:
        """Counts one duration of a stage of STAGES."""
        self._timings[stage].add(seconds)

    def statistics(self) -> dict[str, float]:
        """Counters since start, and percentiles of the stages in milliseconds."""
        figures: dict[str, float] = dict(self._counts)
        for stage, timings in self._timings.items():
            figures |= {f"{stage}_ms_{name}": value for name, value in timings.percentiles().items()}
        return figures

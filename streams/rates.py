"""Rates and freshness by partition: small reports that workers send once a second, and their fold into windows.

A worker reports each second of each partition that had records: how many, how many of them dead letters, and the longest time from append
until readers saw them. The reports go to a topic of their own, of short retention; a Faust table (streams/worker.py) keeps one window of
them per partition and ten seconds. The fold is idempotent, as Faust delivers at least once: a report has an identity within its window.
"""

import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from features.actions import REJECTED
from streams.core import Applied

WINDOW_S = 10
KEPT_S = 3_600
"""How long a window is kept."""

Window = dict[str, list[float]]
"""Reports of one window by their identity: [events, dead letters, longest ms until visible]."""


@dataclass(frozen=True)
class Report:
    """One second of one partition, as one run of a worker saw it. visible_ms_max is -1 where every record was a dead letter."""

    partition: int
    second: int
    run: str
    events: int
    dead_letters: int
    visible_ms_max: int

    def encode(self) -> bytes:
        """JSON, so that any Kafka tool shows it."""
        return json.dumps(self.__dict__).encode()

    @staticmethod
    def decode(data: bytes) -> "Report":
        """Raises ValueError for anything but a report."""
        try:
            fields = json.loads(data)
            numbers = {name: int(fields[name]) for name in ("partition", "second", "events", "dead_letters", "visible_ms_max")}
            return Report(run=str(fields["run"]), **numbers)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"not a rate report: {error!r}") from error


class RateReporter:
    """Adds up what the hot path observes, by partition and second."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._seconds: dict[tuple[int, int], list[int]] = {}

    def observe(self, applied: Applied) -> None:
        """Takes a batch that readers see since now."""
        now_ms, batch, partition = time.time_ns() // 1_000_000, applied.batch, applied.partition
        oldest_ms = int(batch.append_time_ms.min(initial=now_ms, where=batch.verdict != REJECTED))
        late_ms = now_ms - oldest_ms if len(batch) > len(batch.reasons) else -1
        with self._lock:
            events, dead, latest_ms = self._seconds.get((partition, now_ms // 1000), (0, 0, -1))
            self._seconds[partition, now_ms // 1000] = [events + len(batch), dead + len(batch.reasons), max(latest_ms, late_ms)]

    def drain(self, *, everything: bool = False) -> list[Report]:
        """The seconds that are over (or all), each once."""
        second = time.time_ns() // 1_000_000_000
        with self._lock:
            done = sorted(key for key in self._seconds if everything or key[1] < second)
            return [Report(partition, at, self._run, *self._seconds.pop((partition, at))) for partition, at in done]


def fold(window: Mapping[str, list[float]], report: Report) -> Window:
    """The window with a report in it; the same report twice changes nothing."""
    return {**window, f"{report.second}/{report.run}": [report.events, report.dead_letters, report.visible_ms_max]}


class Rate(NamedTuple):
    """A window in figures. visible_ms_max is -1 where nothing became visible."""

    start_s: int
    events: int
    events_per_s: float
    dead_letters: int
    visible_ms_max: float


def summarise(start_s: float, window: Window, now_s: float) -> Rate:
    """Figures of a window that began at `start_s`; one that is not over is divided by the time that it had."""
    reports = window.values()
    events, dead_letters = (int(sum(report[i] for report in reports)) for i in (0, 1))
    seconds = min(max(now_s - start_s, 1.0), WINDOW_S)
    late_ms = max((report[2] for report in reports), default=-1)
    return Rate(int(start_s), events, round(events / seconds, 3), dead_letters, late_ms)


def page(windows: Mapping[int, list[Rate]], *, held: bool) -> dict[str, Any]:
    """What /rates/ shows. held: whether this worker has the table."""
    partitions = {str(number): [rate._asdict() for rate in rates] for number, rates in sorted(windows.items())}
    return {"window_s": WINDOW_S, "held": held, "partitions": partitions}

"""How a process describes what it measures: one list of metrics, which its page, its dashboard, its alerts and the manual agree with."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["counter", "gauge", "histogram"]

_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum")}


@dataclass(frozen=True)
class Described:
    """One metric. `name` is as it is exposed, without the prefix; a histogram adds _bucket, _count and _sum."""

    name: str
    kind: Kind
    label: str
    help: str
    source: str = ""
    """Key of the figures that it comes from; empty where it is computed."""


def exposed(prefix: str, metrics: Iterable[Described]) -> set[str]:
    """Every name that a query may use."""
    return {f"{prefix}{metric.name}{suffix}" for metric in metrics for suffix in _SUFFIXES.get(metric.kind, ("",))}


class Histogram:
    """Counts by bucket. `bounds`: ascending upper bounds, inclusive."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_all(self, values: npt.NDArray[Any]) -> None:
        """Counts each value once: int64 or float64 [n]."""
        if not len(values):
            return
        self.total += float(values.sum())
        low, high = bisect_left(self.bounds, values.min()), bisect_left(self.bounds, values.max())
        if low == high:  # the usual case of a batch: its values are of one moment
            self.counts[low] += len(values)
            return
        for place, count in enumerate(np.bincount(np.searchsorted(self.bounds, values)).tolist()):
            self.counts[place] += count

    def buckets(self, scale: float = 1.0) -> list[tuple[str, float]]:
        """(upper bound times `scale`, values up to it), as Prometheus wants them."""
        names = [*(f"{bound * scale:g}" for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))

"""How a process describes what it measures: one list of metrics, which its page, its dashboard, its alerts and the manual agree with."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

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

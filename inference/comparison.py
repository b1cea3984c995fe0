"""Two releases compared by what the ranking log has of them.

Where one scored in the shadow of the other, both saw the same requests: pairs by request_id say how far scores and orders agree. Arms of an
experiment have different users: their figures stand side by side, and say nothing about single requests.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from inference.explain import kendall_tau
from inference.scoring import best_first
from protos.v1.ranking_pb2 import TIER_MODEL, RankingRecord, Tier

F32 = npt.NDArray[np.float32]
FINAL = "final score"
TOP = 3
WAITING_MAX = 20_000
"""Records that wait for their partner. It follows soon: both are of one user, so in one partition of the log."""


@dataclass
class Side:
    """What one release did: rankings that somebody saw, and shadows."""

    release_id: str
    rankings: int = 0
    shadows: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    latencies_us: list[int] = field(default_factory=list)
    shadow_latencies_us: list[int] = field(default_factory=list)
    means: dict[str, list[float]] = field(default_factory=dict)
    """Mean score of a ranking's candidates, by head."""

    def add(self, record: RankingRecord) -> None:
        """Counts one record of the release."""
        if record.shadow:
            self.shadows += 1
        else:
            self.rankings += 1
        if record.latency_us:  # 0: logged before it was measured
            (self.shadow_latencies_us if record.shadow else self.latencies_us).append(record.latency_us)
        self.tiers[Tier.Name(record.tier)] += 1
        if record.tier == TIER_MODEL:
            for name, scores in scores_of(record).items():
                self.means.setdefault(name, []).append(float(scores.mean()))

    def result(self) -> dict[str, Any]:
        """As JSON. latency_ms: of rankings, from the call to the answer; shadow_latency_ms: of packing and scoring alone."""
        return {
            "release_id": self.release_id,
            "rankings": self.rankings,
            "shadows": self.shadows,
            "tiers": dict(sorted(self.tiers.items())),
            "latency_ms": _percentiles_ms(self.latencies_us),
            "shadow_latency_ms": _percentiles_ms(self.shadow_latencies_us),
            "mean_scores": {name: float(np.mean(means)) for name, means in self.means.items()},
        }


class Comparison:
    """Takes records in any order; `result` says what they show."""

    def __init__(self, base: str, other: str) -> None:
        self.base, self.other = Side(base), Side(other)
        self._arms: dict[tuple[str, str, str], Side] = {}
        self._waiting: dict[tuple[str, int], RankingRecord] = {}
        self._pairs = 0
        self._agreement: dict[str, dict[str, list[float]]] = {}

    def add(self, record: RankingRecord) -> None:
        """Counts a record of either release; others are passed over."""
        side = {self.base.release_id: self.base, self.other.release_id: self.other}.get(record.release_id)
        if side is None:
            return
        side.add(record)
        if record.experiment and not record.shadow:
            key = (record.experiment, record.arm or "-", record.release_id)
            self._arms.setdefault(key, Side(record.release_id)).add(record)
        theirs = self.other if side is self.base else self.base
        partner = self._waiting.pop((theirs.release_id, record.request.request_id), None)
        if partner is None or partner.request.user_id != record.request.user_id or partner.shadow == record.shadow:
            self._waiting[(record.release_id, record.request.request_id)] = record
            if len(self._waiting) > WAITING_MAX:
                del self._waiting[next(iter(self._waiting))]
            return
        self._compare(*((record, partner) if side is self.base else (partner, record)))

    def result(self) -> dict[str, Any]:
        """As JSON: base and other (`Side.result`), arms, pairs, and by head the agreement over the pairs that both models scored: each
        figure's mean, p10, p50 and p90, None without a pair.
        """
        return {
            "base": self.base.result(),
            "other": self.other.result(),
            "arms": [{"experiment": name, "arm": arm, **side.result()} for (name, arm, _), side in sorted(self._arms.items())],
            "pairs": self._pairs,
            "scores": {
                head: {name: _spread(values) for name, values in figures.items()} for head, figures in sorted(self._agreement.items())
            },
        }

    def _compare(self, base: RankingRecord, other: RankingRecord) -> None:
        self._pairs += 1
        if base.tier != TIER_MODEL or other.tier != TIER_MODEL:
            return
        ours, theirs = scores_of(base), scores_of(other)
        for head in (name for name in ours if name in theirs and len(ours[name]) == len(theirs[name])):
            of_head = self._agreement.setdefault(head, {"correlation": [], "kendall_tau": [], "top3_overlap": []})
            a, b = ours[head], theirs[head]
            of_head["correlation"].append(correlation(a, b))
            of_head["kendall_tau"].append(kendall_tau(a, b))
            of_head["top3_overlap"].append(top_overlap(a, b))


def scores_of(record: RankingRecord) -> dict[str, F32]:
    """Scores by head, and the final ones, float32 [C] each."""
    return {FINAL: np.frombuffer(record.scores, "<f4"), **{name: np.frombuffer(data, "<f4") for name, data in record.head_scores.items()}}


def correlation(a: F32, b: F32) -> float:
    """Pearson's correlation of two scorings [C]; NaN where one has no spread."""
    x, y = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    spread = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread) if spread else float("nan")


def top_overlap(a: F32, b: F32, count: int = TOP) -> float:
    """Share of the first `count` candidates that both orders have among theirs, 0 to 1."""
    count = min(count, len(a))
    return len(set(best_first(a)[:count].tolist()) & set(best_first(b)[:count].tolist())) / count


def _spread(values: list[float]) -> dict[str, float | None]:
    kept = np.array([value for value in values if np.isfinite(value)])
    if not len(kept):
        return dict.fromkeys(("mean", "p10", "p50", "p90"))
    p10, p50, p90 = np.percentile(kept, (10, 50, 90))
    return {"mean": float(kept.mean()), "p10": float(p10), "p50": float(p50), "p90": float(p90)}


def _percentiles_ms(latencies_us: list[int]) -> dict[str, float | None]:
    if not latencies_us:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(np.array(latencies_us) / 1e3, (50, 99))
    return {"p50": float(p50), "p99": float(p99)}

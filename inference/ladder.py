"""Which tier answers: the best one that the request's time, the parts that are there and the caller's wish allow.

full model > fewer candidates > small model > dot product of embeddings > popularity > the caller's order. Each answer names its tier.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.pack import Packed, RankInputs, Tensors
from features.request import RequestError
from inference.scoring import best_first, embedding_scores
from inference.served import Served
from inference.telemetry import Telemetry
from inference.triton import ModelTimeoutError, TritonError
from protos.v1.ranking_pb2 import (
    TIER_CALLER_ORDER,
    TIER_EMBEDDING,
    TIER_FEWER,
    TIER_MODEL,
    TIER_POPULARITY,
    TIER_SMALL,
    TIER_UNSPECIFIED,
    Tier,
)

F32 = npt.NDArray[np.float32]
Final = Callable[[F32, npt.NDArray[np.int64] | None], F32]
"""From probabilities [K, H] of candidates (their places int64 [K]; None: all) to final scores float32 [K]."""

LADDER = (TIER_MODEL, TIER_FEWER, TIER_SMALL, TIER_EMBEDDING, TIER_POPULARITY, TIER_CALLER_ORDER)
CANDIDATES_MIN = 8
"""Fewer candidates than these are not worth asking the model for."""


@dataclass(frozen=True)
class Scored:
    """scores float32 [C]; probability float32 [C, H], NaN for candidates that no model scored, or None: no model did."""

    tier: int
    scores: F32
    probability: F32 | None = None


def checked_tier(wanted: int) -> int:
    """The place to start from. Raises RequestError: not a tier that can be asked for."""
    if wanted in (TIER_UNSPECIFIED, TIER_MODEL):
        return int(TIER_MODEL)
    if wanted not in LADDER or wanted == TIER_FEWER:
        allowed = ", ".join(Tier.Name(tier) for tier in LADDER if tier != TIER_FEWER)
        raise RequestError("tier", f"{wanted} cannot be asked for; allowed: {allowed}")
    return wanted


def is_below(tier: int, wanted: int) -> bool:
    """Whether a tier of LADDER is a lower one than that which was to answer."""
    return LADDER.index(tier) > LADDER.index(wanted)


async def score(
    served: Served, packed: Packed, inputs: RankInputs, wanted: int, final: Final, timeout_s: float, telemetry: Telemetry
) -> Scored:
    """Scores a request's candidates with the best tier from `wanted` on. `timeout_s`: time for the model."""
    if wanted == TIER_MODEL:
        scored = await _ask_model(served, packed, final, timeout_s, telemetry)
        if scored is not None:
            return scored
    below = LADDER.index(wanted)
    if served.small is not None and below <= LADDER.index(TIER_SMALL):
        probability = served.small.probabilities(packed.tensors)
        return Scored(TIER_SMALL, final(probability, None), probability)
    if _has_user_vector(served, packed) and below <= LADDER.index(TIER_EMBEDDING):
        return Scored(TIER_EMBEDDING, embedding_scores(packed.tensors))
    if served.popularity is not None and below <= LADDER.index(TIER_POPULARITY):
        return Scored(TIER_POPULARITY, served.popularity.scores(inputs.candidate_kinds, inputs.candidate_ids))
    return Scored(TIER_CALLER_ORDER, np.zeros(len(inputs.candidate_ids), np.float32))


async def _ask_model(served: Served, packed: Packed, final: Final, timeout_s: float, telemetry: Telemetry) -> Scored | None:
    """The model's answer for all candidates, or for as many as there is time for; None: another tier is to answer."""
    count = len(packed.tensors["candidate_embedding"])
    chosen = rest = None
    within = served.gate.candidates_within(timeout_s)
    if within < count:
        if within < CANDIDATES_MIN:
            telemetry.count("model_no_time")
            return None
        promising = _promising(served, packed)
        chosen, rest = np.sort(promising[:within]), promising[within:]
    started_s = time.monotonic()
    try:
        probability = await served.gate.infer(packed.tensors if chosen is None else _some(served, packed, chosen), timeout_s=timeout_s)
    except TritonError as error:
        telemetry.count("model_timeouts" if isinstance(error, ModelTimeoutError) else "model_unavailable")
        return None
    telemetry.time("triton", time.monotonic() - started_s)
    if chosen is None or rest is None:
        return Scored(TIER_MODEL, final(probability, None), probability)
    return _behind(chosen, rest, probability, final(probability, chosen))


def _promising(served: Served, packed: Packed) -> npt.NDArray[np.int64]:
    """Places of the candidates, those first that the cheap tiers think best; the caller's order where there is none."""
    if served.small is not None:
        return best_first(served.small.probabilities(packed.tensors) @ served.utilities)
    if _has_user_vector(served, packed):
        return best_first(embedding_scores(packed.tensors))
    return np.arange(len(packed.tensors["candidate_embedding"]))


def _some(served: Served, packed: Packed, chosen: npt.NDArray[np.int64]) -> Tensors:
    per_candidate = {tensor.name for tensor in served.packer.table if tensor.per_candidate}
    return {name: value[chosen] if name in per_candidate else value for name, value in packed.tensors.items()}


def _behind(chosen: npt.NDArray[np.int64], rest: npt.NDArray[np.int64], probability: F32, scores: F32) -> Scored:
    """Candidates that the model scored, and behind them the rest in its order, each place below the one before."""
    count = len(chosen) + len(rest)
    all_scores = np.empty(count, np.float32)
    # A formula may give any numbers, and the least float32 where it gave none: those stand last of all.
    is_number = scores > np.finfo(np.float32).min
    least = float(scores[is_number].min()) if is_number.any() else 0.0
    step = max(1.0, abs(least) * 2.0**-20)  # float32 has 24 bits: each place below stays a place of its own
    all_scores[rest] = least - step * np.arange(1, len(rest) + 1)
    all_scores[chosen] = np.where(is_number, scores, np.float32(least - step * (len(rest) + 1)))
    of_all = np.full((count, probability.shape[1]), np.nan, np.float32)
    of_all[chosen] = probability
    return Scored(TIER_FEWER, all_scores, of_all)


def _has_user_vector(served: Served, packed: Packed) -> bool:
    return served.ranker.user_space is not None and not packed.missing_user

"""Explain: what a ranking was made of, and what each recent action did to it.

The effect of an action is found by leaving it out: the sequence is packed without it, the model scores that, and the difference of the
final scores is the action's. It is asked of the release's own model, by the server from Triton and by `freshrank explain` from the weights.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from features.domain import Domain
from features.pack import Packed, Packer, RankInputs, Tensors
from features.tensors import SIDES, feature_names
from inference.admission import Admission, OverloadedError
from inference.ladder import Final, Scored
from inference.served import Served
from inference.triton import TritonError
from protos.v1.ranking_pb2 import TIER_MODEL, ExplainedAction, ExplainedFeature, Explanation, RankResponse

F32 = npt.NDArray[np.float32]
Order = npt.NDArray[np.int64]

ACTIONS_MAX = 20
"""Actions that are left out, one at a time, the newest first."""
TAU_CANDIDATES_MAX = 1_000
"""Kendall's tau is of so many candidates, the first of the answer."""
EXPLAINS_MAX = 2
TOGETHER = 4
"""Variants that are asked for at once: Triton joins them into one batch."""
MODEL_S_MAX = 5.0
_QUIET_POLL_S = 0.005


@dataclass(frozen=True)
class Variant:
    """The inputs without one event, which is `events[place]`."""

    place: int
    inputs: RankInputs


def variants(packer: Packer, inputs: RankInputs) -> list[Variant]:
    """The inputs without each of the newest ACTIONS_MAX actions that can have an effect, newest first."""
    domain, events = packer.domain, inputs.events
    can = np.zeros(len(events), bool)
    can[packer.visible(inputs)] = True
    can |= np.isin(events["action"], [action.id for action in domain.actions.values() if action.retracts is not None])
    places = np.flatnonzero(can)[::-1][:ACTIONS_MAX].tolist()
    return [Variant(place, replace(inputs, events=np.delete(events, place))) for place in places]


def kendall_tau(a: F32, b: F32) -> float:
    """Kendall's tau-b of two scorings [C] of the same candidates, -1 to 1; NaN where all scores of one are equal, or C is below 2.

    M. G. Kendall, The treatment of ties in ranking problems, Biometrika 33(3), 1945. Takes time and memory of C x C.
    """
    first, second = _pairs(len(a))
    of_a, of_b = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
    untied = float(np.count_nonzero(of_a)) * float(np.count_nonzero(of_b))
    return float((of_a * of_b).sum(dtype=np.float64) / np.sqrt(untied)) if untied else float("nan")


@lru_cache(maxsize=8)
def _pairs(count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.triu_indices(count, 1)


def explanation(
    packer: Packer,
    inputs: RankInputs,
    packed: Packed,
    scores: F32,
    without: Mapping[int, F32],
    response: RankResponse,
    order: Order,
) -> Explanation:
    """The message.

    Args:
        packer, inputs, packed: what was ranked.
        scores: final scores float32 [C] in the order of the request's candidates; so are those of `without`.
        without: final scores without the event at each place of `inputs.events`.
        response: the answer; order: places of its candidates in the request, int64 [C].
    """
    domain = packer.domain
    found = Explanation(response=response, by_model=response.tier == TIER_MODEL)
    seen = set(packer.visible(inputs).tolist())
    for place in range(len(inputs.events) - 1, -1, -1):
        action = found.actions.add()
        _describe(action, domain, inputs, place)
        action.seen = place in seen
        if place in without:
            action.left_out = True
            action.effect = (scores - without[place])[order].astype("<f4").tobytes()
            best = order[:TAU_CANDIDATES_MAX]
            action.kendall_tau = kendall_tau(scores[best], without[place][best])
    found.features.extend(_features(packer, packed.tensors, order))
    return found


def _describe(action: ExplainedAction, domain: Domain, inputs: RankInputs, place: int) -> None:
    event = inputs.events[place]
    time_ms = int(event["event_time_ms"])
    actions = {known.id: name for name, known in domain.actions.items()}
    action.action = actions.get(int(event["action"]), str(int(event["action"])))
    action.kind = _name(domain.entities, int(event["entity_kind"]))
    action.surface = _name(domain.surfaces, int(event["surface"])) if event["surface"] else ""
    action.entity_id, action.event_time_ms = int(event["entity_id"]), time_ms
    action.age_ms, action.value = inputs.request_time_ms - time_ms, float(event["value"])


def _name(known: Mapping[str, int], number: int) -> str:
    return next((name for name, own in known.items() if own == number), str(number))


def _features(packer: Packer, tensors: Tensors, order: Order) -> Iterator[ExplainedFeature]:
    for side in SIDES:
        for kind in ("number", "category"):
            for column, name in enumerate(feature_names(packer.domain, packer.ranker_name, side, kind)):
                values = _in_order(tensors[f"{side}_{kind}"], side, order)[..., column]
                feature = ExplainedFeature(name=name, side=side)
                if kind == "number":
                    feature.number = values.astype("<f4").tobytes()
                else:
                    feature.code, feature.width = values.astype("<i4").tobytes(), 1
                yield feature
        for kind in ("list", "weighted_list"):
            for name in feature_names(packer.domain, packer.ranker_name, side, kind):
                values = _in_order(tensors[f"{side}_list_{name}"], side, order)
                feature = ExplainedFeature(name=name, side=side, code=values.astype("<i4").tobytes(), width=values.shape[-1])
                if kind == "weighted_list":
                    feature.number = _in_order(tensors[f"{side}_weight_{name}"], side, order).astype("<f4").tobytes()
                yield feature
        for name in feature_names(packer.domain, packer.ranker_name, side, "vector"):
            values = _in_order(tensors[f"{side}_vector_{name}"], side, order)
            yield ExplainedFeature(name=name, side=side, number=values.astype("<f4").tobytes(), width=values.shape[-1])


def _in_order(values: npt.NDArray[Any], side: str, order: Order) -> npt.NDArray[Any]:
    return values[order] if side in ("item", "candidate") else values


class Explainer:
    """Explains on the server: at most EXPLAINS_MAX at once, and no further step while a ranking waits at the door."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._at_work = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one explanation. Raises OverloadedError: none is free."""
        if self._at_work >= EXPLAINS_MAX:
            raise OverloadedError(f"{self._at_work} explanations are in work, as many as may be: try again in a second", 1000)
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    def model_s(self, end_s: float) -> float:
        """Time for one answer of the model: half of what is left until `end_s` (time.monotonic), since more are to come."""
        return min((end_s - time.monotonic()) / 2, MODEL_S_MAX)

    async def explain(
        self,
        served: Served,
        inputs: RankInputs,
        packed: Packed,
        scored: Scored,
        final: Final,
        response: RankResponse,
        order: Order,
        end_s: float,
    ) -> Explanation:
        """The explanation of an answer, with as many effects as could be found until `end_s` (time.monotonic)."""
        without: dict[int, F32] = {}
        left = variants(served.packer, inputs) if scored.tier == TIER_MODEL else []
        while left and await self._quiet(end_s):
            now, left = left[:TOGETHER], left[TOGETHER:]
            answers = await asyncio.gather(
                *(self._without(served, variant, final, self.model_s(end_s)) for variant in now), return_exceptions=True
            )
            for variant, answer in zip(now, answers, strict=True):
                if isinstance(answer, TritonError):
                    left = []  # no time, or no model: what there is must do
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    without[variant.place] = answer
        # Tau of many candidates takes a while: not on the event loop.
        return await asyncio.to_thread(explanation, served.packer, inputs, packed, scored.scores, without, response, order)

    async def _without(self, served: Served, variant: Variant, final: Final, timeout_s: float) -> F32:
        # Several at once, and with little time: what becomes of them must not open the breaker for rankings.
        probability = await served.gate.rehearse(served.packer.pack(variant.inputs).tensors, timeout_s=timeout_s)
        return final(probability, None)

    async def _quiet(self, end_s: float) -> bool:
        """Waits until nobody waits at the door; False: the time is over."""
        while (there_is_time := self.model_s(end_s) > _QUIET_POLL_S) and self._admission.waiting:  # noqa: ASYNC110 - the door tells nobody
            await asyncio.sleep(_QUIET_POLL_S)
        return there_is_time

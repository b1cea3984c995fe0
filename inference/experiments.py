"""Experiments: who gets which arm, what an arm does to an answer, and which requests a shadow scores.

Everything is a function of the announcement and of ids, so every process, and anybody who reads the ranking log, comes to the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from features.ids import user_key
from inference.scoring import best_first
from protos.v1.ranking_pb2 import TIER_CALLER_ORDER, Experiment

SHARES = 10_000
"""Shares are counted in 1/SHARES."""
RELEASES_MAX = 8
"""Most releases that an experiment may keep loaded beside the served one: each is a model in Triton."""
_NAME_CHARACTERS_MAX = 64


class ExperimentError(ValueError):
    """An experiment that cannot run; names the part and says what is allowed."""


@dataclass(frozen=True)
class Choice:
    """What an experiment decides for one request; the default: nothing.

    release_id: of the arm, "" for the served one; tier: the one to start from, 0: as the request says; shuffle_bound: 0 for the order of
    the scores.
    """

    experiment: str = ""
    arm: str = ""
    release_id: str = ""
    tier: int = 0
    shuffle_bound: int = 0

    def order(self, scores: npt.NDArray[np.float32], request_id: int) -> npt.NDArray[np.int64]:
        """Places of the candidates as they are answered, int64 [C]."""
        order = best_first(scores)
        return shuffled(order, self.shuffle_bound, request_id) if self.shuffle_bound else order


NOTHING = Choice()


def check(experiment: Experiment) -> Experiment:
    """The experiment itself. Raises ExperimentError."""
    if not experiment.name or len(experiment.name) > _NAME_CHARACTERS_MAX:
        raise ExperimentError(f"name: must have 1 to {_NAME_CHARACTERS_MAX} characters")
    if not experiment.arms and not experiment.shadows:
        raise ExperimentError("arms: neither an arm nor a shadow; name at least one, or stop the experiment")
    names = [arm.name for arm in experiment.arms]
    if not all(0 < len(name) <= _NAME_CHARACTERS_MAX for name in names):
        raise ExperimentError(f"arms: a name must have 1 to {_NAME_CHARACTERS_MAX} characters")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ExperimentError(f"arms: {min(twice)!r} stands there twice")
    for what, part in (*((f"arm {arm.name}", arm) for arm in experiment.arms), *(("shadow", shadow) for shadow in experiment.shadows)):
        if not 0 < part.share <= SHARES:
            raise ExperimentError(f"{what}: its share is {part.share / 100:g} %; allowed are 0.01 to 100 %")
    total = sum(arm.share for arm in experiment.arms)
    if total > SHARES:
        raise ExperimentError(f"arms: their shares are {total / 100:g} % together; at most 100 %")
    for arm in experiment.arms:
        what = arm.WhichOneof("what")
        if what is None or not getattr(arm, what):
            raise ExperimentError(f"arm {arm.name}: needs a release, noop, or shuffle with a bound of at least 1")
    if len(releases := needed(experiment)) > RELEASES_MAX:
        raise ExperimentError(f"releases: {len(releases)} of them; at most {RELEASES_MAX}, each is a model in Triton")
    return experiment


def needed(experiment: Experiment) -> set[str]:
    """Releases that arms and shadows name."""
    return {arm.release_id for arm in experiment.arms if arm.release_id} | {shadow.release_id for shadow in experiment.shadows}


def choose(experiment: Experiment | None, user_id: int) -> Choice:
    """The arm of a user; users beyond all shares, and all users without an experiment, get the served release."""
    if experiment is None:
        return NOTHING
    place = _share_of(f"{experiment.name}\0".encode() + user_key(user_id))
    end = 0
    for arm in experiment.arms:
        end += arm.share
        if place < end:
            tier = int(TIER_CALLER_ORDER) if arm.noop else 0
            return Choice(experiment.name, arm.name, arm.release_id, tier, arm.shuffle)
    return Choice(experiment.name)


def shadows_of(experiment: Experiment | None, request_id: int) -> list[str]:
    """Releases that score this request in the shadow of its answer."""
    if experiment is None:
        return []
    number = request_id.to_bytes(8, "little")
    return [
        shadow.release_id for shadow in experiment.shadows if _share_of(f"shadow\0{shadow.release_id}\0".encode() + number) < shadow.share
    ]


def shuffled(order: npt.NDArray[np.int64], bound: int, request_id: int) -> npt.NDArray[np.int64]:
    """The order, int64 [C], with each candidate at most `bound` places from where it was; the same for the same request_id, everywhere.

    Place i gets the key i + u, u uniform in [0, bound + 1). A candidate can only be overtaken by those up to `bound` places behind it.
    """
    if not len(order):
        return order
    places = np.arange(len(order), dtype=np.uint64)
    # SplitMix64 over (request_id, place): integers only, so the same on every machine and with every version of NumPy.
    with np.errstate(over="ignore"):
        mixed = np.uint64(request_id) + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    found: npt.NDArray[np.int64] = order[np.argsort(places + uniform * (bound + 1), kind="stable")]
    return found


def _share_of(key: bytes) -> int:
    """A number below SHARES, uniform over keys."""
    return xxhash.xxh3_64_intdigest(key) * SHARES >> 64


class Experiments:
    """The experiments that run now, by ranker. Used on the event loop."""

    def __init__(self) -> None:
        self._running: dict[str, Experiment] = {}

    @property
    def running(self) -> Mapping[str, Experiment]:
        """By ranker."""
        return self._running

    def set(self, ranker: str, experiment: Experiment | None) -> None:
        """Takes an announcement; None: there is none (any more). Raises ExperimentError, and the one before goes on."""
        if experiment is None:
            self._running.pop(ranker, None)
        else:
            self._running[ranker] = check(experiment)

    def choose(self, ranker: str, user_id: int) -> Choice:
        """See `choose`."""
        return choose(self._running.get(ranker), user_id)

    def shadows(self, ranker: str, request_id: int) -> list[str]:
        """See `shadows_of`."""
        return shadows_of(self._running.get(ranker), request_id)

"""Scores again, offline: the release's weights over rebuilt tensors, without Triton or a server."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.tensors import tensor_table
from inference.formula import Formula
from inference.release import Release, load_model
from inference.scoring import final_scores, head_weights
from inference.transact import NoopRanker, TransActRanker

TOLERANCE = {"cpu": 1e-4, "cuda": 6e-2}
"""Greatest absolute difference of a probability that still agrees, by the device that served it.

Features are exact; a sum of floats depends on the order in which a kernel, a number of threads or a machine adds. cpu: measured over 2,000
candidates of a model with large weights, one thread against two differed by up to 2.7e-6, AVX-512 against AVX2 by 4.9e-6 and against no
vector unit by 8.5e-6. cuda: products there are bf16; `freshrank bench model --device cuda` measured up to 4e-2 where most probabilities are
near 0 or 1 (2e-3 on average), 4e-3 where their standard deviation is .12.
"""


def tolerance(served_on: str) -> float:
    """The stated tolerance of a device ("cpu", "cuda"); "auto": of a GPU where this machine has one, as Triton's models choose.

    Raises:
        KeyError: none is stated.
    """
    if served_on == "auto":
        served_on = "cuda" if torch.cuda.is_available() else "cpu"
    return TOLERANCE[served_on]


def probabilities(
    model: TransActRanker | NoopRanker, tensors: Mapping[str, npt.NDArray[Any]], *, device: str = "cpu"
) -> npt.NDArray[np.float32]:
    """Probabilities float32 [C, H] of one request's packed tensors."""
    given = {name: torch.from_numpy(np.array(value)).to(device) for name, value in tensors.items()}
    found: npt.NDArray[np.float32] = model.probabilities(given).cpu().numpy()
    return found


class Rescorer:
    """A release's model on one device, in float32; `served_on`: what computed the scores that it is compared with (`tolerance`)."""

    def __init__(self, release: Release, *, device: str = "cpu", served_on: str = "auto") -> None:
        """Loads the weights. Raises ReleaseError where they do not agree with the release's domain file."""
        self._domain, self._ranker_name = release.domain, release.ranker
        self._ranker = release.domain.ranker[release.ranker]
        self._names = [tensor.name for tensor in tensor_table(release.domain, release.ranker)]
        self._model = load_model(release, device=device)
        self._device, self._allowed = device, tolerance(served_on)

    def scores(
        self, tensors: Mapping[str, npt.NDArray[Any]], weights: Mapping[str, float], formula: str = ""
    ) -> dict[str, tuple[npt.NDArray[np.float32], float]]:
        """Scores of one request, and how far a served one may be from them, by head; "" is the final score.

        float32 [C] each, in the order of the candidates.
        `tensors` as packed; `weights` the request's head weights, empty for the domain file's; `formula` the one that was logged, empty:
        the sum of weight x probability.

        Raises:
            FormulaError: the formula is none of this release.
        """
        probability = probabilities(self._model, {name: tensors[name] for name in self._names}, device=self._device)
        head_weight = head_weights(self._ranker, weights)
        allowed = self._allowed
        scores = {name: (probability[:, column], allowed) for column, name in enumerate(self._ranker.heads)}
        if formula:
            return {**scores, "": self._by_formula(Formula(self._domain, self._ranker_name, formula), probability, tensors, allowed)}
        return {**scores, "": (final_scores(probability, head_weight), allowed * max(1.0, float(np.abs(head_weight).sum())))}

    def _by_formula(
        self, formula: Formula, probability: npt.NDArray[np.float32], tensors: Mapping[str, npt.NDArray[Any]], allowed: float
    ) -> tuple[npt.NDArray[np.float32], float]:
        """Final scores float32 [C], and how far they move, head by head, when a probability moves as far as is allowed."""
        scores = formula.scores(probability, tensors)
        moved = 0.0
        for head in range(probability.shape[1]):
            steps = []
            for step in (-allowed, allowed):
                near = probability.copy()
                near[:, head] = np.clip(near[:, head] + np.float32(step), 0, 1)
                steps.append(float(np.abs(formula.scores(near, tensors).astype(np.float64) - scores).max(initial=0.0)))
            moved += max(steps)
        return scores, max(allowed, moved)

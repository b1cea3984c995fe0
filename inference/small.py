"""The small model: similarities of a candidate to what the user did, and a layer of 32; in the ranking server itself, in NumPy.

It answers where the large one cannot or need not, and Triton is not asked. It is trained on the same packed tensors and released beside the
large model (`small.safetensors`).

Inputs of a candidate, float32 [C, F]: for each action of the domain file that the sequence may hold (and for all together) the mean and the
greatest dot product of the candidate's vector with the vectors of items acted on, and how many there were; the dot product with the user's
vector; the ranker's numbers. Categories and lists add one weight a code and head (tables of at most CODES_MAX codes).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from features.domain import Domain
from features.tensors import SIDES, feature_names

F32 = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]

HIDDEN = 32
SMALL_FILE = "small.safetensors"
CODES_MAX = 100_000
RANGE_MAX = 8.0
"""Inputs are cut at so many deviations: a value never seen in training must not decide alone."""


class SmallInputs:
    """From packed tensors of one request to the model's inputs."""

    def __init__(self, domain: Domain, ranker_name: str) -> None:
        ranker = domain.ranker[ranker_name]
        self._place = np.full(256, -1)
        for place, action in enumerate(action for action in domain.seen_actions(ranker_name).values() if action.retracts is None):
            self._place[action.id] = place
        self.groups = int(self._place.max()) + 2
        """Actions, and all of them together."""
        self._has_user = ranker.user_space is not None
        self._numbers = [side for side in SIDES if feature_names(domain, ranker_name, side, "number")]
        self.codes = _code_columns(domain, ranker_name)
        self.width = 3 * self.groups + self._has_user + sum(2 * len(feature_names(domain, ranker_name, s, "number")) for s in self._numbers)

    def dense(self, tensors: Arrays) -> F32:
        """Inputs of each candidate, float32 [C, F]; numbers as log1p of their size with its sign, missing ones as 0 with a flag."""
        candidates = tensors["candidate_embedding"].astype(np.float32)
        C, count = len(candidates), int(tensors["sequence_count"][0])
        out = np.zeros((C, self.width), np.float32)
        if count:
            similar = candidates @ tensors["sequence_embedding"][:count].astype(np.float32).T  # [C, S]
            place = self._place.take(tensors["sequence_action"][:count])
            for group in range(self.groups):
                of = slice(None) if group == self.groups - 1 else np.flatnonzero(place == group)
                part = similar[:, of]
                if part.shape[1]:
                    out[:, 3 * group] = part.mean(1)
                    out[:, 3 * group + 1] = part.max(1)
                    out[:, 3 * group + 2] = np.log1p(part.shape[1])
        at = 3 * self.groups
        if self._has_user:
            out[:, at] = candidates @ tensors["user_embedding"].astype(np.float32)
            at += 1
        for side in self._numbers:
            raw = np.atleast_2d(tensors[f"{side}_number"])
            missing = np.isnan(raw)
            width = raw.shape[1]
            out[:, at : at + width] = np.where(missing, 0.0, np.copysign(np.log1p(np.abs(raw)), raw))
            out[:, at + width : at + 2 * width] = missing
            at += 2 * width
        return out


@dataclass(frozen=True)
class CodeColumn:
    """Where the codes of one category or list are: tensor, column of it (None: all of them, a list), how many codes there are."""

    key: str
    tensor: str
    column: int | None
    per_candidate: bool
    codes: int

    def of(self, tensors: Arrays, candidates: int) -> npt.NDArray[np.int64]:
        """Codes of each candidate, int64 [C, width]."""
        values = (
            tensors[self.tensor] if self.per_candidate else np.broadcast_to(tensors[self.tensor], (candidates, len(tensors[self.tensor])))
        )
        chosen = values if self.column is None else values[:, self.column : self.column + 1]
        return np.minimum(chosen, self.codes - 1).astype(np.int64)


def _code_columns(domain: Domain, ranker_name: str) -> list[CodeColumn]:
    columns = []
    for side in SIDES:
        per_candidate = side in ("item", "candidate")
        places: list[tuple[str, str, int | None]] = [
            (name, f"{side}_category", i) for i, name in enumerate(feature_names(domain, ranker_name, side, "category"))
        ]
        lists = (name for kind in ("list", "weighted_list") for name in feature_names(domain, ranker_name, side, kind))
        places += [(name, f"{side}_list_{name}", None) for name in lists]
        columns += [CodeColumn(f"code.{name}", key, i, per_candidate, domain.features[name].cardinality) for name, key, i in places]
    return [column for column in columns if column.codes <= CODES_MAX]


class SmallModel:
    """The trained model. Immutable; threads may share it. `weights` are float32 arrays: mean, scale [F]; hidden [F, 32], hidden_bias [32];
    out [32, H], bias [H]; code.NAME [codes, H]."""

    def __init__(self, domain: Domain, ranker_name: str, weights: Arrays) -> None:
        """Raises ValueError: the weights are not of this domain file's ranker."""
        self.inputs = SmallInputs(domain, ranker_name)
        self.weights = {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}
        shapes = small_shapes(self.inputs, len(domain.ranker[ranker_name].heads))
        found = {name: value.shape for name, value in self.weights.items()}
        if found != shapes:
            name = min(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
            raise ValueError(f"small model: {name} has shape {found.get(name)}, the domain file gives {shapes.get(name)}")

    def probabilities(self, tensors: Arrays) -> F32:
        """Probability of each head's label, float32 [C, H]."""
        weights = self.weights
        dense = self.inputs.dense(tensors)
        scaled = np.clip((dense - weights["mean"]) * weights["scale"], -RANGE_MAX, RANGE_MAX)
        hidden = np.maximum(scaled @ weights["hidden"] + weights["hidden_bias"], 0.0)
        logits = hidden @ weights["out"] + weights["bias"]
        for column in self.inputs.codes:
            logits += weights[column.key].take(column.of(tensors, len(dense)), axis=0).mean(1)
        found: F32 = 1.0 / (1.0 + np.exp(-np.clip(logits, -30.0, 30.0)))
        return found


def small_shapes(inputs: SmallInputs, heads: int) -> dict[str, tuple[int, ...]]:
    """Shape of each weight."""
    F = inputs.width
    shapes: dict[str, tuple[int, ...]] = {"mean": (F,), "scale": (F,), "hidden": (F, HIDDEN), "hidden_bias": (HIDDEN,)}
    shapes |= {"out": (HIDDEN, heads), "bias": (heads,)}
    return shapes | {column.key: (column.codes, heads) for column in inputs.codes}


def read_small(domain: Domain, ranker_name: str, path: Path) -> SmallModel:
    """The model of a file. Raises ValueError where it is another ranker's."""
    from safetensors.numpy import load_file

    return SmallModel(domain, ranker_name, load_file(path))

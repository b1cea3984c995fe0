"""The one table of model tensors: names, dtypes, symbolic shapes and padding, derived from a domain file.

The Triton config.pbtxt, the request, the training batch and the order of the parity digest all come from `tensor_table`.
Symbols: L = the ranker's sequence_length, C = candidates of the request (the only dynamic size), D = embedding dimension.
Per-request tensors have no leading batch dimension: a request carries its user once and its candidates as [C, ...].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from features.domain import WEIGHTS_SUFFIX, Domain, Feature

DYNAMIC = -1
SIDES = ("user", "item", "request", "candidate")
_NO_INTERFACE = ("version", "candidates_max", "surfaces", "score", "refresh")
"""Keys of a ranker that change neither what its model takes nor what it computes."""


@dataclass(frozen=True)
class Tensor:
    """One tensor. `shape` holds sizes, with DYNAMIC for C; `axes` the symbols; `padding` the value behind the count."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    padding: str
    meaning: str

    @property
    def per_candidate(self) -> bool:
        """Whether the first axis is the candidates."""
        return bool(self.shape) and self.shape[0] == DYNAMIC


def tensor_table(domain: Domain, ranker_name: str) -> tuple[Tensor, ...]:
    """Every input tensor of a ranker's model, in the order of the digest."""
    ranker = domain.ranker[ranker_name]
    L, D = ranker.sequence_length, ranker.embedding_dimension
    rows: list[Tensor] = []

    def add(name: str, dtype: type, shape: tuple[int, ...], axes: tuple[str, ...], padding: str, meaning: str) -> None:
        rows.append(Tensor(name, np.dtype(dtype), shape, axes, padding, meaning))

    add("sequence_count", np.int32, (1,), ("1",), "none", "actions in the sequence; places from here on are padding")
    add("sequence_action", np.int32, (L,), ("L",), "0", "action ids, newest first")
    if len(domain.entities) > 1:
        add("sequence_kind", np.int32, (L,), ("L",), "0", "entity kind numbers")
    add("sequence_age_ms", np.int64, (L,), ("L",), "0", "max(0, request_time_ms - event_time_ms), milliseconds")
    if "surface" in ranker.sequence_attributes:
        add("sequence_surface", np.int32, (L,), ("L",), "0", "surface numbers")
    if "value" in ranker.sequence_attributes:
        add("sequence_value", np.float32, (L,), ("L",), "0.0", "value of each action; NaN: none")
    add("sequence_embedding", np.float16, (L, D), ("L", "D"), "0.0", f"item vectors of space {ranker.item_space}")
    add("candidate_embedding", np.float16, (DYNAMIC, D), ("C", "D"), "none", f"item vectors of space {ranker.item_space}")
    if ranker.user_space is not None:
        add("user_embedding", np.float16, (D,), ("D",), "none", f"user vector of space {ranker.user_space}")
    if len(domain.entities) > 1:
        add("candidate_kind", np.int32, (DYNAMIC,), ("C",), "none", "entity kind numbers")
    for side in SIDES:
        per_candidate = side in ("item", "candidate")
        lead: tuple[int, ...] = (DYNAMIC,) if per_candidate else ()
        lead_axes: tuple[str, ...] = ("C",) if per_candidate else ()
        numbers = feature_names(domain, ranker_name, side, "number")
        if numbers:
            add(f"{side}_number", np.float32, (*lead, len(numbers)), (*lead_axes, "N"), "none", f"raw {', '.join(numbers)}; NaN: missing")
        categories = feature_names(domain, ranker_name, side, "category")
        if categories:
            shape = (*lead, len(categories))
            add(f"{side}_category", np.int32, shape, (*lead_axes, "N"), "none", f"codes of {', '.join(categories)}; 0: missing")
        for name in feature_names(domain, ranker_name, side, "list"):
            shape = (*lead, domain.features[name].length_max)
            add(f"{side}_list_{name}", np.int32, shape, (*lead_axes, "N"), "0", f"codes of {name}; 0: none")
        for name in feature_names(domain, ranker_name, side, "weighted_list"):
            shape = (*lead, domain.features[name].length_max)
            add(f"{side}_list_{name}", np.int32, shape, (*lead_axes, "N"), "0", f"codes of {name}; 0: none")
            add(f"{side}_weight_{name}", np.float32, shape, (*lead_axes, "N"), "0.0", f"weight of each code of {name}")
        for name in feature_names(domain, ranker_name, side, "vector"):
            shape = (*lead, domain.features[name].dimension)
            add(f"{side}_vector_{name}", np.float32, shape, (*lead_axes, "N"), "none", f"raw {name}; NaN: missing")
    return tuple(rows)


def output_table(domain: Domain, ranker_name: str) -> tuple[Tensor, ...]:
    """Output tensors: one probability a head and candidate, in the domain file's order of heads."""
    heads = len(domain.ranker[ranker_name].heads)
    return (Tensor("probability", np.dtype(np.float32), (DYNAMIC, heads), ("C", "H"), "none", "probability of each head's label"),)


def feature_names(domain: Domain, ranker_name: str, side: str, kind: str) -> tuple[str, ...]:
    """The ranker's features of one side and kind, in the ranker's order: the order of a tensor's columns."""
    names = domain.ranker[ranker_name].features
    return tuple(name for name in names if domain.features[name].side == side and domain.features[name].kind == kind)


def stored_columns(name: str, feature: Feature) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Name, dtype and shape (without the rows) of a feature's columns in the tables."""
    lists = feature.kind in ("list", "weighted_list")
    shape: tuple[int, ...] = (feature.length_max,) if lists else (feature.dimension,) if feature.kind == "vector" else ()
    columns: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = [
        (name, np.dtype(np.float32 if feature.kind in ("number", "vector") else np.uint64), shape)
    ]
    return [*columns, (name + WEIGHTS_SUFFIX, np.dtype(np.float32), shape)] if feature.kind == "weighted_list" else columns


def tensor_fingerprint(domain: Domain, ranker_name: str) -> str:
    """Identity of a ranker's model interface and of what its codes mean: 16 hexadecimal digits. A release pins it."""
    ranker = domain.ranker[ranker_name]
    parts = [f"{t.name}:{t.dtype.str}:{t.shape}" for t in (*tensor_table(domain, ranker_name), *output_table(domain, ranker_name))]
    parts += [f"{name}:{_meaning(domain.features[name])}" for name in ranker.features]
    parts += [
        f"ranker:{ranker.model_dump_json(exclude={**dict.fromkeys(_NO_INTERFACE, True), 'model': ranker.model.left_out})}",
        f"entities:{sorted(domain.entities.items())}",
    ]
    parts += [f"sequence:{domain.sequence[ranker.sequence].age_ms_max}:{domain.future_tolerance_ms}"]
    parts += [f"action:{name}:{action.model_dump_json()}" for name, action in domain.actions.items()]
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())


def _meaning(feature: Feature) -> str:
    """What a feature's values mean. Keys that came later are left out where they are absent: earlier releases do not have them."""
    later = {"counter"} if feature.counter is None else set()
    return feature.model_dump_json(exclude={"column", "separator", "weight_separator", *later})

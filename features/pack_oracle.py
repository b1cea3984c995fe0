"""`pack()` as plain as it can be said, value by value: what tests compare the fast code with. Never on a hot path."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.domain import Domain, Feature
from features.ids import string_id
from features.pack import Column, Packed, RankInputs
from features.tables import FEATURES_SPACE, TAKEDOWNS_SPACE, USER, Member
from features.tensors import DYNAMIC, feature_names, tensor_table

Item = tuple[int, int]
"""Entity kind number and id."""


@dataclass(frozen=True)
class NaiveTables:
    """What was written: members by space, and the time of every space's data."""

    members: Mapping[str, Mapping[str, Member]]
    created_ms: int

    def value(self, space: str, member: str, column: str, wanted: int) -> Any:
        """The column's value of an id, None if there is none."""
        table = self.members.get(space, {}).get(member)
        values = None if table is None else table.vectors if column == "vectors" else table.features.get(column)
        if table is None or values is None:
            return None
        for known, value in zip(table.ids.tolist(), values, strict=True):
            if known == wanted:
                return value
        return None

    def missing_vector(self, space: str, member: str) -> Any:
        """What ids without a vector get, None: zeros."""
        table = self.members[space].get(member)
        return None if table is None else table.missing_vector


def naive_pack(domain: Domain, ranker_name: str, tables: NaiveTables, inputs: RankInputs) -> Packed:
    """The same as `Packer.pack`."""
    ranker = domain.ranker[ranker_name]
    member = {number: f"item.{name}" for name, number in domain.entities.items()}
    taken_down = {
        (number, item)
        for number, name in member.items()
        for item in (tables.members.get(TAKEDOWNS_SPACE, {}).get(name, Member(np.zeros(0, np.uint64))).ids.tolist())
    }
    seen = _visible(domain, ranker_name, taken_down, inputs)
    erased = tables.created_ms <= inputs.erased_before_ms

    def vector(space: str, name: str, wanted: int) -> list[float]:
        found = tables.value(space, name, "vectors", wanted)
        if found is None or (name == USER and erased):
            found = tables.missing_vector(space, name)
        return [0.0] * ranker.embedding_dimension if found is None else [float(number) for number in found]

    candidates = list(zip(inputs.candidate_kinds.tolist(), inputs.candidate_ids.tolist(), strict=True))
    values: dict[str, Any] = {
        "sequence_count": [len(seen)],
        "sequence_action": [int(event["action"]) for event in seen],
        "sequence_kind": [int(event["entity_kind"]) for event in seen],
        "sequence_age_ms": [max(0, inputs.request_time_ms - int(event["event_time_ms"])) for event in seen],
        "sequence_surface": [int(event["surface"]) if int(event["surface"]) in domain.surfaces.values() else 0 for event in seen],
        "sequence_value": [float("nan") if np.isnan(event["value"]) else float(event["value"]) for event in seen],
        "sequence_embedding": [vector(ranker.item_space, member[int(e["entity_kind"])], int(e["entity_id"])) for e in seen],
        "candidate_embedding": [vector(ranker.item_space, member[kind], item) for kind, item in candidates],
        "candidate_kind": [kind for kind, _ in candidates],
    }
    if ranker.user_space is not None:
        values["user_embedding"] = vector(ranker.user_space, USER, inputs.user_id)

    for name in ranker.features:
        feature = domain.features[name]
        if feature.side == "user":
            raw = [None if erased else _stored(tables, feature, USER, name, inputs.user_id)]
        elif feature.side == "item":
            raw = [_stored(tables, feature, member[kind], name, item) for kind, item in candidates]
        else:
            columns = inputs.candidate_features if feature.side == "candidate" else inputs.request_features
            raw = _unfold(columns.get(name), len(candidates) if feature.side == "candidate" else 1)
        coded = [_encode(feature, value) for value in raw]
        values[name] = coded if feature.side in ("item", "candidate") else coded[0]
        if feature.kind == "weighted_list":
            weights = [_weights(feature, value) for value in raw]
            values[f"weight of {name}"] = weights if feature.side in ("item", "candidate") else weights[0]

    tensors: dict[str, Any] = {}
    for row in tensor_table(domain, ranker_name):
        shape = tuple(len(candidates) if size == DYNAMIC else size for size in row.shape)
        tensors[row.name] = np.zeros(shape, row.dtype)
        filled = values[row.name] if row.name in values else _of_features(domain, ranker_name, row.name, values, row.per_candidate)
        for i, value in enumerate(filled):
            tensors[row.name][i] = value
    vectors = tables.members[ranker.item_space]
    has_vector = [item in vectors[member[kind]].ids.tolist() for kind, item in candidates if member[kind] in vectors]
    seen_items = [(member[int(event["entity_kind"])], int(event["entity_id"])) for event in seen]
    return Packed(
        tensors=tensors,
        sequence_count=len(seen),
        sequence_age_ms=values["sequence_age_ms"][0] if seen else -1,
        missing_candidates=len(candidates) - sum(has_vector),
        missing_sequence_items=sum(name not in vectors or item not in vectors[name].ids.tolist() for name, item in seen_items),
        missing_user=ranker.user_space is not None
        and (erased or inputs.user_id not in tables.members[ranker.user_space][USER].ids.tolist()),
        taken_down_candidates=sum(candidate in taken_down for candidate in candidates),
    )


def _visible(domain: Domain, ranker_name: str, taken_down: set[Item], inputs: RankInputs) -> list[Any]:
    """Rules 1 to 6 of `features.pack`, one after the other, on a list."""
    ranker, names = domain.ranker[ranker_name], domain.action_names()
    oldest_ms = inputs.request_time_ms - domain.sequence[ranker.sequence].age_ms_max
    newest_ms = inputs.request_time_ms + domain.future_tolerance_ms
    events = [event for event in inputs.events if int(event["action"]) in names and int(event["entity_kind"]) in domain.entities.values()]
    events = [event for event in events if oldest_ms <= int(event["event_time_ms"]) <= newest_ms]
    kept = []
    for i, event in enumerate(events):
        action = names[int(event["action"])]
        later = [names[int(other["action"])] for other in events[i + 1 :] if _item(other) == _item(event)]
        if domain.actions[action].retracts is None and not any(domain.actions[other].retracts == action for other in later):
            kept.append((action, event))
    kept = [(action, event) for action, event in kept if _item(event) not in taken_down]
    if ranker.sequence_actions is not None:
        kept = [(action, event) for action, event in kept if action in ranker.sequence_actions]
    newest_first = [event for _, event in reversed(kept)]
    return newest_first[: ranker.sequence_length]


def _item(event: Any) -> Item:
    return int(event["entity_kind"]), int(event["entity_id"])


def _unfold(column: Column | None, count: int) -> list[Any]:
    """A column's value of each candidate; None: missing."""
    if column is None:
        return [None] * count
    if column.lengths is not None and column.category is not None:
        values = column.category.tolist()
        if column.weights is not None:
            values = list(zip(values, column.weights, strict=True))
        return [[values.pop(0) for _ in range(length)] for length in column.lengths.tolist()]
    return list(column.number if column.number is not None else column.category if column.category is not None else [])


def _stored(tables: NaiveTables, feature: Feature, member: str, name: str, wanted: int) -> Any:
    """A stored feature; a weighted list as pairs of value and weight."""
    value = tables.value(FEATURES_SPACE, member, name, wanted)
    if value is None or feature.kind != "weighted_list":
        return value
    return list(zip(value.tolist(), tables.value(FEATURES_SPACE, member, f"{name}__weights", wanted), strict=True))


def _weights(feature: Feature, value: Any) -> list[float]:
    """Weights of a list's first values; 0 where there is no value."""
    weights = [0.0 if one == 0 else float(weight) for one, weight in ([] if value is None else value)][: feature.length_max]
    return weights + [0.0] * (feature.length_max - len(weights))


def _encode(feature: Feature, value: Any) -> Any:
    if feature.kind == "vector":
        return [
            float("nan") if value is None or np.isnan(one) else float(one) for one in (range(feature.dimension) if value is None else value)
        ]
    if feature.kind == "weighted_list":
        value = None if value is None else [one for one, _ in value]
    if feature.kind == "number":
        return float("nan") if value is None or np.isnan(value) else float(value)
    if feature.kind == "category":
        return 0 if value is None else _code(feature, int(value))
    codes = [_code(feature, int(one)) for one in ([] if value is None else value)][: feature.length_max]
    return codes + [0] * (feature.length_max - len(codes))


def _code(feature: Feature, value: int) -> int:
    if value == 0:
        return 0
    if feature.hash_buckets is not None:
        return 2 + value % feature.hash_buckets
    for index, text in enumerate(feature.vocabulary or ()):
        if string_id(text) == value:
            return 2 + index
    return 1


def _of_features(domain: Domain, ranker_name: str, tensor: str, values: Mapping[str, Any], per_candidate: bool) -> Any:
    """Columns of a tensor that holds several features, or one list."""
    side, kind, *rest = tensor.split("_", 2)
    if kind in ("list", "vector"):
        return values[rest[0]]
    if kind == "weight":
        return values[f"weight of {rest[0]}"]
    columns = [values[name] for name in feature_names(domain, ranker_name, side, kind)]
    return [list(row) for row in zip(*columns, strict=True)] if per_candidate else columns

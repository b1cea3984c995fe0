"""From a RankRequest to what `pack()` takes: every check of a request's contents, the same in the ranking server and in replay.

A request that passes here packs without error. What needs state or a server (`after`, head weights, message size, what the store keeps) is
checked there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from features.domain import Domain, Feature
from features.ids import U64
from features.pack import Column, RankInputs
from features.person import IDENTITIES_MAX
from features.sequence import NEVER_ERASED, Events
from protos.v1.ranking_pb2 import FeatureColumn, RankRequest

LIST_VALUES_MAX = 64
"""Most values of a list feature for one candidate in a request; the model sees the first `length_max` of them."""

AFTER_MAX = 64
"""Most positions of `after`: one for each log and partition that the caller wrote to says all there is to say."""

_TIME_MS_MAX = 2**62
_PARTS = {
    "number": {"number"},
    "category": {"category"},
    "list": {"category", "list_length"},
    "vector": {"number"},
    "weighted_list": {"category", "list_length", "number"},
}
"""What a FeatureColumn has of each kind of feature."""


class RequestError(ValueError):
    """A request that cannot be served as it is: INVALID_ARGUMENT. `field` names the part, the message says what is allowed."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


def inputs_from_request(domain: Domain, request: RankRequest, events: Events, *, erased_before_ms: int = NEVER_ERASED) -> RankInputs:
    """Checks a request as served (request_time_ms is set) and gives `pack()`'s inputs with the events (EVENT_DTYPE [n], ascending) and
    erased_before_ms of the user's row, or of all identities' (`features.person`). Arrays are views of the request's bytes.

    Raises:
        RequestError: naming the first field that is wrong.
    """
    if request.ranker not in domain.ranker:
        raise RequestError("ranker", f"{request.ranker!r} is not known; rankers: {', '.join(domain.ranker)}")
    _check_identities(request)
    if len(request.after) > AFTER_MAX:
        raise RequestError("after", f"{len(request.after)} positions; at most {AFTER_MAX}")
    if not 0 < request.request_time_ms < _TIME_MS_MAX:
        raise RequestError("request_time_ms", f"{request.request_time_ms} is not a time in milliseconds since 1970-01-01 UTC")
    ids = _packed("candidate_ids", request.candidate_ids, np.dtype("<u8"))
    candidates_max = domain.ranker[request.ranker].candidates_max
    if not 1 <= len(ids) <= candidates_max:
        raise RequestError("candidate_ids", f"{len(ids)} candidates; ranker {request.ranker} takes 1 to {candidates_max}")
    kinds = _kinds(domain, request, len(ids))
    _refuse_duplicates(ids, kinds)
    features = {name: domain.features[name] for name in domain.ranker[request.ranker].features}
    return RankInputs(
        user_id=request.user_id,
        request_time_ms=request.request_time_ms,
        events=events,
        candidate_ids=ids,
        candidate_kinds=kinds,
        candidate_features=_columns("candidate", request.candidate_features, features, len(ids)),
        request_features=_columns("request", request.request_features, features, 1),
        erased_before_ms=erased_before_ms,
    )


def _check_identities(request: RankRequest) -> None:
    if len(request.identities) > IDENTITIES_MAX:
        raise RequestError("identities", f"{len(request.identities)} further identities; at most {IDENTITIES_MAX}")
    seen = {request.user_id}
    for identity in request.identities:
        if identity in seen:
            what = "is user_id, which is read anyway" if identity == request.user_id else "stands there twice"
            raise RequestError("identities", f"{identity} {what}; each identity once")
        seen.add(identity)


def _packed(field: str, data: bytes, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise RequestError(field, f"{len(data)} bytes are not whole little-endian numbers of {dtype.itemsize} bytes")
    return np.frombuffer(data, dtype)


def _kinds(domain: Domain, request: RankRequest, count: int) -> npt.NDArray[np.uint8]:
    known = domain.entities.values()
    if request.candidate_kinds:
        if request.candidate_kind:
            raise RequestError("candidate_kind", "must be 0 where candidate_kinds is given")
        kinds = np.frombuffer(request.candidate_kinds, np.uint8)
        if len(kinds) != count:
            raise RequestError("candidate_kinds", f"{len(kinds)} kinds for {count} candidates; one byte each, or empty")
        unknown = np.setdiff1d(kinds, list(known))
        if len(unknown):
            raise RequestError("candidate_kinds", f"{unknown[0]} is not an entity kind; kinds: {_kinds_known(domain)}")
        return kinds
    kind = request.candidate_kind
    if not kind and len(known) == 1:
        (kind,) = known
    if kind not in known:
        raise RequestError("candidate_kind", f"{kind} is not an entity kind; kinds: {_kinds_known(domain)}")
    return np.full(count, kind, np.uint8)


def _kinds_known(domain: Domain) -> str:
    return ", ".join(f"{number} ({name})" for name, number in sorted(domain.entities.items(), key=lambda entity: entity[1]))


def _refuse_duplicates(ids: U64, kinds: npt.NDArray[np.uint8]) -> None:
    if kinds.min() == kinds.max():  # nearly every request, and a fraction of the time
        ids = np.sort(ids)
        twice = ids[1:][ids[1:] == ids[:-1]]
    else:
        order = np.lexsort((ids, kinds))
        ids, kinds = ids[order], kinds[order]
        twice = ids[1:][(ids[1:] == ids[:-1]) & (kinds[1:] == kinds[:-1])]
    if len(twice):
        raise RequestError("candidate_ids", f"{twice[0]} stands there twice; each candidate once")


def _columns(side: str, columns: Mapping[str, FeatureColumn], features: Mapping[str, Feature], count: int) -> dict[str, Column]:
    result = {}
    for name, column in columns.items():
        field = f"{side}_features[{name!r}]"
        feature = features.get(name)
        if feature is None or feature.side != side:
            allowed = ", ".join(known for known, other in features.items() if other.side == side) or "none"
            raise RequestError(field, f"the ranker has no such feature of side {side!r}; it has: {allowed}")
        result[name] = _column(field, feature, column, count)
    return result


def _column(field: str, feature: Feature, column: FeatureColumn, count: int) -> Column:
    wanted = _PARTS[feature.kind]
    for part in ("number", "category", "list_length"):
        if part not in wanted and getattr(column, part):
            raise RequestError(f"{field}.{part}", f"must be empty for a feature of kind {feature.kind!r}")
    if feature.kind == "number":
        number = _counted(f"{field}.number", column.number, np.dtype("<f4"), count)
        if np.isinf(number).any():
            raise RequestError(f"{field}.number", "values must be finite, or NaN for missing")
        return Column(number=number)
    if feature.kind == "category":
        return Column(category=_counted(f"{field}.category", column.category, np.dtype("<u8"), count))
    if feature.kind == "vector":
        vectors = _counted(f"{field}.number", column.number, np.dtype("<f4"), count * feature.dimension)
        if np.isinf(vectors).any():
            raise RequestError(f"{field}.number", "values must be finite, or NaN for missing")
        return Column(number=vectors.reshape(count, feature.dimension))
    lengths = _counted(f"{field}.list_length", column.list_length, np.dtype("<u4"), count)
    if lengths.max(initial=0) > LIST_VALUES_MAX:
        raise RequestError(f"{field}.list_length", f"{lengths.max()} values for one candidate; at most {LIST_VALUES_MAX}")
    values = _counted(f"{field}.category", column.category, np.dtype("<u8"), int(lengths.sum(dtype=np.int64)))
    if feature.kind == "list":
        return Column(category=values, lengths=lengths)
    weights = _counted(f"{field}.number", column.number, np.dtype("<f4"), len(values))
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise RequestError(f"{field}.number", "weights must be finite, 0 or more")
    return Column(category=values, lengths=lengths, weights=weights)


def _counted(field: str, data: bytes, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    values = _packed(field, data, dtype)
    if len(values) != count:
        raise RequestError(field, f"{len(values)} values; {count} are needed")
    return values

"""`pack()`: what a user did and what a request asks become the model's tensors. Training, serving and replay call the same code.

Only operations whose bits are the same on every machine: copies, comparisons, integer arithmetic. What a release understands of the state
is decided here, not in the state: unknown actions, ages, retractions and take-downs. The rules for the sequence, in this order:

1. actions and entity kinds that the domain file does not name are dropped;
2. events more than the domain's future tolerance after the request, and events older than the sequence's maximum age at request time, are
   hidden. What a request may see is decided by the log; an event slightly ahead of the request's clock is seen with age 0;
3. an action with `retracts = a` removes every earlier event of action a on the same item, and is left out itself;
4. events on items taken down are left out (candidates taken down stay: the caller chose them; they are counted);
5. actions outside of the ranker's `sequence_actions` are left out;
6. the newest `sequence_length` stay, newest first. Places behind the count are padding, whatever their ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from features.actions import EVENT_DTYPE
from features.domain import WEIGHTS_SUFFIX, Domain, Feature
from features.ids import U64, string_ids
from features.sequence import NEVER_ERASED, Events
from features.tables import USER, Found, Generation, TableSet
from features.tensors import Tensor, feature_names, tensor_table

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

MISSING, OUTSIDE, FIRST = 0, 1, 2
"""Codes of a category: no value, a value outside of the vocabulary, the vocabulary's first (or the first hash bucket)."""

_RETRACTS, _SEEN = np.uint8(1), np.uint8(2)
_NAN = np.float32(np.nan)
_HEADS_MAX = 4096
_OPAQUE = np.dtype(f"V{EVENT_DTYPE.itemsize}")


@dataclass(frozen=True)
class Column:
    """Values of a request's or of its candidates' feature, one of: number float32 [n] (NaN: missing), of a vector [n, dimension]; category
    uint64 [n] (xxh3-64 of the text, 0: missing); category uint64 [sum of lengths] with lengths uint32 [n] for a list, and for a weighted
    one with weights float32 [sum of lengths], finite, 0 or more.
    """

    number: npt.NDArray[np.float32] | None = None
    category: U64 | None = None
    lengths: npt.NDArray[np.uint32] | None = None
    weights: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class RankInputs:
    """A request, checked, with the user's sequence (`features.request` makes it from a RankRequest).

    events EVENT_DTYPE ascending and erased_before_ms, as the row has them; candidate_ids uint64 [C]; candidate_kinds uint8 [C]; columns of
    C values for candidate features and of one value for request features. Absent columns are missing.
    """

    user_id: int
    request_time_ms: int
    events: Events
    candidate_ids: U64
    candidate_kinds: npt.NDArray[np.uint8]
    candidate_features: Mapping[str, Column] = field(default_factory=dict)
    request_features: Mapping[str, Column] = field(default_factory=dict)
    erased_before_ms: int = NEVER_ERASED


@dataclass(frozen=True)
class ManyInputs:
    """R requests with N candidates in all, each as `RankInputs` has it.

    user_id uint64 [R], request_time_ms int64 [R], erased_before_ms int64 [R]; starts int64 [R + 1]: request i has the candidates
    starts[i]:starts[i + 1] of candidate_ids uint64 [N] and candidate_kinds uint8 [N], and event_starts int64 [R + 1] its events likewise.
    Columns of N values for candidate features and of R for request features.
    """

    user_id: U64
    request_time_ms: npt.NDArray[np.int64]
    erased_before_ms: npt.NDArray[np.int64]
    events: Events
    event_starts: npt.NDArray[np.int64]
    candidate_ids: U64
    candidate_kinds: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    candidate_features: Mapping[str, Column] = field(default_factory=dict)
    request_features: Mapping[str, Column] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """Tensors in the order, dtypes and shapes of `tensor_table`, and what was found on the way.

    sequence_age_ms: of the newest action that the model sees, -1: none. Items are missing if the embedding space has no vector of them; so
    is the user, and a user erased since that space's generation was made.
    """

    tensors: Tensors
    sequence_count: int
    sequence_age_ms: int
    missing_candidates: int
    missing_sequence_items: int
    missing_user: bool
    taken_down_candidates: int


class Packer:
    """Packs requests of one ranker with one set of tables. Immutable: threads may share it; new tables need a new one."""

    def __init__(self, domain: Domain, ranker_name: str, tables: TableSet) -> None:
        ranker = domain.ranker[ranker_name]
        self.domain, self.ranker_name, self.tables = domain, ranker_name, tables
        self.table = tensor_table(domain, ranker_name)
        self._length, self._dimension = ranker.sequence_length, ranker.embedding_dimension
        self._age_ms_max = domain.sequence[ranker.sequence].age_ms_max
        self._future_tolerance_ms = domain.future_tolerance_ms
        self._attributes = ranker.sequence_attributes
        self._flags = np.zeros(256, np.uint8)
        self._retractions: list[tuple[int, int]] = []
        self._flags[[action.id for action in domain.seen_actions(ranker_name).values()]] = _SEEN
        for action in domain.actions.values():
            if action.retracts is not None:
                self._flags[action.id] |= _RETRACTS
                self._retractions.append((action.id, domain.actions[action.retracts].id))
        self._kind_known = np.zeros(256, bool)
        self._kind_known[list(domain.entities.values())] = True
        self._surfaces = np.zeros(65536, np.int32)
        for number in domain.surfaces.values():
            self._surfaces[number] = number
        self._kinds = len(domain.entities) > 1
        self._numbers = {side: feature_names(domain, ranker_name, side, "number") for side in ("user", "item", "request", "candidate")}
        self._categories = {side: feature_names(domain, ranker_name, side, "category") for side in self._numbers}
        self._weighted = {side: feature_names(domain, ranker_name, side, "weighted_list") for side in self._numbers}
        self._lists = {side: feature_names(domain, ranker_name, side, "list") + self._weighted[side] for side in self._numbers}
        self._vectors = {
            side: {name: domain.features[name].dimension for name in feature_names(domain, ranker_name, side, "vector")}
            for side in self._numbers
        }
        coded = (name for name in ranker.features if domain.features[name].kind not in ("number", "vector"))
        self._codes = {name: _Codes(name, domain.features[name]) for name in coded}
        kinds = (self._numbers, self._categories, self._lists, self._vectors)
        self._single = [row.name for row in self.table if row.name.startswith(("user_", "request_")) and row.name != "user_embedding"]
        """Tensors that are made like those of the candidates, for one."""
        self._stored = {side: any(bool(names[side]) for names in kinds) for side in self._numbers}

    def pack(self, inputs: RankInputs) -> Packed:
        """The tensors of one request. Neither reads a clock nor depends on anything but its inputs, the domain file and the tables."""
        tables, tensors = self.tables, Tensors()
        seen = inputs.events.take(self.visible(inputs))  # indexing would copy field by field
        count = len(seen)
        self._add_sequence(tensors, seen, inputs.request_time_ms)

        kinds, ids = inputs.candidate_kinds, inputs.candidate_ids
        found = tables.find(tables.items, np.concatenate((seen["entity_kind"], kinds)), np.concatenate((seen["entity_id"], ids)))
        vectors = np.zeros((count + len(ids), self._dimension), np.float16)
        found.fill_vectors(vectors)
        tensors["sequence_embedding"] = np.zeros((self._length, self._dimension), np.float16)
        tensors["sequence_embedding"][:count] = vectors[:count]
        tensors["candidate_embedding"] = vectors[count:]

        missing_user = False
        if tables.users is not None:
            user = tables.find_user(tables.users, inputs.user_id, inputs.erased_before_ms)
            vector = np.zeros((1, self._dimension), np.float16)
            user.fill_vectors(vector)
            tensors["user_embedding"], missing_user = vector[0], bool(user.missing[0])
        if self._kinds:
            tensors["candidate_kind"] = kinds.astype(np.int32)
        if tables.features is not None and self._stored["user"]:
            self._add_stored(tensors, "user", tables.find_user(tables.features, inputs.user_id, inputs.erased_before_ms), 1)
        if tables.features is not None and self._stored["item"]:
            self._add_stored(tensors, "item", tables.find(tables.features, kinds, ids), len(ids))
        if self._stored["request"]:
            self._add_columns(tensors, "request", inputs.request_features, 1)
        if self._stored["candidate"]:
            self._add_columns(tensors, "candidate", inputs.candidate_features, len(ids))
        for name in self._single:
            tensors[name] = tensors[name][0]
        return Packed(
            tensors={row.name: tensors[row.name] for row in self.table},
            sequence_count=count,
            sequence_age_ms=int(tensors["sequence_age_ms"][0]) if count else -1,
            missing_candidates=int(np.count_nonzero(found.missing[count:])),
            missing_sequence_items=int(np.count_nonzero(found.missing[:count])),
            missing_user=missing_user,
            taken_down_candidates=int(np.count_nonzero(tables.taken_down(kinds, ids))) if tables.takedowns is not None else 0,
        )

    def pack_many(self, inputs: ManyInputs) -> Tensors:
        """`pack` of many requests without a loop over them, for training: the same bytes, in another shape.

        Tensors of the request are stacked [R, ...], those of candidates [N, ...]; those of the sequence stand without padding one request
        behind the other, as long as `sequence_count` [R, 1] says.
        """
        tables, tensors = self.tables, Tensors()
        R, ids, kinds = len(inputs.user_id), inputs.candidate_ids, inputs.candidate_kinds
        where, counts = self._visible_of_many(inputs)
        seen = inputs.events.view(_OPAQUE).take(where).view(EVENT_DTYPE)  # as opaque bytes: a structure is copied field by field
        time_ms = np.repeat(inputs.request_time_ms, counts)
        tensors["sequence_count"] = counts.astype(np.int32)[:, None]
        self._fill_sequence(tensors, seen, time_ms, len(seen))
        found = tables.find(tables.items, np.concatenate((seen["entity_kind"], kinds)), np.concatenate((seen["entity_id"], ids)))
        vectors = np.zeros((len(seen) + len(ids), self._dimension), np.float16)
        found.fill_vectors(vectors)
        tensors["sequence_embedding"], tensors["candidate_embedding"] = vectors[: len(seen)], vectors[len(seen) :]
        if tables.users is not None:
            tensors["user_embedding"] = np.zeros((R, self._dimension), np.float16)
            _find_users(tables.users, inputs).fill_vectors(tensors["user_embedding"])
        if self._kinds:
            tensors["candidate_kind"] = kinds.astype(np.int32)
        if tables.features is not None and self._stored["user"]:
            self._add_stored(tensors, "user", _find_users(tables.features, inputs), R)
        if tables.features is not None and self._stored["item"]:
            self._add_stored(tensors, "item", tables.find(tables.features, kinds, ids), len(ids))
        if self._stored["request"]:
            self._add_columns(tensors, "request", inputs.request_features, R)
        if self._stored["candidate"]:
            self._add_columns(tensors, "candidate", inputs.candidate_features, len(ids))
        return {row.name: tensors[row.name] for row in self.table}

    def digest(self, tensors: Mapping[str, Array]) -> bytes:
        """See `digest`."""
        return _digests(self.table, tensors)[0]

    def tensor_digests(self, tensors: Mapping[str, Array]) -> dict[str, int]:
        """See `tensor_digests`."""
        return _digests(self.table, tensors)[1]

    def digests(self, tensors: Mapping[str, Array]) -> tuple[bytes, dict[str, int]]:
        """Both in one pass."""
        return _digests(self.table, tensors)

    def visible(self, inputs: RankInputs) -> npt.NDArray[np.int64]:
        """Rules 1 to 6: index of each event that the model sees, newest first, int64."""
        return self._kept(inputs.events, inputs.request_time_ms, None)[-self._length :][::-1]

    def _visible_of_many(self, inputs: ManyInputs) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`visible` of each request, one behind the other, as indices of all events; and how many each has: int64 [R]."""
        R = len(inputs.user_id)
        request = np.repeat(np.arange(R), np.diff(inputs.event_starts))
        kept = self._kept(inputs.events, inputs.request_time_ms[request], request)
        of = request[kept]
        all_counts = np.bincount(of, minlength=R)
        from_end = np.cumsum(all_counts)[of] - 1 - np.arange(len(kept))  # 0: the newest of its request
        counts = np.minimum(all_counts, self._length)
        newest = from_end < self._length
        found = np.empty(int(counts.sum()), np.int64)
        found[(np.cumsum(counts) - counts)[of[newest]] + from_end[newest]] = kept[newest]
        return found, counts

    def _kept(
        self, events: Events, request_time_ms: int | npt.NDArray[np.int64], request: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.int64]:
        """Rules 1 to 5: index of each event that stays, ascending. `request` int64 [n]: whose each event is; None: all are of one."""
        time_ms, kind = events["event_time_ms"], events["entity_kind"]
        flags = self._flags.take(events["action"])  # 0: unknown; it leaves with what the ranker does not ask for, and retracts nothing
        keep = self._kind_known.take(kind)
        keep &= time_ms <= request_time_ms + self._future_tolerance_ms
        keep &= time_ms >= request_time_ms - self._age_ms_max
        if self._retractions:
            retracts = (flags & _RETRACTS).astype(bool)
            if retracts.any():
                keep &= ~(self._retracted(events, keep, request) | retracts)
        if self.tables.takedowns is not None:
            keep &= ~self.tables.taken_down(kind, events["entity_id"])
        keep &= (flags & _SEEN).astype(bool)
        return np.flatnonzero(keep)

    def _retracted(self, events: Events, keep: npt.NDArray[np.bool_], request: npt.NDArray[np.int64] | None) -> npt.NDArray[np.bool_]:
        """Which events a later retraction among the kept ones takes back: bool [n]."""
        action, kind, entity = events["action"], events["entity_kind"], events["entity_id"]
        order = np.lexsort((entity, kind) if request is None else (entity, kind, request))
        differs = np.ones(len(events), bool)
        differs[1:] = (entity[order[1:]] != entity[order[:-1]]) | (kind[order[1:]] != kind[order[:-1]])
        if request is not None:
            differs[1:] |= request[order[1:]] != request[order[:-1]]
        item = np.empty(len(events), np.int64)
        item[order] = np.cumsum(differs) - 1
        retracted = np.zeros(len(events), bool)
        for retraction, target in self._retractions:
            last = np.full(len(events), -1)
            by = np.flatnonzero(keep & (action == retraction))
            last[item[by]] = by  # the last assignment to an item wins: `by` ascends
            of = np.flatnonzero(keep & (action == target))
            retracted[of] |= of < last[item[of]]
        return retracted

    def _add_sequence(self, tensors: Tensors, seen: Events, request_time_ms: int) -> None:
        tensors["sequence_count"] = np.array([len(seen)], np.int32)
        self._fill_sequence(tensors, seen, request_time_ms, self._length)

    def _fill_sequence(self, tensors: Tensors, seen: Events, request_time_ms: int | npt.NDArray[np.int64], length: int) -> None:
        """What the events themselves say, in arrays of `length` places."""
        count = len(seen)
        tensors["sequence_action"] = np.zeros(length, np.int32)
        tensors["sequence_action"][:count] = seen["action"]
        if self._kinds:
            tensors["sequence_kind"] = np.zeros(length, np.int32)
            tensors["sequence_kind"][:count] = seen["entity_kind"]
        tensors["sequence_age_ms"] = np.zeros(length, np.int64)
        np.maximum(request_time_ms - seen["event_time_ms"], 0, out=tensors["sequence_age_ms"][:count])
        if "surface" in self._attributes:  # 0: none, or one that the domain file does not name
            tensors["sequence_surface"] = np.zeros(length, np.int32)
            tensors["sequence_surface"][:count] = self._surfaces.take(seen["surface"])
        if "value" in self._attributes:
            tensors["sequence_value"] = np.zeros(length, np.float32)
            tensors["sequence_value"][:count] = seen["value"]
            _canonical(tensors["sequence_value"])

    def _add_stored(self, tensors: Tensors, side: str, found: Found, n: int) -> None:
        """Features of users or items from the tables."""
        if numbers := self._numbers[side]:
            out = _missing(n, len(numbers))
            for j, name in enumerate(numbers):
                found.fill(name, out[:, j])
            tensors[f"{side}_number"] = _canonical(out)
        if categories := self._categories[side]:
            codes = np.zeros((n, len(categories)), np.int32)
            for j, name in enumerate(categories):
                raw = np.zeros(n, np.uint64)
                found.fill(name, raw)
                codes[:, j] = self._codes[name](raw)
            tensors[f"{side}_category"] = codes
        for name in self._lists[side]:
            raw = np.zeros((n, self._codes[name].length_max), np.uint64)
            found.fill(name, raw)
            tensors[f"{side}_list_{name}"] = self._codes[name](raw)
            if name in self._weighted[side]:
                weights = np.zeros(raw.shape, np.float32)
                found.fill(name + WEIGHTS_SUFFIX, weights)
                weights[raw == 0] = 0  # behind the list's end, and of who has none
                tensors[f"{side}_weight_{name}"] = weights
        for name, dimension in self._vectors[side].items():
            out = _missing(n, dimension)
            found.fill(name, out)
            tensors[f"{side}_vector_{name}"] = _canonical(out)

    def _add_columns(self, tensors: Tensors, side: str, columns: Mapping[str, Column], n: int) -> None:
        """Features that the request brought along."""
        if numbers := self._numbers[side]:
            out = _missing(n, len(numbers))
            for j, name in enumerate(numbers):
                if name in columns:
                    out[:, j] = columns[name].number
            tensors[f"{side}_number"] = _canonical(out)
        if categories := self._categories[side]:
            codes = np.zeros((n, len(categories)), np.int32)
            for j, name in enumerate(categories):
                if name in columns:
                    codes[:, j] = self._codes[name](columns[name].category)
            tensors[f"{side}_category"] = codes
        for name in self._lists[side]:
            raw = np.zeros((n, self._codes[name].length_max), np.uint64)
            if name in columns:
                _spread(columns[name], columns[name].category, raw)
            tensors[f"{side}_list_{name}"] = self._codes[name](raw)
            if name in self._weighted[side]:
                weights = np.zeros(raw.shape, np.float32)
                if name in columns:
                    _spread(columns[name], columns[name].weights, weights)
                weights[raw == 0] = 0
                tensors[f"{side}_weight_{name}"] = weights
        for name, dimension in self._vectors[side].items():
            out = _missing(n, dimension)
            if name in columns:
                out[:] = columns[name].number
            tensors[f"{side}_vector_{name}"] = _canonical(out)


class _Codes:
    """From hashed texts to the codes of a category or list feature."""

    def __init__(self, name: str, feature: Feature) -> None:
        self.length_max = feature.length_max
        self._buckets = np.uint64(feature.hash_buckets or 0)
        hashed = string_ids(feature.vocabulary or ())
        order = np.argsort(hashed)
        self._sorted, self._code = hashed[order], (order + FIRST).astype(np.int32)
        if (self._sorted[1:] == self._sorted[:-1]).any():
            raise ValueError(f"features.{name}.vocabulary: a value stands there twice (or two share one hash)")

    def __call__(self, raw: Array | None) -> npt.NDArray[np.int32]:
        """Codes of uint64 hashes: int32 of the same shape."""
        if raw is None:
            raise TypeError("a category or list column without values")
        if self._buckets:
            codes = (raw % self._buckets).astype(np.int32) + np.int32(FIRST)
        elif len(self._sorted):
            place = self._sorted.searchsorted(raw)
            found = self._sorted.take(place, mode="clip") == raw
            codes = np.where(found, self._code.take(place, mode="clip"), np.int32(OUTSIDE))
        else:
            codes = np.full(raw.shape, OUTSIDE, np.int32)
        codes[raw == 0] = MISSING
        return codes


def _find_users(generation: Generation, inputs: ManyInputs) -> Found:
    """`TableSet.find_user` of each request."""
    rows = np.where(generation.created_ms <= inputs.erased_before_ms, 0, generation.rows(USER, inputs.user_id))
    return Found(generation, [(USER, None, rows)], rows == 0)


def _spread(column: Column, ragged: Array | None, out: Array) -> None:
    """Ragged lists into rows of `out` [n, width], cut at its width."""
    if ragged is None or column.lengths is None:
        raise TypeError("a list column needs category and lengths, a weighted one weights as well")
    if not len(ragged):
        return
    lengths = column.lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(out.shape[1])
    values = ragged.take(starts[:, None] + places, mode="clip")
    np.copyto(out, values, where=places < lengths[:, None])


def _missing(n: int, width: int) -> npt.NDArray[np.float32]:
    """NaN, float32 [n, width]."""
    numbers = np.empty((n, width), np.float32)
    numbers.fill(_NAN)  # a third of the time of np.full
    return numbers


def _canonical(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Gives every NaN the same bits, in place."""
    numbers[np.isnan(numbers)] = _NAN
    return numbers


def digest(domain: Domain, ranker_name: str, tensors: Mapping[str, Array]) -> bytes:
    """Digest of all packed tensors: xxh3-128, 16 bytes big-endian, over name, dtype, shape and bytes of each in the table's order.

    Raises:
        ValueError: a tensor is absent or differs in dtype or rank from the table.
    """
    return _digests(tensor_table(domain, ranker_name), tensors)[0]


def tensor_digests(domain: Domain, ranker_name: str, tensors: Mapping[str, Array]) -> dict[str, int]:
    """xxh3-64 of each tensor by name, over the same bytes: tells which one differs."""
    return _digests(tensor_table(domain, ranker_name), tensors)[1]


def _digests(table: tuple[Tensor, ...], tensors: Mapping[str, Array]) -> tuple[bytes, dict[str, int]]:
    of_all, of_each = xxhash.xxh3_128(), dict[str, int]()
    for row in table:
        array = tensors.get(row.name)
        if array is None:
            raise ValueError(f"tensor {row.name} is absent")
        data = b"".join((_head(row.name, row.dtype, row.shape, array.dtype, array.shape), np.ascontiguousarray(array).data))
        of_all.update(data)
        of_each[row.name] = xxhash.xxh3_64_intdigest(data)
    return of_all.digest(), of_each


@lru_cache(_HEADS_MAX)
def _head(name: str, row_dtype: np.dtype[Any], row_shape: tuple[int, ...], dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before a tensor's bytes in a digest, once it is as the table's row says. Raises ValueError."""
    if dtype != row_dtype or len(shape) != len(row_shape) or any(a != b for a, b in zip(shape, row_shape, strict=True) if b >= 0):
        raise ValueError(f"tensor {name} is {dtype.str} {shape}; the table says {row_dtype.str} {row_shape}")
    return f"{name}\0{dtype.str}\0{shape}\0".encode()

"""Training data: every request of a canonical log, packed by the same `pack()` as serving, with what was known at its moment.

A request sees the actions that the log held strictly before its time (append time, not event time: a late event was not there yet), folded
by the law of the sequence, and the item and user vectors of the generations that were the newest then. A ranker with `surfaces` has the
requests of these surfaces only.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.actions import EVENT_DTYPE
from features.domain import Domain, Head
from features.erasures import NOBODY, Erased, erased_before_ms
from features.logs import FeatureColumn, LoggedRequests, read_actions, read_requests
from features.pack import Column, Packer, RankInputs
from features.sequence import NEVER_ERASED, Definition, Events, definition, law
from features.tables import TableSet, generations_of, open_generation
from features.tensors import tensor_table

Array = npt.NDArray[Any]
I64 = npt.NDArray[np.int64]


class DatasetError(ValueError):
    """A log that cannot be trained on; says what is missing."""


@dataclass(frozen=True)
class Batch:
    """Requests for one step: tensors as `TransActRanker.forward` takes them, request_row int64 [N], labels and weights float32 [N, H]."""

    tensors: dict[str, Tensor]
    request_row: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Dataset:
    """Packed requests in the order of their time. Request i has the candidate rows starts[i]:starts[i + 1].

    user_id uint64 [R], request_time_ms int64 [R], starts int64 [R + 1]; labels bool [N, H]; weights float32 [N, H].
    of_request: tensors [R, ...]; of_candidate: tensors [N, ...]; of_sequence: tensors without padding, request i has the rows
    sequence_starts[i]:sequence_starts[i + 1].
    """

    user_id: npt.NDArray[np.uint64]
    request_time_ms: I64
    starts: I64
    labels: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float32]
    of_request: dict[str, Array]
    of_candidate: dict[str, Array]
    of_sequence: dict[str, Array]
    sequence_starts: I64

    def __len__(self) -> int:
        return len(self.user_id)

    def part(self, from_ms: int, until_ms: int) -> I64:
        """Requests with from_ms <= time < until_ms: int64."""
        low, high = self.request_time_ms.searchsorted([from_ms, until_ms])
        return np.arange(low, high)

    def candidate_rows(self, requests: I64) -> I64:
        """Candidate rows of these requests, one request after the other: int64 [N]."""
        return _ragged(self.starts, requests)

    def batches(self, requests: I64, rows_max: int, random: np.random.Generator | None) -> list[I64]:
        """Cuts requests into batches of at most `rows_max` candidates (one request at least); shuffled if `random` is given.

        Requests of like sequence length share a batch, since a batch costs as much as its longest sequence.
        """
        if random is not None:
            requests = random.permutation(requests)
        lengths, sizes = np.diff(self.sequence_starts), np.diff(self.starts)
        cut: list[I64] = []
        pool = max(1, len(requests) // 8)
        for start in range(0, len(requests), pool):
            chosen = requests[start : start + pool]
            chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
            first = 0
            ends = np.cumsum(sizes[chosen])
            while first < len(chosen):
                before = ends[first - 1] if first else 0
                last = max(first + 1, int(ends.searchsorted(before + rows_max, "right")))
                cut.append(chosen[first:last])
                first = last
        if random is not None:
            random.shuffle(cut)
        return cut

    def batch(self, requests: I64) -> Batch:
        """The tensors of some requests; sequences are padded to the longest of them (one place at least)."""
        rows = self.candidate_rows(requests)
        tensors = {name: torch.from_numpy(values[requests]) for name, values in self.of_request.items()}
        tensors |= {name: torch.from_numpy(values[rows]) for name, values in self.of_candidate.items()}
        counts = np.diff(self.sequence_starts)[requests]
        S = max(1, int(counts.max(initial=0)))
        filled = np.arange(S) < counts[:, None]  # [R, S]
        places = _ragged(self.sequence_starts, requests)
        for name, values in self.of_sequence.items():
            padded = np.zeros((len(requests), S, *values.shape[1:]), values.dtype)
            padded[filled] = values[places]
            tensors[name] = torch.from_numpy(padded)
        request_row = np.repeat(np.arange(len(requests)), np.diff(self.starts)[requests])
        labels = torch.from_numpy(self.labels[rows].astype(np.float32))
        return Batch(tensors, torch.from_numpy(request_row), labels, torch.from_numpy(self.weights[rows]))

    def request(self, i: int) -> dict[str, Array]:
        """The tensors of request i as the table shapes them, its sequence without padding. Views."""
        rows, places = slice(self.starts[i], self.starts[i + 1]), slice(self.sequence_starts[i], self.sequence_starts[i + 1])
        tensors = {name: values[i] for name, values in self.of_request.items()}
        tensors |= {name: values[rows] for name, values in self.of_candidate.items()}
        return tensors | {name: values[places] for name, values in self.of_sequence.items()}

    def rows_for_normalisation(self, requests: I64) -> dict[str, Tensor]:
        """Number features of these requests and their candidates, for `fit_normalisation`."""
        rows = self.candidate_rows(requests)
        numbers = {name: values[requests] for name, values in self.of_request.items() if name.endswith("_number")}
        numbers |= {name: values[rows] for name, values in self.of_candidate.items() if name.endswith("_number")}
        return {name: torch.from_numpy(values) for name, values in numbers.items()}


def split_times(domain: Domain, ranker_name: str, log: str | Path, fractions: tuple[float, float, float]) -> tuple[int, int]:
    """Times (milliseconds) at which the validation and the test part begin, so that the parts hold these shares of the ranker's requests.

    Raises:
        DatasetError: fewer than three distinct request times.
    """
    times = np.concatenate([np.zeros(0, np.int64), *(batch.request_time_ms for batch in _ranker_requests(domain, ranker_name, log))])
    if (distinct := len(np.unique(times))) < 3:
        where = _where(domain, ranker_name)
        raise DatasetError(f"{log}: {distinct} distinct request times{where}; a temporal split needs three or more")
    shares = np.cumsum(fractions) / np.sum(fractions)
    validation, test = (int(times[min(len(times) - 1, int(share * len(times)))]) for share in shares[:2])
    return validation, test


def build_dataset(
    domain: Domain,
    ranker_name: str,
    log: str | Path,
    tables_root: str | Path,
    *,
    generations: Mapping[str, str] | None = None,
    packed: Callable[[int], None] = lambda _: None,
    erased: Erased = NOBODY,
) -> tuple[Dataset, TableSet]:
    """Packs every request of a log that trains the ranker; also returns the tables of the latest ones (`generations`, else the newest).

    `packed` is told how many more requests are done. Requests and actions of users in `erased` up to their erasure are left out, whatever
    the log still holds of them.

    Raises:
        DatasetError: the log has no such request.
        TableError, LogError: see there.
    """
    tables = TableSet.open(tables_root, domain, ranker_name, generations)
    packers = _Packers(domain, ranker_name, tables_root, tables)
    history = History(domain, ranker_name, log, erased)
    table = tensor_table(domain, ranker_name)
    collected: dict[str, list[Array]] = {row.name: [] for row in table}
    requests: list[LoggedRequests] = []
    for batch in _ranker_requests(domain, ranker_name, log, erased):
        requests.append(batch)
        for i, inputs in enumerate(_inputs(domain, ranker_name, batch, history)):
            tensors = packers.at(inputs.request_time_ms).pack(inputs).tensors
            count = int(tensors["sequence_count"][0])
            for name, values in tensors.items():
                # Padding is cut off here and put back by `Dataset.batch`: histories are mostly much shorter than the maximum.
                collected[name].append(values[:count].copy() if _is_ragged(name) else values)
            if i % 256 == 255:
                packed(256)
        packed(len(batch) % 256)
    if not requests:
        raise DatasetError(f"{log}: no request in it{_where(domain, ranker_name)}")
    joined = {
        row.name: (np.concatenate if row.per_candidate else np.stack)(collected.pop(row.name)) for row in table if not _is_ragged(row.name)
    }
    sequences = {name: np.concatenate(parts) for name, parts in collected.items()}
    labels, weights = (np.concatenate(parts) for parts in zip(*(_labels(domain, ranker_name, batch) for batch in requests), strict=True))
    sizes = np.concatenate([np.diff(batch.starts) for batch in requests])
    per_candidate = {row.name for row in table if row.per_candidate}
    dataset = Dataset(
        user_id=np.concatenate([batch.user_id for batch in requests]),
        request_time_ms=np.concatenate([batch.request_time_ms for batch in requests]),
        starts=_starts(sizes),
        labels=labels,
        weights=weights,
        of_request={name: values for name, values in joined.items() if name not in per_candidate},
        of_candidate={name: values for name, values in joined.items() if name in per_candidate},
        of_sequence=sequences,
        sequence_starts=_starts(joined["sequence_count"][:, 0]),
    )
    return dataset, tables


class History:
    """Every user's sequence as it stood at a moment. Moments of one user must not go back.

    Records of a user are taken in the order of their append time. A request sees those appended before it, not at the same millisecond:
    which of the two came first is not known.
    """

    def __init__(self, domain: Domain, ranker_name: str, log: str | Path, erased: Erased = NOBODY) -> None:
        self._what: Definition = definition(domain, domain.ranker[ranker_name].sequence)
        self._erased = erased
        batches = list(read_actions(log, domain))
        if not batches:
            raise DatasetError(f"{log}: no action in it")
        users = np.concatenate([batch.users for batch in batches])
        times = np.concatenate([batch.append_time_ms for batch in batches])
        order = np.lexsort((times, users))  # stable: equal times keep the order of the log
        self._times, users = times[order], users[order]
        self._events: Events = np.concatenate([batch.events for batch in batches])[order]
        self._erase = np.concatenate([batch.erase for batch in batches])[order]
        known = self._erase | (np.minimum(self._times, self._events["event_time_ms"]) > erased_before_ms(erased, users))
        self._times, users, self._events, self._erase = self._times[known], users[known], self._events[known], self._erase[known]
        distinct, starts = np.unique(users, return_index=True)
        ends = np.append(starts[1:], len(users))
        self._span = {user: (start, end) for user, start, end in zip(distinct.tolist(), starts.tolist(), ends.tolist(), strict=True)}
        self._state: dict[int, tuple[int, Events, int]] = {}

    def before(self, user_id: int, time_ms: int) -> tuple[Events, int]:
        """The user's sequence from all records appended before `time_ms`, ascending, and erased_before_ms as the user's row has it then.

        Raises:
            ValueError: an earlier moment than one asked for before.
        """
        erased_ms = self._erased.get(user_id, NEVER_ERASED)
        if user_id not in self._span:
            return np.zeros(0, EVENT_DTYPE), erased_ms
        start, end = self._span[user_id]
        nothing: tuple[int, Events, int] = (start, np.zeros(0, EVENT_DTYPE), erased_ms)
        at, events, erased_before_ms = self._state.get(user_id, nothing)
        if at > start and self._times[at - 1] >= time_ms:
            raise ValueError(f"user {user_id}: asked for {time_ms} ms after a later moment")
        until = start + int(self._times[start:end].searchsorted(time_ms, "left"))
        if until > at:
            erases = at + np.flatnonzero(self._erase[at:until])
            if len(erases):
                events, at = events[:0], int(erases[-1]) + 1
                erased_before_ms = max(erased_before_ms, int(self._times[erases].max()))
            new = self._events[at:until]
            new = new[(new["event_time_ms"] > erased_before_ms) & (new["event_time_ms"] > 0)]
            events = law(self._what, np.concatenate((events, new)))
            self._state[user_id] = until, events, erased_before_ms
        return events, erased_before_ms


class _Packers:
    """One packer for the generations of item and user vectors, of the tables' lineage, that were the newest at a time.

    Requests come in the order of time, so only the last one is kept: a refreshed space has hundreds of generations.
    """

    def __init__(self, domain: Domain, ranker_name: str, root: str | Path, tables: TableSet) -> None:
        self._domain, self._ranker_name, self._root, self._tables = domain, ranker_name, root, tables
        self._moments: dict[str, list[tuple[int, str]]] = {}
        for newest in (tables.items, tables.users):
            if newest is not None:
                names = sorted(name for name in generations_of(root, newest.space, newest.lineage) if name <= newest.name)
                self._moments[newest.space] = [(_created_ms(name), name) for name in names]
        self._names: dict[str, str] = {}
        self._packer: Packer | None = None

    def at(self, time_ms: int) -> Packer:
        """The packer of a request of this time."""
        names = {
            space: moments[max(0, bisect_right(moments, time_ms, key=lambda moment: moment[0]) - 1)][1]
            for space, moments in self._moments.items()
        }
        if self._packer is None or names != self._names:
            opened = {space: open_generation(self._root, space, name) for space, name in names.items()}
            items, users = self._tables.items, self._tables.users
            tables = replace(self._tables, items=opened[items.space], users=None if users is None else opened[users.space])
            self._packer, self._names = Packer(self._domain, self._ranker_name, tables), names
        return self._packer


def _created_ms(generation: str) -> int:
    """The time in a generation's name, milliseconds."""
    moment = datetime.strptime(generation[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1000 + int(generation[15:18])


def _ranker_requests(domain: Domain, ranker_name: str, log: str | Path, erased: Erased = NOBODY) -> Iterator[LoggedRequests]:
    """The log's requests on the surfaces whose impressions train the ranker, without those of users erased since."""
    surfaces = domain.ranker[ranker_name].surfaces
    for batch in read_requests(log, domain):
        if surfaces is not None:
            batch = _chosen(batch, np.flatnonzero(np.isin(batch.surface, [domain.surfaces[name] for name in surfaces])))
        known = batch.request_time_ms > erased_before_ms(erased, batch.user_id)
        if not known.all():
            batch = _chosen(batch, np.flatnonzero(known))
        if len(batch):
            yield batch


def _where(domain: Domain, ranker_name: str) -> str:
    surfaces = domain.ranker[ranker_name].surfaces
    return "" if surfaces is None else f" on the surfaces of ranker.{ranker_name} ({', '.join(surfaces)})"


def _chosen(batch: LoggedRequests, requests: I64) -> LoggedRequests:
    """Some requests of a batch, with their rows."""
    rows = _ragged(batch.starts, requests)

    def column(of: FeatureColumn) -> FeatureColumn:
        if of.lengths is None:
            return FeatureColumn(of.values[rows], None)
        places = _ragged(_starts(of.lengths), rows)
        return FeatureColumn(of.values[places], of.lengths[rows], None if of.weights is None else of.weights[places])

    return LoggedRequests(
        starts=_starts(np.diff(batch.starts)[requests]),
        request_id=batch.request_id[requests],
        user_id=batch.user_id[requests],
        request_time_ms=batch.request_time_ms[requests],
        surface=batch.surface[requests],
        entity_kind=batch.entity_kind[rows],
        entity_id=batch.entity_id[rows],
        position=batch.position[rows],
        labels=batch.labels[_ragged(batch.label_starts, rows)],
        label_starts=_starts(np.diff(batch.label_starts)[rows]),
        features={name: column(of) for name, of in batch.features.items()},
    )


def _inputs(domain: Domain, ranker_name: str, batch: LoggedRequests, history: History) -> Iterator[RankInputs]:
    wanted = {name: domain.features[name].side for name in domain.ranker[ranker_name].features if name in batch.features}
    list_starts = {name: _starts(column.lengths) for name, column in batch.features.items() if column.lengths is not None}

    def columns(side: str, low: int, high: int) -> dict[str, Column]:
        return {
            name: _column(batch.features[name], list_starts.get(name), domain.features[name].kind in ("number", "vector"), low, high)
            for name, of_side in wanted.items()
            if of_side == side
        }

    for i in range(len(batch)):
        low, high = int(batch.starts[i]), int(batch.starts[i + 1])
        user_id, time_ms = int(batch.user_id[i]), int(batch.request_time_ms[i])
        events, erased_before_ms = history.before(user_id, time_ms)
        yield RankInputs(
            user_id=user_id,
            request_time_ms=time_ms,
            events=events,
            candidate_ids=batch.entity_id[low:high],
            candidate_kinds=batch.entity_kind[low:high],
            candidate_features=columns("candidate", low, high),
            request_features=columns("request", low, low + 1),
            erased_before_ms=erased_before_ms,
        )


def _column(column: FeatureColumn, list_starts: I64 | None, is_number: bool, low: int, high: int) -> Column:
    if list_starts is not None and column.lengths is not None:
        part = slice(list_starts[low], list_starts[high])
        weights = None if column.weights is None else column.weights[part]
        return Column(category=column.values[part], lengths=column.lengths[low:high].astype(np.uint32), weights=weights)
    return Column(number=column.values[low:high]) if is_number else Column(category=column.values[low:high])


def _labels(domain: Domain, ranker_name: str, batch: LoggedRequests) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Labels bool [n, H] and weights float32 [n, H] of a batch.

    Paper: TransAct, section 3.4: the weight of head h is the sum over the example's actions a of M[h, a].
    Deviates: an example without an action that M names for the head has the head's base weight; it would never train otherwise.
    """
    happened = {name: batch.label(action.id) for name, action in domain.actions.items()}
    columns = [_head_columns(head, happened) for head in domain.ranker[ranker_name].heads.values()]
    return np.stack([label for label, _ in columns], 1), np.stack([weight for _, weight in columns], 1)


def _head_columns(head: Head, happened: Mapping[str, npt.NDArray[np.bool_]]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    row = {**dict.fromkeys(head.actions, 1.0), **head.weights}
    label = np.any([happened[name] for name in head.actions], axis=0)
    named = np.any([happened[name] for name in row], axis=0)
    weight = np.sum([value * happened[name] for name, value in row.items()], axis=0)
    return label, np.where(named, weight, head.base_weight).astype(np.float32)


def _starts(sizes: Array) -> I64:
    """Where parts of these sizes begin, and where the last one ends: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _ragged(starts: I64, chosen: I64) -> I64:
    """Rows starts[i]:starts[i + 1] of each chosen i, one after the other."""
    counts = starts[chosen + 1] - starts[chosen]
    first = np.repeat(starts[chosen] - (np.cumsum(counts) - counts), counts)
    return first + np.arange(len(first))


def _is_ragged(name: str) -> bool:
    return name.startswith("sequence_") and name != "sequence_count"

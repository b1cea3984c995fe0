"""Training data: every request of a canonical log, packed by the same `pack()` as serving, with what was known at its moment.

A request sees the actions that the log held strictly before its time (append time, not event time: a late event was not there yet), folded
by the law of the sequence, and the item and user vectors of the generations that were the newest then. A ranker with `surfaces` has the
requests of these surfaces only. Of a served log a request sees what it saw when it was served (`inference.served_examples`).
"""

import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.domain import Domain, Head
from features.erasures import NOBODY, Erased, erased_before_ms, ledger_fingerprint
from features.logs import FeatureColumn, LoggedRequests, is_served_log, read_requests
from features.pack import Column, ManyInputs, Packer
from features.tables import Generation, TableSet, generations_of, open_generation, time_of
from features.tensors import tensor_table
from inference.history import DatasetError, History, LoggedSequences, Sequences, ragged, rows_of, starts_of, with_rows
from inference.packed import PackedWriter, fingerprint_of, forget_others, packed_folder, read_packed
from inference.served_examples import ServedSequences, served_requests

Array = npt.NDArray[Any]
I64 = npt.NDArray[np.int64]

BLOCK, POOL = 256, 65_536
"""Requests that lie together on disk and are read together, and those of several blocks that are shuffled together."""
NORMALISATION_REQUESTS_MAX = 1_000_000


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
        return ragged(self.starts, requests)

    def batches(self, requests: I64, rows_max: int, random: np.random.Generator | None) -> list[I64]:
        """Cuts requests into batches of at most `rows_max` candidates (one request at least); shuffled if `random` is given.

        Shuffled are the blocks, and then the requests of POOL in a row: no more of the arrays is touched for a while, however long they
        are, and up to POOL requests any order is as likely. Requests of like sequence length share a batch, since a batch costs as much as
        its longest sequence.
        """
        found: list[I64] = []
        blocks = np.arange(-(-len(requests) // BLOCK))
        if random is not None:
            blocks = random.permutation(blocks)
        for first in range(0, len(blocks), POOL // BLOCK):
            pool = np.concatenate(
                [requests[block * BLOCK : (block + 1) * BLOCK] for block in blocks[first : first + POOL // BLOCK].tolist()]
            )
            if random is not None:
                pool = random.permutation(pool)
            cut: list[I64] = []
            window = max(1, len(pool) // 8)
            for start in range(0, len(pool), window):
                chosen = self.by_length(pool[start : start + window])
                ends = np.cumsum(self._sizes(chosen))
                first_of = 0
                while first_of < len(chosen):
                    before = ends[first_of - 1] if first_of else 0
                    last = max(first_of + 1, int(ends.searchsorted(before + rows_max, "right")))
                    cut.append(chosen[first_of:last])
                    first_of = last
            if random is not None:
                random.shuffle(cut)
            found += cut
        return found

    def by_length(self, requests: I64) -> I64:
        """The requests in the order of their sequences' lengths."""
        return requests[np.argsort(self._lengths(requests), kind="stable")]

    def lengths_behind(self, requests: I64, window_ms: npt.NDArray[np.float64]) -> I64:
        """How many actions of each request's sequence are `window_ms` [R] old or older: int64 [R]."""
        counts = self._lengths(requests)
        ages_ms = self.of_sequence["sequence_age_ms"].take(ragged(self.sequence_starts, requests))
        old = starts_of(ages_ms >= np.repeat(window_ms, counts))
        ends = np.cumsum(counts)
        found: I64 = old[ends] - old[ends - counts]
        return found

    def pieces(self, requests: I64, lengths: I64, tokens_max: int) -> list[slice]:
        """Cuts a batch into pieces of at most `tokens_max` tokens (candidates times the longest of `lengths`; one request at least).

        `lengths` int64 [R] ascend: the actions of each request that the model looks at.
        """
        lengths, ends = np.maximum(lengths, 1), np.cumsum(self._sizes(requests))
        cut, first = [], 0
        while first < len(requests):
            tokens = (ends[first:] - (ends[first - 1] if first else 0)) * lengths[first:]
            last = first + max(1, int(tokens.searchsorted(tokens_max, "right")))
            cut.append(slice(first, last))
            first = last
        return cut

    def _lengths(self, requests: I64) -> I64:
        return self.sequence_starts[requests + 1] - self.sequence_starts[requests]

    def _sizes(self, requests: I64) -> I64:
        return self.starts[requests + 1] - self.starts[requests]

    def batch(self, requests: I64) -> Batch:
        """The tensors of some requests; sequences are padded to the longest of them (one place at least)."""
        rows = self.candidate_rows(requests)
        tensors = {name: torch.from_numpy(values.take(requests, axis=0)) for name, values in self.of_request.items()}
        tensors |= {name: torch.from_numpy(values.take(rows, axis=0)) for name, values in self.of_candidate.items()}
        counts, places = self._lengths(requests), ragged(self.sequence_starts, requests)
        R, S = len(requests), max(1, int(counts.max(initial=0)))
        to = np.flatnonzero(np.arange(S) < counts[:, None])
        for name, values in self.of_sequence.items():
            padded = np.zeros((R * S, *values.shape[1:]), values.dtype)
            padded[to] = values.take(places, axis=0)
            tensors[name] = torch.from_numpy(padded.reshape(R, S, *values.shape[1:]))
        request_row = np.repeat(np.arange(R), self._sizes(requests))
        labels = torch.from_numpy(self.labels.take(rows, axis=0).astype(np.float32))
        return Batch(tensors, torch.from_numpy(request_row), labels, torch.from_numpy(self.weights.take(rows, axis=0)))

    def request(self, i: int) -> dict[str, Array]:
        """The tensors of request i as the table shapes them, its sequence without padding. Views."""
        rows, places = slice(self.starts[i], self.starts[i + 1]), slice(self.sequence_starts[i], self.sequence_starts[i + 1])
        tensors = {name: values[i] for name, values in self.of_request.items()}
        tensors |= {name: values[rows] for name, values in self.of_candidate.items()}
        return tensors | {name: values[places] for name, values in self.of_sequence.items()}

    def rows_for_normalisation(self, requests: I64) -> dict[str, Tensor]:
        """Number features of these requests (of very many, of as many spread over them) and their candidates, for `fit_normalisation`."""
        requests = requests[:: max(1, len(requests) // NORMALISATION_REQUESTS_MAX)]
        rows = self.candidate_rows(requests)
        numbers = {name: values[requests] for name, values in self.of_request.items() if name.endswith("_number")}
        numbers |= {name: values[rows] for name, values in self.of_candidate.items() if name.endswith("_number")}
        return {name: torch.from_numpy(values) for name, values in numbers.items()}


def split_times(
    domain: Domain, ranker_name: str, log: str | Path, fractions: tuple[float, float, float], *, since_ms: int = 0
) -> tuple[int, int]:
    """Times (milliseconds) at which the validation and the test part begin, so that the parts hold these shares of the ranker's requests
    from `since_ms` on.

    Raises:
        DatasetError: fewer than three distinct request times.
    """
    times = np.concatenate([np.zeros(0, np.int64), *(batch.request_time_ms for batch in ranker_requests(domain, ranker_name, log))])
    times = times[times >= since_ms]
    if (distinct := len(np.unique(times))) < 3:
        where = _where(domain, ranker_name)
        since = f" from {since_ms} ms on" if since_ms else ""
        raise DatasetError(f"{log}: {distinct} distinct request times{where}{since}; a temporal split needs three or more")
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
    cache: Path | None = None,
) -> tuple[Dataset, TableSet]:
    """Packs every request of a log that trains the ranker; also returns the tables of the latest ones (`generations`, else the newest).

    `packed` is told how many more requests are done. Requests and actions of users in `erased` up to their erasure are left out, whatever
    the log still holds of them. The arrays are mapped files: below `cache`, where they are found again as long as nothing that they depend
    on has changed (`default_cache(log)`), else in a file without a name.

    Raises:
        DatasetError: the log has no such request.
        TableError, LogError: see there.
    """
    tables = TableSet.open(tables_root, domain, ranker_name, generations)
    packers = _Packers(domain, ranker_name, tables_root, tables)

    def pack_into(folder: Path) -> None:
        sequences: LoggedSequences = ServedSequences() if is_served_log(log) else History(domain, ranker_name, log, erased)
        with PackedWriter(folder, {"ledger": ledger_fingerprint(erased)}) as writer:
            if not _pack(domain, ranker_name, ranker_requests(domain, ranker_name, log, erased), sequences, packers, writer, packed):
                raise DatasetError(f"{log}: no request in it{_where(domain, ranker_name)}")

    if cache is None:
        with tempfile.TemporaryDirectory(prefix="freshrank-packed-") as scratch:
            pack_into(Path(scratch, "packed"))
            return _opened(Path(scratch, "packed")), tables
    looked_into = {space: [name] for space, name in tables.generations.items()} | packers.names
    folder = packed_folder(cache, ranker_name, fingerprint_of(domain, ranker_name, Path(log), looked_into, erased))
    try:
        dataset = _opened(folder)
    except (OSError, ValueError, KeyError):  # not there, or damaged
        shutil.rmtree(folder, ignore_errors=True)
        pack_into(folder)
        dataset = _opened(folder)
    forget_others(folder, ranker_name, ledger_fingerprint(erased))
    return dataset, tables


def _pack(
    domain: Domain,
    ranker_name: str,
    batches: Iterator[LoggedRequests],
    source: LoggedSequences,
    packers: "_Packers",
    writer: PackedWriter,
    packed: Callable[[int], None],
) -> int:
    """Writes the arrays of `Dataset`, a bounded number of requests at a time; returns how many candidates there were."""
    kind_of = {
        row.name: "candidate" if row.per_candidate else "sequence" if _is_ragged(row.name) else "request"
        for row in tensor_table(domain, ranker_name)
    }
    rows = places = 0
    for batch in batches:
        first = 0
        for sequences in source.sequences(batch):
            count = len(sequences.erased_before_ms)
            part = batch if count == len(batch) else _chosen(batch, np.arange(first, first + count))
            first += count
            for low, high, packer in packers.spans(part.request_time_ms):
                some = part if high - low == len(part) else _chosen(part, np.arange(low, high))
                tensors = packer.pack_many(_many_inputs(domain, ranker_name, some, sequences, low))
                for name, values in tensors.items():
                    writer.append(f"{kind_of[name]}.{name}", values)
                labels, weights = labels_of(domain, ranker_name, some)
                for name, values in (("labels", labels), ("weights", weights), ("user_id", some.user_id)):
                    writer.append(name, values)
                writer.append("request_time_ms", some.request_time_ms)
                if domain.ranker[ranker_name].model.position_max:  # training's alone: serving scores every candidate at one place
                    writer.append("candidate.position", some.position)
                ends, sequence_ends = some.starts[1:], np.cumsum(tensors["sequence_count"][:, 0], dtype=np.int64)
                if not rows:
                    writer.append("starts", np.zeros(1, np.int64))
                    writer.append("sequence_starts", np.zeros(1, np.int64))
                writer.append("starts", rows + ends)
                writer.append("sequence_starts", places + sequence_ends)
                rows, places = rows + int(ends[-1]), places + int(sequence_ends[-1])
                packed(len(some))
    return rows


def _opened(folder: Path) -> Dataset:
    arrays: dict[str, Any] = read_packed(folder)

    def of(kind: str) -> dict[str, Array]:
        return {name.removeprefix(kind): values for name, values in arrays.items() if name.startswith(kind)}

    own = {name: values for name, values in arrays.items() if "." not in name}
    return Dataset(**own, of_request=of("request."), of_candidate=of("candidate."), of_sequence=of("sequence."))


class _Packers:
    """One packer for the generations of item and user vectors, of the tables' lineage, that were the newest at a time.

    Requests come in the order of time, so only the last one is kept: a refreshed space has hundreds of generations.
    """

    def __init__(self, domain: Domain, ranker_name: str, root: str | Path, tables: TableSet) -> None:
        self._domain, self._ranker_name, self._root, self._tables = domain, ranker_name, root, tables
        self._opened = newest = {of.space: of for of in (tables.items, tables.users) if of is not None}
        self.names = {space: _up_to(of, list(generations_of(root, space, of.lineage))) for space, of in newest.items()}
        """Generations that may be looked into, by space, oldest first."""
        self._created_ms = {space: [time_of(name) for name in names] for space, names in self.names.items()}
        self._moments = np.unique(np.concatenate([np.array(moments, np.int64) for moments in self._created_ms.values()]))
        self._last: tuple[dict[str, str], Packer] | None = None

    def at(self, time_ms: int) -> Packer:
        """The packer of a request of this time."""
        names = {space: self.names[space][max(0, bisect_right(moments, time_ms) - 1)] for space, moments in self._created_ms.items()}
        if self._last is None or names != self._last[0]:
            opened = self._opened = {
                space: held if held.name == names[space] else open_generation(self._root, space, names[space])
                for space, held in self._opened.items()
            }
            items, users = self._tables.items, self._tables.users
            tables = replace(self._tables, items=opened[items.space], users=None if users is None else opened[users.space])
            self._last = names, Packer(self._domain, self._ranker_name, tables)
        return self._last[1]

    def spans(self, times_ms: I64) -> Iterator[tuple[int, int, Packer]]:
        """Requests low to high of ascending times that have a packer in common."""
        place = self._moments.searchsorted(times_ms, "right")
        for low, high in pairwise([0, *(np.flatnonzero(np.diff(place)) + 1).tolist(), len(times_ms)]):
            if low < high:
                yield low, high, self.at(int(times_ms[low]))


def _up_to(newest: Generation, names: list[str]) -> list[str]:
    """Of the names of generations, newest first, those up to `newest`, oldest first."""
    return names[names.index(newest.name) :][::-1]


def ranker_requests(domain: Domain, ranker_name: str, log: str | Path, erased: Erased = NOBODY) -> Iterator[LoggedRequests]:
    """The log's requests on the surfaces whose impressions train the ranker, without those of users erased since."""
    if is_served_log(log):
        yield from served_requests(domain, ranker_name, log, erased)
        return
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
    """Some requests of a batch, ascending, with their rows."""
    return with_rows(batch, ragged(batch.starts, requests))


def _many_inputs(domain: Domain, ranker_name: str, batch: LoggedRequests, sequences: Sequences, first: int) -> ManyInputs:
    """A batch's requests, whose sequences are those from `first` on."""
    wanted = {name: domain.features[name] for name in domain.ranker[ranker_name].features if name in batch.features}

    def columns(side: str, rows: I64 | None) -> dict[str, Column]:
        found = {name: batch.features[name] for name, feature in wanted.items() if feature.side == side}
        return {name: _column(of if rows is None else rows_of(of, rows)) for name, of in found.items()}

    bounds = sequences.starts[first : first + len(batch) + 1]
    return ManyInputs(
        user_id=batch.user_id,
        request_time_ms=batch.request_time_ms,
        erased_before_ms=sequences.erased_before_ms[first : first + len(batch)],
        events=sequences.events[bounds[0] : bounds[-1]],
        event_starts=bounds - bounds[0],
        candidate_ids=batch.entity_id,
        candidate_kinds=batch.entity_kind,
        starts=batch.starts,
        candidate_features=columns("candidate", None),
        request_features=columns("request", batch.starts[:-1]),
    )


def _column(column: FeatureColumn) -> Column:
    if column.lengths is not None:
        return Column(category=column.values, lengths=column.lengths.astype(np.uint32), weights=column.weights)
    return Column(number=column.values) if column.values.dtype == np.float32 else Column(category=column.values)


def labels_of(domain: Domain, ranker_name: str, batch: LoggedRequests) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
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


def _is_ragged(name: str) -> bool:
    return name.startswith("sequence_") and name != "sequence_count"

"""Sampled negatives: a log that has only what was clicked becomes one of requests, each the item clicked among items drawn for it.

Drawn is from what was clicked in a window before the request, by what the log had then: `uniform` gives each distinct item of the window
the same chance, `popular` each click (so an item the chance of its share). An item is a candidate once. Unless `repeats`, items that the
user acted on before are no candidates, neither as negatives nor as the positive: else a model learns that what was not read yet was
clicked. For the same reason the item clicked must be in the window too: a count of 0, which no negative has, would give it away. A
request's candidates stand in a random order, so that no tie is broken by the label.

The same log and seed give the same negatives, whatever the memory. In memory are a block of requests with its window's positions (8 bytes a
click) and the distinct items' keys; clicks and what each user did stand on disk.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.domain import Domain, Negatives
from features.logs import AS_LOGGED, IMPRESSIONS, POPULAR, UNIFORM, LogWriter, impressions_schema
from streams.buckets import Buckets, bucket_count, item_keys, mixed
from streams.columns import U64, Bools

I64 = npt.NDArray[np.int64]

BLOCK_REQUESTS = 1 << 13
"""Requests drawn for at once. Each block has its own generator, so this number is part of what a seed means."""
ROUNDS_MAX = 50
"""Draws of one negative, after which its request has one less: the window has too few items that may be candidates."""

COUNTS = ("requests", "negatives", "requests_with_fewer", "left_out_repeats", "left_out_new", "left_out_without_negatives")
"""What the summary counts: requests made, negatives in them, requests with fewer than asked; left out: clicks on an item that the user had
acted on before, clicks on an item that the window does not hold, and requests for which there was nothing to draw."""

_BATCH_ROWS = 1 << 16
_CLICK = np.dtype([("key", "<u8"), ("id", "<u8"), ("previous", "<i8"), ("kind", "u1")])
_PAIR = np.dtype([("pair", "<u8"), ("ms", "<i8")])


def add_negatives(
    domain: Domain, actions: Path, source: Path, target: Path, work: Path, memory_bytes: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Writes the impressions in the folder `source`, all of them clicked, to the folder `target` with drawn ones between them.

    Returns what the summary says: the settings and the counts. `actions` is the log's file of actions; `work` a folder that is not there
    yet, for what does not fit into memory.
    """
    assert domain.log is not None
    settings = domain.log.negatives
    assert settings is not None
    clicks, did = _look_at_actions(actions, work, domain.actions[settings.action].id, memory_bytes, settings)
    counts = dict.fromkeys(COUNTS, 0)
    with LogWriter(target, IMPRESSIONS, impressions_schema(domain)) as writer:
        for number, table in enumerate(_blocks(source / IMPRESSIONS)):
            advance(table.num_rows)
            writer.write(_with_negatives(table, clicks, did, settings, np.random.default_rng([settings.seed, number]), counts))
    return {**settings.model_dump(), **counts}


def _with_negatives(
    table: pa.Table, clicks: "_Clicks", did: "_Did | None", settings: Negatives, random: np.random.Generator, counts: dict[str, int]
) -> pa.Table:
    """Whole requests of clicked rows with negatives; requests without any are left out."""
    if settings.share < 1:
        asked = mixed(table["request_id"].to_numpy(), np.full(table.num_rows, settings.seed, np.uint64))
        table = table.filter(pa.array(asked < np.uint64(settings.share * 2.0**64)))
    users, at_ms = table["user_id"].to_numpy(), table["request_time_ms"].to_numpy()
    keys = item_keys(table["entity_kind"].to_numpy(), table["entity_id"].to_numpy())
    if did is not None:
        fresh = ~did.before(users, keys, at_ms)
        counts["left_out_repeats"] += int((~fresh).sum())
        table, users, at_ms, keys = table.filter(pa.array(fresh)), users[fresh], at_ms[fresh], keys[fresh]
    known = clicks.holds(keys, *clicks.window(at_ms, settings.window_ms))
    counts["left_out_new"] += int((~known).sum())
    table, users, at_ms, keys = table.filter(pa.array(known)), users[known], at_ms[known], keys[known]
    ids = table["request_id"].to_numpy()
    begins = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
    if not len(begins):
        return table
    of_row = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(ids))))
    request, chosen, how = _draw(users[begins], at_ms[begins], of_row, keys, clicks, did, settings, random)
    drawn = np.bincount(request, minlength=len(begins))
    counts["requests"] += int((drawn > 0).sum())
    counts["negatives"] += len(request)
    counts["requests_with_fewer"] += int(((drawn > 0) & (drawn < settings.uniform + settings.popular)).sum())
    counts["left_out_without_negatives"] += int((drawn == 0).sum())
    kept = np.flatnonzero(drawn[of_row] > 0)
    row = np.concatenate([kept, begins[request]])
    negative = np.concatenate([np.full(len(kept), -1), chosen])
    how = np.concatenate([np.full(len(kept), AS_LOGGED, np.uint8), how])
    order = np.lexsort((random.random(len(row)), np.concatenate([of_row[kept], request])))
    return _expanded(table, row[order], negative[order], how[order], clicks)


def _expanded(table: pa.Table, row: I64, negative: I64, how: npt.NDArray[np.uint8], clicks: "_Clicks") -> pa.Table:
    """Row `row` of the table for each candidate; where `negative` >= 0 with the item of that click, and without labels."""
    is_drawn = negative >= 0
    picked = clicks.records[negative[is_drawn]]
    out = table.take(pa.array(row)).combine_chunks()
    for name, values in (("entity_kind", picked["kind"]), ("entity_id", picked["id"]), ("drawn", how[is_drawn])):
        column = out[name].to_numpy().copy()
        column[is_drawn] = values
        out = out.set_column(out.schema.get_field_index(name), out.schema.field(name), pa.array(column))
    labels = table["labels"].combine_chunks()
    starts, lengths = labels.offsets.to_numpy()[row], np.where(is_drawn, 0, np.diff(labels.offsets.to_numpy())[row])
    ends = np.cumsum(lengths)
    values = labels.values.take(pa.array(np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())))
    lists = pa.ListArray.from_arrays(pa.array(np.append(0, ends).astype(np.int32)), values)
    out = out.set_column(out.schema.get_field_index("labels"), out.schema.field("labels"), lists)
    unknown = pa.array(np.full(len(row), -1, np.int32))  # where the positive stood says nothing about where the others would have
    return out.set_column(out.schema.get_field_index("position"), out.schema.field("position"), unknown)


def _draw(
    users: U64,
    at_ms: I64,
    positive_request: I64,
    positive_keys: U64,
    clicks: "_Clicks",
    did: "_Did | None",
    settings: Negatives,
    random: np.random.Generator,
) -> tuple[I64, I64, npt.NDArray[np.uint8]]:
    """Negatives of requests (users and times [r]): the request and the click of each, int64 [n], and UNIFORM or POPULAR."""
    low, high = clicks.window(at_ms, settings.window_ms)
    firsts = clicks.firsts(int(low.min()), int(low.max()), int(high.max()))  # every position that is an item's first one of some window
    slots = settings.uniform + settings.popular
    request = np.repeat(np.arange(len(users)), slots)
    by_item = np.tile(np.arange(slots) < settings.uniform, len(users))
    since, until = np.where(by_item, firsts.searchsorted(low[request]), low[request]), high[request]
    until = np.where(by_item, firsts.searchsorted(until), until)
    chosen, drawn_in = np.full(len(request), -1), np.full(len(request), ROUNDS_MAX)
    pending = np.flatnonzero(until > since)
    for number in range(ROUNDS_MAX):
        if not len(pending):
            break
        drawn = since[pending] + (random.random(len(pending)) * (until - since)[pending]).astype(np.int64)
        item = by_item[pending]
        drawn[item] = firsts[drawn[item]]
        records, of = clicks.records[drawn], request[pending]
        fits = ~item | (records["previous"] < low[of])
        if did is not None:
            fits &= ~did.before(users[of], records["key"], at_ms[of])
        chosen[pending[fits]], drawn_in[pending[fits]] = drawn[fits], number
        drawing = np.zeros(len(users), bool)
        drawing[of] = True  # the others have all they want
        taken, own = np.flatnonzero((chosen >= 0) & drawing[request]), np.flatnonzero(drawing[positive_request])
        again = _repeated(
            np.concatenate([positive_request[own], request[taken]]),
            np.concatenate([positive_keys[own], clicks.records["key"][chosen[taken]]]),
            np.concatenate([np.full(len(own), -1), drawn_in[taken]]),
        )
        chosen[taken[again[len(own) :]]] = -1
        pending = pending[chosen[pending] < 0]
    taken = np.flatnonzero(chosen >= 0)
    return request[taken], chosen[taken], np.where(by_item[taken], UNIFORM, POPULAR).astype(np.uint8)


def _repeated(request: I64, keys: U64, drawn_in: I64) -> Bools:
    """Items that the request has already, drawn earlier or beside it: bool [n]."""
    order = np.lexsort((np.arange(len(keys)), drawn_in, keys, request))
    again = np.zeros(len(keys), bool)
    again[order[1:]] = (request[order[1:]] == request[order[:-1]]) & (keys[order[1:]] == keys[order[:-1]])
    return again


class _Clicks:
    """The actions that negatives are drawn from, in the order of the log, mapped from disk.

    previous: the place of the item's click before this one, -1: none. A click is its item's first one in a window that begins at `low`
    where previous < low: so distinct items are drawn without counting any.
    """

    def __init__(self, records: Path, times_ms: Path) -> None:
        some = bool(records.stat().st_size)
        self.records = np.asarray(np.memmap(records, _CLICK, "r")) if some else np.zeros(0, _CLICK)
        self._times_ms: I64 = np.asarray(np.memmap(times_ms, np.int64, "r")) if some else np.zeros(0, np.int64)

    def window(self, at_ms: I64, window_ms: int) -> tuple[I64, I64]:
        """Places of the clicks appended in [at_ms - window_ms, at_ms): int64 [n] each, the second exclusive."""
        return self._times_ms.searchsorted(at_ms - window_ms), self._times_ms.searchsorted(at_ms)

    def holds(self, keys: U64, low: I64, high: I64) -> Bools:
        """Whether each item was clicked in [low, high): bool [n]."""
        if not len(keys):
            return np.zeros(0, bool)
        start = int(low.min())
        asked, code = np.unique(keys, return_inverse=True)
        there = self.records["key"][start : int(high.max())]
        places = np.flatnonzero(np.isin(there, asked))
        span = len(there) + 1
        held = np.sort(asked.searchsorted(there[places]) * span + places)
        found: Bools = held.searchsorted(code * span + high - start) > held.searchsorted(code * span + low - start)
        return found

    def firsts(self, low: int, low_max: int, high: int) -> I64:
        """Places in [low, high) that are their item's first in a window that begins at low_max or before: int64, ascending."""
        return low + np.flatnonzero(self.records["previous"][low:high] < low_max)


class _Did:
    """What each user did first when, on disk: whether they had acted on an item before a moment."""

    def __init__(self, buckets: Buckets, folder: Path) -> None:
        self._buckets = buckets
        self._parts: list[tuple[U64, I64]] = []
        folder.mkdir()
        for n in range(buckets.count):
            records = buckets.read(n)
            pairs, first = np.unique(records["pair"], return_index=True)  # the first of each: records came in the order of time
            arrays = []
            for name, values in (("pair", pairs), ("ms", records["ms"][first])):
                np.save(folder / f"{n}.{name}.npy", values)
                arrays.append(np.asarray(np.load(folder / f"{n}.{name}.npy", mmap_mode="r")))
            self._parts.append((arrays[0], arrays[1]))

    def before(self, users: U64, keys: U64, at_ms: I64) -> Bools:
        """Whether each user had acted on the item strictly before at_ms: bool [n]."""
        pairs, bucket, found = mixed(users, keys), self._buckets.of(users), np.zeros(len(users), bool)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=self._buckets.count))
        for (known, first_ms), start, end in zip(self._parts, [0, *ends[:-1]], ends, strict=True):
            if end > start and len(known):
                where = order[start:end]
                place = np.minimum(known.searchsorted(pairs[where]), len(known) - 1)
                found[where] = (known[place] == pairs[where]) & (first_ms[place] < at_ms[where])
        return found


def _look_at_actions(path: Path, work: Path, number: int, memory_bytes: int, settings: Negatives) -> tuple[_Clicks, _Did | None]:
    """One pass over the log: the clicks to draw from, and (unless repeats) what each user did."""
    work.mkdir()
    known, last = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    at = 0
    with pq.ParquetFile(path) as file, (work / "clicks").open("wb") as out, (work / "times").open("wb") as times:
        buckets = Buckets(work / "did", _PAIR, bucket_count(file.metadata.num_rows * _PAIR.itemsize, memory_bytes))
        columns = ["user_id", "entity_kind", "entity_id", "action", "append_time_ms", "erase"]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            batch = batch.filter(pa.array(~batch["erase"].to_numpy(zero_copy_only=False)))
            user, kind, item, action, ms = (batch[name].to_numpy() for name in columns[:-1])
            keys = item_keys(kind, item)
            if not settings.repeats:
                did = np.empty(len(user), _PAIR)
                did["pair"], did["ms"] = mixed(user, keys), ms
                buckets.add(user, did)
            clicked = action == number
            records = np.empty(int(clicked.sum()), _CLICK)
            for name, values in (("key", keys), ("id", item), ("kind", kind)):
                records[name] = values[clicked]
            records["previous"], known, last = _previous(records["key"], at, known, last)
            at += len(records)
            out.write(records.tobytes())
            times.write(ms[clicked].tobytes())
    return _Clicks(work / "clicks", work / "times"), None if settings.repeats else _Did(buckets, work / "first")


def _previous(keys: U64, at: int, known: U64, last: I64) -> tuple[I64, U64, I64]:
    """The place of each key's occurrence before, with keys[0] at place `at`; and the keys known now, ascending, with their last place."""
    order = np.argsort(keys, kind="stable")
    previous = np.full(len(keys), -1)
    same = np.zeros(len(keys), bool)
    same[1:] = keys[order[1:]] == keys[order[:-1]]
    previous[order[1:]] = np.where(same[1:], at + order[:-1], -1)
    first = order[~same]
    if len(known):
        place = np.minimum(known.searchsorted(keys[first]), len(known) - 1)
        previous[first] = np.where(known[place] == keys[first], last[place], -1)
    merged = np.concatenate([keys[::-1], known])  # the newest place of each first
    places = np.concatenate([at + np.arange(len(keys))[::-1], last])
    known, newest = np.unique(merged, return_index=True)
    return previous, known, places[newest]


def _blocks(path: Path) -> Iterator[pa.Table]:
    """Whole requests, BLOCK_REQUESTS at a time."""
    held: pa.Table | None = None
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            table = pa.Table.from_batches([batch])
            held = table if held is None else pa.concat_tables([held, table])
            ids = held["request_id"].to_numpy()
            begins = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
            cuts = begins[BLOCK_REQUESTS::BLOCK_REQUESTS]
            for start, end in zip([0, *cuts[:-1]], cuts, strict=True) if len(cuts) else ():
                yield held.slice(int(start), int(end - start)).combine_chunks()
            held = held.slice(int(cuts[-1])) if len(cuts) else held
    if held is not None and held.num_rows:
        yield held.combine_chunks()

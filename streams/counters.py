"""Counters of items as candidate features: how often an item was acted on, counted at each request's moment from what the log had by then.

An action counts for a request if it was appended strictly before the request's time and, with a window, not earlier than window_ms before
it. So a count is what a service that counts the log would have said; an action of the same millisecond has no part in it.
Both files of the log are spilled by item, so memory stays about what the import was given, whatever the log's length.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.as_of import AsOf
from features.domain import Counter, Domain
from features.logs import IMPRESSIONS, LogWriter, impressions_schema
from streams.buckets import Buckets, bucket_count, item_keys

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

_ACTION = np.dtype([("id", "<u8"), ("ms", "<i8"), ("kind", "u1"), ("action", "u1")])
_SHOWN = np.dtype([("id", "<u8"), ("ms", "<i8"), ("row", "<i8"), ("kind", "u1")])
_BATCH_ROWS = 1 << 16


def counters(domain: Domain) -> dict[str, Counter]:
    """The domain's counter features, in its order."""
    return {name: feature.counter for name, feature in domain.features.items() if feature.counter is not None}


def add_counters(
    domain: Domain, actions: Path, source: Path, target: Path, work: Path, memory_bytes: int, advance: Callable[[int], None]
) -> None:
    """Writes the impressions in the folder `source` to the folder `target`, with the counters filled in from the file `actions`.

    `work` is a folder for what does not fit into memory; it must not be there. `advance` is told how many more rows are done.
    """
    wanted = counters(domain)
    numbers = sorted({domain.actions[name].id for of in wanted.values() for name in (of.action, of.rate_of) if name is not None})
    rows = pq.read_metadata(source / IMPRESSIONS).num_rows
    size_bytes = rows * _SHOWN.itemsize + pq.read_metadata(actions).num_rows * _ACTION.itemsize
    count = bucket_count(size_bytes, memory_bytes)
    acted, totals = _spill_actions(actions, work, numbers, count)
    shown = _spill_impressions(source / IMPRESSIONS, work, count)
    values = np.lib.format.open_memmap(work / "counters.npy", "w+", np.float32, (max(rows, 1), len(wanted)))
    ids = {name: action.id for name, action in domain.actions.items()}
    for n in range(count):
        asked = shown.read(n)
        asked = asked[np.lexsort((asked["ms"], item_keys(asked["kind"], asked["id"])))]  # neighbours are found near each other
        counted = _Counted(acted.read(n), asked)
        for place, counter in enumerate(wanted.values()):
            values[asked["row"], place] = _value(counter, ids, counted, totals, asked["ms"])
    with pq.ParquetFile(source / IMPRESSIONS) as file, LogWriter(target, IMPRESSIONS, impressions_schema(domain)) as writer:
        start = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            table = pa.Table.from_batches([batch])
            for place, name in enumerate(wanted):
                column = np.ascontiguousarray(values[start : start + batch.num_rows, place])
                at = table.schema.get_field_index(name)
                table = table.set_column(at, table.schema.field(at), pa.array(column))
            writer.write(table)
            start += batch.num_rows
            advance(batch.num_rows)


def _value(counter: Counter, ids: dict[str, int], counted: "_Counted", totals: dict[int, I64], at_ms: I64) -> F32:
    if counter.age:
        return counted.age_ms(ids[counter.action], at_ms)
    count = counted.before(ids[counter.action], at_ms, counter.window_ms)
    if counter.rate_of is None:
        return count.astype(np.float32)
    of = counted.before(ids[counter.rate_of], at_ms, counter.window_ms)
    all_of = totals[ids[counter.rate_of]].searchsorted(at_ms)
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing before the request: no rate is known, the value is missing
        share = totals[ids[counter.action]].searchsorted(at_ms) / all_of
        rate = (count + counter.prior * share) / (of + counter.prior)
    return np.where(np.isfinite(rate), rate, np.nan).astype(np.float32)


class _Counted:
    """Actions of some items, to be counted before moments of impressions of these items."""

    def __init__(self, acted: npt.NDArray[np.void], asked: npt.NDArray[np.void]) -> None:
        keys = np.concatenate([item_keys(part["kind"], part["id"]) for part in (acted, asked)])
        _, codes = np.unique(keys, return_inverse=True)
        items, self._asked = codes[: len(acted)], codes[len(acted) :]
        self._acted = {}
        for number in np.unique(acted["action"]).tolist():
            chosen = acted["action"] == number
            self._acted[number] = AsOf(items[chosen], acted["ms"][chosen])
        self._known: dict[tuple[int, int | None], I64] = {}

    def before(self, action: int, at_ms: I64, window_ms: int | None) -> I64:
        """For each impression, the actions on its item in [at_ms - window_ms, at_ms): int64 [n]."""
        if (action, window_ms) not in self._known:
            since_ms = None if window_ms is None else at_ms - window_ms
            acted = self._acted.get(action)
            self._known[action, window_ms] = np.zeros(len(at_ms), np.int64) if acted is None else acted.before(self._asked, at_ms, since_ms)
        return self._known[action, window_ms]

    def age_ms(self, action: int, at_ms: I64) -> F32:
        """For each impression, the time since the first action on its item before it, float32 [n]; NaN: none."""
        if action not in self._acted:
            return np.full(len(at_ms), np.nan, np.float32)
        age_ms = at_ms - self._acted[action].first(self._asked)
        return np.where(age_ms > 0, age_ms, np.nan).astype(np.float32)


def _spill_actions(path: Path, work: Path, numbers: list[int], count: int) -> tuple[Buckets, dict[int, I64]]:
    """Actions of these numbers by item, and the append times of each number's, ascending, mapped from disk."""
    with pq.ParquetFile(path) as file:
        buckets = Buckets(work / "acted", _ACTION, count)
        times = {number: work / f"times-{number}.i64" for number in numbers}
        for times_path in times.values():
            times_path.touch()
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["entity_kind", "entity_id", "action", "append_time_ms", "erase"]):
            kept = batch.filter(pa.array(np.isin(batch["action"], numbers) & ~batch["erase"].to_numpy(zero_copy_only=False)))
            records = np.empty(kept.num_rows, _ACTION)
            columns = {"id": "entity_id", "ms": "append_time_ms", "kind": "entity_kind", "action": "action"}
            for field, column in columns.items():
                records[field] = kept[column].to_numpy()
            buckets.add(item_keys(records["kind"], records["id"]), records)
            for number, times_path in times.items():
                with times_path.open("ab") as out:
                    out.write(records["ms"][records["action"] == number].tobytes())
    return buckets, {number: _mapped(times_path) for number, times_path in times.items()}


def _mapped(path: Path) -> I64:
    if not path.stat().st_size:
        return np.zeros(0, np.int64)
    mapped: I64 = np.asarray(np.memmap(path, np.int64, "r"))
    return mapped


def _spill_impressions(path: Path, work: Path, count: int) -> Buckets:
    """Impressions by item, each with its row, in as many files as the actions."""
    buckets = Buckets(work / "shown", _SHOWN, count)
    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["entity_kind", "entity_id", "request_time_ms"]):
            records = np.empty(batch.num_rows, _SHOWN)
            for field, column in {"id": "entity_id", "ms": "request_time_ms", "kind": "entity_kind"}.items():
                records[field] = batch[column].to_numpy()
            records["row"] = start + np.arange(batch.num_rows)
            start += batch.num_rows
            buckets.add(item_keys(records["kind"], records["id"]), records)
    return buckets

"""Import: published files to canonical Parquet logs (`features.logs`) and feature tables, in bounded memory and from any order of rows.

Four steps. 1. Rows are read in the files' order and spilled to temporary buckets by a hash of the user, so that each user
is whole in one bucket. 2. Each bucket is sorted and becomes actions and impressions: exact duplicates go, impressions become requests,
actions are joined to the impression they answer. 3. The buckets' runs, each sorted by time, are merged into the two files. 4. Item and
user files become a generation of the space `features`.
Memory: about `memory_bytes`, the texts of ids that are strings, and the feature tables. Beyond BUCKETS_MAX buckets (16 times
`memory_bytes` of CSV) a bucket, and with it the memory, grows with the log; so it does for a user with more than a bucket's rows.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from features.domain import Domain, Log
from features.logs import (
    ACTIONS,
    AS_LOGGED,
    IMPRESSIONS,
    LogWriter,
    actions_schema,
    impressions_schema,
    logged_features,
    write_summary,
)
from features.runs import merge_runs, write_run
from features.tables import Member, item_member, write_generation
from streams.buckets import BUCKETS_MAX
from streams.columns import U64, Bools
from streams.counters import add_counters, counters
from streams.negatives import COUNTS, add_negatives
from streams.published import Findings, PublishedError, Reading, log_files, read_rows, read_source, row_schema

FEATURES_SPACE = "features"
_SPILL_ROWS = 1 << 18
_ROW_BYTES = 120
_GZIP_RATIO = 6

I64 = npt.NDArray[np.int64]


def import_log(
    domain: Domain,
    data: str | Path,
    out: str | Path,
    *,
    created_ms: int | None = None,
    tables_root: str | Path | None = None,
    memory_bytes: int = 512 << 20,
    console: Console | None = None,
) -> dict[str, Any]:
    """Imports a published log from the folder `data` into the log folder `out`; returns the summary that summary.json holds.

    `created_ms` names the generation of the feature tables, which go to `tables_root` (out/tables where None). None: the log's greatest
    append time, or now where that is earlier, so that an erasure since hides the user's features also when old files are imported again.
    A `console` gets progress.

    Raises:
        PublishedError: files or columns that are not there, or no row that can be read: correct the [log] part of the domain file.
    """
    data, out = Path(data), Path(out)
    if domain.log is None:
        raise PublishedError(f"domain {domain.name}: has no [log] part, which says how to read a published log")
    out.mkdir(parents=True, exist_ok=True)
    reading = Reading()
    found = _Found([path.name for path in log_files(domain.log, data)])
    work = Path(tempfile.mkdtemp(prefix=".import-", dir=out))
    try:
        with _progress(console) as progress:
            buckets = _spill(domain, data, work, reading, memory_bytes, progress)
            runs = [_fold_bucket(domain, bucket, found, len(buckets), memory_bytes) for bucket in progress("sort", buckets)]
            if not any(run.rows for run in runs):
                raise PublishedError(f"{data}: none of {reading.rows} rows can be read: {reading.rejected.as_json()}")
            written = _merge_all(domain, runs, out, work, memory_bytes, progress)
    finally:
        shutil.rmtree(work)
    summary = _summary(domain, reading, found, written)
    created_ms = min(found.append_time_ms_max, time.time_ns() // 1_000_000) if created_ms is None else created_ms
    summary["tables"] = _import_tables(domain, data, Path(tables_root or out / "tables"), created_ms, summary)
    write_summary(out, summary)
    return summary


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The summary as a table: what was read, what was made of it, what was left out and why."""
    rows = [(name, f"{summary[name]:,}", "") for name in ("rows", "actions", "impressions", "requests")]
    rows += [(f"negatives: {name.replace('_', ' ')}", f"{summary['negatives'][name]:,}", "") for name in COUNTS if "negatives" in summary]
    for kind in ("rejected", "noted"):
        for reason, entry in summary[kind].items():
            rows.append((f"{kind}: {reason}", f"{entry['rows']:,}", "\n".join(entry["examples"][:3])))
    print_table(console, f"import of {summary['domain']}", ("", "rows", "examples"), rows)
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def print_table(console: Console, title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table of texts as they are: ids of a log may look like rich's markup, and a narrow terminal must cut nothing off."""
    table = Table(*(Column(Text(name), overflow="fold") for name in head), title=Text(title), title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


class _Bars:
    """Progress bars, or nothing without a console. Calling it wraps an iteration over a known number of things."""

    def __init__(self, console: Console | None) -> None:
        columns = (TextColumn("{task.description:>6}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=console is None)

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def bar(self, name: str, total: int) -> Callable[[int], None]:
        task = self._progress.add_task(name, total=total)
        return lambda more: self._progress.advance(task, more)

    def __call__(self, name: str, things: list[Path]) -> Iterator[Path]:
        yield from self._progress.track(things, description=name)


_progress = _Bars


class _Found(Findings):
    """Remarks on rows that folding makes, the number of requests, and the greatest append time."""

    def __init__(self, file_names: list[str]) -> None:
        super().__init__()
        self._file_names = file_names
        self.requests = self.append_time_ms_max = 0

    def rows(self, reason: str, rows: dict[str, npt.NDArray[Any]], index: npt.NDArray[np.integer[Any]]) -> None:
        """Counts the rows at `index`, with file and line as examples."""
        self.add(reason, len(index), (f"{self._file_names[int(rows['file'][i])]}:{int(rows['row'][i])}" for i in index))


# 1. Spill


def _spill(domain: Domain, data: Path, work: Path, reading: Reading, memory_bytes: int, bars: _Bars) -> list[Path]:
    """Rows in files by a hash of their user; each bucket is about a sixteenth of `memory_bytes`."""
    assert domain.log is not None
    files = log_files(domain.log, data)
    size_bytes = sum(path.stat().st_size * (_GZIP_RATIO if path.suffix == ".gz" or domain.log.format == "parquet" else 1) for path in files)
    count = min(BUCKETS_MAX, 1 + 16 * size_bytes // memory_bytes)
    paths = [work / f"bucket-{n:03}.arrow" for n in range(count)]
    advance = bars.bar("read", sum(path.stat().st_size for path in files))
    writers = [pa.ipc.new_stream(str(path), row_schema(domain)) for path in paths]
    held: list[pa.Table] = []
    rows = 0
    try:
        for table in read_rows(domain, data, reading, advance):
            held.append(table)
            rows += table.num_rows
            if rows >= _SPILL_ROWS:
                _spill_rows(held, writers)
                held, rows = [], 0
        if held:
            _spill_rows(held, writers)
    finally:
        for writer in writers:
            writer.close()
    return paths


def _spill_rows(held: list[pa.Table], writers: list[Any]) -> None:
    table = pa.concat_tables(held)
    mixed = table["user_id"].to_numpy() * np.uint64(0x9E3779B97F4A7C15)
    bucket = ((mixed >> np.uint64(40)) % np.uint64(len(writers))).astype(np.int64)
    table = table.take(pa.array(np.argsort(bucket, kind="stable")))
    ends = np.cumsum(np.bincount(bucket, minlength=len(writers)))
    for writer, start, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            writer.write_table(table.slice(int(start), int(end - start)))


# 2. One bucket: rows of whole users to actions and impressions


@dataclass(frozen=True)
class _Shown:
    """Impressions of a bucket, in the order of their rows. row: of the bucket; target: the impression that stands for a repeated one."""

    row: I64
    kind: npt.NDArray[np.uint8]
    entity: U64
    position: npt.NDArray[np.int32]
    request: U64
    request_time_ms: I64
    target: I64

    def __len__(self) -> int:
        return len(self.row)


class _Runs(NamedTuple):
    """Sorted results of one bucket, and how many rows both have."""

    actions: Path
    impressions: Path
    rows: int


def _fold_bucket(domain: Domain, bucket: Path, found: _Found, buckets: int, memory_bytes: int) -> _Runs:
    """Writes the bucket's two runs, sorted as the log's files are."""
    assert domain.log is not None
    with pa.ipc.open_stream(str(bucket)) as stream:
        table = _without_duplicates(stream.read_all(), found)
    bucket.unlink()
    rows = {name: table[name].to_numpy() for name in table.column_names if pa.types.is_primitive(table[name].type)}
    impression_bits, action_bits = _rule_bits(domain, domain.log, "impression"), _rule_bits(domain, domain.log, "other")
    if domain.log.negatives is not None:  # each click is a request of its own item; the others are drawn when all is merged
        impression_bits = _bits_by_action(domain, domain.log)[domain.actions[domain.log.negatives.action].id]
    shown = _shown(domain.log, table, rows, impression_bits, found)
    acting = np.flatnonzero(rows["rules"] & action_bits)
    answered, row_request = _attribute(domain.log, rows, shown, acting, found)
    labels = _labels(domain, domain.log, rows, acting, answered)
    actions = _actions(domain, domain.log, rows, shown, row_request, found)
    impressions = _impressions(domain, table, rows, shown, labels)
    found.requests += len(np.unique(shown.request))
    found.append_time_ms_max = int(rows["append_time_ms"].max(initial=found.append_time_ms_max))
    batch_rows = max(1 << 12, memory_bytes // (4 * _ROW_BYTES * buckets))
    runs = _Runs(bucket.with_suffix(".actions"), bucket.with_suffix(".impressions"), actions.num_rows + impressions.num_rows)
    write_run(runs.actions, actions, "append_time_ms", batch_rows)
    write_run(runs.impressions, impressions, "request_time_ms", batch_rows)
    return runs


def _rule_bits(domain: Domain, log: Log, kind: str) -> np.uint64:
    is_impression = (domain.actions[rule.action].kind == "impression" for rule in log.actions)
    return np.uint64(sum(1 << n for n, found in enumerate(is_impression) if found == (kind == "impression")))


def _without_duplicates(table: pa.Table, found: _Found) -> pa.Table:
    """Rows by user and time, exact duplicates left out. Ties have one order whatever the order of the input."""
    names = (
        "user_id",
        "time_ms",
        "entity_kind",
        "entity_id",
        "rules",
        "append_time_ms",
        "event_id",
        "request",
        "position",
        "surface",
        "shown",
    )
    keys = [table[name].to_numpy() for name in names] + [table["value"].to_numpy().view(np.uint32)]
    order = np.lexsort((table["row"].to_numpy(), table["file"].to_numpy(), *reversed(keys)))
    again = np.zeros(len(order), bool)
    again[1:] = _equal_to_previous([key[order] for key in keys])
    found.rows("row: an exact duplicate, dropped", {name: table[name].to_numpy() for name in ("file", "row")}, order[again])
    return table.take(pa.array(order[~again])).combine_chunks()


def _equal_to_previous(keys: Seq[npt.NDArray[Any]]) -> Bools:
    equal: Bools = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    return equal


def _shown(log: Log, table: pa.Table, rows: dict[str, npt.NDArray[Any]], impression_bits: np.uint64, found: _Found) -> _Shown:
    """Impressions and their requests."""
    if log.candidates is None:
        row = np.flatnonzero(rows["rules"] & impression_bits)
        entity, position = rows["entity_id"][row], rows["position"][row]
    else:
        offsets = table["candidates"].combine_chunks().offsets.to_numpy()
        lengths = np.diff(offsets)
        row = np.repeat(np.arange(len(lengths)), lengths)
        entity = table["candidates"].combine_chunks().values.to_numpy()
        position = (np.arange(len(row)) - np.repeat(offsets[:-1] - offsets[0], lengths)).astype(np.int32)
    user, time_ms = rows["user_id"][row], rows["time_ms"][row]
    if log.request is not None:
        request = rows["request"][row]
        found.rows("impression: without a request; kept as an action only", rows, row[request == 0])
        row, entity, position, request = (values[request != 0] for values in (row, entity, position, request))
        _, first, inverse = np.unique(request, return_index=True, return_inverse=True)
        request_time_ms = rows["time_ms"][row][first][inverse]
    else:
        gap_ms = log.request_gap_ms if log.candidates is None and log.negatives is None else 1
        begins = np.ones(len(row), bool)
        begins[1:] = (user[1:] != user[:-1]) | (time_ms[1:] - time_ms[:-1] >= gap_ms)
        group = np.cumsum(begins) - 1
        request_time_ms = time_ms[begins][group]
        request = _hash_pairs(user[begins], time_ms[begins])[group]
    kind = rows["entity_kind"][row]
    target = np.arange(len(row))
    order = np.lexsort((target, entity, kind, request))
    begins = np.ones(len(row), bool)
    begins[1:] = ~_equal_to_previous([key[order] for key in (request, kind, entity)])
    target[order] = order[begins][np.cumsum(begins) - 1] if len(row) else order
    found.rows("impression: of an item that the request has already; one candidate", rows, row[order[~begins]])
    return _Shown(row, kind, entity, position, request, request_time_ms, target)


def _hash_pairs(users: U64, times_ms: I64) -> U64:
    """Request ids of requests made by gap: xxh3-64 of user and first impression time, 8 little-endian bytes each; never 0."""
    pairs = np.stack([users.astype("<u8"), times_ms.astype("<u8")], axis=1).tobytes()
    return np.fromiter((xxhash.xxh3_64_intdigest(pairs[16 * i : 16 * i + 16]) or 1 for i in range(len(users))), np.uint64, len(users))


def _attribute(log: Log, rows: dict[str, npt.NDArray[Any]], shown: _Shown, acting: I64, found: _Found) -> tuple[I64, U64]:
    """The impression that each acting row answers (-1: none), and the request id of every row (0: none).

    A row that is an impression itself answers itself. Another one with a request answers that request's impression of its item, at any
    time; where the log has no requests, the latest impression of the same user and item within request_gap_ms.
    """
    n = len(rows["user_id"])
    own = np.full(n, -1, np.int64)
    if log.candidates is None:
        own[shown.row] = np.arange(len(shown))
    row_request = rows["request"].copy()
    row_request[shown.row] = shown.request
    answered = own[acting]
    others = np.flatnonzero(answered < 0)
    other_rows = acting[others]
    shown_keys: list[npt.NDArray[Any]] = [shown.kind, shown.entity]
    other_keys = [rows["entity_kind"][other_rows], rows["entity_id"][other_rows]]
    if log.request is not None or log.candidates is not None:
        latest = _latest([shown.request, *shown_keys], [row_request[other_rows], *other_keys], None, None)
        latest[row_request[other_rows] == 0] = -1
    else:
        shown_times, other_times = rows["time_ms"][shown.row], rows["time_ms"][other_rows]
        latest = _latest([rows["user_id"][shown.row], *shown_keys], [rows["user_id"][other_rows], *other_keys], shown_times, other_times)
        if len(shown):
            latest[other_times - shown_times[latest] >= log.request_gap_ms] = -1
            row_request[other_rows] = np.where(latest >= 0, shown.request[latest], 0)
    answered[others] = latest
    if len(shown):
        found.rows("action: answers no impression", rows, other_rows[latest < 0])
    return np.where(answered >= 0, shown.target[answered], -1) if len(shown) else answered, row_request


def _latest(left: Seq[npt.NDArray[Any]], right: Seq[npt.NDArray[Any]], left_times: I64 | None, right_times: I64 | None) -> I64:
    """For each right row the index of the last left row with equal keys and a time not after its own (-1: none)."""
    n, m = len(left[0]), len(right[0])
    keys = [np.concatenate(pair) for pair in zip(left, right, strict=True)]
    times = np.zeros(n + m, np.int64) if left_times is None or right_times is None else np.concatenate([left_times, right_times])
    is_right = np.arange(n + m) >= n
    order = np.lexsort((np.arange(n + m), is_right, times, *reversed(keys)))
    begins = np.ones(n + m, bool)
    begins[1:] = ~_equal_to_previous([key[order] for key in keys])
    place = np.arange(n + m)
    last_left = np.maximum.accumulate(np.where(is_right[order], -1, place))
    group_start = np.maximum.accumulate(np.where(begins, place, 0))
    found = np.where(last_left >= group_start, order[last_left], -1)
    result = np.empty(n + m, np.int64)
    result[order] = found
    return result[n:]


def _bits_by_action(domain: Domain, log: Log) -> dict[int, np.uint64]:
    bits: dict[int, int] = {}
    for n, rule in enumerate(log.actions):
        number = domain.actions[rule.action].id
        bits[number] = bits.get(number, 0) | 1 << n
    return {number: np.uint64(mask) for number, mask in sorted(bits.items())}


def _labels(domain: Domain, log: Log, rows: dict[str, npt.NDArray[Any]], acting: I64, answered: I64) -> tuple[I64, npt.NDArray[np.uint8]]:
    """(impression, action id) of each label, ascending and distinct."""
    impressions = {action.id for action in domain.actions.values() if action.kind == "impression"}
    pairs = [np.zeros(0, np.int64)]
    for number, mask in _bits_by_action(domain, log).items():
        if number not in impressions:
            with_action = answered[(rows["rules"][acting] & mask != 0) & (answered >= 0)]
            pairs.append(with_action * 256 + number)
    distinct = np.unique(np.concatenate(pairs))
    return distinct // 256, (distinct % 256).astype(np.uint8)


def _actions(domain: Domain, log: Log, rows: dict[str, npt.NDArray[Any]], shown: _Shown, row_request: U64, found: _Found) -> pa.Table:
    """The bucket's actions in the order of the log."""
    impressions = {action.id for action in domain.actions.values() if action.kind == "impression"}
    parts: list[tuple[I64, npt.NDArray[np.uint8], U64, npt.NDArray[np.uint8]]] = []
    for number, mask in _bits_by_action(domain, log).items():
        if log.candidates is not None and number in impressions:
            chosen = np.flatnonzero(rows["rules"][shown.row] & mask)
            row, kind, entity = shown.row[chosen], shown.kind[chosen], shown.entity[chosen]
        else:
            row = np.flatnonzero(rows["rules"] & mask)
            kind, entity = rows["entity_kind"][row], rows["entity_id"][row]
        parts.append((row, kind, entity, np.full(len(row), number, np.uint8)))
    row, kind, entity, action = (np.concatenate([part[n] for part in parts]) for n in range(4))
    columns = {
        "user_id": rows["user_id"][row],
        "entity_kind": kind,
        "entity_id": entity,
        "action": action,
        "event_time_ms": rows["time_ms"][row],
        "request_id": row_request[row],
        "surface": rows["surface"][row],
        "value": rows["value"][row],
        "append_time_ms": rows["append_time_ms"][row],
    }
    columns["event_id"] = _event_ids(log, columns, rows["event_id"][row], row)
    order = np.lexsort((np.arange(len(row)), *(columns[name] for name in ("event_id", "event_time_ms", "user_id", "append_time_ms"))))
    again = np.zeros(len(row), bool)
    by_id = np.lexsort((order.argsort(), columns["event_id"], columns["user_id"]))
    again[by_id[1:]] = _equal_to_previous([columns[name][by_id] for name in ("user_id", "event_id")])
    found.rows("event_id: the user has it already; the first counts", rows, row[again])
    kept = order[~again[order]]
    n = len(kept)
    table = {name: column[kept] for name, column in columns.items()}
    table |= {"log_epoch": np.zeros(n, np.uint64), "partition": np.full(n, -1, np.int32), "offset": np.full(n, -1, np.int64)}
    table["erase"] = np.zeros(n, bool)
    return pa.table([table[name] for name in actions_schema(domain).names], schema=actions_schema(domain))


def _event_ids(log: Log, columns: dict[str, npt.NDArray[Any]], given: U64, row: I64) -> U64:
    """`derived_event_id` of each action. Where the log has event ids: its id, mixed with item and action where a row is several."""
    if log.event_id is None:
        fields = [("user_id", "<u8"), ("entity_id", "<u8"), ("event_time_ms", "<u8"), ("entity_kind", "u1"), ("action", "u1")]
    else:
        fields = [("given", "<u8"), ("entity_id", "<u8"), ("entity_kind", "u1"), ("action", "u1")]
    packed = np.empty(len(row), np.dtype(fields))
    for name, _ in fields:
        packed[name] = given if name == "given" else columns[name]
    data, width = packed.tobytes(), packed.dtype.itemsize
    derived = np.fromiter((xxhash.xxh3_64_intdigest(data[i : i + width]) for i in range(0, len(data), width)), np.uint64, len(row))
    if log.event_id is None:
        return derived
    return np.where(np.bincount(row, minlength=1)[row] == 1, given, derived) if len(row) else derived


def _impressions(
    domain: Domain, table: pa.Table, rows: dict[str, npt.NDArray[Any]], shown: _Shown, labels: tuple[I64, npt.NDArray[np.uint8]]
) -> pa.Table:
    """The bucket's impressions, rows of a request together, in the order of the log. Request features are those of its first row."""
    place = np.arange(len(shown))
    kept = np.flatnonzero(shown.target == place)
    kept = kept[np.lexsort((kept, shown.position[kept], shown.request[kept], shown.request_time_ms[kept]))]
    rank = np.full(len(shown), -1, np.int64)
    rank[kept] = np.arange(len(kept))
    of, numbers = rank[labels[0]], labels[1]
    order = np.lexsort((numbers, of))
    ends = np.concatenate([[0], np.cumsum(np.bincount(of, minlength=len(kept)))]).astype(np.int32)
    row = shown.row[kept]
    columns: list[Any] = [
        shown.request[kept],
        rows["user_id"][row],
        shown.request_time_ms[kept],
        shown.position[kept],
        rows["surface"][row],
        shown.kind[kept],
        shown.entity[kept],
        pa.ListArray.from_arrays(pa.array(ends), pa.array(numbers[order])),
        *([np.full(len(row), AS_LOGGED, np.uint8)] * domain.draws_negatives),
    ]
    begins = np.ones(len(kept), bool)
    begins[1:] = shown.request[kept][1:] != shown.request[kept][:-1]
    first_row = row[begins][np.cumsum(begins) - 1] if len(row) else row
    per_candidate = domain.log is not None and domain.log.candidates is not None
    for name in logged_features(domain):
        if domain.features[name].counter is not None:
            columns.append(np.full(len(row), np.nan, np.float32))  # counted when all is merged
            continue
        column = table[f"feature.{name}"].combine_chunks()
        if domain.features[name].side == "request":
            column = column.take(pa.array(first_row))
        elif per_candidate:
            starts = column.offsets.to_numpy()[row]
            column = column.values.take(pa.array(starts + shown.position[kept]))
        else:
            column = column.take(pa.array(row))
        columns.append(column)
    return pa.table(columns, schema=impressions_schema(domain))


# 3. Merge


def _merge_all(domain: Domain, runs: list[_Runs], out: Path, work: Path, memory_bytes: int, bars: _Bars) -> dict[str, Any]:
    """Writes the log's two files; impressions go through negatives and counters where the domain file asks for these."""
    advance = bars.bar("write", sum(run.rows for run in runs))
    with LogWriter(out, ACTIONS, actions_schema(domain)) as writer:
        _merge([run.actions for run in runs], ("append_time_ms", "user_id", "event_time_ms", "event_id"), writer, advance)
        written: dict[str, Any] = {"actions": writer.rows}
    draws, counts = domain.draws_negatives, bool(counters(domain))
    merged = work / "merged" if draws or counts else out
    with LogWriter(merged, IMPRESSIONS, impressions_schema(domain)) as writer:
        _merge([run.impressions for run in runs], ("request_time_ms", "request_id"), writer, advance)
        rows = writer.rows
    if draws:
        sampled = work / "sampled" if counts else out
        arguments = (memory_bytes, bars.bar("draw", rows))
        written["negatives"] = add_negatives(domain, out / ACTIONS, merged, sampled, work / "draw", *arguments)
        merged, rows = sampled, pq.read_metadata(sampled / IMPRESSIONS).num_rows
    if counts:
        add_counters(domain, out / ACTIONS, merged, out, work / "count", memory_bytes, bars.bar("count", rows))
    return written | {"impressions": rows}


def _merge(runs: list[Path], keys: tuple[str, ...], writer: LogWriter, advance: Callable[[int], None]) -> None:
    for table in merge_runs(runs, keys):
        writer.write(table)
        advance(table.num_rows)


# 4. Tables and summary


def _import_tables(domain: Domain, data: Path, root: Path, created_ms: int, summary: dict[str, Any]) -> dict[str, Any]:
    """Writes the item and user features as one generation; says where, and how many rows each member has."""
    log = domain.log
    assert log is not None
    sources = {item_member(kind): (source, "item") for kind, source in log.items.items()}
    if log.users is not None:
        sources["user"] = (log.users, "user")
    members: dict[str, Member] = {}
    for name, (source, side) in sources.items():
        reading = Reading()
        ids, features = read_source(domain, source, side, data, reading)
        count = len(ids)
        ids, first = np.unique(ids, return_index=True)
        reading.noted.add("id is there twice; the first row counts", count - len(ids))
        members[name] = Member(ids=ids, features={feature: values[first] for feature, values in features.items()})
        for kind in ("rejected", "noted"):
            summary[kind] |= {f"{name}: {reason}": entry for reason, entry in getattr(reading, kind).as_json().items()}
    if not members:
        return {}
    folder = write_generation(root, FEATURES_SPACE, created_ms, members)
    return {"space": FEATURES_SPACE, "generation": folder.name, "rows": {name: len(member.ids) for name, member in members.items()}}


def _summary(domain: Domain, reading: Reading, found: _Found, written: dict[str, Any]) -> dict[str, Any]:
    for reason, count in found.counts.items():
        reading.noted.add(reason, count, found.examples[reason])
    collided = reading.collisions.found
    reading.noted.add("id: two texts share one hash", len(collided), (f"{a!r} and {b!r} are both {hashed}" for hashed, a, b in collided))
    notes = []
    if sampled := written.get("negatives"):
        kinds = " and ".join(
            f"{sampled[kind]} {name}" for kind, name in (("uniform", "uniform"), ("popular", "popularity-matched")) if sampled[kind]
        )
        hours = sampled["window_ms"] / 3_600_000
        notes.append(
            f"candidates are sampled, not served: for each {sampled['action']} up to {kinds} negatives from the {hours:g} h before it, "
            f"seed {sampled['seed']}; a metric of such requests compares models, and says nothing about the product"
        )
        found.requests = sampled["requests"]
    if not written["impressions"]:
        notes.append(
            "the log has no impressions (no rule for an impression action, no candidates): it gives sequences but no examples to train on"
        )
    return {
        "domain": domain.name,
        "domain_version": domain.version,
        "rows": reading.rows,
        **written,
        "requests": found.requests,
        "rejected": reading.rejected.as_json(),
        "noted": reading.noted.as_json(),
        "notes": notes,
    }

"""Canonical Parquet logs: what training, replay and the demo read, whatever the log was before.

A log folder has `actions.parquet` (every action and erasure, in the order of the log), `impressions.parquet` (every candidate of every
request with its labels and request and candidate features) and `summary.json` (where it came from and what was rejected).
Files are written under another name and renamed when whole, so a reader never sees half of one.

A served log, which `freshrank label` makes of what was served, has a third table, `served` (how each request was served, one row a
request), and each table in parts: files of their own, in the order of their names, that summary.json lists. So a new summary.json is a
new log, at once.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.actions import EVENT_DTYPE
from features.domain import Domain, Feature
from features.sequence import Events

LOG_VERSION = "1"
ACTIONS, IMPRESSIONS, SERVED, SUMMARY = "actions.parquet", "impressions.parquet", "served.parquet", "summary.json"
PACKED = "packed"
"""Below a log folder: training arrays of its requests, a folder each, whose meta.json names the ledger that they were packed under."""
ORDERS = ("append_time", "offset")

_EVENT_TYPES = {
    "entity_kind": pa.uint8(),
    "entity_id": pa.uint64(),
    "action": pa.uint8(),
    "event_time_ms": pa.int64(),
    "event_id": pa.uint64(),
    "request_id": pa.uint64(),
    "surface": pa.uint16(),
    "value": pa.float32(),
}
WEIGHTED = pa.struct([("id", pa.uint64()), ("weight", pa.float32())])
_FEATURE_TYPES = {"number": pa.float32(), "category": pa.uint64(), "list": pa.list_(pa.uint64()), "weighted_list": pa.list_(WEIGHTED)}


class LogError(ValueError):
    """A log folder that cannot be read or written; names the file, what was found and what was expected."""


class FeatureColumn(NamedTuple):
    """One request or candidate feature of n rows.

    number: values float32 [n], NaN missing; vector: float32 [n, dimension]; category: uint64 [n], xxh3-64 of the text, 0 missing; list:
    uint64 [sum of lengths] with lengths int32 [n] (None for the others); weighted_list: with weights float32 [sum of lengths] as well.
    """

    values: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32] | None
    weights: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class LoggedActions:
    """Consecutive records of the log. One entry a record in each array.

    users uint64; events EVENT_DTYPE (zeros where erase, except event_id); append_time_ms int64; erase bool;
    log_epoch uint64, partition int32, offset int64: 0, -1, -1 where the log does not come from Kafka.
    """

    users: npt.NDArray[np.uint64]
    events: npt.NDArray[np.void]
    append_time_ms: npt.NDArray[np.int64]
    log_epoch: npt.NDArray[np.uint64]
    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    erase: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.users)

    @classmethod
    def imported(cls, users: npt.NDArray[np.uint64], events: npt.NDArray[np.void], append_time_ms: npt.NDArray[np.int64]) -> Self:
        """Actions that come from no Kafka log."""
        n = len(users)
        place = np.zeros(n, np.uint64), np.full(n, -1, np.int32), np.full(n, -1, np.int64)
        return cls(users, events, append_time_ms, *place, np.zeros(n, bool))


@dataclass(frozen=True)
class Served:
    """How r requests were served: a table of r rows with the columns of `served_schema`, in the order of the requests."""

    table: pa.Table

    def take(self, requests: npt.NDArray[np.int64]) -> Self:
        """Those of some requests."""
        return type(self)(self.table.take(pa.array(requests)))

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column that is no list: [r]."""
        column: npt.NDArray[Any] = self.table[name].to_numpy()
        return column

    def lists(self, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """A column of lists: (values [sum], the request of each int64 [sum])."""
        column = self.table[name].combine_chunks()
        offsets = column.offsets.to_numpy()
        return column.values.to_numpy()[offsets[0] : offsets[-1]], np.repeat(np.arange(len(column)), np.diff(offsets))

    def sequences(self) -> tuple[Events, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Every request's sequence: (events, starts int64 [r + 1], erased_before_ms int64 [r]), as `pack()` got them."""
        column = self.table["events"].combine_chunks()
        offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1].astype(np.int64)
        data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        return data.view(EVENT_DTYPE), (offsets - offsets[0]) // EVENT_DTYPE.itemsize, self.column("erased_before_ms")


@dataclass(frozen=True)
class LoggedRequests:
    """Whole requests, in the order of request_time_ms. r requests hold n rows (candidates).

    starts int64 [r + 1]: request i has the rows starts[i]:starts[i + 1]. request_id, user_id uint64 [r], request_time_ms int64 [r],
    surface uint16 [r]. entity_kind uint8 [n], entity_id uint64 [n], position int32 [n] (-1 unknown).
    labels uint8 [sum], label_starts int64 [n + 1]: ids of the actions that answered each row, ascending.
    features: the request and candidate features of each row by name (a request feature repeats over its request's rows).
    Of a served log also: seen bool [n], whether the user saw the row, and how each request was served; None otherwise.
    Of a log with sampled negatives: drawn uint8 [n], AS_LOGGED, UNIFORM or POPULAR. It tells the label: never an input.
    """

    starts: npt.NDArray[np.int64]
    request_id: npt.NDArray[np.uint64]
    user_id: npt.NDArray[np.uint64]
    request_time_ms: npt.NDArray[np.int64]
    surface: npt.NDArray[np.uint16]
    entity_kind: npt.NDArray[np.uint8]
    entity_id: npt.NDArray[np.uint64]
    position: npt.NDArray[np.int32]
    labels: npt.NDArray[np.uint8]
    label_starts: npt.NDArray[np.int64]
    features: dict[str, FeatureColumn]
    seen: npt.NDArray[np.bool_] | None = None
    served: Served | None = None
    drawn: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.request_id)

    def label(self, action_id: int) -> npt.NDArray[np.bool_]:
        """Rows that were answered with this action: bool [n]."""
        found = np.zeros(len(self.entity_id), bool)
        rows = np.repeat(np.arange(len(self.entity_id)), np.diff(self.label_starts))
        found[rows[self.labels == action_id]] = True
        return found


def actions_schema(domain: Domain, *, order: str = "append_time") -> pa.Schema:
    """Columns of actions.parquet. `order` is what the rows are sorted by: append_time, or offset (that is, partition and offset)."""
    if order not in ORDERS:
        raise LogError(f"order: {order!r} is not one of {', '.join(ORDERS)}")
    fields = [
        ("user_id", pa.uint64()),
        *_EVENT_TYPES.items(),
        ("append_time_ms", pa.int64()),
        ("log_epoch", pa.uint64()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("erase", pa.bool_()),
    ]
    return _schema(fields, domain, order)


_DRAWN = "drawn"


AS_LOGGED, UNIFORM, POPULAR = 0, 1, 2
"""How a candidate came into a log: as it was, or drawn by the importer by item or by popularity."""


def impressions_schema(domain: Domain, *, served: bool = False) -> pa.Schema:
    """Columns of impressions.parquet; request and candidate features follow the fixed ones under their own names. `served`: with `seen`.
    Where the domain file asks for negatives, an imported log has `drawn`; logs from before it are read without.
    """
    fields = [
        ("request_id", pa.uint64()),
        ("user_id", pa.uint64()),
        ("request_time_ms", pa.int64()),
        ("position", pa.int32()),
        ("surface", pa.uint16()),
        ("entity_kind", pa.uint8()),
        ("entity_id", pa.uint64()),
        ("labels", pa.list_(pa.uint8())),
        *([("seen", pa.bool_())] * served),
        *([(_DRAWN, pa.uint8())] * (domain.draws_negatives and not served)),
    ]
    for name in logged_features(domain):
        if name in {field for field, _ in fields}:
            raise LogError(f"features.{name}: the name of a fixed column of impressions.parquet; call the feature otherwise")
        fields.append((name, feature_type(domain.features[name])))
    return _schema(fields, domain, "request_time")


def served_schema(domain: Domain) -> pa.Schema:
    """Columns of the table `served`: one row a request, of which its impressions are in the same order.

    generations: JSON, by space. tier, sequence_source: numbers of the proto. who: user_id and the further identities; log_epoch and
    offset_read: each one's watermark, 0 and -1 for none. row_digest, digest: as logged. events: EVENT_DTYPE bytes and erased_before_ms, as
    `pack()` got them. labels: how many the request's candidates have together.
    """
    fields = [
        ("request_id", pa.uint64()),
        ("user_id", pa.uint64()),
        ("request_time_ms", pa.int64()),
        ("served_time_ms", pa.int64()),
        ("ranker", pa.string()),
        ("release_id", pa.string()),
        ("generations", pa.string()),
        ("tier", pa.uint8()),
        ("sequence_source", pa.uint8()),
        ("experiment", pa.string()),
        ("arm", pa.string()),
        ("shuffle_bound", pa.uint32()),
        ("who", pa.list_(pa.uint64())),
        ("log_epoch", pa.list_(pa.uint64())),
        ("offset_read", pa.list_(pa.int64())),
        ("row_digest", pa.uint64()),
        ("digest", pa.binary()),
        ("events", pa.binary()),
        ("erased_before_ms", pa.int64()),
        ("labels", pa.uint32()),
    ]
    return _schema(fields, domain, "request_time")


def feature_type(feature: Feature) -> pa.DataType:
    """A feature's type as a column of impressions.parquet."""
    return pa.list_(pa.float32(), feature.dimension) if feature.kind == "vector" else _FEATURE_TYPES[feature.kind]


def logged_features(domain: Domain) -> tuple[str, ...]:
    """Features that stand in the impressions: those of the sides request and candidate, in the domain file's order."""
    return tuple(name for name, feature in domain.features.items() if feature.side in ("request", "candidate"))


def _schema(fields: list[tuple[str, pa.DataType]], domain: Domain, order: str) -> pa.Schema:
    metadata = {"freshrank.log_version": LOG_VERSION, "freshrank.domain": domain.name, "freshrank.order": order}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=metadata)


class LogWriter:
    """Writes one file of a log folder in row groups; a context manager that leaves no file when its block raises."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, *, row_group_rows: int = 1 << 17) -> None:
        """`name` is ACTIONS or IMPRESSIONS, or a part's."""
        folder.mkdir(parents=True, exist_ok=True)
        self._final, self._partial = folder / name, folder / f".{name}.part"
        self._schema, self._row_group_rows = schema, row_group_rows
        self._writer = pq.ParquetWriter(self._partial, schema, compression="zstd")
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._last: tuple[int, ...] | None = None
        order = schema.metadata[b"freshrank.order"].decode()
        self._keys = {
            "append_time": ("append_time_ms",),
            "offset": ("partition", "offset"),
            "request_time": ("request_time_ms", "request_id"),
        }[order]
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is None:
            self._partial.replace(self._final)
        else:
            self._partial.unlink(missing_ok=True)

    def write(self, table: pa.Table) -> None:
        """Appends rows, which continue the order of the file.

        Raises:
            LogError: rows out of order: sort them first.
        """
        if table.num_rows:
            table = table.select(self._schema.names).cast(self._schema)
            self._check_order(table)
            self._append(table)

    def copy(self, path: Path) -> None:
        """Appends the rows of another file of the same table as they stand there; behind them the order begins anew."""
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=self._schema.names):
                self._append(pa.Table.from_batches([batch]).cast(self._schema))
        self._last = None

    def _append(self, table: pa.Table) -> None:
        self._pending.append(table)
        self._pending_rows += table.num_rows
        self.rows += table.num_rows
        if self._pending_rows >= self._row_group_rows:
            self._flush()

    def write_actions(self, actions: LoggedActions) -> None:
        """`write` of records as they are read."""
        columns = {"user_id": actions.users, **{name: actions.events[name] for name in _EVENT_TYPES}}
        for name in ("append_time_ms", "log_epoch", "partition", "offset", "erase"):
            columns[name] = getattr(actions, name)
        self.write(pa.table({name: np.ascontiguousarray(column) for name, column in columns.items()}))

    def _check_order(self, table: pa.Table) -> None:
        keys = [table[name].to_numpy() for name in self._keys]
        if self._last is not None:
            keys = [np.concatenate([np.array([last], key.dtype), key]) for last, key in zip(self._last, keys, strict=True)]
        tied, wrong = np.ones(len(keys[0]) - 1, bool), np.zeros(len(keys[0]) - 1, bool)
        for key in keys:
            wrong |= tied & (key[1:] < key[:-1])
            tied &= key[1:] == key[:-1]
        if wrong.any():
            at = int(np.argmax(wrong))
            raise LogError(f"{self._final}: rows are out of order of {', '.join(self._keys)} at {[int(key[at + 1]) for key in keys]}")
        self._last = tuple(int(key[-1]) for key in keys)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending), row_group_size=self._row_group_rows)
        self._pending, self._pending_rows = [], 0


def read_actions(folder: str | Path, domain: Domain, *, batch_rows: int = 1 << 16) -> Iterator[LoggedActions]:
    """The log's records in its order, a bounded batch at a time.

    Raises:
        LogError: no such log, another version, or another domain.
    """
    schema = actions_schema(domain)
    with _opened(folder, domain, {ACTIONS: schema}) as (files,):
        for batch in _batches(files, schema.names, batch_rows):
            n = batch.num_rows
            events = np.zeros(n, EVENT_DTYPE)
            for name in _EVENT_TYPES:
                events[name] = _array(batch, name)
            value = events["value"]
            value[np.isnan(value)] = np.float32(np.nan)
            rest = (_array(batch, name) for name in ("append_time_ms", "log_epoch", "partition", "offset", "erase"))
            yield LoggedActions(_array(batch, "user_id"), events, *rest)


def read_requests(folder: str | Path, domain: Domain, *, batch_rows: int = 1 << 16) -> Iterator[LoggedRequests]:
    """The log's requests in the order of their time, whole: a batch ends between requests and is about `batch_rows` long.

    Raises:
        LogError: no such log, another version, another domain, or one written before a feature was added to the domain file.
    """
    is_served = is_served_log(folder)
    schema = impressions_schema(domain, served=is_served)
    draws = domain.draws_negatives and not is_served
    if draws:  # a log from before the column has none
        schema = schema.remove(schema.get_field_index(_DRAWN))
    tables = {IMPRESSIONS: schema}
    if is_served:
        tables[SERVED] = served_schema(domain)
    held: pa.Table | None = None
    with _opened(folder, domain, tables) as (files, *of_served):
        # A row of `served` is as large as a hundred of a candidate's.
        served = _ServedRows(_batches(of_served[0], tables[SERVED].names, 1 + batch_rows // 100)) if is_served else None
        columns = [*schema.names, *[_DRAWN] * (draws and all(_DRAWN in file.schema_arrow.names for file in files))]
        for batch in _batches(files, columns, batch_rows):
            table = pa.Table.from_batches([batch])
            if held is None or not held.num_rows:
                held = table
                continue
            last = [held[name][-1].as_py() for name in _REQUEST_KEY]
            others = np.flatnonzero(np.any([_array(batch, name) != key for name, key in zip(_REQUEST_KEY, last, strict=True)], axis=0))
            cut = int(others[0]) if len(others) else table.num_rows  # rows of the request that the batch before has begun
            held = pa.concat_tables([held, table.slice(0, cut)])
            if cut < table.num_rows:
                yield _requests(held, domain, served)
                held = table.slice(cut)
        if held is not None and held.num_rows:
            yield _requests(held, domain, served)


_REQUEST_KEY = ("request_time_ms", "request_id", "user_id")
"""What requests are sorted by. A request id alone is the caller's, and may come again."""


class _ServedRows:
    """The rows of `served` beside requests that are read in their order. An erasure that was cut off may leave some without a request."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._held: list[pa.Table] = []

    def of(self, keys: list[tuple[int, ...]]) -> Served:
        """Those of the next requests, which have these keys. Raises LogError: one is not there."""
        while not self._held or _key_of_row(self._held[-1], -1) < keys[-1]:
            batch = next(self._batches, None)
            if batch is None:
                break
            if batch.num_rows:
                self._held.append(pa.Table.from_batches([batch]))
        if not self._held:
            raise LogError(f"request {keys[0]}: has no row in `served`; label again with --rebuild")
        table = pa.concat_tables(self._held)
        place = {key: row for row, key in enumerate(zip(*(table[name].to_pylist() for name in _REQUEST_KEY), strict=True))}
        try:
            rows = [place[key] for key in keys]
        except KeyError as error:
            raise LogError(f"request {error}: has no row in `served`; label again with --rebuild") from error
        self._held = [table.slice(rows[-1] + 1)] if rows[-1] + 1 < table.num_rows else []
        return Served(table.take(pa.array(rows)).combine_chunks())


def _key_of_row(table: pa.Table, row: int) -> tuple[int, ...]:
    return tuple(table[name][row].as_py() for name in _REQUEST_KEY)


def _requests(table: pa.Table, domain: Domain, served: _ServedRows | None) -> LoggedRequests:
    batch = table.combine_chunks().to_batches()[0]
    time_ms, ids, users = (_array(batch, name) for name in _REQUEST_KEY)
    begins = np.ones(len(ids), bool)
    begins[1:] = (ids[1:] != ids[:-1]) | (users[1:] != users[:-1]) | (time_ms[1:] != time_ms[:-1])
    first = np.flatnonzero(begins)
    labels, label_lengths = _lists(batch, "labels")
    features: dict[str, FeatureColumn] = {}
    for name in logged_features(domain):
        kind = domain.features[name].kind
        if kind == "list":
            features[name] = FeatureColumn(*_lists(batch, name))
        elif kind == "weighted_list":
            features[name] = _weighted(batch.column(name))
        elif kind == "vector":
            values = batch.column(name).flatten().to_numpy()
            features[name] = FeatureColumn(values.reshape(-1, domain.features[name].dimension), None)
        else:
            features[name] = FeatureColumn(_array(batch, name), None)
    keys = list(zip(*(key[first].tolist() for key in (time_ms, ids, users)), strict=True))
    return LoggedRequests(
        starts=np.append(first, len(ids)).astype(np.int64),
        request_id=ids[first],
        user_id=users[first],
        request_time_ms=time_ms[first],
        surface=_array(batch, "surface")[first],
        entity_kind=_array(batch, "entity_kind"),
        entity_id=_array(batch, "entity_id"),
        position=_array(batch, "position"),
        labels=labels,
        label_starts=np.concatenate([[0], np.cumsum(label_lengths, dtype=np.int64)]).astype(np.int64),
        features=features,
        seen=None if served is None else _array(batch, "seen"),
        served=None if served is None else served.of(keys),
        drawn=_array(batch, _DRAWN) if domain.draws_negatives and served is None and _DRAWN in batch.schema.names else None,
    )


def _parts(folder: str | Path) -> dict[str, list[str]]:
    """Files of each table of a served log; nothing of another one."""
    try:
        parts: dict[str, list[str]] = json.loads(Path(folder, SUMMARY).read_text("utf-8")).get("parts", {})
    except FileNotFoundError:
        return {}
    return parts


def is_served_log(folder: str | Path) -> bool:
    """Whether the log was made by `freshrank label`: its requests say how they were served."""
    return SERVED in _parts(folder)


def log_files(folder: str | Path, name: str) -> list[Path]:
    """The files of a table (ACTIONS, IMPRESSIONS, SERVED) in their order: its parts, or the one file of a log without parts."""
    return _paths(folder, _parts(folder), name)


def _paths(folder: str | Path, parts: Mapping[str, list[str]], name: str) -> list[Path]:
    return [Path(folder, part) for part in (parts.get(name, []) if parts else [name])]


@contextmanager
def _opened(folder: str | Path, domain: Domain, tables: Mapping[str, pa.Schema]) -> Iterator[list[list[pq.ParquetFile]]]:
    """The files of tables, all of one log, whatever is put in its place meanwhile. Raises LogError."""
    with ExitStack() as stack:
        for attempt in range(_OPENINGS_MAX):
            try:
                parts = _parts(folder)  # once: a new summary is a new log
                found = [
                    [stack.enter_context(_open(path, schema, domain)) for path in _paths(folder, parts, name)]
                    for name, schema in tables.items()
                ]
                break
            except FileNotFoundError as error:  # between reading the summary and opening: another log is there now
                if not parts or attempt + 1 == _OPENINGS_MAX:
                    raise LogError(f"{error.filename}: no such file; make the log with `freshrank import` or `freshrank label`") from error
                stack.close()
        yield found


_OPENINGS_MAX = 5


def _open(path: Path, expected: pa.Schema, domain: Domain) -> pq.ParquetFile:
    """Opened and checked. Raises LogError, FileNotFoundError."""
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "no such file", str(path)) from error
    except pa.ArrowInvalid as error:
        raise LogError(f"{path}: not a Parquet file: {error}") from error
    wrong = _disagreement(file.schema_arrow, expected, domain)
    if wrong:
        file.close()
        raise LogError(f"{path}: {wrong}; make the log again with this domain file")
    return file


def _disagreement(found: pa.Schema, expected: pa.Schema, domain: Domain) -> str:
    """What is wrong with a file's columns; "": nothing. More columns than expected are no harm."""
    metadata = found.metadata or {}
    for key, wanted in (("freshrank.log_version", LOG_VERSION), ("freshrank.domain", domain.name)):
        value = metadata.get(key.encode(), b"none").decode()
        if value != wanted:
            return f"{key} is {value}, expected {wanted}"
    for field in expected:
        at = found.get_field_index(field.name)
        found_type = found.field(at).type if at >= 0 else "missing"
        if found_type != field.type:
            return f"column {field.name} is {found_type}, expected {field.type}"
    return ""


def _batches(files: list[pq.ParquetFile], columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    for file in files:
        yield from file.iter_batches(batch_size=batch_rows, columns=columns)


def _array(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = batch.column(name).to_numpy(zero_copy_only=False)
    return array


def _lists(batch: pa.RecordBatch, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    column = batch.column(name)
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy()[offsets[0] : offsets[-1]], np.diff(offsets).astype(np.int32)


def _weighted(column: pa.Array) -> FeatureColumn:
    offsets = column.offsets.to_numpy()
    ids, weights = column.values.slice(offsets[0], offsets[-1] - offsets[0]).flatten()
    return FeatureColumn(ids.to_numpy(), np.diff(offsets).astype(np.int32), weights.to_numpy())


def unnamed_parts(logs: Path) -> list[Path]:
    """Files of parts below the folders of `logs` that no summary names: of a pass that is under way, or was given up."""
    folders = [path.parent for path in logs.glob(f"*/{SUMMARY}")]
    named = {path for folder in folders for name in (ACTIONS, IMPRESSIONS, SERVED) for path in log_files(folder, name)}
    return [path for name in ("actions", "impressions", "served") for path in logs.glob(f"*/{name}/[!.]*.parquet") if path not in named]


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Held by who replaces files of a served log. Waits for another one to be done."""
    with Path(folder, ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_summary(folder: str | Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, which is the old or the new one at every moment."""
    partial = Path(folder, f".{SUMMARY}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(summary, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(Path(folder, SUMMARY))


def read_summary(folder: str | Path) -> dict[str, Any]:
    """summary.json of a log folder.

    Raises:
        LogError: no such log.
    """
    try:
        summary: dict[str, Any] = json.loads(Path(folder, SUMMARY).read_text("utf-8"))
    except FileNotFoundError as error:
        raise LogError(f"{Path(folder, SUMMARY)}: no such file; make the log with `freshrank import`") from error
    return summary

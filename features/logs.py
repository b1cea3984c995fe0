"""Canonical Parquet logs: what training, replay and the demo read, whatever the log was before.

A log folder has `actions.parquet` (every action and erasure, in the order of the log), `impressions.parquet` (every candidate of every
request with its labels and request and candidate features) and `summary.json` (where it came from and what was rejected).
Files are written under another name and renamed when whole, so a reader never sees half of one.
"""

import json
import os
from collections.abc import Iterator
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
from features.erasures import Erased, erased_before_ms

LOG_VERSION = "1"
ACTIONS, IMPRESSIONS, SUMMARY = "actions.parquet", "impressions.parquet", "summary.json"
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
class LoggedRequests:
    """Whole requests, in the order of request_time_ms. r requests hold n rows (candidates).

    starts int64 [r + 1]: request i has the rows starts[i]:starts[i + 1]. request_id, user_id uint64 [r], request_time_ms int64 [r],
    surface uint16 [r]. entity_kind uint8 [n], entity_id uint64 [n], position int32 [n] (-1 unknown).
    labels uint8 [sum], label_starts int64 [n + 1]: ids of the actions that answered each row, ascending.
    features: the request and candidate features of each row by name (a request feature repeats over its request's rows).
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


def impressions_schema(domain: Domain) -> pa.Schema:
    """Columns of impressions.parquet; request and candidate features follow the fixed ones under their own names."""
    fields = [
        ("request_id", pa.uint64()),
        ("user_id", pa.uint64()),
        ("request_time_ms", pa.int64()),
        ("position", pa.int32()),
        ("surface", pa.uint16()),
        ("entity_kind", pa.uint8()),
        ("entity_id", pa.uint64()),
        ("labels", pa.list_(pa.uint8())),
    ]
    for name in logged_features(domain):
        if name in {field for field, _ in fields}:
            raise LogError(f"features.{name}: the name of a fixed column of impressions.parquet; call the feature otherwise")
        fields.append((name, feature_type(domain.features[name])))
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
        """`name` is ACTIONS or IMPRESSIONS."""
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
        if not table.num_rows:
            return
        table = table.select(self._schema.names).cast(self._schema)
        self._check_order(table)
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
    for batch in _batches(Path(folder) / ACTIONS, domain, batch_rows):
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
    held: pa.Table | None = None
    for batch in _batches(Path(folder) / IMPRESSIONS, domain, batch_rows):
        table = pa.Table.from_batches([batch])
        if held is None or not held.num_rows:
            held = table
            continue
        others = np.flatnonzero(_array(batch, "request_id") != held["request_id"][-1].as_py())
        cut = int(others[0]) if len(others) else table.num_rows  # rows of the request that the batch before has begun
        held = pa.concat_tables([held, table.slice(0, cut)])
        if cut < table.num_rows:
            yield _requests(held, domain)
            held = table.slice(cut)
    if held is not None and held.num_rows:
        yield _requests(held, domain)


def _requests(table: pa.Table, domain: Domain) -> LoggedRequests:
    batch = table.combine_chunks().to_batches()[0]
    ids = _array(batch, "request_id")
    first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
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
    return LoggedRequests(
        starts=np.append(first, len(ids)).astype(np.int64),
        request_id=ids[first],
        user_id=_array(batch, "user_id")[first],
        request_time_ms=_array(batch, "request_time_ms")[first],
        surface=_array(batch, "surface")[first],
        entity_kind=_array(batch, "entity_kind"),
        entity_id=_array(batch, "entity_id"),
        position=_array(batch, "position"),
        labels=labels,
        label_starts=np.concatenate([[0], np.cumsum(label_lengths, dtype=np.int64)]).astype(np.int64),
        features=features,
    )


def _batches(path: Path, domain: Domain, batch_rows: int) -> Iterator[pa.RecordBatch]:
    expected = impressions_schema(domain) if path.name == IMPRESSIONS else actions_schema(domain)
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise LogError(f"{path}: no such file; make the log with `freshrank import`") from error
    except pa.ArrowInvalid as error:
        raise LogError(f"{path}: not a Parquet file: {error}") from error
    with file:
        metadata = file.schema_arrow.metadata or {}
        for key, wanted in (("freshrank.log_version", LOG_VERSION), ("freshrank.domain", domain.name)):
            found = metadata.get(key.encode(), b"none").decode()
            if found != wanted:
                raise LogError(f"{path}: {key} is {found}, expected {wanted}; import the log again with this domain file")
        for field in expected:
            at = file.schema_arrow.get_field_index(field.name)
            found_type = file.schema_arrow.field(at).type if at >= 0 else "missing"
            if found_type != field.type:
                raise LogError(f"{path}: column {field.name} is {found_type}, expected {field.type}; import the log again")
        yield from file.iter_batches(batch_size=batch_rows, columns=expected.names)


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


def drop_past(folder: str | Path, erased: Erased) -> int:
    """Takes the past of erased users out of a log folder's files: rows up to their erasure; returns how many. Erasures stay.

    A file without such rows is left as it is; another is replaced when the new one is whole.
    """
    gone = 0
    for name in (ACTIONS, IMPRESSIONS):
        path = Path(folder) / name
        if path.exists():
            gone += _drop_past(path, erased)
    return gone


def _drop_past(path: Path, erased: Erased) -> int:
    times = ["append_time_ms", "event_time_ms", "erase"] if path.name == ACTIONS else ["request_time_ms"]

    def past(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        first_ms = np.minimum.reduce([_array(batch, time) for time in times if time != "erase"])
        found: npt.NDArray[np.bool_] = first_ms <= erased_before_ms(erased, _array(batch, "user_id"))
        return found & ~_array(batch, "erase") if "erase" in times else found

    with pq.ParquetFile(path) as file:
        gone = sum(int(past(batch).sum()) for batch in file.iter_batches(columns=["user_id", *times]))
        if not gone:
            return 0
        partial = path.with_name(f".{path.name}.part")
        with partial.open("wb") as out:
            with pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
                for group in range(file.num_row_groups):
                    kept = [batch.filter(pa.array(~past(batch))) for batch in file.iter_batches(row_groups=[group])]
                    writer.write_table(pa.Table.from_batches(kept, file.schema_arrow))
            out.flush()
            os.fsync(out.fileno())
    partial.replace(path)
    return gone


def write_summary(folder: str | Path, summary: dict[str, Any]) -> None:
    """Writes summary.json."""
    Path(folder, SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", "utf-8")


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

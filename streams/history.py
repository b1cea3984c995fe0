"""History as files: Parquet of actions, a file or a folder or any fsspec URL, read a bounded piece at a time.

The columns are those of canonical logs (features/logs.py), in any order of rows. Other exports may leave out what they do not have:
`append_time_ms` is then the event time, `erase` false, `request_id` and `surface` 0, `value` none. The files' hashes and counts make the
manifest of a base.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem

from features.actions import EVENT_DTYPE
from features.base import Base, BaseError, BaseFile, BaseRecords, Erasures, is_accepted
from features.logs import ACTIONS, IMPRESSIONS, LoggedActions

_TYPES: dict[str, pa.DataType] = {
    "user_id": pa.uint64(),
    "entity_kind": pa.uint8(),
    "entity_id": pa.uint64(),
    "action": pa.uint8(),
    "event_time_ms": pa.int64(),
    "event_id": pa.uint64(),
    "request_id": pa.uint64(),
    "surface": pa.uint16(),
    "value": pa.float32(),
    "append_time_ms": pa.int64(),
    "erase": pa.bool_(),
}
_NEEDED = ("user_id", "entity_kind", "entity_id", "action", "event_time_ms", "event_id")
_HASHED_BYTES = 8 << 20
_SAMPLED_GROUPS_MAX = 128


@dataclass(frozen=True)
class RowGroup:
    """What one reading task is: a row group of a file."""

    file: str
    number: int
    rows: int


class History:
    """The files at `source`: a Parquet file, a folder with `actions.parquet` in it, or one with Parquet files at any depth.

    A context manager; it keeps one file open between calls. Picklable: processes that share the reading each get a copy.
    """

    def __init__(self, source: str) -> None:
        """`source`: path or fsspec URL."""
        self.source = source
        self._filesystem, path = fsspec.core.url_to_fs(source)
        self._path = str(path).rstrip("/")
        self._opened: tuple[str, Any, pq.ParquetFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file that is open."""
        if self._opened is not None:
            _, source, file = self._opened
            file.close()
            source.close()
            self._opened = None

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the files below the source, ascending. Raises BaseError where there is none."""
        filesystem, path = self._filesystem, self._path
        if filesystem.isfile(path):
            return (PurePosixPath(path).name,)
        found = sorted(str(PurePosixPath(file).relative_to(path)) for file in filesystem.find(path) if str(file).endswith(".parquet"))
        found = [name for name in found if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
        if ACTIONS in found:
            return (ACTIONS,)
        found = [name for name in found if PurePosixPath(name).name != IMPRESSIONS]
        if not found:
            raise BaseError(f"{self.source}: no Parquet file of actions there; name a file, or a folder that holds {ACTIONS} or *.parquet")
        return tuple(found)

    def describe(self, name: str) -> BaseFile:
        """Reads a file whole and hashes it."""
        digest, size = xxhash.xxh3_128(), 0
        with closing(self._open(name)) as file:
            while piece := file.read(_HASHED_BYTES):
                digest.update(piece)
                size += len(piece)
        return BaseFile(name, size, digest.hexdigest())

    def row_groups(self) -> list[RowGroup]:
        """All row groups; also checks each file's columns. Raises BaseError naming a file and column that do not fit."""
        found = []
        for name in self.files:
            metadata = self._parquet(name).metadata
            found += [RowGroup(name, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
        return found

    def sample_users(self, groups: list[RowGroup]) -> npt.NDArray[np.uint64]:
        """Users of evenly spread row groups, each as often as it has records: uint64 [n], ascending."""
        step = -(-len(groups) // _SAMPLED_GROUPS_MAX) or 1
        found = [np.zeros(0, np.uint64)]
        for group in groups[::step]:
            table = self._parquet(group.file).read_row_group(group.number, columns=["user_id"], use_threads=False)
            users = table["user_id"].to_numpy()
            found.append(users[:: max(len(users) // 10_000, 1)])
        return np.sort(np.concatenate(found))

    def erasures(self, groups: list[RowGroup], future_tolerance_ms: int) -> Erasures:
        """The erasures of all files. Row groups whose statistics say that they have none are not read."""
        found = Erasures()
        for group in groups:
            file = self._parquet(group.file)
            at = file.schema_arrow.get_field_index("erase")
            if at < 0:
                continue
            statistics = file.metadata.row_group(group.number).column(at).statistics
            if statistics is not None and statistics.has_min_max and not statistics.max:
                continue
            for records in self.read(group):
                where = np.flatnonzero(records.erase & is_accepted(records, future_tolerance_ms))
                found.add(records.users[where], records.append_time_ms[where])
        return found

    def read(self, group: RowGroup, batch_rows: int = 1 << 17) -> Iterator[LoggedActions]:
        """The records of a row group, a bounded number at a time."""
        file = self._parquet(group.file)
        columns = [name for name in _TYPES if file.schema_arrow.get_field_index(name) >= 0]
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group.number], columns=columns, use_threads=False):
            yield self._records(group.file, batch)

    def _open(self, name: str) -> Any:
        where = self._path if self._filesystem.isfile(self._path) else f"{self._path}/{name}"
        try:
            # Arrow reads a local file by itself faster than through Python.
            return pa.OSFile(where) if isinstance(self._filesystem, LocalFileSystem) else self._filesystem.open(where, "rb")
        except FileNotFoundError as error:
            raise BaseError(f"{self.source}: {name} is not there; give the folder where the history lies now") from error

    def _parquet(self, name: str) -> pq.ParquetFile:
        if self._opened is not None and self._opened[0] == name:
            return self._opened[2]
        self.close()
        source = self._open(name)
        try:
            file = pq.ParquetFile(source)
            self._check_schema(name, file.schema_arrow)
        except pa.ArrowInvalid as error:
            source.close()
            raise BaseError(f"{self.source}: {name} is not a Parquet file: {error}") from error
        except BaseException:
            source.close()
            raise
        self._opened = name, source, file
        return file

    def _check_schema(self, name: str, schema: pa.Schema) -> None:
        for column, kind in _TYPES.items():
            at = schema.get_field_index(column)
            if (at < 0 and column in _NEEDED) or (at >= 0 and schema.field(at).type != kind):
                what = schema.field(at).type if at >= 0 else "missing"
                raise BaseError(f"{self.source}: {name}: column {column} is {what}, expected {kind}; export it so")

    def _records(self, name: str, batch: pa.RecordBatch) -> LoggedActions:
        n = batch.num_rows
        columns: dict[str, Any] = {}
        for column in batch.schema.names:
            found = batch.column(column)
            if found.null_count and column != "value":
                raise BaseError(f"{self.source}: {name}: column {column} has nulls; only value may be missing in single rows")
            columns[column] = found.to_numpy(zero_copy_only=False)
        events = np.zeros(n, EVENT_DTYPE)
        for field in EVENT_DTYPE.names or ():
            events[field] = columns.get(field, np.float32(np.nan) if field == "value" else 0)
        value = events["value"]
        value[np.isnan(value)] = np.float32(np.nan)  # one NaN: its bits are part of what makes events equal
        append_time_ms = columns.get("append_time_ms", events["event_time_ms"].copy())
        none = np.zeros(n, np.uint64), np.full(n, -1, np.int32), np.full(n, -1, np.int64)
        return LoggedActions(columns["user_id"], events, append_time_ms, *none, columns.get("erase", np.zeros(n, bool)))


def open_base(base: Base, source: str) -> History:
    """The history of a base, checked to be the same bytes.

    Raises:
        BaseError: a file is missing, or it is not what the base was made of.
    """
    history = History(source)
    for expected in base.files:
        if history.describe(expected.name) != expected:
            raise BaseError(f"{source}: {expected.name} is not the file that base {base.id} was made of: give the folder with that history")
    return history


def read_base(base: Base, history: History, users: set[int]) -> BaseRecords:
    """What a base says of some users; reads all of its history."""
    names = {file.name for file in base.files}
    groups = [group for group in history.row_groups() if group.file in names]
    erasures = history.erasures(groups, base.future_tolerance_ms)
    return BaseRecords(base, users, erasures, (records for group in groups for records in history.read(group)))

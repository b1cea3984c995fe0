"""State read for a person: one user's rows, or what a whole partition holds, from a view (a worker may run) or from RocksDB (none may)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from features.sequence import HEADER_DTYPE, Row, decode_row
from streams.state import Meta, row_key
from streams.store import open_for_reading
from streams.view_reader import ViewPartition

Where = Literal["view", "store"]
LENGTH_BOUNDS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
"""Sequences are counted by length up to each of these."""


class Source(Protocol):
    """A partition's state, open for reading."""

    meta: Meta

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The rows of some keys, None where there is none."""
        ...

    def scan(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, row), ascending."""
        ...

    def close(self) -> None:
        """Releases it."""
        ...


def partitions_below(folder: Path) -> list[int]:
    """The partitions that have a folder there, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdecimal())


@contextmanager
def opened(where: Where, folder: Path, partition: int) -> Iterator[Source]:
    """A partition's state, for reading.

    Raises:
        StateError: none is there, it is damaged, or a worker holds the store.
        SequenceUnavailableError: the view is not there, or is being made.
    """
    source: Source = ViewPartition(folder, partition) if where == "view" else open_for_reading(folder, partition)
    try:
        yield source
    finally:
        source.close()


@dataclass(frozen=True)
class Found:
    """A user's row of one sequence, with the moment of the partition that it was read at. `row`: None where there is none."""

    sequence_id: int
    meta: Meta
    row: Row | None
    row_bytes: int


def find_user(where: Where, folder: Path, user_id: int, sequence_ids: Sequence[int]) -> list[Found]:
    """A user's rows; none where no partition has one. Looks into every partition, so that no broker is needed to say how many there are.

    Raises:
        SequenceCorruptError: a row is damaged.
        StateError, SequenceUnavailableError: as `opened`.
    """
    keys = [row_key(number, user_id) for number in sequence_ids]
    for partition in partitions_below(folder):
        with opened(where, folder, partition) as source:
            rows = source.get(keys)
            if any(rows):
                return [
                    Found(number, source.meta, decode_row(row, user_id) if row else None, len(row or b""))
                    for number, row in zip(sequence_ids, rows, strict=True)
                ]
    return []


@dataclass
class SequenceSummary:
    """The rows of one sequence in a partition. lengths: rows by length, a bucket for each of LENGTH_BOUNDS and one for what is longer."""

    rows: int = 0
    row_bytes: int = 0
    events: int = 0
    erased: int = 0
    """Rows of users that were erased once."""
    newest_offset: int = -1
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LENGTH_BOUNDS) + 1, np.int64))

    def add(self, headers: npt.NDArray[np.void], row_bytes: int) -> None:
        """Counts rows by their headers: HEADER_DTYPE [n]."""
        self.rows += len(headers)
        self.row_bytes += row_bytes
        self.events += int(headers["count"].sum())
        self.erased += int((headers["erased_before_ms"] >= 0).sum())
        self.newest_offset = max(self.newest_offset, int(headers["offset"].max(initial=-1)))
        self.lengths += np.bincount(np.searchsorted(LENGTH_BOUNDS, headers["count"]), minlength=len(self.lengths))


@dataclass(frozen=True)
class PartitionSummary:
    """What a partition holds. complete: whether every row was counted; sequences by their id; disk_bytes: files of the folder."""

    meta: Meta
    disk_bytes: int
    complete: bool
    sequences: dict[int, SequenceSummary]


def summarise(where: Where, folder: Path, partition: int, *, rows_max: int) -> PartitionSummary:
    """Counts a partition's rows, at most `rows_max` of them, by their headers alone. Raises as `opened`."""
    with opened(where, folder, partition) as source:
        found: dict[int, SequenceSummary] = {}
        pending: dict[int, list[bytes]] = {}
        count, row_bytes = 0, dict[int, int]()
        for key, row in source.scan() if rows_max else ():
            pending.setdefault(key[0], []).append(row[: HEADER_DTYPE.itemsize])
            row_bytes[key[0]] = row_bytes.get(key[0], 0) + len(row)
            count += 1
            if len(pending[key[0]]) == 10_000:
                found.setdefault(key[0], SequenceSummary()).add(_headers(pending.pop(key[0])), row_bytes.pop(key[0]))
            if count == rows_max:
                break
        for number, rows in pending.items():
            found.setdefault(number, SequenceSummary()).add(_headers(rows), row_bytes[number])
        meta = source.meta
    path = folder / str(partition)
    disk_bytes = sum(file.stat().st_blocks * 512 for file in path.iterdir() if file.is_file())
    return PartitionSummary(meta, disk_bytes, count < rows_max, dict(sorted(found.items())))


def _headers(rows: list[bytes]) -> npt.NDArray[np.void]:
    return np.frombuffer(b"".join(rows), HEADER_DTYPE)

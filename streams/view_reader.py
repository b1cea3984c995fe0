"""The reading end of views: sequences with their watermark, in any process of the machine."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path

import lmdb
import numpy as np

from features.domain import Domain
from features.ids import partition_of, partitions_of, user_key
from features.ports import Position, Reading, SequenceCorruptError, SequenceUnavailableError
from features.sequence import as_read, decode_row, is_whole
from streams.errors import StateError
from streams.state import META_KEY, Meta, definitions, fingerprints, row_key
from streams.view import BEAT_KEY, DATA_FILE, FRESH_SUFFIX, MAP_BYTES, READERS_MAX, file_identity, is_of_this_boot

log = logging.getLogger(__name__)

_HASHED_AT_ONCE = 16
_EXCHANGE_POLLS_MAX = 20


class ViewReader:
    """Reads the view from any process of the machine: implements `features.ports.SequenceReader`.

    A read is a few microseconds of look-ups in shared memory; rows are checked (user and checksum), not decoded.
    """

    def __init__(self, folder: str | Path, domain: Domain, partition_count: int) -> None:
        """`folder` is the worker's view folder; it may be empty still."""
        self._folder = Path(folder)
        self._partition_count = partition_count
        self._files = [str(self._folder / str(partition) / DATA_FILE) for partition in range(partition_count)]
        self._sequence_ids = {name: sequence.id for name, sequence in domain.sequence.items()}
        self._definitions = definitions(domain)
        self._fingerprints = fingerprints(self._definitions)
        self._open: dict[int, tuple[tuple[int, int], lmdb.Environment]] = {}
        self._metas: dict[int, tuple[bytes, Meta]] = {}
        self._opening = threading.Lock()
        self._counters = dict.fromkeys(("reads", "users", "rows_missing", "reopened", "unavailable", "corrupt"), 0)

    def read(self, sequence: str, user_ids: Seq[int]) -> list[Reading]:
        """See `features.ports.SequenceReader.read`. Raises KeyError for a sequence that the domain does not define."""
        sequence_id = self._sequence_ids[sequence]
        self._counters["reads"] += 1
        self._counters["users"] += len(user_ids)
        by_partition: dict[int, list[int]] = {}
        for i, partition in enumerate(self._partitions(user_ids)):
            by_partition.setdefault(partition, []).append(i)
        readings: list[Reading | None] = [None] * len(user_ids)
        try:
            for partition, indices in by_partition.items():
                keys = [row_key(sequence_id, user_ids[i]) for i in indices]
                meta, caught_up_ms, rows = self._fetch(partition, keys)
                age_ms = -1 if caught_up_ms is None else max(0, time.time_ns() // 1_000_000 - caught_up_ms)
                watermark = Position(meta.log_epoch, partition, meta.applied_offset)
                for i, row in zip(indices, rows, strict=True):
                    check_row(row, user_ids[i])
                    row = as_read(self._definitions[sequence_id], row, meta.log_clock_ms)
                    readings[i] = Reading(user_ids[i], row, watermark, meta.log_clock_ms, age_ms)
        except SequenceUnavailableError:
            self._counters["unavailable"] += 1
            raise
        except SequenceCorruptError:
            self._counters["corrupt"] += 1
            raise
        return [reading for reading in readings if reading is not None]

    def position(self, user_id: int) -> Position:
        """See `features.ports.SequenceReader.position`."""
        return self.partition_position(partition_of(user_key(user_id), self._partition_count))

    def partition_position(self, partition: int) -> Position:
        """The watermark of a partition. Raises as `read`."""
        meta, _, _ = self._fetch(partition, ())
        return Position(meta.log_epoch, partition, meta.applied_offset)

    def positions(self) -> list[Position]:
        """The watermark of every partition that has a view now."""
        found = []
        for partition in range(self._partition_count):
            with suppress(SequenceUnavailableError):
                found.append(self.partition_position(partition))
        return found

    def statistics(self) -> dict[str, float]:
        """Counters since start."""
        return dict(self._counters)

    def close(self) -> None:
        """Closes every partition's view."""
        for _, environment in self._open.values():
            environment.close()
        self._open.clear()

    def _partitions(self, user_ids: Seq[int]) -> Seq[int]:
        """Each user's partition: one by one in Python where they are few, else at once."""
        if len(user_ids) < _HASHED_AT_ONCE:
            return [partition_of(user_key(user_id), self._partition_count) for user_id in user_ids]
        found: list[int] = partitions_of(np.array(user_ids, np.uint64), self._partition_count).tolist()
        return found

    def _fetch(self, partition: int, keys: Seq[bytes]) -> tuple[Meta, int | None, list[bytes]]:
        """Meta, when the state was caught up, and rows, of one moment; an empty row where there is none."""
        environment = self._environment(partition)
        try:
            with environment.begin() as transaction:
                encoded = transaction.get(META_KEY)
                caught_up = transaction.get(BEAT_KEY)
                rows = [transaction.get(key, b"") for key in keys]
        except lmdb.MapResizedError:
            environment.set_mapsize(0)  # the worker's limit was raised: adopt its size
            return self._fetch(partition, keys)
        except lmdb.Error as error:
            raise SequenceUnavailableError(f"{self._folder / str(partition)}: the view cannot be read: {error}") from error
        self._counters["rows_missing"] += rows.count(b"")
        return self._meta(partition, encoded), None if caught_up is None else int.from_bytes(caught_up, "little"), rows

    def _meta(self, partition: int, encoded: bytes | None) -> Meta:
        if not encoded:
            raise SequenceUnavailableError(f"view of partition {partition}: the worker is rebuilding the view: retry")
        known = self._metas.get(partition)
        if known is not None and known[0] == encoded:
            return known[1]
        try:
            meta = Meta.decode(encoded, f"view of partition {partition}")
        except StateError as error:
            raise SequenceUnavailableError(str(error)) from error
        if meta.fingerprints != self._fingerprints:
            raise SequenceUnavailableError(
                f"view of partition {partition}: the worker keeps other [sequence] definitions than this domain file: start both with one"
            )
        self._metas[partition] = (encoded, meta)
        return meta

    def _environment(self, partition: int) -> lmdb.Environment:
        """The partition's environment; opened again where the worker replaced the file."""
        known = self._open.get(partition)
        try:
            identity = _settled_identity(self._files[partition])
        except OSError as error:
            raise SequenceUnavailableError(f"no view of partition {partition} yet: is the worker running?") from error
        if known is not None and known[0] == identity:
            return known[1]
        with self._opening:
            path = self._folder / str(partition)
            while True:
                try:
                    return self._reopen(partition, path, identity)
                except SequenceUnavailableError:
                    before = identity
                    with suppress(OSError):
                        identity = _settled_identity(self._files[partition])
                    if identity == before:
                        raise
                    # Replaced just now (`PartitionView.scrub`): the new one can be opened.

    def _reopen(self, partition: int, path: Path, identity: tuple[int, int]) -> lmdb.Environment:
        try:
            if not is_of_this_boot(path):
                raise SequenceUnavailableError(
                    f"view of partition {partition}: it is of an earlier boot of the machine: is the worker running?"
                )
            known = self._open.get(partition)
            if known is not None:
                if known[0] == identity:
                    return known[1]
                known[1].close()
                del self._open[partition]
                self._counters["reopened"] += 1
            environment = lmdb.open(str(path), map_size=MAP_BYTES, readonly=True, max_readers=READERS_MAX, max_spare_txns=4)
            if file_identity(self._files[partition]) != identity:
                environment.close()
                raise SequenceUnavailableError(f"view of partition {partition}: the worker is replacing the view: retry")
        except (OSError, lmdb.Error) as error:
            log.debug("%s: %s", path, error)  # callers of the services see the message below, and are told no paths
            raise SequenceUnavailableError(f"view of partition {partition}: it cannot be opened yet: is the worker running?") from error
        environment.reader_check()
        self._open[partition] = (identity, environment)
        return environment


def check_row(row: bytes, user_id: int) -> None:
    """The header's own checks in few comparisons; an empty row is none.

    Raises:
        SequenceCorruptError: the row is damaged or of another user; the message of `decode_row` says what is wrong.
    """
    if row and not (is_whole(row) and row[16:24] == user_id.to_bytes(8, "little")):
        decode_row(row, user_id)
        raise SequenceCorruptError("sequence row: its header is of another user")


class ViewPartition:
    """One partition's view as it is at this moment, for looking at: one transaction, whatever the domain file says. `get`, `scan` and
    `close` are those of `streams.store.PartitionStore`."""

    def __init__(self, folder: str | Path, partition: int) -> None:
        """Opens `<folder>/<partition>/` for reading.

        Raises:
            SequenceUnavailableError: there is no view, or the worker is making it anew.
            StateError: its meta row is damaged.
        """
        path = Path(folder) / str(partition)
        if not (path / DATA_FILE).exists():
            raise SequenceUnavailableError(f"{path}: no view of partition {partition}: is this the worker's view folder?")
        try:
            self._environment = lmdb.open(str(path), map_size=MAP_BYTES, readonly=True, max_readers=READERS_MAX)
        except lmdb.Error as error:
            raise SequenceUnavailableError(f"{path}: the view cannot be opened: {error}") from error
        self._transaction = self._environment.begin()
        encoded = self._transaction.get(META_KEY)
        if not encoded:
            self.close()
            raise SequenceUnavailableError(f"{path}: the worker is making the view anew: retry")
        try:
            self.meta = Meta.decode(encoded, str(path))
        except BaseException:
            self.close()
            raise

    def get(self, keys: Seq[bytes]) -> list[bytes | None]:
        """The rows of some keys, None where there is none."""
        return [self._transaction.get(key) for key in keys]

    def scan(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, row), ascending."""
        with self._transaction.cursor() as cursor:
            if cursor.set_range(b"\x01"):  # what stands beside the rows begins with a zero byte
                yield from cursor.iternext()

    def close(self) -> None:
        """Ends the transaction, which holds old pages of the view."""
        self._transaction.abort()
        self._environment.close()


def disk_bytes(folder: str | Path) -> Mapping[int, int]:
    """Size of each partition's view, by partition."""
    return {int(path.parent.name): path.stat().st_size for path in Path(folder).glob(f"*/{DATA_FILE}") if path.parent.name.isdigit()}


def _settled_identity(data_file: str) -> tuple[int, int]:
    """`file_identity` of a view's data file; while `PartitionView.scrub` exchanges the folders there is none for some microseconds."""
    for _ in range(_EXCHANGE_POLLS_MAX):
        try:
            return file_identity(data_file)
        except FileNotFoundError:
            folder = Path(data_file).parent
            if not folder.with_name(f"{folder.name}{FRESH_SUFFIX}").exists():
                break
            time.sleep(0.0005)  # a rename cannot be waited for
    return file_identity(data_file)

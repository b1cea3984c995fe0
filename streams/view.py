"""The view: rows and watermark of one moment, for readers in other processes. The only home of `lmdb`.

One LMDB environment a partition. The worker writes it right after the store's WriteBatch, all rows of the batch and the meta row in one
transaction; a reader's transaction therefore sees rows and applied offset of one moment, also for a user without a row. Beside them stands
when the state last included the log's end, from which readers tell its age. The view is a copy: it is not synced to disk, and where it does
not agree with the store the worker brings it to the store's moment, or makes it anew (another log, definition or boot of the machine);
readers meanwhile are told that there is nothing to read yet.

The workers of one machine share the views. Whoever opens one for writing takes it over: a token in it is raised, and every later
transaction of an older owner fails. Two owners of a moment therefore never mix their writes.
"""

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import lmdb
import numpy as np

from features.domain import Domain
from features.ids import partition_of, partitions_of, user_key
from features.ports import Position, Reading, SequenceCorruptError, SequenceUnavailableError
from features.sequence import HEADER_DTYPE, as_read, decode_row, is_whole
from streams.errors import FencedError, StateError, ViewError
from streams.state import META_KEY, Meta, definitions, fingerprints, row_key

log = logging.getLogger(__name__)

MAP_BYTES = 64 << 30
"""Address space of one partition's view. The file grows as it is written; this is only its limit."""

_READERS_MAX = 510
_REBUILD_ROWS = 5_000
_BOOT_FILE = "boot"
_LOCK_FILE = "writer"
_DATA_FILE = "data.mdb"
_FRESH_SUFFIX = ".fresh"
_EXCHANGE_POLLS_MAX = 20
_NO_META = b""
_HASHED_AT_ONCE = 16
_NOTHING = -2  # below the -1 of a state without any record
OWNER_KEY = b"\x00owner"
"""Token of the newest owner, 8 bytes little-endian; like every key that starts with a zero byte it sorts before the rows."""
BEAT_KEY = b"\x00time"
"""When the state last included the log's end, milliseconds since 1970-01-01 UTC by the owner's clock, 8 bytes little-endian."""
_FIRST_ROW = b"\x01"  # sequence ids start at 1
_OFFSET_AT = int(HEADER_DTYPE.fields["offset"][1]) if HEADER_DTYPE.fields else 0


@dataclass
class _Fresh:
    """The copy that a scrub makes. `copied`: the last key that it has."""

    environment: lmdb.Environment
    lock_file: BinaryIO
    copied: bytes = b""


class PartitionView:
    """The writing end of one partition's view; there is one writer, the worker that owns the partition."""

    def __init__(self, folder: str | Path, partition: int, *, map_bytes: int = MAP_BYTES, lock_wait_s: float = 3.0) -> None:
        """Opens the view of `<folder>/<partition>/` and takes it over.

        What an earlier boot of the machine left may be torn and is dropped, as is a view whose writer is frozen in a transaction for longer
        than `lock_wait_s`.

        Raises:
            ViewError: the folder cannot be written.
        """
        self._path = Path(folder) / str(partition)
        self._map_bytes, self._lock_wait_s = map_bytes, lock_wait_s
        self._adopted = _NOTHING
        """A later moment that the view shows already: nothing is written until the store passes it."""
        self._fresh: _Fresh | None = None
        self._mended = _FIRST_ROW
        try:
            if self._is_left_over():
                self._drop()
            try:
                self._token = self._open()
            except FencedError as error:
                is_replaced = self._is_replaced()
                self.close()
                if not is_replaced:
                    log.warning("%s; readers get a new view", error)
                    self._drop()
                self._token = self._open()
        except (OSError, lmdb.Error) as error:
            raise ViewError(f"{self._path}: the view cannot be opened for writing: {error}") from error

    # What of this class knows files, locks and LMDB stands in the next six methods and `close`: simulations put theirs in their place.

    def _is_left_over(self) -> bool:
        return self._path.exists() and not _is_of_this_boot(self._path)

    def _drop(self) -> None:
        # Renamed first: a reader must never combine the old data file with a new lock file.
        stale = self._path.with_name(f"{self._path.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        self._path.rename(stale)
        shutil.rmtree(stale)

    def _open_files(self) -> None:
        self._environment, self._lock_file = self._open_at(self._path)

    def _open_at(self, path: Path) -> tuple[lmdb.Environment, BinaryIO]:
        path.mkdir(parents=True, exist_ok=True)
        (path / _BOOT_FILE).write_text(_boot_id())
        # Without writemap: a stray pointer cannot write into the map, the file is no larger than its content, and it measured faster. With
        # meminit: what a page does not use is zero, not what the memory held before, which may be another user's erased row.
        environment = lmdb.open(str(path), map_size=self._map_bytes, sync=False, metasync=False, meminit=True, max_readers=_READERS_MAX)
        return environment, (path / _LOCK_FILE).open("ab")

    @property
    def _fresh_path(self) -> Path:
        return self._path.with_name(f"{self._path.name}{_FRESH_SUFFIX}")

    def _is_replaced(self) -> bool:
        """Whether readers find another file in this one's place."""
        try:
            return _identity(str(self._path / _LOCK_FILE)) != _identity(self._lock_file.fileno())
        except FileNotFoundError:
            return True

    def _lock(self) -> None:
        """LMDB would wait for ever for a writer that is frozen in a transaction; this lock of ours has a deadline.

        Raises:
            FencedError: another writer does not end its transaction.
        """
        deadline_s = time.monotonic() + self._lock_wait_s
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise FencedError(f"{self._path}: another writer does not end its transaction") from None
                time.sleep(0.002)  # only where two owners meet: there is no way to wait for a lock with a deadline
            else:
                return

    def _unlock(self) -> None:
        fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _open(self) -> int:
        """Opens the files and takes the view over: returns the token."""
        self._open_files()
        with self._writing() as transaction:
            token = int.from_bytes(transaction.get(OWNER_KEY, b""), "little") + 1
            transaction.put(OWNER_KEY, token.to_bytes(8, "little"))
        shutil.rmtree(self._fresh_path, ignore_errors=True)  # of an owner who cannot finish it any more
        return token

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        """A write transaction.

        Raises:
            FencedError: another writer does not end its own; or one gave this view up meanwhile, and no reader would see what is written.
        """
        self._lock()
        try:
            if self._is_replaced():
                raise FencedError(f"{self._path}: another worker has replaced the view")
            with self._environment.begin(write=True) as transaction:
                yield transaction
        finally:
            self._unlock()

    def meta(self) -> Meta | None:
        """The moment that the view shows; None where it was never completed, or cannot be read."""
        with self._environment.begin() as transaction:
            encoded = transaction.get(META_KEY)
        try:
            return Meta.decode(encoded, str(self._path)) if encoded else None
        except (StateError, SequenceCorruptError) as error:
            log.warning("%s: made anew: %s", self._path, error)
            return None

    def sync(self, meta: Meta, scan: Callable[[], Iterator[tuple[bytes, bytes]]], next_offset: int) -> int:
        """Brings the view to the store's moment; returns how many rows were copied from `scan()`, the store's rows, ascending.

        A row depends on the log and on the last record that touched it alone. So a view of an earlier moment lacks only the rows whose last
        record came later, and a view of a later moment (another owner's, up to the log's `next_offset`) stays as it is until the store
        passes it: readers never go back.
        """
        shown = self.meta()
        self._adopted = _NOTHING
        if shown is None or shown.lineage() != meta.lineage() or shown.applied_offset >= next_offset:
            return self.rebuild(scan(), meta)
        if shown.applied_offset > meta.applied_offset:
            self._adopted = shown.applied_offset
            return 0
        if shown == meta:
            return 0
        behind = (
            item for item in _checked(scan()) if int.from_bytes(item[1][_OFFSET_AT : _OFFSET_AT + 8], "little") > shown.applied_offset
        )
        count, chunk = 0, list(islice(behind, _REBUILD_ROWS))
        while len(chunk) == _REBUILD_ROWS:
            # Rows of a later moment than the meta row: nothing to read until it is complete.
            self._put([*chunk, (META_KEY, _NO_META)])
            count, chunk = count + len(chunk), list(islice(behind, _REBUILD_ROWS))
        self._put([*chunk, (META_KEY, meta.encode())])
        return count + len(chunk)

    def write(self, keys: Seq[bytes], rows: Seq[bytes], meta: Meta) -> None:
        """Rows and meta in one transaction: readers see all of it or nothing. A view that shows a later moment is left as it is.

        Raises:
            FencedError: another worker has taken the view over.
            ViewError: the view has no room.
        """
        if meta.applied_offset <= self._adopted:
            return
        self._put([*zip(keys, rows, strict=True), (META_KEY, meta.encode())])

    def beat(self, caught_up_ms: int) -> None:
        """Tells readers that the state included the log's end at this moment. Raises as `write`."""
        self._put([(BEAT_KEY, caught_up_ms.to_bytes(8, "little"))])

    def trim(self, keys: Seq[bytes], before: Seq[bytes], after: Seq[bytes]) -> None:
        """Puts rows `after` in place of others that read the same, only where the view still holds `before`; an empty row is none.

        A view that shows a later moment may hold a later row, which stays. Raises as `write`.
        """
        with self._reporting():
            with self._writing() as transaction:
                check_owner(transaction.get(OWNER_KEY), self._token)
                held = [place for place in zip(keys, before, after, strict=True) if transaction.get(place[0]) == place[1]]
                _replace(transaction, held)
            if self._fresh is not None:
                with self._fresh.environment.begin(write=True) as transaction:
                    _replace(transaction, [place for place in held if place[0] <= self._fresh.copied])

    def scrub(self, rows_max: int) -> bool:
        """Copies up to `rows_max` more rows into a fresh file, and lets that take the view's place once it has all; True then.

        LMDB's free space keeps what pages held before. The fresh file never held it. It goes along with every write meanwhile, and the
        exchange takes as long as two renames.

        Raises:
            FencedError: another worker has taken the view over.
            ViewError: no room for the copy.
        """
        if self._fresh is None:
            shutil.rmtree(self._fresh_path, ignore_errors=True)
            self._fresh = _Fresh(*self._open_at(self._fresh_path))
        fresh = self._fresh
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            there = cursor.set_range(fresh.copied + b"\x00")
            chunk = list(islice(cursor.iternext(), rows_max)) if there else []
        if chunk:
            with self._reporting(), fresh.environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                cursor.putmulti(chunk, append=True)
            fresh.copied = chunk[-1][0]
        if len(chunk) == rows_max:
            return False
        stale = self._path.with_name(f"{self._path.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        with self._writing() as transaction:
            # Whoever opens the view waits for this lock, and then looks whether it still has the right file.
            check_owner(transaction.get(OWNER_KEY), self._token)
            self._path.rename(stale)
            self._fresh_path.rename(self._path)
        self._close_files()
        self._environment, self._lock_file, self._fresh = fresh.environment, fresh.lock_file, None
        shutil.rmtree(stale)
        return True

    def _put(self, items: list[tuple[bytes, bytes]], *, append: bool = False) -> None:
        with self._reporting():
            with self._writing() as transaction, transaction.cursor() as cursor:
                check_owner(transaction.get(OWNER_KEY), self._token)
                cursor.putmulti(items, append=append)
            if self._fresh is not None:
                with self._fresh.environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                    cursor.putmulti([item for item in items if item[0] <= self._fresh.copied])

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            limit_bytes = self._environment.info()["map_size"]
            raise ViewError(f"{self._path}: the view is full at {limit_bytes} bytes: raise the worker's view_map_bytes") from error
        except lmdb.Error as error:
            raise ViewError(f"{self._path}: the view cannot be written: {error}") from error

    def rebuild(self, items: Iterable[tuple[bytes, bytes]], meta: Meta) -> int:
        """Makes the view anew from the store's rows; returns how many. Readers get SequenceUnavailableError until it is complete."""
        self._adopted = _NOTHING
        self._drop_fresh()
        database = self._environment.open_db()
        with self._writing() as transaction:
            check_owner(transaction.get(OWNER_KEY), self._token)
            transaction.drop(database, delete=False)
            transaction.put(META_KEY, _NO_META)
            transaction.put(OWNER_KEY, self._token.to_bytes(8, "little"))
        count = 0
        remaining = _checked(items)
        while chunk := list(islice(remaining, _REBUILD_ROWS)):
            self._put(chunk, append=True)
            count += len(chunk)
        self.write([], [], meta)
        return count

    def mend(self, store: Callable[[Seq[bytes]], Seq[bytes | None]], meta: Meta, rows: int) -> int:
        """Checks the next `rows` rows, and writes damaged ones again from the store at `meta`; returns how many. Each call goes on where
        the last one ended, round and round. `store(keys)`: the store's rows. Raises as `write`.
        """
        if meta.applied_offset < self._adopted:  # the store's rows are older than the view's
            return 0
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            there = cursor.set_range(self._mended)
            found = list(islice(cursor, rows)) if there else []
            damaged = [
                key
                for key, row in found
                if not is_whole(row) or row[16:24] != key[:0:-1]  # or another user's
            ]
        self._mended = found[-1][0] + b"\x00" if found else _FIRST_ROW
        if damaged:
            log.error("%s: %d DAMAGED ROWS, written again from the store", self._path, len(damaged))
            good = dict(zip(damaged, store(damaged), strict=True))
            self._put([(key, row) for key, row in good.items() if row is not None])
            self._delete([key for key, row in good.items() if row is None])
        return len(damaged)

    def _delete(self, keys: Seq[bytes]) -> None:
        with self._writing() as transaction:
            check_owner(transaction.get(OWNER_KEY), self._token)
            for key in keys:
                transaction.delete(key)

    def clear_dead_readers(self) -> int:
        """Frees the slots of readers that were killed, so that they do not hold old pages; returns how many."""
        return int(self._environment.reader_check())

    def close(self) -> None:
        """Closes the file; the view stays readable. A scrub that is not at its end begins anew."""
        self._drop_fresh()
        self._close_files()

    def _close_files(self) -> None:
        self._environment.close()
        self._lock_file.close()

    def _drop_fresh(self) -> None:
        if self._fresh is not None:
            self._fresh.environment.close()
            self._fresh.lock_file.close()
            self._fresh = None


class ViewReader:
    """Reads the view from any process of the machine: implements `features.ports.SequenceReader`.

    A read is a few microseconds of look-ups in shared memory; rows are checked (user and checksum), not decoded.
    """

    def __init__(self, folder: str | Path, domain: Domain, partition_count: int) -> None:
        """`folder` is the worker's view folder; it may be empty still."""
        self._folder = Path(folder)
        self._partition_count = partition_count
        self._files = [str(self._folder / str(partition) / _DATA_FILE) for partition in range(partition_count)]
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
            raise SequenceUnavailableError(f"{self._folder / str(partition)}: the worker is rebuilding the view: retry")
        known = self._metas.get(partition)
        if known is not None and known[0] == encoded:
            return known[1]
        try:
            meta = Meta.decode(encoded, str(self._folder / str(partition)))
        except StateError as error:
            raise SequenceUnavailableError(str(error)) from error
        if meta.fingerprints != self._fingerprints:
            raise SequenceUnavailableError(
                f"{self._folder / str(partition)}: the worker keeps other [sequence] definitions than this domain file: start both with one"
            )
        self._metas[partition] = (encoded, meta)
        return meta

    def _environment(self, partition: int) -> lmdb.Environment:
        """The partition's environment; opened again where the worker replaced the file."""
        known = self._open.get(partition)
        try:
            identity = _settled_identity(self._files[partition])
        except OSError as error:
            path = self._folder / str(partition)
            raise SequenceUnavailableError(f"{path}: no view of partition {partition} yet: is the worker running?") from error
        if known is not None and known[0] == identity:
            return known[1]
        with self._opening:
            path = self._folder / str(partition)
            try:
                return self._reopen(partition, path, identity)
            except SequenceUnavailableError:  # replaced just now (`PartitionView.scrub`): the new one can be opened
                with suppress(OSError):
                    return self._reopen(partition, path, _settled_identity(self._files[partition]))
                raise

    def _reopen(self, partition: int, path: Path, identity: tuple[int, int]) -> lmdb.Environment:
        try:
            if not _is_of_this_boot(path):
                raise SequenceUnavailableError(f"{path}: the view is of an earlier boot of the machine: is the worker running?")
            known = self._open.get(partition)
            if known is not None:
                if known[0] == identity:
                    return known[1]
                known[1].close()
                del self._open[partition]
                self._counters["reopened"] += 1
            environment = lmdb.open(str(path), map_size=MAP_BYTES, readonly=True, max_readers=_READERS_MAX, max_spare_txns=4)
            if _identity(self._files[partition]) != identity:
                environment.close()
                raise SequenceUnavailableError(f"{path}: the worker is replacing the view: retry")
        except (OSError, lmdb.Error) as error:
            raise SequenceUnavailableError(f"{path}: the view of partition {partition} cannot be opened yet: {error}") from error
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
        raise SequenceCorruptError(f"row of user {user_id}: header does not agree")


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
        if not (path / _DATA_FILE).exists():
            raise SequenceUnavailableError(f"{path}: no view of partition {partition}: is this the worker's view folder?")
        try:
            self._environment = lmdb.open(str(path), map_size=MAP_BYTES, readonly=True, max_readers=_READERS_MAX)
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


def check_owner(stored: bytes | None, token: int) -> None:
    """Raises FencedError where the token in a view is newer than a writer's own."""
    if int.from_bytes(stored or b"", "little") != token:
        raise FencedError("another worker has taken the view over")


def _checked(items: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a store; raises SequenceCorruptError at one that is damaged, so that no damage is copied."""
    for key, row in items:
        if not is_whole(row):
            decode_row(row)
        yield key, row


def disk_bytes(folder: str | Path) -> Mapping[int, int]:
    """Size of each partition's view, by partition."""
    return {int(path.parent.name): path.stat().st_size for path in Path(folder).glob(f"*/{_DATA_FILE}") if path.parent.name.isdigit()}


def _replace(transaction: lmdb.Transaction, places: list[tuple[bytes, bytes, bytes]]) -> None:
    for key, _, after in places:
        if after:
            transaction.put(key, after)
        else:
            transaction.delete(key)


def _settled_identity(data_file: str) -> tuple[int, int]:
    """`_identity` of a view's data file; while `PartitionView.scrub` exchanges the folders there is none for some microseconds."""
    for _ in range(_EXCHANGE_POLLS_MAX):
        try:
            return _identity(data_file)
        except FileNotFoundError:
            folder = Path(data_file).parent
            if not folder.with_name(f"{folder.name}{_FRESH_SUFFIX}").exists():
                break
            time.sleep(0.0005)  # a rename cannot be waited for
    return _identity(data_file)


def _identity(file: str | int) -> tuple[int, int]:
    status = os.stat(file)  # noqa: PTH116 - at every read: pathlib takes three times as long
    return status.st_ino, status.st_dev


def _is_of_this_boot(path: Path) -> bool:
    """Whether a view was made since the machine started; what is older was not synced to disk, and may be torn."""
    marker = path / _BOOT_FILE
    return marker.exists() and marker.read_text("ascii") == _boot_id()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()

"""The view: rows and watermark of one moment, for readers in other processes. The only home of `lmdb`.

One LMDB environment a partition. The worker writes it right after the store's WriteBatch, all rows of the batch and the meta row in one
transaction; a reader's transaction therefore sees rows and applied offset of one moment, also for a user without a row. The view is a copy:
it is not synced to disk, and where it does not agree with the store the worker brings it to the store's moment, or makes it anew (another
log, definition or boot of the machine); readers meanwhile are told that there is nothing to read yet.

The workers of one machine share the views. Whoever opens one for writing takes it over: a token in it is raised, and every later
transaction of an older owner fails. Two owners of a moment therefore never mix their writes.
"""

import fcntl
import logging
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import lmdb

from features.domain import Domain
from features.ids import partition_of, user_key
from features.ports import Position, Reading, SequenceCorruptError, SequenceUnavailableError
from features.sequence import HEADER_DTYPE, decode_row
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
_NO_META = b""
_NOTHING = -2  # below the -1 of a state without any record
OWNER_KEY = b"\x00owner"
"""Token of the newest owner, 8 bytes little-endian; like every key that starts with a zero byte it sorts before the rows."""
BEAT_KEY = b"\x00time"
"""When the state last included the log's end, milliseconds since 1970-01-01 UTC by the owner's clock, 8 bytes little-endian."""
_FIRST_ROW = b"\x01"  # sequence ids start at 1
_OFFSET_AT = int(HEADER_DTYPE.fields["offset"][1]) if HEADER_DTYPE.fields else 0


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
        self._scrubbed = _FIRST_ROW
        marker = self._path / _BOOT_FILE
        try:
            if self._path.exists() and (not marker.exists() or marker.read_text() != _boot_id()):
                self._drop()
            try:
                self._token = self._open()
            except FencedError:
                log.warning("%s: its writer does not answer; readers get a new view", self._path)
                self.close()
                self._drop()
                self._token = self._open()
        except (OSError, lmdb.Error) as error:
            raise ViewError(f"{self._path}: the view cannot be opened for writing: {error}") from error

    def _drop(self) -> None:
        # Renamed first: a reader must never combine the old data file with a new lock file.
        stale = self._path.with_name(f"{self._path.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        self._path.rename(stale)
        shutil.rmtree(stale)

    def _open(self) -> int:
        self._path.mkdir(parents=True, exist_ok=True)
        (self._path / _BOOT_FILE).write_text(_boot_id())
        self._lock_file = (self._path / _LOCK_FILE).open("ab")
        # Without writemap: a stray pointer cannot write into the map, the file is no larger than its content, and it measured faster.
        self._environment = lmdb.open(
            str(self._path), map_size=self._map_bytes, sync=False, metasync=False, meminit=False, max_readers=_READERS_MAX
        )
        return self._take_over()

    def _take_over(self) -> int:
        with self._writing() as transaction:
            token = int.from_bytes(transaction.get(OWNER_KEY, b""), "little") + 1
            transaction.put(OWNER_KEY, token.to_bytes(8, "little"))
        return token

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        """A write transaction. LMDB would wait for ever for a writer that is frozen in one; this lock of ours has a deadline.

        Raises:
            FencedError: another writer does not end its transaction.
        """
        deadline_s = time.monotonic() + self._lock_wait_s
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise FencedError(f"{self._path}: another writer does not end its transaction") from None
                time.sleep(0.002)  # only where two owners meet: there is no way to wait for a lock with a deadline
        try:
            with self._environment.begin(write=True) as transaction:
                yield transaction
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

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

    def _put(self, items: list[tuple[bytes, bytes]], *, append: bool = False) -> None:
        try:
            with self._writing() as transaction, transaction.cursor() as cursor:
                check_owner(transaction.get(OWNER_KEY), self._token)
                cursor.putmulti(items, append=append)
        except lmdb.MapFullError as error:
            limit_bytes = self._environment.info()["map_size"]
            raise ViewError(f"{self._path}: the view is full at {limit_bytes} bytes: raise the worker's view_map_bytes") from error
        except lmdb.Error as error:
            raise ViewError(f"{self._path}: the view cannot be written: {error}") from error

    def rebuild(self, items: Iterable[tuple[bytes, bytes]], meta: Meta) -> int:
        """Makes the view anew from the store's rows; returns how many. Readers get SequenceUnavailableError until it is complete."""
        self._adopted = _NOTHING
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

    def scrub(self, store: Callable[[Seq[bytes]], Seq[bytes | None]], meta: Meta, rows: int) -> int:
        """Checks the next `rows` rows, and writes damaged ones again from the store at `meta`; returns how many. Each call goes on where
        the last one ended, round and round. `store(keys)`: the store's rows. Raises as `write`.
        """
        if meta.applied_offset < self._adopted:  # the store's rows are older than the view's
            return 0
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            there = cursor.set_range(self._scrubbed)
            found = list(islice(cursor, rows)) if there else []
            damaged = [
                key
                for key, row in found
                if row[4:8] != zlib.crc32(memoryview(row)[8:]).to_bytes(4, "little") or row[16:24] != key[:0:-1]  # or another user's
            ]
        self._scrubbed = found[-1][0] + b"\x00" if found else _FIRST_ROW
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
        """Closes the file; the view stays readable."""
        self._environment.close()
        self._lock_file.close()


class ViewReader:
    """Reads the view from any process of the machine: implements `features.ports.SequenceReader`.

    A read is a few microseconds of look-ups in shared memory; rows are checked (user and checksum), not decoded.
    """

    def __init__(self, folder: str | Path, domain: Domain, partition_count: int) -> None:
        """`folder` is the worker's view folder; it may be empty still."""
        self._folder = Path(folder)
        self._partition_count = partition_count
        self._sequence_ids = {name: sequence.id for name, sequence in domain.sequence.items()}
        self._fingerprints = fingerprints(definitions(domain))
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
        for i, user_id in enumerate(user_ids):
            by_partition.setdefault(partition_of(user_key(user_id), self._partition_count), []).append(i)
        readings: list[Reading | None] = [None] * len(user_ids)
        try:
            for partition, indices in by_partition.items():
                keys = [row_key(sequence_id, user_ids[i]) for i in indices]
                meta, rows = self._fetch(partition, keys)
                watermark = Position(meta.log_epoch, partition, meta.applied_offset)
                for i, row in zip(indices, rows, strict=True):
                    self._check(row, user_ids[i])
                    readings[i] = Reading(user_ids[i], row, watermark, meta.log_clock_ms)
        except SequenceUnavailableError:
            self._counters["unavailable"] += 1
            raise
        except SequenceCorruptError:
            self._counters["corrupt"] += 1
            raise
        return [reading for reading in readings if reading is not None]

    def position(self, user_id: int) -> Position:
        """See `features.ports.SequenceReader.position`."""
        partition = partition_of(user_key(user_id), self._partition_count)
        meta, _ = self._fetch(partition, ())
        return Position(meta.log_epoch, partition, meta.applied_offset)

    def positions(self) -> list[Position]:
        """The watermark of every partition that has a view now."""
        found = []
        for partition in range(self._partition_count):
            try:
                meta, _ = self._fetch(partition, ())
            except SequenceUnavailableError:
                continue
            found.append(Position(meta.log_epoch, partition, meta.applied_offset))
        return found

    def statistics(self) -> dict[str, float]:
        """Counters since start."""
        return dict(self._counters)

    def close(self) -> None:
        """Closes every partition's view."""
        for _, environment in self._open.values():
            environment.close()
        self._open.clear()

    def _fetch(self, partition: int, keys: Seq[bytes]) -> tuple[Meta, list[bytes]]:
        """Meta and rows of one moment; an empty row where there is none."""
        environment = self._environment(partition)
        try:
            with environment.begin() as transaction:
                encoded = transaction.get(META_KEY)
                rows = [transaction.get(key, b"") for key in keys]
        except lmdb.MapResizedError:
            environment.set_mapsize(0)  # the worker's limit was raised: adopt its size
            return self._fetch(partition, keys)
        except lmdb.Error as error:
            raise SequenceUnavailableError(f"{self._folder / str(partition)}: the view cannot be read: {error}") from error
        self._counters["rows_missing"] += rows.count(b"")
        return self._meta(partition, encoded), rows

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
        path = self._folder / str(partition)
        known = self._open.get(partition)
        try:
            identity = _identity(path / _DATA_FILE)
        except OSError as error:
            raise SequenceUnavailableError(f"{path}: no view of partition {partition} yet: is the worker running?") from error
        if known is not None and known[0] == identity:
            return known[1]
        with self._opening:
            return self._reopen(partition, path, identity)

    def _reopen(self, partition: int, path: Path, identity: tuple[int, int]) -> lmdb.Environment:
        try:
            known = self._open.get(partition)
            if known is not None:
                if known[0] == identity:
                    return known[1]
                known[1].close()
                del self._open[partition]
                self._counters["reopened"] += 1
            environment = lmdb.open(str(path), map_size=MAP_BYTES, readonly=True, max_readers=_READERS_MAX, max_spare_txns=4)
            if _identity(path / _DATA_FILE) != identity:
                environment.close()
                raise SequenceUnavailableError(f"{path}: the worker is replacing the view: retry")
        except (OSError, lmdb.Error) as error:
            raise SequenceUnavailableError(f"{path}: the view of partition {partition} cannot be opened yet: {error}") from error
        environment.reader_check()
        self._open[partition] = (identity, environment)
        return environment

    def _check(self, row: bytes, user_id: int) -> None:
        """The header's own checks in two comparisons; `decode_row` says what is wrong."""
        if row and (row[4:8] != zlib.crc32(memoryview(row)[8:]).to_bytes(4, "little") or row[16:24] != user_id.to_bytes(8, "little")):
            decode_row(row, user_id)
            raise SequenceCorruptError(f"row of user {user_id}: header does not agree")


def check_owner(stored: bytes | None, token: int) -> None:
    """Raises FencedError where the token in a view is newer than a writer's own."""
    if int.from_bytes(stored or b"", "little") != token:
        raise FencedError("another worker has taken the view over")


def _checked(items: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a store; raises SequenceCorruptError at one whose checksum differs, so that no damage is copied."""
    for key, row in items:
        if row[4:8] != zlib.crc32(memoryview(row)[8:]).to_bytes(4, "little"):
            decode_row(row)
        yield key, row


def disk_bytes(folder: str | Path) -> Mapping[int, int]:
    """Size of each partition's view, by partition."""
    return {int(path.parent.name): path.stat().st_size for path in Path(folder).glob(f"*/{_DATA_FILE}") if path.parent.name.isdigit()}


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_dev


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()

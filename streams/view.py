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
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import lmdb

from features.ports import SequenceCorruptError
from features.sequence import HEADER_DTYPE, decode_row, is_whole
from streams.errors import FencedError, StateError, ViewError
from streams.state import META_KEY, Meta

log = logging.getLogger(__name__)

MAP_BYTES = 64 << 30
"""Address space of one partition's view. The file grows as it is written; this is only its limit."""

READERS_MAX = 510
_REBUILD_ROWS = 5_000
_BOOT_FILE = "boot"
_LOCK_FILE = "writer"
DATA_FILE = "data.mdb"
FRESH_SUFFIX = ".fresh"
_NO_META = b""
_NOTHING = -2  # below the -1 of a state without any record
OWNER_KEY = b"\x00owner"
"""Token of the newest owner, 8 bytes little-endian; like every key that starts with a zero byte it sorts before the rows."""
BEAT_KEY = b"\x00time"
"""When the state last included the log's end, milliseconds since 1970-01-01 UTC by the owner's clock, 8 bytes little-endian."""
_FIRST_ROW = b"\x01"  # sequence ids start at 1
_OFFSET_AT = int(HEADER_DTYPE.fields["offset"][1]) if HEADER_DTYPE.fields else 0


class View(Protocol):
    """The writing end of what readers see: `PartitionView`, and its double in simulations."""

    def sync(self, meta: Meta, scan: Callable[[], Iterator[tuple[bytes, bytes]]], next_offset: int) -> int:
        """Brings the view to the store's moment, or adopts a later one; returns how many rows were copied."""
        ...

    adopted: int
    """Offset of a later moment that it shows already, -2 for none."""

    def write(self, keys: Seq[bytes], rows: Seq[bytes], meta: Meta) -> bool:
        """Rows and meta in one transaction; False: it must be rebuilt. Raises FencedError: a newer owner has taken over."""
        ...

    def rebuild(self, items: Iterable[tuple[bytes, bytes]], meta: Meta) -> int:
        """Makes it anew from the store's rows; returns how many. Raises FencedError."""
        ...

    def rows(self, keys: Seq[bytes], meta: Meta) -> list[bytes | None] | None:
        """Its rows with these keys, where it shows just the moment `meta`."""
        ...

    def beat(self, caught_up_ms: int) -> None:
        """Tells readers when the state last included the log's end. Raises FencedError."""
        ...

    def trim(self, keys: Seq[bytes], before: Seq[bytes], after: Seq[bytes]) -> None:
        """Puts rows in place of others that read the same. Raises FencedError."""
        ...

    def scrub(self, rows_max: int) -> bool:
        """The next step of a copy that holds nothing of what pages held before; True at its end. Raises FencedError."""
        ...

    def close(self) -> None:
        """Closes it; it stays readable."""
        ...


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
        self.adopted = _NOTHING
        """Offset of a later moment that the view shows already: nothing is written until the store reaches it."""
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
        return self._path.exists() and not is_of_this_boot(self._path)

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
        environment = lmdb.open(str(path), map_size=self._map_bytes, sync=False, metasync=False, meminit=True, max_readers=READERS_MAX)
        return environment, (path / _LOCK_FILE).open("ab")

    @property
    def _fresh_path(self) -> Path:
        return self._path.with_name(f"{self._path.name}{FRESH_SUFFIX}")

    def _is_replaced(self) -> bool:
        """Whether readers find another file in this one's place."""
        try:
            return file_identity(str(self._path / _LOCK_FILE)) != file_identity(self._lock_file.fileno())
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
        record came later, and a view of a later moment (another owner's, or of before a crash, up to the log's `next_offset`) stays as it
        is until the store reaches it: readers never go back.

        Raises:
            FencedError: another worker has taken the view over.
            StateError: the view shows records that the log does not have.
        """
        shown = self.meta()
        self.adopted = _NOTHING
        if shown is None or shown.lineage() != meta.lineage():
            return self.rebuild(scan(), meta)
        if shown.applied_offset >= next_offset:
            with self._writing() as transaction:
                check_owner(transaction.get(OWNER_KEY), self._token)  # a newer owner knows a later end
            raise StateError(
                f"{self._path}: readers have seen offset {shown.applied_offset}, the log ends before {next_offset}: it lost records (or is "
                "another one). Give the worker new folders for state and view to rebuild from this log"
            )
        if shown.applied_offset > meta.applied_offset:
            self.adopted = shown.applied_offset
            return 0
        if shown == meta:
            return 0
        if shown.applied_offset == meta.applied_offset and shown.log_clock_ms != meta.log_clock_ms:
            return self.rebuild(scan(), meta)  # of records that the log has lost
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

    def write(self, keys: Seq[bytes], rows: Seq[bytes], meta: Meta) -> bool:
        """Rows and meta in one transaction: readers see all of it or nothing. A view that shows a later moment is left as it is.

        The store must come to the very offset that was adopted: only there the two can be compared. False: they are not of one log (it was
        truncated, and has grown again), or the store has passed that offset by: the view must be rebuilt.

        Raises:
            FencedError: another worker has taken the view over.
            ViewError: the view has no room.
        """
        if meta.applied_offset < self.adopted:
            return True
        if self.adopted != _NOTHING:
            shown, adopted, self.adopted = self.meta(), self.adopted, _NOTHING
            if shown is None or (adopted, shown.log_clock_ms) != (meta.applied_offset, meta.log_clock_ms):
                return False
            keys, rows = (), ()
        self._put([*zip(keys, rows, strict=True), (META_KEY, meta.encode())])
        return True

    def rows(self, keys: Seq[bytes], meta: Meta) -> list[bytes | None] | None:
        """Its rows with these keys, unchecked, None for one that is not there; None for all where it does not show just the moment `meta`.

        Cheaper than the store's (`tests/bench/ingest_profile.py --store` shows it), from memory that readers need anyway.
        """
        try:
            with self._environment.begin() as transaction:
                if transaction.get(META_KEY) != meta.encode():
                    return None
                return [transaction.get(key) for key in keys]
        except lmdb.Error as error:
            log.warning("%s: the store is asked instead: %s", self._path, error)
            return None

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
            with self._writing() as transaction:
                check_owner(transaction.get(OWNER_KEY), self._token)
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
            if file_identity(str(self._fresh_path / _LOCK_FILE)) != file_identity(fresh.lock_file.fileno()):
                raise FencedError(f"{self._path}: another worker copies the view")
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
        self.adopted = _NOTHING
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
        if meta.applied_offset < self.adopted:  # the store's rows are older than the view's
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
            named = {key[:1] + row[16:24][::-1] for key, row in found if is_whole(row)}  # a key may be what is damaged
            wanted = [*damaged, *sorted(named - {key for key, _ in found})]
            good = dict(zip(wanted, store(wanted), strict=True))
            self._put([(key, row) for key, row in good.items() if row is not None])
            self._delete([key for key, row in good.items() if row is None])
        return len(damaged)

    def _delete(self, keys: Seq[bytes]) -> None:
        with self._writing() as transaction:
            check_owner(transaction.get(OWNER_KEY), self._token)
            for key in keys:
                transaction.delete(key)
        self._drop_fresh()  # it may hold them: the copy begins anew

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


def _replace(transaction: lmdb.Transaction, places: list[tuple[bytes, bytes, bytes]]) -> None:
    for key, _, after in places:
        if after:
            transaction.put(key, after)
        else:
            transaction.delete(key)


def file_identity(file: str | int) -> tuple[int, int]:
    """Tells files apart that one after the other have one name: a path or an open file."""
    status = os.stat(file)  # noqa: PTH116 - at every read: pathlib takes three times as long
    return status.st_ino, status.st_dev


def is_of_this_boot(path: Path) -> bool:
    """Whether a view was made since the machine started; what is older was not synced to disk, and may be torn."""
    marker = path / _BOOT_FILE
    return marker.exists() and marker.read_text("ascii") == _boot_id()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()

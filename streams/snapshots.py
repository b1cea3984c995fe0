"""Snapshots: RocksDB checkpoints of partitions in a folder or an object store, content addressed, to restore state from.

Below the URL:
  objects/<xxh3-128 of the bytes>                                a file of checkpoints; what two of them share is there once
  <log epoch, hex>/<partition>/<applied offset, 20 digits>.json  a manifest: the checkpoint's files and where the state stood

A manifest is written when all of its objects are there, and never changed: a crash at any step leaves objects that nobody names, and
`expire` removes them. State is a function of the position, so manifests of two owners of a partition are right, both of them, and no lock
is needed. `expire` may run anywhere, at any time: a manifest stays for `grace_s`, an object that was just written too, and an upload only
relies on older objects where the newest manifest names them. (An upload must take less than half of `grace_s`.)

Hashes find damage, not forgery: whoever may write below the URL is trusted as whoever may write the state folder is.
"""

import json
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
import xxhash

from streams.errors import SnapshotError, StateError, StreamError
from streams.state import Meta

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Is told (bytes done, bytes in all), by one thread at a time."""
Fingerprints = tuple[tuple[int, int], ...]
T = TypeVar("T")

FORMAT_VERSION = 1
_CHUNK_BYTES = 4 << 20
_PART_BYTES = 8 << 20
_LOG_EVERY_S = 5.0
_WHOLE_WRITES = frozenset(("memory", "s3", "s3a", "gs", "gcs", "abfs", "az"))
"""File systems on which a file is there when it is complete, or not at all. Elsewhere it is written beside its place and renamed."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EPOCH, _MANIFEST, _OBJECT = re.compile(r"[0-9a-f]{16}"), re.compile(r"(\d{20})\.json"), re.compile(r"[0-9a-f]{32}")


class ManifestError(SnapshotError):
    """A manifest is damaged, or written by a newer program."""


class _DamagedError(Exception):
    """A file of a snapshot is missing or is not what it was."""


@dataclass(frozen=True)
class File:
    """A checkpoint's file. hash: xxh3-128 of its bytes, hex; size: bytes."""

    name: str
    hash: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """A snapshot: its files, and the state's moment as in `streams.state.Meta`. created_ms: when the upload ended."""

    log_epoch: int
    partition: int
    applied_offset: int
    log_clock_ms: int
    start_offset: int
    leader_epoch: int
    fingerprints: Fingerprints
    created_ms: int
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        """Where it stands below the URL."""
        return f"{self.log_epoch:016x}/{self.partition}/{self.applied_offset:020d}.json"

    def encode(self) -> bytes:
        """JSON with a checksum; integers of 64 bits as hexadecimal text, for readers that take numbers for floats."""
        fields: dict[str, Any] = {"format": FORMAT_VERSION, **asdict(self)}
        fields["log_epoch"] = f"{self.log_epoch:016x}"
        fields["fingerprints"] = [[number, f"{fingerprint:016x}"] for number, fingerprint in self.fingerprints]
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode() + b"\n"

    @staticmethod
    def decode(data: bytes, where: str) -> "Manifest":
        """Raises ManifestError, which names `where`."""
        try:
            fields = json.loads(data)
            intact = fields.pop("checksum") == _checksum(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(f"{where}: the manifest is damaged: {error}") from error
        if not intact:
            raise ManifestError(f"{where}: the manifest is damaged: checksum differs")
        if fields.pop("format") != FORMAT_VERSION:
            raise ManifestError(f"{where}: the manifest was written by a newer program: upgrade this one")
        fields["log_epoch"] = int(fields["log_epoch"], 16)
        fields["fingerprints"] = tuple((number, int(fingerprint, 16)) for number, fingerprint in fields["fingerprints"])
        fields["files"] = tuple(File(**file) for file in fields["files"])
        for file in fields["files"]:
            if not _FILE_NAME.fullmatch(file.name) or not _OBJECT.fullmatch(file.hash):
                raise ManifestError(f"{where}: file {file.name!r} is none of a checkpoint")
        return Manifest(**fields)


@dataclass(frozen=True)
class Taken:
    """What `Snapshots.take` did; nothing was uploaded where this moment was there already."""

    manifest: Manifest
    files_uploaded: int
    bytes_uploaded: int


@dataclass(frozen=True)
class Restored:
    """What `Snapshots.restore` did. `passed_over`: why newer snapshots were not taken."""

    manifest: Manifest
    seconds: float
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class Expired:
    """What `Snapshots.expire` removed."""

    manifests: int
    objects: int
    bytes: int


class Snapshots:
    """The snapshots below a URL of any fsspec file system. May be used by several threads; transfers run in a few of its own."""

    def __init__(self, url: str, *, options: Mapping[str, Any] | None = None, transfers: int = 4, grace_s: float = 3600.0) -> None:
        """`options`: the file system's own, credentials among them; they are never logged. `transfers`: files in transfer at once.

        Raises:
            SnapshotError: no such file system, or it cannot be set up.
        """
        self.where = re.sub(r"//[^/@]*@", "//", url)
        self._transfers, self._grace_s = transfers, grace_s
        with self._reaching("set up"):
            # A listing that is remembered would hide what another process wrote or removed.
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **(options or {}))
        self._root = root.rstrip("/")
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._is_whole = bool(protocols & _WHOLE_WRITES)
        # s3fs holds whole files of up to 100 MB in memory otherwise, one a thread.
        self._put_options = {"chunksize": _PART_BYTES, "max_concurrency": 1} if "s3" in protocols else {}
        self._hashes: dict[int, dict[tuple[object, ...], str]] = {}
        self.restoring: dict[int, tuple[int, int]] = {}
        """(bytes done, bytes in all) of each partition that is being restored now."""

    def manifests(self, log_epoch: int | None = None, partition: int | None = None) -> list[Manifest]:
        """All snapshots, newest first within (epoch, partition); a damaged manifest is logged and left out. Raises SnapshotError."""
        names = [n for n in self._names() if log_epoch in (None, _place(n)[0]) and partition in (None, _place(n)[1])]
        with self._pool() as pool:
            return [manifest for manifest in pool.map(self._read_or_log, names) if manifest is not None]

    def newest(self, partition: int, log_epoch: int, kept: Fingerprints, *, first: int = 0) -> Manifest | None:
        """The newest snapshot of these definitions that waits for the record `first` or a later one. Raises SnapshotError."""
        return next(self._usable(partition, log_epoch, kept, first, []), None)

    def take(
        self,
        folder: Path,
        meta: Meta,
        *,
        progress: Progress = lambda *_: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Taken:
        """Uploads a checkpoint in `folder` (`streams.store.RocksPartition.checkpoint`) that stands at `meta`.

        Raises:
            SnapshotError: the upload failed or was cancelled; what was uploaded is taken up by the next one.
        """
        name = f"{meta.log_epoch:016x}/{meta.partition}/{meta.applied_offset:020d}.json"
        there = self._read_or_log(name, missing_ok=True)
        if there is not None and _is_of(there, meta) and not self._absent(there.files, relied_on=there.files):
            return Taken(there, 0, 0)
        sources = dict(self._hash_files(folder, meta.partition))
        newest = self.newest(meta.partition, meta.log_epoch, meta.fingerprints)
        missing = self._absent(sources, relied_on=newest.files if newest else ())
        self._upload({file: sources[file] for file in missing}, progress, cancelled)
        manifest = Manifest(
            meta.log_epoch,
            meta.partition,
            meta.applied_offset,
            meta.log_clock_ms,
            meta.start_offset,
            meta.leader_epoch,
            meta.fingerprints,
            time.time_ns() // 1_000_000,
            tuple(sorted(sources, key=lambda file: file.name)),
        )
        self._write(manifest.name, lambda path: self._fs.pipe_file(path, manifest.encode()))
        # An `expire` that had looked for names before there was this one may have removed what it names since.
        gone = self._absent(sources, relied_on=tuple(sources))
        self._upload({file: sources[file] for file in gone}, progress, cancelled)
        uploaded = {file.hash: file.size for file in (*missing, *gone)}
        return Taken(manifest, len(uploaded), sum(uploaded.values()))

    def restore(
        self,
        partition: int,
        log_epoch: int,
        into: Path,
        *,
        kept: Fingerprints,
        first: int = 0,
        skip: int = 0,
        offset: int | None = None,
        progress: Progress = lambda *_: None,
    ) -> Restored:
        """Puts the newest good snapshot in the place of the folder `into`; what was there is set aside (`set_aside`).

        Every file is checked while it comes in; where one is missing or damaged, the next older snapshot is taken. `into` is not touched
        before the new content is complete. `kept`, `first`: as in `newest`. `skip`: so many of the newest ones are passed over. `offset`:
        only this one.

        Raises:
            StateError: no snapshot could be restored.
            SnapshotError: the snapshots cannot be reached.
        """
        self._hashes.pop(partition, None)
        passed_over: list[str] = []
        coming = into.with_name(f"{into.name}.restoring")
        candidates = (m for m in self._usable(partition, log_epoch, kept, first, passed_over) if offset in (None, m.applied_offset))
        for i, manifest in enumerate(candidates):
            if i < skip:
                passed_over.append(f"{manifest.name}: an earlier restore went wrong")
                continue
            started_s = time.monotonic()
            log.info("partition %d: restores %s/%s, %.1f MB", partition, self.where, manifest.name, manifest.size / 1e6)
            try:
                shutil.rmtree(coming, ignore_errors=True)
                coming.mkdir(parents=True)
                self._download(manifest, coming, self._telling(partition, progress))
                set_aside(into)
                coming.rename(into)
            except _DamagedError as error:
                passed_over.append(f"{manifest.name}: {error}")
                log.error("SNAPSHOT DAMAGED: %s/%s; taking the one before it", self.where, passed_over[-1])  # noqa: TRY400
                continue
            except OSError as error:
                raise StateError(f"{coming}: the snapshot cannot be written: {error}") from error
            finally:
                self.restoring.pop(partition, None)
                shutil.rmtree(coming, ignore_errors=True)
            restored = Restored(manifest, time.monotonic() - started_s, tuple(passed_over))
            log.info("partition %d: at offset %d, after %.1f s", partition, manifest.applied_offset, restored.seconds)
            return restored
        reasons = "; ".join(passed_over) or "there is none"
        raise StateError(f"partition {partition} of log {log_epoch:016x}: no snapshot below {self.where} could be restored: {reasons}")

    def verify(
        self, manifests: Iterable[Manifest], *, remove_damaged: bool = False, progress: Progress = lambda *_: None
    ) -> dict[str, str]:
        """Reads every object that they name; returns what is wrong by object. Raises SnapshotError.

        remove_damaged: removes such objects, so that the owner's next snapshot uploads the file again; until then, and in older ones, it is
        missing.
        """
        files = {file.hash: file for manifest in manifests for file in manifest.files}
        done = _Sum(sum(file.size for file in files.values()), progress)
        wrong: dict[str, str] = {}

        def check(file: File) -> None:
            try:
                self._fetch(file, lambda _: None, done)
            except _DamagedError as error:
                wrong[file.hash] = str(error)
                if remove_damaged:
                    self._remove(f"objects/{file.hash}")

        self._each(check, files.values())
        return wrong

    def expire(self, keep: int, *, created_before_ms: int | None = None) -> Expired:
        """Removes all but the `keep` newest good snapshots of each epoch and partition, and then the objects that none names any more.

        What is younger than `grace_s` stays. `created_before_ms`: removes snapshots from before that time whatever `keep` says, the last
        one included (an erasure's deadline).

        Raises:
            SnapshotError: stopped half-way; what a manifest names is still there.
        """
        if keep < 1:
            raise ValueError(f"keep: {keep} is less than 1")
        with self._reaching("listed"):
            found = self._fs.find(self._root, detail=True)
        sizes = {path[len(self._root) + 1 :]: (info["size"], path) for path, info in found.items()}
        old = [name for name in self._beyond(keep, created_before_ms) if self._is_old(name)]
        self._each(self._remove, old)
        live = {file.hash for manifest in self.manifests() for file in manifest.files}
        unnamed = [name for name in sizes if name.startswith("objects/") and name.removeprefix("objects/") not in live]
        unnamed += [name for name in sizes if name.endswith(".part")]
        # The age is asked now: the object may have been written again since the listing.
        gone = [name for name in dict.fromkeys(unnamed) if self._is_old(name)]
        self._each(self._remove, gone)
        return Expired(len(old), len(gone), sum(sizes[name][0] for name in gone))

    def _beyond(self, keep: int, created_before_ms: int | None) -> Iterator[str]:
        """Names of the manifests to remove, damaged ones among them; those count for nothing."""
        kept: dict[tuple[int, int], int] = {}
        names = self._names()
        with self._pool() as pool:
            manifests = list(pool.map(self._read_or_log, names))
        for name, manifest in zip(names, manifests, strict=True):
            place = _place(name)[:2]
            is_due = manifest is not None and created_before_ms is not None and manifest.created_ms < created_before_ms
            if is_due or kept.get(place, 0) >= keep:
                yield name
            elif manifest is not None:
                kept[place] = kept.get(place, 0) + 1

    # Manifests.

    def _names(self, below: str = "") -> list[str]:
        """Names of manifests, newest first within (epoch, partition)."""
        with self._reaching("listed"):
            if below:
                paths = self._fs.find(f"{self._root}/{below}")
            else:
                tops = [path.rstrip("/") for path in self._fs.ls(self._root, detail=False)] if self._fs.exists(self._root) else []
                paths = [path for top in tops if _EPOCH.fullmatch(top.rpartition("/")[2]) for path in self._fs.find(top)]
        names = [path[len(self._root) + 1 :] for path in paths]
        return sorted((name for name in names if _is_manifest(name)), key=lambda name: (*_place(name)[:2], -_place(name)[2]))

    def _usable(self, partition: int, log_epoch: int, kept: Fingerprints, first: int, passed_over: list[str]) -> Iterator[Manifest]:
        for name in self._names(f"{log_epoch:016x}/{partition}"):
            manifest = self._read_or_log(name, missing_ok=True)
            if manifest is None:
                passed_over.append(f"{name}: the manifest is damaged")
            elif manifest.fingerprints != kept:
                passed_over.append(f"{name}: of other [sequence] definitions")
            elif manifest.applied_offset + 1 < first:
                passed_over.append(f"{name}: the log now starts at {first}, behind it")
            else:
                yield manifest

    def _read_or_log(self, name: str, missing_ok: bool = False) -> Manifest | None:
        try:
            with self._reaching("read"):
                data = self._fs.cat_file(f"{self._root}/{name}")
            manifest = Manifest.decode(data, f"{self.where}/{name}")
        except FileNotFoundError:  # expired just now
            if not missing_ok:
                log.info("%s/%s: removed meanwhile", self.where, name)
            return None
        except ManifestError as error:
            log.error("SNAPSHOT DAMAGED: %s", error)  # noqa: TRY400
            return None
        return manifest

    # Objects.

    def _hash_files(self, folder: Path, partition: int) -> list[tuple[File, Path]]:
        """The checkpoint's files. Tables never change: each is hashed once, and known again by its name, size, inode and time."""
        before, found = self._hashes.get(partition, {}), []
        known: dict[tuple[object, ...], str] = {}
        for path in sorted(folder.iterdir()):
            status = path.stat()
            key = (path.name, status.st_size, status.st_ino, status.st_dev, status.st_mtime_ns)
            digest = before.get(key) if path.suffix == ".sst" else None
            if digest is None:
                with path.open("rb") as file:
                    digest, _ = _digest(file)
            known[key] = digest
            found.append((File(path.name, digest, status.st_size), path))
        self._hashes[partition] = known
        return found

    def _absent(self, files: Iterable[File], relied_on: Iterable[File]) -> list[File]:
        """Files whose object is missing or of another size, or may be removed at any moment: old, and not named by `relied_on`."""
        named = {file.hash for file in relied_on}

        def is_absent(file: File) -> bool:
            info = self._info(f"objects/{file.hash}")
            return info is None or info["size"] != file.size or (file.hash not in named and _age_s(info) > self._grace_s / 2)

        once = list({file.hash: file for file in files}.values())
        with self._pool() as pool:
            return [file for file, absent in zip(once, pool.map(is_absent, once), strict=True) if absent]

    def _upload(self, sources: Mapping[File, Path], progress: Progress, cancelled: Callable[[], bool]) -> None:
        done = _Sum(sum(file.size for file in sources), progress)

        def put(file: File) -> None:
            if cancelled():
                raise SnapshotError(f"{self.where}: the upload was cancelled")
            self._write(f"objects/{file.hash}", lambda path: self._fs.put_file(str(sources[file]), path, **self._put_options))
            done.add(file.size)

        self._each(put, sources)

    def _download(self, manifest: Manifest, folder: Path, progress: Progress) -> None:
        done = _Sum(manifest.size, progress)

        def get(file: File) -> None:
            with (folder / file.name).open("xb") as target:

                def write(chunk: bytes) -> None:
                    try:
                        target.write(chunk)
                    except OSError as error:
                        raise StateError(f"{folder}: the snapshot cannot be written: {error}") from error

                self._fetch(file, write, done)

        self._each(get, manifest.files)

    def _telling(self, partition: int, progress: Progress) -> Progress:
        logged_s = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal logged_s
            self.restoring[partition] = done, total
            if time.monotonic() - logged_s > _LOG_EVERY_S:
                logged_s = time.monotonic()
                log.info("partition %d: %.0f of %.0f MB restored", partition, done / 1e6, total / 1e6)
            progress(done, total)

        return tell

    def _fetch(self, file: File, write: Callable[[bytes], None], done: "_Sum") -> None:
        try:
            with self._reaching("read"), self._fs.open(f"{self._root}/objects/{file.hash}", "rb", block_size=_PART_BYTES) as source:
                digest, size = _digest(source, write, done.add)
        except FileNotFoundError:
            raise _DamagedError(f"object {file.hash} ({file.name}) is missing") from None
        if (digest, size) != (file.hash, file.size):
            raise _DamagedError(f"object {file.hash} ({file.name}) is damaged: {size} of {file.size} bytes with hash {digest}")

    def _write(self, name: str, put: Callable[[str], object]) -> None:
        path = f"{self._root}/{name}"
        try:
            with self._reaching("written"):
                if self._is_whole:
                    put(path)
                    return
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                beside = f"{path}.{secrets.token_hex(4)}.part"
                put(beside)
                self._fs.mv(beside, path)
        except FileNotFoundError as error:
            raise SnapshotError(f"snapshots at {self.where} cannot be written: {error}. Is there such a bucket?") from error

    def _remove(self, name: str) -> None:
        with self._reaching("removed"):
            try:
                self._fs.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return  # another expiry was faster

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            with self._reaching("looked at"):
                found: dict[str, Any] = self._fs.info(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return found

    def _is_old(self, name: str) -> bool:
        info = self._info(name)
        return info is not None and _age_s(info) >= self._grace_s

    def _each(self, do: Callable[[T], None], items: Iterable[T]) -> None:
        """Does it for each, a few at a time; the first error ends it."""
        with self._pool() as pool:
            futures = [pool.submit(do, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._transfers, thread_name_prefix="snapshot-transfer")

    @contextmanager
    def _reaching(self, done: str) -> Iterator[None]:
        """File systems raise errors of their libraries' own; a missing file is FileNotFoundError in all of them."""
        try:
            yield
        except (FileNotFoundError, StreamError):
            raise
        except Exception as error:
            what = str(error) or type(error).__name__
            raise SnapshotError(f"snapshots at {self.where} cannot be {done}: {what}. Check snapshot_url and snapshot_options") from error


class _Sum:
    """Adds up bytes that several threads transfer, and tells."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._progress(self._done, self._total)


def set_aside(folder: Path, *, kept: int = 2) -> Path | None:
    """Renames a partition's folder to `<name>.aside-<n>`, for whoever wants to see what went wrong; None: there was no data in it.

    Of those that stand there, the `kept` newest stay. The folder's database must be closed.
    """
    if not any(path.stat().st_size for pattern in ("*.sst", "*.log") for path in folder.glob(pattern)):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    before = sorted(folder.parent.glob(f"{folder.name}.aside-*"), key=_number)
    for path in before[: max(0, len(before) + 1 - kept)]:
        shutil.rmtree(path)
    aside = folder.with_name(f"{folder.name}.aside-{_number(before[-1]) + 1 if before else 1}")
    folder.rename(aside)
    log.warning("%s: set aside as %s", folder, aside.name)
    return aside


def _is_of(manifest: Manifest, meta: Meta) -> bool:
    return (manifest.fingerprints, manifest.start_offset) == (meta.fingerprints, meta.start_offset)


def _digest(
    source: BinaryIO, write: Callable[[bytes], None] = lambda _: None, count: Callable[[int], None] = lambda _: None
) -> tuple[str, int]:
    """(xxh3-128 in hexadecimal, bytes) of what is read; every chunk is also written."""
    state, size = xxhash.xxh3_128(), 0
    while chunk := source.read(_CHUNK_BYTES):
        state.update(chunk)
        write(chunk)
        size += len(chunk)
        count(len(chunk))
    return state.hexdigest(), size


def _checksum(fields: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


def _is_manifest(name: str) -> bool:
    epoch, _, rest = name.partition("/")
    partition, _, file = rest.partition("/")
    return bool(_EPOCH.fullmatch(epoch) and partition.isdecimal() and _MANIFEST.fullmatch(file))


def _place(name: str) -> tuple[int, int, int]:
    """(log epoch, partition, offset) of a manifest's name."""
    epoch, partition, file = name.split("/")
    return int(epoch, 16), int(partition), int(file.removesuffix(".json"))


def _age_s(info: Mapping[str, Any]) -> float:
    """Seconds since a file was written, by what its file system calls that time; unknown counts as now."""
    written = next((info[key] for key in ("LastModified", "mtime", "last_modified", "updated", "created") if key in info), None)
    if isinstance(written, str):
        written = datetime.fromisoformat(written)
    if isinstance(written, datetime):
        written = (written if written.tzinfo else written.replace(tzinfo=UTC)).timestamp()
    return time.time() - written if isinstance(written, (int, float)) else 0.0


def _number(aside: Path) -> int:
    number = aside.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0

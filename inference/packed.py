"""Training arrays on disk: a folder of NumPy files, written once, mapped by whoever trains.

A folder's name is the fingerprint of everything that its bytes depend on, so that a log, a domain file, a generation or a ledger that has
changed gives another folder. It appears when it is whole.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import xxhash

from features.domain import Domain
from features.erasures import Erased, ledger_fingerprint
from features.logs import ACTIONS, IMPRESSIONS, PACKED, SERVED, log_files

Array = npt.NDArray[Any]

FORMAT = 1
META = "meta.json"
KEPT = 3
"""Folders of a ranker that stay: the newest, and those of trainings beside it."""
_HEADER_BYTES = 192


class ArrayWriter:
    """Appends to one .npy file, whose length is known at the end."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))
        self._like: Array | None = None
        self.rows = 0

    def append(self, values: Array) -> None:
        """Rows behind those that are there: [n, ...]."""
        self._like = values[:0]
        self._file.write(np.ascontiguousarray(values).data)
        self.rows += len(values)

    def close(self) -> None:
        """Writes the header."""
        like = np.zeros(0) if self._like is None else self._like
        said = f"{{'descr': {like.dtype.str!r}, 'fortran_order': False, 'shape': {(self.rows, *like.shape[1:])}, }}"
        head = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(head + said.encode().ljust(_HEADER_BYTES - 11) + b"\n")
        self._file.close()


class PackedWriter:
    """A folder in the making: a context manager that leaves nothing when its block raises."""

    def __init__(self, target: Path, meta: Mapping[str, Any]) -> None:
        """`target`: where the folder appears; `meta`: what its meta.json says."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._target, self._meta = target, dict(meta)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=target.parent))
        self._arrays: dict[str, ArrayWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for array in self._arrays.values():
            array.close()
        try:
            if kind is None:
                (self._folder / META).write_text(json.dumps(self._meta, indent=1) + "\n", "utf-8")
                if not self._target.exists():
                    self._folder.rename(self._target)
        except OSError:
            if not self._target.exists():  # another process was faster
                raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # gone after a rename

    def append(self, name: str, values: Array) -> None:
        """Rows behind those that array `name` has."""
        if name not in self._arrays:
            self._arrays[name] = ArrayWriter(self._folder / f"{name}.npy")
        self._arrays[name].append(values)


def read_packed(folder: Path) -> dict[str, Array]:
    """Every array of a folder by name, mapped and read-only.

    Raises:
        OSError, ValueError: it is not there, or one of its files is damaged: pack again.
    """
    if not (folder / META).is_file():
        raise FileNotFoundError(f"{folder}: no packed arrays there")
    # Plain views: np.take on a memmap object copies all of it.
    return {path.stem: np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in sorted(folder.glob("*.npy"))}


def packed_folder(cache: Path, ranker_name: str, fingerprint: str) -> Path:
    """Where the arrays of a fingerprint stand below a log's folder."""
    return cache / f"{ranker_name}-{fingerprint}"


def forget_others(folder: Path, ranker_name: str, ledger: str) -> None:
    """Removes what stands beside `folder` of the same ranker: packed under another ledger, or not among the newest KEPT."""
    os.utime(folder)
    found = [path for path in folder.parent.glob(f"{ranker_name}-*") if len(path.name) == len(folder.name) and path != folder]
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for place, path in enumerate(found):
        try:
            current = json.loads((path / META).read_text("utf-8"))["ledger"] == ledger
        except (OSError, ValueError, KeyError):
            current = False
        if not current or place >= KEPT - 1:
            shutil.rmtree(path, ignore_errors=True)


def fingerprint_of(domain: Domain, ranker_name: str, log: Path, generations: Mapping[str, list[str]], erased: Erased) -> str:
    """Identity of the packed arrays, 16 hexadecimal digits: of the log's bytes, the domain file, the generations of each space that may be
    looked into, and the ledger. Of how the model is built only whether the place in the list is a feature."""
    shape = domain.model_dump_json(exclude={"ranker", "log"})
    ranker = domain.ranker[ranker_name].model_dump_json(exclude={"model", "score", "candidates_max", "refresh"})
    has_position = bool(domain.ranker[ranker_name].model.position_max)
    said = [FORMAT, ranker_name, shape, ranker, has_position, sorted(generations.items()), ledger_fingerprint(erased)]
    hasher = xxhash.xxh3_64(repr(said).encode())
    for path in (path for name in (ACTIONS, IMPRESSIONS, SERVED) for path in log_files(log, name) if path.exists()):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    return hasher.hexdigest()


def default_cache(log: str | Path) -> Path:
    """Where a log's packed arrays stand: beside it, so that whoever forgets a user there forgets them here."""
    return Path(log) / PACKED

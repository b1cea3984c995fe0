"""Fixed-width records on disk, in files by a hash: what belongs together is in one file, which fits into memory."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.columns import U64

BUCKETS_MAX = 256
_MIX = np.uint64(0x9E3779B97F4A7C15)


def bucket_count(size_bytes: int, memory_bytes: int) -> int:
    """Files in which each has about a sixteenth of `memory_bytes`, up to BUCKETS_MAX; beyond, a file grows with the log."""
    return min(BUCKETS_MAX, 1 + 16 * size_bytes // memory_bytes)


class Buckets:
    """Records of one dtype, appended in their order to `count` files below `folder`."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], count: int) -> None:
        folder.mkdir(parents=True)
        self.count = count
        self._dtype = dtype
        self._paths = [folder / f"{n:03}.records" for n in range(self.count)]
        for path in self._paths:
            path.touch()

    def of(self, keys: U64) -> npt.NDArray[np.int64]:
        """Which file each key's records are in: int64 [n]."""
        return ((keys * _MIX >> np.uint64(40)) % np.uint64(self.count)).astype(np.int64)

    def add(self, keys: U64, records: npt.NDArray[np.void]) -> None:
        """Appends each record to the file of its key."""
        bucket = self.of(keys)
        records = records[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=self.count))
        for path, start, end in zip(self._paths, [0, *ends[:-1]], ends, strict=True):
            if end > start:
                with path.open("ab") as file:
                    file.write(records[start:end].tobytes())

    def read(self, n: int) -> npt.NDArray[np.void]:
        """All records of file n, in the order in which they came."""
        return np.fromfile(self._paths[n], self._dtype)


def item_keys(kinds: npt.NDArray[np.uint8], ids: U64) -> U64:
    """One number for each item: uint64 [n], distinct within a kind; two items of different kinds share one by chance only (2^-64)."""
    return ids ^ (kinds * _MIX)


def mixed(first: U64, second: U64) -> U64:
    """One number for each pair: uint64 [n], by chance (2^-64) shared by two pairs."""
    return _scrambled(_scrambled(first + _MIX) ^ second)


def _scrambled(numbers: U64) -> U64:
    """splitmix64's finaliser: every bit of a number changes about half of the result's."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))

"""Where an id stands in a large sorted array: a directory by the id's leading bits, then a search within a few neighbours.

A binary search of millions of ids reads some twenty cache lines of a mapped file for each id, most of them from memory: 1.4 us an id at 10
million. Ids that are counted up or hashed lie evenly, so their leading bits nearly say where they are: one line of the directory and
one or two of the ids are read. Where ids lie too unevenly for that, the binary search stays.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from features.ids import U64

IDS_MIN = 1 << 16
"""Fewer ids than these (512 kB) stay in the cache: a binary search is as fast."""
_BUCKET_IDS = 8
_BUCKET_IDS_MAX = 255


class IdIndex:
    """Places in `ids`, uint64 [n], ascending and distinct. Takes up to n bytes beside them."""

    def __init__(self, ids: U64, *, ids_min: int = IDS_MIN) -> None:
        self._ids = ids
        self._starts: npt.NDArray[Any] | None = None
        if len(ids) < max(ids_min, 2):
            return
        self._low = ids[0]
        span = int(ids[-1]) - int(self._low)
        self._shift = np.uint64(max(0, span.bit_length() - (len(ids) // _BUCKET_IDS).bit_length()))
        self._last = np.uint64(span >> int(self._shift))
        firsts = self._low + (np.arange(int(self._last) + 1, dtype=np.uint64) << self._shift)
        starts = np.append(ids.searchsorted(firsts), len(ids))
        largest = int(np.diff(starts).max())
        if largest > _BUCKET_IDS_MAX:
            return
        self._starts = starts.astype(np.uint32 if len(ids) < 2**32 else np.int64)
        self._steps = [1 << power for power in reversed(range(largest.bit_length()))]

    def rows(self, ids: U64) -> npt.NDArray[np.int64]:
        """1 + the place of each id, int64 [n]; 0: it is not there."""
        known = self._ids
        if not len(known):
            return np.zeros(len(ids), np.int64)
        place = known.searchsorted(ids) if self._starts is None else self._search(ids, self._starts)
        found = known.take(place, mode="clip") == ids
        place += 1
        place *= found
        return place

    def _search(self, ids: U64, starts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """First place whose id is not less, within the bucket that an id belongs to."""
        bucket = np.minimum((ids - self._low) >> self._shift, self._last).astype(np.int64)  # below the first one: wraps, and is not found
        place: npt.NDArray[np.int64] = starts.take(bucket).astype(np.int64)
        bucket += 1
        end = starts.take(bucket).astype(np.int64)
        for step in self._steps:
            there = place + step
            less = self._ids.take(there - 1, mode="clip") < ids
            less &= there <= end
            place += step * less
        return place

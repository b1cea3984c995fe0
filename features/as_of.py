"""Counting by group as of a moment: what the importer's counters and the tree baseline's rates are made of.

Symbols: n records, q questions.
"""

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class AsOf:
    """How many records a group had by a moment. group int64 [n] from 0, time int64 [n]: milliseconds, or any number that ascends.

    Every count is a difference of two places in one sorted array: no loop over records. Times are replaced by their rank, so that (group,
    time) is one number however far apart the times are.
    """

    def __init__(self, group: I64, time: I64) -> None:
        self._times = np.unique(time)
        self._span = len(self._times) + 1
        self._keys = np.sort(group * self._span + self._times.searchsorted(time))

    def before(self, group: I64, moment: I64, since: I64 | None = None) -> I64:
        """Records of each group with a time below the moment, and from `since` on: int64 [q]. A negative group has none."""
        of = group * self._span
        start = of if since is None else of + self._times.searchsorted(since)
        return self._keys.searchsorted(of + self._times.searchsorted(moment)) - self._keys.searchsorted(start)

    def first(self, group: I64) -> npt.NDArray[np.float64]:
        """Least time of each group, float64 [q]; NaN where it has no record."""
        if not len(self._keys):
            return np.full(len(group), np.nan)
        rank = self._keys[np.minimum(self._keys.searchsorted(group * self._span), len(self._keys) - 1)] - group * self._span
        there = (rank >= 0) & (rank < len(self._times))
        return np.where(there, self._times[np.where(there, rank, 0)], np.nan)

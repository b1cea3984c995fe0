"""Records of one partition as columns: what a log gives, and the core takes."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Headers = Seq[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Records:
    """Records of one partition as they came, in offset order; one entry a record.

    offsets int64 [n], ascending; broker_times_ms int64 [n]; headers: by index, of the records that have any; leader_epoch: of the last
    record, -1 for unknown.
    """

    offsets: npt.NDArray[np.int64]
    keys: list[bytes | None]
    values: list[bytes | None]
    broker_times_ms: npt.NDArray[np.int64]
    headers: Mapping[int, Headers] = field(default_factory=dict)
    leader_epoch: int = -1

    def __len__(self) -> int:
        return len(self.offsets)

    def cut_behind(self, offset: int) -> list["Records"]:
        """The records up to `offset` and those behind it, where there are both."""
        end = int(np.searchsorted(self.offsets, offset, "right"))
        if not 0 < end < len(self):
            return [self]
        headers = {i: found for i, found in self.headers.items() if i < end}
        first = Records(self.offsets[:end], self.keys[:end], self.values[:end], self.broker_times_ms[:end], headers)
        return [first, self.from_offset(int(self.offsets[end]))]

    def from_offset(self, offset: int) -> "Records":
        """The records at `offset` and behind it."""
        start = int(np.searchsorted(self.offsets, offset))
        if not start:
            return self
        headers = {i - start: found for i, found in self.headers.items() if i >= start}
        return Records(
            self.offsets[start:], self.keys[start:], self.values[start:], self.broker_times_ms[start:], headers, self.leader_epoch
        )

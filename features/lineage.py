"""Logs that came before the present one: a move to more partitions or to another cluster starts a new log on the old one's state."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from features.ports import Position


@dataclass(frozen=True)
class Predecessor:
    """A log whose whole state the log `successor` starts with. ends: by partition, the last offset that it includes."""

    log_epoch: int
    successor: int
    ends: Mapping[int, int]

    def encode(self) -> bytes:
        """For the announcements topic."""
        ends = {str(partition): offset for partition, offset in sorted(self.ends.items())}
        return json.dumps({"log_epoch": f"{self.log_epoch:016x}", "successor": f"{self.successor:016x}", "ends": ends}).encode()

    @staticmethod
    def decode(data: bytes) -> "Predecessor":
        """Raises ValueError: not one of these."""
        try:
            found = json.loads(data)
            ends = {int(partition): int(offset) for partition, offset in found["ends"].items()}
            return Predecessor(int(found["log_epoch"], 16), int(found["successor"], 16), ends)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a log's predecessor: {error!r}") from error


class Lineage:
    """Compares positions across moves. Positions of a predecessor, up to its end, come before every position of its successors."""

    def __init__(self) -> None:
        self._predecessors: dict[int, Predecessor] = {}

    def add(self, predecessor: Predecessor) -> None:
        """Learns of a move."""
        self._predecessors[predecessor.log_epoch] = predecessor

    def includes(self, log_epoch: int, wanted: Position) -> bool | None:
        """Whether every state of the log `log_epoch` includes `wanted` by the moves that led to it; None: that is not known.

        False: the position is of a predecessor, but of a record that came after the move took its state.
        """
        at, seen = self._predecessors.get(wanted.log_epoch), {wanted.log_epoch}
        if at is None:
            return None
        included = wanted.offset <= at.ends.get(wanted.partition, -1)
        while at is not None and at.successor != log_epoch:
            if at.successor in seen:
                return None
            seen.add(at.successor)
            at = self._predecessors.get(at.successor)
        return included if at is not None else None

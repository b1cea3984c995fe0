"""The law as plain as it can be said: the oracle that tests, benchmarks and simulations compare the fast code with. Never on a hot path."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from features.actions import ACTION, ERASE, EVENT_DTYPE, Batch
from features.logs import LoggedActions
from features.sequence import Definition, Events

_TAIL_AT = 16  # bytes of an event behind event_time_ms and event_id


@dataclass
class NaiveUser:
    """Everything that one user's records said, nothing cut."""

    events: list[tuple[int, bytes]] = field(default_factory=list)
    erasures: list[tuple[int, int]] = field(default_factory=list)
    clock_ms: int = 0

    def sequence(self, what: Definition) -> Events:
        """The sequence by definition."""
        alive: set[bytes] = set()
        for offset, event in self.events:
            time_ms = _time_ms(event)
            erased = any(offset < erase_offset or time_ms <= append_ms for erase_offset, append_ms in self.erasures)
            evicted = what.evict_age_ms is not None and time_ms < self.clock_ms - what.evict_age_ms
            if not erased and not evicted:
                alive.add(event)
        newest_first = sorted(alive, key=_order, reverse=True)
        caps, seen = dict(what.caps), dict[int, int]()
        kept: list[bytes] = []
        for event in newest_first:
            action = int(np.frombuffer(event, EVENT_DTYPE)["action"][0])
            seen[action] = seen.get(action, 0) + 1
            if seen[action] <= caps.get(action, len(newest_first)):
                kept.append(event)
        return np.frombuffer(b"".join(reversed(kept[: what.length])), EVENT_DTYPE)

    def reading(self, what: Definition, log_clock_ms: int) -> Events | None:
        """What a reading at the partition's clock gives: None is no row."""
        events = self.sequence(what)
        if what.evict_age_ms is None or any(_time_ms(event.tobytes()) >= log_clock_ms - what.evict_age_ms for event in events):
            return events
        return events[:0] if self.erasures else None


def naive_fold(batches: Iterable[Batch], base_clock_ms: int = 0) -> dict[int, NaiveUser]:
    """What each user's records say, record by record. `base_clock_ms`: clock of the base, whose records come as `history_batch`."""
    users: dict[int, NaiveUser] = {}
    clock_ms: dict[int, int] = {}
    for batch in batches:
        for i in range(len(batch)):
            if batch.verdict[i] not in (ACTION, ERASE):
                continue
            user = users.setdefault(int(batch.users[i]), NaiveUser())
            user.clock_ms = clock_ms[batch.partition] = max(clock_ms.get(batch.partition, base_clock_ms), int(batch.append_time_ms[i]))
            if batch.verdict[i] == ACTION:
                user.events.append((int(batch.offsets[i]), batch.events[i].tobytes()))
            else:
                user.erasures.append((int(batch.offsets[i]), int(batch.append_time_ms[i])))
    return users


def history_batch(history: LoggedActions, log_epoch: int, partition: int) -> Batch:
    """A base's accepted records as if the log had begun with them: at offsets before 0, by append time, an erasure behind its equals."""
    order = np.lexsort((history.erase, history.append_time_ms))
    offsets = np.arange(-len(history), 0)
    verdict = np.where(history.erase[order], ERASE, ACTION).astype(np.uint8)
    users, events, append_time_ms = history.users[order], history.events[order], history.append_time_ms[order]
    return Batch(log_epoch, partition, offsets, append_time_ms, verdict, users, events, {})


def _time_ms(event: bytes) -> int:
    return int.from_bytes(event[:8], "little", signed=True)


def _order(event: bytes) -> tuple[int, int, bytes]:
    return _time_ms(event), int.from_bytes(event[8:16], "little"), event[_TAIL_AT:]

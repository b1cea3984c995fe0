"""What a seed's log says, and what any state of it must say: records of every kind, and the naive fold at each offset.

The log is drawn whole; the simulation then lets it grow, loses its beginning to retention, and delivers it cut anywhere.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from features.actions import ACTION, APPEND_TIME_HEADER, ERASE, REJECTED, append_time_ms, decode_batch, encode_action, encode_erase
from features.domain import Domain, parse_domain
from features.ids import partition_of, user_key
from features.oracle import NaiveUser, naive_fold
from features.sequence import NEVER_ERASED, Row, encode_row
from streams.records import Records
from streams.state import definitions

EPOCH = 0x5EED
TOPIC = "actions"
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
_START_MS = 100 * DAY_MS
_LEADER_EPOCH = 3

# Sequences of 4 to 8 events, so that few records are enough to cut them; one in most domains, for a fold costs as much as all the rest.
_SEQUENCES = (
    "[sequence.short]\nid = 1\nlength = 4\n",
    "[sequence.capped]\nid = 2\nlength = 6\ncaps = { view = 2 }\n",
    '[sequence.evicting]\nid = 3\nlength = 8\ncaps = { view = 3, click = 4 }\nage_days_max = 2\nevict = "log_clock"\n',
    '[sequence.short]\nid = 1\nlength = 5\n[sequence.evicting]\nid = 3\nlength = 8\nage_days_max = 1\nevict = "log_clock"\n',
)
_DOMAIN = """
name = "simulation"
[entities]
item = 1
[actions]
view = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
[ranker.home]
sequence_length = 4
item_space = "items"
[ranker.home.heads.click]
actions = ["click"]
"""


def _domain(sequences: str) -> Domain:
    name = sequences.split("]")[0].removeprefix("[sequence.")
    return parse_domain(_DOMAIN.replace("[ranker.home]\n", f'{sequences}[ranker.home]\nsequence = "{name}"\n'), source="simulation")


DOMAINS = tuple(_domain(sequences) for sequences in _SEQUENCES)
_KEPT = tuple(definitions(domain) for domain in DOMAINS)
_USERS = {
    count: [[user for user in (*range(1, 30), 2**63, 2**64 - 1) if partition_of(user_key(user), count) == p] for p in range(count)]
    for count in (1, 2)
}


@dataclass
class _User:
    """What a user's accepted records say, in offset order."""

    offsets: list[int] = field(default_factory=list)
    said: list[tuple[int, bytes, int]] = field(default_factory=list)
    """(verdict, event, append time) of each."""


class PartitionPlan:
    """One partition's records, and the oracle of its states."""

    def __init__(self, partition: int, partition_count: int, which: int, draw: random.Random) -> None:
        self._partition_count = partition_count
        self.partition, self.domain, self.kept = partition, DOMAINS[which], _KEPT[which]
        self.users = draw.sample(_USERS[partition_count][partition], draw.randint(2, 4))
        strangers = [user for pool in _USERS[partition_count] for user in pool if user not in self.users]
        self.stranger = next(user for user in strangers if partition_of(user_key(user), partition_count) == partition)
        self.offsets: list[int] = []
        self.keys: list[bytes | None] = []
        self.values: list[bytes | None] = []
        self.broker_times_ms: list[int] = []
        self.headers: list[list[tuple[str, bytes | None]] | None] = []
        self.duplicates = self.cuts = 0
        self._offset, self._clock_ms = 0, _START_MS
        self._said: list[bytes] = []
        for _ in range(draw.randint(12, 30)):
            self._draw_record(draw, strangers)
        self.drawn = len(self.offsets)
        for user in self.users:  # the last lap: every row is read once more, so that no damage stays unseen
            self._clock_ms += MINUTE_MS
            self._append(draw, user_key(user), self._click(draw, user, self._clock_ms))
        self._fold()

    def _draw_record(self, draw: random.Random, strangers: list[int]) -> None:
        self._clock_ms += draw.choice((0, 0, 1, MINUTE_MS, HOUR_MS, 6 * HOUR_MS))
        user, kind = draw.choice(self.users), draw.random()
        key, now_ms = user_key(user), self._clock_ms
        if kind < 0.08:
            self._append(draw, key, encode_erase(user_id=user, event_id=len(self.offsets), reason="asked"))
        elif kind < 0.18 and self._said:
            value = draw.choice(self._said)  # the same bytes again, of whatever user: equal events count once
            self.duplicates += 1
            self._append(draw, user_key(int.from_bytes(value[1:9], "little")), value)
        elif kind < 0.21:
            self._append(draw, key, draw.choice((None, b"", b"\xff\xff\xff", b"not an action")))
        elif kind < 0.23:  # a key that is not the user's, or a user of another partition
            other = draw.choice(strangers)
            misplaced = draw.random() < 0.5 and partition_of(user_key(other), self._partition_count) != self.partition
            self._append(draw, user_key(other), self._click(draw, other if misplaced else user, now_ms))
        elif kind < 0.25:
            self._append(draw, key, self._click(draw, user, now_ms + self.domain.future_tolerance_ms + draw.randint(1, HOUR_MS)))
        elif kind < 0.30:  # imported or re-driven: the header holds an older append time; one that is newer than the broker's is refused
            claimed = now_ms - draw.choice((0, HOUR_MS, DAY_MS, -1))
            value = self._click(draw, user, now_ms - draw.choice((0, HOUR_MS, DAY_MS)))
            self._append(draw, key, value, [(APPEND_TIME_HEADER, str(claimed).encode())])
        else:
            late_ms = draw.choice((0, 0, 0, 1, MINUTE_MS, 6 * HOUR_MS, DAY_MS, 2 * DAY_MS, -5 * MINUTE_MS))
            value = self._click(draw, user, now_ms - late_ms)
            self._said.append(value)
            self._append(draw, key, value)

    def _click(self, draw: random.Random, user: int, time_ms: int) -> bytes:
        return encode_action(
            user_id=user,
            entity_kind=1,
            entity_id=draw.randint(1, 300),
            action=draw.choice((1, 1, 2, 2, 2, 200)),
            event_time_ms=time_ms,
            event_id=draw.randint(0, 3),
        )

    def _append(
        self, draw: random.Random, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]] | None = None
    ) -> None:
        self._offset += draw.random() < 0.03  # a hole, as compaction and transactions leave them
        self.offsets.append(self._offset)
        self.keys.append(key)
        self.values.append(value)
        self.broker_times_ms.append(self._clock_ms)
        self.headers.append(headers)
        self._offset += 1

    def _fold(self) -> None:
        stamps = [append_time_ms(stamp, headers) for stamp, headers in zip(self.broker_times_ms, self.headers, strict=True)]
        self.batch = decode_batch(
            log_epoch=EPOCH,
            partition=self.partition,
            offsets=np.array(self.offsets, np.int64),
            keys=self.keys,
            values=self.values,
            append_times_ms=np.array(stamps, np.int64),
            future_tolerance_ms=self.domain.future_tolerance_ms,
            partition_count=self._partition_count,
        )
        self.rejected = {self.offsets[i] for i in self.batch.reasons}
        self._accepted: list[tuple[int, int]] = []
        self._by_user: defaultdict[int, _User] = defaultdict(_User)
        self._rows: dict[tuple[int, int, int, int], bytes] = {}
        self._clocks: dict[tuple[int, int], int] = {}
        self.erases = 0
        data, width = self.batch.events.tobytes(), self.batch.events.itemsize
        for i, (offset, verdict, user, stamp) in enumerate(
            zip(self.offsets, self.batch.verdict.tolist(), self.batch.users.tolist(), stamps, strict=True)
        ):
            if verdict == REJECTED:
                continue
            self.erases += verdict == ERASE
            self._accepted.append((offset, stamp))
            said = self._by_user[user]
            said.offsets.append(offset)
            said.said.append((verdict, data[i * width : (i + 1) * width], stamp))

    def records(self, first: int, last: int) -> Records:
        """Records first..last by index, as a consumer would give them."""
        headers = {i: found for i, found in enumerate(self.headers[first:last]) if found is not None}
        return Records(
            np.array(self.offsets[first:last], np.int64),
            self.keys[first:last],
            self.values[first:last],
            np.array(self.broker_times_ms[first:last], np.int64),
            headers,
            _LEADER_EPOCH,
        )

    def clock_ms(self, start: int, offset: int) -> int:
        """The log clock of a state that is the fold from record `start` to `offset`."""
        known = self._clocks.get((start, offset))
        if known is None:
            known = max((stamp for at, stamp in self._accepted if start <= at <= offset), default=0)
            self._clocks[start, offset] = known
        return known

    def row(self, sequence_id: int, user: int, start: int, offset: int) -> bytes:
        """The user's row in a state that is the fold from record `start` to `offset`: by the naive oracle, byte for byte."""
        said = self._by_user.get(user)
        if said is None:
            return b""
        own = [i for i, at in enumerate(said.offsets) if start <= at <= offset]
        if not own:
            return b""
        key = sequence_id, user, start, said.offsets[own[-1]]
        known = self._rows.get(key)
        if known is None:
            known = self._rows[key] = self._naive_row(sequence_id, user, said, own, start)
        return known

    def _naive_row(self, sequence_id: int, user: int, said: _User, own: list[int], start: int) -> bytes:
        what, last = self.kept[sequence_id], said.offsets[own[-1]]
        naive = NaiveUser(clock_ms=self.clock_ms(start, last))
        for i in own:
            verdict, event, stamp = said.said[i]
            if verdict == ACTION:
                naive.events.append((said.offsets[i], event))
            else:
                naive.erasures.append((said.offsets[i], stamp))
        events = naive.sequence(what)
        self.cuts += len({event for _, event in naive.events}) > len(events) and not naive.erasures and what.evict_age_ms is None
        erased = max((stamp for _, stamp in naive.erasures), default=NEVER_ERASED)
        return encode_row(Row(user, what.fingerprint, EPOCH, self.partition, last, erased, events))

    def check_oracle(self) -> None:
        """The whole log's rows, made of `features.oracle.naive_fold` itself, are the ones that `row` gives."""
        for user, naive in naive_fold([self.batch]).items():
            for sequence_id, what in self.kept.items():
                mine = self.row(sequence_id, user, 0, self.offsets[-1])
                assert mine[64:] == naive.sequence(what).tobytes(), f"the plan's oracle is wrong for user {user}"


@dataclass(frozen=True)
class Plan:
    """The log of a seed."""

    domain: Domain
    partitions: tuple[PartitionPlan, ...]


def draw_plan(draw: random.Random) -> Plan:
    """One or two partitions of 12 to 30 records and a last one for each user."""
    which, count = draw.choices(range(len(DOMAINS)), (4, 4, 4, 1))[0], draw.choice((1, 1, 2))
    return Plan(DOMAINS[which], tuple(PartitionPlan(partition, count, which, draw) for partition in range(count)))

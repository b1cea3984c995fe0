"""Logs cut into buckets of users: each has its users' rankings and records, and rebuilds their rows as the whole log does."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from features.actions import decode_batch, encode_action, encode_erase
from features.domain import parse_domain
from features.ids import partition_of, user_key
from features.parity import PartitionLog
from features.sequence import definition
from protos.v1.ranking_pb2 import RankingRecord
from streams.archive import DecodingRules, ParquetLog, Records, Span, write_manifest
from streams.log_buckets import bucket_of, spill_actions, spill_rankings

PARTITIONS, EPOCH = 2, 9
USERS = [1, 2, 3, 4, 2**64 - 1]
DOMAIN = parse_domain(
    """
name = "shop"
future_tolerance_ms = 1000
[entities]
product = 1
[actions]
like = { id = 1, kind = "positive" }
[sequence.main]
id = 1
length = 3
age_days_max = 0.0001
evict = "log_clock"
evict_grace_days = 0.0001
[ranker.home]
sequence = "main"
sequence_length = 3
item_space = "items"
heads.like = { actions = ["like"] }
""",
    source="shop.toml",
)
WHAT = definition(DOMAIN, "main")


@dataclass
class MemoryLog:
    records: dict
    topic: str = "t"
    log_epoch: int = EPOCH

    @property
    def partitions(self):
        return {partition: Span(0, len(records)) for partition, records in self.records.items()}

    def read(self, partition):
        records = self.records[partition]
        for start in range(0, len(records), 4):
            piece = records[start : start + 4]
            times, keys, values = zip(*piece, strict=True)
            yield Records(np.arange(start, start + len(piece)), np.array(times, np.int64), list(keys), list(values))


@st.composite
def logs(draw):
    """(rankings, actions): times go back and forth, so that many records do not move the clock."""
    actions = {partition: [] for partition in range(PARTITIONS)}
    for event in range(draw(st.integers(0, 40))):
        user, time_ms = draw(st.sampled_from(USERS)), 100_000 + draw(st.integers(0, 60)) * 1_000
        kind = draw(st.integers(0, 9))
        fields = {"entity_kind": 1, "entity_id": event, "action": 1, "event_time_ms": time_ms, "event_id": event}
        value = encode_erase(user_id=user, event_id=event, reason="asked") if kind == 0 else encode_action(user_id=user, **fields)
        # Some are too far ahead for one of the two rules, some for both, some are no actions.
        append_ms = time_ms - 5_000 if kind == 1 else time_ms - 50_000 if kind == 2 else time_ms
        value = b"garbage" if kind == 3 else value
        actions[partition_of(user_key(user), PARTITIONS)].append((append_ms, user_key(user), value))
    rankings = {partition: [] for partition in range(PARTITIONS)}
    for request in range(draw(st.integers(0, 8))):
        users = draw(st.lists(st.sampled_from(USERS), min_size=1, max_size=3, unique=True))
        record = RankingRecord()
        record.request.user_id, record.request.request_id = users[0], request
        record.request.identities.extend(users[1:])
        for user in users:
            partition = partition_of(user_key(user), PARTITIONS)
            record.watermark.add(partition=partition, offset=draw(st.integers(-1, max(-1, len(actions[partition]) - 1))))
        rankings[partition_of(user_key(users[0]), PARTITIONS)].append((1, user_key(users[0]), record.SerializeToString()))
    return MemoryLog(rankings), MemoryLog(actions)


def partition_log(log, partition, users, tolerance_ms):
    found = PartitionLog(users)
    for records in log.read(partition):
        batch = decode_batch(
            log_epoch=EPOCH,
            partition=partition,
            offsets=records.offsets,
            keys=records.keys,
            values=records.values,
            append_times_ms=records.append_time_ms,
            future_tolerance_ms=tolerance_ms,
            partition_count=PARTITIONS,
        )
        found.add(batch)
    return found


@settings(max_examples=60, deadline=None)
@given(both=logs(), count=st.sampled_from([1, 2, 7]), memory_bytes=st.sampled_from([1, 1 << 20]))
def test_a_bucket_gives_its_users_rows_as_the_whole_does(both, count, memory_bytes, tmp_path_factory):
    rankings, actions = both
    root = tmp_path_factory.mktemp("buckets")
    folders = SimpleNamespace(
        rankings=[root / f"{n}" / "rankings" for n in range(count)], actions=[root / f"{n}" / "actions" for n in range(count)]
    )
    seen, decoded = [], []
    reading = spill_rankings(rankings, folders.rankings, lambda _: True, seen.append, memory_bytes)
    tolerances_ms = (1_000, 10_000)
    rules = [DecodingRules(ms, DOMAIN.encodings) for ms in tolerances_ms]
    spill_actions(actions, folders.actions, reading, rules, 0, decoded.append, memory_bytes)
    assert sum(seen) == sum(map(len, rankings.records.values()))
    assert sum(map(len, decoded)) == sum(map(len, actions.records.values()))
    read = 0
    for n in range(count):
        write_manifest(folders.rankings[n], rankings, "", [])
        write_manifest(folders.actions[n], actions, "", [])
        mine, log = ParquetLog(folders.rankings[n]), ParquetLog(folders.actions[n])
        for partition in range(PARTITIONS):
            values = [value for records in mine.read(partition) for value in records.values]
            read += len(values)
            for record in map(RankingRecord.FromString, values):
                users = [record.request.user_id, *record.request.identities]
                assert bucket_of(np.array(users[:1], np.uint64), count)[0] == n
                for user, at in zip(users, record.watermark, strict=True):
                    for tolerance_ms in tolerances_ms:
                        whole = partition_log(actions, at.partition, USERS, tolerance_ms)
                        part = partition_log(log, at.partition, USERS, tolerance_ms)
                        assert part.clock_at(at.offset) == whole.clock_at(at.offset)
                        assert part.rows_at(WHAT, user, [at.offset]) == whole.rows_at(WHAT, user, [at.offset])
                        assert part.last_erasure(user) == whole.last_erasure(user)
    assert read == sum(seen)

"""A served product for the tests of labelling: actions and rankings in one order of time, as a stack leaves them, over some days.

Users see the top of what they are shown, act on it soon or days later, from several identities, with and without a request id, twice, and
take back; some lists are asked for again, scored in a shadow, or answered by no state.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from test_replay import DOMAIN as REPLAY_DOMAIN
from test_replay import EPOCH, ITEMS, PARTITIONS, START_MS, USERS, MemoryLog, World, make_world, new_request, rank

from deploy.label_bucket import _lists, _Rankings
from deploy.labelling import LabelOptions, label
from deploy.replay import ACTIONS, RANKINGS, ReplayOptions
from features.actions import ACTION, ERASE, decode_batch, encode_action, encode_erase
from features.ids import partition_of, user_key
from features.labels import Rules
from features.labels_oracle import NaiveRanking, NaiveRecord, naive_join
from features.logs import read_requests
from features.pack import Packer
from features.person import events_of_rows, rows_digest
from features.request import inputs_from_request
from features.sequence import apply_batch, as_read, clock_after, definition, touched_users
from features.tables import TableSet
from inference.release import load_model, open_release
from protos.v1.ranking_pb2 import SEQUENCE_SOURCE_LOCAL, SEQUENCE_SOURCE_NONE, RankingRecord
from streams.archive import write_archive

MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
WINDOW_MS, GRACE_MS, LATE_MS = HOUR_MS, 10 * MINUTE_MS, 12 * HOUR_MS
STEP_MS = 18 * MINUTE_MS
NEW_KINDS = """
place = { side = "request", kind = "vector", dimension = 3 }
words = { side = "request", kind = "weighted_list", hash_buckets = 20 }
text = { side = "candidate", kind = "vector", dimension = 2 }
sources = { side = "candidate", kind = "weighted_list", hash_buckets = 9, length_max = 2 }
reasons = { side = "candidate", kind = "list", hash_buckets = 9 }
"""
DOMAIN = (
    REPLAY_DOMAIN.replace("[sequence.main]", 'view = { id = 4, kind = "impression" }\n[sequence.main]')
    .replace("age_days_max = 0.0005", "age_days_max = 0.4")
    .replace("evict_grace_days = 0.0002", "evict_grace_days = 0.1")
    .replace("[ranker.home]", NEW_KINDS + "[ranker.home]")
    .replace('"retrieval"]', '"retrieval", "place", "words", "text", "sources", "reasons"]')
)
CLICK, LIKE, UNLIKE, VIEW = 1, 2, 3, 4
PERSONS = {USERS[1]: (USERS[2],), USERS[3]: (USERS[4], USERS[5]), USERS[6]: (USERS[7],), USERS[8]: (USERS[7],)}
"""USERS[7] is a device that two persons share."""
ERASED = USERS[7]
FIRST_MS, END_MS = START_MS + 30 * HOUR_MS, START_MS + 6 * DAY_MS


class Making:
    """Fills a world's two logs."""

    def __init__(self, world, seed, *, erase):
        self.world, self.rng, self.erase = world, np.random.default_rng(seed), erase
        release = open_release(world.releases / world.release_id)
        self.release, self.domain, self.what = release, release.domain, definition(release.domain, "main")
        self.packer = Packer(release.domain, "home", TableSet.open(world.tables, release.domain, "home"))
        self.model = load_model(release)
        self.rows, self.clock_ms, self.applied = {}, dict.fromkeys(range(PARTITIONS), 0), dict.fromkeys(range(PARTITIONS), 0)
        self.pending, self.event_id = [], 0

    def run(self, steps):
        now_ms = START_MS
        for step in range(steps):
            now_ms += int(self.rng.integers(1, 2 * STEP_MS))
            due = sorted(one for one in self.pending if one[0] <= now_ms)
            self.pending = [one for one in self.pending if one[0] > now_ms]
            for _, user, value in due:
                self.append(now_ms, user, value)
            for user in self.users(3):
                what = int(self.rng.choice([CLICK, LIKE, UNLIKE, 9]))
                self.append(now_ms, user, self.action(user, int(self.rng.choice(ITEMS)), what, now_ms))
            if self.rng.random() < 0.2:
                self.append(now_ms, USERS[0], b"garbage")
            if self.erase and step == steps // 2:
                self.append(now_ms, ERASED, encode_erase(user_id=ERASED, event_id=step, reason="asked"))
            for partition in range(PARTITIONS):
                if self.rng.random() < 0.8:  # else the worker lags behind
                    self.fold(partition)
            for user in self.users(2):
                self.serve(user, now_ms + int(self.rng.integers(0, 5_000)))
        for append_ms, user, value in sorted(self.pending):
            self.append(max(now_ms, append_ms), user, value)

    def users(self, count):
        return [USERS[i] for i in self.rng.permutation(len(USERS))[:count]]

    def append(self, append_ms, user, value):
        self.world.actions.records[partition_of(user_key(user), PARTITIONS)].append((append_ms, user_key(user), value))

    def action(self, user, item, action, time_ms, **more):
        self.event_id += 1
        fields = {"entity_kind": 1, "entity_id": item, "action": action, "event_time_ms": time_ms, "event_id": self.event_id}
        return encode_action(user_id=user, **fields | more)

    def fold(self, partition):
        records = self.world.actions.records[partition]
        start = self.applied[partition]
        if start < len(records):
            batch = decoded(self.world, partition, records[start:], start, self.domain)
            users = touched_users(batch).tolist()
            rows = apply_batch(self.what, batch, [self.rows.get(user) for user in users], self.clock_ms[partition])
            self.rows.update(zip(users, rows, strict=True))
            self.clock_ms[partition] = clock_after(batch, self.clock_ms[partition])
            self.applied[partition] = len(records)

    def asked(self, user, time_ms):
        """A request; what is not said of a feature is missing."""
        request, rng = new_request(self.rng, user, time_ms), self.rng
        count = len(request.candidate_ids) // 8
        for columns, names, n in (
            (request.request_features, ("place", "words"), 1),
            (request.candidate_features, ("text", "sources", "reasons"), count),
        ):
            for name in names:
                if rng.random() < 0.3:
                    continue
                feature, column = self.domain.features[name], columns[name]
                if feature.kind == "vector":
                    column.number = rng.choice([np.nan, 0.5, -2.0], (n, feature.dimension)).astype("<f4").tobytes()
                    continue
                lengths = rng.integers(0, 4, n)
                column.list_length = lengths.astype("<u4").tobytes()
                column.category = rng.integers(0, 30, lengths.sum(), np.uint64).tobytes()
                if feature.kind == "weighted_list":
                    column.number = rng.choice([0, 0.25, 3], lengths.sum()).astype("<f4").tobytes()
        return request

    def serve(self, user, time_ms):
        request = self.asked(user, time_ms)
        request.candidate_kinds = b"\x01" * (len(request.candidate_ids) // 8)
        request.identities.extend(PERSONS.get(user, ()))
        record = self.rank(request)
        if self.rng.random() < 0.1:
            shadow = RankingRecord.FromString(record.SerializeToString())
            shadow.shadow = True
            self.log(shadow)
        if self.rng.random() < 0.1:  # asked again
            again = self.asked(user, time_ms + 60_000)
            again.request_id = request.request_id
            again.candidate_kinds = b"\x01" * (len(again.candidate_ids) // 8)
            again.identities.extend(PERSONS.get(user, ()))
            record = self.rank(again)
        self.answer(record)

    def rank(self, request):
        users = (request.user_id, *request.identities)
        is_none = self.rng.random() < 0.1
        partitions = [partition_of(user_key(user), PARTITIONS) for user in users]
        rows = [
            b"" if is_none else as_read(self.what, self.rows.get(user, b""), self.clock_ms[partition])
            for user, partition in zip(users, partitions, strict=True)
        ]
        record = rank(self.packer, self.release, self.model, request, rows[0])
        events, erased = events_of_rows(self.domain, "main", users, rows)
        packed = self.packer.pack(inputs_from_request(self.domain, request, events, erased_before_ms=erased))
        record.digest = self.packer.digest(packed.tensors)
        record.tensor_digests.clear()  # like the scores of the first identity's row alone
        record.inline = request.user_id % 3 == 0 and not is_none
        record.row_digest = rows_digest(rows[:1] if is_none else rows)
        if record.inline:
            record.inline_row = rows[0]
            record.inline_identity_rows.extend(rows[1:])
        record.sequence_source = SEQUENCE_SOURCE_NONE if is_none else SEQUENCE_SOURCE_LOCAL
        for partition in () if is_none else partitions:
            record.watermark.add(log_epoch=EPOCH, partition=partition, offset=self.applied[partition] - 1)
        record.served_time_ms = request.request_time_ms + int(self.rng.integers(1, 200))
        record.shuffle_bound = int(self.rng.choice([0, 0, 2]))
        self.log(record)
        return record

    def log(self, record):
        partition = partition_of(user_key(record.request.user_id), PARTITIONS)
        self.world.rankings.records[partition].append((record.served_time_ms, user_key(record.request.user_id), record.SerializeToString()))

    def answer(self, record):
        """What the person does with the list."""
        request = record.request
        lists = _lists(self.domain, _Rankings([record], [0], [0]))
        shown = lists.entity_id[np.argsort(lists.position)].tolist()
        for place, item in enumerate(shown):
            if place < 4 and self.rng.random() < 0.8:
                self.act(request, item, VIEW)
            if self.rng.random() < 0.4 / (1 + place):
                self.act(request, item, int(self.rng.choice([CLICK, LIKE])))
                if self.rng.random() < 0.3:
                    self.act(request, item, UNLIKE)
        if self.rng.random() < 0.2:
            self.act(request, 55, CLICK)  # on what was not shown, as a rule

    def act(self, request, item, action):
        people = [request.user_id, *request.identities]
        user = people[self.rng.integers(len(people))]
        time_ms = request.request_time_ms + int(self.rng.integers(1, WINDOW_MS + WINDOW_MS // 5))
        delay_ms = int(self.rng.choice([0, 0, 0, 2 * HOUR_MS, 11 * HOUR_MS, 30 * HOUR_MS]))
        request_id = [request.request_id, 0, 99][self.rng.choice(3, p=[0.8, 0.15, 0.05])]
        value = self.action(user, item, action, time_ms, request_id=request_id)
        for again in range(2 if self.rng.random() < 0.1 else 1):
            self.pending.append((time_ms + delay_ms + again * MINUTE_MS, user, value))


def decoded(world, partition, records, first, domain):
    return decode_batch(
        log_epoch=world.actions.log_epoch,
        partition=partition,
        offsets=first + np.arange(len(records)),
        keys=[key for _, key, _ in records],
        values=[value for _, _, value in records],
        append_times_ms=np.array([time_ms for time_ms, _, _ in records], np.int64),
        future_tolerance_ms=domain.future_tolerance_ms,
        partition_count=PARTITIONS,
        encodings=domain.encodings,
    )


def make_served(root, *, seed=3, steps=200, erase=False):
    world = make_world(root, DOMAIN, {partition: [] for partition in range(PARTITIONS)})
    world.rankings.records = {partition: [] for partition in range(PARTITIONS)}
    Making(world, seed, erase=erase).run(steps)
    return world


def domain_of(world):
    return open_release(world.releases / world.release_id).domain


def rules_of(domain, **more):
    return Rules.of(domain, **{"window_ms": WINDOW_MS, "grace_ms": GRACE_MS, "late_ms": LATE_MS, **more})


def until(world, until_ms):
    """The world as it was: every record appended before that time."""

    def cut(log):
        times = {p: np.maximum.accumulate([0, *(record[0] for record in records)])[1:] for p, records in log.records.items()}
        return MemoryLog(log.topic, log.log_epoch, {p: r[: int(np.searchsorted(times[p], until_ms))] for p, r in log.records.items()})

    return World(cut(world.actions), cut(world.rankings), world.releases, world.tables, world.release_id)


def archived(world, folder):
    shutil.rmtree(folder, ignore_errors=True)
    write_archive(world.actions, folder / ACTIONS)
    write_archive(world.rankings, folder / RANKINGS)
    return folder


def options_of(world, archive, home, **more):
    domain = domain_of(world)
    options = LabelOptions(
        replay=ReplayOptions(releases=world.releases, tables=world.tables, archive=archive),
        domain=domain,
        rules=rules_of(domain),
        out=home / "logs" / f"{domain.name}.served",
        until_ms=END_MS,
        ledger=home / "erasures.jsonl",
    )
    return replace(options, **more)


def label_world(world, home, **more):
    """One pass over what there is before `until_ms`; (its report, the log's folder)."""
    options = options_of(world, home / "archive", home, **more)
    archived(until(world, options.until_ms), home / "archive")
    return label(options), options.out


def naive(world, rules, until_ms):
    """{(user, request id, request time): [(item, seen, labels), ...]} by the oracle."""
    domain = domain_of(world)
    rankings, records = [], []
    for partition, logged in world.rankings.records.items():
        found = [RankingRecord.FromString(value) for _, _, value in logged]
        lists = _lists(domain, _Rankings(found, [partition] * len(found), list(range(len(found)))))
        for i, record in enumerate(found):
            rows = np.arange(lists.starts[i], lists.starts[i + 1])
            rows = rows[np.argsort(lists.position[rows])]
            items = tuple(zip(lists.entity_kind[rows].tolist(), lists.entity_id[rows].tolist(), strict=True))
            who = slice(lists.who_starts[i], lists.who_starts[i + 1])
            read = tuple(zip(*(column[who].tolist() for column in (lists.who, lists.log_epoch, lists.offset_read)), strict=True))
            times = record.request.request_time_ms, record.served_time_ms
            rankings.append(NaiveRanking(record.request.request_id, *times, partition, i, record.shadow, read, items))
    for partition, logged in world.actions.records.items():
        batch = decoded(world, partition, logged, 0, domain)
        for i in np.flatnonzero((batch.verdict == ACTION) | (batch.verdict == ERASE)).tolist():
            event = batch.events[i]
            place = int(batch.users[i]), int(batch.append_time_ms[i]), EPOCH, partition, int(batch.offsets[i])
            if batch.verdict[i] == ERASE:
                records.append(NaiveRecord(*place, erase=True))
                continue
            names = ("event_time_ms", "event_id", "request_id")
            fields = {name: int(event[name]) for name in names} | {"action": int(event["action"])}
            records.append(NaiveRecord(*place, item=(int(event["entity_kind"]), int(event["entity_id"])), **fields))
    lists, outcomes, counts = naive_join(rankings, records, rules, until_ms)
    ranked = [(rankings[one.ranking], one) for one in lists]
    return {(r.user_id, r.request_id, r.request_time_ms): one.rows for r, one in ranked}, outcomes, counts


def logged_lists(folder, domain):
    """The same of a served log."""
    found = {}
    for batch in read_requests(folder, domain, batch_rows=50):
        for i in range(len(batch)):
            rows = []
            for row in range(batch.starts[i], batch.starts[i + 1]):
                labels = tuple(batch.labels[batch.label_starts[row] : batch.label_starts[row + 1]].tolist())
                rows.append(((int(batch.entity_kind[row]), int(batch.entity_id[row])), bool(batch.seen[row]), labels))
            found[int(batch.user_id[i]), int(batch.request_id[i]), int(batch.request_time_ms[i])] = rows
    return found


def parts_of(folder):
    """Contents of the parts by table and day, whatever pass wrote them."""
    found = {}
    for table in ("impressions", "served"):
        for path in sorted(Path(folder, table).glob("*.parquet")):
            found[table, path.name.split(".")[0]] = xxhash.xxh3_64_hexdigest(path.read_bytes())
    return found

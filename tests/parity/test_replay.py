"""Replay agrees with what was served byte for byte, and every single difference is caught and named.

The served side is made here from the pipeline's own pieces: batches of the log are folded as the worker folds them, and rankings are
packed, scored and logged as the server does it.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

import features.pack
from deploy.replay import ACTIONS, RANKINGS, ReplayOptions, archive_logs, replay
from features.actions import APPEND_TIME_HEADER, EVENT_DTYPE, decode_batch, encode_action, encode_erase
from features.domain import parse_domain
from features.ids import partition_of, string_id, user_key
from features.pack import Packer
from features.request import inputs_from_request
from features.sequence import apply_batch, as_read, clock_after, decode_row, definition, touched_users
from features.tables import Member, TableSet, write_generation
from inference.release import load_model, open_release, write_release
from inference.scoring import final_scores, head_weights
from inference.transact import TransActRanker
from protos.v1.ranking_pb2 import TIER_CALLER_ORDER, TIER_MODEL, RankingRecord, RankRequest
from streams.archive import ArchiveError, KafkaLog, ParquetLog, Records, Span, write_archive
from streams.kafka import KafkaConfig, Topics, ensure_topics, new_producer

DOMAIN = """
name = "shop"
future_tolerance_ms = 5000
[entities]
product = 1
video = 2
[surfaces]
home = 1
[actions]
click = { id = 1, kind = "positive" }
like = { id = 2, kind = "positive" }
unlike = { id = 3, kind = "negative", retracts = "like" }
[sequence.main]
id = 1
length = 12
caps = { click = 9 }
age_days_max = 0.0005
evict = "log_clock"
evict_grace_days = 0.0002
[features]
price = { side = "item", kind = "number" }
tags = { side = "item", kind = "list", hash_buckets = 50 }
country = { side = "user", kind = "category", vocabulary = ["de", "fr"] }
hour = { side = "request", kind = "number" }
retrieval = { side = "candidate", kind = "number" }
[ranker.home]
sequence = "main"
sequence_length = 8
sequence_attributes = ["surface", "value"]
features = ["price", "tags", "country", "hour", "retrieval"]
item_space = "two_tower"
user_space = "two_tower"
embedding_dimension = 8
heads.click = { actions = ["click"] }
heads.unlike = { actions = ["unlike"], utility = -0.5 }
model = { action_dimension = 8, layers = 1, feedforward = 8, first_k = 3, cross_layers = 1, hidden = [8] }
"""
START_MS = 1_700_000_000_000
PARTITIONS = 2
EPOCH = 0xABCDEF
ITEMS = np.arange(1, 60, dtype=np.uint64)
USERS = tuple(string_id(f"user {n}") for n in range(12))
QUIET, ERASED, IDLE = string_id("quiet"), USERS[0], string_id("idle")
"""QUIET has so few actions that nothing of theirs is cut; IDLE acts at the beginning alone, so that all of it is evicted later."""


@dataclass
class MemoryLog:
    """A log in memory: `streams.archive.RecordLog`. Each record is (append_time_ms, key, value); None: no record at this offset."""

    topic: str
    log_epoch: int
    records: dict[int, list[tuple[int, bytes, bytes] | None]]
    start: int = 0

    @property
    def partitions(self):
        return {partition: Span(self.start, len(records)) for partition, records in self.records.items()}

    def read(self, partition):
        there = [(offset, record) for offset, record in enumerate(self.records[partition]) if record is not None and offset >= self.start]
        for i in range(0, len(there), 100):
            piece = there[i : i + 100]
            times = np.array([record[0] for _, record in piece], np.int64)
            keys, values = [record[1] for _, record in piece], [record[2] for _, record in piece]
            yield Records(np.array([offset for offset, _ in piece], np.int64), times, keys, values)


def random_actions(seed=5, size=900):
    """Both partitions' records: late and unknown actions, garbage, one erasure in the middle, and a user of few actions."""
    rng = np.random.default_rng(seed)
    records = {partition: [] for partition in range(PARTITIONS)}
    for i in range(size):
        append_ms = START_MS + 150 * i + int(rng.integers(0, 400))
        user = QUIET if i % 200 == 150 else USERS[int(rng.integers(len(USERS)))]
        user = IDLE if i in (20, 40) else user
        if i == size // 2:
            user, value = ERASED, encode_erase(user_id=ERASED, event_id=i, reason="asked")
        else:
            value = encode_action(
                user_id=user,
                entity_kind=int(rng.integers(1, 4)) if user != QUIET else 1,
                entity_id=int(rng.choice(ITEMS)),
                action=int(rng.choice([1, 1, 1, 2, 2, 3, 9])) if user != QUIET else 1,
                event_time_ms=append_ms + 1_000 - int(rng.exponential(4_000)),
                event_id=i,
                surface=int(rng.integers(0, 3)),
                value=float(rng.choice([np.nan, 1.5])),
            )
        if rng.random() < 0.04 and user not in (QUIET, ERASED):
            value = b"garbage"
        records[partition_of(user_key(user), PARTITIONS)].append((append_ms, user_key(user), value))
    return records


def write_tables(root, seed, created_ms):
    rng = np.random.default_rng(seed)
    items = {"ids": ITEMS, "vectors": rng.normal(size=(len(ITEMS), 8)).astype(np.float16)}
    users = {"ids": np.array([*USERS[:9], QUIET], np.uint64), "vectors": rng.normal(size=(10, 8)).astype(np.float16)}
    path = write_generation(root, "two_tower", created_ms, {"item.product": Member(**items), "user": Member(**users)})
    features = {
        "item.product": Member(
            ids=ITEMS, features={"price": rng.random(len(ITEMS), np.float32), "tags": rng.integers(1, 99, (len(ITEMS), 4), np.uint64)}
        ),
        "user": Member(
            ids=users["ids"], features={"country": np.array([string_id(c) for c in ["de", "fr", "xx", "de", "fr"] * 2], np.uint64)}
        ),
    }
    return path, write_generation(root, "features", created_ms, features)


@dataclass
class World:
    """Everything that one served product left behind."""

    actions: MemoryLog
    rankings: MemoryLog
    releases: Path
    tables: Path
    release_id: str

    def records(self):
        """The logged rankings; what is done to them stays."""
        for records in self.rankings.records.values():
            for place, (append_ms, key, value) in enumerate(records):
                record = RankingRecord.FromString(value)
                yield record
                records[place] = (append_ms, key, record.SerializeToString())

    def replay(self, tmp_path, **options):
        folder = tmp_path / "archive"
        shutil.rmtree(folder, ignore_errors=True)
        write_archive(self.actions, folder / ACTIONS)
        write_archive(self.rankings, folder / RANKINGS)
        return replay(ReplayOptions(releases=self.releases, tables=self.tables, archive=folder, **{"score_sample": 0, **options}))


def new_request(rng, user, time_ms):
    request = RankRequest(ranker="home", user_id=user, request_time_ms=time_ms, request_id=int(rng.integers(1, 2**63)))
    count = int(rng.integers(1, 9))
    request.candidate_ids = rng.permutation(np.append(ITEMS, 1_000))[:count].astype(np.uint64).tobytes()
    request.candidate_kinds = rng.integers(1, 3, count).astype(np.uint8).tobytes()
    request.request_features["hour"].number = np.float32([time_ms % 24]).tobytes()
    request.candidate_features["retrieval"].number = rng.random(count, np.float32).tobytes()
    return request


def serve(actions, releases, tables, release_id, *, lag_ms=500, seed=6):
    """Folds the log in random batches as the worker does, ranks after each as the server does; returns the records by partition.

    `lag_ms`: how far request times are ahead of the state, so that some events are not in it yet.
    """
    rng, release = np.random.default_rng(seed), open_release(releases / release_id)
    domain, what = release.domain, definition(release.domain, "main")
    packer = Packer(domain, "home", TableSet.open(tables, domain, "home"))
    model = load_model(release)
    served = {partition: [] for partition in actions.records}
    for partition, records in actions.records.items():
        rows, clock_ms, start = {}, 0, 0
        while start < len(records):
            piece = records[start : start + int(rng.integers(1, 40))]
            batch = decode_batch(
                log_epoch=actions.log_epoch,
                partition=partition,
                offsets=np.arange(start, start + len(piece)),
                keys=[key for _, key, _ in piece],
                values=[value for _, _, value in piece],
                append_times_ms=np.array([time_ms for time_ms, _, _ in piece], np.int64),
                future_tolerance_ms=domain.future_tolerance_ms,
                partition_count=len(actions.records),
                encodings=domain.encodings,
            )
            users = touched_users(batch).tolist()
            rows.update(zip(users, apply_batch(what, batch, [rows.get(user) for user in users], clock_ms), strict=True))
            clock_ms = clock_after(batch, clock_ms)
            start += len(piece)
            for user in (*(USERS[i] for i in rng.permutation(len(USERS))[:4]), QUIET, IDLE, string_id(f"newcomer {start}")):
                if partition_of(user_key(user), len(actions.records)) == partition:
                    request = new_request(rng, user, clock_ms + int(rng.integers(0, lag_ms)))
                    record = rank(packer, release, model, request, as_read(what, rows.get(user, b""), clock_ms))
                    record.watermark.add(log_epoch=actions.log_epoch, partition=partition, offset=start - 1)
                    served[partition].append((request.request_time_ms, user_key(user), record.SerializeToString()))
    return served


def rank(packer, release, model, request, row):
    """One ranking as the server logs it."""
    events, options = np.zeros(0, EVENT_DTYPE), {}
    if row:
        decoded = decode_row(row, request.user_id)
        events, options = decoded.events, {"erased_before_ms": decoded.erased_before_ms}
    packed = packer.pack(inputs_from_request(packer.domain, request, events, **options))
    probability = model.probabilities({name: torch.from_numpy(np.array(value)) for name, value in packed.tensors.items()}).numpy()
    record = RankingRecord(
        request=request,
        release_id=release.release_id,
        generations=packer.tables.generations,
        tier=TIER_MODEL,
        digest=packer.digest(packed.tensors),
        tensor_digests=packer.tensor_digests(packed.tensors),
        head_scores={name: probability[:, head].tobytes() for head, name in enumerate(packer.domain.ranker["home"].heads)},
        scores=final_scores(probability, head_weights(packer.domain.ranker["home"], {})).tobytes(),
        sequence_fingerprint=release.sequence_fingerprint,
        row_digest=xxhash.xxh3_64_intdigest(row),
        inline=request.user_id == QUIET,
    )
    if record.inline:
        record.inline_row = row
        for name, value in packed.tensors.items():
            record.inline_tensors[name] = value.tobytes()
    return record


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The release files and logs; tests get copies."""
    return make_world(tmp_path_factory.mktemp("world"), DOMAIN, random_actions())


def make_world(root, domain_toml, records):
    write_tables(root / "tables", 1, START_MS - 2_000)
    write_tables(root / "tables", 2, START_MS - 1_000)
    domain = parse_domain(domain_toml, source="test")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    generations = TableSet.open(root / "tables", domain, "home").generations
    release = write_release(
        root / "releases",
        model=TransActRanker(domain, "home"),
        domain_toml=domain_toml,
        ranker="home",
        created_ms=START_MS,
        generations=generations,
        metrics={},
    )
    actions = MemoryLog("actions", EPOCH, records)
    served = serve(actions, root / "releases", root / "tables", release.release_id)
    return World(actions, MemoryLog("rankings", 1, served), root / "releases", root / "tables", release.release_id)


@pytest.fixture
def world(made, tmp_path):
    shutil.copytree(made.releases, tmp_path / "releases")
    shutil.copytree(made.tables, tmp_path / "tables")
    logs = [
        replace(log, records={partition: list(records) for partition, records in log.records.items()})
        for log in (made.actions, made.rankings)
    ]
    return World(*logs, tmp_path / "releases", tmp_path / "tables", made.release_id)


def test_what_was_served_is_rebuilt_byte_for_byte(world, tmp_path):
    report = world.replay(tmp_path, score_sample=20)
    logged = list(world.records())
    assert report.ok, report.to_text()
    erased = sum(record.request.user_id == ERASED for record in logged)
    assert 0 < report.excluded["erased_since"] < erased, "rankings before the erasure are left out, later ones are replayed"
    assert report.rankings_read == len(logged)
    assert report.rankings_replayed == report.digests_equal == report.rows_compared == len(logged) - report.excluded["erased_since"] > 100
    assert (report.bytes_different, report.rows_different, report.sequence_inserts, report.sequence_deletes) == (0, 0, 0, 0)
    assert 10 < report.scores_compared <= 20, "of those picked, the erased user's are left out"
    assert report.score_difference_max < 1e-6
    assert report.events_read == sum(map(len, world.actions.records.values()))
    assert report.events_rejected > 10
    assert report.sequence_counts["p100"] == 8, "sequences are long enough to be cut"
    assert 0 < report.events_missing < report.events_visible
    assert 0 <= report.missing_age_ms["p0"] <= report.missing_age_ms["p100"]
    assert json.loads(report.to_json())["events_missing_share"] == report.events_missing / report.events_visible


def test_a_share_of_users_is_replayed_whole(world, tmp_path):
    whole, part = world.replay(tmp_path), world.replay(tmp_path, users_share=0.5)
    assert part.ok
    assert 0 < part.rankings_read < whole.rankings_read


def of_quiet(world):
    """Partition of the user of few actions, and the places of their actions in it, of which the first are long seen."""
    partition = partition_of(user_key(QUIET), PARTITIONS)
    return partition, [place for place, (_, key, _) in enumerate(world.actions.records[partition]) if key == user_key(QUIET)]


def edited(record, /, **fields):
    event = decode_batch(
        log_epoch=1,
        partition=0,
        offsets=np.arange(1),
        keys=[user_key(QUIET)],
        values=[record],
        append_times_ms=np.array([2**61]),
        future_tolerance_ms=0,
        partition_count=1,
    ).events[0]
    names = EVENT_DTYPE.names
    return encode_action(user_id=QUIET, **{name: event[name].item() for name in names} | fields)


@pytest.mark.parametrize(
    ("how", "tensors", "inserts", "deletes"),
    [
        ("entity_id", {"sequence_embedding"}, True, True),
        ("event_time_ms", {"sequence_age_ms"}, True, True),
        ("value", {"sequence_value"}, True, True),
        ("request_id", set(), True, True),
        ("dropped", {"sequence_count"}, False, True),
        ("doubled", {"sequence_count"}, True, False),
    ],
)
def test_a_changed_dropped_or_doubled_event_is_caught(world, tmp_path, how, tensors, inserts, deletes):
    partition, places = of_quiet(world)
    records = world.actions.records[partition]
    append_ms, key, value = records[places[1]]
    if how == "dropped":
        records[places[1]] = None
    elif how == "doubled":  # the copy takes a place where a record of no consequence was, so that all others keep their offsets
        place, unheard = next((place, i) for place in places for i in range(place, place + 40) if records[i][2] == b"garbage")
        records[unheard] = (append_ms, key, edited(records[place][2], event_id=77))
    else:
        change = {"entity_id": 1_000, "event_time_ms": append_ms - 1, "value": 9.0, "request_id": 5}[how]
        records[places[1]] = (append_ms, key, edited(value, **{how: change}))
    report = world.replay(tmp_path)
    assert not report.ok
    assert report.rows_different == report.rankings_different > 0
    assert tensors <= set(report.tensors_different)
    assert (report.bytes_different > 0) == bool(tensors), "what no tensor holds is told by the row alone"
    assert (report.sequence_inserts > 0, report.sequence_deletes > 0) == (inserts, deletes)
    assert {example["user_id"] for example in report.examples} == {f"{QUIET:016x}"}
    assert report.offsets_without_record == (how == "dropped")


@pytest.mark.parametrize(
    ("space", "file", "tensor"),
    [
        ("two_tower", "item.product.vectors.npy", "candidate_embedding"),
        ("two_tower", "user.vectors.npy", "user_embedding"),
        ("features", "item.product.price.npy", "item_number"),
        ("features", "item.product.tags.npy", "item_list_tags"),
    ],
)
def test_a_changed_row_of_a_table_is_refused_and_with_its_checksum_forged_named(world, tmp_path, space, file, tensor):
    path = max((world.tables / space).iterdir()) / file
    values = np.load(path)
    values[5:] += 1
    np.save(path, values)
    report = world.replay(tmp_path)
    assert (report.ok, report.rankings_replayed) == (False, 0)
    assert report.excluded["tables_refused"] + report.excluded["erased_since"] == report.rankings_read
    assert "sha256" in report.examples[0]["why"]
    forge(world, path)
    report = world.replay(tmp_path)
    assert report.digests_different > 0
    assert report.rows_different == 0
    assert set(report.tensors_different) <= {tensor, "sequence_embedding"}
    assert report.tensors_different[tensor] > 20


def forge(world, path):
    """Makes every checksum and name agree with what the file holds now."""
    meta = path.with_name("meta.json")
    said = json.loads(meta.read_text())
    said["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = "".join(f"{name}:{file['sha256']}\n" for name, file in sorted(said["files"].items()))
    said["generation"] = path.parent.name[:-8] + hashlib.sha256(listed.encode()).hexdigest()[:8]
    meta.write_text(json.dumps(said))
    path.parent.rename(path.parent.with_name(said["generation"]))
    for record in world.records():
        record.generations[said["space"]] = said["generation"]


def test_a_swapped_generation_is_caught_in_the_record_and_on_disk(world, tmp_path):
    older, newer = sorted(path.name for path in (world.tables / "two_tower").iterdir())
    for record in world.records():
        assert record.generations["two_tower"] == newer
        record.generations["two_tower"] = older
    report = world.replay(tmp_path)
    assert set(report.tensors_different) == {"sequence_embedding", "candidate_embedding", "user_embedding"}
    assert report.digests_equal < 10, "but for the few without anything known to the tables"
    shutil.rmtree(world.tables / "two_tower" / older)
    report = world.replay(tmp_path)
    assert report.excluded["tables_refused"] > 0
    assert (report.ok, report.rankings_replayed) == (False, 0)


@pytest.mark.parametrize(("constant", "value", "tensor"), [("FIRST", 3, "user_category"), ("_NAN", np.float32(0), "item_number")])
def test_a_changed_constant_of_pack_is_caught(world, tmp_path, monkeypatch, constant, value, tensor):
    monkeypatch.setattr(features.pack, constant, value)
    report = world.replay(tmp_path)
    assert not report.ok
    assert tensor in report.tensors_different
    assert report.rows_different == 0


def test_a_watermark_that_is_off_by_one_is_caught(world, tmp_path):
    partition, places = of_quiet(world)
    seen = next(record for record in world.records() if record.request.user_id == QUIET and record.watermark[0].offset >= places[2])
    release = open_release(world.releases / world.release_id)
    packer = Packer(release.domain, "home", TableSet.open(world.tables, release.domain, "home"))
    # Served from the state up to the user's own third action, but logged one less.
    row = rows_up_to(world, partition, places[2], definition(release.domain, "main"))
    record = rank(packer, release, load_model(release), seen.request, row)
    record.watermark.add(log_epoch=EPOCH, partition=partition, offset=places[2])
    world.rankings.records = {0: [(1, user_key(QUIET), record.SerializeToString())]}
    assert world.replay(tmp_path).ok
    for off_by_one in world.records():
        off_by_one.watermark[0].offset -= 1
    report = world.replay(tmp_path)
    assert (report.ok, report.rankings_different, report.sequence_deletes, report.sequence_inserts) == (False, 1, 1, 0)
    assert "sequence_count" in report.tensors_different


def rows_up_to(world, partition, offset, what):
    records = world.actions.records[partition][: offset + 1]
    batch = decode_batch(
        log_epoch=EPOCH,
        partition=partition,
        offsets=np.arange(len(records)),
        keys=[key for _, key, _ in records],
        values=[value for _, _, value in records],
        append_times_ms=np.array([time_ms for time_ms, _, _ in records]),
        future_tolerance_ms=5_000,
        partition_count=PARTITIONS,
    )
    users = touched_users(batch).tolist()
    return apply_batch(what, batch, [None] * len(users), 0)[users.index(QUIET)]


@pytest.mark.parametrize("file", ["domain.toml", "model.safetensors", "manifest.json"])
def test_a_changed_release_file_is_refused(world, tmp_path, file):
    path = world.releases / world.release_id / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = world.replay(tmp_path)
    assert report.excluded == {"release_refused": report.rankings_read}
    assert not report.ok
    assert world.release_id in report.examples[0]["why"]


def test_changed_scores_are_caught(world, tmp_path):
    for record in world.records():
        scores = np.frombuffer(record.head_scores["click"], np.float32) + np.float32(1e-3)
        record.head_scores["click"] = scores.tobytes()
    report = world.replay(tmp_path, score_sample=10)
    assert report.scores_different == report.scores_compared > 0
    assert report.score_difference_max == pytest.approx(1e-3, rel=0.05)
    assert not report.ok


def set_all(world, change):
    for record in world.records():
        change(record)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("other_log", lambda record: setattr(record.watermark[0], "log_epoch", 1)),
        ("other_partition", lambda record: setattr(record.watermark[0], "partition", 1 - record.watermark[0].partition)),
        ("beyond_log_end", lambda record: setattr(record.watermark[0], "offset", 10_000)),
        ("undecodable", lambda record: record.ClearField("watermark")),
        ("digest_missing", lambda record: record.ClearField("digest")),
        ("definition_differs", lambda record: setattr(record, "sequence_fingerprint", 1)),
        ("release_refused", lambda record: setattr(record, "release_id", "../../etc")),
        ("release_refused", lambda record: setattr(record.request, "ranker", "search")),
        ("request_refused", lambda record: setattr(record.request, "candidate_ids", b"123")),
        ("tables_refused", lambda record: record.generations.clear()),
    ],
)
def test_what_cannot_be_replayed_is_counted_by_reason_and_no_pass(world, tmp_path, reason, change):
    set_all(world, change)
    report = world.replay(tmp_path)
    assert set(report.excluded) <= {reason, "erased_since"}
    assert report.excluded[reason] > 100
    assert (report.ok, report.rankings_replayed) == (False, 0)
    assert report.examples[0]["excluded"] == reason


def test_one_unreadable_ranking_fails_the_rest_that_agrees(world, tmp_path):
    world.rankings.records[0].append((START_MS, b"key", b"\xff\xff"))
    report = world.replay(tmp_path)
    assert (report.excluded["undecodable"], report.rankings_different, report.ok) == (1, 0, False)


def test_a_tier_that_packed_nothing_is_no_failure(world, tmp_path):
    partition = next(iter(world.rankings.records))
    append_ms, key, value = world.rankings.records[partition][0]
    record = RankingRecord.FromString(value)
    record.tier, record.digest = TIER_CALLER_ORDER, b""
    world.rankings.records[partition][0] = (append_ms, key, record.SerializeToString())
    report = world.replay(tmp_path)
    assert (report.ok, report.excluded["not_packed"]) == (True, 1)


def test_a_log_that_lost_its_beginning_cannot_answer(world, tmp_path):
    world.actions.start = 1
    report = world.replay(tmp_path)
    assert report.excluded == {"log_cut": report.rankings_read}
    assert not report.ok


def test_an_archive_is_whole_or_refused(world, tmp_path):
    folder = tmp_path / "log"
    write_archive(world.actions, folder)
    again = ParquetLog(folder)
    assert (again.topic, again.log_epoch, again.partitions) == ("actions", EPOCH, world.actions.partitions)
    for partition, records in world.actions.records.items():
        found = list(again.read(partition))
        assert [
            record for piece in found for record in zip(piece.append_time_ms.tolist(), piece.keys, piece.values, strict=True)
        ] == records
    with pytest.raises(ArchiveError, match="already"):
        write_archive(world.actions, folder)
    (folder / "archive.json").unlink()
    with pytest.raises(ArchiveError, match="not written to its end"):
        ParquetLog(folder)
    shuffled = replace(world.actions, records={0: world.actions.records[0]})
    write_archive(shuffled, folder)
    manifest = json.loads((folder / "archive.json").read_text())
    manifest["partitions"]["0"] = [0, 10]
    (folder / "archive.json").write_text(json.dumps(manifest))
    with pytest.raises(ArchiveError, match="offsets must ascend"):
        list(ParquetLog(folder).read(0))


@pytest.mark.servers
def test_real_topics_give_the_same_report_as_their_archive(made, kafka, tmp_path):
    config = KafkaConfig(kafka.bootstrap)
    topics = Topics(actions="replay.actions", dead_letters="replay.dead", rankings="replay.rankings", announcements="replay.news")
    identity = ensure_topics(config, topics, partition_count=PARTITIONS)
    actions = replace(made.actions, log_epoch=identity.epoch)
    producer = new_producer(config, "test")
    for records in actions.records.values():
        for append_ms, key, value in records:
            producer.produce(topics.actions, value, key, headers=[(APPEND_TIME_HEADER, str(append_ms).encode())])
    for records in serve(actions, made.releases, made.tables, made.release_id).values():
        for _, key, value in records:
            producer.produce(topics.rankings, value, key)
    assert producer.flush(30) == 0
    options = ReplayOptions(releases=made.releases, tables=made.tables, kafka=config, topics=topics, score_sample=5)
    report = replay(options)
    assert report.ok, report.to_text()
    assert report.rankings_replayed > 100
    assert report.events_read == sum(map(len, actions.records.values()))
    archive_logs(options, tmp_path / "archive")
    again = replay(replace(options, kafka=None, archive=tmp_path / "archive"))
    assert again.ok
    for name in (
        "rankings_replayed",
        "excluded",
        "events_read",
        "events_rejected",
        "events_visible",
        "events_missing",
        "log",
        "missing_age_ms",
    ):
        assert getattr(again, name) == getattr(report, name), name
    log = KafkaLog(config, topics.actions)
    producer.produce(topics.actions, b"later", user_key(QUIET))
    assert producer.flush(30) == 0
    assert sum(len(piece) for partition in log.partitions for piece in log.read(partition)) == report.events_read
    log.close()

"""Replay of persons with several identities, in one partition or in two, and of rankings that no state answered."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_replay import DOMAIN, ERASED, PARTITIONS, RANKINGS, START_MS, USERS, World, make_world, new_request, random_actions

from features.actions import decode_batch, encode_erase
from features.ids import partition_of, user_key
from features.pack import Packer
from features.parity import PartitionLog
from features.person import events_of_rows, rows_digest
from features.request import inputs_from_request
from features.sequence import definition
from features.tables import TableSet
from inference.release import load_model, open_release
from inference.scoring import final_scores, head_weights
from protos.v1.ranking_pb2 import SEQUENCE_SOURCE_LOCAL, SEQUENCE_SOURCE_NONE, TIER_MODEL, RankingRecord
from streams.archive import ParquetLog
from streams.erasure import ErasureJob, run_job
from streams.kafka import Topics

PERSONS = [(USERS[1], USERS[2]), (USERS[3], USERS[4], USERS[5], USERS[6], USERS[7]), (USERS[8], USERS[0])]
"""The last one's second identity is erased in the middle of the log."""


def partition_for(user: int) -> int:
    return partition_of(user_key(user), PARTITIONS)


def logs_of(world) -> dict[int, PartitionLog]:
    domain = open_release(world.releases / world.release_id).domain
    logs = {}
    for partition, records in world.actions.records.items():
        logs[partition] = PartitionLog(USERS)
        logs[partition].add(
            decode_batch(
                log_epoch=world.actions.log_epoch,
                partition=partition,
                offsets=np.arange(len(records)),
                keys=[key for _, key, _ in records],
                values=[value for _, _, value in records],
                append_times_ms=np.array([time_ms for time_ms, _, _ in records], np.int64),
                future_tolerance_ms=domain.future_tolerance_ms,
                partition_count=PARTITIONS,
                encodings=domain.encodings,
            )
        )
    return logs


def serve_persons(world: World) -> list[bytes]:
    """Rankings of persons at moments of their own in each partition, as the server logs them; every fifth has no state."""
    rng, release = np.random.default_rng(8), open_release(world.releases / world.release_id)
    what, logs = definition(release.domain, "main"), logs_of(world)
    packer, model = Packer(release.domain, "home", TableSet.open(world.tables, release.domain, "home")), load_model(release)
    values = []
    for i in range(40):
        users = PERSONS[i % len(PERSONS)]
        offsets = {p: int(rng.integers(len(records) // 3, len(records))) for p, records in world.actions.records.items()}
        clock_ms = max(logs[partition].clock_at(offset) for partition, offset in offsets.items())
        request = new_request(rng, users[0], clock_ms)
        request.identities.extend(users[1:])
        none = i % 5 == 4
        rows = [b""] if none else [logs[partition_for(u)].rows_at(what, u, [offsets[partition_for(u)]])[0] for u in users]
        events, erased = events_of_rows(release.domain, "main", users[:1] if none else users, rows)
        packed = packer.pack(inputs_from_request(release.domain, request, events, erased_before_ms=erased))
        probability = model.probabilities({name: torch.from_numpy(np.array(value)) for name, value in packed.tensors.items()}).numpy()
        record = RankingRecord(request=request, release_id=release.release_id, generations=packer.tables.generations, tier=TIER_MODEL)
        record.digest, record.row_digest = packer.digest(packed.tensors), rows_digest(rows)
        record.sequence_fingerprint, record.inline = release.sequence_fingerprint, i % 2 == 0
        record.scores = final_scores(probability, head_weights(release.domain.ranker["home"], {})).tobytes()
        for head, name in enumerate(release.domain.ranker["home"].heads):
            record.head_scores[name] = probability[:, head].tobytes()
        record.sequence_source = SEQUENCE_SOURCE_NONE if none else SEQUENCE_SOURCE_LOCAL
        for user in () if none else users:
            partition = partition_for(user)
            record.watermark.add(log_epoch=world.actions.log_epoch, partition=partition, offset=offsets[partition])
        if record.inline:
            record.inline_row, *further = rows
            record.inline_identity_rows.extend(further)
            for name, value in packed.tensors.items():
                record.inline_tensors[name] = value.tobytes()
        values.append((request.request_time_ms, user_key(users[0]), record.SerializeToString()))
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("persons"), DOMAIN, random_actions())
    assert {len({partition_for(user) for user in users}) for users in PERSONS} == {1, 2}
    world.rankings.records = {0: serve_persons(world), 1: []}
    return world


@pytest.fixture
def world(made):
    logs = [replace(log, records={p: list(records) for p, records in log.records.items()}) for log in (made.actions, made.rankings)]
    return World(*logs, made.releases, made.tables, made.release_id)


def test_persons_are_rebuilt_byte_for_byte(world, tmp_path):
    report = world.replay(tmp_path, score_sample=10)
    assert report.ok, report.to_text()
    assert report.rankings_read == 40
    assert 0 < report.excluded["erased_since"] < 13, "of the person one of whose identities was erased, those before that"
    assert report.rankings_replayed == report.digests_equal == report.rows_compared == 40 - report.excluded["erased_since"]
    assert (report.bytes_different, report.rows_different, report.scores_different) == (0, 0, 0)
    assert 0 < report.events_missing < report.events_visible


@pytest.mark.parametrize("which", [0, 1, 4])
def test_a_change_of_any_identitys_past_is_caught(world, tmp_path, which):
    """Their actions are taken out of the log: rows, and tensors where the model sees them, differ."""
    user = PERSONS[1][which]
    for partition, records in world.actions.records.items():
        world.actions.records[partition] = [None if record and record[1] == user_key(user) else record for record in records]
    report = world.replay(tmp_path)
    assert not report.ok
    assert report.rows_different > 5
    assert report.digests_different > 0
    assert report.sequence_deletes > 0, "inline rows say what the log lacks, and of which identity"


def test_a_ranking_that_does_not_say_where_each_identity_was_read_is_not_replayed(world, tmp_path):
    for record in world.records():
        if len(record.watermark) == 2:
            del record.watermark[1]
    assert world.replay(tmp_path).excluded["undecodable"] > 5
    for record in world.records():
        if len(record.watermark) == 5:
            record.watermark[4].partition = 1 - record.watermark[4].partition
    assert world.replay(tmp_path).excluded["other_partition"] > 5


def test_an_erasure_of_an_identity_takes_its_persons_rankings_out_of_archives(world, tmp_path):
    def left() -> list[RankingRecord]:
        pieces = ParquetLog(tmp_path / "archive" / RANKINGS).read(0)
        return [RankingRecord.FromString(value) for piece in pieces for value in piece.values if value is not None]

    world.replay(tmp_path)  # writes the archive
    domain = open_release(world.releases / world.release_id).domain
    partition = partition_for(ERASED)
    erasure = encode_erase(user_id=ERASED, event_id=450, reason="asked")
    (erased_at,) = (i for i, record in enumerate(world.actions.records[partition]) if record[2] == erasure)
    before = [record for record in left() if ERASED in record.request.identities]
    job = ErasureJob(home=tmp_path, domain=domain, deadline_ms=1, topics=Topics(actions="actions", rankings="rankings"))
    run_job(job, START_MS + 1_000_000)
    after = [record for record in left() if ERASED in record.request.identities]
    assert 0 < len(after) < len(before)
    assert len(left()) == 40 - len(before) + len(after)
    erased_ms = world.actions.records[partition][erased_at][0]
    assert all(record.request.request_time_ms > erased_ms for record in after)
    assert all(at.offset >= erased_at for record in after for at in record.watermark if at.partition == partition)


def test_an_inline_row_of_every_identity_is_compared(world, tmp_path):
    expected = 0
    for record in world.records():
        if record.inline and len(record.inline_identity_rows) == 4:
            record.inline_identity_rows[2] = record.inline_identity_rows[1]
            expected += 1
    report = world.replay(tmp_path)
    assert (report.rows_different, report.digests_different) == (expected, 0)
    assert expected > 3
    assert report.sequence_inserts > 0

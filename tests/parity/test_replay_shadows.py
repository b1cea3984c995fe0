"""Replay covers what shadows scored, by the shadow's own release and domain file, and counts no ranking twice."""

import numpy as np
import pytest
import torch
from test_replay import DOMAIN, ERASED, random_actions, rank
from test_replay import make_world as make_served_world

from features.actions import decode_batch
from features.domain import parse_domain
from features.ids import user_key
from features.pack import Packer
from features.parity import PartitionLog
from features.sequence import definition
from features.tables import TableSet
from inference.release import load_model, write_release
from inference.transact import TransActRanker
from protos.v1.ranking_pb2 import RankingRecord

SHADOW_DOMAIN = DOMAIN.replace("sequence_length = 8", "sequence_length = 5").replace('"country", ', "")
"""Sees fewer actions, and has lost a feature."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shadowed_world(tmp_path_factory.mktemp("shadows"))


def shadowed_world(root):
    """A served log in which a second release scored every third ranking in the shadow."""
    world = make_served_world(root, DOMAIN, random_actions(size=400))
    domain = parse_domain(SHADOW_DOMAIN, source="test")
    torch.manual_seed(4)
    generations = TableSet.open(root / "tables", domain, "home").generations
    release = write_release(
        root / "releases",
        model=TransActRanker(domain, "home"),
        domain_toml=SHADOW_DOMAIN,
        ranker="home",
        created_ms=1_700_000_100_000,
        generations=generations,
        metrics={},
    )
    packer, model, what = (
        Packer(domain, "home", TableSet.open(root / "tables", domain, "home")),
        load_model(release),
        definition(domain, "main"),
    )
    for partition, records in world.rankings.records.items():
        with_shadows = []
        log = partition_log(world, partition, domain)
        for i, (append_ms, key, value) in enumerate(records):
            with_shadows.append((append_ms, key, value))
            if i % 3 == 0:
                served = RankingRecord.FromString(value)
                (row,) = log.rows_at(what, served.request.user_id, [served.watermark[0].offset])
                shadow = rank(packer, release, model, served.request, row)
                shadow.watermark.extend(served.watermark)
                shadow.shadow = True
                with_shadows.append((append_ms, key, shadow.SerializeToString()))
        world.rankings.records[partition] = with_shadows
    return world


def partition_log(world, partition, domain):
    records = world.actions.records[partition]
    log = PartitionLog({RankingRecord.FromString(value).request.user_id for _, _, value in world.rankings.records[partition]})
    log.add(
        decode_batch(
            log_epoch=world.actions.log_epoch,
            partition=partition,
            offsets=np.arange(len(records)),
            keys=[key for _, key, _ in records],
            values=[value for _, _, value in records],
            append_times_ms=np.array([time_ms for time_ms, _, _ in records], np.int64),
            future_tolerance_ms=domain.future_tolerance_ms,
            partition_count=len(world.actions.records),
            encodings=domain.encodings,
        )
    )
    return log


def test_shadows_are_rebuilt_byte_for_byte_and_counted_apart(world, tmp_path):
    report = world.replay(tmp_path, score_sample=10_000)
    logged = list(world.records())
    shadows = [record for record in logged if record.shadow]
    assert report.ok, report.to_text()
    assert report.rankings_read == len(logged) - len(shadows)
    assert report.shadows_read == len(shadows) > 20
    assert report.rankings_replayed == report.rankings_read - report.excluded["erased_since"]
    assert report.shadows_replayed == len(shadows) - report.shadows_excluded["erased_since"] > 20
    assert report.digests_equal == report.scores_compared == report.rankings_replayed + report.shadows_replayed
    assert (report.bytes_different, report.digests_different, report.rows_different, report.scores_different) == (0, 0, 0, 0)
    assert sum(report.tiers.values()) == sum(total for total, _ in report.hours.values()) == report.rankings_replayed
    assert "shadows " in report.to_text()


def test_freshness_counts_each_ranking_once(world, tmp_path):
    whole = world.replay(tmp_path)
    kept = {partition: list(records) for partition, records in world.rankings.records.items()}
    for partition, records in kept.items():
        world.rankings.records[partition] = [record for record in records if not RankingRecord.FromString(record[2]).shadow]
    try:
        alone = world.replay(tmp_path)
    finally:
        world.rankings.records.update(kept)
    assert alone.shadows_read == 0
    for name in ("rankings_read", "rankings_replayed", "excluded", "events_visible", "events_missing", "rankings_missing_events", "hours"):
        assert getattr(whole, name) == getattr(alone, name), name


def test_a_shadow_that_differs_fails_the_replay(world, tmp_path):
    kept = {partition: list(records) for partition, records in world.rankings.records.items()}
    records = world.rankings.records[0]
    place = next(i for i, (_, key, value) in enumerate(records) if RankingRecord.FromString(value).shadow and key != user_key(ERASED))
    append_ms, key, value = records[place]
    shadow = RankingRecord.FromString(value)
    shadow.digest = bytes(16)
    records[place] = (append_ms, key, shadow.SerializeToString())
    try:
        report = world.replay(tmp_path)
    finally:
        world.rankings.records.update(kept)
    assert (report.ok, report.rankings_different, report.digests_different) == (False, 1, 1)

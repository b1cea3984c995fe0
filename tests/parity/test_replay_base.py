"""Parity on a base, on real parts: history to stores, a real worker on a real broker's log, rankings from its view, and their replay."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from streams_world import World, worker
from test_replay import DOMAIN, ERASED, PARTITIONS, QUIET, START_MS, USERS, new_request, random_actions, rank, write_tables

from deploy.base_file import read_base_file
from deploy.replay import ReplayOptions, archive_logs, replay
from features.actions import APPEND_TIME_HEADER, ERASE, EVENT_DTYPE, REJECTED, decode_batch
from features.base import BaseError, BaseRecords, Erasures
from features.domain import parse_domain
from features.ids import partition_of, user_key
from features.pack import Packer
from features.tables import TableSet
from inference.release import load_model, open_release, write_release
from inference.transact import TransActRanker
from streams.batch_loop import WorkerConfig
from streams.bootstrap import bootstrap
from streams.kafka import KafkaConfig, Topics, ensure_topics, log_identity, new_producer

OVERLAP = 60
"""Records of each partition that stand in the history and in the log."""


def write_history(folder, records):
    """The records as an export gives them: accepted or not, in no order."""
    parts = []
    for partition, own in records.items():
        batch = decode_batch(
            log_epoch=1,
            partition=partition,
            offsets=np.arange(len(own)),
            keys=[key for _, key, _ in own],
            values=[value for _, _, value in own],
            append_times_ms=np.array([time_ms for time_ms, _, _ in own], np.int64),
            future_tolerance_ms=5000,
            partition_count=PARTITIONS,
        )
        known = np.flatnonzero(batch.verdict != REJECTED)
        columns = {name: batch.events[name][known] for name in EVENT_DTYPE.names}
        columns |= {"user_id": batch.users[known], "append_time_ms": batch.append_time_ms[known], "erase": batch.verdict[known] == ERASE}
        parts.append(pa.table({name: np.ascontiguousarray(column) for name, column in columns.items()}))
    table = pa.concat_tables(parts)
    folder.mkdir()
    pq.write_table(table.take(np.random.default_rng(1).permutation(len(table))), folder / "export.parquet", row_group_size=100)


@pytest.fixture
def served(kafka, tmp_path):
    """(options of a replay, where the history is): what a product on a base left behind."""
    config = KafkaConfig(kafka.bootstrap)
    topics = Topics(*(f"based.{kind}" for kind in ("actions", "dead", "rankings", "news")))
    ensure_topics(config, topics, partition_count=PARTITIONS)
    write_tables(tmp_path / "tables", 1, START_MS - 2_000)
    domain = parse_domain(DOMAIN, source="test")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    release = write_release(
        tmp_path / "releases",
        model=TransActRanker(domain, "home"),
        domain_toml=DOMAIN,
        ranker="home",
        created_ms=START_MS,
        generations=TableSet.open(tmp_path / "tables", domain, "home").generations,
        metrics={},
    )
    release = open_release(tmp_path / "releases" / release.release_id)
    packer, model = Packer(domain, "home", TableSet.open(tmp_path / "tables", domain, "home")), load_model(release)

    records = random_actions(size=700)
    cuts = {partition: len(own) // 3 for partition, own in records.items()}
    write_history(tmp_path / "history", {partition: own[: cuts[partition]] for partition, own in records.items()})
    base = bootstrap(
        str(tmp_path / "history"),
        domain,
        tmp_path / "state",
        PARTITIONS,
        lambda base_id: log_identity(config, topics.actions, base_id).epoch,
        processes=1,
    )
    topics = replace(topics, base=base.id)
    identity = log_identity(config, topics.actions, base.id)
    worker_config = WorkerConfig(
        config, topics, domain, tmp_path / "state", tmp_path / "view", group="based", cache_bytes=8 << 20, write_buffer_bytes=8 << 20
    )
    world = World(config, topics, identity, worker_config)
    producer, random = new_producer(config, "test"), np.random.default_rng(4)
    with worker(worker_config) as running:
        running.ready()
        reader = world.reader()
        for step in range(6):
            if step:  # the first rankings see the base alone
                for partition, own in records.items():
                    left = own[cuts[partition] - OVERLAP :]
                    for append_ms, key, value in left[(step - 1) * len(left) // 5 : step * len(left) // 5]:
                        producer.produce(topics.actions, value, key, headers=[(APPEND_TIME_HEADER, str(append_ms).encode())])
                assert producer.flush(30) == 0
                world.wait_applied(reader)
            for user in (*USERS, QUIET):
                (reading,) = reader.read("main", [user])
                request = new_request(random, user, max(reading.log_clock_ms, START_MS) + 100)
                record = rank(packer, release, model, request, reading.row)
                place = reading.watermark
                record.watermark.add(log_epoch=place.log_epoch, partition=place.partition, offset=place.offset)
                producer.produce(topics.rankings, record.SerializeToString(), user_key(user))
        assert producer.flush(30) == 0
        reader.close()
    options = {"releases": tmp_path / "releases", "tables": tmp_path / "tables", "kafka": config, "topics": topics, "score_sample": 5}
    return ReplayOptions(**options, base=base, history=str(tmp_path / "history")), tmp_path / "history"


@pytest.mark.servers
def test_rankings_on_a_base_are_rebuilt_byte_for_byte(served, tmp_path, monkeypatch):
    options, history = served
    report = replay(options)
    assert report.ok, report.to_text()
    erased = report.excluded.get("erased_since", 0)
    assert 0 < erased < 6, "until the erasure in the log, of which the history knows nothing"
    assert report.rankings_replayed == report.digests_equal == report.rows_compared == 6 * 13 - erased
    assert (report.bytes_different, report.rows_different) == (0, 0)
    assert report.log["base"] == options.base.id
    assert report.sequence_counts["p100"] == 8
    assert partition_of(user_key(ERASED), PARTITIONS) in (0, 1)

    archive_logs(options, tmp_path / "archive")
    assert read_base_file(tmp_path / "archive") == (options.base, str(history))
    again = replay(replace(options, kafka=None, topics=Topics(), archive=tmp_path / "archive"))
    assert again.ok, again.to_text()
    assert again.rankings_replayed == report.rankings_replayed

    with monkeypatch.context() as patch:  # a base that says nothing must be seen
        patch.setattr("deploy.replay.read_base", lambda base, _, users: BaseRecords(base, users, Erasures(), []))
        assert replay(options).rows_different > 0
    with pytest.raises(BaseError, match=f"stands on base {options.base.id}, given is none"):
        replay(replace(options, base=None))
    table = pq.read_table(history / "export.parquet")
    values = table["entity_id"].to_numpy().copy()
    values += np.uint64(1)
    pq.write_table(table.set_column(table.schema.get_field_index("entity_id"), "entity_id", pa.array(values)), history / "export.parquet")
    with pytest.raises(BaseError, match=r"export\.parquet is not the file that base"):
        replay(options)

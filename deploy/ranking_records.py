"""Reads the ranking log, from Kafka or from an archive of it, for commands that look at single rankings."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from google.protobuf.message import DecodeError

from deploy.processes import kafka_config
from deploy.replay import RANKINGS
from deploy.settings import Settings
from protos.v1.ranking_pb2 import RankingRecord
from streams.archive import KafkaLog, ParquetLog


def ranking_records(settings: Settings, archive: Path | None, *, since_ms: int = 0) -> Iterator[RankingRecord]:
    """Every record that can be decoded and that the log took at `since_ms` or later, partition by partition; `archive`: a folder that
    `freshrank replay --write-archive` wrote, None for Kafka.

    Raises:
        ArchiveError, StreamError: the log cannot be read.
    """
    log = KafkaLog(kafka_config(settings), settings.topic_rankings) if archive is None else ParquetLog(archive / RANKINGS)
    with closing(log):
        for partition in sorted(log.partitions):
            for records in log.read(partition):
                for time_ms, value in zip(records.append_time_ms.tolist(), records.values, strict=True):
                    if value is None or time_ms < since_ms:
                        continue
                    try:
                        yield RankingRecord.FromString(value)
                    except DecodeError:  # replay counts them
                        continue

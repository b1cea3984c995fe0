"""The processes that serve. `freshrank worker`, `reader` and `server` run them anywhere; the local stack supervises them."""

import json
from functools import partial

from deploy.door import door
from deploy.logs import set_up_logging
from deploy.scheduling import set_slice
from deploy.settings import Settings
from deploy.supervisor import report_ready
from features.domain import DAY_MS, Domain, load_domain
from streams.batch_loop import WorkerConfig
from streams.erasure_audit import AUDIT
from streams.erasure_service import ErasureServiceConfig
from streams.kafka import KafkaConfig, Topics, log_identity
from streams.reader_service import ReaderConfig, run_reader

RELEASE_KEY, MOVE_KEY = "release/", "log/"
"""What an announcement is about, by its key."""


def kafka_config(settings: Settings) -> KafkaConfig:
    """The Kafka that the settings name."""
    return KafkaConfig(settings.kafka_bootstrap, settings.kafka_properties)


def topics(settings: Settings) -> Topics:
    """The topics that the settings name."""
    return Topics(
        actions=settings.topic_actions,
        dead_letters=settings.topic_dead_letters,
        rankings=settings.topic_rankings,
        announcements=settings.topic_announcements,
        rates=settings.topic_rates,
        base=settings.log_base,
    )


def worker(settings: Settings) -> int:
    """Keeps sequences up to date until SIGTERM; returns the exit code."""
    from streams.worker import run_worker  # brings Faust along, which the other processes need not load

    set_up_logging(settings)
    config = WorkerConfig(
        kafka=kafka_config(settings),
        topics=topics(settings),
        domain=product(settings),
        state_folder=settings.home / "state" / settings.worker_instance,
        view_folder=settings.home / "view",
        instance=settings.worker_instance,
        standby=settings.worker_standby,
        reader_address=settings.reader_advertised_address,
        session_timeout_ms=settings.worker_session_timeout_ms,
        offset_below_retention=settings.offset_below_retention,
        erasure_deadline_ms=round(settings.erasure_deadline_days * DAY_MS),
        erasure_strict=settings.erasure_strict,
        snapshot_url=settings.snapshot_url,
        snapshot_options=json.loads(settings.snapshot_options.get_secret_value()),
        snapshot_every_s=settings.snapshot_every_s,
        snapshot_keep=settings.snapshot_keep,
        batch_events_max=settings.worker_batch_events_max,
        queue_bytes_max=settings.worker_queue_mb << 20,
        cache_bytes=settings.rocksdb_cache_mb << 20,
        write_buffer_bytes=settings.rocksdb_write_buffer_mb << 20,
        direct_reads=settings.rocksdb_direct_reads,
        view_map_bytes=settings.view_map_mb << 20,
        web_host=settings.worker_web_host,
        web_port=settings.worker_web_port,
    )
    return run_worker(config, lambda details: report_ready(details.pop("health"), **details))


def reader(settings: Settings) -> int:
    """Answers GetSequences over gRPC until SIGTERM; returns the exit code."""
    from deploy.server_pages import reader_pages  # brings a web server along

    set_up_logging(settings)
    set_slice(settings.serving_slice_ms)
    config = ReaderConfig(
        domain=product(settings),
        view_folder=settings.home / "view",
        partition_count=partition_count(settings),
        host=settings.reader_host,
        port=settings.reader_port,
        door=door(settings, settings.reader_host),
        calls_max=settings.reader_calls_max,
        watches_max=settings.reader_watches_max,
        reflection=settings.reflection,
        erasure=erasure_service_config(settings) if settings.erasure_service else None,
        web=partial(reader_pages, settings.reader_web_host, settings.reader_web_port),
    )
    return run_reader(config, lambda details: report_ready(details.pop("address"), **details))


def erasure_service_config(settings: Settings) -> ErasureServiceConfig:
    """The erasure service's part of the settings."""
    return ErasureServiceConfig(
        kafka=kafka_config(settings),
        topics=topics(settings),
        domain=product(settings),
        audit=settings.home / AUDIT,
        deadline_ms=erasure_deadline_ms(settings),
    )


def erasure_deadline_ms(settings: Settings) -> int:
    """The erasure promise, milliseconds."""
    return int(settings.erasure_deadline_days * DAY_MS)


def product(settings: Settings) -> Domain:
    """The domain file that the settings name."""
    return load_domain(settings.domain)


def partition_count(settings: Settings) -> int:
    """Partitions of the actions topic."""
    return log_identity(kafka_config(settings), settings.topic_actions).partition_count

"""Kafka as this project uses it: clients, topics, identity of a log. The only home of `confluent_kafka`.

Every client takes its settings from one `KafkaConfig`, whose `properties` have librdkafka's own names (security.protocol, sasl.*, ssl.*)
and go to each client unchanged, so that the same settings point at a local broker and at a secured cluster.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ListOffsetsResultInfo, NewTopic, OffsetSpec, ResourceType
from tenacity import retry, retry_if_exception, stop_after_delay, wait_exponential

from features.domain import DAY_MS
from features.ids import log_epoch
from streams.errors import KafkaUnavailableError, MissingTopicError, TopicError
from streams.records import Headers, Records

__all__ = ["OFFSET_BEGINNING", "Consumer", "KafkaError", "KafkaException", "Message", "Producer", "TopicPartition"]

log = logging.getLogger(__name__)

PARTITIONER = "murmur2_random"
"""Java clients' choice of partition for a key; librdkafka's own default differs."""

RECORD_BYTES_MAX = 1 << 20
"""Largest record of the actions topic."""

_LARGE_BYTES_MAX = 2 * RECORD_BYTES_MAX  # a dead letter holds a whole source record, so that the largest one still fits
_ANSWER_BYTES_MAX = 50 << 20
_ANSWER_TIMEOUT_S = 10.0
_SHORT_LIVED = {"retention.ms": "3600000", "segment.ms": "600000"}
_AS_WRITTEN = ("error_cb", "log_level")  # the only settings whose names have underscores


@dataclass(frozen=True)
class KafkaConfig:
    """How to reach Kafka. `properties`: librdkafka settings for every client."""

    bootstrap: str
    properties: Mapping[str, str] = field(default_factory=dict)

    def client(self, role: str, **settings: Any) -> dict[str, Any]:
        """Configuration of one client; underscores in `settings` stand for dots, and they win over `properties`."""
        given = {name if name in _AS_WRITTEN else name.replace("_", "."): value for name, value in settings.items()}
        return {"bootstrap.servers": self.bootstrap, "client.id": f"freshrank-{role}", "logger": log, **self.properties, **given}


@dataclass(frozen=True)
class Topics:
    """Names of the topics."""

    actions: str = "freshrank.actions"
    dead_letters: str = "freshrank.dead-letters"
    rankings: str = "freshrank.rankings"
    announcements: str = "freshrank.announcements"
    rates: str = "freshrank.rates"
    base: str = ""
    """Id of the base that the state stands on (`features.base`), "" for none: part of the log's identity, as the topic's own id is."""

    @property
    def rates_windows(self) -> str:
        """Changelog of the windows that the worker's Faust app folds `rates` into."""
        return f"{self.rates}-windows"


@dataclass(frozen=True)
class LogIdentity:
    """A topic as a log: its epoch (`features.ids.log_epoch`), its number of partitions, and the base before its first record."""

    topic: str
    epoch: int
    partition_count: int
    base: str = ""


def ensure_topics(
    config: KafkaConfig,
    topics: Topics,
    *,
    partition_count: int,
    replication_factor: int = 1,
    retention_ms: int = -1,
    timeout_s: float = _ANSWER_TIMEOUT_S,
) -> LogIdentity:
    """Creates the topics that are missing and returns the identity of the actions topic. Existing topics are left as they are, and checked.

    retention_ms: of actions and rankings, -1 for ever. State can be rebuilt and rankings replayed only as far back as the log reaches.

    Raises:
        KafkaUnavailableError: no broker answered.
        TopicError: the actions topic exists and is not what the contract needs.
    """
    retention = {"retention.ms": str(retention_ms)}
    large = {"max.message.bytes": str(_LARGE_BYTES_MAX), **retention}
    stamped = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(RECORD_BYTES_MAX), **retention}
    wanted = [
        NewTopic(topics.actions, partition_count, replication_factor, config=stamped),
        NewTopic(topics.dead_letters, 1, replication_factor, config=large),
        NewTopic(topics.rankings, partition_count, replication_factor, config=large),
        NewTopic(topics.announcements, 1, replication_factor, config={"cleanup.policy": "compact"}),
        NewTopic(topics.rates, 1, replication_factor, config=_SHORT_LIVED),
        NewTopic(topics.rates_windows, 1, replication_factor, config={**_SHORT_LIVED, "cleanup.policy": "compact,delete"}),
    ]
    admin = AdminClient(config.client("admin"))
    with answering(config):
        existing = set(admin.list_topics(timeout=timeout_s).topics)
    missing = [topic for topic in wanted if topic.topic not in existing]
    if missing:
        for name, future in admin.create_topics(missing, operation_timeout=timeout_s, request_timeout=timeout_s).items():
            try:
                future.result()
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise TopicError(f"topic {name}: cannot be created: {error.args[0].str()}") from error
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            check_actions_topic(config, topics.actions, timeout_s=timeout_s)
            return log_identity(config, topics.actions, topics.base, timeout_s=timeout_s)
        except MissingTopicError:
            if not missing or time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)  # created, but this broker has not heard of it yet


def check_actions_topic(config: KafkaConfig, topic: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
    """Raises TopicError unless the broker stamps the topic's records (LogAppendTime) and does not compact it."""
    admin = AdminClient(config.client("admin"))
    with answering(config):
        futures = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)], request_timeout=timeout_s)
        entries = next(iter(futures.values())).result()
    for name, needed in (("message.timestamp.type", "LogAppendTime"), ("cleanup.policy", "delete")):
        if entries[name].value != needed:
            raise TopicError(
                f"topic {topic}: {name} is {entries[name].value}, it must be {needed}: kafka-configs --alter --entity-type topics "
                f"--entity-name {topic} --add-config {name}={needed}"
            )


def check_retention(
    config: KafkaConfig, topics: Seq[str], *, deadline_ms: int, strict: bool, timeout_s: float = _ANSWER_TIMEOUT_S
) -> list[str]:
    """Checks what the erasure promise needs: a record is gone from each topic `deadline_ms` after it was appended. Returns the warnings.

    Kafka deletes a segment when its newest record is older than retention.ms, and a segment takes records for segment.ms: the bound is
    their sum. retention.bytes may delete earlier and bounds no time.

    Raises:
        KafkaUnavailableError: no broker answered.
        TopicError: with `strict`, a topic keeps records longer.
    """
    admin = AdminClient(config.client("admin"))
    warnings = []
    with answering(config):
        resources = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
        answers = {r.name: future.result() for r, future in admin.describe_configs(resources, request_timeout=timeout_s).items()}
    for topic in topics:
        retention_ms, segment_ms = (int(answers[topic][name].value) for name in ("retention.ms", "segment.ms"))
        policy = answers[topic]["cleanup.policy"].value
        if retention_ms >= 0 and retention_ms + segment_ms <= deadline_ms and policy == "delete":
            continue
        kept = "for ever" if retention_ms < 0 or policy != "delete" else f"up to {(retention_ms + segment_ms) / DAY_MS:.1f} days"
        warnings.append(
            f"topic {topic}: retention.ms={retention_ms}, segment.ms={segment_ms}, cleanup.policy={policy}: records of erased users stay "
            f"{kept}, the promise is {deadline_ms / DAY_MS:g} days (erasure_deadline_days). Change it: kafka-configs --bootstrap-server "
            f"{config.bootstrap} --alter --entity-type topics --entity-name {topic} --add-config "
            f"cleanup.policy=delete,retention.ms={deadline_ms * 3 // 4},segment.ms={min(segment_ms, deadline_ms // 8)}"
        )
    for warning in warnings:
        log.warning("%s", warning)
    if warnings and strict:
        raise TopicError("; ".join(warnings))
    return warnings


def oldest_record_ms(config: KafkaConfig, topic: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> int | None:
    """Timestamp of the oldest record that a topic still has, milliseconds; None: it has none.

    Raises:
        KafkaUnavailableError: no broker answered.
        TopicError: there is no such topic.
    """
    waiting = set(range(log_identity(config, topic, timeout_s=timeout_s).partition_count))
    consumer = new_reader(config, "oldest", enable_partition_eof=True, queued_min_messages=1)
    found_ms = []
    try:
        with answering(config):
            consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in sorted(waiting)])
            deadline_s = time.monotonic() + timeout_s
            while waiting:
                message = consumer.poll(max(0.0, deadline_s - time.monotonic()))
                if message is None:
                    raise KafkaUnavailableError(f"Kafka at {config.bootstrap}: no record of {topic} came within {timeout_s:g} s")
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                if message.partition() in waiting:
                    waiting.discard(message.partition())
                    consumer.incremental_unassign([TopicPartition(topic, message.partition())])
                    if error is None:
                        found_ms.append(message.timestamp()[1])
    finally:
        consumer.close()
    return min(found_ms, default=None)


def log_identity(config: KafkaConfig, topic: str, base: str = "", *, timeout_s: float = _ANSWER_TIMEOUT_S) -> LogIdentity:
    """The log that a topic is now, on a base (`Topics.base`).

    Raises:
        KafkaUnavailableError: no broker answered.
        TopicError: there is no such topic.
    """
    admin = AdminClient(config.client("admin"))
    with answering(config):
        cluster_id = admin.describe_cluster(request_timeout=timeout_s).result().cluster_id
        described = admin.describe_topics(TopicCollection([topic]), request_timeout=timeout_s)[topic].result()
    partition_count = len(described.partitions)
    return LogIdentity(topic, log_epoch(cluster_id, str(described.topic_id), partition_count, base), partition_count, base)


@contextmanager
def answering(config: KafkaConfig) -> Iterator[None]:
    """Turns librdkafka's errors into this project's, with what to do."""
    try:
        yield
    except KafkaException as error:
        cause = error.args[0]
        if cause.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
            raise MissingTopicError(f"{cause.str()}: create the topics first (freshrank up, or streams.kafka.ensure_topics)") from error
        raise KafkaUnavailableError(unavailable(config, cause)) from error


def unavailable(config: KafkaConfig, cause: KafkaError) -> str:
    """What to tell the operator where a broker does not answer or refuses."""
    return (
        f"Kafka at {config.bootstrap} does not answer as needed ({cause.name()}: {cause.str()}): is it running, is the address right, "
        "and do the credentials allow this (properties security.protocol, sasl.*, ssl.*)?"
    )


def new_producer(config: KafkaConfig, role: str, **settings: Any) -> Producer:
    """An idempotent producer that waits for all replicas and partitions keys as Java clients do."""
    defaults = {"partitioner": PARTITIONER, "enable_idempotence": True, "acks": "all", "message_max_bytes": _LARGE_BYTES_MAX}
    return Producer(config.client(role, **{**defaults, **settings}))


def new_group_consumer(
    config: KafkaConfig,
    group: str,
    instance: str,
    *,
    session_timeout_ms: int,
    queue_bytes_max: int,
    on_error: Callable[[KafkaError], None],
) -> Consumer:
    """The hot path's consumer: fast fetching, no offsets of its own, an error instead of a jump where its offset is gone from the log.

    `instance`: name of this worker, the same after a restart, so that it gets its partitions back at once. `queue_bytes_max`: see
    `queue_limits`.
    """
    return Consumer(
        config.client(
            "worker",
            group_id=group,
            group_instance_id=instance,
            session_timeout_ms=session_timeout_ms,
            heartbeat_interval_ms=min(2_000, session_timeout_ms // 3),
            enable_auto_commit=False,
            enable_auto_offset_store=False,
            auto_offset_reset="error",
            partition_assignment_strategy="cooperative-sticky",
            # The defaults starve a consumer that empties its queue in milliseconds: it would wait up to a second before fetching again.
            fetch_queue_backoff_ms=5,
            # Long runs of one partition: the more of a user's records stand in one batch, the fewer rows are written.
            fetch_message_max_bytes=4 << 20,
            queued_min_messages=200_000,
            **queue_limits(queue_bytes_max),
            fetch_wait_max_ms=100,
            error_cb=on_error,
        )
    )


def queue_limits(bytes_max: int) -> dict[str, int]:
    """Settings of a consumer that stops fetching where `bytes_max` wait; one answer of each broker, at most as much, may be on top."""
    return {"queued_max_messages_kbytes": bytes_max >> 10, "fetch_max_bytes": min(_ANSWER_BYTES_MAX, bytes_max)}


def new_reader(config: KafkaConfig, role: str, **settings: Any) -> Consumer:
    """A consumer without a group: it reads what it is assigned and commits nothing. The group id is only a name that librdkafka demands."""
    defaults = {"group_id": f"freshrank-{role}-unused", "enable_auto_commit": False, "enable_auto_offset_store": False}
    return Consumer(config.client(role, **{**defaults, "auto_offset_reset": "error", "fetch_wait_max_ms": 100, **settings}))


class EndOffsets:
    """Asks the broker where partitions end, without waiting for the answer."""

    def __init__(self, config: KafkaConfig, topic: str) -> None:
        self._config, self._topic = config, topic
        self._admin = AdminClient(config.client("admin"))
        self._asked_ms = 0
        self._answers: dict[TopicPartition, Future[ListOffsetsResultInfo]] = {}

    def ask(self, partitions: Seq[int]) -> list[tuple[int, int, int]]:
        """What has been answered since the last call: (partition, end offset, when the broker was asked, ms). Asks again where all has."""
        if not all(answer.done() for answer in self._answers.values()):
            return []
        found = [
            (place.partition, answer.result().offset, self._asked_ms)
            for place, answer in self._answers.items()
            if answer.exception() is None
        ]
        if any(map(_is_stale, self._answers.values())):
            # librdkafka keeps asking with the leader epoch that it learned first, for minutes; a new client learns the present one.
            self._admin = AdminClient(self._config.client("admin"))
        self._asked_ms = time.time_ns() // 1_000_000
        wanted = {TopicPartition(self._topic, partition): OffsetSpec.latest() for partition in partitions}
        self._answers = self._admin.list_offsets(wanted, request_timeout=_ANSWER_TIMEOUT_S) if wanted else {}
        return found


def by_partition(messages: Seq[Message]) -> tuple[dict[int, list[Message]], list[Message]]:
    """What came of each partition, in its order, and apart from that the messages that are errors."""
    errors: list[Message] = []
    if {None} != set(map(Message.error, messages)):
        errors = [message for message in messages if message.error() is not None]
        messages = [message for message in messages if message.error() is None]
    found: dict[int, list[Message]] = {}
    for partition, run in groupby(messages, Message.partition):  # a fetch brings thousands of one partition in a row
        found.setdefault(partition, []).extend(run)
    return found, errors


def _is_stale(answer: "Future[ListOffsetsResultInfo]") -> bool:
    error = answer.exception()
    stale = (KafkaError.FENCED_LEADER_EPOCH, KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError.NOT_LEADER_FOR_PARTITION)
    return isinstance(error, KafkaException) and error.args[0].code() in stale


def records_of(messages: Seq[Message]) -> Records:
    """The messages of one partition, none of them an error, as columns. One pass a column, without a step of Python a message."""
    n = len(messages)
    headers: dict[int, Headers] = {}
    if any(map(Message.headers, messages)):
        headers = {i: found for i, found in enumerate(map(Message.headers, messages)) if found}
    return Records(
        offsets=np.fromiter(map(Message.offset, messages), np.int64, n),
        keys=list(map(Message.key, messages)),
        values=list(map(Message.value, messages)),
        broker_times_ms=np.fromiter(map(itemgetter(1), map(Message.timestamp, messages)), np.int64, n),
        headers=headers,
        leader_epoch=-1 if (epoch := messages[-1].leader_epoch()) is None else epoch,
    )


_SETTLING = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_PARTITION,
)


def _is_settling(error: BaseException) -> bool:
    return isinstance(error, KafkaException) and error.args[0].code() in _SETTLING


@retry(
    retry=retry_if_exception(_is_settling),
    stop=stop_after_delay(_ANSWER_TIMEOUT_S),
    wait=wait_exponential(multiplier=0.05, max=1),
    reraise=True,
)
def log_range(consumer: Consumer, topic: str, partition: int, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> tuple[int, int]:
    """(first offset there is, offset of the next record) of a partition; a leader that is being elected is waited for."""
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout_s)
    except KafkaException as error:
        if _is_settling(error):  # a consumer without partitions does not look by itself whether what it once heard still holds
            with suppress(KafkaException):
                consumer.list_topics(topic, timeout=timeout_s)
        raise
    return low, high


def end_offsets(config: KafkaConfig, topic: str, partitions: Seq[int]) -> dict[int, int]:
    """Offset of the next record of each partition."""
    consumer = new_reader(config, "offsets")
    try:
        with answering(config):
            return {partition: log_range(consumer, topic, partition)[1] for partition in partitions}
    finally:
        consumer.close()


def broker_answers(config: KafkaConfig, *, timeout_s: float = 1.0) -> bool:
    """Whether a broker answers a metadata request within `timeout_s`: it serves, not only listens."""
    try:
        return bool(AdminClient(config.client("admin", log_level=0)).list_topics(timeout=timeout_s).brokers)
    except KafkaException:
        return False

"""The hot path: batches of the actions topic, folded into the store and shown in the view.

Of each partition's records, in offset order:
 1. decode: every record is an action, an erasure, or rejected with a reason (features.actions);
 2. dead letters: the rejected ones are written to the dead-letter topic, and acknowledged there, before anything passes them;
 3. fold: the stored rows of the touched users and the batch become their new rows (features.sequence);
 4. store: rows, applied offset and log clock in one WriteBatch;
 5. view: the same rows and meta in one transaction, which readers see as one moment;
 6. the group's offset is committed, only to show the lag: a restart goes on behind the store's own offset.
A crash between any two steps repeats at most the last batch, which gives the same rows again. Anything unexpected ends the loop with the
exception, and the process with it, before the store passes the record.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from features.actions import Batch, append_time_ms, decode_batch
from features.domain import Domain
from features.sequence import Definition, apply_batch, clock_after, touched_users
from protos.v1.actions_pb2 import DeadLetter
from streams.errors import KafkaUnavailableError, ProduceError, StateError
from streams.kafka import (
    Consumer,
    KafkaConfig,
    KafkaError,
    LogIdentity,
    Message,
    TopicPartition,
    Topics,
    answering,
    check_actions_topic,
    log_identity,
    log_range,
    new_group_consumer,
    new_producer,
    unavailable,
)
from streams.state import Meta, definitions, row_keys
from streams.store import PartitionStore, RocksStore, Store
from streams.view import MAP_BYTES, PartitionView, sync_view

log = logging.getLogger(__name__)

_LAG_REFRESH_S = 1.0


@dataclass(frozen=True)
class WorkerConfig:
    """Everything that a worker needs. `instance` names this worker in its group, the same after each restart."""

    kafka: KafkaConfig
    topics: Topics
    domain: Domain
    state_folder: Path
    view_folder: Path
    group: str = "freshrank-worker"
    instance: str = "worker-0"
    batch_events_max: int = 20_000
    linger_ms: int = 10
    """How long a batch that is not full waits for more records."""
    cache_bytes: int = 256 << 20
    write_buffer_bytes: int = 256 << 20
    view_map_bytes: int = MAP_BYTES
    answer_timeout_s: float = 10.0
    """How long Kafka may take to answer when the worker starts."""
    stalled_s: float = 30.0
    """A partition with lag and without progress for this long is not healthy."""
    web_host: str = "127.0.0.1"
    web_port: int = 0
    """Port of the health page; 0: a free one."""
    log_level: str = "INFO"


@dataclass
class Partition:
    """An assigned partition. `end_offset`: offset of the next record of the log, as last seen."""

    store: PartitionStore
    view: PartitionView
    end_offset: int
    caught_up_at: int
    """The log's end when it was assigned."""
    progress_s: float = field(default_factory=time.monotonic)

    @property
    def next_offset(self) -> int:
        """The offset that the state waits for."""
        return self.store.meta.applied_offset + 1


def fold_batch(kept: Mapping[int, Definition], store: PartitionStore, batch: Batch) -> tuple[list[bytes], list[bytes], Meta]:
    """What a batch makes of the stored rows: (keys, new rows, new meta), to be written together. `kept`: definitions by sequence id.

    Raises:
        SequenceCorruptError: a stored row is damaged. The worker stops; remove the partition's state folder to rebuild it from the log.
    """
    users = touched_users(batch)
    keys: list[bytes] = []
    rows: list[bytes] = []
    for sequence_id, what in kept.items():
        own = row_keys(sequence_id, users)
        keys += own
        rows += apply_batch(what, batch, store.get(own), store.meta.log_clock_ms)
    before = store.meta
    clock_ms = clock_after(batch, before.log_clock_ms)
    return keys, rows, Meta(before.log_epoch, before.partition, int(batch.offsets[-1]), clock_ms, before.fingerprints)


class BatchLoop:
    """Consumes the actions topic until stopped. `run` blocks: give it a thread of its own; everything else may be called from others."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        store: Store | None = None,
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`store` stands in for RocksDB in simulations. `at` is told the step that a batch has reached: decoded, stored, viewed."""
        self._config, self._at = config, at
        self._kept = definitions(config.domain)
        self._store = store or RocksStore(
            config.state_folder, self._kept, cache_bytes=config.cache_bytes, write_buffer_bytes=config.write_buffer_bytes
        )
        self._partitions: dict[int, Partition] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._assigned = False
        self.caught_up = threading.Event()
        """Set once the state has reached the log's end of the moment of assignment."""
        self._counters = dict.fromkeys(("batches", "events", "dead_letters", "rows_written", "rebalances", "offset_gaps"), 0)
        self._seconds = dict.fromkeys(("decode", "fold", "store", "view"), 0.0)
        self._identity: LogIdentity | None = None
        self._failures: list[str] = []

    def run(self) -> None:
        """Consumes until `stop`.

        Raises:
            StreamError: what stopped it; the message says what to do. Also any other exception: then it is a bug.
        """
        config = self._config
        check_actions_topic(config.kafka, config.topics.actions, timeout_s=config.answer_timeout_s)
        self._identity = log_identity(config.kafka, config.topics.actions, timeout_s=config.answer_timeout_s)
        self._producer = new_producer(config.kafka, "dead-letters")
        consumer = new_group_consumer(config.kafka, config.group, f"{config.group}-{config.instance}", on_error=self._on_error)
        try:
            consumer.subscribe([config.topics.actions], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
            upkeep_s = time.monotonic()
            while not self._stop.is_set():
                # What is there is taken: one record when it is quiet, a full batch when it is behind.
                messages = consumer.consume(1, 0.2)
                if messages:
                    messages += consumer.consume(config.batch_events_max - 1, config.linger_ms / 1000)
                    self._apply(consumer, messages)
                if time.monotonic() - upkeep_s > _LAG_REFRESH_S or not self.caught_up.is_set():
                    upkeep_s = time.monotonic()
                    self._refresh_lag(consumer)
        finally:
            self._close_partitions()
            consumer.close()

    def stop(self) -> None:
        """Asks `run` to end after its batch."""
        self._stop.set()

    def statistics(self) -> dict[str, float]:
        """Counters and seconds spent in each step since start."""
        with self._lock:
            return {**self._counters, **{f"{name}_s": seconds for name, seconds in self._seconds.items()}}

    def partitions(self) -> list[int]:
        """The partitions that are assigned now, ascending."""
        with self._lock:
            return sorted(self._partitions)

    def health(self) -> dict[str, object]:
        """Progress of each partition: healthy means assigned, and no partition that has lag but makes no progress."""
        now_s = time.monotonic()
        with self._lock:
            partitions = {
                str(number): {
                    "applied_offset": held.next_offset - 1,
                    "lag": max(0, held.end_offset - held.next_offset),
                    "no_progress_s": round(now_s - held.progress_s, 3),
                }
                for number, held in self._partitions.items()
            }
        stalled = [n for n, p in partitions.items() if p["lag"] and p["no_progress_s"] > self._config.stalled_s]
        return {
            "healthy": self._assigned and not stalled,
            "assigned": self._assigned,
            "caught_up": self.caught_up.is_set(),
            "stalled": stalled,
            "log_epoch": f"{self._identity.epoch:016x}" if self._identity else None,
            "partitions": partitions,
        }

    # Assignment: called by librdkafka inside of consume(), in this loop's own thread.

    def _on_assign(self, consumer: Consumer, places: Seq[TopicPartition]) -> None:
        config = self._config
        self._identity = identity = log_identity(config.kafka, config.topics.actions)
        for place in places:
            with answering(config.kafka):
                low, high = log_range(consumer, place.topic, place.partition)
            held = self._open(identity, place.partition, low, high)
            with self._lock:
                self._partitions[place.partition] = held
            place.offset = held.next_offset if held.store.meta.applied_offset >= 0 else low
        consumer.assign(places)
        self._counters["rebalances"] += 1
        self._assigned = True
        log.info("assigned: %s", {place.partition: place.offset for place in places})

    def _open(self, identity: LogIdentity, partition: int, low: int, high: int) -> Partition:
        store = self._store.open(partition, identity.epoch)
        try:
            _check_range(store.meta, low, high)
            view = PartitionView(self._config.view_folder, partition, map_bytes=self._config.view_map_bytes)
        except BaseException:
            store.close()
            raise
        try:
            copied = sync_view(view, store.meta, store.scan())
            if copied is not None:
                log.info("partition %d: view made anew from the store, %d rows", partition, copied)
            view.clear_dead_readers()
        except BaseException:
            view.close()
            store.close()
            raise
        return Partition(store, view, end_offset=high, caught_up_at=high)

    def _on_revoke(self, _: Consumer, places: Seq[TopicPartition]) -> None:
        self._close_partitions([place.partition for place in places])

    def _on_lost(self, _: Consumer, places: Seq[TopicPartition]) -> None:
        log.warning("partitions lost: %s; another worker may own them", [place.partition for place in places])
        self._close_partitions([place.partition for place in places])

    def _close_partitions(self, numbers: Seq[int] | None = None) -> None:
        for number in list(self._partitions) if numbers is None else numbers:
            with self._lock:
                held = self._partitions.pop(number, None)
            if held is not None:
                held.view.close()
                held.store.close()

    # Batches.

    def _apply(self, consumer: Consumer, messages: list[Message]) -> None:
        by_partition: dict[int, list[Message]] = {}
        for message in messages:
            if message.error() is not None:
                self._raise_for(message.error())
            by_partition.setdefault(message.partition(), []).append(message)
        done = []
        for partition, own in by_partition.items():
            held = self._partitions.get(partition)
            if held is not None:  # otherwise it was revoked while the batch was collected: its next owner reads these records
                self._apply_partition(partition, held, own)
                done.append(TopicPartition(self._config.topics.actions, partition, held.next_offset))
        if done:
            consumer.commit(offsets=done, asynchronous=True)

    def _apply_partition(self, partition: int, held: Partition, messages: list[Message]) -> None:
        expected = held.next_offset
        if messages[0].offset() < expected:
            messages = [message for message in messages if message.offset() >= expected]
            if not messages:
                return
        started_s = time.perf_counter()
        batch = self._decode(partition, messages)
        if batch.reasons:
            self._bury(batch, messages)
        self._at("decoded")
        decoded_s = time.perf_counter()

        keys, rows, meta = fold_batch(self._kept, held.store, batch)
        folded_s = time.perf_counter()
        held.store.write(keys, rows, meta)
        self._at("stored")
        stored_s = time.perf_counter()
        held.view.write(keys, rows, meta)
        self._at("viewed")
        viewed_s = time.perf_counter()
        held.progress_s = time.monotonic()
        steps_s = (decoded_s - started_s, folded_s - decoded_s, stored_s - folded_s, viewed_s - stored_s)
        with self._lock:
            self._counters["batches"] += 1
            self._counters["events"] += len(batch)
            self._counters["rows_written"] += len(rows)
            self._counters["offset_gaps"] += int(batch.offsets[0] != expected or batch.offsets[-1] - batch.offsets[0] + 1 != len(batch))
            for name, seconds in zip(self._seconds, steps_s, strict=True):
                self._seconds[name] += seconds

    def _decode(self, partition: int, messages: list[Message]) -> Batch:
        assert self._identity is not None
        n = len(messages)
        offsets = np.fromiter(map(Message.offset, messages), np.int64, n)
        if n > 1 and not (offsets[1:] > offsets[:-1]).all():
            raise AssertionError(f"partition {partition}: offsets of a batch do not ascend")
        stamps = np.fromiter((stamp for _, stamp in map(Message.timestamp, messages)), np.int64, n)
        for i, headers in enumerate(map(Message.headers, messages)):
            if headers is not None:
                stamps[i] = append_time_ms(int(stamps[i]), headers)
        return decode_batch(
            log_epoch=self._identity.epoch,
            partition=partition,
            offsets=offsets,
            keys=list(map(Message.key, messages)),
            values=list(map(Message.value, messages)),
            append_times_ms=stamps,
            partition_count=self._identity.partition_count,
            future_tolerance_ms=self._config.domain.future_tolerance_ms,
        )

    def _bury(self, batch: Batch, messages: list[Message]) -> None:
        """Writes the rejected records to the dead-letter topic and waits until they are stored there."""
        topics = self._config.topics
        self._failures.clear()
        for i, reason in batch.reasons.items():
            source = messages[i]
            letter = DeadLetter(
                reason=reason,
                source_topic=topics.actions,
                source_partition=batch.partition,
                source_offset=source.offset(),
                key=source.key() or b"",
                value=source.value() or b"",
                append_time_ms=max(0, int(batch.append_time_ms[i])),
            )
            key = f"{topics.actions}:{batch.partition}:{source.offset()}".encode()
            self._produce_letter(key, letter.SerializeToString())
        waiting = self._producer.flush(60.0)
        if waiting or self._failures:
            raise ProduceError(f"dead letters of partition {batch.partition} were not stored: {(self._failures or ['no answer'])[0]}")
        with self._lock:
            self._counters["dead_letters"] += len(batch.reasons)

    def _produce_letter(self, key: bytes, value: bytes) -> None:
        while True:
            try:
                self._producer.produce(self._config.topics.dead_letters, value, key, on_delivery=self._on_letter)
            except BufferError:
                self._producer.poll(0.1)
            else:
                return

    def _on_letter(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._failures.append(unavailable(self._config.kafka, error))

    def _refresh_lag(self, consumer: Consumer) -> None:
        ready = self._assigned
        for number, held in self._partitions.items():
            place = TopicPartition(self._config.topics.actions, number)
            _, high = consumer.get_watermark_offsets(place, cached=True)
            held.end_offset = max(held.end_offset, high)
            if held.next_offset >= held.end_offset:
                held.progress_s = time.monotonic()
            ready &= held.next_offset >= held.caught_up_at
        if ready and not self.caught_up.is_set():
            self.caught_up.set()

    def _raise_for(self, error: KafkaError) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise StateError(
                f"the offset behind the stored state is no longer in the log ({error.str()}): retention removed its records. Give the "
                "worker a new state folder to rebuild from what the log still has"
            )
        raise KafkaUnavailableError(unavailable(self._config.kafka, error))

    def _on_error(self, error: KafkaError) -> None:
        """Not fatal: librdkafka goes on trying, and the health page shows that there is no progress."""
        log.warning("%s", unavailable(self._config.kafka, error))


def _check_range(meta: Meta, low: int, high: int) -> None:
    """Raises StateError where the log does not continue the state."""
    following = meta.applied_offset + 1
    if meta.applied_offset >= 0 and following < low:
        raise StateError(
            f"partition {meta.partition}: the state ends at offset {meta.applied_offset} and the log now starts at {low}: retention "
            "removed the records between. Give the worker a new state folder to rebuild from what the log still has"
        )
    if following > high:
        raise StateError(
            f"partition {meta.partition}: the state includes offset {meta.applied_offset}, the log ends before {high}: it lost "
            "records (or is another one). Give the worker a new state folder to rebuild from this log"
        )

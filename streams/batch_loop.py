"""The worker's loop around Kafka: a consumer group shares the partitions out, batches go to `streams.core`, dead letters to their topic.

The group rebalances cooperatively: a partition that stays is never stopped. With static membership a restarted worker gets its partitions
back without a rebalance. The group's committed offsets only show the lag: a partition goes on behind the store's own offset, wherever it
comes from. State is opened (and restored) beside the loop, so that the other partitions go on and the group is not kept waiting.

A worker with `standby` also follows the partitions that others own, outside the group, into state and views of its own: when it is
assigned one, its state is there.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features.domain import Domain
from features.ports import SequenceCorruptError
from streams.core import Applied, Held, Log, RetentionPolicy, WorkerCore
from streams.errors import FencedError, KafkaUnavailableError, ProduceError, StateError
from streams.health import judge
from streams.kafka import (
    Consumer,
    EndOffsets,
    KafkaConfig,
    KafkaError,
    LogIdentity,
    Message,
    TopicPartition,
    Topics,
    answering,
    by_partition,
    check_actions_topic,
    check_retention,
    log_identity,
    log_range,
    new_group_consumer,
    new_producer,
    new_reader,
    queue_limits,
    records_of,
    unavailable,
)
from streams.owners import FORMER, OWNER, STANDBY, Announcer
from streams.purge import ErasurePass
from streams.snapshot_service import SnapshotService
from streams.snapshots import Snapshots
from streams.state import definitions
from streams.store import RocksPartition, RocksStore, Store
from streams.view import MAP_BYTES, PartitionView

log = logging.getLogger(__name__)

_UPKEEP_S = 0.25
_WAIT_S, _WAIT_SHORT_S = 0.2, 0.02
_BURY_S = 60.0
_MEND_ROWS = 256
"""Rows of one partition's view that are checked each upkeep: about a million in 20 minutes, 3 ms a second."""
_RETAKE_S = 5.0
"""How long after a partition was fenced its owner takes it again: by then a stale owner knows that it has lost it."""


@dataclass(frozen=True)
class WorkerConfig:
    """Everything that a worker needs. `instance` names this worker in its group, the same after each restart."""

    kafka: KafkaConfig
    topics: Topics
    domain: Domain
    state_folder: Path
    """Of this worker alone."""
    view_folder: Path
    """Shared by the workers and readers of a machine; a standby has its own."""
    group: str = "freshrank-worker"
    instance: str = "worker-0"
    standby: bool = False
    """Also follow the partitions that other workers own."""
    reader_address: str = ""
    """host:port of the reader that serves `view_folder`, as others reach it: announced with each partition. Empty: nothing is."""
    offset_below_retention: RetentionPolicy = "fail"
    snapshot_url: str = ""
    """Any fsspec URL; empty: no snapshots are taken or restored."""
    snapshot_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The file system's own, credentials among them."""
    snapshot_every_s: float = 600.0
    snapshot_keep: int = 3
    erasure_deadline_ms: int | None = None
    """Within this time nothing of an erased user may be anywhere; None: nothing is promised, and no retention checked."""
    erasure_strict: bool = False
    """A topic that keeps records longer is an error, not a warning."""
    session_timeout_ms: int = 10_000
    """A worker that is silent for this long loses its partitions to the others."""
    batch_events_max: int = 80_000
    linger_ms: int = 10
    """How long a batch that is not full waits for more records."""
    queue_bytes_max: int = 64 << 20
    """Most bytes of records that wait between broker and store, and of dead letters that wait for the broker, each."""
    cache_bytes: int = 256 << 20
    write_buffer_bytes: int = 256 << 20
    direct_reads: bool = False
    """RocksDB reads and writes its files beside the page cache, and a batch takes the old rows from it, not from the view."""
    view_map_bytes: int = MAP_BYTES
    answer_timeout_s: float = 10.0
    """How long Kafka may take to answer when the worker starts."""
    stalled_s: float = 30.0
    """A partition with lag and without progress for this long is not healthy."""
    web_host: str = "127.0.0.1"
    web_port: int = 0
    """Port of the health page; 0: a free one."""
    log_level: str = "INFO"


_LATE_S = 60.0
"""How long behind its new membership a worker may still be fenced by its own late commit: librdkafka tries one again every second."""
_FENCED_COMMIT = f"OffsetCommit failed: {KafkaError(KafkaError.FENCED_INSTANCE_ID).str()}"
"""What librdkafka says of it. A consumer that is fenced by its heartbeats or as it joins ("Fatal consumer error: ...") has a rival."""


class _FencedByItselfError(Exception):
    """The group's consumer is of no use any more, by its own doing."""


class BatchLoop:
    """Consumes the actions topic until stopped. `run` blocks: give it a thread of its own; everything else may be called from others."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        store: Store | None = None,
        at: Callable[[str], None] = lambda _: None,
        observe: Callable[[Applied], None] = lambda _: None,
    ) -> None:
        """`at` and `observe`: see `streams.core.WorkerCore`."""
        self._config = config
        snapshots = Snapshots(config.snapshot_url, options=config.snapshot_options) if config.snapshot_url else None
        self._store = store or RocksStore(
            config.state_folder,
            definitions(config.domain),
            cache_bytes=config.cache_bytes,
            write_buffer_bytes=config.write_buffer_bytes,
            direct_reads=config.direct_reads,
            snapshots=snapshots,
        )
        self._snapshots = snapshots and SnapshotService(
            snapshots, config.state_folder / "checkpoints", every_s=config.snapshot_every_s, keep=config.snapshot_keep
        )
        self.core = WorkerCore(
            config.domain,
            self._store,
            self._open_view,
            self._bury,
            offset_below_retention=config.offset_below_retention,
            at=at,
            observe=observe,
            erasures=ErasurePass(config.state_folder, list(definitions(config.domain))) if store is None else None,
            folds_on_view=not config.direct_reads,
        )
        self._stop = threading.Event()
        self._owned: set[int] | None = None
        """Partitions that the group has assigned; None before the first assignment."""
        self._fetched: set[int] = set()
        """Those of them whose records come from the group's consumer."""
        self._followed: set[int] = set()
        """Partitions that are followed for another owner."""
        self._opening: dict[int, Future[Held]] = {}
        self._opener = ThreadPoolExecutor(2, thread_name_prefix="open-state")
        self._abandoned: dict[int, Future[Held]] = {}
        """Openings of partitions that were taken away meanwhile, and which cannot be cancelled."""
        self._just_opened: set[int] = set()
        self._missing_since_s: dict[int, float] = {}
        self.caught_up = threading.Event()
        """Set once the state has reached the log's end of the moment of assignment."""
        self._rebalances = 0
        self._turned_s = time.monotonic()
        """When the loop last came round."""
        self._upkeeps = 0
        self._identity: LogIdentity | None = None
        self._failures: list[str] = []
        self._announcer: Announcer | None = None
        self._late_until_s = 0.0
        """Until when the broker may still get a commit of a membership that ended without another worker's doing."""

    def run(self) -> None:
        """Consumes until `stop`.

        Raises:
            StreamError: what stopped it; the message says what to do. Also any other exception: then it is a bug.
        """
        config = self._config
        check_actions_topic(config.kafka, config.topics.actions, timeout_s=config.answer_timeout_s)
        if config.erasure_deadline_ms is not None:
            kept = [config.topics.actions, config.topics.dead_letters, config.topics.rankings]
            try:
                check_retention(
                    config.kafka,
                    kept,
                    deadline_ms=config.erasure_deadline_ms,
                    strict=config.erasure_strict,
                    timeout_s=config.answer_timeout_s,
                )
            except KafkaUnavailableError as error:
                if config.erasure_strict:
                    raise
                log.warning("how long topics keep erased users' records cannot be checked: %s", error)
        self._producer = new_producer(config.kafka, "dead-letters", queue_buffering_max_kbytes=config.queue_bytes_max >> 10)
        self._follower = new_reader(config.kafka, "standby", logger=log, **queue_limits(config.queue_bytes_max))
        self._follow_log(timeout_s=config.answer_timeout_s)
        if config.reader_address:
            said = {"instance": config.instance, "address": config.reader_address}
            self._announcer = Announcer(config.kafka, config.topics.announcements, **said)
        consumer = self._join()
        ends = EndOffsets(config.kafka, config.topics.actions)
        try:
            upkeep_s = time.monotonic()
            while not self._stop.is_set():
                self._turned_s = time.monotonic()
                try:
                    self._take(consumer, _WAIT_SHORT_S if self._followed or self._opening else _WAIT_S)
                except _FencedByItselfError:
                    consumer = self._join_anew(consumer)
                if self._followed:
                    self._take(self._follower, _WAIT_SHORT_S)
                self._finish_opening(consumer)
                if time.monotonic() - upkeep_s > _UPKEEP_S or not self.caught_up.is_set():
                    upkeep_s = time.monotonic()
                    self._upkeep(consumer, ends)
        finally:
            for opening in self._opening.values():
                _abandon(opening)
            if self._snapshots:
                self._snapshots.close()
            self.core.close()
            self._opener.shutdown()  # after what is open is safe: a restore that is under way may take minutes
            self._follower.close()
            consumer.close()
            if self._announcer is not None:
                self._announcer.close()

    def stop(self) -> None:
        """Asks `run` to end after its batch."""
        self._stop.set()

    def statistics(self) -> dict[str, float]:
        """Counters and seconds spent in each step since start."""
        snapshots = self._snapshots.statistics() if self._snapshots else {}
        return {**self.core.statistics(), **self._store.statistics(), **snapshots, "rebalances": self._rebalances}

    def partitions(self) -> list[int]:
        """The partitions that the group has assigned to this worker now, ascending."""
        return sorted(self._owned or ())

    def health(self) -> dict[str, Any]:
        """See `streams.health.judge`; and the progress of each partition."""
        owned = self._owned
        partitions = {
            str(number): {**progress, "role": "owner" if number in (owned or ()) else "standby"}
            for number, progress in self.core.progress().items()
        }
        found = judge(
            partitions,
            assigned=owned is not None,
            caught_up=self.caught_up.is_set(),
            not_open=sorted((owned or set()) - {int(number) for number in partitions}),
            log_end_age_s=max((float(state["log_end_age_s"]) for state in partitions.values()), default=0.0),
            loop_age_s=0.0 if self.core.is_restoring else time.monotonic() - self._turned_s,
            stalled_s=self._config.stalled_s,
        )
        if self._snapshots:
            found |= {"snapshots": self._snapshots.partitions(), "restores": self._snapshots.restores()}
        return {**found, "log_epoch": f"{self._identity.epoch:016x}" if self._identity else None, "partitions": partitions}

    # Assignment: called by librdkafka inside of consume(), in this loop's own thread.

    def _follow_log(self, **timeout: float) -> None:
        topics = self._config.topics
        self._identity = identity = log_identity(self._config.kafka, topics.actions, topics.base, **timeout)
        self.core.follow(Log(identity.topic, identity.epoch, identity.partition_count, self._first_and_next, identity.base))

    def _first_and_next(self, partition: int) -> tuple[int, int]:
        with answering(self._config.kafka):
            return log_range(self._follower, self._config.topics.actions, partition)

    def _join(self) -> Consumer:
        config = self._config
        consumer = new_group_consumer(
            config.kafka,
            config.group,
            f"{config.group}-{config.instance}",
            session_timeout_ms=config.session_timeout_ms,
            queue_bytes_max=config.queue_bytes_max,
            on_error=self._on_error,
        )
        consumer.subscribe([config.topics.actions], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        return consumer

    def _join_anew(self, fenced: Consumer) -> Consumer:
        """Leaves a consumer that can do nothing any more for a new one of the same name."""
        log.warning(
            "a commit was refused as another worker's of this name: taken for one from before the session timed out, the group is joined "
            "anew. A second worker of this name would stop now"
        )
        self._late_until_s = 0.0
        self._give_up(self._owned or set())
        fenced.close()
        return self._join()

    def _on_assign(self, consumer: Consumer, places: Seq[TopicPartition]) -> None:
        try:
            self._follow_log()
        except KafkaUnavailableError as error:  # the log that is known goes on; another one is found out at the next assignment
            if self._identity is None:
                raise
            log.warning("%s", error)
        taken = {place.partition for place in places}
        self._owned = (self._owned or set()) | taken
        self._rebalances += 1
        self._late_until_s = min(self._late_until_s, time.monotonic() + _LATE_S)
        log.info("assigned: %s", sorted(taken))
        # A followed partition is open and nearly up to date: only where its records come from changes.
        self._unfollow(taken & self._followed)
        consumer.incremental_assign([])  # says that the assignment was taken note of; partitions are added as their state is open
        for number in sorted(taken):
            if number in self.core.held():
                self._fetch(consumer, number)
            else:
                self._begin_opening(number)
        self._follow_others()

    def _on_revoke(self, consumer: Consumer, places: Seq[TopicPartition]) -> None:
        gone = {place.partition for place in places}
        consumer.incremental_unassign(self._places(gone & self._fetched))
        self._give_up(gone)

    def _give_up(self, gone: set[int]) -> None:
        self._owned = (self._owned or set()) - gone
        log.info("revoked: %s", sorted(gone))
        self._fetched -= gone
        self._say(gone, FORMER)
        if not self._config.standby:
            for number in gone & self._opening.keys():
                self._abandoned[number] = _abandon(self._opening.pop(number))
            self.core.close(sorted(gone))
        self._follow_others()

    def _on_lost(self, consumer: Consumer, places: Seq[TopicPartition]) -> None:
        timed_out = not consumer.memberid()  # librdkafka drops the id of a session that timed out, not that of a fenced one
        self._late_until_s = math.inf if timed_out else 0.0
        why = "the session timed out" if timed_out else "the group gave them away"
        log.warning("partitions lost: %s; %s, another worker may own them", [place.partition for place in places], why)
        self._on_revoke(consumer, places)

    def _follow_others(self) -> None:
        """A standby follows every partition that it does not own."""
        if not self._config.standby or self._identity is None or self._stop.is_set():
            return
        for number in sorted(set(range(self._identity.partition_count)) - (self._owned or set()) - self._followed - self._opening.keys()):
            if number in self.core.held():
                self._follow(number)
            else:
                self._begin_opening(number)

    def _begin_opening(self, number: int) -> None:
        abandoned = self._abandoned.get(number)
        if abandoned is not None and not abandoned.done():
            return  # it holds the folder still: `_retake` begins this one when it is closed
        self._abandoned.pop(number, None)
        if number not in self._opening:
            self._opening[number] = self._opener.submit(self.core.prepare, number)

    def _finish_opening(self, consumer: Consumer) -> None:
        for number in [number for number, opening in self._opening.items() if opening.done()]:
            try:
                held = self._opening.pop(number).result()
            except (FencedError, KafkaUnavailableError) as error:
                log.warning("partition %d: %s while it was opened; taken again if it still is this worker's", number, error)
                continue
            start = self.core.hold(number, held)
            log.info("partition %d: open, going on at offset %d", number, start)
            if number in (self._owned or ()):
                self._fetch(consumer, number)
            else:
                self._follow(number)

    def _fetch(self, consumer: Consumer, number: int) -> None:
        consumer.incremental_assign([self._place(number)])
        self._fetched.add(number)
        self._just_opened.add(number)
        self._say({number}, OWNER)

    def _follow(self, number: int) -> None:
        self._follower.incremental_assign([self._place(number)])
        self._followed.add(number)
        self._just_opened.add(number)
        self._say({number}, STANDBY)

    def _say(self, numbers: set[int], role: int) -> None:
        """Announces where the state of partitions can be read."""
        if self._announcer is not None and self._identity is not None:
            for number in sorted(numbers):
                self._announcer.say(number, role, self._identity.epoch)

    def _unfollow(self, numbers: set[int]) -> None:
        if numbers:
            self._follower.incremental_unassign(self._places(numbers))
            self._followed -= numbers

    def _place(self, number: int) -> TopicPartition:
        """Where a partition that is open goes on. The broker compares the leader epoch with its log and tells if that was truncated."""
        meta = self.core.held()[number].store.meta
        known = {"leader_epoch": meta.leader_epoch} if meta.leader_epoch >= 0 else {}
        return TopicPartition(self._config.topics.actions, number, meta.applied_offset + 1, **known)

    def _places(self, numbers: set[int]) -> list[TopicPartition]:
        return [TopicPartition(self._config.topics.actions, number) for number in sorted(numbers)]

    # Batches.

    def _take(self, consumer: Consumer, wait_s: float) -> None:
        """Folds what is there: one record when it is quiet, a full batch when it is behind."""
        self._just_opened.clear()
        messages = consumer.consume(1, wait_s)
        if not messages:
            return
        self._just_opened.clear()
        more = consumer.consume(self._config.batch_events_max - 1, self._config.linger_ms / 1000)
        # A partition that was assigned anew meanwhile starts behind its state: its first message comes again, in `more`.
        messages = [message for message in messages if message.partition() not in self._just_opened] + more
        taken, errors = by_partition(messages)
        for message in errors:
            self._handle(consumer, message)
        done = []
        for partition, own in taken.items():
            next_offset = self.core.apply(partition, records_of(own))
            if next_offset is None:
                continue
            if next_offset <= own[-1].offset():  # a damaged state was replaced by an older one
                consumer.seek(self._place(partition))
            done.append(TopicPartition(self._config.topics.actions, partition, next_offset))
        # After a time-out that the loop has not heard of there is no membership: such a commit would be taken for another worker's.
        if done and consumer is not self._follower and consumer.memberid():
            consumer.commit(offsets=done, asynchronous=True)

    def _handle(self, consumer: Consumer, message: Message) -> None:
        error, number = message.error(), message.partition()
        if error.code() == KafkaError._FATAL and time.monotonic() < self._late_until_s and _FENCED_COMMIT in error.str():
            # Taken for a commit from before the time-out, which waited for the broker and came behind the new membership of the same name.
            # It may be a second worker of this name after all, if a commit meets it before a heartbeat does: that one is fenced now, and
            # stops. The next such error stops this one.
            raise _FencedByItselfError
        if error.code() == KafkaError._AUTO_OFFSET_RESET and number not in self.core.held():
            log.debug("partition %d: %s; it is being opened, and then read from its own place", number, error.str())
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            held = self.core.held()[number]
            first, following = self._first_and_next(number)
            if first <= held.next_offset <= following:
                raise StateError(
                    f"partition {number}: the broker's log was truncated before offset {held.next_offset} and has grown again "
                    f"({error.str()}): it lost records that the state includes. Give the worker new folders for state and view to "
                    "rebuild from this log"
                )
            try:
                self.core.reopen(number)  # raises, or goes on as the policy says
            except FencedError as taken:
                log.warning("partition %d: %s while it was opened; taken again if it still is this worker's", number, taken)
            else:
                consumer.seek(self._place(number))
        elif error.retriable() or error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT):
            log.warning("%s", unavailable(self._config.kafka, error))
        else:
            raise KafkaUnavailableError(unavailable(self._config.kafka, error))

    def _upkeep(self, consumer: Consumer, ends: EndOffsets) -> None:
        held = self.core.held()
        for number, end_offset, asked_ms in ends.ask(sorted(held)):
            self.core.saw_end(number, end_offset, asked_ms)
        for number in list(held):
            source = self._follower if number in self._followed else consumer
            _, high = source.get_watermark_offsets(*self._places({number}), cached=True)
            self.core.saw_end(number, high)
        if not self._followed:
            self._follower.poll(0)  # only its events: without partitions it has no records
        self._look_after_state()
        for number in list(held):
            if self.core.tend(number):
                (self._follower if number in self._followed else consumer).seek(self._place(number))
        self._retake(consumer)
        owned = self._owned
        ready = owned is not None and owned <= held.keys() and all(held[number].next_offset >= held[number].opened_end for number in owned)
        if ready and not self.caught_up.is_set():
            self.caught_up.set()

    def _look_after_state(self) -> None:
        """Snapshots of the partitions that are owned, and a part of one view checked for damage."""
        held = self.core.held()
        if self._snapshots:
            stores = [held[number].store for number in sorted((self._owned or set()) & held.keys())]
            self._snapshots.upkeep([store for store in stores if isinstance(store, RocksPartition)])
        self._upkeeps += 1
        if held:
            one = held[sorted(held)[self._upkeeps % len(held)]]
            if isinstance(one.view, PartitionView):
                try:
                    one.view.mend(one.store.get, one.store.meta, _MEND_ROWS)
                except (FencedError, SequenceCorruptError) as error:  # the next batch meets it, too, and deals with it
                    log.warning("%s", error)

    def _retake(self, consumer: Consumer) -> None:
        """Opens again what the group still assigns to this worker and a stale owner had fenced."""
        wanted = set(range(self._identity.partition_count)) if self._config.standby and self._identity else self._owned or set()
        missing = wanted - self.core.held().keys() - self._opening.keys()
        now_s = time.monotonic()
        self._missing_since_s = {number: self._missing_since_s.get(number, now_s) for number in missing}
        for number, since_s in list(self._missing_since_s.items()):
            if now_s - since_s > _RETAKE_S:
                consumer.incremental_unassign(self._places({number} & self._fetched))
                self._fetched.discard(number)
                self._unfollow({number} & self._followed)
                del self._missing_since_s[number]
                self._begin_opening(number)

    # Dead letters.

    def _bury(self, letters: Seq[tuple[bytes, bytes]]) -> None:
        """Writes rejected records to the dead-letter topic and waits until they are stored there."""
        self._failures.clear()
        for key, value in letters:
            self._produce_letter(key, value)
        deadline_s, waiting = time.monotonic() + _BURY_S, 1
        while waiting and time.monotonic() < deadline_s:
            waiting = self._producer.flush(1.0)
            self._turned_s = time.monotonic()  # waiting for a broker is not being stuck
        if waiting or self._failures:
            raise ProduceError(f"{len(letters)} dead letters were not stored: {(self._failures or ['no answer'])[0]}")

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

    def _open_view(self, partition: int) -> PartitionView:
        abandoned = self._abandoned.get(partition)
        if abandoned is not None and not abandoned.done():
            raise FencedError("it was taken away while it was opened")  # its view is the new owner's
        view = PartitionView(self._config.view_folder, partition, map_bytes=self._config.view_map_bytes)
        view.clear_dead_readers()
        return view

    def _on_error(self, error: KafkaError) -> None:
        """Not fatal: librdkafka goes on trying, and the health page shows that there is no progress."""
        log.warning("%s", unavailable(self._config.kafka, error))


def _abandon(opening: Future[Held]) -> Future[Held]:
    """Closes what is being opened, as soon as it is; returns it."""

    def close(done: Future[Held]) -> None:
        if not done.cancelled() and done.exception() is None:
            held = done.result()
            held.view.close()
            held.store.close()

    if not opening.cancel():
        opening.add_done_callback(close)
    return opening

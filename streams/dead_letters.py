"""Dead letters: found again, read by a person, and sent once more to the actions topic.

The dead-letter topic is only appended to. A letter that two owners buried, or that a restart buried again, stands in it twice under the key
"topic:partition:offset" of its source record and counts once here. A re-driven letter is followed by a marker: a DeadLetter of the same key
and source position whose reason starts with "redriven:". Re-driving twice is harmless anyway, for equal events count once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from google.protobuf.message import DecodeError

from features.actions import APPEND_TIME_HEADER, ERASE, REJECTED, Batch, decode_batch
from features.domain import Domain
from features.encodings import read_action
from features.ids import partition_of, user_key
from features.ports import Position
from protos.v1.actions_pb2 import Action, DeadLetter
from streams.archive import KafkaLog
from streams.errors import ProduceError
from streams.kafka import KafkaConfig, KafkaError, Message, Producer, Topics, log_identity, new_producer, unavailable

REDRIVEN = "redriven"
"""Kind of the reason of a marker."""

_FLUSH_S_MAX = 60.0
_CHUNK = 500

Key = tuple[str, int, int, int]
"""Identity of a letter: source topic, log epoch, partition, offset."""


def kind_of(reason: str) -> str:
    """What was wrong, in few words: the reason up to its first colon."""
    return reason.partition(":")[0]


@dataclass(frozen=True)
class Letter:
    """A source record that could not be folded.

    append_time_ms: what it counts with, -1 where its header cannot be read; broker_time_ms: the broker's stamp, 0 where an older worker did
    not keep it; buried_ms: when it was written to the dead-letter topic; redriven: the marker's reason, empty where there is none.
    """

    topic: str
    log_epoch: int
    partition: int
    offset: int
    reason: str
    key: bytes | None
    value: bytes | None
    append_time_ms: int
    broker_time_ms: int
    buried_ms: int
    redriven: str = ""

    @property
    def identity(self) -> Key:
        """The same for every copy of the letter."""
        return self.topic, self.log_epoch, self.partition, self.offset

    @property
    def kind(self) -> str:
        """`kind_of` its reason."""
        return kind_of(self.reason)

    @property
    def source_time_ms(self) -> int:
        """When its log took the source record, as well as it is known."""
        return max(self.broker_time_ms, 0) or max(self.append_time_ms, 0) or self.buried_ms

    @property
    def redrive_time_ms(self) -> int | None:
        """The append time that a re-drive gives it; None where the letter holds none."""
        return next((time_ms for time_ms in (self.append_time_ms, self.broker_time_ms) if time_ms > 0), None)

    @property
    def user_id(self) -> int | None:
        """The user of the record as its value says, or its key where the value does not."""
        action = parse_action(self.value)
        if action is not None and action.HasField("user_id"):
            return int(action.user_id)
        try:
            return int(self.key or b"", 16) if len(self.key or b"") == 16 else None
        except ValueError:
            return None


@dataclass(frozen=True)
class Selection:
    """Which letters are meant; every condition must hold. Times are of `Letter.source_time_ms`, until_ms excluded."""

    kinds: tuple[str, ...] = ()
    since_ms: int | None = None
    until_ms: int | None = None
    user_id: int | None = None
    partition: int | None = None
    places: tuple[tuple[int, int], ...] = ()
    """(partition, offset) of source records; all where empty."""

    def __contains__(self, letter: Letter) -> bool:
        time_ms = letter.source_time_ms
        return (
            (not self.kinds or letter.kind in self.kinds)
            and (self.since_ms is None or time_ms >= self.since_ms)
            and (self.until_ms is None or time_ms < self.until_ms)
            and (self.partition is None or letter.partition == self.partition)
            and (not self.places or (letter.partition, letter.offset) in self.places)
            and (self.user_id is None or letter.user_id == self.user_id)
        )


EVERYTHING = Selection()


def parse_action(value: bytes | None) -> Action | None:
    """The record's value in any encoding, also one that the domain does not read, or None where it is no Action."""
    action = read_action(value) if value else None
    return None if isinstance(action, str) else action


def read_letters(kafka: KafkaConfig, topic: str, wanted: Selection = EVERYTHING) -> Iterator[Letter]:
    """The letters of the topic up to now, each once, in the order in which they were buried. Reads the topic twice: markers first.

    Raises:
        KafkaUnavailableError: no broker answered.
        TopicError: there is no such topic.
    """
    log = KafkaLog(kafka, topic)
    try:
        redriven = {letter.identity: letter.reason for letter in _scan(log) if letter.kind == REDRIVEN}
        seen: set[Key] = set()
        for letter in _scan(log):
            if letter.kind != REDRIVEN and letter.identity not in seen:
                seen.add(letter.identity)
                letter = replace(letter, redriven=redriven.get(letter.identity, ""))
                if letter in wanted:
                    yield letter
    finally:
        log.close()


def _scan(log: KafkaLog) -> Iterator[Letter]:
    for partition in sorted(log.partitions):
        for records in log.read(partition):
            for value, buried_ms in zip(records.values, records.append_time_ms.tolist(), strict=True):
                try:
                    letter = DeadLetter.FromString(value or b"")
                except DecodeError:
                    continue  # the worker's agent counts it; there is nothing in it to show or to send
                yield Letter(
                    topic=letter.source_topic,
                    log_epoch=letter.log_epoch,
                    partition=letter.source_partition,
                    offset=letter.source_offset,
                    reason=letter.reason,
                    key=letter.key if letter.HasField("key") else None,
                    value=letter.value if letter.HasField("value") else None,
                    append_time_ms=letter.append_time_ms,
                    broker_time_ms=letter.broker_time_ms,
                    buried_ms=buried_ms,
                )


@dataclass(frozen=True)
class Verdict:
    """What a re-drive would do with a letter. `refused`: why it is left alone, empty where it is sent; `key`: the key it is sent under."""

    letter: Letter
    refused: str
    key: bytes
    time_ms: int
    is_erasure: bool


def judge(letter: Letter, domain: Domain, partition_count: int, *, rekey: bool, again: bool = False) -> Verdict:
    """Whether today's worker would accept the record, in the partition that its key belongs to and with its original append time.

    rekey: a wrong key is replaced by the one that the value's user id makes. again: also where it was re-driven before.
    """
    action = parse_action(letter.value)
    key = letter.key or b""
    if rekey and action is not None and action.HasField("user_id"):
        key = user_key(action.user_id)
    time_ms = letter.redrive_time_ms
    if letter.redriven and not again:
        return Verdict(letter, letter.redriven, key, 0, False)
    if time_ms is None:
        return Verdict(letter, "append time: the letter holds none", key, 0, False)
    batch = _decode(letter, key, time_ms, domain, partition_count)
    refused = batch.reasons.get(0, "")
    if refused and kind_of(refused) == "key" and not rekey:
        refused += " (correct it with --rekey)"
    return Verdict(letter, refused, key, time_ms, bool(batch.verdict[0] == ERASE))


def _decode(letter: Letter, key: bytes, time_ms: int, domain: Domain, partition_count: int) -> Batch:
    batch = decode_batch(
        log_epoch=letter.log_epoch,
        partition=partition_of(key, partition_count),
        offsets=np.zeros(1, np.int64),
        keys=[key],
        values=[letter.value],
        append_times_ms=np.array([time_ms], np.int64),
        future_tolerance_ms=domain.future_tolerance_ms,
        partition_count=partition_count,
        encodings=domain.encodings,
    )
    assert (batch.verdict[0] == REJECTED) == bool(batch.reasons)
    return batch


@dataclass(frozen=True)
class Redriven:
    """What a re-drive did. sent: (letter, its new position, None where the broker did not say); refused: letters left alone, by reason;
    left_over: letters beyond the limit, which another run takes."""

    sent: list[tuple[Letter, Position | None]]
    refused: Counter[str]
    erasures: int
    left_over: int


class Redrive:
    """Sends letters to the actions topic again, each under its original append time, and marks them."""

    def __init__(self, kafka: KafkaConfig, topics: Topics, domain: Domain) -> None:
        """Asks for the identity of the actions topic.

        Raises:
            KafkaUnavailableError: no broker answered.
            TopicError: there is no such topic.
        """
        self._kafka, self._topics, self._domain = kafka, topics, domain
        self._identity = log_identity(kafka, topics.actions, base=topics.base)

    def run(self, letters: Iterable[Letter], *, limit: int, rekey: bool = False, dry_run: bool = False, again: bool = False) -> Redriven:
        """Sends at most `limit` letters; the rest stays for another run. A letter is marked after the broker has its record.

        Raises:
            ProduceError: the broker did not take a record. What was sent before is marked; run it again.
        """
        found = Redriven([], Counter(), 0, 0)
        chunk: list[Verdict] = []
        erasures = left_over = chosen = 0
        producer = new_producer(self._kafka, "redrive")
        for letter in letters:
            verdict = judge(letter, self._domain, self._identity.partition_count, rekey=rekey, again=again)
            if verdict.refused:
                found.refused[kind_of(verdict.refused)] += 1
            elif chosen == limit:
                left_over += 1
            else:
                chosen += 1
                erasures += verdict.is_erasure
                if dry_run:
                    found.sent.append((letter, None))
                else:
                    chunk.append(verdict)
            if len(chunk) == _CHUNK:
                found.sent.extend(self._send(producer, chunk))
                chunk = []
        found.sent.extend(self._send(producer, chunk))
        return replace(found, erasures=erasures, left_over=left_over)

    def _send(self, producer: Producer, verdicts: list[Verdict]) -> list[tuple[Letter, Position | None]]:
        places: dict[int, Position | None] = {}
        failures: list[str] = []

        def report(i: int, error: KafkaError | None, message: Message) -> None:
            if error is not None:
                failures.append(unavailable(self._kafka, error))
            else:
                known = message.offset() is not None  # the broker may recognise a retry and not say where it had put it
                places[i] = Position(self._identity.epoch, message.partition(), message.offset()) if known else None

        for i, verdict in enumerate(verdicts):
            headers = [(APPEND_TIME_HEADER, b"%d" % verdict.time_ms)]
            _produce(
                producer,
                self._topics.actions,
                verdict.letter.value or b"",
                verdict.key,
                headers=headers,
                on_delivery=lambda error, message, i=i: report(i, error, message),
            )
        producer.flush(_FLUSH_S_MAX)
        sent = [(verdicts[i].letter, place) for i, place in sorted(places.items())]
        for letter, place in sent:
            at = f" as {place.log_epoch:016x}:{place.partition}:{place.offset}" if place else ""
            self._mark(producer, letter, f"{REDRIVEN}: {letter.kind}{at}", failures)
        waiting = producer.flush(_FLUSH_S_MAX)
        if failures or waiting or len(places) < len(verdicts):
            raise ProduceError(f"{len(sent)} of {len(verdicts)} letters were sent and marked: {(failures or ['no answer'])[0]}")
        return sent

    def _mark(self, producer: Producer, letter: Letter, reason: str, failures: list[str]) -> None:
        marker = DeadLetter(
            reason=reason,
            source_topic=letter.topic,
            source_partition=letter.partition,
            source_offset=letter.offset,
            append_time_ms=letter.append_time_ms,
            broker_time_ms=letter.broker_time_ms,
            log_epoch=letter.log_epoch,
        )
        _produce(
            producer,
            self._topics.dead_letters,
            marker.SerializeToString(),
            f"{letter.topic}:{letter.partition}:{letter.offset}".encode(),
            on_delivery=lambda error, _: failures.append(unavailable(self._kafka, error)) if error else None,
        )


def _produce(producer: Producer, topic: str, value: bytes, key: bytes, **options: object) -> None:
    while True:
        try:
            producer.produce(topic, value, key, **options)
        except BufferError:
            producer.poll(0.1)
        else:
            producer.poll(0)
            return

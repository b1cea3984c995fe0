"""Produces actions and erasures: checked against the domain file, keyed, acknowledged by all replicas, never lost in silence."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from features.actions import APPEND_TIME_HEADER, encode_action, encode_erase, encode_events
from features.domain import Domain
from features.erasures import Erasure
from features.ids import user_key
from features.logs import read_actions
from features.ports import Position
from streams.errors import ProduceError
from streams.kafka import KafkaConfig, KafkaError, KafkaException, Message, end_offsets, log_identity, new_producer, unavailable

LINGER_MS = 5
"""How long a record waits for others to be sent with it: librdkafka's default, as requests cost broker and producer more than bytes."""
_POLL_S = 0.1
T = TypeVar("T")


class ActionProducer:
    """Writes to the actions topic of one domain. Thread-safe.

    The local queue is bounded: where the broker is slower than the caller, `produce` waits. Where it is absent or refuses, every record's
    future, and the next `flush`, raises ProduceError within `timeout_s`.
    """

    def __init__(
        self, kafka: KafkaConfig, domain: Domain, topic: str, *, base: str = "", timeout_s: float = 10.0, queue_max: int = 100_000
    ) -> None:
        """Connects and reads the log's identity. `base`: see `Topics.base`; positions belong to it.

        Raises:
            KafkaUnavailableError: no broker answered within `timeout_s`.
            TopicError: there is no such topic.
        """
        self.log_identity = log_identity(kafka, topic, base, timeout_s=timeout_s)
        self._kafka, self._domain, self._topic, self._timeout_s = kafka, domain, topic, timeout_s
        self._counters = dict.fromkeys(("produced", "delivered", "failed"), 0)
        self._lock = threading.Lock()
        self._unreported_failures = 0
        self._first_failure = ""
        self._producer = new_producer(
            kafka,
            "producer",
            linger_ms=LINGER_MS,
            message_timeout_ms=max(int(timeout_s * 1000), 100),
            queue_buffering_max_messages=queue_max,
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="producer-poll", daemon=True)
        self._thread.start()

    def produce(
        self,
        *,
        user_id: int,
        entity_kind: str | int,
        entity_id: int,
        action: str | int,
        event_time_ms: int | None = None,
        event_id: int | None = None,
        request_id: int = 0,
        surface: str | int = 0,
        value: float = float("nan"),
    ) -> Future[Position]:
        """Queues one action; the future gives its position in the log, or raises ProduceError.

        Names or numbers of the domain file are taken for entity_kind, action and surface. `event_time_ms` is now where absent, `event_id`
        64 random bits: give the same one again when you retry, then both are one event.

        Raises:
            ValueError: naming the field that is not allowed.
            ProduceError: the queue stayed full for `timeout_s`.
        """
        domain = self._domain
        now_ms = time.time_ns() // 1_000_000
        if event_time_ms is not None and event_time_ms - domain.future_tolerance_ms > now_ms:
            raise ValueError(f"event_time_ms: {event_time_ms} is more than {domain.future_tolerance_ms} ms ahead of now, {now_ms}")
        data = encode_action(
            user_id=user_id,
            entity_kind=_number("entity_kind", entity_kind, domain.entities),
            entity_id=entity_id,
            action=_number("action", action, {name: known.id for name, known in domain.actions.items()}),
            event_time_ms=now_ms if event_time_ms is None else event_time_ms,
            event_id=secrets.randbits(64) if event_id is None else event_id,
            request_id=request_id,
            surface=0 if surface == 0 else _number("surface", surface, domain.surfaces),
            value=value,
        )
        return self._send(user_key(user_id), data, lambda position, _: position)

    def erase(self, user_id: int, reason: str, *, event_id: int | None = None) -> Future[Position]:
        """Queues the erasure of a user: everything before it goes, and everything with an event time up to its append time.

        Give the same `event_id` again when you retry: the audit then counts both records as one erasure. 64 random bits where absent.
        """
        event_id = secrets.randbits(64) if event_id is None else event_id
        return self._send(user_key(user_id), encode_erase(user_id=user_id, event_id=event_id, reason=reason), lambda position, _: position)

    def erase_user(self, user_id: int, reason: str, event_id: int) -> Future[Erasure]:
        """`erase`, whose future gives the record as the log has it, with its append time."""
        data = encode_erase(user_id=user_id, event_id=event_id, reason=reason)

        def stored(at: Position, append_time_ms: int) -> Erasure:
            return Erasure(user_id, event_id, at.log_epoch, at.partition, at.offset, append_time_ms, reason)

        return self._send(user_key(user_id), data, stored)

    def produce_many(
        self, users: npt.NDArray[np.uint64], events: npt.NDArray[np.void], append_time_ms: npt.NDArray[np.int64] | None = None
    ) -> int:
        """Queues many actions fast: users uint64 [n], events EVENT_DTYPE [n]; `flush` tells whether all arrived. Returns n.

        `append_time_ms` int64 [n], only for import, re-drive and migration, sets the header that stands for the broker's append time.

        Raises:
            ValueError: naming field and row that is not allowed; then nothing was queued.
            ProduceError: the queue stayed full for `timeout_s`.
        """
        stored_ms = time.time_ns() // 1_000_000 if append_time_ms is None else append_time_ms
        _check_events(events, stored_ms, self._domain.future_tolerance_ms)
        values = encode_events(users, events)
        for i, (user_id, value) in enumerate(zip(users.tolist(), values, strict=True)):
            headers = None if append_time_ms is None else [(APPEND_TIME_HEADER, b"%d" % append_time_ms[i])]
            self._queue(user_key(user_id), value, self._on_counted, headers)
        return len(values)

    def produce_log(self, folder: str | Path, *, keep_append_time: bool = True) -> int:
        """Produces a canonical action log in its order, erasures included, and flushes; returns the number of records.

        keep_append_time: the log's append times travel in the header. Otherwise the records are new and the broker stamps them.

        Raises:
            LogError: the log cannot be read.
            ProduceError: not all records arrived.
        """
        count = 0
        for batch in read_actions(folder, self._domain):
            append_time_ms = batch.append_time_ms if keep_append_time else None
            starts = [0, *(np.flatnonzero(batch.erase[1:] != batch.erase[:-1]) + 1).tolist(), len(batch)]
            for start, end in pairwise(starts):
                part = slice(start, end)
                if batch.erase[start]:
                    self._erase_many(batch.users[part], batch.events[part], None if append_time_ms is None else append_time_ms[part])
                else:
                    self.produce_many(batch.users[part], batch.events[part], None if append_time_ms is None else append_time_ms[part])
            count += len(batch)
        self.flush()
        return count

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits for every queued record.

        Raises:
            ProduceError: records since the last flush were not stored, or are still queued: produce them again with the same event ids.
        """
        waiting = self._producer.flush(self._timeout_s * 2 if timeout_s is None else timeout_s)
        with self._lock:
            failures, first = self._unreported_failures, self._first_failure
            self._unreported_failures, self._first_failure = 0, ""
        if failures:
            raise ProduceError(f"{failures} records were not stored; the first one: {first}")
        if waiting:
            raise ProduceError(f"{waiting} records are still queued for {self._kafka.bootstrap}: call flush again, or produce them again")

    def statistics(self) -> dict[str, float]:
        """Counters since start: produced, delivered, failed; queued now."""
        with self._lock:
            return {**self._counters, "queued": len(self._producer)}

    def close(self) -> None:
        """Flushes and stops. Raises ProduceError like `flush`."""
        try:
            self.flush()
        finally:
            self._closing.set()
            self._thread.join()

    def _erase_many(
        self, users: npt.NDArray[np.uint64], events: npt.NDArray[np.void], append_time_ms: npt.NDArray[np.int64] | None
    ) -> None:
        for i, user_id in enumerate(users.tolist()):
            data = encode_erase(user_id=user_id, event_id=int(events["event_id"][i]), reason="replayed from a log")
            headers = None if append_time_ms is None else [(APPEND_TIME_HEADER, b"%d" % append_time_ms[i])]
            self._queue(user_key(user_id), data, self._on_counted, headers)

    def _send(self, key: bytes, value: bytes, stored: Callable[[Position, int], T]) -> Future[T]:
        """`stored` makes the future's result of the position and the append time."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # a record that is on its way cannot be called back

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            self._on_counted(error, message)
            if error is not None:
                future.set_exception(ProduceError(unavailable(self._kafka, error)))
                return
            try:
                stamp_ms = message.timestamp()[1]
                future.set_result(stored(self._position(message), stamp_ms if stamp_ms > 0 else time.time_ns() // 1_000_000))
            except Exception as failure:  # what a callback raises ends the thread that serves all of them
                future.set_exception(failure)

        self._queue(key, value, on_delivery, None)
        return future

    def _queue(self, key: bytes, value: bytes, on_delivery: Callable[[KafkaError | None, Message], None], headers: Any) -> None:
        deadline_s = None
        while True:
            try:
                self._producer.produce(self._topic, value, key, on_delivery=on_delivery, headers=headers)
            except BufferError:
                now_s = time.monotonic()
                deadline_s = now_s + self._timeout_s if deadline_s is None else deadline_s
                if now_s > deadline_s:
                    raise ProduceError(f"the queue for {self._kafka.bootstrap} is full: the broker takes nothing, is it running?") from None
                self._producer.poll(_POLL_S)
            except KafkaException as error:
                raise ProduceError(unavailable(self._kafka, error.args[0])) from error
            else:
                with self._lock:
                    self._counters["produced"] += 1
                return

    def _position(self, message: Message) -> Position:
        """Where a stored record is. Raises ProduceError: nobody says."""
        offset = message.offset()
        if offset is None:  # the broker recognised a retry and no longer knew where it had put it: anything up to the end includes it
            try:
                offset = end_offsets(self._kafka, self._topic, [message.partition()])[message.partition()] - 1
            except Exception as failure:
                raise ProduceError(f"the record is stored, but not known where: {failure}") from failure
        return Position(self.log_identity.epoch, message.partition(), offset)

    def _on_counted(self, error: KafkaError | None, _: Message) -> None:
        with self._lock:
            if error is None:
                self._counters["delivered"] += 1
                return
            self._counters["failed"] += 1
            self._unreported_failures += 1
            self._first_failure = self._first_failure or unavailable(self._kafka, error)

    def _serve(self) -> None:
        """Serves delivery reports until closed."""
        while not self._closing.is_set():
            self._producer.poll(_POLL_S)


def _number(field: str, given: str | int, known: Mapping[str, int]) -> int:
    if isinstance(given, str) and given in known:
        return known[given]
    if isinstance(given, int) and given in known.values():
        return given
    allowed = ", ".join(f"{name} ({number})" for name, number in known.items()) or "none is defined"
    raise ValueError(f"{field}: {given!r} is not in the domain file; allowed: {allowed}")


def _check_events(events: npt.NDArray[np.void], append_time_ms: int | npt.NDArray[np.int64], future_tolerance_ms: int) -> None:
    """What the worker would bury. `append_time_ms`: int64 [n], or one for all."""
    ahead = events["event_time_ms"] - future_tolerance_ms > append_time_ms
    for field, bad, allowed in (
        ("action", events["action"] == 0, "1 to 255"),
        ("entity_kind", events["entity_kind"] == 0, "1 to 255"),
        ("event_time_ms", events["event_time_ms"] <= 0, "above 0"),
        ("event_time_ms", ahead, f"up to {future_tolerance_ms} ms ahead of its append time (now, where none is given)"),
        ("value", np.isinf(events["value"]), "finite, or NaN for none"),
    ):
        rows = np.flatnonzero(bad)
        if len(rows):
            raise ValueError(f"{field}: row {rows[0]} has {events[field][rows[0]]}; allowed: {allowed}")

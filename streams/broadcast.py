"""Announcements: what every process must learn. Each reads all of a small compacted topic, outside of any consumer group."""

import logging
import threading
from collections.abc import Callable

from streams.errors import KafkaUnavailableError, ProduceError
from streams.kafka import OFFSET_BEGINNING, KafkaConfig, KafkaError, TopicPartition, log_identity, new_producer, new_reader, unavailable

log = logging.getLogger(__name__)

_POLL_S = 0.2


def announce(kafka: KafkaConfig, topic: str, key: str, value: bytes | None, *, timeout_s: float = 10.0) -> None:
    """Sets the current value of a key for everybody; None withdraws it.

    Raises:
        ProduceError: the broker did not store it within `timeout_s`.
    """
    failures: list[str] = []
    producer = new_producer(kafka, "announce", message_timeout_ms=int(timeout_s * 1000), linger_ms=0)
    producer.produce(topic, value, key.encode(), on_delivery=lambda error, _: failures.append(unavailable(kafka, error)) if error else None)
    if producer.flush(timeout_s + 1.0):
        failures.append(f"no acknowledgement within {timeout_s} s")
    if failures:
        raise ProduceError(f"announcement {key}: {failures[0]}")


class Announcements:
    """The current value of every key of the topic, kept current by a thread.

    An announcement that `on_change` raises for is logged and counted, and the next one is read: one bad record must not cut a process off.
    """

    def __init__(
        self,
        kafka: KafkaConfig,
        topic: str,
        *,
        on_change: Callable[[str, bytes | None], None] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        """Returns when everything announced so far was read. `on_change` is called for it and for each change, in the reader's thread.

        Raises:
            KafkaUnavailableError: the topic could not be read to its end within `timeout_s`.
            TopicError: there is no such topic.
        """
        self._kafka, self._topic, self._on_change = kafka, topic, on_change
        self._values: dict[str, bytes] = {}
        self._counters = dict.fromkeys(("read", "failed"), 0)
        self._lock = threading.Lock()
        self._current = threading.Event()
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        partitions = range(log_identity(kafka, topic, timeout_s=timeout_s).partition_count)
        self._consumer = new_reader(kafka, "announcements", enable_partition_eof=True)
        self._consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        self._missing = set(partitions)
        self._thread = threading.Thread(target=self._run, name="announcements", daemon=True)
        self._thread.start()
        if not self._current.wait(timeout_s) or self._failure is not None:
            self.close()
            raise KafkaUnavailableError(f"topic {topic}: not read to its end within {timeout_s} s: {self._failure or 'no answer'}")

    def values(self) -> dict[str, bytes]:
        """The current value of each key."""
        with self._lock:
            return dict(self._values)

    def statistics(self) -> dict[str, float]:
        """Counters since start: announcements read, and those of them that `on_change` raised for."""
        with self._lock:
            return dict(self._counters)

    def check(self) -> None:
        """Raises what ended the reader, where it ended: a health check calls this."""
        if self._failure is not None:
            raise KafkaUnavailableError(f"topic {self._topic}: announcements are no longer read") from self._failure

    def close(self) -> None:
        """Stops reading."""
        self._closing.set()
        self._thread.join()
        self._consumer.close()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                if not self._missing:
                    self._current.set()
                self._step()
        except Exception as error:
            log.exception("announcements of topic %s are no longer read", self._topic)
            self._failure = error
            self._current.set()

    def _step(self) -> None:
        message = self._consumer.poll(_POLL_S)
        if message is None:
            return
        error = message.error()
        if error and error.code() == KafkaError._PARTITION_EOF:
            # The end is reported, not computed: compaction may have removed the last records before it.
            self._missing.discard(message.partition())
            return
        if error:
            if error.retriable():
                return
            raise KafkaUnavailableError(unavailable(self._kafka, error))
        key, value = (message.key() or b"").decode(errors="replace"), message.value()
        with self._lock:
            self._counters["read"] += 1
            if value is None:
                self._values.pop(key, None)
            else:
                self._values[key] = value
        if self._on_change is not None:
            try:
                self._on_change(key, value)
            except Exception:
                log.exception("topic %s: announcement %r cannot be used", self._topic, key)
                with self._lock:
                    self._counters["failed"] += 1

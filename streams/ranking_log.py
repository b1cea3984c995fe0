"""The ranking log's writing end: implements `features.ports.RankingSink`.

It never delays an answer: its queue is bounded, and what does not fit is dropped and counted.
"""

import logging
import threading

from features.ids import user_key
from streams.kafka import KafkaConfig, KafkaError, KafkaException, Message, new_producer

log = logging.getLogger(__name__)

_POLL_S = 0.1
_LINGER_MS = 100
"""Nobody waits for a record, and a produce request for each of them costs the server and the broker a few per cent of a ranking's CPU."""


class RankingLog:
    """Queues records for the rankings topic, keyed like the actions topic; a thread of its own serves delivery reports."""

    def __init__(self, kafka: KafkaConfig, topic: str, *, queue_max: int = 20_000, close_timeout_s: float = 5.0) -> None:
        """Connects in the background: an absent broker costs records, which are counted, not answers."""
        self._topic, self._close_timeout_s = topic, close_timeout_s
        self._counters = dict.fromkeys(("sent", "dropped", "failed"), 0)
        self._lock = threading.Lock()
        self._producer = new_producer(
            kafka,
            "ranking-log",
            linger_ms=_LINGER_MS,
            queue_buffering_max_messages=queue_max,
            queue_buffering_max_kbytes=256 << 10,
            message_timeout_ms=60_000,
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="ranking-log-poll", daemon=True)
        self._thread.start()

    def put(self, user_id: int, record: bytes) -> bool:
        """See `RankingSink.put`."""
        try:
            self._producer.produce(self._topic, record, user_key(user_id), on_delivery=self._on_delivery)
        except (BufferError, KafkaException) as error:
            self._count("dropped")
            log.debug("ranking record dropped: %s", error)
            return False
        return True

    def statistics(self) -> dict[str, float]:
        """See `RankingSink.statistics`; queued: records whose acknowledgement has not been read yet."""
        with self._lock:
            return {**self._counters, "queued": len(self._producer)}

    def close(self) -> None:
        """See `RankingSink.close`; what is still queued after the time-out counts as failed."""
        left = self._producer.flush(self._close_timeout_s)
        self._closing.set()
        self._thread.join()
        if left:
            self._producer.purge()
            self._producer.flush(1.0)
            log.warning("ranking log: %d records were not acknowledged before closing", left)

    def _serve(self) -> None:
        while not self._closing.wait(_POLL_S):  # the reports of a while together: each that wakes a thread takes the interpreter's lock
            self._producer.poll(0)

    def _on_delivery(self, error: KafkaError | None, _: Message) -> None:
        self._count("sent" if error is None else "failed")

    def _count(self, name: str) -> None:
        with self._lock:
            self._counters[name] += 1

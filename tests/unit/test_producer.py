"""What the producer decides without a broker."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from confluent_kafka import Message
from streams_world import DOMAIN

from features.actions import EVENT_DTYPE
from features.ports import Position
from streams import broadcast
from streams.errors import KafkaUnavailableError, ProduceError
from streams.kafka import KafkaConfig, KafkaError
from streams.producer import ActionProducer, _check_events, _number
from streams.ranking_log import RankingLog

NOWHERE = KafkaConfig("127.0.0.1:1", {"log_level": "0"})


def test_names_and_numbers_of_the_domain_are_taken():
    assert _number("entity_kind", "product", DOMAIN.entities) == 2
    assert _number("entity_kind", 1, DOMAIN.entities) == 1


@pytest.mark.parametrize("given", ["shoe", 3, 0])
def test_others_are_refused_with_what_is_allowed(given):
    with pytest.raises(ValueError, match=rf"entity_kind: {given!r} is not in the domain file; allowed: item \(1\), product \(2\)"):
        _number("entity_kind", given, DOMAIN.entities)


@pytest.mark.parametrize(
    ("field", "bad"),
    [("action", 0), ("entity_kind", 0), ("event_time_ms", 0), ("event_time_ms", -5), ("event_time_ms", 111), ("value", np.inf)],
)
def test_a_bad_row_of_many_is_named(field, bad):
    events = np.zeros(3, EVENT_DTYPE)
    events["action"] = events["entity_kind"] = 1
    events["event_time_ms"] = 110
    _check_events(events, 100, 10)
    events[field][1] = bad
    for append_time_ms in (100, np.array([110, 100, 100])):
        with pytest.raises(ValueError, match=f"{field}: row 1 has"):
            _check_events(events, append_time_ms, 10)


@pytest.fixture
def unconnected():
    """A producer without a broker, and the delivery callbacks of what it queued."""
    producer, callbacks = object.__new__(ActionProducer), []
    producer._kafka, producer._domain, producer._topic, producer._lock = NOWHERE, DOMAIN, "actions", threading.Lock()
    producer._counters, producer._unreported_failures, producer._first_failure = dict.fromkeys(("delivered", "failed"), 0), 0, ""
    producer._queue = lambda *queued: callbacks.append(queued[2])
    return producer, callbacks


def test_a_certain_dead_letter_is_not_produced(unconnected):
    producer, queued = unconnected
    now_ms = time.time_ns() // 1_000_000
    click = {"user_id": 1, "entity_kind": "item", "entity_id": 1, "action": "click"}
    with pytest.raises(ValueError, match=r"^event_time_ms: \d+ is more than 600000 ms ahead of now"):
        producer.produce(**click, event_time_ms=now_ms + 700_000)
    events = np.zeros(1, EVENT_DTYPE)
    events["action"] = events["entity_kind"] = 1
    events["event_time_ms"] = now_ms + 700_000
    with pytest.raises(ValueError, match=r"^event_time_ms: row 0 has"):
        producer.produce_many(np.ones(1, np.uint64), events)
    with pytest.raises(ValueError, match=r"^event_time_ms: row 0 has"):
        producer.produce_many(np.ones(1, np.uint64), events, np.array([now_ms]))
    assert queued == []
    producer.produce(**click, event_time_ms=now_ms + 500_000)
    assert len(queued) == 1


def test_a_position_that_cannot_be_read_fails_its_future(unconnected, monkeypatch):
    producer, queued = unconnected

    def absent(*_):
        raise KafkaUnavailableError("gone")

    monkeypatch.setattr("streams.producer.end_offsets", absent)
    future = producer.erase(7, "asked for")
    queued[0](None, Message(topic="actions", partition=0, offset=-1001))
    with pytest.raises(ProduceError, match="the record is stored, but not known where: gone"):
        future.result(timeout=0)


def test_a_stored_record_whose_offset_nobody_says_is_before_the_end(unconnected, monkeypatch):
    producer, queued = unconnected
    producer.log_identity = SimpleNamespace(epoch=5)
    monkeypatch.setattr("streams.producer.end_offsets", lambda *asked: {asked[2][0]: 12})
    future = producer.erase(7, "asked for")
    queued[0](None, Message(topic="actions", partition=3, offset=-1001))
    assert future.result(timeout=0) == Position(5, 3, 11)


def test_a_caller_who_gives_up_and_a_report_that_cannot_be_read_end_no_callback(unconnected):
    """What a callback raises would end the thread that serves the reports of all records."""
    producer, queued = unconnected
    producer.log_identity = SimpleNamespace(epoch=5)
    given_up, unread = producer.erase(7, "asked for"), producer.erase(8, "asked for")
    assert not given_up.cancel(), "the record is on its way"
    queued[0](None, Message(topic="actions", partition=3, offset=9))
    assert given_up.result(timeout=0) == Position(5, 3, 9)
    queued[1](None, SimpleNamespace())
    with pytest.raises(AttributeError):
        unread.result(timeout=0)


class _Topic:
    """A consumer of given announcements of one partition, then of its end."""

    def __init__(self, records):
        self._left = [self._message(None, *record) for record in records]
        self._left.append(self._message(SimpleNamespace(code=lambda: KafkaError._PARTITION_EOF), None, None))

    def _message(self, error, key, value):
        return SimpleNamespace(error=lambda: error, key=lambda: key, value=lambda: value, partition=lambda: 0)

    def assign(self, places):
        assert [place.partition for place in places] == [0]

    def poll(self, _):
        return self._left.pop(0) if self._left else None

    def close(self):
        pass


def test_announcements_survive_one_that_cannot_be_used(monkeypatch, caplog):
    monkeypatch.setattr(broadcast, "log_identity", lambda *_, **__: SimpleNamespace(partition_count=1))
    monkeypatch.setattr(broadcast, "new_reader", lambda *_, **__: _Topic([(b"release/home", b"\xff"), (b"release/home", b"good")]))
    heard = []
    found = broadcast.Announcements(NOWHERE, "told", on_change=lambda key, value: heard.append((key, value.decode())))
    found.check()
    assert heard == [("release/home", "good")]
    assert found.values() == {"release/home": b"good"}
    assert found.statistics() == {"read": 2, "failed": 1}
    assert "announcement 'release/home' cannot be used" in caplog.text
    found.close()


def test_an_absent_broker_is_an_error_that_says_what_to_do():
    with pytest.raises(KafkaUnavailableError, match=r"Kafka at 127\.0\.0\.1:1 does not answer.*is it running"):
        ActionProducer(NOWHERE, DOMAIN, "actions", timeout_s=0.1)


def test_the_ranking_log_drops_and_counts_instead_of_waiting():
    sink = RankingLog(NOWHERE, "rankings", queue_max=2, close_timeout_s=0.01)
    assert [sink.put(7, b"record") for _ in range(4)] == [True, True, False, False]
    found = sink.statistics()
    assert found.pop("queued") >= 2, "librdkafka counts its own events, such as an absent broker, too"
    assert found == {"sent": 0, "dropped": 2, "failed": 0}
    sink.close()
    assert sink.statistics() == {"sent": 0, "dropped": 2, "failed": 2, "queued": 0}


def test_produce_errors_are_stream_errors():
    assert issubclass(ProduceError, RuntimeError)

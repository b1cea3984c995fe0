"""What the producer decides without a broker."""

import numpy as np
import pytest
from streams_world import DOMAIN

from features.actions import EVENT_DTYPE
from streams.errors import KafkaUnavailableError, ProduceError
from streams.kafka import KafkaConfig
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
    ("field", "bad"), [("action", 0), ("entity_kind", 0), ("event_time_ms", 0), ("event_time_ms", -5), ("value", np.inf)]
)
def test_a_bad_row_of_many_is_named(field, bad):
    events = np.zeros(3, EVENT_DTYPE)
    events["action"] = events["entity_kind"] = events["event_time_ms"] = 1
    _check_events(events)
    events[field][1] = bad
    with pytest.raises(ValueError, match=f"{field}: row 1 has"):
        _check_events(events)


def test_an_absent_broker_is_an_error_that_says_what_to_do():
    with pytest.raises(KafkaUnavailableError, match=r"Kafka at 127\.0\.0\.1:1 does not answer.*is it running"):
        ActionProducer(NOWHERE, DOMAIN, "actions", timeout_s=0.1)


def test_the_ranking_log_drops_and_counts_instead_of_waiting():
    sink = RankingLog(NOWHERE, "rankings", queue_max=2, close_timeout_s=0.01)
    assert [sink.put(7, b"record") for _ in range(4)] == [True, True, False, False]
    assert sink.statistics() == {"sent": 0, "dropped": 2, "failed": 0, "queued": 2}
    sink.close()
    assert sink.statistics() == {"sent": 0, "dropped": 2, "failed": 2, "queued": 0}


def test_produce_errors_are_stream_errors():
    assert issubclass(ProduceError, RuntimeError)

"""Messages as columns: what came of each partition, in its order, and the errors apart."""

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, KafkaError, Message

from streams.kafka import by_partition, records_of

HEADERS = [("freshrank-append-time-ms", b"5")]


def message(partition, offset, headers=None, error=None):
    stamp = (TIMESTAMP_LOG_APPEND_TIME, 1_000 + offset)
    return Message("actions", partition, offset, b"key", b"value-%d" % offset, headers, error, stamp)


def test_messages_are_told_apart_by_partition_and_errors_by_themselves():
    error = KafkaError(KafkaError._ALL_BROKERS_DOWN)
    came = [message(1, 5), message(0, 7), message(0, 8), message(1, 0, error=error), message(1, 6), message(2, 1)]
    found, errors = by_partition(came)
    assert {partition: [m.offset() for m in own] for partition, own in found.items()} == {1: [5, 6], 0: [7, 8], 2: [1]}
    assert errors == [came[3]]
    assert by_partition([]) == ({}, [])


def test_columns_hold_what_the_messages_say():
    records = records_of([message(0, 5), message(0, 6, HEADERS), message(0, 9)])
    assert records.offsets.tolist() == [5, 6, 9]
    assert records.broker_times_ms.tolist() == [1_005, 1_006, 1_009]
    assert records.keys == [b"key"] * 3
    assert records.values == [b"value-5", b"value-6", b"value-9"]
    assert records.headers == {1: HEADERS}
    assert records.leader_epoch == -1
    assert not records_of([message(0, 5)]).headers

"""What the batch loop does when the broker no longer has what it is read from."""

from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError

from streams.batch_loop import BatchLoop
from streams.errors import KafkaUnavailableError
from streams.view import FencedError


class Core:
    """Holds partition 1; a reopening of it is fenced."""

    def __init__(self):
        self.open, self.reopened = {1: SimpleNamespace(next_offset=5)}, []

    def held(self):
        return self.open

    def reopen(self, partition):
        self.reopened.append(partition)
        del self.open[partition]
        raise FencedError("taken over")


def told(loop, code, partition):
    loop._handle(SimpleNamespace(), SimpleNamespace(error=lambda: KafkaError(code), partition=lambda: partition))


def test_a_partition_that_is_being_opened_is_left_to_its_opening():
    loop = BatchLoop.__new__(BatchLoop)
    loop.core, loop._config, loop._first_and_next = Core(), SimpleNamespace(kafka=SimpleNamespace(bootstrap="b")), lambda _: (9, 20)
    told(loop, KafkaError._AUTO_OFFSET_RESET, 1)
    assert loop.core.reopened == [1]
    told(loop, KafkaError._AUTO_OFFSET_RESET, 1)  # fenced: it is opened again when the group says so, and then sought
    told(loop, KafkaError._AUTO_OFFSET_RESET, 2)
    assert loop.core.reopened == [1]
    with pytest.raises(KafkaUnavailableError):
        told(loop, KafkaError.TOPIC_AUTHORIZATION_FAILED, 1)

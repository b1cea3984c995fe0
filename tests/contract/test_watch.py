"""Watches of a reader service: their bound, their refusals, and that they end with the service. Changes are in
tests/integration/test_sequences_anywhere.py, where a worker makes them."""

from contextlib import ExitStack

import grpc
import pytest
from readers_world import DOMAIN, PARTITIONS, USERS, OracleReader, batches, build_view, serving

from deploy.door import Doorkeeper
from deploy.guard import Tokens
from features.ports import Door, SequenceUnavailableError
from protos.v1.sequence_pb2 import WatchRequest
from protos.v1.sequence_pb2_grpc import SequenceReaderStub
from streams.reader_service import ReaderConfig
from streams.remote_reader import RemoteReader


def test_a_watch_begins_with_the_present_row_and_ends_with_the_service(tmp_path):
    build_view(tmp_path, batches(1))
    with ExitStack() as stack:
        service = stack.enter_context(ExitStack())
        address = service.enter_context(serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS)))
        reader = RemoteReader(address, DOMAIN)
        stack.callback(reader.close)
        watches = [reader.watch(sequence, USERS[0]) for sequence in ("main", "clicks")]
        assert [next(watch) for watch in watches] == [OracleReader(batches(1)).read(name, USERS[:1])[0] for name in ("main", "clicks")]
        service.close()
        assert [list(watch) for watch in watches] == [[], []], "an end, not an error"


def test_more_watches_than_allowed_are_refused_and_one_that_ends_makes_room(tmp_path):
    build_view(tmp_path, batches(1))
    with serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS, watches_max=2)) as address:
        reader = RemoteReader(address, DOMAIN, timeout_s=30.0)
        watches = [reader.watch("main", user) for user in USERS[:2]]
        for watch in watches:
            next(watch)
        with pytest.raises(SequenceUnavailableError, match="RESOURCE_EXHAUSTED: 2 watches are open"):
            next(reader.watch("main", USERS[2]))
        assert len(reader.read("main", USERS)) == len(USERS), "reads go on"
        watches[0].close()
        room = False
        while not room:  # the service learns of the end in a moment
            try:
                room = next(reader.watch("main", USERS[2])).user_id == USERS[2]
            except SequenceUnavailableError:
                continue
        watches[1].close()
        reader.close()


def test_what_cannot_be_watched_is_said(tmp_path):
    with serving(ReaderConfig(DOMAIN, tmp_path, PARTITIONS, door=Door((Doorkeeper(Tokens("right"), 9),)))) as address:
        reader = RemoteReader(address, DOMAIN, token="right")
        with pytest.raises(KeyError):
            next(reader.watch("nope", 1))
        with pytest.raises(SequenceUnavailableError, match="is the worker running"):
            next(reader.watch("main", 1))
        reader.close()
        nobody = RemoteReader(address, DOMAIN)
        with pytest.raises(SequenceUnavailableError, match="UNAUTHENTICATED"):
            next(nobody.watch("main", 1))
        nobody.close()
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            next(SequenceReaderStub(channel).Watch(WatchRequest(sequence="x"), metadata=(("authorization", "Bearer right"),), timeout=30))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "allowed: clicks, main" in refused.value.details()

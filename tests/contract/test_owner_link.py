"""The link to one announced address, where the address is given up while somebody waits for its answer."""

import asyncio

import grpc
import grpc.aio
import pytest
from readers_world import DOMAIN

from features.ports import SequenceUnavailableError
from features.sequence import definition
from protos.v1 import sequence_pb2_grpc
from streams.owner_link import OwnerLink


class Silent(sequence_pb2_grpc.SequenceReaderServicer):
    """Never answers; `asked` says that it was asked."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def GetSequences(self, _request, _context):  # noqa: N802
        self.asked.set()
        await asyncio.Event().wait()


def with_waiting(scenario) -> None:
    async def run() -> None:
        server, silent = grpc.aio.server(), Silent()
        sequence_pb2_grpc.add_SequenceReaderServicer_to_server(silent, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        link = OwnerLink(f"127.0.0.1:{port}")
        waiting = asyncio.create_task(link.read("main", [1], definition(DOMAIN, "main").fingerprint, timeout_s=60.0))
        await silent.asked.wait()
        await scenario(link, waiting)
        await server.stop(None)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_who_waits_at_an_address_that_is_given_up_is_told_so_and_goes_on():
    async def scenario(link, waiting) -> None:
        await link.close()
        with pytest.raises(SequenceUnavailableError, match="no longer announced"):
            await waiting
        with pytest.raises(SequenceUnavailableError):
            await link.read("main", [1], 0, timeout_s=1.0)

    with_waiting(scenario)


def test_a_caller_who_goes_away_is_not_taken_for_that():
    async def scenario(link, waiting) -> None:
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert link.breaker.admits()
        await link.close()

    with_waiting(scenario)

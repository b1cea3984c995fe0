"""The asyncio client of the ranking service: the same calls, retries and typed answers as `inference.client.RankingClient`."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from features.ids import U64
from inference.client import Connections, Ranking, RequestFields, channel_credentials, rank_request, typed
from protos.v1.ranking_pb2 import Explanation, RankRequest, RankResponse
from protos.v1.ranking_pb2_grpc import RankingStub


class AsyncRankingClient(Connections):
    """Connections to the ranking servers at one address, for one event loop: make it there; close it, or use it in `async with`.

    Cancelling a call's task cancels the call in the server. Arguments and errors are those of `RankingClient`.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 1.0,
        root_certificate: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        token: str | None = None,
        channels: int = 1,
        throttled: bool = True,
    ) -> None:
        super().__init__(address, timeout_s, channel_credentials(root_certificate, certificate, key), token, channels, throttled)
        if self._credentials is None:
            self._channels = [grpc.aio.insecure_channel(address, options) for options in self._options]
        else:
            self._channels = [grpc.aio.secure_channel(address, self._credentials, options) for options in self._options]
        self._stubs = [RankingStub(channel) for channel in self._channels]

    async def rank(
        self,
        ranker: str,
        user_id: int,
        candidates: Sequence[int] | U64,
        *,
        timeout_s: float | None = None,
        traceparent: str = "",
        **fields: Unpack[RequestFields],
    ) -> Ranking:
        """See `RankingClient.rank`."""
        return typed(await self.call(rank_request(ranker, user_id, candidates, **fields), timeout_s=timeout_s, traceparent=traceparent))

    async def call(
        self, request: RankRequest, *, timeout_s: float | None = None, traceparent: str = "", token: str | None = None
    ) -> RankResponse:
        """See `RankingClient.call`."""
        response: RankResponse = await self._call("Rank", request, timeout_s, traceparent, token)
        return response

    async def explain(
        self, request: RankRequest, *, timeout_s: float | None = None, traceparent: str = "", token: str | None = None
    ) -> Explanation:
        """See `RankingClient.explain`; the other arguments as for `call`."""
        explanation: Explanation = await self._call("Explain", request, timeout_s, traceparent, token)
        return explanation

    async def _call(self, method: str, request: RankRequest, timeout_s: float | None, traceparent: str, token: str | None) -> Any:
        attempts = self._attempts(timeout_s, traceparent, token)
        self.before_call()
        try:
            while True:
                try:
                    response = await getattr(self._stubs[next(self._turns)], method)(request, **attempts.options())
                except grpc.aio.AioRpcError as error:
                    await asyncio.sleep(attempts.failed(error))
                else:
                    attempts.was_shed = False
                    return response
        finally:
            self.after_call(attempts)

    async def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

"""The gRPC sequence reader: the local view, for programs in other languages or on other machines. A process of its own.

Every part is bounded: users, bytes and calls at once by the limits here, the health check by looking at one partition at a time.
`streams/remote_reader.py` is the client.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from features.domain import Domain
from features.ports import OPEN_DOOR, Door, Position, Reading, SequenceCorruptError, SequenceReader, SequenceUnavailableError
from features.sequence import row_bytes_max
from protos.v1 import sequence_pb2, sequence_pb2_grpc
from protos.v1.actions_pb2 import Position as WirePosition
from streams.erasure_service import SERVICE as ERASURE_SERVICE
from streams.erasure_service import ErasureServiceConfig, add_erasure
from streams.errors import StreamError
from streams.reader_metrics import Calls, ReaderMetrics
from streams.view_reader import ViewReader
from streams.waiting import wait_for_positions
from streams.watching import Watches, WatchesFullError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

USERS_MAX = 1_000
ANSWER_BYTES_MAX = 16 << 20
"""Limits of one call. Both ends know them, so that a client cuts what it asks for and never meets the transport's own limit."""

_REQUEST_BYTES_MAX = 16 << 10
_UNSENT_CALLS_MAX = 4_096
"""Beside the calls that count: calls whose request is still on its way. Beyond, gRPC refuses by itself, and nobody counts it."""
_READING_BYTES_MAX = 80  # what stands around a row in the answer
_WAIT_RESERVE_S = 0.02
"""Of the caller's deadline, for the answer behind a wait."""
UNREADABLE = ("freshrank-state", "unavailable")
"""Trailing metadata of UNAVAILABLE where the service is well, and only this state cannot be read here: others of it can."""
_STOP_GRACE_S = 2.0
_HEALTH_PERIOD_S = 0.5
_SERVICE = "freshrank.v1.SequenceReader"


@dataclass(frozen=True)
class ReaderConfig:
    """Everything that the reader service needs. `port` 0: a free one. `reflection`: for grpcurl and the like in a local profile.

    What lets calls in is `door`: TLS, who may call, limits of the transport (`deploy/door.py`). More than `calls_max` calls at once are
    refused with RESOURCE_EXHAUSTED. `web` serves pages of the process in its event loop, given what makes the text of the metrics and what
    says whether the views can be read; it gives the pages' address (`deploy/server_pages.py`).
    """

    domain: Domain
    view_folder: Path
    partition_count: int
    host: str = "127.0.0.1"
    port: int = 0
    door: Door = OPEN_DOOR
    calls_max: int = 256
    watches_max: int = 64
    """Of them, calls of Watch, which last."""
    wait_s_max: float = 10.0
    """Longest wait of a call for positions."""
    reflection: bool = False
    erasure: ErasureServiceConfig | None = None
    """Also serve freshrank.v1.Erasure."""
    web: Callable[[Callable[[], bytes], Callable[[], bool]], AbstractAsyncContextManager[str]] | None = None
    log_level: str = "INFO"


class ReaderServicer(sequence_pb2_grpc.SequenceReaderServicer):  # type: ignore[misc]
    """Answers from any `SequenceReader` that does not wait."""

    def __init__(self, domain: Domain, reader: SequenceReader, *, watches_max: int = 64, wait_s_max: float = 10.0) -> None:
        self._users_max = {name: users_max(domain, name) for name in sorted(domain.sequence)}
        self._reader = reader
        self._wait_s_max = wait_s_max
        self.watches = Watches(reader, watches_max)

    async def GetSequences(  # noqa: N802
        self, request: sequence_pb2.GetSequencesRequest, context: grpc.aio.ServicerContext
    ) -> sequence_pb2.GetSequencesResponse:
        """See protos/v1/sequence.proto."""
        await self._check_sequence(request.sequence, context)
        most = self._users_max[request.sequence]
        if len(request.user_ids) % 8 or not 0 < len(request.user_ids) <= 8 * most:
            message = f"user_ids: {len(request.user_ids)} bytes are not 1 to {most} packed little-endian 64-bit integers"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        users = np.frombuffer(request.user_ids, "<u8").tolist()
        if request.after and request.wait_ms:
            await self._wait(request, users, context)
        readings = await _answer(context, lambda: self._reader.read(request.sequence, users))
        return sequence_pb2.GetSequencesResponse(sequences=map(_wire_reading, readings))

    async def GetPosition(  # noqa: N802
        self, request: sequence_pb2.GetPositionRequest, context: grpc.aio.ServicerContext
    ) -> WirePosition:
        """See protos/v1/sequence.proto."""
        return _wire_position(await _answer(context, lambda: self._reader.position(request.user_id)))

    async def Watch(  # noqa: N802
        self, request: sequence_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sequence_pb2.UserSequence]:
        """See protos/v1/sequence.proto."""
        await self._check_sequence(request.sequence, context)
        try:
            async with aclosing(self.watches.follow(request.sequence, request.user_id)) as readings:
                async for reading in readings:
                    yield _wire_reading(reading)
        except (SequenceUnavailableError, SequenceCorruptError, WatchesFullError) as error:
            await _refuse(context, error)

    async def _check_sequence(self, sequence: str, context: grpc.aio.ServicerContext) -> None:
        if sequence not in self._users_max:
            message = f"sequence: {sequence!r} is not defined; allowed: {', '.join(self._users_max)}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)

    async def _wait(self, request: sequence_pb2.GetSequencesRequest, users: list[int], context: grpc.aio.ServicerContext) -> None:
        """Waits for the positions of `after` within the bound and the caller's deadline."""
        left_s = context.time_remaining()
        wait_s = min(request.wait_ms / 1000, self._wait_s_max, self._wait_s_max if left_s is None else max(left_s - _WAIT_RESERVE_S, 0))
        after = [Position(at.log_epoch, at.partition, at.offset) for at in request.after]
        try:
            await wait_for_positions(self._reader, users, after, wait_s)
        except (SequenceUnavailableError, SequenceCorruptError) as error:
            await _refuse(context, error)


async def _answer(context: grpc.aio.ServicerContext, read: Callable[[], Answer]) -> Answer:
    try:
        return read()
    except (SequenceUnavailableError, SequenceCorruptError) as error:
        await _refuse(context, error)
    raise AssertionError("unreachable: abort raises")


async def _refuse(context: grpc.aio.ServicerContext, error: Exception) -> None:
    if isinstance(error, SequenceUnavailableError):
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error), (UNREADABLE,))
    if isinstance(error, WatchesFullError):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    log.error("a row cannot be trusted: %s", error)  # where it happened says nothing; the message names no user
    await context.abort(grpc.StatusCode.DATA_LOSS, str(error))


def users_max(domain: Domain, sequence: str) -> int:
    """Most users of one call: as many as fit an answer of ANSWER_BYTES_MAX with the longest rows, and at most USERS_MAX."""
    return min(USERS_MAX, ANSWER_BYTES_MAX // (row_bytes_max(domain.sequence[sequence].length) + _READING_BYTES_MAX))


def _wire_position(position: Position) -> WirePosition:
    return WirePosition(log_epoch=position.log_epoch, partition=position.partition, offset=position.offset)


def _wire_reading(reading: Reading) -> sequence_pb2.UserSequence:
    return sequence_pb2.UserSequence(
        user_id=reading.user_id,
        row=reading.row,
        watermark=_wire_position(reading.watermark),
        log_clock_ms=reading.log_clock_ms,
        state_age_ms=None if reading.state_age_ms < 0 else reading.state_age_ms,
    )


async def serve_reader(config: ReaderConfig, on_ready: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Serves until cancelled. `on_ready` gets the address (and `web`, that of the pages) once the port is open; health says SERVING once
    there is a view to read.

    Raises:
        StreamError: a port cannot be had.
    """
    credentials = config.door.credentials
    reader = ViewReader(config.view_folder, config.domain, config.partition_count)
    options = [*config.door.options, ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", _REQUEST_BYTES_MAX)]
    served = (_SERVICE,) if config.erasure is None else (_SERVICE, ERASURE_SERVICE)
    calls = Calls(config.calls_max, served)
    server = grpc.aio.server(
        interceptors=(calls, *config.door.interceptors), options=options, maximum_concurrent_rpcs=config.calls_max + _UNSENT_CALLS_MAX
    )
    servicer = ReaderServicer(config.domain, reader, watches_max=config.watches_max, wait_s_max=config.wait_s_max)
    sequence_pb2_grpc.add_SequenceReaderServicer_to_server(servicer, server)
    erasure = add_erasure(server, config.erasure) if config.erasure is not None else None
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if config.reflection:
        reflection.enable_server_reflection((*served, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
    address = f"{config.host}:{config.port}"
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise StreamError(f"{address}: the port cannot be opened: {error}") from error
    await server.start()
    metrics = ReaderMetrics(calls, config.door.statistics)
    # What is put on a stack last is closed first, and all of it, whatever fails; the pages come last: they say "not ready" until then.
    async with AsyncExitStack() as web, AsyncExitStack() as closing:
        closing.callback(reader.close)
        if erasure is not None:
            closing.push_async_callback(asyncio.to_thread, erasure.close)
        closing.push_async_callback(server.stop, _STOP_GRACE_S)
        closing.callback(servicer.watches.drain)
        closing.callback(setattr, metrics, "ready", False)
        details = {"address": f"{config.host}:{port}"}
        if config.web is not None:
            details["web"] = await _pages(web, config.web(metrics.exposition, lambda: metrics.ready))
        on_ready(details)
        await _report_health(reader, health, metrics, config.partition_count)


async def _pages(web: AsyncExitStack, pages: AbstractAsyncContextManager[str]) -> str:
    try:
        return await web.enter_async_context(pages)
    except OSError as error:
        raise StreamError(str(error)) from error


def run_reader(config: ReaderConfig, on_ready: Callable[[dict[str, Any]], None] = lambda _: None) -> int:
    """`serve_reader` until SIGTERM or SIGINT: returns 0, or 1 where it could not serve, after logging why."""
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def serve() -> int:
        serving = asyncio.ensure_future(serve_reader(config, on_ready))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
        try:
            await serving
        except asyncio.CancelledError:
            return 0
        except StreamError as error:
            log.critical("the reader stops: %s", error)
        return 1

    return asyncio.run(serve())


async def _report_health(reader: ViewReader, health: health_aio.HealthServicer, metrics: ReaderMetrics, partition_count: int) -> None:
    """SERVING while every partition has a view here that can be trusted; for ever."""
    corrupt = ""
    while True:
        whole, found = True, ""
        for partition in range(partition_count):
            try:
                reader.partition_position(partition)
            except SequenceUnavailableError:
                whole = False
            except SequenceCorruptError as error:
                whole, found = False, str(error)
            await asyncio.sleep(0)  # a read waits for one partition's check, not for all of them
        if found and found != corrupt:
            log.error("not serving: %s", found)
        corrupt, metrics.ready = found, whole
        state = health_pb2.HealthCheckResponse.SERVING if whole else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", _SERVICE):
            await health.set(name, state)
        await asyncio.sleep(_HEALTH_PERIOD_S)

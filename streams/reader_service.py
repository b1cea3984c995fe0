"""The gRPC sequence reader: the local view, for programs in other languages or on other machines. A process of its own."""

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from features.domain import Domain
from features.ports import SequenceCorruptError, SequenceReader, SequenceUnavailableError
from protos.v1 import sequence_pb2, sequence_pb2_grpc
from protos.v1.actions_pb2 import Position
from streams.errors import StreamError
from streams.view import ViewReader

log = logging.getLogger(__name__)

USERS_MAX = 1_000
_STOP_GRACE_S = 2.0
_HEALTH_PERIOD_S = 0.5
_SERVICE = "freshrank.v1.SequenceReader"


@dataclass(frozen=True)
class ReaderConfig:
    """Everything that the reader service needs. `port` 0: a free one. `reflection`: for grpcurl and the like in a local profile."""

    domain: Domain
    view_folder: Path
    partition_count: int
    host: str = "127.0.0.1"
    port: int = 0
    reflection: bool = False
    log_level: str = "INFO"


class ReaderServicer(sequence_pb2_grpc.SequenceReaderServicer):  # type: ignore[misc]
    """Answers GetSequences from any `SequenceReader`."""

    def __init__(self, domain: Domain, reader: SequenceReader) -> None:
        self._sequences = sorted(domain.sequence)
        self._reader = reader

    async def GetSequences(  # noqa: N802
        self, request: sequence_pb2.GetSequencesRequest, context: grpc.aio.ServicerContext
    ) -> sequence_pb2.GetSequencesResponse:
        """See protos/v1/sequence.proto."""
        if request.sequence not in self._sequences:
            message = f"sequence: {request.sequence!r} is not defined; allowed: {', '.join(self._sequences)}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        if len(request.user_ids) % 8 or not 0 < len(request.user_ids) <= 8 * USERS_MAX:
            message = f"user_ids: {len(request.user_ids)} bytes are not 1 to {USERS_MAX} packed little-endian 64-bit integers"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        users = np.frombuffer(request.user_ids, "<u8").tolist()
        try:
            readings = self._reader.read(request.sequence, users)
        except SequenceUnavailableError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except SequenceCorruptError as error:
            log.exception("a row cannot be trusted")
            await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        return sequence_pb2.GetSequencesResponse(
            sequences=[
                sequence_pb2.UserSequence(
                    user_id=reading.user_id,
                    row=reading.row,
                    watermark=Position(
                        log_epoch=reading.watermark.log_epoch, partition=reading.watermark.partition, offset=reading.watermark.offset
                    ),
                    log_clock_ms=reading.log_clock_ms,
                )
                for reading in readings
            ]
        )


async def serve_reader(config: ReaderConfig, on_ready: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Serves until cancelled. `on_ready` gets the address once the port is open; health says SERVING once there is a view to read.

    Raises:
        StreamError: the port cannot be had.
    """
    reader = ViewReader(config.view_folder, config.domain, config.partition_count)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    sequence_pb2_grpc.add_SequenceReaderServicer_to_server(ReaderServicer(config.domain, reader), server)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if config.reflection:
        reflection.enable_server_reflection((_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(f"{config.host}:{config.port}")
    except RuntimeError as error:
        raise StreamError(f"{config.host}:{config.port}: the port cannot be opened: {error}") from error
    await server.start()
    try:
        on_ready({"address": f"{config.host}:{port}"})
        await _report_health(reader, health, config.partition_count)
    finally:
        await server.stop(_STOP_GRACE_S)
        reader.close()


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


async def _report_health(reader: ViewReader, health: health_aio.HealthServicer, partition_count: int) -> None:
    """SERVING while every partition has a view here that can be trusted; for ever."""
    corrupt = ""
    while True:
        try:
            whole, found = len(reader.positions()) == partition_count, ""
        except SequenceCorruptError as error:
            whole, found = False, str(error)
        if found and found != corrupt:
            log.error("not serving: %s", found)
        corrupt = found
        state = health_pb2.HealthCheckResponse.SERVING if whole else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", _SERVICE):
            await health.set(name, state)
        await asyncio.sleep(_HEALTH_PERIOD_S)

"""The ranking service: read the sequence, join and pack, ask the model, order, log, answer.

Errors that a caller sees have a status from one table, `STATUS`. A model that does not answer is not an error but a lower tier.
"""

import asyncio
import hmac
import ipaddress
import logging
import secrets
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
import xxhash
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from features.actions import EVENT_DTYPE
from features.ids import user_key
from features.lineage import Lineage
from features.pack import Packed, RankInputs
from features.ports import Position, RankingSink, Reading, SequenceCorruptError, SequenceReader, SequenceUnavailableError
from features.request import RequestError, inputs_from_request
from features.sequence import decode_row
from inference.scoring import best_first, embedding_scores, final_scores, head_weights
from inference.served import Announce, Releases, Served
from inference.triton import ModelTimeoutError, TritonError, TritonModels
from protos.v1.actions_pb2 import Position as WirePosition
from protos.v1.ranking_pb2 import (
    TIER_CALLER_ORDER,
    TIER_EMBEDDING,
    TIER_MODEL,
    RankingRecord,
    RankRequest,
    RankResponse,
    Tier,
)

log = logging.getLogger(__name__)

SERVICE = "freshrank.v1.Ranking"
STAGES = ("wait_after", "read", "join_pack", "triton", "log", "total")
_NO_EVENTS = np.zeros(0, EVENT_DTYPE)
_POLL_S_MIN, _POLL_S_MAX = 0.001, 0.008


class UnauthenticatedError(RuntimeError):
    """The call does not carry the server's token."""


class OverloadedError(RuntimeError):
    """As many rankings as allowed are under way: shed at the door."""


class NotKeptError(ValueError):
    """The request looks back at a moment that the store no longer keeps, or at a state of another definition."""


STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotKeptError, grpc.StatusCode.FAILED_PRECONDITION),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SequenceUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (SequenceCorruptError, grpc.StatusCode.DATA_LOSS),
)
"""Error to gRPC status. Anything else is a bug: INTERNAL, with the traceback in the log."""


@dataclass(frozen=True)
class ServerConfig:
    """What the operator decides; `deploy` reads it from settings.

    A host that is not loopback needs a certificate and key (PEM), or insecure=True. timeout_s is the deadline of calls that state none, and
    deadline_s_max counts for calls that state a later one. A wait for `after` ends after after_wait_s_max at the latest, and before that
    when only after_reserve_s is left for ranking: a caller who asks for a position that never comes must not hold one of the rankings_max
    places. answer_reserve_s is kept for the answer while waiting for the model.
    inline_share is the share of users (by hash) whose row and tensors are in the ranking log.
    """

    releases: Path
    tables: Path
    repository: Path
    triton: str
    host: str = "127.0.0.1"
    port: int = 0
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    token: str | None = None
    reflection: bool = False
    timeout_s: float = 1.0
    deadline_s_max: float = 10.0
    after_wait_s_max: float = 2.0
    after_reserve_s: float = 0.25
    answer_reserve_s: float = 0.02
    model_timeout_s: float = 2.0
    model_threads: int = 2
    unload_delay_s: float = 10.0
    rankings_max: int = 64
    message_bytes_max: int = 4 << 20
    inline_share: float = 0.01
    drain_s: float = 5.0


class Timings:
    """Durations of one stage: count and percentiles of the newest."""

    def __init__(self) -> None:
        self.count = 0
        self._newest_ms: deque[float] = deque(maxlen=4096)

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self.count += 1
        self._newest_ms.append(seconds * 1e3)

    def percentiles(self) -> dict[str, float]:
        """p50, p99 and greatest of the newest 4,096, milliseconds; 0 before the first."""
        newest = np.array(self._newest_ms or [0.0])
        p50, p99 = np.percentile(newest, (50, 99))
        return {"p50": float(p50), "p99": float(p99), "max": float(newest.max())}


class RankingService:
    """Answers Rank calls. Everything that it needs is handed in; `clock_ms` only fills request_time_ms where the caller left it 0."""

    def __init__(
        self, config: ServerConfig, releases: Releases, reader: SequenceReader, sink: RankingSink, clock_ms: Callable[[], int] | None = None
    ) -> None:
        self._config, self._releases, self._reader, self._sink = config, releases, reader, sink
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self.lineage = Lineage()
        """Logs that led to the present one: positions of them are understood in `after`."""
        self._in_flight = 0
        self._counts: Counter[str] = Counter()
        self._timings = {stage: Timings() for stage in STAGES}

    async def rank(self, data: bytes, context: Any) -> RankResponse:
        """The Rank method: serialized RankRequest in, answer out, errors as a status."""
        left_s = context.time_remaining()
        deadline_s = time.monotonic() + (self._config.timeout_s if left_s is None else min(left_s, self._config.deadline_s_max))
        try:
            self._admit(context)
            self._in_flight += 1
            try:
                return await self._rank(data, deadline_s)
            finally:
                self._in_flight -= 1
        except Exception as error:
            code, message = self._status(error)
        await context.abort(code, message)
        raise AssertionError("unreachable: abort raises")

    def statistics(self) -> dict[str, float]:
        """Counters since start, percentiles of the stages in milliseconds, and those of the parts."""
        figures: dict[str, float] = {"in_flight": self._in_flight, **self._counts}
        for stage, timings in self._timings.items():
            figures |= {f"{stage}_ms_{name}": value for name, value in timings.percentiles().items()}
        for part, of in (("releases", self._releases), ("reader", self._reader), ("sink", self._sink)):
            figures |= {f"{part}_{name}": value for name, value in of.statistics().items()}
        return figures

    def _admit(self, context: Any) -> None:
        if self._config.token is not None:
            given = dict(context.invocation_metadata() or ()).get("authorization", "")
            if not hmac.compare_digest(str(given).encode(), f"Bearer {self._config.token}".encode()):
                raise UnauthenticatedError("authorization: this server needs its bearer token")
        if self._in_flight >= self._config.rankings_max:
            raise OverloadedError(f"{self._in_flight} rankings are under way: retry later, or at another server")

    def _status(self, error: Exception) -> tuple[grpc.StatusCode, str]:
        code = next((code for kind, code in STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
        self._counts[f"status_{code.name.lower()}"] += 1
        if code is grpc.StatusCode.INTERNAL:
            log.exception("a ranking failed: this is a bug")
            return code, f"internal error: {type(error).__name__}"
        if code is grpc.StatusCode.DATA_LOSS:
            log.error("state is damaged: %s", error)
        return code, str(error)

    async def _rank(self, data: bytes, deadline_s: float) -> RankResponse:
        started_s = time.monotonic()
        request = parse_request(data, self._config.message_bytes_max)
        if request.ranker not in self._releases.rankers:
            names = ", ".join(self._releases.rankers) or "none; publish a release"
            raise RequestError("ranker", f"{request.ranker!r} is not served; served: {names}")
        with self._releases.use(request.ranker) as served:
            request.request_id = request.request_id or secrets.randbits(64) or 1
            request.request_time_ms = request.request_time_ms or self._clock_ms()
            # Checked before anything is waited for or read; the events are put in when they are there.
            inputs = inputs_from_request(served.domain, request, _NO_EVENTS)
            weights = _weights(served, request)
            after_reached = await self._wait_for(request, deadline_s)
            reading, inputs = self._read(served, request, inputs)
            lap_s = time.monotonic()
            packed = served.packer.pack(inputs)
            self._timings["join_pack"].add(time.monotonic() - lap_s)
            tier, probability, scores = await self._score(served, packed, weights, deadline_s)
            self._count(inputs, packed, tier)
            response = _response(served, request, inputs, packed, reading, tier, probability, scores)
            response.after_reached = after_reached
            self._log(served, request, packed, reading, probability, scores, response)
        self._timings["total"].add(time.monotonic() - started_s)
        return response

    async def _wait_for(self, request: RankRequest, deadline_s: float) -> bool:
        """Waits until the user's state includes every position of `after`, after_wait_s_max at most, and leaves time to rank."""
        if not request.after:
            return True
        started_s = time.monotonic()
        left_s = deadline_s - started_s
        until_s = started_s + min(left_s - min(self._config.after_reserve_s, left_s / 2), self._config.after_wait_s_max)
        poll_s = _POLL_S_MIN
        while True:
            at = self._reader.position(request.user_id)
            wanted = max(_offset_of(i, position, at, self.lineage) for i, position in enumerate(request.after))
            reached = at.offset >= wanted
            if reached or time.monotonic() >= until_s:
                self._timings["wait_after"].add(time.monotonic() - started_s)
                self._counts["after_not_reached"] += not reached
                return reached
            await asyncio.sleep(min(poll_s, max(until_s - time.monotonic(), 0)))
            poll_s = min(2 * poll_s, _POLL_S_MAX)

    def _read(self, served: Served, request: RankRequest, inputs: RankInputs) -> tuple[Reading, RankInputs]:
        lap_s = time.monotonic()
        (reading,) = self._reader.read(served.ranker.sequence, [request.user_id])
        if served.late_ms_max is not None and request.request_time_ms < reading.log_clock_ms - served.late_ms_max:
            kept_ms = reading.log_clock_ms - served.late_ms_max
            raise NotKeptError(f"request_time_ms: {request.request_time_ms} is older than what the store keeps; not before {kept_ms}")
        if reading.row:
            row = decode_row(reading.row, request.user_id)
            if row.fingerprint != served.sequence_fingerprint:
                raise NotKeptError(
                    f"ranker: release {served.release.release_id} reads sequences of definition {served.sequence_fingerprint:016x}, "
                    f"the store keeps {row.fingerprint:016x}: publish a release for this state"
                )
            inputs = replace(inputs, events=row.events, erased_before_ms=row.erased_before_ms)
        self._timings["read"].add(time.monotonic() - lap_s)
        return reading, inputs

    async def _score(
        self, served: Served, packed: Packed, weights: npt.NDArray[np.float64], deadline_s: float
    ) -> tuple[int, npt.NDArray[np.float32] | None, npt.NDArray[np.float32]]:
        """(tier, probabilities [C, H] or None, final scores [C])."""
        lap_s = time.monotonic()
        timeout_s = min(deadline_s - lap_s - self._config.answer_reserve_s, self._config.model_timeout_s)
        try:
            if timeout_s <= 0:
                raise ModelTimeoutError("no time left to ask the model")
            probability = await served.gate.infer(packed.tensors, timeout_s=timeout_s)
        except TritonError as error:
            self._counts["model_timeouts" if isinstance(error, ModelTimeoutError) else "model_unavailable"] += 1
        else:
            self._timings["triton"].add(time.monotonic() - lap_s)
            return TIER_MODEL, probability, final_scores(probability, weights)
        if served.ranker.user_space is not None and not packed.missing_user:
            return TIER_EMBEDDING, None, embedding_scores(packed.tensors)
        return TIER_CALLER_ORDER, None, np.zeros(len(packed.tensors["candidate_embedding"]), np.float32)

    def _count(self, inputs: RankInputs, packed: Packed, tier: int) -> None:
        counts = self._counts
        counts["rankings"] += 1
        counts[Tier.Name(tier).lower()] += 1
        counts["cold_starts"] += not len(inputs.events)
        counts["candidates"] += len(inputs.candidate_ids)
        counts["missing_candidates"] += packed.missing_candidates
        counts["missing_sequence_items"] += packed.missing_sequence_items
        counts["missing_users"] += packed.missing_user
        counts["taken_down_candidates"] += packed.taken_down_candidates

    def _log(
        self,
        served: Served,
        request: RankRequest,
        packed: Packed,
        reading: Reading,
        probability: npt.NDArray[np.float32] | None,
        scores: npt.NDArray[np.float32],
        response: RankResponse,
    ) -> None:
        lap_s = time.monotonic()
        record = RankingRecord(
            request=request,
            release_id=served.release.release_id,
            generations=served.generations,
            watermark=[_wire(reading.watermark)],
            tier=response.tier,
            digest=served.packer.digest(packed.tensors),
            tensor_digests=served.packer.tensor_digests(packed.tensors),
            head_scores=_by_head(served, probability),
            scores=scores.tobytes(),
            inline=is_sampled(request.user_id, self._config.inline_share),
            served_time_ms=self._clock_ms(),
            sequence_fingerprint=served.sequence_fingerprint,
            row_digest=xxhash.xxh3_64_intdigest(reading.row),
            after_reached=response.after_reached,
        )
        if record.inline:
            record.inline_row = reading.row
            for name, value in packed.tensors.items():
                record.inline_tensors[name] = value.tobytes()
        self._counts["log_dropped"] += not self._sink.put(request.user_id, record.SerializeToString())
        self._timings["log"].add(time.monotonic() - lap_s)


def parse_request(data: bytes, bytes_max: int) -> RankRequest:
    """Reads a request. Raises RequestError: not a request, or larger than `bytes_max`, naming its largest field."""
    try:
        request = RankRequest.FromString(data)
    except DecodeError as error:
        raise RequestError("request", "these bytes are not a freshrank.v1.RankRequest") from error
    if len(data) > bytes_max:
        sizes = {}
        for descriptor, _ in request.ListFields():
            alone = RankRequest()
            alone.CopyFrom(request)
            for other, _ in request.ListFields():
                if other.name != descriptor.name:
                    alone.ClearField(other.name)
            sizes[descriptor.name] = alone.ByteSize()
        largest = max(sizes, key=sizes.__getitem__, default="request")
        raise RequestError(largest, f"the request has {len(data)} bytes, most of them here; allowed are {bytes_max}")
    return request


def is_sampled(user_id: int, share: float) -> bool:
    """Whether the ranking log holds this user's inputs themselves: by a hash of the user, so always or never."""
    return xxhash.xxh3_64_intdigest(user_key(user_id)) < share * 2**64


def _weights(served: Served, request: RankRequest) -> npt.NDArray[np.float64]:
    for name, weight in request.head_weights.items():
        if not np.isfinite(weight):
            raise RequestError(f"head_weights[{name!r}]", "must be finite")
    try:
        return head_weights(served.ranker, request.head_weights)
    except KeyError as error:
        raise RequestError(f"head_weights[{error.args[0]!r}]", f"no such head; heads: {', '.join(served.ranker.heads)}") from error


def _offset_of(i: int, position: WirePosition, at: Position, lineage: Lineage) -> int:
    """The offset that after[i] asks for. Raises RequestError if it is not a place in this user's log, or in one that led to it."""
    included = lineage.includes(at.log_epoch, Position(position.log_epoch, position.partition, position.offset))
    if included:
        return -1
    if included is False:
        raise RequestError(f"after[{i}].offset", f"{position.offset} of partition {position.partition} came after that log was left")
    if position.log_epoch not in (0, at.log_epoch):
        raise RequestError(f"after[{i}].log_epoch", f"{position.log_epoch} is not the log's, {at.log_epoch}; 0 is the current one")
    if position.partition != at.partition:
        raise RequestError(f"after[{i}].partition", f"{position.partition} does not hold this user, {at.partition} does")
    return int(position.offset)


def _wire(position: Position) -> WirePosition:
    return WirePosition(log_epoch=position.log_epoch, partition=position.partition, offset=position.offset)


def _by_head(served: Served, probability: npt.NDArray[np.float32] | None) -> dict[str, bytes]:
    return {} if probability is None else {name: probability[:, head].tobytes() for head, name in enumerate(served.ranker.heads)}


def _response(
    served: Served,
    request: RankRequest,
    inputs: RankInputs,
    packed: Packed,
    reading: Reading,
    tier: int,
    probability: npt.NDArray[np.float32] | None,
    scores: npt.NDArray[np.float32],
) -> RankResponse:
    order = best_first(scores)
    return RankResponse(
        request_id=request.request_id,
        ranked_ids=inputs.candidate_ids[order].tobytes(),
        ranked_kinds=inputs.candidate_kinds[order].tobytes(),
        scores=scores[order].tobytes(),
        head_scores=_by_head(served, None if probability is None else probability[order]),
        tier=tier,
        release_id=served.release.release_id,
        generations=served.generations,
        watermark=[_wire(reading.watermark)],
        sequence_age_ms=packed.sequence_age_ms,
        sequence_count=packed.sequence_count,
        cold_start=not len(inputs.events),
    )


class RankingServer:
    """The gRPC server with its Triton client, releases and health. Use: `start()`, `stop()`; `switch` and `announce` in between."""

    def __init__(
        self, config: ServerConfig, reader: SequenceReader, sink: RankingSink, *, clock_ms: Callable[[], int] | None = None
    ) -> None:
        self._config, self._reader, self._sink, self._clock_ms = config, reader, sink, clock_ms

    async def start(self) -> str:
        """Opens the newest releases, binds, and answers from now on, from a lower tier until the models are warm. Returns "host:port".

        Raises:
            ReleaseError, TableError: a release cannot be served.
            ValueError: the address must not be used without encryption.
            RuntimeError: the address cannot be bound.
        """
        credentials = server_credentials(self._config)
        self._loop = asyncio.get_running_loop()
        config = self._config
        self._triton = TritonModels(config.triton)
        folders = (config.releases, config.tables, config.repository)
        self.releases = Releases(*folders, self._triton, threads=config.model_threads, unload_delay_s=config.unload_delay_s)
        try:
            await self.releases.start()
            port = await self._bind(credentials)
        except BaseException:
            await self._close()
            raise
        self._warmed = asyncio.Event()
        self._warming = asyncio.create_task(self._warm(), name="warm")
        return f"{config.host}:{port}"

    async def _bind(self, credentials: grpc.ServerCredentials | None) -> int:
        config = self._config
        self.service = RankingService(config, self.releases, self._reader, self._sink, self._clock_ms)
        # A message too large for the transport is refused without the field's name, so its limit lies above the service's own.
        options = [("grpc.max_receive_message_length", 4 * config.message_bytes_max), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        method = grpc.unary_unary_rpc_method_handler(self.service.rank, response_serializer=RankResponse.SerializeToString)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Rank": method}),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if config.reflection:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{config.host}:{config.port}"
        port = self._server.add_secure_port(address, credentials) if credentials else self._server.add_insecure_port(address)
        await self._server.start()
        return int(port)

    async def warm(self) -> None:
        """Returns once the model of each release found at the start has answered. The health service then says SERVING, unless there is no
        release at all: then it says so when the first one is announced.
        """
        await self._warmed.wait()

    async def switch(self, ranker: str, release_id: str, generations: Mapping[str, str] | None = None) -> None:
        """See `Releases.switch`."""
        await self.releases.switch(ranker, release_id, generations)

    def announce(self, ranker: str, release_id: str, generations: Mapping[str, str]) -> None:
        """See `Releases.announce`; may be called from any thread."""
        with suppress(RuntimeError):  # the loop is closed: there is nothing to switch any more
            self._loop.call_soon_threadsafe(self.releases.announce, ranker, release_id, generations)

    def statistics(self) -> dict[str, float]:
        """See `RankingService.statistics`."""
        return self.service.statistics()

    async def stop(self) -> None:
        """Says NOT_SERVING, lets calls under way end within drain_s, and closes what was opened. Reader and sink stay open."""
        self._warming.cancel()
        await asyncio.gather(self._warming, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._config.drain_s)
        await self._close()
        log.info("ranking server stopped: %s", {name: round(value, 3) for name, value in self.statistics().items()})

    async def _close(self) -> None:
        await self.releases.close()
        await self._triton.close()

    async def _warm(self) -> None:
        await self.releases.warm()
        if not self.releases.rankers:
            self._warmed.set()
            await self.releases.any_served.wait()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._warmed.set()

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


async def serve(
    config: ServerConfig,
    reader: SequenceReader,
    sink: RankingSink,
    *,
    announcements: Callable[[Announce], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Runs a ranking server until `stop` is set, or until SIGTERM or SIGINT where none is given.

    Args:
        config: see there.
        reader: the sequences; stays open.
        sink: the ranking log; stays open.
        announcements: called once with the function that takes release announcements, from any thread.
        on_ready: called with "host:port" after `RankingServer.warm`.
        stop: ends the server.
    """
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = RankingServer(config, reader, sink)
    address = await server.start()
    stopping = asyncio.create_task(stop.wait())
    warming = asyncio.create_task(server.warm())
    try:
        if announcements is not None:
            announcements(server.announce)
        await asyncio.wait((stopping, warming), return_when=asyncio.FIRST_COMPLETED)
        if warming.done() and not stopping.done() and on_ready is not None:
            on_ready(address)
        await stopping
    finally:
        for task in (stopping, warming):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await server.stop()


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """The server's TLS; None: without, which only loopback may be, or a host that the operator calls insecure.

    Raises:
        ValueError: naming the setting.
    """
    if (config.certificate is None) != (config.key is None):
        raise ValueError("certificate, key: give both or none")
    if config.certificate is not None and config.key is not None:
        return grpc.ssl_server_credentials([(config.key.read_bytes(), config.certificate.read_bytes())])
    try:
        loopback = ipaddress.ip_address(config.host.strip("[]")).is_loopback
    except ValueError:
        loopback = config.host == "localhost"
    if not loopback and not config.insecure:
        raise ValueError(f"host: {config.host} can be reached from outside: give certificate and key, or set insecure")
    return None

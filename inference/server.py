"""The ranking server: gRPC, health, releases and the Triton client around one `RankingService`."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from features.ports import OPEN_DOOR, Door, RankingSink, SequenceSource
from inference.announced import Announced
from inference.experiments import ExperimentError, needed
from inference.served import Releases
from inference.service import RankingService, ServiceConfig
from inference.telemetry import watch_loop
from inference.triton import TritonModels
from inference.warmup import Samples, WarmUp
from inference.watch import CallWatch, WatchConfig
from protos.v1.ranking_pb2 import Experiment, Explanation, RankResponse

log = logging.getLogger(__name__)

SERVICE = "freshrank.v1.Ranking"


@dataclass(frozen=True, kw_only=True)
class ServerConfig(ServiceConfig):
    """What the operator decides; `deploy` reads it from settings.

    samples: home folder whose sampled requests warm a start (`inference.warmup`); None: they are in memory alone.
    What lets calls in is `door`: TLS, who may call, limits of the transport (`deploy/door.py`). With reuse_port several processes answer at
    one port, between which the kernel shares connections, not calls; connections then end after about connection_age_s (0: never), with
    no call lost, so that a process that was started later gets its share. leave_s: how long a server that stops still takes calls while
    its health says NOT_SERVING.
    """

    releases: Path
    tables: Path
    repository: Path
    triton: str
    host: str = "127.0.0.1"
    port: int = 0
    door: Door = OPEN_DOOR
    reuse_port: bool = False
    reflection: bool = False
    model_threads: int = 2
    model_device: str = "auto"
    unload_delay_s: float = 10.0
    batch_requests_max: int = 8
    batch_delay_us: int = 0
    drain_s: float = 5.0
    samples: Path | None = None
    leave_s: float = 0.0
    connection_age_s: float = 0.0
    watch: WatchConfig = field(default_factory=WatchConfig)


class RankingServer:
    """The gRPC server with its Triton client, releases and health. Use: `start()`, `stop()`; `switch` and `announce` in between."""

    def __init__(
        self, config: ServerConfig, source: SequenceSource, sink: RankingSink, *, clock_ms: Callable[[], int] | None = None
    ) -> None:
        self._config, self._source, self._sink, self._clock_ms = config, source, sink, clock_ms

    async def start(self, announced: Mapping[str, Announced] | None = None, formulas: Mapping[str, str] | None = None) -> str:
        """Opens the releases, binds, and answers from now on, from a lower tier until the models are warm. Returns "host:port".

        `announced`: releases by ranker, as far as they were announced before (`Releases.start`); `formulas`: so for formulas.

        Raises:
            ReleaseError, TableError: a release cannot be served.
            RuntimeError: the address cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        config = self._config
        self._triton = TritonModels(config.triton)
        folders = (config.releases, config.tables, config.repository)
        self.releases = Releases(
            *folders,
            self._triton,
            threads=config.model_threads,
            device=config.model_device,
            unload_delay_s=config.unload_delay_s,
            batch_requests_max=config.batch_requests_max,
            batch_delay_us=config.batch_delay_us,
        )
        try:
            await self.releases.start(announced)
            port = await self._bind(formulas or {})
        except BaseException:
            await self._close()
            raise
        self._warmed = asyncio.Event()
        self._warming = asyncio.create_task(self._warm(), name="warm")
        self._loop_watch = asyncio.create_task(watch_loop(self.service.telemetry), name="loop watch")
        self._writing = asyncio.create_task(self.service.samples.keep_written(), name="samples")
        return f"{config.host}:{port}"

    async def _bind(self, formulas: Mapping[str, str]) -> int:
        config, door = self._config, self._config.door
        self.service = RankingService(config, self.releases, self._source, self._sink, self._clock_ms)
        for ranker, text in formulas.items():
            self._take_formula(ranker, text)
        self.service.samples = Samples(config.samples)
        self.releases.warm_up = WarmUp(self.service.samples, self._source, self.service.telemetry, self.service.clock_ms)
        # A message too large for the transport is refused without the field's name, so its limit lies above the service's own.
        options = [
            *door.options,
            ("grpc.max_receive_message_length", 2 * config.message_bytes_max),
            ("grpc.so_reuseport", int(config.reuse_port)),
        ]
        if config.connection_age_s:
            options.append(("grpc.max_connection_age_ms", round(config.connection_age_s * 1000)))
        self._server = grpc.aio.server(interceptors=door.interceptors, options=options)
        self._watch = CallWatch(config.watch, self.service.telemetry)
        rank = self._watch.watched(SERVICE, "Rank", self.service.rank)
        method = grpc.unary_unary_rpc_method_handler(rank, response_serializer=RankResponse.SerializeToString)
        methods = {"Rank": method}
        explain = self._watch.watched(SERVICE, "Explain", self.service.explain)
        methods["Explain"] = grpc.unary_unary_rpc_method_handler(explain, response_serializer=Explanation.SerializeToString)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if config.reflection:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{config.host}:{config.port}"
        port = self._server.add_secure_port(address, door.credentials) if door.credentials else self._server.add_insecure_port(address)
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

    def announce_formula(self, ranker: str, text: str) -> None:
        """Changes a ranker's announced formula (`Formulas.announce`); may be called from any thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take_formula, ranker, text)

    def _take_formula(self, ranker: str, text: str) -> None:
        self.service.formulas.announce(ranker, text)
        if ranker in self.releases.rankers:
            self.service.formulas.of(self.releases.served[ranker])  # refused here, not at the next request

    def experiment(self, ranker: str, experiment: Experiment | None) -> None:
        """Routes by an experiment from now on, None: by none; what it names is loaded in the background. May be called from any thread."""

        def change() -> None:
            try:
                self.service.experiments.set(ranker, experiment)
            except ExperimentError as error:
                log.error("ranker %s: the announced experiment cannot run, what ran goes on: %s", ranker, error)  # noqa: TRY400
            else:
                self.releases.beside.name(ranker, needed(experiment) if experiment is not None else set())

        with suppress(RuntimeError):  # see `announce`
            self._loop.call_soon_threadsafe(change)

    @property
    def ready(self) -> bool:
        """What the health service says: something is served, it was warmed, and `stop` was not called."""
        return self._warmed.is_set() and bool(self.releases.rankers)

    def statistics(self) -> dict[str, float]:
        """Counters since start, percentiles of the stages in milliseconds, and `figures`."""
        return {**self.service.telemetry.statistics(), **self.figures()}

    def figures(self) -> dict[str, float]:
        """Those of the service and its parts, and what the door counted."""
        return {**self.service.figures(), **{f"door_{name}": value for name, value in self._config.door.statistics().items()}}

    async def stop(self) -> None:
        """Says NOT_SERVING and takes calls for leave_s more, lets those under way end within drain_s, and closes what was opened.

        A call that reaches the closing server before its client has learned of that is CANCELLED by gRPC's core, without having begun:
        clients try it again elsewhere. Source and sink stay open.
        """
        self._warmed.clear()
        background = (self._warming, self._writing, self._loop_watch)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self._config.leave_s)
        await self._server.stop(self._config.drain_s)
        await self.service.close()
        await asyncio.to_thread(self._watch.close)
        await self.service.samples.write()
        await self._close()
        log.info("ranking server stopped: %s", {name: round(value, 3) for name, value in self.statistics().items()})

    async def _close(self) -> None:
        await self.releases.close()
        await self._triton.close()

    async def _warm(self) -> None:
        await self.service.samples.load()
        await self.releases.warm()
        if not self.releases.rankers:
            self._warmed.set()
            await self.releases.any_served.wait()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._warmed.set()

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

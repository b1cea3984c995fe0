"""The worker process: a Faust app that supervises the hot path, watches the dead letters and shows its health. The only home of `faust`.

Faust's consumer group and the hot path's are assigned apart, so nothing in a Faust agent touches a user's state: erasures, too, travel in
the actions topic.
"""

import asyncio
import gc
import json
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faust
from google.protobuf.message import DecodeError
from mode import Service

from protos.v1.actions_pb2 import DeadLetter
from streams.batch_loop import BatchLoop, WorkerConfig
from streams.errors import StreamError
from streams.kafka import log_identity

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 20.0
_LOGGED_MAX = 10


class HotPath(Service):  # type: ignore[misc]
    """Runs the batch loop in a thread; where the loop fails, the app crashes, and with it the process."""

    def __init__(
        self, batch_loop: BatchLoop, is_web_up: Callable[[], Awaitable[bool]], on_ready: Callable[[], None], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._batch_loop, self._is_web_up, self._on_ready = batch_loop, is_web_up, on_ready
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batch-loop")
        self._ended = asyncio.Event()

    @Service.task  # type: ignore[untyped-decorator]
    async def _run(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._batch_loop.run)
        except StreamError as error:
            log.critical("the worker stops: %s", error)
            raise
        finally:
            self._ended.set()

    @Service.task  # type: ignore[untyped-decorator]
    async def _watch(self) -> None:
        while not self.should_stop:
            if self._batch_loop.caught_up.is_set() and await self._is_web_up():
                self._on_ready()
                return
            await self.sleep(0.05)

    async def on_stop(self) -> None:
        """Lets the loop finish its batch and close its databases."""
        self._batch_loop.stop()
        await asyncio.wait_for(self._ended.wait(), _STOP_TIMEOUT_S)
        self._executor.shutdown()


class DeadLetters:
    """Counts dead letters by what was wrong, and logs the first ones of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, value: bytes | None) -> None:
        """Takes one record of the dead-letter topic; never raises, for an agent that raises loses its event."""
        try:
            letter = DeadLetter.FromString(value or b"")
        except DecodeError:
            self.counts["unreadable dead letter"] += 1
            return
        kind = letter.reason.partition(":")[0]
        self.counts[kind] += 1
        if self.counts[kind] <= _LOGGED_MAX:
            place = f"{letter.source_topic}:{letter.source_partition}:{letter.source_offset}"
            more = " (more of this kind are only counted)" if self.counts[kind] == _LOGGED_MAX else ""
            log.warning("dead letter from %s: %s%s", place, letter.reason, more)


def create_app(
    config: WorkerConfig,
    *,
    on_ready: Callable[[dict[str, Any]], None] = lambda _: None,
    at: Callable[[str], None] = lambda _: None,
) -> faust.App:
    """The worker's Faust app. `on_ready` is called once, when the state has caught up with the log's end at start, with the web address.

    `at`: see `BatchLoop`.
    """
    web_port = config.web_port or _free_port(config.web_host)
    app = faust.App(
        f"{config.group}-faust",
        broker=[f"kafka://{address.strip()}" for address in config.kafka.bootstrap.split(",")],
        broker_credentials=_credentials(config.kafka.properties),
        broker_session_timeout=10.0,
        broker_heartbeat_interval=2.0,
        consumer_auto_offset_reset="earliest",
        autodiscover=False,
        store="memory://",
        datadir=str(config.state_folder / "faust"),
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_bind=config.web_host,
        web_host=config.web_host,
        web_port=web_port,
        web_in_thread=False,
        worker_redirect_stdouts=False,
    )
    batch_loop = BatchLoop(config, at=at)
    letters = DeadLetters()

    async def is_web_up() -> bool:
        try:
            _, writer = await asyncio.open_connection(config.web_host, web_port)
        except OSError:
            return False
        writer.close()
        return True

    def ready() -> None:
        on_ready({"health": f"http://{config.web_host}:{web_port}/health/", "partitions": batch_loop.partitions()})

    # A dependency starts with the app; what @app.service adds would wait for the first assignment of Faust's own group, which after a crash
    # comes only when the dead member's session has ended. (A static member does not help: Faust refuses an assignment with an old address.)
    app.add_dependency(HotPath(batch_loop, is_web_up, ready))
    topic = app.topic(config.topics.dead_letters, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")

    @app.agent(topic, name="dead-letters")  # type: ignore[untyped-decorator]
    async def watch_dead_letters(stream: AsyncIterable[bytes]) -> None:
        async for value in stream:
            letters.add(value)

    @app.page("/health/")  # type: ignore[untyped-decorator]
    async def health(web: Any, _: Any) -> Any:
        report = {**batch_loop.health(), "dead_letters": dict(letters.counts), "statistics": batch_loop.statistics()}
        return web.text(json.dumps(report, indent=1), content_type="application/json", status=200 if report["healthy"] else 503)

    return app


def run_worker(
    config: WorkerConfig,
    on_ready: Callable[[dict[str, Any]], None] = lambda _: None,
    *,
    at: Callable[[str], None] = lambda _: None,
) -> int:
    """Runs the worker until SIGTERM or SIGINT: returns 0, or 1 where something stopped it, after logging what to do."""
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config.state_folder.mkdir(parents=True, exist_ok=True)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        log_identity(config.kafka, config.topics.actions, timeout_s=config.answer_timeout_s)  # Faust would say it in a long trace
        app = create_app(config, on_ready=on_ready, at=at)
    except StreamError as error:
        log.critical("the worker does not start: %s", error)
        return 1
    # A batch makes tens of thousands of short-lived message objects and no cycles: collecting after every 700 of them finds nothing.
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    worker = faust.Worker(app, loop=loop, quiet=True, loglevel=config.log_level, redirect_stdouts=False, override_logging=False)
    worker.spinner = None  # it writes control characters to logs
    try:
        worker.execute_from_commandline()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _free_port(host: str) -> int:
    """A port that is free now: Faust takes no port 0."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _credentials(properties: Mapping[str, str]) -> Any:
    """Faust's credentials for librdkafka's security properties: its Kafka client does not read them."""
    protocol = properties.get("security.protocol", "PLAINTEXT").upper()
    if protocol == "PLAINTEXT":
        return None
    context = None
    if protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=properties.get("ssl.ca.location"))
        if certificate := properties.get("ssl.certificate.location"):
            context.load_cert_chain(certificate, properties.get("ssl.key.location"), properties.get("ssl.key.password"))
    if protocol == "SSL":
        return faust.SSLCredentials(context)
    mechanism = properties.get("sasl.mechanism", properties.get("sasl.mechanisms", ""))
    if mechanism not in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
        raise StreamError(f"sasl.mechanism: {mechanism!r} is not supported by the worker; allowed: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512")
    return faust.SASLCredentials(
        mechanism=mechanism, username=properties.get("sasl.username"), password=properties.get("sasl.password"), ssl_context=context
    )

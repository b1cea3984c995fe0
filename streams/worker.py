"""The worker process: a Faust app that supervises the hot path, watches the dead letters and shows its health. The only home of `faust`.

Faust's consumer group and the hot path's are assigned apart, so nothing in a Faust agent touches a user's state: erasures, too, travel in
the actions topic.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faust
from google.protobuf.message import DecodeError
from mode import Service
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from protos.v1.actions_pb2 import DeadLetter
from streams.batch_loop import BatchLoop, WorkerConfig
from streams.core import Applied
from streams.dead_letters import REDRIVEN, kind_of
from streams.errors import StreamError
from streams.kafka import Topics, log_identity, new_producer
from streams.metrics import WorkerMetrics
from streams.rates import KEPT_S, WINDOW_S, Rate, RateReporter, Report, fold, page, summarise

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 12.0  # less than what the supervisor waits before SIGKILL
_METADATA_AGE_S = 10.0
_RATES_PERIOD_S = 1.0
_RATES_SHOWN_S = 600.0
_LOGGED_MAX = 10


class HotPath(Service):  # type: ignore[misc]
    """Runs the batch loop in a thread; where the loop fails, the app crashes, and with it the process."""

    def __init__(
        self,
        batch_loop: BatchLoop,
        is_web_up: Callable[[], Awaitable[bool]],
        on_ready: Callable[[], None],
        on_crash: Callable[[], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._batch_loop, self._is_web_up, self._on_ready, self._on_crash = batch_loop, is_web_up, on_ready, on_crash
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batch-loop")
        self._ended = asyncio.Event()
        self.exit_code = 1
        """0 once the loop has ended well: its batch is committed and its databases are closed."""

    @Service.task  # type: ignore[untyped-decorator]
    async def _run(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._batch_loop.run)
            self.exit_code = 0
        except Exception as error:
            if isinstance(error, StreamError):
                log.critical("the worker stops: %s", error)
            self._on_crash()
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

    def end_loop(self) -> None:
        """Asks the loop to finish its batch and close its databases."""
        self._batch_loop.stop()

    async def on_stop(self) -> None:
        """Waits for the loop to end."""
        self.end_loop()
        await self._ended.wait()
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
        kind = kind_of(letter.reason)
        self.counts[kind] += 1
        if kind != REDRIVEN and self.counts[kind] <= _LOGGED_MAX:
            place = f"{letter.source_topic}:{letter.source_partition}:{letter.source_offset}"
            more = " (more of this kind are only counted)" if self.counts[kind] == _LOGGED_MAX else ""
            # Not the reason itself: it may name the user. `freshrank dead show` does.
            log.warning("dead letter from %s: %s%s; see freshrank dead list", place, kind, more)


class RateSender(Service):  # type: ignore[misc]
    """Sends the hot path's reports to the rates topic once a second. A report that cannot be sent in time is dropped: it is a figure."""

    def __init__(self, reporter: RateReporter, config: WorkerConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._reporter, self._topic = reporter, config.topics.rates
        # Plain and short-lived: while no broker answers, nothing may pile up.
        settings = {"enable_idempotence": False, "message_timeout_ms": 10_000, "queue_buffering_max_messages": 10_000}
        self._producer = new_producer(config.kafka, "rates", **settings)

    @Service.task  # type: ignore[untyped-decorator]
    async def _run(self) -> None:
        while not self.should_stop:
            await self.sleep(_RATES_PERIOD_S)
            self._send(self._reporter.drain())

    async def on_stop(self) -> None:
        """Sends what there is, and waits a moment for the broker to take it."""
        self._send(self._reporter.drain(everything=True))
        await asyncio.to_thread(self._producer.flush, _RATES_PERIOD_S)

    def _send(self, reports: list[Report]) -> None:
        for report in reports:
            with contextlib.suppress(BufferError):
                self._producer.produce(self._topic, report.encode(), b"%d" % report.partition, timestamp=report.second * 1000)
        self._producer.poll(0)


class RateWindows:
    """The Faust table of rates: a window for each partition and ten seconds, folded from the reports of all workers.

    One worker of the group has it, the one that Faust assigns the topic's only partition to. Memory holds it; its changelog brings it back.
    """

    def __init__(self, app: faust.App, topics: Topics) -> None:
        self._app, self._topics = app, topics
        raw = {"key_type": bytes, "value_type": bytes, "key_serializer": "raw", "value_serializer": "raw"}
        # As Faust would make it, but under a name of ours: made by ensure_topics, not by Faust.
        changelog = app.topic(
            topics.rates_windows,
            key_serializer="json",
            value_serializer="json",
            partitions=1,
            acks=False,
            internal=True,
            allow_empty=True,
        )
        self._windows = app.Table("rates", default=dict, partitions=1, changelog_topic=changelog).tumbling(WINDOW_S, expires=KEPT_S)
        self._windows.table.changelog_topic = changelog  # a window resets it
        app.agent(app.topic(topics.rates, **raw), name="rates")(self._fold)

    async def _fold(self, stream: AsyncIterable[bytes]) -> None:
        async for value in stream:
            try:
                report = Report.decode(value)
            except ValueError as error:
                log.warning("topic %s: %s", self._topics.rates, error)
                continue
            # The window is that of the record's timestamp, which is the report's second.
            self._windows[report.partition] = fold(self._windows[report.partition].current(), report)

    @property
    def held(self) -> bool:
        """Whether this worker has the table."""
        return any(place.topic == self._topics.rates for place in self._app.consumer.assignment())

    def rates(self) -> dict[int, list[Rate]]:
        """Windows by partition, oldest first, of the time that the page shows; also partitions that had none in it.

        The table has more: an hour, and what recovery brought back, which Faust never expires.
        """
        now_s = time.time()
        found: dict[int, list[Rate]] = {}
        for (partition, (start_s, _)), window in sorted(self._windows.table.items()):
            shown = found.setdefault(partition, [])
            if start_s > now_s - _RATES_SHOWN_S:
                shown.append(summarise(start_s, window, now_s))
        return found

    def last_full(self) -> dict[int, Rate]:
        """The window before the present one, by partition; nothing happened where it has no report."""
        start_s = time.time() // WINDOW_S * WINDOW_S - WINDOW_S
        nothing = Rate(int(start_s), 0, 0.0, 0, -1)
        return {partition: next((rate for rate in rates if rate.start_s == start_s), nothing) for partition, rates in self.rates().items()}


class _Worker(faust.Worker):  # type: ignore[misc]
    """Faust's worker, which says first that it is going to stop.

    Faust stops its own consumer before the services that an app depends on, and that may wait for ever for a coordinator that is gone.
    """

    def __init__(self, *arguments: Any, on_stop: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        self._before_stop = on_stop

    async def stop(self) -> None:
        self._before_stop()
        await super().stop()


def _new_app(config: WorkerConfig, web_port: int) -> faust.App:
    return faust.App(
        f"{config.group}-faust",
        broker=[f"kafka://{address.strip()}" for address in config.kafka.bootstrap.split(",")],
        broker_credentials=_credentials(config.kafka.properties),
        broker_session_timeout=10.0,
        broker_heartbeat_interval=2.0,
        consumer_auto_offset_reset="earliest",
        # A group that formed while the broker did not know its topics yet has none until the next look: by default for five minutes.
        consumer_metadata_max_age_ms=int(_METADATA_AGE_S * 1000),
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


def create_app(
    config: WorkerConfig,
    *,
    on_ready: Callable[[dict[str, Any]], None] = lambda _: None,
    on_crash: Callable[[], None] = lambda: None,
    at: Callable[[str], None] = lambda _: None,
) -> tuple[faust.App, HotPath]:
    """The worker's Faust app, and what of it keeps the sequences.

    `on_ready` is called once, when the state has caught up with the log's end at start, with the web address. `on_crash`: when the hot path
    has failed, before the app stops. `at`: see `BatchLoop`.
    """
    web_port = config.web_port or _free_port(config.web_host)
    app = _new_app(config, web_port)
    reporter = RateReporter()
    metrics = WorkerMetrics(
        lambda: batch_loop.health(), lambda: batch_loop.statistics(), lambda: windows.last_full() if windows is not None else {}
    )

    def observe(applied: Applied) -> None:
        metrics.observe(applied)
        if windows is not None:  # otherwise nobody takes the reports
            reporter.observe(applied)

    batch_loop = BatchLoop(config, at=at, observe=observe)
    letters = DeadLetters()
    windows = RateWindows(app, config.topics) if _has_rates_topics(config) else None

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
    hot_path = HotPath(batch_loop, is_web_up, ready, on_crash)
    app.add_dependency(hot_path)
    if windows is not None:
        app.add_dependency(RateSender(reporter, config))
    topic = app.topic(config.topics.dead_letters, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")

    @app.agent(topic, name="dead-letters")  # type: ignore[untyped-decorator]
    async def watch_dead_letters(stream: AsyncIterable[bytes]) -> None:
        async for value in stream:
            letters.add(value)

    _add_pages(app, batch_loop, metrics, letters, windows)
    return app, hot_path


def _add_pages(app: faust.App, batch_loop: BatchLoop, metrics: WorkerMetrics, letters: DeadLetters, windows: RateWindows | None) -> None:
    """What an operator, a probe and a scraper ask for."""

    @app.page("/health/")  # type: ignore[untyped-decorator]
    async def health(web: Any, _: Any) -> Any:
        report = {**batch_loop.health(), "dead_letters": dict(letters.counts), "statistics": batch_loop.statistics()}
        return web.text(json.dumps(report, indent=1), content_type="application/json", status=200 if report["healthy"] else 503)

    @app.page("/live/")  # type: ignore[untyped-decorator]
    async def live(web: Any, _: Any) -> Any:
        report = batch_loop.health()
        return web.text("live\n" if report["live"] else "stuck: see /health/\n", status=200 if report["live"] else 503)

    @app.page("/ready/")  # type: ignore[untyped-decorator]
    async def ready_page(web: Any, _: Any) -> Any:
        report = batch_loop.health()
        return web.text("ready\n" if report["ready"] else "catching up: see /health/\n", status=200 if report["ready"] else 503)

    @app.page("/metrics")  # type: ignore[untyped-decorator]
    async def metrics_page(web: Any, _: Any) -> Any:
        return web.bytes(metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    @app.page("/rates/")  # type: ignore[untyped-decorator]
    async def rates_page(web: Any, _: Any) -> Any:
        shown = page(windows.rates(), held=windows.held) if windows is not None else page({}, held=False)
        return web.text(json.dumps(shown), content_type="application/json")


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
    deadline = threading.Timer(_STOP_TIMEOUT_S, lambda: _leave(1 if app.crashed else hot_path.exit_code))
    deadline.daemon = True

    def stop() -> None:
        if deadline.ident is None:
            deadline.start()
        hot_path.end_loop()

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        log_identity(config.kafka, config.topics.actions, timeout_s=config.answer_timeout_s)  # Faust would say it in a long trace
        app, hot_path = create_app(config, on_ready=on_ready, on_crash=stop, at=at)
    except StreamError as error:
        log.critical("the worker does not start: %s", error)
        return 1
    # A batch makes tens of thousands of short-lived message objects and no cycles: collecting after every 700 of them finds nothing.
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    worker = _Worker(app, loop=loop, quiet=True, loglevel=config.log_level, redirect_stdouts=False, override_logging=False, on_stop=stop)
    worker.spinner = None  # it writes control characters to logs
    try:
        worker.execute_from_commandline()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        deadline.cancel()
    return 0


def _leave(exit_code: int) -> None:
    """Better an end that looks like a kill than none: Faust waits for ever for a coordinator that is gone, and a supervisor for the end."""
    log.critical("the worker's services do not end within %g s: the process ends without them", _STOP_TIMEOUT_S)
    os._exit(exit_code)


def _has_rates_topics(config: WorkerConfig) -> bool:
    """Without them (topics older than this program, no right to use them) the worker does its work and shows no windows."""
    try:
        for topic in (config.topics.rates, config.topics.rates_windows):
            log_identity(config.kafka, topic, timeout_s=config.answer_timeout_s)
    except StreamError as error:
        log.warning("no rates by window until the next start: %s", error)
        return False
    return True


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

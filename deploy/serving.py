"""The ranking server's process: settings in, a served port out. `freshrank server` runs it anywhere; the local stack supervises it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys

from deploy.announcing import News, formulas_of, releases_of
from deploy.door import door
from deploy.logs import set_up_logging
from deploy.processes import kafka_config, partition_count, product
from deploy.rolling import restart_on_hangup
from deploy.scheduling import set_slice
from deploy.server_pages import server_pages
from deploy.settings import Settings
from deploy.supervisor import Command, Supervisor, report_ready
from inference.server import RankingServer, ServerConfig
from inference.watch import WatchConfig
from streams.broadcast import Announcements
from streams.owners import Owners
from streams.ranking_log import RankingLog
from streams.routed_source import RoutedSource
from streams.view_reader import ViewReader

log = logging.getLogger(__name__)

WARM_S_MAX = 60.0
REUSE_VARIABLE = "FRESHRANK_SERVER_REUSES_PORT"
"""Set for the processes of a server that has several."""


def server(settings: Settings) -> int:
    """Ranks over gRPC until SIGTERM; returns the exit code."""
    if settings.server_processes > 1:
        return _several(settings)
    set_slice(settings.serving_slice_ms)
    set_up_logging(settings)
    asyncio.run(_serve(settings))
    return 0


def _several(settings: Settings) -> int:
    """Several processes at one port: each is this command with one, watched and restarted here; see `deploy.rolling`."""
    set_up_logging(settings)
    family = socket.AF_INET6 if ":" in settings.server_host else socket.AF_INET
    with socket.socket(family) as held:  # bound, not listening: no connection comes here, and the port stays the processes' own
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((settings.server_host.strip("[]"), settings.server_port))
        port = held.getsockname()[1]
        one = settings.model_copy(update={"server_port": port, "server_processes": 1})
        with Supervisor(settings.home / "servers" / str(port)) as supervisor:
            for i in range(settings.server_processes):
                command = (sys.executable, "-m", "deploy.cli", "server")
                web_port = settings.server_web_port and settings.server_web_port + i
                environment = {**one.model_copy(update={"server_web_port": web_port}).as_environment(), REUSE_VARIABLE: "1"}
                stop_within_s = settings.server_leave_s + settings.server_drain_s + 10
                supervisor.start(Command(f"server-{i}", command, environment, ready_within_s=120, stop_within_s=stop_within_s))
            restart_on_hangup(supervisor)
    return 0


async def _serve(settings: Settings) -> None:
    view = ViewReader(settings.home / "view", product(settings), partition_count(settings))
    sink = RankingLog(kafka_config(settings), settings.topic_rankings, queue_max=settings.ranking_log_queue_max)
    owners = Owners()
    source = routed_source(settings, view, owners)
    ranking = RankingServer(server_config(settings), source, sink)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    news = News()

    def on_change(key: str, value: bytes | None) -> None:
        owners.take(key, value)
        news.take(key, value)

    announcements = await asyncio.to_thread(
        lambda: Announcements(kafka_config(settings), settings.topic_announcements, on_change=on_change)
    )
    known = news.known()
    try:
        endpoint = await ranking.start(releases_of(known), formulas_of(known))
    except BaseException:
        announcements.close()
        raise
    news.attach(ranking)
    stopping = asyncio.create_task(stop.wait())
    web = contextlib.AsyncExitStack()
    try:
        url = await web.enter_async_context(server_pages(ranking, settings.server_host, settings.server_web_port))
        # Lower tiers answer while the models load: a Triton that does not come up must not keep the server from serving.
        warming = asyncio.create_task(ranking.warm())
        await asyncio.wait({warming, stopping}, timeout=WARM_S_MAX, return_when=asyncio.FIRST_COMPLETED)
        warming.cancel()
        report_ready(endpoint, rankers=ranking.releases.rankers, web=url)
        await stopping
    finally:
        stopping.cancel()
        announcements.close()
        await ranking.stop()
        await web.aclose()
        await source.close()
        sink.close()
        view.close()


def routed_source(settings: Settings, view: ViewReader, owners: Owners) -> RoutedSource:
    """Where the server reads sequences from: this machine's view, and what workers announce."""
    if settings.auth_jwks and not settings.server_token:
        log.warning("auth_jwks without server_token: readers on other machines that ask for tokens will refuse this server")
    return RoutedSource(
        view,
        owners,
        product(settings),
        partition_count(settings),
        own_address=settings.reader_advertised_address,
        fresh_ms=settings.sequence_fresh_ms,
        root_certificate=settings.tls_authority,
        certificate=settings.tls_client_certificate,
        key=settings.tls_client_key,
        token=settings.server_token.get_secret_value() if settings.server_token else None,
    )


def server_config(settings: Settings) -> ServerConfig:
    """The ranking server's part of the settings."""
    return ServerConfig(
        releases=settings.home / "releases",
        tables=settings.home / "tables",
        repository=settings.home / "triton" / "repository",
        triton=settings.triton_url,
        host=settings.server_host,
        port=settings.server_port,
        reuse_port=REUSE_VARIABLE in os.environ,
        drain_s=settings.server_drain_s,
        samples=settings.home,
        leave_s=settings.server_leave_s,
        connection_age_s=settings.server_connection_age_s if REUSE_VARIABLE in os.environ else 0.0,
        door=door(settings, settings.server_host),
        reflection=settings.reflection,
        timeout_s=settings.rank_timeout_ms / 1000,
        deadline_s_max=settings.rank_deadline_ms_max / 1000,
        after_wait_s_max=settings.after_wait_ms_max / 1000,
        model_threads=settings.torch_threads,
        model_device=settings.model_device,
        rankings_max=settings.rankings_max,
        rankings_waiting_max=settings.rankings_waiting_max,
        batch_requests_max=settings.model_batch_requests_max,
        batch_delay_us=settings.model_batch_delay_us,
        message_bytes_max=settings.message_bytes_max,
        inline_share=settings.inline_share,
        watch=WatchConfig(otlp_endpoint=settings.otlp_endpoint, trace_share=settings.trace_share, slow_ms=settings.slow_ms),
    )

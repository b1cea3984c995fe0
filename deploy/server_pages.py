"""Pages of the ranking server and the sequence reader for probes and scrapers: /live/, /ready/ and /metrics over HTTP, served on the
process's own event loop.

So an answer of /live/ says that the loop turns, and figures need no lock. There is nothing secret on them, and no user.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

if TYPE_CHECKING:
    from inference.server import RankingServer

Page = tuple[int, str, bytes]
"""(HTTP status, content type, body)."""

_TEXT = "text/plain; charset=utf-8"


def pages(metrics: Callable[[], bytes], ready: Callable[[], bool]) -> Callable[..., Awaitable[None]]:
    """The ASGI app. metrics: the exposition; ready: whether the server takes calls."""

    def page(path: str) -> Page:
        if path == "/metrics":
            return 200, CONTENT_TYPE_PLAIN_0_0_4, metrics()
        if path in ("/live/", "/live"):
            return 200, _TEXT, b"live\n"
        if path in ("/ready/", "/ready"):
            return (200, _TEXT, b"ready\n") if ready() else (503, _TEXT, b"loading, warming, draining, or without a view: see the log\n")
        return 404, _TEXT, b"pages: /live/ /ready/ /metrics\n"

    async def app(scope: Any, _: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        status, kind, body = page(scope["path"]) if scope["method"] in ("GET", "HEAD") else (405, _TEXT, b"GET only\n")
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return app


def server_pages(ranking: "RankingServer", host: str, port: int) -> contextlib.AbstractAsyncContextManager[str]:
    """`serve_pages` of a ranking server that has started."""
    from inference.server_metrics import ServerMetrics  # a reader, which has pages of its own, need not load it

    service = ranking.service
    metrics = ServerMetrics(service.telemetry, ranking.figures, lambda: ranking.releases.served, lambda: ranking.ready)
    return serve_pages(pages(metrics.exposition, lambda: ranking.ready), host, port)


def reader_pages(
    host: str, port: int, metrics: Callable[[], bytes], ready: Callable[[], bool]
) -> contextlib.AbstractAsyncContextManager[str]:
    """`serve_pages` of a sequence reader (`streams.reader_service.ReaderConfig.web`)."""
    return serve_pages(pages(metrics, ready), host, port, setting="reader_web_port")


class Guest(uvicorn.Server):
    """uvicorn in a process whose signals belong to somebody else."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves them alone."""
        yield


@contextlib.asynccontextmanager
async def serve_pages(app: Callable[..., Awaitable[None]], host: str, port: int, *, setting: str = "server_web_port") -> AsyncIterator[str]:
    """Serves an ASGI app within the running loop until the block ends; gives "http://host:port". `setting`: where the port comes from.

    Raises:
        OSError: the port cannot be bound; the message names it.
    """
    listener = bound(setting, host, port)
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1, server_header=False
    )
    server = Guest(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="pages")
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


def bound(setting: str, host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0: a free one. Raises OSError, naming the setting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be named: asyncio switches Nagle's algorithm off only where it is, and an answer of two writes then waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(128)  # connections wait here until the server takes them: the address may be told already
    except OSError as error:
        listener.close()
        raise OSError(f"{setting}: {host}:{port} cannot be bound: {error}") from error
    return listener

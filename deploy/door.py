"""The door of the gRPC servers: who may call (`deploy/guard.py`), TLS (`deploy/tls.py`), and the limits of one client.

One interceptor stands before every method of every service. So a method that somebody adds is denied until it is in the table of
permissions, and no failure tells a caller more than a reference to the log.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc

from deploy.guard import KeyFile, Tokens
from deploy.settings import Settings
from deploy.tls import server_credentials
from features.faults import internal_error
from features.ports import Caller, Door, ForbiddenError, Guard, UnauthenticatedError
from streams.interception import Around, Call, Stream

log = logging.getLogger(__name__)

_CONNECTION: tuple[tuple[str, int], ...] = (
    ("grpc.max_concurrent_streams", 1_000),
    # Who pings more often than this, or without a call under way, is disconnected (ENHANCE_YOUR_CALM).
    ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.keepalive_permit_without_calls", 0),
    # A client that vanished without a word is found after 80 s, and its calls are cancelled.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A connection that never finishes its handshake (default: 2 minutes).
    ("grpc.server_handshake_timeout_ms", 10_000),
)


class Doorkeeper(Around):
    """Lets a call pass, counts the calls of each client, and says nothing of failures but a reference.

    A client is the caller that the guard names, else its address. Methods that need no token (health) are not counted. It runs on the
    server's event loop.
    """

    def __init__(self, guard: Guard, calls_per_client_max: int) -> None:
        super().__init__()
        self._guard, self._calls_max = guard, calls_per_client_max
        self._calls: Counter[str] = Counter()
        self._refused = Counter(unauthenticated=0, forbidden=0, client_calls=0)

    def statistics(self) -> dict[str, float]:
        """Calls under way, clients that have any, and calls refused since the start, by reason."""
        refused = {f"refused_{reason}": count for reason, count in self._refused.items()}
        return {"calls": self._calls.total(), "clients": len(self._calls), **refused}

    def call(self, method: str, behaviour: Call) -> Call:
        """See `Around`."""

        async def call(request: Any, context: Any) -> Any:
            client = await self._enter(method, context)
            try:
                return await behaviour(request, context)
            except grpc.aio.AbortError:
                raise
            except grpc.aio.InternalError as error:  # gRPC could not send: the caller went away while it was answered
                raise asyncio.CancelledError from error
            except Exception as error:
                message = internal_error(log, f"{method} failed", error)
            finally:
                self._leave(client)
            return await context.abort(grpc.StatusCode.INTERNAL, message)

        return call

    def stream(self, method: str, behaviour: Stream) -> Stream:
        """See `Around`."""

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            client = await self._enter(method, context)
            try:
                async for answer in behaviour(request, context):
                    yield answer
            except grpc.aio.AbortError:
                raise
            except grpc.aio.InternalError as error:  # gRPC could not send: the caller went away while it was answered
                raise asyncio.CancelledError from error
            except Exception as error:
                message = internal_error(log, f"{method} failed", error)
            else:
                return
            finally:
                self._leave(client)
            await context.abort(grpc.StatusCode.INTERNAL, message)

        return stream

    async def _enter(self, method: str, context: Any) -> str:
        """Counts the call in; returns what `_leave` takes."""
        try:
            caller = self._guard.check(method, context.invocation_metadata())
        except UnauthenticatedError as error:
            reason, code, message = "unauthenticated", grpc.StatusCode.UNAUTHENTICATED, str(error)
        except ForbiddenError as error:
            reason, code, message = "forbidden", grpc.StatusCode.PERMISSION_DENIED, str(error)
        else:
            client = _client(caller, context)
            if not client:
                return client
            if self._calls[client] < self._calls_max:
                self._calls[client] += 1
                return client
            reason, code = "client_calls", grpc.StatusCode.RESOURCE_EXHAUSTED
            message = f"{self._calls_max} calls of this client are under way: wait for an answer"
        self._refused[reason] += 1
        await context.abort(code, message)
        raise AssertionError("unreachable: abort raises")

    def _leave(self, client: str) -> None:
        if self._calls[client] <= 1:
            del self._calls[client]
        else:
            self._calls[client] -= 1


def _client(caller: Caller, context: Any) -> str:
    """What one client's calls are counted under; empty: they are not, for the method is open to everybody.

    A peer is "ipv4:127.0.0.1:50123": without the port it is a machine.
    """
    if not caller.permissions:
        return ""
    return f"name:{caller.name}" if caller.name else str(context.peer()).rpartition(":")[0]


def guard(settings: Settings) -> Tokens:
    """The guard that the settings describe. Raises SettingsError."""
    keys = KeyFile(settings.auth_jwks) if settings.auth_jwks else None
    token = settings.server_token.get_secret_value() if settings.server_token else None
    return Tokens(token, keys, settings.auth_issuer, settings.auth_audience, admin=settings.admin_methods)


def door(settings: Settings, host: str) -> Door:
    """The door of a server that binds `host`. Raises SettingsError."""
    options = (
        *_CONNECTION,
        # Beyond the first gRPC refuses some calls, beyond the second all.
        ("grpc.max_metadata_size", settings.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", settings.metadata_bytes_max),
    )
    credentials = server_credentials(host, settings.tls_certificate, settings.tls_key, settings.tls_client_authority)
    keeper = Doorkeeper(guard(settings), settings.calls_per_client_max)
    return Door((keeper,), options, credentials, keeper.statistics)

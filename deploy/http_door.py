"""The JSON/HTTP door: rank, explain and produce for programs without gRPC, with an OpenAPI page. A process of its own: `freshrank http`.

It calls the ranking servers and Kafka through the Python clients, so an answer here is the same answer, some milliseconds later. Errors are
application/problem+json and name the field.
"""

import asyncio
import logging
import re
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

import grpc
import uvicorn
from fastapi import Body, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deploy.door import guard
from deploy.guard import HTTP_ACTIONS
from deploy.http_wire import (
    ACTIONS_MAX,
    ActionBody,
    ActionsAnswer,
    ExplainAnswer,
    ExplainBody,
    FieldError,
    Problem,
    RankAnswer,
    RankBody,
    action_fields,
    answer_of,
    explain_answer,
    position_text,
    rank_fields,
)
from deploy.logs import set_up_logging
from deploy.processes import kafka_config, product
from deploy.server_pages import Guest, bound
from deploy.settings import Settings
from deploy.supervisor import report_ready
from features.domain import Domain
from features.ports import ForbiddenError, Guard, UnauthenticatedError
from inference.async_client import AsyncRankingClient
from inference.client import RankError, rank_request, typed
from protos.v1.ranking_pb2 import RankRequest
from streams.errors import StreamError
from streams.producer import ActionProducer

log = logging.getLogger(__name__)

HTTP_STATUS: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""gRPC status to HTTP status; any other is 500."""

RETRY_AFTER_S = 1
"""Where a server that is full does not say when to come back; HTTP's header has whole seconds."""
_FIELD = re.compile(r"([a-z_]+)(?:\['?([^'\]]*)'?\])?(?:\.[a-z_]+)*: ")
_OURS = {"user_id": "user", "candidate_ids": "candidates", "candidate_kind": "kind", "candidate_kinds": "kinds"}
"""Names of the JSON fields that are not those of RankRequest."""
_TITLES = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    409: "Conflict",
    413: "Body too large",
    429: "Too many requests",
    503: "Unavailable",
}
_PROBLEM = "application/problem+json"
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {_PROBLEM: {}}} for status in (400, 401, 403, 409, 413, 429, 500, 503, 504)
}


def http_app(
    domain: Domain, client: AsyncRankingClient, producer: ActionProducer, *, guard: Guard, body_bytes_max: int = 1 << 20
) -> "BodyLimit":
    """The ASGI app. Producing is checked by `guard`; a ranking's token is passed on to the server, which checks it."""
    app = FastAPI(title="freshrank", summary="Fresh rankings over HTTP.", version="1")
    _add_errors(app)

    @app.post("/v1/rank", response_model=RankAnswer, responses=_PROBLEMS)
    async def rank(body: RankBody, authorization: Annotated[str, Header()] = "", traceparent: Annotated[str, Header()] = "") -> RankAnswer:
        """Ranks candidates for a user, with the user's newest actions."""
        answer = await client.call(_request(domain, body), **_going_along(body, authorization, traceparent))
        return answer_of(domain, body, typed(answer))

    @app.post("/v1/explain", response_model=ExplainAnswer, responses=_PROBLEMS)
    async def explain(
        body: ExplainBody, authorization: Annotated[str, Header()] = "", traceparent: Annotated[str, Header()] = ""
    ) -> ExplainAnswer:
        """What rank would answer, and why: what leaving out each recent action would change. Needs the permission `explain`."""
        found = await client.explain(_request(domain, body), **_going_along(body, authorization, traceparent))
        return explain_answer(domain, body, found)

    @app.post("/v1/actions", response_model=ActionsAnswer, responses=_PROBLEMS)
    async def produce(
        body: Annotated[ActionBody | list[ActionBody], Body()], authorization: Annotated[str, Header()] = ""
    ) -> ActionsAnswer:
        """Produces one action or a list of them; answers when the log has all. None is produced where one is refused."""
        try:
            guard.check(HTTP_ACTIONS, [("authorization", authorization)])
        except UnauthenticatedError as error:
            raise RankError(grpc.StatusCode.UNAUTHENTICATED, str(error)) from error
        except ForbiddenError as error:
            raise RankError(grpc.StatusCode.PERMISSION_DENIED, str(error)) from error
        several = body if isinstance(body, list) else [body]
        if not 1 <= len(several) <= ACTIONS_MAX:
            raise FieldError("", f"{len(several)} actions; 1 to {ACTIONS_MAX} are taken at once")
        now_ms = time.time_ns() // 1_000_000
        checked = [action_fields(domain, f"[{i}]." if isinstance(body, list) else "", action, now_ms) for i, action in enumerate(several)]
        # A full queue makes produce wait: beside the loop.
        futures = await asyncio.to_thread(lambda: [producer.produce(**fields) for fields in checked])
        positions = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return ActionsAnswer(positions=[position_text(at) for at in positions])

    return BodyLimit(app, body_bytes_max)


class BodyLimit:
    """ASGI: refuses a body above the limit with 413, also where it comes without a length."""

    def __init__(self, app: Callable[..., Awaitable[None]], bytes_max: int) -> None:
        self._app, self._bytes_max = app, bytes_max

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        chunks, size, more = [], int(length) if length.isdigit() else 0, True
        if size <= self._bytes_max:
            size = 0
            while more and size <= self._bytes_max:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                chunks.append(message.get("body", b""))
                size, more = size + len(chunks[-1]), message.get("more_body", False)
        if size > self._bytes_max:
            detail = f"allowed are {self._bytes_max} bytes (setting http_body_bytes_max)"
            await _problem(413, detail, headers={"connection": "close"})(scope, receive, send)
            return
        whole = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        await self._app(scope, again, send)


def _add_errors(app: FastAPI) -> None:
    async def of_body(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _problem(400, f"is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        place = [part for part in first["loc"] if part not in ("body", "ActionBody", "list[ActionBody]")]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
        return _problem(400, f"{field}: {first['msg'].removeprefix('Value error, ')}", field)

    async def of_field(_: Request, error: Any) -> JSONResponse:
        return _problem(400, f"{error.field}: {error}".removeprefix(": "), error.field)

    async def of_call(_: Request, error: Any) -> JSONResponse:
        status = HTTP_STATUS.get(error.code, 500)
        field = _json_field(error.message) if status in (400, 401, 409) else ""
        headers = {}
        if status == 429:
            wait_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
            headers["retry-after"] = str(max(int(-(-wait_s // 1)), 1))
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        return _problem(status, error.message, field, error.code.name, headers)

    async def of_log(_: Request, error: Any) -> JSONResponse:
        log.error("actions were not stored: %s", error)
        detail = "not all actions were stored: send them again, with the same event_id where you gave one"
        return _problem(503, detail, code="UNAVAILABLE", headers={"retry-after": str(RETRY_AFTER_S)})

    async def of_http(_: Request, error: Any) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    async def of_bug(_: Request, __: Any) -> JSONResponse:
        return _problem(500, "internal error", code="INTERNAL")

    for kind, handler in (
        (RequestValidationError, of_body),
        (FieldError, of_field),
        (RankError, of_call),
        (StreamError, of_log),
        (HTTPException, of_http),
        (Exception, of_bug),
    ):
        app.add_exception_handler(kind, handler)


def _problem(status: int, detail: str, field: str = "", code: str = "", headers: Mapping[str, str] | None = None) -> JSONResponse:
    problem = Problem(title=_TITLES.get(status, "Error"), status=status, detail=detail, field=field, code=code)
    return JSONResponse(problem.model_dump(), status, headers=dict(headers or {}), media_type=_PROBLEM)


def _json_field(message: str) -> str:
    """Which field of the body a refusal of the server is about; "" where it names none."""
    found = _FIELD.match(message)
    if found is None:
        return ""
    name, key = _OURS.get(found[1], found[1]), found[2]
    return name if not key else f"{name}[{key}]" if key.isdecimal() else f"{name}.{key}"


def _request(domain: Domain, body: RankBody) -> RankRequest:
    ranker, fields = rank_fields(domain, body)
    return rank_request(ranker, body.user, body.candidates, **fields)


def _going_along(body: RankBody, authorization: str, traceparent: str) -> dict[str, Any]:
    """Arguments of the client's call beside its request."""
    return {"timeout_s": body.timeout_ms / 1e3, "traceparent": traceparent, "token": _bearer(authorization)}


def _bearer(authorization: str) -> str:
    kind, _, token = authorization.partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def http_door(settings: Settings) -> int:
    """Serves until SIGTERM; returns the exit code. `settings` name Kafka and the ranking servers.

    Raises:
        StreamError: no broker, or no actions topic.
        OSError: the port cannot be bound, or a certificate cannot be read.
    """
    set_up_logging(settings)
    domain = product(settings)
    producer = ActionProducer(kafka_config(settings), domain, settings.topic_actions, base=settings.log_base)
    listener = bound("http_port", settings.http_host, settings.http_port)
    scheme = "http" if settings.tls_certificate is None else "https"
    host = f"[{settings.http_host}]" if ":" in settings.http_host else settings.http_host
    address = f"{scheme}://{host}:{listener.getsockname()[1]}"

    async def serve() -> None:
        # No token of its own: the caller's is passed on.
        async with AsyncRankingClient(
            settings.server_address,
            root_certificate=settings.tls_authority,
            certificate=settings.tls_client_certificate,
            key=settings.tls_client_key,
            channels=settings.http_channels,
            throttled=False,  # one caller's refusals must not hold back another's calls
        ) as client:
            app = http_app(domain, client, producer, guard=guard(settings), body_bytes_max=settings.http_body_bytes_max)
            server = Guest(
                uvicorn.Config(
                    app,
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    ws="none",
                    server_header=False,
                    timeout_graceful_shutdown=5,
                    ssl_certfile=settings.tls_certificate,
                    ssl_keyfile=settings.tls_key,
                )
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
            log.info("the door is open at %s; its page is /docs", address)
            report_ready(address)
            await server.serve(sockets=[listener])

    try:
        asyncio.run(serve())
    finally:
        producer.close()
    return 0

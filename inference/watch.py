"""What an operator sees of one call: a trace where it is sampled, a log line where it was slow. Both are off by default, and then free.

The stages of a call come from `Telemetry.time`, so a span needs no code in the stage: spans are made when the call has ended, and sent in
batches by a thread of the OpenTelemetry SDK. The caller's `traceparent` decides whether a call is sampled; without one `trace_share` does.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from features.request_context import REQUEST_ID, TRACE_HEADERS
from inference.telemetry import LAPS, CallLaps, Telemetry

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

CHILDREN = ("admission", "wait_after", "read", "join_pack", "triton")
"""Stages that become spans of their own below the call's."""
_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Statuses that are the server's fault (OpenTelemetry's conventions for server spans); the others are the caller's."""
_EXPORT_TIMEOUT_S, _EXPORT_EVERY_MS = 3.0, 1000

Handler = Callable[[bytes, Any], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is seen of single calls; `deploy` reads it from settings.

    otlp_endpoint: URL that spans are posted to as OTLP/HTTP, such as http://collector:4318/v1/traces; "": no traces. trace_share: share of
    the calls without a traceparent that are traced, 0 to 1. slow_ms: a call that takes longer writes a log line; 0: none does.
    """

    otlp_endpoint: str = ""
    trace_share: float = 0.0
    slow_ms: float = 0.0
    service: str = "freshrank-server"


class CallWatch:
    """Watches the calls of one server. `watched` wraps a handler; `close` sends what is left."""

    def __init__(self, config: WatchConfig, telemetry: Telemetry) -> None:
        self._telemetry, self._slow_s = telemetry, config.slow_ms / 1e3
        self._traces = _Traces(config) if config.otlp_endpoint else None

    def watched(self, service: str, method: str, handler: Handler) -> Handler:
        """The handler, with its cancellations counted and its calls watched. `handler` takes the request's bytes and the gRPC context."""
        if self._traces is None and not self._slow_s:
            return self._counted(handler)

        async def watched(data: bytes, context: Any) -> Any:
            laps, started_s, started_ns = CallLaps(), time.monotonic(), time.time_ns()
            LAPS.set(laps)  # each call has a task, and with it a context, of its own
            span = self._traces.begin(service, method, context, started_ns) if self._traces is not None else None
            response, code = None, grpc.StatusCode.CANCELLED
            try:
                response = await handler(data, context)
                code = grpc.StatusCode.OK
            except asyncio.CancelledError:
                self._telemetry.count("cancelled")
                raise
            except BaseException:
                code = context.code() or grpc.StatusCode.UNKNOWN
                raise
            finally:
                seconds = time.monotonic() - started_s
                if self._slow_s and seconds >= self._slow_s:
                    _log_slow(method, code, seconds, laps, response)
                if self._traces is not None and span is not None:
                    self._traces.end(span, code, started_s, started_ns, seconds, laps, response)
            return response

        return watched

    def close(self) -> None:
        """Sends the spans that are left, for a few seconds at most; waits for the network: call it from a thread."""
        if self._traces is not None:
            self._traces.close()

    def _counted(self, handler: Handler) -> Handler:
        async def counted(data: bytes, context: Any) -> Any:
            try:
                return await handler(data, context)
            except asyncio.CancelledError:
                self._telemetry.count("cancelled")
                raise

        return counted


class _Traces:
    """The OpenTelemetry SDK, imported only where traces are wanted."""

    def __init__(self, config: WatchConfig) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.trace_share)),
            resource=Resource.create({"service.name": config.service}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY_MS))
        self._tracer = self._provider.get_tracer("freshrank")
        self._propagator = TraceContextTextMapPropagator()
        self._in_context, self._server, self._error = set_span_in_context, SpanKind.SERVER, Status(StatusCode.ERROR)

    def begin(self, service: str, method: str, context: Any, started_ns: int) -> "Span":
        """The call's span; where it is sampled, the calls that it makes carry its context (Triton takes a context for a wish to trace)."""
        given = {key: value for key, value in context.invocation_metadata() or () if key in ("traceparent", "tracestate")}
        parent = self._propagator.extract(given)
        span = self._tracer.start_span(f"{service}/{method}", parent, self._server, start_time=started_ns)
        if span.is_recording():
            span.set_attributes({"rpc.system": "grpc", "rpc.service": service, "rpc.method": method})
            headers: dict[str, str] = {}
            self._propagator.inject(headers, self._in_context(span))
            TRACE_HEADERS.set(tuple(headers.items()))
        return span

    def end(
        self, span: "Span", code: grpc.StatusCode, started_s: float, started_ns: int, seconds: float, laps: CallLaps, response: Any
    ) -> None:
        """Ends the call's span and makes those of its stages."""
        if not span.is_recording():
            return
        parent = self._in_context(span)
        for stage, end_s, lap_s in laps.laps:
            if stage in CHILDREN:
                end_ns = started_ns + round((end_s - started_s) * 1e9)
                child = self._tracer.start_span(stage, parent, start_time=end_ns - round(lap_s * 1e9))
                child.end(end_ns)
        span.set_attributes({"rpc.grpc.status_code": code.value[0], **_said(response)})
        if code in _FAULTS:
            span.set_status(self._error)
        span.end(started_ns + round(seconds * 1e9))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.force_flush(round(_EXPORT_TIMEOUT_S * 1e3))
        self._provider.shutdown()


def _said(response: Any) -> dict[str, str]:
    """What names a ranking, and nobody."""
    said = {"freshrank.request_id": str(REQUEST_ID.get())} if REQUEST_ID.get() else {}
    if getattr(response, "release_id", ""):
        said |= {"freshrank.release_id": response.release_id, "freshrank.tier": str(response.tier)}
    return said


def _log_slow(method: str, code: grpc.StatusCode, seconds: float, laps: CallLaps, response: Any) -> None:
    stages_ms = {stage: round(lap_s * 1e3, 3) for stage, _, lap_s in laps.laps if stage != "total"}
    shown = _shown(stages_ms.items())
    fields = {"method": method, "code": code.name, "total_ms": round(seconds * 1e3, 3), "stages_ms": stages_ms, **_said(response)}
    log.warning("slow: %s took %.1f ms, %s: %s", method, seconds * 1e3, code.name, shown, extra={"fields": fields})


def _shown(stages_ms: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages_ms) or "no stage ended"

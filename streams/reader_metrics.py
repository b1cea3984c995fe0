"""What a reader process counts of its calls, and its Prometheus metrics. `METRICS` is the whole list: dashboard, alerts and the table in
docs/operations.md are checked against it.
"""

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from features.described import Described, exposed

PREFIX = "freshrank_reader_"
METRICS = (
    Described(
        "shed_total",
        "counter",
        "service",
        "Calls refused with RESOURCE_EXHAUSTED: too many, of one client or of all, or too many watches.",
    ),
    Described("refused_total", "counter", "reason", "Calls refused for who called: token, permission, too many of one client at once."),
)
_REFUSED = "refused_"


def exposed_names() -> set[str]:
    """Every name that a query may use."""
    return exposed(PREFIX, METRICS)


class Calls(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses more calls at once than `calls_max`, and counts what was refused for want of room, by service, whoever of the server did it.

    It stands before every other interceptor, and runs on the server's event loop. gRPC's own bound of calls would do no worse, but nobody
    hears of what it refuses.
    """

    def __init__(self, calls_max: int, services: Iterable[str]) -> None:
        self._calls_max, self._calls = calls_max, 0
        self._shed = Counter(dict.fromkeys(services, 0))
        self._handlers: dict[str, tuple[Any, Any]] = {}

    @property
    def shed(self) -> Mapping[str, int]:
        """Calls refused with RESOURCE_EXHAUSTED since the start, by the full name of their service."""
        return dict(self._shed)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The method's handler behind the count; None where there is no such method (UNIMPLEMENTED)."""
        handler = await continuation(details)
        if handler is None:
            return None
        known = self._handlers.get(details.method)
        if known is None or known[0] is not handler:
            known = self._handlers[details.method] = (handler, self._behind(details.method.split("/")[1], handler))
        return known[1]

    def _behind(self, service: str, handler: Any) -> Any:
        name = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        behaviour = getattr(handler, name)
        inside = self._stream(service, behaviour) if inspect.isasyncgenfunction(behaviour) else self._call(service, behaviour)
        make = getattr(grpc, f"{name}_rpc_method_handler")
        return make(inside, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer)

    def _call(self, service: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            self._calls += 1
            try:
                await self._room(context)
                return await behaviour(request, context)
            finally:
                self._leave(service, context)

        return call

    def _stream(self, service: str, behaviour: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            self._calls += 1
            try:
                await self._room(context)
                async for answer in behaviour(request, context):
                    yield answer
            finally:
                self._leave(service, context)

        return stream

    async def _room(self, context: Any) -> None:
        if self._calls > self._calls_max:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._calls_max} calls are under way: try again later, or another reader"
            )

    def _leave(self, service: str, context: Any) -> None:
        self._calls -= 1
        self._shed[service] += context.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


class ReaderMetrics(Collector):
    """Collects and exposes. door: `features.ports.Door.statistics`. `ready` is set by who looks whether the views can be read."""

    def __init__(self, calls: Calls, door: Callable[[], Mapping[str, float]]) -> None:
        self._calls, self._door = calls, door
        self.ready = False
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client's Collector."""
        refused = {name.removeprefix(_REFUSED): count for name, count in self._door().items() if name.startswith(_REFUSED)}
        found: dict[str, Mapping[str, float]] = {"shed_total": self._calls.shed, "refused_total": refused}
        for metric in METRICS:
            family = CounterMetricFamily(PREFIX + metric.name, metric.help, labels=[metric.label])
            for label, value in sorted(found[metric.name].items()):
                family.add_metric([label], float(value))
            yield family

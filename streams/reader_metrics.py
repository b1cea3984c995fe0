"""What a reader process counts of its calls, and its Prometheus metrics. `METRICS` is the whole list: dashboard, alerts and the table in
docs/operations.md are checked against it.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from features.described import Described, exposed
from streams.interception import Around, Call, Stream

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


class Calls(Around):
    """Refuses more calls at once than `calls_max`, and counts what was refused for want of room, by service, whoever of the server did it.

    It stands before every other interceptor, and runs on the server's event loop. gRPC's own bound of calls would do no worse, but nobody
    hears of what it refuses.
    """

    def __init__(self, calls_max: int, services: Iterable[str]) -> None:
        super().__init__()
        self._calls_max, self._calls = calls_max, 0
        self._shed = Counter(dict.fromkeys(services, 0))

    @property
    def shed(self) -> Mapping[str, int]:
        """Calls refused with RESOURCE_EXHAUSTED since the start, by the full name of their service."""
        return dict(self._shed)

    def call(self, method: str, behaviour: Call) -> Call:
        """See `Around`."""

        async def call(request: Any, context: Any) -> Any:
            self._calls += 1
            try:
                await self._room(context)
                return await behaviour(request, context)
            finally:
                self._leave(method, context)

        return call

    def stream(self, method: str, behaviour: Stream) -> Stream:
        """See `Around`."""

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            self._calls += 1
            try:
                await self._room(context)
                async for answer in behaviour(request, context):
                    yield answer
            finally:
                self._leave(method, context)

        return stream

    async def _room(self, context: Any) -> None:
        if self._calls > self._calls_max:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._calls_max} calls are under way: try again later, or another reader"
            )

    def _leave(self, method: str, context: Any) -> None:
        self._calls -= 1
        self._shed[method.split("/")[1]] += context.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


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

"""Prometheus metrics of a ranking server. `METRICS` is the whole list: name, kind, label and help of each; dashboard, alerts and the table
in docs/operations.md are checked against it.

Counters and histograms come from `Telemetry`; the figures of the parts (releases, ranking log) are asked for when a scrape comes. One that
a part does not have is exposed without a sample.
"""

import time
from collections.abc import Callable, Iterable, Mapping

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from features.described import Described, Histogram, exposed
from inference.served import Served
from inference.telemetry import STAGES, Telemetry
from protos.v1.ranking_pb2 import TIER_UNSPECIFIED, Tier

PREFIX = "freshrank_server_"

CODES = (
    "ok",
    "invalid_argument",
    "failed_precondition",
    "resource_exhausted",
    "deadline_exceeded",
    "unavailable",
    "data_loss",
    "internal",
)
"""Statuses that are exposed as 0 from the start: a rate cannot see a counter's first value."""

METRICS = (
    Described("stage_seconds", "histogram", "stage", "Time of each stage of a ranking; total: from the call to its answer."),
    Described("loop_lag_seconds", "histogram", "", "How late the event loop was to a timer, looked at 20 times a second."),
    Described("candidates", "histogram", "", "Candidates of a ranking."),
    Described("sequence_age_seconds", "histogram", "", "Age of the newest action that the model saw, at the request's time."),
    Described("state_age_seconds", "histogram", "", "For how long the state that was read had not included the log's end."),
    Described("rankings_total", "counter", "tier", "Rankings answered, by the tier that made them."),
    Described(
        "rankings_degraded_total",
        "counter",
        "",
        "Rankings made by a lower tier than the request, or its arm, was to get.",
        "rankings_degraded",
    ),
    Described("calls_total", "counter", "code", "Calls that were answered, by gRPC status."),
    Described("cancelled_total", "counter", "", "Calls whose caller was gone before the answer.", "cancelled"),
    Described("shed_total", "counter", "", "Rankings refused at the door with RESOURCE_EXHAUSTED.", "shed"),
    Described("refused_total", "counter", "reason", "Calls refused for who called: token, permission, too many of one client at once."),
    Described("sequences_total", "counter", "source", "Rankings by where their sequence came from; none: no state answered."),
    Described("after_not_reached_total", "counter", "", "Rankings that did not include a position of `after` yet.", "after_not_reached"),
    Described("cold_starts_total", "counter", "", "Rankings for users without an action in the store.", "cold_starts"),
    Described("missing_users_total", "counter", "", "Rankings for users without a vector in the user space.", "missing_users"),
    Described("missing_candidates_total", "counter", "", "Candidates without a vector in the item space.", "missing_candidates"),
    Described("sequence_items_total", "counter", "", "Items of sequences that models saw.", "sequence_items"),
    Described("missing_sequence_items_total", "counter", "", "Those of them without a vector in the item space.", "missing_sequence_items"),
    Described("taken_down_candidates_total", "counter", "", "Candidates that are taken down.", "taken_down_candidates"),
    Described("model_failures_total", "counter", "cause", "Rankings that a lower tier had to make since the model gave no answer."),
    Described("models_in_use", "gauge", "", "Models whose breaker is closed: they are asked.", "releases_models_in_use"),
    Described("model_trips_total", "counter", "", "Times that a breaker took a model out of use.", "releases_model_trips"),
    Described("rankers", "gauge", "", "Rankers that are served.", "releases_rankers"),
    Described("switches_total", "counter", "", "Releases or generations switched to.", "releases_switches"),
    Described("switch_failures_total", "counter", "", "Switches that failed; the log says why.", "releases_switch_failures"),
    Described(
        "formulas_refused_total", "counter", "", "Announced formulas that a release cannot use; the former stays.", "formula_refused"
    ),
    Described("release_age_seconds", "gauge", "ranker", "Since the release in use was made."),
    Described("table_age_seconds", "gauge", "space", "Since the data of the table generation in use was read; the oldest one."),
    Described(
        "log_dropped_total",
        "counter",
        "",
        "Ranking-log records lost: at a full queue, or not to be made.",
        "log_dropped",
    ),
    Described("log_failed_total", "counter", "", "Ranking-log records that Kafka did not take.", "sink_failed"),
    Described(
        "log_queued",
        "gauge",
        "",
        "Ranking-log records that Kafka has not confirmed yet, or whose confirmation waits up to 100 ms to be read.",
        "sink_queued",
    ),
    Described("in_flight", "gauge", "", "Rankings under way.", "in_flight"),
    Described("waiting", "gauge", "", "Rankings that wait for a place at the door.", "waiting"),
    Described("limit", "gauge", "", "Most rankings in work at once, as the latency has it now.", "limit"),
    Described("ready", "gauge", "", "1: loaded, warm and not draining."),
    Described("resident_memory_bytes", "gauge", "", "Resident memory of the server's process."),
    Described("cpu_seconds_total", "counter", "", "CPU time of the server's process, all threads."),
    Described("beside_in_use", "gauge", "", "Releases of arms and shadows that are loaded and warm.", "releases_beside_in_use"),
    Described("arm_fallbacks_total", "counter", "", "Rankings that the served release made in the place of an arm's.", "arm_fallbacks"),
    Described("shadows_total", "counter", "", "Requests that a release scored in the shadow.", "shadow_logged"),
    Described("shadows_dropped_total", "counter", "", "Shadows not scored: too many, or rankings waited.", "shadow_dropped"),
)


def exposed_names() -> set[str]:
    """Every name that a query may use."""
    return exposed(PREFIX, METRICS)


class ServerMetrics(Collector):
    """Collects and exposes; asked on the event loop, for a millisecond or so.

    telemetry: the service's; figures: flat numbers of its parts (the sources of METRICS that telemetry has not); served: what is served by
    ranker; ready: whether the server takes calls.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        figures: Callable[[], Mapping[str, float]],
        served: Callable[[], Mapping[str, Served]],
        ready: Callable[[], bool],
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._telemetry, self._figures, self._served, self._ready, self._clock_s = telemetry, figures, served, ready, clock_s
        self._process = psutil.Process()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client's Collector."""
        counts = self._telemetry.counts()
        figures: dict[str, float] = {**counts, **self._figures()}
        found: dict[str, Mapping[str, float]] = {
            "rankings_total": {_tier(name): counts.get(name.lower(), 0) for name, number in Tier.items() if number != TIER_UNSPECIFIED},
            "calls_total": {**dict.fromkeys(CODES, 0), **_by_code(counts)},
            "sequences_total": {source: counts.get(f"sequence_{source}", 0) for source in _SOURCES},
            "model_failures_total": {cause: counts.get(f"model_{key}", 0) for cause, key in _CAUSES.items()},
            "refused_total": {name.removeprefix(_REFUSED): count for name, count in figures.items() if name.startswith(_REFUSED)},
            "ready": {"": float(self._ready())},
            **self._ages(),
        }
        with self._process.oneshot():
            times = self._process.cpu_times()
            found["resident_memory_bytes"] = {"": self._process.memory_info().rss}
            found["cpu_seconds_total"] = {"": times.user + times.system}
        histograms = self._telemetry.histograms()
        for metric in METRICS:
            if metric.name == "stage_seconds":
                yield _histogram(metric, {stage: self._telemetry.stages()[stage] for stage in STAGES})
            elif metric.kind == "histogram":
                yield _histogram(metric, {"": histograms[metric.name]})
            elif metric.source:
                # What only telemetry counts has not happened yet where it is absent; a part's figure that is absent is not known.
                of_a_part = metric.source.startswith(("releases_", "sink_", "reader_"))
                value = figures.get(metric.source, None if of_a_part else 0)
                yield _family(metric, {} if value is None else {"": value})
            else:
                yield _family(metric, found[metric.name])

    def _ages(self) -> dict[str, dict[str, float]]:
        now_ms = self._clock_s() * 1e3
        releases, tables = {}, dict[str, float]()
        for ranker, served in self._served().items():
            releases[ranker] = (now_ms - served.release.created_ms) / 1e3
            held = served.packer.tables
            for generation in filter(None, (held.items, held.users, held.features, held.takedowns)):
                age_s = (now_ms - generation.created_ms) / 1e3
                tables[generation.space] = max(age_s, tables.get(generation.space, age_s))
        return {"release_age_seconds": releases, "table_age_seconds": tables}


_CAUSES = {"timeout": "timeouts", "unavailable": "unavailable", "no_time": "no_time"}
_REFUSED = "door_refused_"
_SOURCES = ("local", "owner", "older", "none")


def _tier(name: str) -> str:
    return name.removeprefix("TIER_").lower()


def _by_code(counts: Mapping[str, float]) -> dict[str, float]:
    refused = {name.removeprefix("status_"): count for name, count in counts.items() if name.startswith("status_")}
    return {"ok": counts.get("rankings", 0), **refused}


def _histogram(metric: Described, values: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(PREFIX + metric.name, metric.help, labels=[metric.label] if metric.label else None)
    for label, histogram in values.items():
        family.add_metric([label] if metric.label else [], histogram.buckets(), histogram.total)
    return family


def _family(metric: Described, values: Mapping[str, float]) -> Metric:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(PREFIX + metric.name, metric.help, labels=[metric.label] if metric.label else None)
    for label, value in sorted(values.items()):
        family.add_metric([label] if metric.label else [], float(value))
    return family

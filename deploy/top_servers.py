"""What `freshrank top` shows of the ranking servers: two looks at each server's /metrics, and what happened between them."""

import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urljoin

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from deploy.wording import duration

_TIMEOUT_S = 2.0

Labels = tuple[tuple[str, str], ...]
Look = Mapping[tuple[str, Labels], float]
"""Every sample of one scrape by name (without the prefix) and labels."""


@dataclass(frozen=True)
class ServerRow:
    """One server between two looks. Times in milliseconds, None where nothing was ranked (or the state's age is not known)."""

    ready: bool
    rankings_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    tiers: dict[str, float]
    """Share of each tier that made a ranking."""
    shed_per_s: float
    cancelled_per_s: float
    state_age_p99_ms: float | None
    in_flight: int
    models: str
    """Models in use of rankers served."""
    log_dropped: int
    """Since the server's start."""


def look(urls: Sequence[str]) -> dict[str, Look | None]:
    """Scrapes every server at once; None where one does not answer."""
    with ThreadPoolExecutor(max(len(urls), 1)) as pool:
        return dict(zip(urls, pool.map(_scrape, urls), strict=True))


def between(before: Look | None, after: Look | None, seconds: float) -> ServerRow | None:
    """What a server did between two looks; since its start where there was none before, or where it has started anew."""
    if after is None:
        return None
    total = ("stage_seconds_count", (("stage", "total"),))
    if before is None or before.get(total, 0) > after.get(total, 0):
        before = {}

    def moved(name: str) -> float:
        return sum(value - before.get((other, labels), 0) for (other, labels), value in after.items() if other == name)

    tiers = {
        dict(labels)["tier"]: value - before.get((name, labels), 0) for (name, labels), value in after.items() if name == "rankings_total"
    }
    ranked = sum(tiers.values())
    return ServerRow(
        ready=_value(after, "ready") == 1,
        rankings_per_s=round(ranked / seconds, 1),
        p50_ms=_quantile_ms(before, after, "stage_seconds", 0.5, ("stage", "total")),
        p99_ms=_quantile_ms(before, after, "stage_seconds", 0.99, ("stage", "total")),
        tiers={tier: round(count / ranked, 3) for tier, count in tiers.items() if count} if ranked else {},
        shed_per_s=round(moved("shed_total") / seconds, 1),
        cancelled_per_s=round(moved("cancelled_total") / seconds, 1),
        state_age_p99_ms=_quantile_ms(before, after, "state_age_seconds", 0.99),
        in_flight=int(_value(after, "in_flight")),
        models=f"{_value(after, 'models_in_use'):.0f} of {_value(after, 'rankers'):.0f}",
        log_dropped=int(_value(after, "log_dropped_total") + _value(after, "log_failed_total")),
    )


def as_json(rows: Mapping[str, ServerRow | None]) -> dict[str, Any]:
    """For programs."""
    return {url: row and asdict(row) for url, row in rows.items()}


def table(rows: Mapping[str, ServerRow | None]) -> Table:
    """For a terminal."""
    shown = Table("server", "rankings/s", "p50", "p99", "tiers", "shed/s", "state age p99", "under way", "models", "log drops")
    for url, row in rows.items():
        name = url.removeprefix("http://").rstrip("/")
        if row is None:
            shown.add_row(name, "does not answer", style="red")
            continue
        tiers = ", ".join(f"{tier} {share:.0%}" for tier, share in sorted(row.tiers.items(), key=lambda pair: -pair[1]))
        cells = [f"{row.rankings_per_s:.1f}", _ms(row.p50_ms), _ms(row.p99_ms), tiers or "-", f"{row.shed_per_s:.1f}"]
        cells += [_ms(row.state_age_p99_ms), str(row.in_flight), row.models, str(row.log_dropped)]
        degraded = row.tiers and row.tiers.get("model", 0) < 0.95
        shown.add_row(name + ("" if row.ready else " (not ready)"), *cells, style="" if row.ready and not degraded else "yellow")
    return shown


def _ms(value: float | None) -> str:
    return "-" if value is None else duration(value / 1e3)


def _value(samples: Look, name: str) -> float:
    return samples.get((name, ()), 0.0)


def _quantile_ms(before: Look, after: Look, name: str, share: float, *labels: tuple[str, str]) -> float | None:
    """A quantile of what a histogram counted between two looks, by Prometheus' own rule: linear within a bucket."""
    counted = []
    for (found, given), value in after.items():
        said = dict(given)
        if found == f"{name}_bucket" and all(said.get(key) == text for key, text in labels):
            counted.append((float(said["le"]), value - before.get((found, given), 0)))
    counted.sort()
    if not counted or counted[-1][1] <= 0:
        return None
    wanted, low, below = share * counted[-1][1], 0.0, 0.0
    for bound, count in counted:
        if count >= wanted:
            if bound == float("inf"):
                return round(low * 1e3, 3)
            return round((low + (bound - low) * (wanted - below) / max(count - below, 1e-9)) * 1e3, 3)
        low, below = bound, count
    return None


def _scrape(url: str) -> Look | None:
    from inference.server_metrics import PREFIX  # brings the server's libraries along, which other commands need not load

    try:
        with urllib.request.urlopen(urljoin(url, "/metrics"), timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
        return {
            (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except (OSError, ValueError):
        return None

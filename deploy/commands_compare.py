"""`freshrank compare`: two releases by what the ranking log has of them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy.options import DomainFile, Home, RankerName, settings_for
from deploy.wording import now_ms, parse_time

_FIGURES = {"correlation": "correlation", "kendall_tau": "Kendall tau", "top3_overlap": "top-3 overlap"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(compare)


def compare(
    base: Annotated[str, typer.Option(help="Release, as a rule the served one.")],
    other: Annotated[str, typer.Option(help="Release that scored in its shadow, or served an arm.")],
    since: Annotated[str | None, typer.Option(help="Only rankings from this time on: 2026-07-01T12:00:00Z, or an age: 1h.")] = None,
    archive: Annotated[Path | None, typer.Option(help="Archive folder; Kafka where absent.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG file; beside the JSON file where absent.")] = None,
    ranker: RankerName = None,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Compare two releases: scores and orders of requests that both scored (a shadow), latency, tiers, and arms side by side.

    Example: `freshrank compare --base home-20260701T120000Z-0123abcd --other home-20260708T120000Z-89abcdef --since 1h`
    """
    from deploy.ranking_records import ranking_records
    from deploy.stack import running
    from features.domain import load_domain
    from inference.comparison import Comparison
    from inference.plots import plot_releases

    settings = settings_for(home, domain)
    if base == other:
        raise typer.BadParameter("is --base, too; name two releases", param_hint="--other")
    ranker = load_domain(settings.domain).ranker_name(ranker)
    since_ms = parse_time(since, now_ms(), "--since") if since is not None else 0
    if archive is None:
        settings = running(settings, needs="kafka")
    comparison = Comparison(base, other)
    for record in ranking_records(settings, archive, since_ms=since_ms):
        if record.request.ranker == ranker:
            comparison.add(record)
    result = comparison.result()
    for table in comparison_tables(result):
        Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    plot = plot or (json_file.with_suffix(".png") if json_file is not None else None)
    if plot is not None:
        plot_releases(result, plot)
    for side in ("base", "other"):
        if not result[side]["rankings"] + result[side]["shadows"]:
            raise typer.BadParameter(f"the log has no ranking of {result[side]['release_id']} in this time", param_hint=f"--{side}")


def comparison_tables(result: dict[str, Any]) -> list[Table]:
    """What `inference.comparison.Comparison.result` says, for a terminal: agreement, the two sides, and the arms where there are any."""
    agreement = Table("score", *_FIGURES.values(), title=f"{result['pairs']} requests that both scored: mean (p10 to p90)")
    for head, figures in result["scores"].items():
        agreement.add_row(head, *(_range(figures[name]) for name in _FIGURES))
    sides = _sides("release", [(result[side]["release_id"], result[side]) for side in ("base", "other")])
    tables = [agreement, sides]
    if result["arms"]:
        tables.append(_sides("arm", [(f"{arm['experiment']} / {arm['arm']} / {arm['release_id']}", arm) for arm in result["arms"]]))
    return tables


def _sides(what: str, rows: list[tuple[str, dict[str, Any]]]) -> Table:
    table = Table(what, "rankings", "shadows", "p50 ms", "p99 ms", "shadow p50 ms", "shadow p99 ms", "tiers", "mean scores")
    for name, side in rows:
        latencies = (side[kind][figure] for kind in ("latency_ms", "shadow_latency_ms") for figure in ("p50", "p99"))
        tiers = ", ".join(f"{tier.removeprefix('TIER_').lower()} {count}" for tier, count in side["tiers"].items())
        means = ", ".join(f"{head} {mean:.4f}" for head, mean in side["mean_scores"].items())
        table.add_row(name, str(side["rankings"]), str(side["shadows"]), *map(_number, latencies), tiers, means)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _range(figure: dict[str, float | None]) -> str:
    if figure["mean"] is None:
        return "-"
    return f"{figure['mean']:.3f} ({figure['p10']:.3f} to {figure['p90']:.3f})"

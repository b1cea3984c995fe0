"""`freshrank label`: what was served becomes what is trained on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.options import DomainFile, Home, console, settings_for
from deploy.wording import now_ms, parse_duration

if TYPE_CHECKING:
    from deploy.label_report import LabelReport
    from deploy.settings import Settings


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(label)


def label(
    window: Annotated[str, typer.Option(help="How long after its request an action may answer a list: 90s, 15m, 1h, 2d.")] = "1h",
    grace: Annotated[str, typer.Option(help="How long after its window a list is waited for; what comes later is late.")] = "10m",
    late: Annotated[str, typer.Option(help="How long after its window a list takes late actions, in a later pass.")] = "7d",
    unseen: Annotated[int, typer.Option(min=1, help="Most candidates of a list that are kept although nobody saw them.")] = 50,
    strict: Annotated[bool, typer.Option("--strict", help="Actions without a request id answer nothing; they are counted.")] = False,
    all_seen: Annotated[
        bool, typer.Option("--all-seen", help="The product logs no impressions: take every candidate that was served as seen.")
    ] = False,
    until_ms: Annotated[int | None, typer.Option(help="Judge lists as of this time, milliseconds; now where absent.")] = None,
    archive: Annotated[Path | None, typer.Option(help="Archive folder of both logs; Kafka where absent.")] = None,
    history: Annotated[str, typer.Option(help="Where the base's history lies now; where it was at the bootstrap if absent.")] = "",
    memory: Annotated[int, typer.Option(min=64, help="Megabytes that it may take, about.")] = 512,
    keep_days: Annotated[int | None, typer.Option(min=1, help="Leave out days of requests older than this.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Start the log over; what the topics have no longer is lost.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Label what was served: join the ranking log with impressions and actions, and prove each list's inputs by replay.

    Writes the served log (logs/DOMAIN.served in the home folder), which `freshrank train --served` reads. Run it again and again: a list is
    written when its window has passed, and gets late actions in later passes. A pass that was cut off is continued; readers see the log
    as it was before, or as it is after. The rules: docs/semantics.md, "Labels".

    Exits with 1 where inputs differ from those that were served, cannot be rebuilt, or something else must be looked at.

    Example: `freshrank label --window 30m`, then `freshrank train --served`
    """
    from deploy.labelling import served_folder
    from deploy.replay import replay_options
    from features.domain import DAY_MS, load_domain

    if until_ms is not None and until_ms > now_ms() + DAY_MS:
        raise typer.BadParameter("is far in the future: days would be closed before their actions are there", param_hint="--until-ms")
    settings = settings_for(home, domain)
    out = served_folder(settings.home, load_domain(settings.domain))
    report = label_logs(
        settings,
        window=window,
        grace=grace,
        late=late,
        unseen=unseen,
        strict=strict,
        all_seen=all_seen,
        replay=replay_options(settings, archive, history),
        until_ms=now_ms() if until_ms is None else until_ms,
        memory_bytes=memory << 20,
        keep_days=keep_days,
        rebuild=rebuild,
    )
    print(report.to_text())
    print(f"served log: {out}")
    if json_file is not None:
        everything = report.as_json() | {"ok": report.ok, "faults": report.faults, "seconds": report.seconds, "memory_mb": report.memory_mb}
        json_file.write_text(json.dumps(everything, indent=1) + "\n", "utf-8")
    raise typer.Exit(0 if report.ok else 1)


def label_logs(
    settings: "Settings", *, window: str, grace: str, late: str, all_seen: bool, unseen: int = 50, strict: bool = False, **options: Any
) -> "LabelReport":
    """Makes a pass over a home folder's logs, with a progress bar: `freshrank label` with these options, the rest being `LabelOptions`'."""
    from deploy.labelling import LabelOptions, label, served_folder
    from features.domain import load_domain
    from features.erasures import LEDGER
    from features.labels import Rules

    product = load_domain(settings.domain)
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=None, start=False) for name in ("rankings", "actions", "fold")}

        def progress(name: str, done: int, total: int) -> None:
            bars.start_task(tasks[name])
            bars.update(tasks[name], completed=done, total=total)

        found = Rules.of(
            product,
            window_ms=parse_duration(window, "--window"),
            grace_ms=parse_duration(grace, "--grace"),
            late_ms=parse_duration(late, "--late"),
            unseen_max=2**31 if all_seen else unseen,
            without_id=not strict,
        )
        where: dict[str, Any] = {"domain": product, "out": served_folder(settings.home, product), "ledger": settings.home / LEDGER}
        return label(LabelOptions(rules=found, progress=progress, all_seen=all_seen, **where, **options))

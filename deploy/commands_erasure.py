"""Commands about erasure: `erase`, `erase-job run` and `erase-job status`."""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.options import DomainFile, Home, Json, console, parse_id, position_text, settings_for
from deploy.settings import Settings

_ATTEMPTS = 3
_COLOURS = {"done": "green", "due": "yellow", "absent": "dim"}

jobs = typer.Typer(name="erase-job", help="What an erasure leaves to be done by its deadline.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(erase)
    app.add_typer(jobs)


def erase(
    user: Annotated[list[str], typer.Option(help="User id: a number, or text that is hashed. May be repeated: each id of one person.")],
    reason: Annotated[str, typer.Option(help="For the audit, where it stays: no personal data.")] = "asked by the user",
    event_id: Annotated[int | None, typer.Option(help="Of an erasure that failed: the number that it printed.")] = None,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Erase a user: the next ranking knows nothing of their past, nor does any later replay. Prints its position and its deadline.

    Several ids, such as the anonymous one before log-in, are erased together: a position each, in their order.

    Example: `freshrank erase --user 42 --user anonymous-17 --reason "ticket 17"`
    """
    from deploy.processes import erasure_deadline_ms, kafka_config
    from deploy.stack import running
    from features.domain import load_domain
    from streams.errors import ProduceError
    from streams.producer import ActionProducer

    settings = running(settings_for(home, domain), needs="kafka")
    identity = event_id or secrets.randbits(64) or 1
    producer = ActionProducer(kafka_config(settings), load_domain(settings.domain), settings.topic_actions, base=settings.log_base)
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                asked = [producer.erase_user(parse_id(one), reason, identity) for one in user]
                erased = [one.result() for one in asked]
                break
            except ProduceError as error:
                if attempt == _ATTEMPTS:
                    raise ProduceError(f"{error}; not known to be erased: run the command again with --event-id {identity}") from error
                console.print(f"not acknowledged, trying again with the same event id: {error}", soft_wrap=True)
    finally:
        producer.close()
    for one in erased:
        print(position_text(one))
    deadline = _time(max(one.append_time_ms for one in erased) + erasure_deadline_ms(settings))
    console.print(f"event id {identity}; nothing is left anywhere by {deadline}", soft_wrap=True)  # not to what scripts read


@jobs.command()
def run(
    archive: Annotated[list[Path] | None, typer.Option(help="Archive folder outside of the home folder; may be repeated.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no broker: only files.")] = False,
    as_json: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Do what erasures left to be done on this machine, and note it in the audit.

    For a scheduler: run it at least daily. A run may be cut off; the next one goes on.

    Exits with 1 where something is overdue, or erasures may have been missed.

    Example: `freshrank erase-job run --archive /backup/freshrank`
    """
    from dataclasses import asdict

    from deploy.processes import erasure_deadline_ms, kafka_config, topics
    from deploy.stack import running
    from features.domain import load_domain
    from streams.erasure import ErasureJob, run_job

    settings = settings_for(home, domain)
    if not offline:
        settings = running(settings, needs="kafka")
    job = ErasureJob(
        home=settings.home,
        domain=load_domain(settings.domain),
        deadline_ms=erasure_deadline_ms(settings),
        kafka=None if offline else kafka_config(settings),
        topics=topics(settings),
        archives=(*map(Path, settings.erasure_archives), *(archive or ())),
        expire_snapshots=_expire(settings) if settings.snapshot_url else None,
    )
    summary = run_job(job, _now_ms(), lambda text: console.print(text, style="dim", soft_wrap=True))
    for warning in summary.warnings:
        console.print(warning, style="red", soft_wrap=True)
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        removed = ", ".join(f"{count} in {place}" for place, count in summary.removed.items() if count) or "nothing"
        print(f"{summary.new} new erasures; removed: {removed}; {summary.due} with something due; {len(summary.overdue)} places overdue")
    raise typer.Exit(1 if summary.overdue or summary.warnings else 0)


@jobs.command()
def status(
    user: Annotated[str | None, typer.Option(help="User id; all erased users where absent.")] = None,
    as_json: Json = False,
    home: Home = None,
) -> None:
    """What was erased where, and what is still due by when. Exits with 1 where something is overdue.

    Example: `freshrank erase-job status --user 42`
    """
    from streams.erasure_audit import AUDIT, Audit

    settings = settings_for(home)
    entries = Audit(settings.home / AUDIT).of_user(None if user is None else parse_id(user))
    now_ms = _now_ms()
    overdue = any(entry.overdue(now_ms) for entry in entries)
    if as_json:
        print(
            json.dumps(
                [
                    {
                        **entry.last.to_json(),
                        "records": entry.records,
                        "asked_ms": entry.asked_ms,
                        "deadline_ms": entry.deadline_ms,
                        "places": {name: vars(place) for name, place in entry.places.items()},
                        "overdue": entry.overdue(now_ms),
                    }
                    for entry in entries
                ]
            )
        )
        raise typer.Exit(1 if overdue else 0)
    table = Table("user", "asked", "reason", "place", "status", "since / by", "detail", title="erasures")
    for entry in entries:
        head = [f"{entry.last.user_id:016x}", _time(entry.asked_ms), entry.first.reason]
        late = entry.overdue(now_ms)
        for name, place in entry.places.items():
            colour, text = ("bold red", "overdue") if name in late else (_COLOURS[place.status], place.status)
            when = f"by {_time(entry.deadline_ms)}" if place.status == "due" else _time(place.at_ms)
            table.add_row(*head, name, f"[{colour}]{text}[/]", when, place.detail)
            head = ["", "", ""]
        table.add_section()
    Console().print(table)
    if not entries:
        print("no erasure is noted here: `freshrank erase-job run` notes them")
    raise typer.Exit(1 if overdue else 0)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _time(time_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time_ms / 1000)) if time_ms else "never looked at"


def _expire(settings: Settings) -> Callable[[int], object]:
    """Removes the snapshots from before a time."""
    from streams.snapshots import Snapshots

    snapshots = Snapshots(settings.snapshot_url, options=json.loads(settings.snapshot_options.get_secret_value()))
    return lambda created_before_ms: snapshots.expire(settings.snapshot_keep, created_before_ms=created_before_ms)

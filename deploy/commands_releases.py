"""`freshrank releases`, `rollback` and `formula`: what is served and how its scores are made, changed while servers run."""

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy.options import DomainFile, Home, Json, RankerName, settings_for

if TYPE_CHECKING:
    from deploy.settings import Settings
    from inference.announced import Announced
    from inference.release import Release


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(releases)
    app.command()(rollback)
    app.command()(formula)


def releases(as_json: Json = False, home: Home = None, domain: DomainFile = None) -> None:
    """List the releases, newest first: which one is announced, and which ones were before it.

    Example: `freshrank releases`
    """
    from deploy.announcing import announced, formulas_of, releases_of
    from deploy.stack import StackNotRunningError, running

    settings = settings_for(home, domain)
    try:
        said = announced(running(settings, needs="kafka"))
    except StackNotRunningError:
        said = {}
    rows = _rows(settings, releases_of(said))
    formulas = formulas_of(said)
    if as_json:
        print(json.dumps({"releases": rows, "formulas": formulas}))
        return
    table = Table("release", "ranker", "created", "status", "trained with")
    for row in rows:
        trained = ", ".join(f"{space} {name}" for space, name in row["generations"].items())
        table.add_row(row["release_id"], row["ranker"], row["created"], row["status"], row["error"] or trained)
    Console().print(table)
    for ranker, text in sorted(formulas.items()):
        print(f"{ranker}: announced formula {text}")


def rollback(
    ranker: RankerName = None,
    to: Annotated[str, typer.Option("--to", help="Release id; the one before the present where absent.")] = "",
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Serve an earlier release again: every server switches, also those that start later. A second rollback goes further back.

    Example: `freshrank rollback --ranker home`
    """
    from deploy.announcing import announce_release, announced, releases_of
    from deploy.stack import running
    from features.domain import load_domain
    from inference.announced import back_to

    settings = running(settings_for(home, domain), needs="kafka")
    name = load_domain(settings.domain).ranker_name(ranker)
    present = releases_of(announced(settings)).get(name)
    target = to or (back_to(present) if present is not None else None)
    if target is None:
        stands = "nothing is announced" if present is None else f"no release older than {present.release_id} was announced before it"
        raise ValueError(f"rollback of {name}: {stands}; name one of `freshrank releases` with --to")
    release = _open(settings, target)
    if release.ranker != name:
        raise ValueError(f"--to: {target} is a release of ranker {release.ranker!r}, not of {name!r}")
    announce_release(settings, name, target, _now_ms())
    print(f"{present.release_id if present is not None else 'nothing announced'} -> {target}")


def formula(
    text: Annotated[str, typer.Argument(help="Over heads and number features, such as 'click - 2*hide'.", show_default=False)] = "",
    clear: Annotated[bool, typer.Option("--clear", help="The domain file's formula or utilities count again.")] = False,
    ranker: RankerName = None,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Change how final scores are made, on every server and without a deploy. Refused where it does not fit the served release.

    Example: `freshrank formula --ranker home "click - 2*hide"`
    """
    from deploy.announcing import announce_formula, announced, releases_of
    from deploy.stack import running
    from features.domain import load_domain
    from inference.announced import options
    from inference.formula import Formula

    if bool(text) == clear:
        raise typer.BadParameter("give a formula, or --clear", param_hint="TEXT")
    settings = running(settings_for(home, domain), needs="kafka")
    name = load_domain(settings.domain).ranker_name(ranker)
    if text:
        served = options(settings.home / "releases", releases_of(announced(settings))).get(name)
        if served is None:
            raise ValueError(f"formula: no release of {name} is there to check it with; publish one first")
        release = _open(settings, served[0].release_id)
        Formula(release.domain, name, text)
    announce_formula(settings, name, text, _now_ms())
    print(f"{name}: {text}" if text else f"{name}: the domain file's")


def _rows(settings: "Settings", said: "dict[str, Announced]") -> list[dict[str, Any]]:
    """Each release of the folder, newest first. status: "announced", "before" (announced earlier), or ""."""
    from inference.release import ReleaseError

    rows = []
    for folder in (settings.home / "releases").glob("*/manifest.json"):
        release_id = folder.parent.name
        ranker = release_id.partition("-")[0]
        one = said.get(ranker)
        status = "" if one is None else "announced" if one.release_id == release_id else "before" if release_id in one.previous else ""
        row: dict[str, Any] = {"release_id": release_id, "ranker": ranker, "created": "", "status": status, "generations": {}, "error": ""}
        try:
            release = _open(settings, release_id)
        except ReleaseError as error:
            row["error"] = str(error)
        else:
            row["created"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(release.created_ms / 1000))
            row["generations"] = dict(release.generations)
        rows.append(row)
    return sorted(rows, key=lambda row: str(row["release_id"]).partition("-")[2], reverse=True)


def _open(settings: "Settings", release_id: str) -> "Release":
    from inference.release import open_release, release_folder

    return open_release(release_folder(settings.home / "releases", release_id))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

"""`freshrank publish`, `releases`, `rollback`, `refresh` and `formula`: what is served and how it scores, changed while servers run."""

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

GATE_REFUSED = 3


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(publish)
    app.command()(releases)
    app.command()(rollback)
    app.command()(refresh)
    app.command()(formula)


def publish(
    ranker: RankerName = None,
    only: Annotated[bool, typer.Option("--only", help="Do not serve it: an experiment may name it.")] = False,
    release_id: Annotated[
        str, typer.Option("--release", help="Serve this one, published before with --only, say.", show_default=False)
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Also where the gate refuses; the manifest says so.")] = False,
    auc_loss_max: Annotated[float, typer.Option(help="How much lower a head's AUC may be where chance explains it.")] = 0.005,
    requests_min: Annotated[int, typer.Option(help="Requests that neither was trained on, which the gate needs.")] = 500,
    positives_min: Annotated[int, typer.Option(help="Labels that a head needs on them, to be judged.")] = 50,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Publish the trained ranker as a release; a running stack loads it, warms it and switches.

    First it is compared with the release that is served, on later requests that neither was trained on. Exit code 3: it is worse, or that
    cannot be judged, and nothing was published.

    Example: `freshrank publish --ranker home`; a canary that proved itself: `freshrank publish --release ID`
    """
    from deploy.announcing import announce_release, announced, releases_of
    from deploy.learn import judge_trained, now_ms, release
    from deploy.options import workspace
    from deploy.stack import StackNotRunningError, running
    from inference.announced import options
    from inference.gate import UNKNOWN, Limits, Verdict, gate_table
    from inference.release import ReleaseError

    if only and release_id:
        raise typer.BadParameter("--only does not serve it, --release does; give one of them", param_hint="--only")
    settings = settings_for(home, domain)
    work = workspace(settings)
    name = work.domain.ranker_name(ranker)
    try:
        stack = running(settings, needs="kafka")
        said = releases_of(announced(stack))
    except StackNotRunningError:
        stack, said = None, {}
    if release_id:
        _promote(settings, stack, name, release_id)
        return
    served = options(work.releases, said).get(name)
    limits = Limits(requests_min=requests_min, positives_min=positives_min, auc_loss_max=auc_loss_max)
    with work.alone_with(name, "freshrank publish"):
        try:
            verdict = judge_trained(work, name, None if served is None else _open(settings, served[0].release_id), limits)
        except ReleaseError as error:
            verdict = Verdict(UNKNOWN, (f"what is served cannot be opened: {error}",))
        console = Console(stderr=True)
        if verdict.heads:
            console.print(gate_table(verdict))
        console.print(f"gate: {verdict.decision}: {'; '.join(verdict.reasons)}", soft_wrap=True, markup=False)
        if not verdict.passed and not force:
            console.print("nothing was published; --force publishes it all the same", markup=False)
            raise typer.Exit(GATE_REFUSED)
        written = release(work, name, verdict.for_manifest(), only=only)
    print(written.release_id)
    if only:
        return
    if stack is None:
        console.print("no stack runs: the next `freshrank up` serves it")
    else:
        announce_release(stack, name, written.release_id, now_ms())


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


def refresh(ranker: RankerName = None, as_json: Json = False, home: Home = None, domain: DomainFile = None) -> None:
    """Make the item vectors of the present hour from what users did, and serve them: of a ranker with `refresh`. One tick.

    Call it from a scheduler, some minutes past every hour. What is there already is not made again, so a tick may be repeated, and one that
    was cut off is made good by the next.

    Example: `freshrank refresh --ranker news`
    """
    from deploy.announcing import announce_release, announced, releases_of
    from deploy.experiments import announced_experiments
    from deploy.learn import now_ms
    from deploy.stack import running
    from features.domain import load_domain
    from features.tables import TableError
    from inference.announced import options
    from inference.embeddings import EmbeddingError
    from inference.experiments import needed
    from inference.release import ReleaseError

    settings = running(settings_for(home, domain), needs="kafka")
    name = load_domain(settings.domain).ranker_name(ranker)
    served = options(settings.home / "releases", releases_of(announced(settings))).get(name)
    if served is None:
        raise ValueError(f"refresh: no release of {name} is there; publish one first")
    release_id, experiment = served[0].release_id, announced_experiments(settings).get(name)
    for beside in sorted((set() if experiment is None else needed(experiment)) - {release_id}):
        try:  # first: servers open the newest vectors of these when the served release gets others
            _refreshed(settings, beside)
        except (EmbeddingError, ReleaseError, TableError) as error:
            Console(stderr=True).print(f"of the experiment: {error}", markup=False)
    newest = _refreshed(settings, release_id)
    now = options(settings.home / "releases", releases_of(announced(settings)))[name][0]  # somebody may have gone back meanwhile
    tell = now.release_id == release_id and not newest.items() <= dict(now.generations).items()
    if tell:
        announce_release(settings, name, release_id, now_ms(), {**now.generations, **newest})
    said = {"release_id": release_id, "generations": newest, "announced": tell}
    print(json.dumps(said) if as_json else "\n".join(f"{space}: {generation}" for space, generation in newest.items()))


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


def _refreshed(settings: "Settings", release_id: str) -> dict[str, str]:
    """Makes the present hour's vectors for a release; the newest generations of its spaces. Raises what `refresh_tables` raises."""
    from deploy.learn import now_ms, refresh_tables
    from deploy.options import workspace
    from deploy.processes import kafka_config, topics
    from streams.archive import KafkaLog

    log = KafkaLog(kafka_config(settings), topics(settings).actions, topics(settings).base)
    try:
        return refresh_tables(workspace(settings), _open(settings, release_id), log, now_ms())
    finally:
        log.close()


def _promote(settings: "Settings", stack: "Settings | None", ranker: str, release_id: str) -> None:
    """Announces a release that is there already."""
    from deploy.announcing import announce_release

    release = _open(settings, release_id)
    if release.ranker != ranker:
        raise ValueError(f"--release: {release_id} is a release of ranker {release.ranker!r}, not of {ranker!r}")
    if stack is None:
        raise ValueError("--release: no stack runs that could be told; start it with `freshrank up` first")
    announce_release(stack, ranker, release_id, _now_ms())
    print(release_id)


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

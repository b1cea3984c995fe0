"""`freshrank experiment`: who gets which release."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy.options import DomainFile, Home, Json, RankerName, settings_for
from deploy.wording import iso, now_ms

if TYPE_CHECKING:
    from protos.v1.ranking_pb2 import Experiment


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    experiment = typer.Typer(
        help="Route users to releases and controls, and score in the shadow.\n\n"
        "Example: `freshrank experiment set --name exp1 --arm canary=home-20260701T120000Z-0123abcd:5% --arm noop:1%`",
        no_args_is_help=True,
    )
    experiment.command("set")(set_experiment)
    experiment.command("show")(show_experiments)
    experiment.command("stop")(stop_experiment)
    app.add_typer(experiment, name="experiment")


def set_experiment(
    name: Annotated[str, typer.Option(help="Its name, which decides who is in which arm: a new name spreads the users anew.")],
    arm: Annotated[
        list[str] | None, typer.Option(help="NAME=RELEASE:SHARE%, noop:SHARE% (the caller's order) or shuffleN:SHARE%; may be repeated.")
    ] = None,
    shadow: Annotated[list[str] | None, typer.Option(help="RELEASE:SHARE% of the requests; may be repeated.")] = None,
    ranker: RankerName = None,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Start a ranker's experiment, or put another in its place. Users beyond the arms get the served release.

    Arms that are added at the end move nobody between the others. Releases are loaded and warm before they take part.

    Example: `freshrank experiment set --name exp1 --arm canary=home-20260701T120000Z-0123abcd:5% --arm shuffle3:1%`
    """
    from deploy.experiments import announce_experiment, check_experiment, make_experiment
    from deploy.stack import running
    from features.domain import load_domain

    settings = settings_for(home, domain)
    ranker = load_domain(settings.domain).ranker_name(ranker)
    experiment = make_experiment(ranker, name, arm or (), shadow or (), now_ms())
    check_experiment(experiment, settings.home / "releases")
    announce_experiment(running(settings, needs="kafka"), ranker, experiment)
    Console().print(experiments_table({ranker: experiment}))


def show_experiments(as_json: Json = False, home: Home = None, domain: DomainFile = None) -> None:
    """Show the experiments that run.

    Example: `freshrank experiment show`
    """
    from deploy.experiments import announced_experiments
    from deploy.stack import running

    found = announced_experiments(running(settings_for(home, domain), needs="kafka"))
    if as_json:
        print(json.dumps([_fields(experiment) for experiment in found.values()]))
    elif found:
        Console().print(experiments_table(found))
    else:
        print("no experiment runs")


def stop_experiment(ranker: RankerName = None, home: Home = None, domain: DomainFile = None) -> None:
    """Stop a ranker's experiment: everybody gets the served release.

    Example: `freshrank experiment stop --ranker home`
    """
    from deploy.experiments import announce_experiment
    from deploy.stack import running
    from features.domain import load_domain

    settings = settings_for(home, domain)
    ranker = load_domain(settings.domain).ranker_name(ranker)
    announce_experiment(running(settings, needs="kafka"), ranker, None)
    print(f"ranker {ranker}: everybody gets the served release")


def _what(arm: Any) -> str:
    if arm.release_id:
        return str(arm.release_id)
    return "the caller's order" if arm.noop else f"shuffled by at most {arm.shuffle} places"


def _fields(experiment: "Experiment") -> dict[str, Any]:
    return {
        "ranker": experiment.ranker,
        "name": experiment.name,
        "announced_time_ms": experiment.announced_time_ms,
        "arms": [{"name": arm.name, "share": arm.share / 10_000, "what": _what(arm)} for arm in experiment.arms],
        "shadows": [{"release_id": shadow.release_id, "share": shadow.share / 10_000} for shadow in experiment.shadows],
    }


def experiments_table(found: "dict[str, Experiment]") -> Table:
    """A line for each arm and shadow, and one for the rest of the users."""
    table = Table("ranker", "experiment", "since", "arm", "share", "gets")
    for ranker, experiment in found.items():
        head = (ranker, experiment.name, iso(experiment.announced_time_ms))
        for arm in experiment.arms:
            table.add_row(*head, arm.name, f"{arm.share / 100:g} % of users", _what(arm))
        rest = 10_000 - sum(arm.share for arm in experiment.arms)
        table.add_row(*head, "-", f"{rest / 100:g} % of users", "the served release")
        for shadow in experiment.shadows:
            table.add_row(*head, "shadow", f"{shadow.share / 100:g} % of requests", shadow.release_id)
    return table

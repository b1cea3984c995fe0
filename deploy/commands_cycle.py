"""`freshrank cycle`: the loop that learns from what was served, one tick at a time, for a scheduler."""

import json
import os
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console

from deploy.commands_label import label_logs
from deploy.commands_releases import GATE_REFUSED
from deploy.options import DomainFile, Home, Json, RankerName, console, settings_for, workspace
from deploy.wording import now_ms, parse_duration


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(cycle)


def cycle(
    ranker: RankerName = None,
    canary: Annotated[float, typer.Option(min=0, max=50, help="Per cent of the users who get a new release first; 0: everybody.")] = 5.0,
    canary_time: Annotated[str, typer.Option(help="How long at least before it is promoted.")] = "1d",
    lists_min: Annotated[int, typer.Option(min=1, help="Labelled lists that each arm needs before it is promoted.")] = 1_000,
    users_min: Annotated[int, typer.Option(min=1, help="Users that each arm needs.")] = 200,
    requests_min: Annotated[int, typer.Option(min=3, help="Newly served requests that a training needs.")] = 5_000,
    full_every: Annotated[str, typer.Option(help="Time between trainings from scratch, with new embeddings.")] = "7d",
    days: Annotated[int, typer.Option(min=0, help="Days before what is new that are trained on again.")] = 14,
    epochs: Annotated[int, typer.Option(help="Most passes of a training.")] = 2,
    seconds: Annotated[float | None, typer.Option(help="Time budget of a training, seconds.")] = None,
    gate_requests_min: Annotated[int, typer.Option(help="Requests that the gate needs.")] = 500,
    positives_min: Annotated[int, typer.Option(help="Labels that a head needs in the gate, to be judged.")] = 50,
    auc_loss_max: Annotated[float, typer.Option(help="How much lower a head's AUC may be where chance explains it.")] = 0.005,
    window: Annotated[str, typer.Option(help="As for `freshrank label`.")] = "1h",
    grace: Annotated[str, typer.Option(help="As for `freshrank label`.")] = "10m",
    late: Annotated[str, typer.Option(help="As for `freshrank label`.")] = "7d",
    all_seen: Annotated[bool, typer.Option("--all-seen", help="As for `freshrank label`.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on where labelling or the gate refuses; the manifest says so.")] = False,
    as_json: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Learn from what was served: label, look after the canary, train, gate, publish, start a canary. One tick, which never waits.

    Call it from a scheduler, every hour say. A canary is stopped as soon as its users do less of what they should, beyond chance, and
    promoted when it has had its time, lists and users. Exit codes: 0 done, or nothing to do; 3 a new model was refused or a canary stopped;
    1 an error.

    Example: `freshrank cycle --ranker home --canary 5 --canary-time 1d`
    """
    from deploy.cycle import Cycle, CycleOptions
    from deploy.replay import replay_options
    from deploy.stack import running
    from inference.gate import Limits
    from inference.outcomes import outcomes_table
    from inference.train import TrainOptions

    if round(canary, 2) != canary:
        raise typer.BadParameter("is in steps of 0.01", param_hint="--canary")
    settings = running(settings_for(home, domain), needs="kafka")
    work = workspace(settings, served=True)
    name = work.domain.ranker_name(ranker)
    options = CycleOptions(
        train=TrainOptions(epochs=epochs, seconds_max=seconds, learning_rate=1e-3, threads=os.cpu_count() or 1),
        limits=Limits(requests_min=gate_requests_min, positives_min=positives_min, auc_loss_max=auc_loss_max),
        canary_percent=canary,
        canary_ms_min=parse_duration(canary_time, "--canary-time"),
        lists_min=lists_min,
        users_min=users_min,
        requests_min=requests_min,
        full_every_ms=parse_duration(full_every, "--full-every"),
        days=days,
        force=force,
    )
    rules: dict[str, Any] = {"window": window, "grace": grace, "late": late, "all_seen": all_seen}
    label = partial(label_logs, settings, **rules, replay=replay_options(settings, None, ""), until_ms=now_ms())
    say = partial(console.print, markup=False, highlight=False)
    found = Cycle(settings, work, name, options, label, say).tick(now_ms())
    if found.arms:
        Console(stderr=True).print(outcomes_table(found.arms, f"{name}: lists by arm"))
    said = {"what": found.what, "why": found.why, "arms": [arm.as_dict() for arm in found.arms]}
    print(json.dumps(said) if as_json else f"{found.what}: {found.why}")
    raise typer.Exit(GATE_REFUSED if found.refused else 0)

"""`freshrank train` and `evaluate`: from a canonical log to weights, and what they are worth."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy.options import DomainFile, Home, RankerName, console, settings_for, workspace
from deploy.wording import metrics_table


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(train)
    app.command()(evaluate)


def train(
    ranker: RankerName = None,
    epochs: Annotated[int | None, typer.Option(help="Most passes; 10, or 2 with --from.", show_default=False)] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget in seconds.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At the end of the warm-up; 0.003, or 0.001 with --from.", show_default=False)
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Candidates of a step.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the newest checkpoint.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Multiply matrices in bfloat16.")] = False,
    checkpoint_s: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints within an epoch.")] = 300.0,
    served: Annotated[bool, typer.Option("--served", help="On what this stack served, as `freshrank label` wrote it.")] = False,
    start: Annotated[
        str, typer.Option("--from", help="Go on from this release's weights, with what has come since.", show_default=False)
    ] = "",
    days: Annotated[int, typer.Option(min=0, help="With --from: days before what is new that are trained on again.")] = 14,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Train a ranker on the imported log, or on what was served: temporal parts, early stop, checkpoints, curves, a report.

    Several processes: `torchrun --nproc-per-node 2 -m deploy.cli train ...`; each takes its part of every batch.

    With --from, what a day brought is learned in a short time. Items that are new since a whole training have no vector until the next one.

    Example: `freshrank train --domain domains/kuairand.toml --ranker home --epochs 5`
    """
    from deploy.learn import continue_ranker, train_ranker
    from inference.release import open_release, release_folder
    from inference.train import TrainOptions

    settings = settings_for(home, domain)
    work = workspace(settings, served=served)
    name = work.domain.ranker_name(ranker)
    options = TrainOptions(
        epochs=epochs or (2 if start else 10),
        seconds_max=seconds,
        learning_rate=learning_rate or (1e-3 if start else 3e-3),
        batch_rows=batch_rows,
        seed=seed,
        bf16=bf16,
        checkpoint_s=checkpoint_s,
        threads=os.cpu_count() or 1,
    )
    is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one writes and speaks
    with work.alone_with(name, "freshrank train") if is_first else nullcontext():
        if start:
            release = open_release(release_folder(work.releases, start))
            result = continue_ranker(work, name, release, options, days=days, resume=resume)
        else:
            result = train_ranker(work, name, options, resume=resume)
    if is_first:
        Console().print(metrics_table(result.metrics["test"], f"{name}: test part"))
        print(f"weights, metrics, curves and report: {result.folder}")


def evaluate(
    ranker: RankerName = None,
    epochs: Annotated[int, typer.Option(help="Most passes of each training.")] = 10,
    seconds: Annotated[float | None, typer.Option(help="Time budget of each training, seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    served: Annotated[bool, typer.Option("--served", help="On what this stack served, as `freshrank label` wrote it.")] = False,
    home: Home = None,
    domain: DomainFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")] = None,
    decay: Annotated[bool, typer.Option("--decay", help="How the model ages: train on half of the days, measure each later one.")] = False,
) -> None:
    """Train the ranker with and without its realtime sequence and compare both on the temporal test part.

    Example: `freshrank evaluate --domain domains/kuairand.toml --seconds 300`
    """
    from deploy.learn import decay_of, evaluate_ranker
    from inference.decay import decay_table
    from inference.evaluate import comparison_table
    from inference.train import TrainOptions

    settings = settings_for(home, domain)
    work = workspace(settings, served=served)
    name = work.domain.ranker_name(ranker)
    options = TrainOptions(epochs=epochs, seconds_max=seconds, seed=seed, threads=os.cpu_count() or 1)
    if decay:
        result = decay_of(work, name, options, lambda text: console.print(text, markup=False))
        Console().print(decay_table(result))
    else:
        result = evaluate_ranker(work, name, options)
        Console().print(comparison_table(result))
    print(f"table and plot: {work.home / 'evaluation' / name / ('decay' if decay else '')}")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

"""`freshrank ablate`: tables of configurations with several seeds, resumed, beside the paper's lifts."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.options import DomainFile, Home, RankerName, console, settings_for, workspace

if TYPE_CHECKING:
    from inference.ablations import AblationTable


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(ablate)


def ablate(
    table: Annotated[list[str] | None, typer.Option(help="Table to run; may be repeated. `all`: every one. None: list them.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each cell.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Budget of each cell and seed, seconds.")] = 60.0,
    epochs: Annotated[int, typer.Option(min=1, help="Most passes of a training.")] = 20,
    learning_rate: Annotated[float, typer.Option(min=0, help="At the end of the warm-up.")] = 3e-3,
    batch_rows: Annotated[int, typer.Option(min=1, help="Candidates of a step.")] = 1024,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each run.", show_default="all cores")] = None,
    file: Annotated[Path | None, typer.Option(help="TOML file with cells and tables of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="HOME/ablation/RANKER")] = None,
    ranker: RankerName = None,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Train tables of configurations and compare them, paired over users. A second call goes on where the first one stopped.

    Example: `freshrank ablate --domain domains/kuairand.toml --table sequence --table parts --seeds 3 --seconds 60`
    """
    from inference.ablations import TABLES, AblationError, read_tables

    cells, tables = (None, TABLES) if file is None else read_tables(file)
    if not table:
        _list(tables)
        return
    chosen = tables if "all" in table else {name: tables[name] for name in table if name in tables}
    unknown = set(table) - {"all", *tables}
    if unknown:
        raise AblationError(f"--table: {', '.join(sorted(unknown))} is not there; allowed: all, {', '.join(tables)}")
    from deploy.learn import ablate_ranker
    from inference.ablation_report import markdown, summary, terminal_tables
    from inference.plots import plot_ablation
    from inference.train import TrainOptions

    work = workspace(settings_for(home, domain))
    name = work.domain.ranker_name(ranker)
    out = work.home / "ablation" / name if out is None else out
    threads = threads or os.cpu_count() or 1
    options = TrainOptions(epochs=epochs, learning_rate=learning_rate, batch_rows=batch_rows, seconds_max=seconds, threads=threads)
    runs = seeds * len({cell for each in chosen.values() for cell in each.rows})
    console.print(f"{runs} runs of {seconds:g} s at most, {runs * seconds / 60:.0f} minutes without packing and measuring; into {out}")
    results = ablate_ranker(work, name, out, chosen, cells=cells, seeds=seeds, options=options, report=console.print)
    found = summary(work.domain, name, results, chosen)
    (out / "ablation.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", "utf-8")
    (out / "ablation.md").write_text(markdown(found, " ".join(["freshrank", *sys.argv[1:]])), "utf-8")
    for key in found["tables"]:
        plot_ablation(found, key, out / f"{key}.png")
    for shown in terminal_tables(found):
        Console().print(shown)
    print(f"tables, figures and plots: {out}")


def _list(tables: "dict[str, AblationTable]") -> None:
    shown = Table("table", "what", "cells (the reference first)")
    for name, table in tables.items():
        shown.add_row(name, table.title, ", ".join(dict.fromkeys((table.reference, *table.rows))))
    Console().print(shown)

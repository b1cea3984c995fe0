"""`freshrank chaos`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from deploy.options import console


def register(app: typer.Typer) -> None:
    """Adds the command."""

    @app.command()
    def chaos(
        kills: Annotated[int, typer.Option(min=1, help="How many processes to kill.")] = 20,
        seed: Annotated[int, typer.Option(help="Of the faults and the load.")] = 0,
        outage_s: Annotated[float, typer.Option(help="How long all brokers are gone, seconds.")] = 60.0,
        json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    ) -> None:
        """Kill, freeze and starve real processes under load, and prove that nothing is lost or counted twice.

        Starts three brokers, two workers and a reader of its own in a temporary folder. Exits with 1 unless all holds.

        Example: `freshrank chaos --kills 200 --json chaos.json`
        """
        from deploy.chaos import run_chaos

        logging.getLogger("streams.kafka").setLevel(logging.CRITICAL)  # brokers that are gone are what this is about
        report = run_chaos(kills, seed, console, outage_s=outage_s)
        print(report.to_text())
        if json_file is not None:
            json_file.write_text(report.to_json(), "utf-8")
        raise typer.Exit(0 if report.ok else 1)

"""Many seeds of the simulation: python -m tests.simulation.run --seeds 1000000 --processes 2

One seed alone, as a failure names it: python -m tests.simulation.run --seed 4711
"""

import argparse
import multiprocessing
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .mutations import MUTATIONS
from .schedule import MUST_HAPPEN, Simulation

_CHUNK_SEEDS = 100
_FAILURES_MAX = 10


@dataclass
class Outcome:
    """What a run of seeds gave. `failures`: what went wrong, by seed."""

    seeds: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)

    def add(self, other: "Outcome") -> None:
        """Adds what other seeds gave."""
        self.seeds += other.seeds
        self.happened.update(other.happened)
        self.failures.update(other.failures)

    def never(self) -> list[str]:
        """What should have happened somewhere and did not."""
        return [name for name in MUST_HAPPEN if not self.happened[name]]


def play(seeds: range) -> Outcome:
    """Plays some seeds one after the other. A seed that fails does not stop the others."""
    found = Outcome(len(seeds))
    for seed in seeds:
        try:
            found.happened.update(Simulation(seed).run())
        except Exception as error:  # whatever it is: the seed did not hold
            found.failures[seed] = f"{type(error).__name__}: {error}"
    return found


def play_in_processes(seeds: range, processes: int) -> Iterator[Outcome]:
    """Plays seeds in several processes, and yields what each chunk gave as it comes."""
    chunks = [seeds[start : start + _CHUNK_SEEDS] for start in range(0, len(seeds), _CHUNK_SEEDS)]
    if processes == 1:
        yield from map(play, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(play, chunks)


def replay_alone(seed: int) -> str:
    """The command that plays one seed."""
    return f"replay alone: python -m tests.simulation.run --seed {seed}"


def report(outcome: Outcome, seconds: float, command: str) -> str:
    """The result as Markdown."""
    lines = [
        "# Simulation",
        "",
        f"`{command}`, Python {platform.python_version()}: {outcome.seeds:,} seeds, {len(outcome.failures)} failed, "
        f"{outcome.seeds / seconds:,.0f} seeds a second, {seconds / 60:,.1f} minutes.",
        "",
        "| exercised | times |",
        "| --- | --- |",
        *(f"| {name.replace('_', ' ')} | {outcome.happened[name]:,} |" for name in MUST_HAPPEN),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns 0; 1 where a seed failed, or where something never happened and the run therefore proves too little."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5_000, help="how many (default 5,000)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="play this one alone; an error is shown with its trace")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="with --seed: play it with a fault put into the code")
    parser.add_argument("--report", type=Path, help="write the result there as Markdown")
    given, console = parser.parse_args(), Console()
    if given.seed is not None:
        with pytest.MonkeyPatch.context() as patch:
            if given.mutation:
                MUTATIONS[given.mutation](patch)
            happened = Simulation(given.seed).run()
        console.print(f"seed {given.seed} holds: {dict(happened)}")
        return 0
    outcome, started_s = Outcome(), time.monotonic()
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("seeds", total=given.seeds)
        try:
            for found in play_in_processes(range(given.first, given.first + given.seeds), given.processes):
                outcome.add(found)
                for seed, error in found.failures.items():
                    console.print(f"[red]seed {seed}[/]: {error}\n  {replay_alone(seed)}", highlight=False, soft_wrap=True)
                progress.update(task, completed=outcome.seeds)
                if len(outcome.failures) > _FAILURES_MAX:
                    console.print("[red]too many failures: stopped[/]")
                    break
        except KeyboardInterrupt:
            console.print("interrupted: the report is of the seeds that were played")
    text = report(outcome, time.monotonic() - started_s, f"python -m tests.simulation.run {' '.join(sys.argv[1:])}")
    console.print(text, highlight=False)
    if given.report is not None:
        given.report.write_text(text, "utf-8")
    for name in outcome.never():
        console.print(f"[red]{name.replace('_', ' ')}: never[/]: such a run proves too little; play more seeds")
    return 1 if outcome.failures or outcome.never() else 0


if __name__ == "__main__":
    sys.exit(main())

"""Fuzzes a real ranking server: python -m tests.fuzz.run --requests 1000000 --seed 1

Every call must end within its deadline, with a status that the request explains, and never INTERNAL; the server's memory must not grow,
and a valid request must be ranked at the end. One request alone, as a failure names it: python -m tests.fuzz.run --seed 1 --only 4711
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT / "tests") not in sys.path:  # where the tests' shared modules are; pytest has put it there
    sys.path.insert(0, str(ROOT / "tests"))

import grpc  # noqa: E402
import psutil  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from protos.v1.ranking_pb2 import RankRequest, RankResponse  # noqa: E402

from .mutated import KINDS, Fuzzed, fuzzed  # noqa: E402

_METHOD = "/freshrank.v1.Ranking/Rank"
_AT_ONCE, _CHANNELS = 16, 2
_DEADLINE_S = 30.0
_FAILURES_MAX = 10
_GROWTH_MB_MAX = 32.0
ALLOWED = {
    "valid": {"OK"},
    "fields": {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"},
    "wire": {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"},
    "bytes": {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"},
    "token": {"UNAUTHENTICATED"},
}
"""Statuses by what was done to the request. RESOURCE_EXHAUSTED is not there: this client keeps within the limits."""


@dataclass
class Outcome:
    """What a run gave. `failures`: what went wrong, by number of the request; -1: of the run as a whole."""

    requests: int = 0
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    warm_mb: float = 0.0
    end_mb: float = 0.0
    seconds: float = 0.0


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """(address, process) of a fresh server; its log is FOLDER/server.log."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "tests.fuzz.serve", str(folder)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start:\n{(folder / 'server.log').read_text()}")
        yield json.loads(line)["address"], psutil.Process(process.pid)
        process.stdin.close()
        if process.wait(30) != 0:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{(folder / 'server.log').read_text()[-4000:]}")
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


async def fuzz(
    folder: Path, requests: int, seed: int, *, seconds: float = float("inf"), on_progress: Callable[[Outcome], None] = lambda _: None
) -> Outcome:
    """Sends the first requests of a seed, as many as fit into the time. Memory is compared with that after a tenth of them."""
    outcome, numbers, started_s = Outcome(), iter(range(requests)), time.monotonic()
    with server(folder) as (address, process):
        channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(_CHANNELS)]
        calls = [channel.unary_unary(_METHOD) for channel in channels]

        async def send(call: Callable[..., object]) -> None:
            for number in numbers:
                if time.monotonic() - started_s > seconds or len(outcome.failures) > _FAILURES_MAX:
                    return
                sent = fuzzed(seed, number)
                status, wrong = await _one(call, sent, outcome)
                outcome.requests += 1
                outcome.statuses[sent.kind, status] += 1
                if wrong:
                    outcome.failures[number] = f"{sent.kind}: {wrong}"
                if not outcome.warm_mb and (outcome.requests * 10 >= requests or time.monotonic() - started_s > seconds / 10):
                    outcome.warm_mb = process.memory_info().rss / 1e6
                if outcome.requests % 500 == 0:
                    on_progress(outcome)

        await asyncio.gather(*(send(calls[i % _CHANNELS]) for i in range(_AT_ONCE)))
        outcome.end_mb = process.memory_info().rss / 1e6
        number = next(i for i in range(10**6) if fuzzed(seed, i).kind == "valid")
        if wrong := (await _one(calls[0], fuzzed(seed, number), outcome))[1]:
            outcome.failures[-1] = f"a valid request at the end: {wrong}"
        for channel in channels:
            await channel.close()
    if outcome.end_mb > outcome.warm_mb + _GROWTH_MB_MAX:
        outcome.failures[-1] = f"memory grew from {outcome.warm_mb:.0f} to {outcome.end_mb:.0f} MB"
    if "bug" in (said := (folder / "server.log").read_text()) or "Traceback" in said:
        outcome.failures[-1] = f"the server's log tells of a bug:\n{said[-2000:]}"
    outcome.seconds = time.monotonic() - started_s
    return outcome


async def _one(call: Callable[..., object], sent: Fuzzed, outcome: Outcome) -> tuple[str, str]:
    """(status, what is wrong with the answer or "")."""
    started_s = time.monotonic()
    try:
        answer = await call(sent.data, metadata=(("authorization", f"Bearer {sent.token}"),), timeout=_DEADLINE_S)  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        status, details = error.code().name, error.details()
    else:
        status, details = "OK", ""
    outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - started_s)
    if status not in ALLOWED[sent.kind]:
        return status, f"{status}: {details}"
    if status == "OK":
        ranked, asked = RankResponse.FromString(answer), RankRequest.FromString(sent.data)
        places = {len(ranked.ranked_ids) // 8, len(ranked.ranked_kinds), len(ranked.scores) // 4, len(asked.candidate_ids) // 8}
        if len(places) != 1:
            return status, f"not every candidate was ranked once: {places}"
    return status, ""


def replay_alone(seed: int, number: int) -> str:
    """The command that sends one request."""
    if number < 0:
        return f"it is of the run as a whole: --seed {seed}"
    return f"replay alone: python -m tests.fuzz.run --seed {seed} --only {number}"


def report(outcome: Outcome, seed: int, command: str) -> str:
    """The result as Markdown."""
    names = sorted({status for _, status in outcome.statuses})
    lines = [
        "# Fuzzing the ranking server",
        "",
        f"`{command}`, Python {platform.python_version()}, gRPC {grpc.__version__}, seed {seed}: {outcome.requests:,} requests, "
        f"{len(outcome.failures)} failures, {outcome.requests / outcome.seconds:,.0f} a second, {outcome.seconds / 60:,.1f} minutes. "
        f"Slowest answer {outcome.slowest_s * 1e3:,.0f} ms. Memory of the server: {outcome.warm_mb:.0f} MB after a tenth, "
        f"{outcome.end_mb:.0f} MB at the end.",
        "",
        f"| what was mutated | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        *(f"| {kind} | {' | '.join(f'{outcome.statuses[kind, name]:,}' for name in names)} |" for kind in KINDS),
    ]
    return "\n".join(lines) + "\n"


async def alone(folder: Path, seed: int, number: int) -> str:
    """Sends one request to a fresh server; returns what is wrong with the answer."""
    with server(folder) as (address, _):
        async with grpc.aio.insecure_channel(address) as channel:
            return (await _one(channel.unary_unary(_METHOD), fuzzed(seed, number), Outcome()))[1]


def main() -> int:
    """Returns 0; 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="how many (default 10,000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time; the report says how many were sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="send the request of this number alone")
    parser.add_argument("--report", type=Path, help="write the result there as Markdown")
    given, console = parser.parse_args(), Console()
    with tempfile.TemporaryDirectory() as folder:
        if given.only is not None:
            console.print(fuzzed(given.seed, given.only), asyncio.run(alone(Path(folder), given.seed, given.only)) or "holds")
            return 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("requests", total=given.requests)
            outcome = asyncio.run(
                fuzz(
                    Path(folder),
                    given.requests,
                    given.seed,
                    seconds=given.seconds,
                    on_progress=lambda so_far: progress.update(task, completed=so_far.requests),
                )
            )
    text = report(outcome, given.seed, f"python -m tests.fuzz.run {' '.join(sys.argv[1:])}")
    console.print(text, highlight=False)
    for number, failure in outcome.failures.items():
        console.print(f"[red]{number}[/]: {failure}\n  {replay_alone(given.seed, number)}", highlight=False, soft_wrap=True)
    if given.report is not None:
        given.report.write_text(text, "utf-8")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())

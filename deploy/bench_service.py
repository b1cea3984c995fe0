"""Benchmark `service`: what a ranking costs beside its model.

The model says one half for every candidate and has exactly the tensors of the real one in the paper's size
(`inference.transact.NoopRanker`), in a real Triton. Server, load generator, worker, reader, broker and Triton share the machine.
Topologies: *local*, the server reads sequences from the view of a worker on its machine; *remote* (suffix _remote), it has no view and asks
the announced reader service by gRPC.

Server side is from the request's arrival in the handler to its answer: admission, read, join, pack, Triton, log. The client's view counts
from when a call was due.
"""

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.bench import CANDIDATES, World, world
from deploy.load import Load, Outcome, run_load
from deploy.processes import kafka_config, partition_count, product
from deploy.scheduling import set_slice
from deploy.serving import routed_source, server_config
from deploy.settings import Settings, load_settings
from inference.server import RankingServer
from inference.transact import NoopRanker
from streams.broadcast import Announcements
from streams.owners import Owners
from streams.ranking_log import RankingLog
from streams.view_reader import ViewReader

RATE_PER_S, SECONDS, WARM_S = 100, 20.0, 3.0
CANDIDATES_MANY = 1_000
REQUESTS = 500
"""Different requests of a load, taken in turn."""
TOPOLOGIES = ("local", "remote")


@dataclass
class Measured:
    """A ranking server in a process of its own that says what it counted between `begin` and `end`."""

    address: str
    _pipe: Connection

    def begin(self) -> None:
        """Starts counting."""
        self._ask("begin")

    def end(self) -> dict[str, float]:
        """Percentiles of the stages since `begin`, ms; counters since the start; cpu_s of the process since `begin`."""
        found: dict[str, float] = self._ask("end")
        return found

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()


@contextlib.contextmanager
def measured_server(settings: Settings, topology: str) -> Iterator[Measured]:
    """Starts the server and stops it. Raises EOFError: it did not start; see its output."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_in_process, args=(settings.as_environment(), topology, theirs))
    process.start()
    theirs.close()
    try:
        yield Measured(ours.recv(), ours)
        ours.send("stop")
    finally:
        process.join(20)
        if process.is_alive():
            process.kill()
            process.join()


def _serve_in_process(environment: dict[str, str], topology: str, pipe: Connection) -> None:
    os.environ.update(environment)
    settings = load_settings()
    set_slice(settings.serving_slice_ms)
    asyncio.run(_serve(settings, topology, pipe))


async def _serve(settings: Settings, topology: str, pipe: Connection) -> None:
    seen = settings if topology == "local" else settings.model_copy(update={"reader_advertised_address": ""})
    folder = "view" if topology == "local" else "no-view"
    view, owners = ViewReader(settings.home / folder, product(settings), partition_count(settings)), Owners()
    source = routed_source(seen, view, owners)
    sink = RankingLog(kafka_config(settings), settings.topic_rankings, queue_max=settings.ranking_log_queue_max)
    announcements = await asyncio.to_thread(
        lambda: Announcements(kafka_config(settings), settings.topic_announcements, on_change=owners.take)
    )
    server = RankingServer(server_config(settings), source, sink)
    address = await server.start()
    await server.warm()
    pipe.send(address)
    cpu_s = 0.0
    while (asked := await asyncio.to_thread(pipe.recv)) != "stop":
        if asked == "begin":
            server.service.telemetry.restart()
            cpu_s = time.process_time()
            pipe.send(None)
        else:
            pipe.send({**server.statistics(), "cpu_s": time.process_time() - cpu_s})
    announcements.close()
    await server.stop()
    await source.close()
    sink.close()
    view.close()


def requests_of(running: World, candidates: int, *, tier: int = 0, count: int = REQUESTS) -> tuple[bytes, ...]:
    """Serialized rankings of random candidates for random users."""
    requests = [running.request(candidates) for _ in range(count)]
    for request in requests:
        request.tier = tier
    return tuple(request.SerializeToString() for request in requests)


def bench_service(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Server-side and client-side times at RATE_PER_S, Poisson, and rankings per CPU second of the server."""
    console.print(f"{RATE_PER_S} rankings/s, Poisson, {SECONDS:.0f} s each, {CANDIDATES} and {CANDIDATES_MANY} candidates, no-op model")
    with world(folder, ("worker", "reader"), model=NoopRanker) as running:
        few, many = requests_of(running, CANDIDATES), requests_of(running, CANDIDATES_MANY)
        found: list[dict[str, float]] = [{} for _ in range(runs)]
        for topology in TOPOLOGIES:
            with measured_server(running.settings, topology) as server:
                run_load(Load(server.address, few, RATE_PER_S, WARM_S))
                for i, figures in enumerate(found):
                    figures |= _run(server, few, many, "" if topology == "local" else "_remote", i, console)
        return found


def _run(server: Measured, few: tuple[bytes, ...], many: tuple[bytes, ...], suffix: str, seed: int, console: Console) -> dict[str, float]:
    figures: dict[str, float] = {}
    for requests, name in ((few, "service"), (many, "service_1000")):
        server.begin()
        outcome = run_load(Load(server.address, requests, RATE_PER_S, SECONDS, seed=seed))
        found = server.end()
        answered(outcome)
        figures |= {f"{name}_ms_p50{suffix}": found["total_ms_p50"], f"{name}_ms_p99{suffix}": found["total_ms_p99"]}
        figures |= {f"{name}_client_ms_p{p}{suffix}": outcome.percentile("OK", p) for p in (50, 99)}
        if name == "service":
            figures[f"rankings_per_cpu_s{suffix}"] = outcome.count("OK") / found["cpu_s"]
        stages = ", ".join(f"{stage} {found[f'{stage}_ms_p50']:.2f}" for stage in ("admission", "read", "join_pack", "triton", "log"))
        console.print(
            f"  {name}{suffix}: server p50 {found['total_ms_p50']:.2f}, p99 {found['total_ms_p99']:.2f} ms; client "
            f"p50 {outcome.percentile('OK', 50):.2f}, p99 {outcome.percentile('OK', 99):.2f}; p50 of the stages: {stages}; "
            f"{outcome.count('OK') / found['cpu_s']:.0f} rankings/CPU s"
        )
    return figures


def answered(outcome: Outcome) -> None:
    """Raises RuntimeError: some call was not answered, or by another tier than the model."""
    refused = {status: len(found) for status, found in outcome.latency_ms.items() if status != "OK"}
    if refused or set(outcome.tiers) != {1}:
        raise RuntimeError(f"not every call was answered by the model: {refused}, tiers {dict(outcome.tiers)}")

"""Benchmark `feast`: freshrank beside Feast's Python feature server, on the same machine and with the same join.

The same work: 100 candidates with their stored features (a category, a list of two, two numbers) and vector, one user's features and
vector; 10,000 items and 1,000 users; one server process each; the load generator on the same cores, one after the other in each run.

Not the same work: freshrank also reads the user's sequence of 100 actions with its watermark, joins the vectors of its items, packs all
of it into tensors, asks a model in Triton (one that does nothing), orders the candidates, computes digests and writes a ranking log to
Kafka, with the worker and the broker on the same cores. Its answer has ids and scores; Feast's has the features themselves, as JSON,
which somebody then has to send to a model. Feast is asked with two requests at once, for the items and for the user, whose answers count
as one: one request for both repeats the user a hundred times and was slower. Feast's access log is off and its workers are never recycled.
"""

import asyncio
import functools
import json
import os
import shutil
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from deploy.announcing import announce_release
from deploy.bench import ITEMS, USERS, world, write_untrained_release
from deploy.bench_drain import bench_request
from deploy.bench_environment import locked_environment
from deploy.bench_ingest import BenchError
from deploy.learn import now_ms
from deploy.load import Caller, Load, Outcome, closed_loop, run_load
from deploy.settings import Settings
from deploy.stack import ranking_client
from deploy.supervisor import Command, Server, free_ports
from features.domain import Domain
from inference.transact import NoopRanker
from protos.v1.ranking_pb2 import TIER_EMBEDDING, TIER_MODEL, TIER_SMALL

CANDIDATES, MORE_CANDIDATES = 100, 300
CONCURRENCY, CLOSED_S = 4, 5.0
OPEN_PER_S, OPEN_S = 20.0, 10.0
"""A rate that Feast's stores both answer in time."""
MODEL_PER_S = 2.0
"""Of the full model on the CPU: about a fifth of what it can do."""
REQUESTS = 200
METARANK = {100: (7.0, 10.0), 300: (20.0, 24.0)}
"""Milliseconds p50 and p99 by candidates, as Metarank's documentation has them; it names no machine."""
_SCRIPTS = Path(__file__).parents[1] / "tests" / "bench" / "feast"
_COLUMNS = {"number": pa.float32(), "category": pa.int64(), "list": pa.list_(pa.int64())}


def bench_feast(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Figures of each run: requests_per_s and p50, p99 of freshrank and of Feast with each store, and the ratios.

    throughput_ratio is freshrank's requests/s over those of Feast's faster store; p99_ratio Feast's lower p99 over freshrank's.

    Raises:
        BenchError: Feast cannot be installed or does not serve, or a call failed; the message says what to do.
    """
    python = locked_environment("Feast", _SCRIPTS / "requirements.lock", console)
    console.print(
        f"{CANDIDATES} candidates; closed loop of {CONCURRENCY} for {CLOSED_S:.0f} s, then {OPEN_PER_S:.0f} requests/s at constant "
        f"intervals for {OPEN_S:.0f} s, each with one server process, one after the other"
    )
    with ExitStack() as stack:
        bench = stack.enter_context(world(folder, ("worker", "server"), model=NoopRanker, small=True, torch_threads=2))
        peers: dict[str, FeastServer] = {}
        for store in feast_stores(stack, folder, console):
            peers[store["type"]] = stack.enter_context(FeastServer(folder / f"feast-{store['type']}", python, store, bench.domain))
        random = np.random.default_rng(1)
        found = []
        for _ in range(runs):
            figures = _measure("freshrank", bench.settings.server_address, _rankings(random, CANDIDATES), Caller, console)
            for name, peer in peers.items():
                figures |= _measure(f"feast_{name}", peer.address, _joins(random, bench.domain), FeastCaller, console)
            figures["throughput_ratio"] = figures["requests_per_s_freshrank"] / max(figures[f"requests_per_s_feast_{n}"] for n in peers)
            figures["p99_ratio"] = min(figures[f"p99_ms_feast_{name}"] for name in peers) / figures["p99_ms_freshrank"]
            found.append(figures)
        console.print(_table(found, _own_curve(bench.settings, random)))
    return found


def _rankings(random: np.random.Generator, candidates: int, tier: int = TIER_MODEL) -> tuple[bytes, ...]:
    requests = [bench_request(random, candidates) for _ in range(REQUESTS)]
    for request in requests:
        request.tier = tier
    return tuple(request.SerializeToString() for request in requests)


def _joins(random: np.random.Generator, domain: Domain) -> tuple[bytes, ...]:
    """Two JSON bodies each, one a line: the candidates' and the user's."""
    asked = {side: [f"{side}_features:{name}" for name in _columns(domain, side)] for side in ("item", "user")}
    found = []
    for _ in range(REQUESTS):
        ids = {"item": (random.choice(ITEMS, CANDIDATES, replace=False) + 1).tolist(), "user": [int(random.integers(1, USERS + 1))]}
        found.append("\n".join(json.dumps({"features": asked[side], "entities": {side: ids[side]}}) for side in asked).encode())
    return tuple(found)


class FeastCaller(Caller):
    """A join is two requests at once over kept connections; it is OK when both answers are whole."""

    async def open(self) -> None:
        """Makes the session, and one join."""
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(self.load.timeout_s))
        if (status := await self.send(0)) != "OK":
            raise BenchError(f"bench feast: {self.load.address} answers {status}")

    async def send(self, i: int) -> str:
        """Makes join i and returns its status."""
        bodies = self.load.requests[i % len(self.load.requests)].split(b"\n")
        try:
            answers = await asyncio.gather(*(self._post(body) for body in bodies))
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__
        return "OK" if all(answers) else "INCOMPLETE"

    async def _post(self, body: bytes) -> bool:
        headers = {"content-type": "application/json"}
        async with self.session.post(f"http://{self.load.address}/get-online-features", data=body, headers=headers) as answer:
            text = await answer.read()
            return answer.status == 200 and b"NOT_FOUND" not in text

    async def close(self) -> None:
        """Closes the session."""
        await self.session.close()


def _measure(name: str, address: str, requests: tuple[bytes, ...], caller: Any, console: Console) -> dict[str, float]:
    most = closed_loop(Load(address, requests, 0.0, CLOSED_S, timeout_s=10.0), CONCURRENCY, caller)
    open_loop = _open(address, requests, OPEN_PER_S, OPEN_S, caller)
    for outcome in (most, open_loop):
        if set(outcome.latency_ms) != {"OK"}:
            raise BenchError(f"bench feast: {name}: not all calls were answered: {sorted(outcome.latency_ms)}")
    figures = {
        f"requests_per_s_{name}": most.count("OK") / most.seconds,
        f"p50_ms_{name}": open_loop.percentile("OK", 50),
        f"p99_ms_{name}": open_loop.percentile("OK", 99),
    }
    shown = figures | {"generator late ms p99": open_loop.late_ms_p99, "generator CPU s": open_loop.cpu_s}
    console.print("  " + ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))
    return figures


def _open(address: str, requests: tuple[bytes, ...], per_s: float, seconds: float, caller: Any = Caller) -> Outcome:
    return run_load(Load(address, requests, per_s, seconds, "constant", timeout_s=10.0), caller)


def _own_curve(settings: Settings, random: np.random.Generator) -> list[tuple[str, int, Outcome]]:
    """Latencies of the tiers at the candidates of Metarank's curve; the full model comes last and stays served."""
    counts, address = (CANDIDATES, MORE_CANDIDATES), settings.server_address
    found = [("model that does nothing", n, _open(address, _rankings(random, n), OPEN_PER_S, OPEN_S)) for n in counts]
    found += [("small model", n, _open(address, _rankings(random, n, TIER_SMALL), OPEN_PER_S, OPEN_S)) for n in counts]
    found += [("embedding tier", n, _open(address, _rankings(random, n, TIER_EMBEDDING), OPEN_PER_S, OPEN_S)) for n in counts]
    serve_full_model(settings)
    return found + [("full model on the CPU", n, _open(address, _rankings(random, n), MODEL_PER_S, OPEN_S)) for n in counts]


def serve_full_model(settings: Settings) -> None:
    """Publishes the model in the paper's size, and waits until it answers. Raises BenchError: it does not within two minutes."""
    before = {path.name for path in (settings.home / "releases").iterdir()}
    write_untrained_release(settings.home, settings.domain, np.random.default_rng(2))
    (release_id,) = {path.name for path in (settings.home / "releases").iterdir()} - before
    announce_release(settings, "home", release_id, now_ms())
    deadline_s = time.monotonic() + 120
    request = bench_request(np.random.default_rng(3))
    with ranking_client(settings, timeout_s=10.0) as client:
        while (answer := client.call(request)).release_id != release_id or answer.tier != TIER_MODEL:
            if time.monotonic() > deadline_s:
                raise BenchError(f"bench feast: {release_id} is not served after 120 s: see {settings.home}/logs")
            time.sleep(0.1)


def _table(found: Sequence[dict[str, float]], curve: Sequence[tuple[str, int, Outcome]]) -> Table:
    """Medians of what was compared, our own tiers, and Metarank's published figures."""
    table = Table("server", "candidates", "requests/s", "p50 ms", "p99 ms")
    for name in [key.removeprefix("requests_per_s_") for key in found[0] if key.startswith("requests_per_s_")]:
        values = [statistics.median(run[f"{what}_{name}"] for run in found) for what in ("requests_per_s", "p50_ms", "p99_ms")]
        table.add_row(name, str(CANDIDATES), *(f"{value:.3g}" for value in values))
    for name, candidates, outcome in curve:
        table.add_row(f"freshrank, {name}", str(candidates), "", *(f"{outcome.percentile('OK', percent):.3g}" for percent in (50, 99)))
    for candidates, (p50_ms, p99_ms) in METARANK.items():
        table.add_row("Metarank, as published", str(candidates), "", f"{p50_ms:g}", f"{p99_ms:g}")
    return table


def _columns(domain: Domain, side: str) -> dict[str, tuple[Any, int]]:
    """Arrow type and length of each column of a feature view."""
    found = {name: (_COLUMNS[of.kind], of.length_max) for name, of in domain.features.items() if of.side == side}
    return {**found, "embedding": (pa.list_(pa.float32()), domain.ranker["home"].embedding_dimension)}


def write_views(folder: Path, domain: Domain) -> None:
    """item.parquet and user.parquet: columns of the types and lengths of freshrank's tables, with random contents."""
    random = np.random.default_rng(1)
    for side, n in (("item", ITEMS), ("user", USERS)):
        rows: dict[str, pa.Array] = {
            side: pa.array(np.arange(1, n + 1)),
            "event_timestamp": pa.array([datetime.now(UTC)] * n, pa.timestamp("us", "UTC")),
        }
        for name, (kind, length) in _columns(domain, side).items():
            shape = (n, length) if pa.types.is_list(kind) else (n,)
            rows[name] = pa.array((random.random(shape) * 100).astype(int if "int" in str(kind) else np.float32).tolist(), kind)
        pq.write_table(pa.table(rows), folder / f"{side}.parquet")


def feast_stores(stack: ExitStack, folder: Path, console: Console) -> Iterator[dict[str, str]]:
    """Feast's configuration of each online store that can be had here."""
    yield {"type": "sqlite", "path": str(folder / "feast-sqlite" / "online.db")}
    if shutil.which("redis-server") is None:
        console.print("[yellow]Feast with Redis is left out: no redis-server on the PATH (Debian, Ubuntu: apt-get install redis-server)")
        return
    redis = stack.enter_context(RedisServer(folder / "redis"))
    yield {"type": "redis", "connection_string": redis.address}


class RedisServer(Server):
    """A Redis of this benchmark's own, in memory alone."""

    def command(self) -> Command:
        """See `Server.command`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        argv = ("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(self.folder))
        ping = ("redis-cli", "-p", str(port), "ping")

        def ready() -> dict[str, Any] | None:
            done = subprocess.run(ping, check=False, capture_output=True, text=True, timeout=5)
            return {"endpoint": self.address} if "PONG" in done.stdout else None

        return Command("redis", argv, ready=ready, restart=False)


class FeastServer(Server):
    """`feast serve` over one online store, filled."""

    def __init__(self, folder: Path, python: Path, store: dict[str, str], domain: Domain) -> None:
        super().__init__(folder)
        self._python, self._store, self._domain = python, store, domain

    def command(self) -> Command:
        """See `Server.command`. Raises BenchError: the store cannot be filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_views(self.folder, self._domain)
        argv = (str(self._python), str(_SCRIPTS / "prepare.py"), str(self.folder), json.dumps(self._store))
        done = subprocess.run(argv, check=False, capture_output=True, text=True, env=_environment())
        if done.returncode:
            raise BenchError(f"bench feast: {self._store['type']}: the online store cannot be filled:\n{done.stderr[-2000:]}")
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        feast = (str(self._python.parent / "feast"), "--chdir", str(self.folder), "serve", "--port", str(port), "--workers", "1")
        quiet = ("--no-access-log", "--max-requests", "0", "--registry_ttl_sec", "86400")
        return Command("feast", (*feast, *quiet), _environment(), ready=functools.partial(_answers, self.address), restart=False)


def _environment() -> dict[str, str]:
    """Feast's own modules only, and no reports to its makers."""
    return {**os.environ, "PYTHONPATH": "", "FEAST_USAGE": "False"}


def _answers(address: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=1):
            return {"endpoint": address}
    except OSError:
        return None

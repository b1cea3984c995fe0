"""What the HTTP door costs: `python tests/bench/http_door.py [--calls 2000] [--json FILE]`.

One ranking server with the no-op model in the paper's size, as in `freshrank bench service`, and `freshrank http` before it. Each ranking
of 100 candidates is asked for twice, one call after the other on connections that stay open: by HTTP and by gRPC in turn, so that what else
the machine does meets both. Milliseconds at the caller, until the answer is parsed.
"""

import argparse
import json
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from deploy.bench import CANDIDATES, ITEMS, USERS, World, machine, world
from deploy.stack import process, ranking_client
from inference.client import RankingClient
from inference.transact import NoopRanker

WARM_CALLS = 50


def by_http(connection: HTTPConnection, body: bytes) -> tuple[float, str]:
    """(milliseconds, tier) of one ranking."""
    begin_s = time.perf_counter()
    connection.request("POST", "/v1/rank", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    return (time.perf_counter() - begin_s) * 1e3, answer.get("tier", f"{response.status}: {answer}")


def by_grpc(client: RankingClient, user: int, candidates: list[int], scores: list[float]) -> tuple[float, str]:
    """The same ranking by the Python client."""
    begin_s = time.perf_counter()
    answer = client.rank("home", user, candidates, candidate_features={"retrieval_score": scores}, request_features={"device": "phone"})
    return (time.perf_counter() - begin_s) * 1e3, answer.tier


def measure(running: World, calls: int) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds by way. Raises RuntimeError: an answer was not the model's."""
    url = running.stack.supervisor.start(process("http", running.settings)).wait_ready()["endpoint"]
    connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
    found: dict[str, list[float]] = {"http": [], "grpc": []}
    with ranking_client(running.settings, timeout_s=5.0) as client:
        for call in range(WARM_CALLS + calls):
            user = int(running.random.integers(1, USERS + 1))
            candidates = (running.random.choice(ITEMS, CANDIDATES, replace=False) + 1).tolist()
            scores = running.random.random(CANDIDATES).tolist()
            body = {"user": str(user), "candidates": [str(item) for item in candidates], "ranker": "home"}
            body |= {"candidate_features": {"retrieval_score": scores}, "request_features": {"device": "phone"}}
            for way in ("http", "grpc")[:: 1 if call % 2 else -1]:  # who comes second finds the tables' rows in the cache
                if way == "http":
                    ms, tier = by_http(connection, json.dumps(body).encode())
                else:
                    ms, tier = by_grpc(client, user, candidates, scores)
                if tier != "model":
                    raise RuntimeError(f"{way}: answered by {tier}, not by the model")
                if call >= WARM_CALLS:
                    found[way].append(ms)
    connection.close()
    return {way: {f"ms_p{p}": float(np.percentile(taken, p)) for p in (50, 99)} for way, taken in found.items()}


def main() -> None:
    """Runs it and prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2_000, help="rankings that are measured, by each way")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="freshrank-bench-") as folder,
        world(Path(folder), ("worker", "server"), model=NoopRanker) as running,
    ):
        found = measure(running, given.calls)
    table = Table("way", "p50 ms", "p99 ms")
    for way, figures in found.items():
        table.add_row(way, f"{figures['ms_p50']:.2f}", f"{figures['ms_p99']:.2f}")
    console = Console()
    console.print(f"{given.calls} rankings of {CANDIDATES} candidates by each way, one after the other")
    console.print(table)
    text = json.dumps({"name": "http_door", "machine": machine(), "calls": given.calls, "figures": found})
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

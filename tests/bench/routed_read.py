"""What reading from an owner's service costs: `python tests/bench/routed_read.py [--seconds 20]`, one JSON line.

A reader service in a process of its own serves a view of 10,000 users with 100 events; a `RoutedSource` reads one user at 100/s (Poisson,
open loop) from its own view, then from the service. Milliseconds at the caller; CPU milliseconds a read, of the caller's process (the load
generator included) and of the service's.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

from features.actions import EVENT_DTYPE
from features.domain import Domain, parse_domain
from features.ids import partition_of, user_key
from features.sequence import NEVER_ERASED, Row, definition, encode_row
from protos.v1.owners_pb2 import STATE_ROLE_OWNER, StateAnnouncement
from streams.owners import Owners
from streams.reader_service import ReaderConfig, run_reader
from streams.routed_source import RoutedSource
from streams.state import Meta, definitions, fingerprints, row_key
from streams.view import PartitionView
from streams.view_reader import ViewReader

PARTITIONS, USERS, EPOCH, READS_PER_S = 4, 10_000, 7, 100
DOMAIN_TOML = """
name = "bench"
[entities]
item = 1
[actions.click]
id = 1
kind = "positive"
[sequence.main]
id = 1
[ranker.home]
sequence = "main"
item_space = "items"
heads.click = { actions = ["click"] }
"""


def build(folder: Path, domain: Domain) -> None:
    """The view of a worker that is up to date for the next hour."""
    what = definition(domain, "main")
    events = np.zeros(100, EVENT_DTYPE)
    events["event_time_ms"] = np.arange(1, 101)
    for partition in range(PARTITIONS):
        users = [user for user in range(USERS) if partition_of(user_key(user), PARTITIONS) == partition]
        rows = [encode_row(Row(user, what.fingerprint, EPOCH, partition, 9, NEVER_ERASED, events)) for user in users]
        view = PartitionView(folder, partition, map_bytes=1 << 28)
        view.write([row_key(1, user) for user in users], rows, Meta(EPOCH, partition, 9, 1, fingerprints(definitions(domain))))
        view.beat(time.time_ns() // 1_000_000 + 3_600_000)
        view.close()


def serve(folder: Path, ready: Connection) -> None:
    """The reader service's process."""
    run_reader(ReaderConfig(parse_domain(DOMAIN_TOML, source="bench"), folder, PARTITIONS, log_level="ERROR"), ready.send)


async def load(source: RoutedSource, seconds: float, pid: int) -> dict[str, float]:
    """Reads at their times, whether those before have come back or not."""
    random = np.random.default_rng(1)
    due_s = np.cumsum(random.exponential(1 / READS_PER_S, int(seconds * READS_PER_S))).tolist()
    users, taken_ms = random.integers(0, USERS, len(due_s)).tolist(), []

    async def read(user: int, at_s: float) -> None:
        await source.read("main", [user], timeout_s=10.0)
        taken_ms.append((time.monotonic() - at_s) * 1000)

    await asyncio.gather(*(source.read("main", [user], timeout_s=10.0) for user in range(50)))
    service, own_s = psutil.Process(pid), time.process_time()
    service_s, start_s, tasks = sum(service.cpu_times()[:2]), time.monotonic(), []
    for user, at in zip(users, due_s, strict=True):
        await asyncio.sleep(max(0.0, start_s + at - time.monotonic()))
        tasks.append(asyncio.create_task(read(user, start_s + at)))
    await asyncio.gather(*tasks)
    p50, p99 = np.percentile(taken_ms, (50, 99))
    count = len(tasks)
    service_ms = (sum(service.cpu_times()[:2]) - service_s) * 1e3
    cpu = {"own_cpu_ms": (time.process_time() - own_s) * 1e3 / count, "service_cpu_ms": service_ms / count}
    return {"ms_p50": float(p50), "ms_p99": float(p99), **cpu}


async def measure(folder: Path, address: str, seconds: float, pid: int) -> dict[str, float]:
    """The two ways, one after the other."""
    domain, found, owners = parse_domain(DOMAIN_TOML, source="bench"), {}, Owners()
    for partition in range(PARTITIONS):
        said = StateAnnouncement(partition=partition, address=address, log_epoch=EPOCH, role=STATE_ROLE_OWNER)
        owners.take(f"owner/{partition}/a", said.SerializeToString())
    for way, view in (("local", folder), ("owner", folder / "none")):
        reader = ViewReader(view, domain, PARTITIONS)
        source = RoutedSource(reader, owners, domain, PARTITIONS)
        found |= {f"{way}_{name}": round(value, 3) for name, value in (await load(source, seconds, pid)).items()}
        found[f"{way}_calls"] = source.statistics()["calls"]
        await source.close()
        reader.close()
    return found


def main() -> None:
    """Runs it and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, parse_domain(DOMAIN_TOML, source="bench"))
        context = multiprocessing.get_context("spawn")
        parent, child = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(folder, child))
        process.start()
        try:
            address = parent.recv()["address"]
            assert process.pid is not None
            print(json.dumps(asyncio.run(measure(folder, address, seconds, process.pid))))
        finally:
            process.terminate()
            process.join()


if __name__ == "__main__":
    main()

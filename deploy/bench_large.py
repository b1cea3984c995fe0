"""Part `_large` of the benchmark `ingest`: state beyond memory.

2 million users with full sequences of 100, by Zipf 1.05 over all of them. RocksDB reads and writes beside the page cache with a block cache
of 512 MB, so that the page cache does not hide the disk. The view is a mapped file of about 8 GB: the pages that a batch touches are in the
page cache, and count among the bytes written when the kernel writes them. bytes_written_per_event_large is everything that the disk was
given; of it table_bytes_ are RocksDB's flushes and compactions, and view_bytes_ the rest.
"""

from pathlib import Path

from rich.console import Console

from deploy.bench_states import StateSize, measure
from deploy.kafka_server import KafkaServer
from streams.kafka import KafkaConfig

USERS, ACTIONS, EVENTS = 2_000_000, 100, 2_000_000
CACHE_MB, WRITE_BUFFER_MB = 512, 128
SECONDS_MAX = 240.0


def bench_large(
    runs: int, folder: Path, console: Console, *, users: int = USERS, actions: int = ACTIONS, events: int = EVENTS
) -> list[dict[str, float]]:
    """Figures of each run, their names ending in `_large`. Needs 20 GB of disk below `folder`."""
    found = []
    with KafkaServer(folder / "kafka") as server:
        for run in range(runs):
            figures = measure(
                StateSize(users, actions),
                events,
                folder / f"large-{run}",
                KafkaConfig(server.bootstrap),
                console,
                seconds_max=SECONDS_MAX,
                cache_bytes=CACHE_MB << 20,
                write_buffer_bytes=WRITE_BUFFER_MB << 20,
                direct_reads=True,
            )
            found.append({f"{name}_large": value for name, value in figures.items()})
    return found

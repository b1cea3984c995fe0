"""Which layout of rows costs less where the state is larger than memory: one row a user, or a small recent row folded into a body.

    python tests/bench/row_layout.py --users 2000000 --events 2000000

On RocksDB alone, with the product's options, direct reads and writes, and a block cache of 256 bytes a user (512 MB for 2 million): every
user has a full sequence of 100 events, batches of Zipf 1.05 events are folded in. The layouts:

- one: a row of header and 100 events; a batch reads and rewrites the rows of its users;
- one, blobs: the same, with rows of 1 kB and more in RocksDB's blob files, which compactions do not rewrite;
- recent K: a row of header and at most K events beside a body of 100; a batch reads and rewrites the recent rows, and where one is full it
  also reads and rewrites the body. A read gets both and puts them together.

Appending stands for the law in all of them: what differs is what RocksDB has to do. Bytes written are everything that the process wrote,
flushes and compactions included, until nothing is left to compact.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import rocksdict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from streams.state import row_keys
from streams.store import RocksStore, write_table

HEADER, WIDTH, LENGTH = 64, 40, 100
CACHE_BYTES_PER_USER = 256
READS = 20_000
RECENT, BODY = 1, 2
_CHUNK = 20_000


def sealed(header: bytes, events: bytes) -> bytes:
    """A row: a header with a checksum of the rest."""
    rest = header[8:] + events
    return header[:4] + zlib.crc32(rest).to_bytes(4, "little") + rest


class Layout:
    """How rows of users lie in a database. `recent`: most events of a recent row; 0: there is none."""

    def __init__(self, folder: Path, users: np.ndarray, recent: int, blobs: bool, cache_bytes: int) -> None:
        self.users, self.recent = users, recent
        store = RocksStore(folder, {}, cache_bytes=cache_bytes, write_buffer_bytes=128 << 20, direct_reads=True)
        options = store._options()
        options.enable_statistics()
        if blobs:
            options.set_enable_blob_files(True)
            options.set_min_blob_size(1 << 10)
            options.set_enable_blob_gc(True)
        self.options, self.database = options, rocksdict.Rdict(str(folder / "database"), options)
        self._load(folder)

    def _load(self, folder: Path) -> None:
        """A full body for everybody, and recent rows that are as full as they are on average."""
        random = np.random.default_rng(2)
        paths = []
        for kind in (BODY, RECENT) if self.recent else (BODY,):
            count = self.recent // 2 if kind == RECENT else LENGTH
            for start in track(range(0, len(self.users), _CHUNK), f"load {kind}", transient=True):
                own = self.users[start : start + _CHUNK]
                data = random.bytes(len(own) * (HEADER + count * WIDTH))
                size = HEADER + count * WIDTH
                paths.append(str(folder / f"{kind}-{start}.sst"))
                rows = [data[i : i + size] for i in range(0, len(data), size)]
                write_table(Path(paths[-1]), row_keys(kind, own), rows)
        moving = rocksdict.IngestExternalFileOptions()
        moving.set_move_files(True)
        self.database.ingest_external_file(paths, moving)

    def apply(self, users: np.ndarray, events: bytes) -> None:
        """Folds a batch in: users uint64 [n], WIDTH bytes of events for each."""
        order = np.argsort(users, kind="stable")
        found, starts = np.unique(users[order], return_index=True)
        ends = [*starts[1:].tolist(), len(users)]
        places = order.tolist()
        new = [
            b"".join(events[i * WIDTH : (i + 1) * WIDTH] for i in places[start:end])
            for start, end in zip(starts.tolist(), ends, strict=True)
        ]
        batch = rocksdict.WriteBatch(raw_mode=True)
        if not self.recent:
            keys = row_keys(BODY, found)
            for key, row, more in zip(keys, self.database.get(keys), new, strict=True):
                batch.put(key, sealed(row[:HEADER], (row[HEADER:] + more)[-LENGTH * WIDTH :]))
        else:
            keys, full = row_keys(RECENT, found), []
            for i, (key, row, more) in enumerate(zip(keys, self.database.get(keys), new, strict=True)):
                events_of = row[HEADER:] + more
                if len(events_of) > self.recent * WIDTH:
                    full.append((i, events_of))
                    events_of = b""
                batch.put(key, sealed(row[:HEADER], events_of))
            bodies = row_keys(BODY, found[[i for i, _ in full]])
            for key, row, (_, more) in zip(bodies, self.database.get(bodies) if bodies else (), full, strict=True):
                batch.put(key, sealed(row[:HEADER], (row[HEADER:] + more)[-LENGTH * WIDTH :]))
        self.database.write(batch)

    def read(self, user: np.ndarray) -> bytes:
        """One user's row: user uint64 [1]."""
        keys = row_keys(BODY, user) + (row_keys(RECENT, user) if self.recent else [])
        rows = self.database.get(keys)
        if not self.recent:
            return rows[0]
        body, recent = rows
        return sealed(body[:HEADER], (body[HEADER:] + recent[HEADER:])[-LENGTH * WIDTH :])

    def settle(self) -> None:
        """Flushes and waits until nothing is left to compact."""
        self.database.flush()
        deadline_s = time.monotonic() + 120
        names = ("rocksdb.compaction-pending", "rocksdb.num-running-compactions", "rocksdb.num-running-flushes")
        while any(self.database.property_int_value(name) for name in names) and time.monotonic() < deadline_s:
            time.sleep(0.05)

    def ticker(self, name: str) -> int:
        """A counter of RocksDB's statistics."""
        lines = self.options.get_statistics().splitlines()
        return next(int(line.rpartition(":")[2]) for line in lines if line.startswith(f"{name} COUNT"))


def io_bytes(name: str) -> int:
    """read_bytes or write_bytes of this process."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return next(int(line.partition(":")[2]) for line in lines if line.startswith(f"{name}:"))


def measure(folder: Path, ids: np.ndarray, users: np.ndarray, recent: int, blobs: bool, batch: int) -> dict[str, float]:
    """Figures of one layout."""
    layout = Layout(folder, ids, recent, blobs, CACHE_BYTES_PER_USER * len(ids))
    random = np.random.default_rng(3)
    tickers = ("rocksdb.flush.write.bytes", "rocksdb.compact.write.bytes", "rocksdb.wal.bytes", "rocksdb.compact.read.bytes")
    steady = len(users) // 4 // batch * batch
    for start in track(range(0, len(users), batch), f"recent {recent}", transient=True):
        if start == steady:
            before = time.monotonic(), time.process_time(), io_bytes("write_bytes"), io_bytes("read_bytes")
            counted = [layout.ticker(name) for name in tickers]
        own = users[start : start + batch]
        layout.apply(own, random.bytes(len(own) * WIDTH))
    wall_s = time.monotonic() - before[0]
    layout.settle()
    count = len(users) - steady
    found = {
        "events_per_s": count / wall_s,
        "cpu_us_per_event": (time.process_time() - before[1]) / count * 1e6,
        "bytes_written_per_event": (io_bytes("write_bytes") - before[2]) / count,
        "bytes_read_per_event": (io_bytes("read_bytes") - before[3]) / count,
    }
    for name, value in zip(("flush", "compaction", "wal", "compaction_read"), tickers, strict=True):
        found[f"{name}_bytes_per_event"] = (layout.ticker(value) - counted[tickers.index(value)]) / count
    sample = random.choice(users, READS).reshape(-1, 1)
    cpu_s, read_bytes, times = time.process_time(), io_bytes("read_bytes"), []
    for user in sample:
        started_s = time.perf_counter()
        layout.read(user)
        times.append(time.perf_counter() - started_s)
    found |= {
        "read_us_p50": float(np.percentile(times, 50)) * 1e6,
        "read_us_p99": float(np.percentile(times, 99)) * 1e6,
        "read_cpu_us": (time.process_time() - cpu_s) / READS * 1e6,
        "read_bytes_per_read": (io_bytes("read_bytes") - read_bytes) / READS,
    }
    layout.database.close()
    found["disk_mb"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return found


def main() -> None:
    """Measures each layout in a process of its own and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--batch", type=int, default=20_000)
    parser.add_argument("--recent", default="0,blobs,8,16", help="most events of a recent row; 0 and blobs: one row a user")
    parser.add_argument("--json")
    options = parser.parse_args()
    ids = np.unique(np.random.default_rng(1).integers(0, 2**64, options.users, np.uint64))
    weights = np.cumsum(1.0 / np.arange(1, len(ids) + 1) ** 1.05)
    ranks = np.searchsorted(weights / weights[-1], np.random.default_rng(4).random(options.events)).clip(max=len(ids) - 1)
    users = np.random.default_rng(5).permutation(ids)[ranks]
    results = {}
    for layout in options.recent.split(","):
        recent, blobs = 0 if layout == "blobs" else int(layout), layout == "blobs"
        folder = Path(tempfile.mkdtemp(prefix="freshrank-layout-"))
        try:
            name = "one, blobs" if blobs else f"recent {recent}" if recent else "one"
            results[name] = measure(folder, ids, users, recent, blobs, options.batch)
        finally:
            shutil.rmtree(folder)
    table = Table(
        "figure", *results, title=f"{len(ids):,} users, {options.events:,} events, batches of {options.batch:,}, {os.cpu_count()} cores"
    )
    for figure in next(iter(results.values())):
        table.add_row(figure, *(f"{found[figure]:,.4g}" for found in results.values()))
    Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Which way should another process read the state? The LMDB view against a RocksDB secondary of the store.

A writer applies 1,000 or 5,000 events/s to 4 partitions of full rows, as the worker does: a WriteBatch, then the view. A reader in another
process reads two users and the watermark at 200 reads/s, open loop: a read that starts late counts from when it should have started. Both
users are rewritten by every batch, so that a reading whose rows and watermark are not of one batch shows. Run from the checkout:

    python tests/bench/read_path.py --seconds 10 > read_path.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import rocksdict

from features.actions import EVENT_DTYPE
from features.sequence import HEADER_DTYPE, NEVER_ERASED, Definition, Row, encode_row
from streams.state import META_KEY, Meta, row_key, row_keys
from streams.store import RocksStore
from streams.view import MAP_BYTES, PartitionView

PARTITIONS, USERS, LENGTH, EPOCH = 4, 5_000, 100, 1
KEPT = {1: Definition(fingerprint=5, length=LENGTH)}
READS_PER_S, BATCHES_PER_S = 200, 50
HOT = (0, 1)
_ROW_OFFSET = HEADER_DTYPE.fields["offset"][1]


def write(folder: Path, events_per_s: int, write_buffer_bytes: int, with_view: bool, ready: Event, stop: Event, answers: Any) -> None:
    """The worker's writes at a constant rate; puts us per row of store and view."""
    random = np.random.default_rng(1)
    store = RocksStore(folder / "state", KEPT, write_buffer_bytes=write_buffer_bytes)
    held = [store.open(partition, EPOCH) for partition in range(PARTITIONS)]
    views = [PartitionView(folder / "view", partition) for partition in range(PARTITIONS)] if with_view else []
    events = np.zeros(LENGTH, EVENT_DTYPE)
    events["entity_id"] = random.integers(0, 2**63, LENGTH)
    every = np.arange(USERS, dtype=np.uint64)
    for partition in range(PARTITIONS):
        rows = [encode_row(Row(user, 5, EPOCH, partition, 0, NEVER_ERASED, events)) for user in range(USERS)]
        held[partition].write(row_keys(1, every), rows, replace(held[partition].meta, applied_offset=0))
        if with_view:
            views[partition].sync(held[partition].meta, held[partition].scan, 1)
    ready.set()
    seconds, count, number, due_s = [0.0, 0.0], 0, 0, time.monotonic()
    per_batch = max(1, events_per_s // BATCHES_PER_S)
    while not stop.is_set():
        number, due_s = number + 1, due_s + 1 / BATCHES_PER_S
        partition = number % PARTITIONS
        users = np.union1d(HOT, random.integers(0, USERS, per_batch)).astype(np.uint64)
        rows = [encode_row(Row(int(user), 5, EPOCH, partition, number, NEVER_ERASED, events)) for user in users]
        keys, meta = row_keys(1, users), replace(held[partition].meta, applied_offset=number, log_clock_ms=time.monotonic_ns())
        started_s = time.perf_counter()
        held[partition].write(keys, rows, meta)
        stored_s = time.perf_counter()
        if with_view:
            views[partition].write(keys, rows, meta)
        seconds[0] += stored_s - started_s
        seconds[1] += time.perf_counter() - stored_s
        count += len(rows)
        time.sleep(max(0.0, due_s - time.monotonic()))
    answers.put([us / count * 1e6 for us in seconds])
    for item in [*views, *held]:
        item.close()


def open_view(folder: Path) -> Callable[[int], list[bytes]]:
    """Reads (meta, row, row) of a partition from LMDB."""
    opened = [lmdb.open(str(folder / "view" / str(p)), map_size=MAP_BYTES, readonly=True, max_spare_txns=2) for p in range(PARTITIONS)]
    keys = [META_KEY, *(row_key(1, user) for user in HOT)]

    def read(partition: int) -> list[bytes]:
        with opened[partition].begin() as transaction:
            return [transaction.get(key) for key in keys]

    return read


def open_secondary(folder: Path, partition: int) -> rocksdict.Rdict:
    """A secondary instance of a partition's database."""
    access = rocksdict.AccessType.secondary(str(folder / f"secondary-{partition}"))
    return rocksdict.Rdict(str(folder / "state" / str(partition)), rocksdict.Options(raw_mode=True), access_type=access)


def open_secondaries(folder: Path, poll_s: float) -> Callable[[int], list[bytes]]:
    """The same from secondaries; all of them catch up when `poll_s` has passed (0: the one that is read, before each read)."""
    opened = [open_secondary(folder, partition) for partition in range(PARTITIONS)]
    keys = [META_KEY, *(row_key(1, user) for user in HOT)]
    next_s = [0.0]

    def read(partition: int) -> list[bytes]:
        if not poll_s:
            opened[partition].try_catch_up_with_primary()
        elif time.monotonic() >= next_s[0]:
            for database in opened:
                database.try_catch_up_with_primary()
            next_s[0] = time.monotonic() + poll_s
        found: list[bytes] = opened[partition].get(keys)
        return found

    return read


def read_open_loop(read: Callable[[int], list[bytes]], seconds: float) -> dict[str, float]:
    """Latencies from the due time, mixed readings, and how old the newest batch seen was."""
    latencies, ages, mixed = [], [], 0
    cpu_s, begin_s = time.process_time(), time.monotonic() + 0.1
    for i in range(int(seconds * READS_PER_S)):
        due_s = begin_s + i / READS_PER_S
        time.sleep(max(0.0, due_s - time.monotonic()))
        meta, *rows = read(i % PARTITIONS)
        now_s = time.monotonic()
        latencies.append(now_s - due_s)
        decoded = Meta.decode(meta, "read")
        ages.append(now_s - decoded.log_clock_ms / 1e9)
        mixed += any(int.from_bytes(row[_ROW_OFFSET : _ROW_OFFSET + 8], "little") != decoded.applied_offset for row in rows)
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "reads": len(latencies),
        "mixed_reads": mixed,
        "read_ms_p50": round(p50 * 1e3, 3),
        "read_ms_p99": round(p99 * 1e3, 3),
        "read_ms_max": round(max(latencies) * 1e3, 3),
        "age_ms_p50": round(float(np.median(ages[20:])) * 1e3, 1),
        "reader_cpu_share": round((time.process_time() - cpu_s) / seconds, 4),
    }


def measure(way: str, events_per_s: int, write_buffer_bytes: int, seconds: float) -> dict[str, float]:
    """One run of one way."""
    folder = Path(tempfile.mkdtemp(prefix="freshrank-read-path-"))
    context = multiprocessing.get_context("spawn")
    ready, stop, answers = context.Event(), context.Event(), context.Queue()
    with_view = way == "view"
    writer = context.Process(target=write, args=(folder, events_per_s, write_buffer_bytes, with_view, ready, stop, answers))
    writer.start()
    try:
        if not ready.wait(120):
            raise TimeoutError("the writer did not start")
        read = open_view(folder) if with_view else open_secondaries(folder, 0.02 if way == "secondary_poll_20ms" else 0.0)
        figures = read_open_loop(read, seconds)
        stop.set()
        store_us, view_us = answers.get(timeout=60)
    finally:
        stop.set()
        writer.join(60)
        shutil.rmtree(folder, ignore_errors=True)
    return {**figures, "store_us_per_row": round(store_us, 2), "view_us_per_row": round(view_us, 2)}


def mixed_moments(batches: int, checkpoint_share: float) -> dict[str, float]:
    """Readings of a secondary that are no moment of the state.

    Each batch rewrites some of six users, half of the batches are followed by a catch-up and a read. A checkpoint, which every snapshot
    takes, flushes the tables; the secondary then sees new rows beside old ones.
    """
    folder = Path(tempfile.mkdtemp(prefix="freshrank-read-path-"))
    random = np.random.default_rng(2)
    held, secondary = RocksStore(folder / "state", KEPT).open(0, EPOCH), None
    keys = [row_key(1, user) for user in range(6)]
    moments: list[list[bytes | None]] = []
    state: list[bytes | None] = [None] * len(keys)
    reads = mixed = 0
    for number in range(batches):
        touched = [user for user in range(len(keys)) if random.random() < 0.4]
        for user in touched:
            state[user] = b"%d" % number
        moments.append(list(state))
        rows = [b"%d" % number] * len(touched)
        held.write([keys[user] for user in touched], rows, replace(held.meta, applied_offset=number))
        if random.random() < checkpoint_share:
            rocksdict.Checkpoint(held._database).create_checkpoint(str(folder / f"checkpoint-{number}"))
        secondary = secondary or open_secondary(folder, 0)
        if random.random() < 0.5:
            secondary.try_catch_up_with_primary()
            meta, *found = secondary.get([META_KEY, *keys])
            reads += 1
            mixed += found != moments[Meta.decode(meta, "read").applied_offset]
    held.close()
    shutil.rmtree(folder, ignore_errors=True)
    return {"reads": reads, "mixed_reads": mixed}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each run")
    seconds = parser.parse_args().seconds
    figures: dict[str, dict[str, float]] = {
        f"secondary, a checkpoint behind {share:.0%} of batches": mixed_moments(1_500, share) for share in (0.0, 0.05, 0.3)
    }
    for events_per_s in (1_000, 5_000):
        for write_buffer_mb in (4, 256):  # small: tables are flushed during the run, large: everything stays in the log
            for way in ("view", "secondary_poll_20ms", "secondary_each_read"):
                name = f"{way}, {events_per_s} events/s, {write_buffer_mb} MB write buffer"
                figures[name] = measure(way, events_per_s, write_buffer_mb << 20, seconds)
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("rocksdict", "lmdb", "numpy")}
    print(json.dumps({"name": "read_path", "machine": machine, "versions": versions, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()

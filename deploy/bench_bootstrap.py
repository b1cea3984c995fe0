"""Benchmark `bootstrap`: how fast offline history becomes every partition's state.

The history is a canonical Parquet log in the order of its time, which is no order of users: 300,000 users in turn at random, 100 actions
each on average, sequences of 100, 4 partitions. The rate is of the whole work: hashing and reading the files, sorting, folding, writing the
tables and loading them. At the end sampled users are compared with the naive fold.
"""

import contextlib
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from deploy.bench_ingest import DOMAIN, BenchError
from features.actions import ACTION, EVENT_DTYPE, Batch
from features.domain import parse_domain
from features.ids import partitions_of
from features.logs import ACTIONS, LoggedActions, LogWriter, actions_schema
from features.oracle import naive_fold
from features.sequence import decode_row
from streams.bootstrap import bootstrap
from streams.state import definitions, row_keys
from streams.store import RocksStore

EVENTS, USERS, PARTITIONS = 30_000_000, 300_000, 4
SAMPLED_USERS = 100
EPOCH = 1
_CHUNK = 1 << 17
_DAY_MS = 86_400_000


def bench_bootstrap(
    runs: int, folder: Path, console: Console, *, event_count: int = EVENTS, user_count: int = USERS
) -> list[dict[str, float]]:
    """Figures of each run. Raises BenchError: a sampled user's sequence is not the naive fold of the history."""
    domain = parse_domain(DOMAIN, source="bench domain")
    ids = np.random.default_rng(1).integers(0, 2**64, user_count, np.uint64)
    sample = np.unique(np.random.default_rng(2).choice(ids, SAMPLED_USERS))
    own: list[LoggedActions] = []
    with LogWriter(folder / "history", ACTIONS, actions_schema(domain)) as writer:
        for start in track(range(0, event_count, _CHUNK), "writing the history", console=console, transient=True):
            piece = random_history(ids, min(_CHUNK, event_count - start), start, seed=start)
            writer.write_actions(piece)
            where = np.isin(piece.users, sample)
            own.append(LoggedActions.imported(piece.users[where], piece.events[where], piece.append_time_ms[where]))
    found = []
    for _ in range(runs):
        state = folder / "state"
        started_s, cpu_s = time.monotonic(), _children_cpu_s()
        peak = _Peak()
        bootstrap(str(folder / "history"), domain, state, PARTITIONS, lambda _: EPOCH, progress=peak.look)
        elapsed_s = time.monotonic() - started_s
        _check(state, own, sample)
        disk_bytes = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
        found.append(
            {
                "events_per_s": event_count / elapsed_s,
                "cpu_us_per_event": (_children_cpu_s() - cpu_s) / event_count * 1e6,
                "resident_mb": peak.resident_mb,
                "disk_mb": disk_bytes / 1e6,
            }
        )
        console.print(f"{event_count:,} events in {elapsed_s:.1f} s: {found[-1]['events_per_s']:,.0f} events/s on {os.cpu_count()} cores")
        shutil.rmtree(state)
    return found


def random_history(ids: npt.NDArray[np.uint64], count: int, start: int, seed: int) -> LoggedActions:
    """Actions of random users of `ids`, one a millisecond from `start` on; appended within a second of the event."""
    random = np.random.default_rng(seed)
    append_time_ms = 1_700_000_000_000 + start + np.arange(count)
    return LoggedActions.imported(
        random.choice(ids, count), random_events(random, append_time_ms - random.integers(0, 1000, count)), append_time_ms
    )


def random_events(random: np.random.Generator, event_time_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """Actions at these times: EVENT_DTYPE [n]."""
    count = len(event_time_ms)
    events = np.zeros(count, EVENT_DTYPE)
    events["event_time_ms"] = event_time_ms
    for name in ("event_id", "entity_id", "request_id"):
        events[name] = random.integers(0, 2**64, count, np.uint64)
    events["value"] = random.random(count, np.float32)
    events["surface"], events["entity_kind"], events["action"] = 3, 1, 1
    return events


class _Peak:
    """The most memory that the processes of a bootstrap take together, each at its own peak."""

    resident_mb = 0.0

    def look(self, *_: object) -> None:
        """Looks at the processes that run now; called as the work goes on."""
        total_kb = 0
        for process in multiprocessing.active_children():
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                lines = Path(f"/proc/{process.pid}/status").read_text("ascii").splitlines()
                total_kb += next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        self.resident_mb = max(self.resident_mb, total_kb / 1024)


def _children_cpu_s() -> float:
    """CPU seconds of this process and of the processes that it has waited for."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _check(state: Path, own: list[LoggedActions], sample: npt.NDArray[np.uint64]) -> None:
    users, events = np.concatenate([piece.users for piece in own]), np.concatenate([piece.events for piece in own])
    order = np.arange(len(users))
    expected = naive_fold([Batch(EPOCH, 0, order, order, np.full(len(users), ACTION, np.uint8), users, events, {})])
    kept = definitions(parse_domain(DOMAIN, source="bench domain"))
    partitions = partitions_of(sample, PARTITIONS)
    for partition in range(PARTITIONS):
        held = RocksStore(state, kept).open(partition, EPOCH)
        mine = sample[partitions == partition]
        for user, row in zip(mine.tolist(), held.get(row_keys(1, mine)), strict=True):
            if row is None or decode_row(row, user).events.tobytes() != expected[user].sequence(kept[1]).tobytes():
                raise BenchError(f"user {user:016x}: the sequence is not the naive fold of the history")
        held.close()

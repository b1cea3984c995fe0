"""Sorted runs on disk and their merge, with one batch of each run in memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.logs import LogWriter


def write_run(path: Path, table: pa.Table, time: str, batch_rows: int) -> None:
    """A run of batches of about `batch_rows`, none of which ends between rows of one time."""
    times_ms = table[time].to_numpy()
    changes = np.append(np.flatnonzero(times_ms[1:] != times_ms[:-1]) + 1, len(times_ms))
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        start = 0
        while start < len(times_ms):
            end = int(changes[min(int(np.searchsorted(changes, start + batch_rows)), len(changes) - 1)])
            stream.write_table(table.slice(start, end - start), max_chunksize=end - start)
            start = end


def merge(runs: list[Path], keys: tuple[str, ...], writer: LogWriter, advance: Callable[[int], None]) -> None:
    """Merges sorted runs; keys[0] is the time. One batch of each run is in memory.

    In each round everything up to the earliest of the batches' last times can go: no later batch has anything at or before it.
    """
    streams = [pa.ipc.open_stream(str(path)) for path in runs]
    heads: dict[int, pa.Table] = {}

    def refill(n: int) -> None:
        try:
            heads[n] = pa.Table.from_batches([streams[n].read_next_batch()])
        except StopIteration:
            heads.pop(n, None)
            streams[n].close()

    for n in range(len(streams)):
        refill(n)
    while heads:
        bound = min(int(head[keys[0]][-1].as_py()) for head in heads.values())
        parts: list[pa.Table] = []
        for n, head in list(heads.items()):
            cut = int(np.searchsorted(head[keys[0]].to_numpy(), bound, side="right"))
            parts.append(head.slice(0, cut))
            if cut == head.num_rows:
                refill(n)
            else:
                heads[n] = head.slice(cut)
        table = pa.concat_tables(parts)
        order = np.lexsort(tuple(table[name].to_numpy() for name in reversed(keys)))
        writer.write(table.take(pa.array(order)))
        advance(table.num_rows)

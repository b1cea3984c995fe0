"""Sorted runs: what is sorted a part at a time, merged into one order in bounded memory."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import pyarrow as pa


def write_run(path: Path, table: pa.Table, time: str, batch_rows: int) -> None:
    """Writes a table that is sorted by the column `time` as a run: batches of about `batch_rows`, none of which ends between rows of one
    time."""
    times_ms = table[time].to_numpy()
    changes = np.append(np.flatnonzero(times_ms[1:] != times_ms[:-1]) + 1, len(times_ms))
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        start = 0
        while start < len(times_ms):
            end = int(changes[min(int(np.searchsorted(changes, start + batch_rows)), len(changes) - 1)])
            stream.write_table(table.slice(start, end - start), max_chunksize=end - start)
            start = end


def write_run_of(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], time: str) -> None:
    """The same of a table that comes in pieces, one of which is in memory."""
    held = schema.empty_table()
    with pa.ipc.new_stream(str(path), schema) as stream:
        for table in tables:
            held = pa.concat_tables([held, table]).combine_chunks()
            times_ms = held[time].to_numpy()
            whole = int(np.searchsorted(times_ms, times_ms[-1])) if len(times_ms) else 0  # more rows of the last time may come
            if whole:
                stream.write_table(held.slice(0, whole))
                held = held.slice(whole)
        if held.num_rows:
            stream.write_table(held)


def merge_runs(runs: Seq[Path], keys: Seq[str]) -> Iterator[pa.Table]:
    """Rows of runs in the order of `keys`, of which the first is the runs' time; equal rows in the order of the runs, and within one as
    they stand there. One batch of each run is in memory.

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
        for n, head in sorted(heads.items()):
            cut = int(np.searchsorted(head[keys[0]].to_numpy(), bound, side="right"))
            parts.append(head.slice(0, cut))
            if cut == head.num_rows:
                refill(n)
            else:
                heads[n] = head.slice(cut)
        table = pa.concat_tables(parts)
        order = np.lexsort(tuple(table[name].to_numpy() for name in reversed(keys)))
        yield table.take(pa.array(order))

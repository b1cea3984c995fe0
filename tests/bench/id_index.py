"""What finding ids in large tables costs, with and without the directory: `python tests/bench/id_index.py`.

Microseconds, median: 200 ids a look-up, all over the table, after other work has gone through the cache.
"""

import time

import numpy as np
from rich.console import Console
from rich.table import Table

from features.id_index import IdIndex
from features.ids import U64

SIZES, IDS, LOOKUPS = (100_000, 1_000_000, 10_000_000), 200, 1_000


def median_us(index: IdIndex, asked: list[U64], other_work: np.ndarray) -> float:
    """Of one look-up."""
    found_s = []
    for ids in asked:
        begin_s = time.perf_counter()
        index.rows(ids)
        found_s.append(time.perf_counter() - begin_s)
        other_work[::8] += 1
    return float(np.median(found_s)) * 1e6


def main() -> None:
    """Prints the table."""
    random, other_work = np.random.default_rng(1), np.zeros(4_000_000)
    table = Table("ids", "of them", "binary search us", "directory us", "made in s")
    for size in SIZES:
        counted = np.arange(1, size + 1, dtype=np.uint64)
        hashed = np.unique(random.integers(0, 2**64 - 1, size, np.uint64))
        for name, ids in (("counted", counted), ("hashed", hashed)):
            begin_s = time.perf_counter()
            index = IdIndex(ids)
            made_s = time.perf_counter() - begin_s
            asked = [ids[random.integers(0, len(ids), IDS)] for _ in range(LOOKUPS)]
            plain_us, index_us = (median_us(one, asked, other_work) for one in (IdIndex(ids, ids_min=size + 1), index))
            table.add_row(name, f"{size:,}", f"{plain_us:.0f}", f"{index_us:.0f}", f"{made_s:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""Benchmark `decode`: what records in another encoding than the canonical one cost.

The load of `ingest` is decoded and folded by the worker's own code into a store in memory, without Kafka, with 0, 1 and 100 % of the
records in another valid protobuf encoding: fields in another order and an attribute, as a client in another language may write them. Then
with all of them as JSON. CPU of the one thread that does it; the state must be the same whatever the encoding.
"""

import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.progress import track

from deploy.bench_ingest import DOMAIN, BenchError, make_load
from features.actions import decode_batch, encode_events
from features.domain import Domain, parse_domain
from features.ids import partitions_of, user_keys
from protos.v1.actions_pb2 import Action
from streams.core import fold_batch
from streams.memory import MemoryStore
from streams.state import definitions

EVENTS, USERS, PARTITIONS = 400_000, 50_000, 4
BATCH_EVENTS = 20_000
_EPOCH = 1
_USER_ID_BYTES = 9  # the first field of the canonical layout, tag and value
_ATTRIBUTE = Action(attributes=[{"name": "client", "value": "other"}]).SerializeToString()


def _reordered(canonical: bytes) -> bytes:
    return b"".join((canonical[_USER_ID_BYTES:], _ATTRIBUTE, canonical[:_USER_ID_BYTES]))


def _as_json(canonical: bytes) -> bytes:
    return str(MessageToJson(Action.FromString(canonical), preserving_proto_field_name=True, indent=None)).encode()


LOADS = (("slow_0", 0, _reordered), ("slow_1", 1, _reordered), ("slow_100", 100, _reordered), ("json", 100, _as_json))
"""Figure, share of the records in another encoding, and which."""


def bench_decode(runs: int, folder: Path, console: Console, *, event_count: int = EVENTS) -> list[dict[str, float]]:
    """Figures of each run. Raises BenchError: the state depends on the encoding."""
    del folder
    domain = parse_domain(f'encodings = ["json"]\n{DOMAIN}', source="bench domain")
    users, events = make_load(event_count, USERS, 1)
    append_ms = time.time_ns() // 1_000_000
    found: list[dict[str, float]] = []
    for _ in range(runs):
        figures, states = {}, set()
        for figure, percent, other in track(LOADS, "decode and fold", console=console, transient=True):
            cpu_s, state = fold_load(domain, users, events, append_ms, percent, other)
            figures[f"cpu_us_per_event_{figure}"] = cpu_s / event_count * 1e6
            states.add(state)
        if len(states) > 1:
            raise BenchError("the state depends on how the records were encoded")
        found.append(figures)
        console.print(", ".join(f"{name.removeprefix('cpu_us_per_event_')}: {us:.2f} us" for name, us in figures.items()))
    return found


def fold_load(
    domain: Domain,
    users: npt.NDArray[np.uint64],
    events: npt.NDArray[np.void],
    append_ms: int,
    percent: int,
    other: Callable[[bytes], bytes],
) -> tuple[float, str]:
    """(CPU seconds of decoding and folding, digest of all rows), with `percent` of the records as `other` encodes them."""
    is_other = np.random.default_rng(2).permutation(len(users)) < len(users) * percent // 100
    partition_of_record = partitions_of(users, PARTITIONS)
    kept, digest, cpu_s = definitions(domain), sha256(), 0.0
    store = MemoryStore(kept)
    for partition in range(PARTITIONS):
        own = np.flatnonzero(partition_of_record == partition)
        held = store.open(partition, _EPOCH)
        for start in range(0, len(own), BATCH_EVENTS):
            where = own[start : start + BATCH_EVENTS]
            keys = [key.tobytes() for key in user_keys(users[where])]
            values = [
                other(value) if recode else value
                for value, recode in zip(encode_events(users[where], events[where]), is_other[where], strict=True)
            ]
            begin_s = time.thread_time()
            batch = decode_batch(
                log_epoch=_EPOCH,
                partition=partition,
                offsets=np.arange(start, start + len(where)),
                keys=keys,
                values=values,
                append_times_ms=np.full(len(where), append_ms),
                partition_count=PARTITIONS,
                future_tolerance_ms=domain.future_tolerance_ms,
                encodings=domain.encodings,
            )
            row_keys, rows, meta = fold_batch(kept, held, batch)
            cpu_s += time.thread_time() - begin_s
            if batch.reasons:
                raise BenchError(f"{len(batch.reasons)} records were rejected: {next(iter(batch.reasons.values()))}")
            held.write(row_keys, rows, meta)
        for _, row in held.scan():
            digest.update(row)
        held.close()
    return cpu_s, digest.hexdigest()

"""Takes erased users' past out of canonical logs (`features.logs`)."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.erasures import Erased, Erasure, erased_before_ms, erased_users, ledger_fingerprint
from features.logs import ACTIONS, IMPRESSIONS, PACKED, SERVED, is_served_log, locked, log_files

Past = Callable[[pa.RecordBatch], npt.NDArray[np.bool_]]
_REQUEST = ("request_id", "user_id", "request_time_ms")
REQUEST_DTYPE = np.dtype([("request_id", "<u8"), ("user_id", "<u8"), ("request_time_ms", "<i8")])
"""What tells the requests of a served log apart."""
_TOLD_BY = (*_REQUEST, "append_time_ms", "event_time_ms", "erase")


def drop_past(folder: str | Path, erasures: Iterable[Erasure]) -> int:
    """Takes the past of erased users out of a log folder's files; returns how many rows. Erasures stay.

    Actions and requests go up to their user's erasure; of a served log the requests that name an erased identity (`drop_served`), with all
    of their candidates. A file without such rows is left as it is; another is replaced when the new one is whole. Arrays packed under
    another ledger go: they are packed again when they are needed.
    """
    erasures = list(erasures)
    drop_packed(folder, erasures)
    if not is_served_log(folder):
        erased = erased_users(erasures)
        there = {name: Path(folder, name) for name in (ACTIONS, IMPRESSIONS)}
        past = {ACTIONS: _past_actions(erased), IMPRESSIONS: _past_requests(erased)}
        return sum(_rewrite(path, past[name]) for name, path in there.items() if path.exists())
    with locked(folder):
        actions, impressions, served = (log_files(folder, name) for name in (ACTIONS, IMPRESSIONS, SERVED))
        return drop_served(actions, impressions, served, erasures)


def drop_packed(folder: str | Path, erasures: Iterable[Erasure]) -> None:
    """Removes the training arrays of a log that were packed under another ledger, and those that do not say."""
    ledger = ledger_fingerprint(erased_users(list(erasures)))
    for packed in Path(folder, PACKED).glob("[!.]*"):
        try:
            known = json.loads((packed / "meta.json").read_text("utf-8"))["ledger"]
        except (OSError, ValueError, KeyError):  # it is being removed, or a removal was cut off
            known = None
        if known != ledger:
            shutil.rmtree(packed, ignore_errors=True)


def drop_served(actions: Iterable[Path], impressions: Iterable[Path], served: Iterable[Path], erasures: list[Erasure]) -> int:
    """The same for the files of a served log, of which those of `impressions` and `served` belong together one by one.

    A request goes if an identity that it names was erased: after it was asked or served, or behind the watermark that it had read. Its
    candidates go first: a run that was cut off in between is made good by the next.
    """
    erased = erased_users(erasures)
    gone = sum(_rewrite(path, _past_actions(erased)) for path in actions)
    for of_requests, of_served in zip(impressions, served, strict=True):
        with pq.ParquetFile(of_served) as file:
            doomed = [
                key
                for batch in file.iter_batches(columns=[*_REQUEST, "served_time_ms", "who", "log_epoch", "offset_read"])
                for key in _doomed(batch, erased, erasures)
            ]
        if doomed:
            keys = np.array(doomed, REQUEST_DTYPE)
            gone += _rewrite(of_requests, of_keys(keys))
            gone += _rewrite(of_served, of_keys(keys))
    return gone


def _past_actions(erased: Erased) -> Past:
    def past(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        first_ms = np.minimum(_array(batch, "append_time_ms"), _array(batch, "event_time_ms"))
        found: npt.NDArray[np.bool_] = first_ms <= erased_before_ms(erased, _array(batch, "user_id"))
        found &= ~_array(batch, "erase")
        return found

    return past


def _past_requests(erased: Erased) -> Past:
    def past(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = _array(batch, "request_time_ms") <= erased_before_ms(erased, _array(batch, "user_id"))
        return found

    return past


def of_keys(keys: npt.NDArray[np.void]) -> Past:
    """Which rows of impressions or `served` are of these requests, REQUEST_DTYPE."""

    def past(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        there = np.zeros(batch.num_rows, keys.dtype)
        for name in _REQUEST:
            there[name] = _array(batch, name)
        found: npt.NDArray[np.bool_] = np.isin(there, keys)
        return found

    return past


def _doomed(batch: pa.RecordBatch, erased: Erased, erasures: list[Erasure]) -> list[tuple[int, int, int]]:
    """Keys of the requests of rows of `served` that an erasure reaches."""
    who = batch.column("who")
    of = np.repeat(np.arange(len(who)), np.diff(who.offsets.to_numpy()))
    users, epochs, offsets = (_flat(batch, name) for name in ("who", "log_epoch", "offset_read"))
    first_ms = np.minimum(_array(batch, "request_time_ms"), _array(batch, "served_time_ms"))
    past = first_ms[of] <= erased_before_ms(erased, users)
    present = set(users[np.isin(users, np.array(sorted(erased), np.uint64))].tolist())
    for one in (one for one in erasures if one.user_id in present):
        past |= (users == one.user_id) & (epochs == one.log_epoch) & (offsets < one.offset) & (epochs != 0)
    rows = np.unique(of[past])
    return list(zip(*(_array(batch, name)[rows].tolist() for name in _REQUEST), strict=True))


def _flat(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = batch.column(name).flatten().to_numpy()
    return values


def _array(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = batch.column(name).to_numpy(zero_copy_only=False)
    return array


def _rewrite(path: Path, past: Past) -> int:
    """Rewrites a file without the rows of the past; returns how many those are."""
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in _TOLD_BY]
        gone = sum(int(past(batch).sum()) for batch in file.iter_batches(columns=columns))
        if not gone:
            return 0
        partial = path.with_name(f".{path.name}.part")
        with partial.open("wb") as out:
            with pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
                for group in range(file.num_row_groups):
                    kept = [batch.filter(pa.array(~past(batch))) for batch in file.iter_batches(row_groups=[group])]
                    writer.write_table(pa.Table.from_batches(kept, file.schema_arrow))
            out.flush()
            os.fsync(out.fileno())
    partial.replace(path)
    return gone

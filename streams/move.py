"""A state as history: what a move to another log takes along.

A log cannot be given more partitions, or be brought to another cluster, without becoming another log: records of a user would stand in two
partitions, and offsets would mean other records. So a move ends the old log and starts a new one on a base (`features.base`) made of the
old state. The law makes that exact: a row is the greatest of all that was said, and the greatest of that and of what comes later are the
same events. What a row's erasure drops stays dropped: it goes along as an erasure of the history.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from features.actions import EVENT_DTYPE
from features.domain import Domain
from features.logs import ACTIONS, LoggedActions, LogWriter, actions_schema
from features.sequence import NEVER_ERASED, Row, decode_row
from streams.errors import StateError
from streams.kafka import LogIdentity
from streams.state import Meta, definitions
from streams.store import RocksStore

_ROWS_AT_ONCE = 2_000


def export_state(
    state_folder: Path,
    domain: Domain,
    identity: LogIdentity,
    ends: Mapping[int, int],
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[int, int]:
    """Writes the state of every partition as history below `folder`; returns the last offset included, by partition.

    `ends`: offset of the next record of each partition; the state must include everything before it. `progress` is told the partitions
    that are done and how many there are.

    Raises:
        StateError: a worker holds the state, or it does not reach the log's end: produce nothing, wait for the worker, stop it.
    """
    store, last = RocksStore(state_folder, definitions(domain), lock_wait_s=0.0), {}
    for partition in range(identity.partition_count):
        held = store.open(partition, identity.epoch)
        try:
            if held.meta.applied_offset + 1 != ends[partition]:
                raise StateError(
                    f"partition {partition}: the state includes offset {held.meta.applied_offset}, the log ends before {ends[partition]}. "
                    "Stop what produces, let the worker reach the end, stop it, and try again"
                )
            # The folder a partition has is its own: each file is one partition's, in the order that the canonical log asks for.
            with LogWriter(folder / str(partition), ACTIONS, actions_schema(domain, order="offset")) as writer:
                for actions in _as_history(held.scan(), held.meta):
                    writer.write_actions(actions)
            last[partition] = held.meta.applied_offset
        finally:
            held.close()
        progress(partition + 1, identity.partition_count)
    return last


def _as_history(items: Iterator[tuple[bytes, bytes]], meta: Meta) -> Iterator[LoggedActions]:
    rows: list[Row] = []
    for _, row in items:
        rows.append(decode_row(row))
        if len(rows) == _ROWS_AT_ONCE:
            yield _records(rows, meta.log_clock_ms)
            rows = []
    if rows:
        yield _records(rows, meta.log_clock_ms)


def _records(rows: list[Row], clock_ms: int) -> LoggedActions:
    """The rows' events, and an erasure for each row that had one.

    Append times are the log clock at the state's moment, so that eviction goes on from it. Only where that would let an erasure of this
    very moment drop what came after it are they the event's own time, which the erasure leaves.
    """
    counts = np.array([len(row.events) for row in rows])
    users = np.array([row.user_id for row in rows], np.uint64)
    erased_ms = np.array([row.erased_before_ms for row in rows], np.int64)
    events = np.concatenate([row.events for row in rows]) if counts.any() else np.zeros(0, EVENT_DTYPE)
    time_ms = events["event_time_ms"]
    append_ms = np.where(np.repeat(erased_ms, counts) >= clock_ms, time_ms, clock_ms)
    gone = erased_ms != NEVER_ERASED
    return _logged(
        np.concatenate((np.repeat(users, counts), users[gone])),
        np.concatenate((events, np.zeros(int(gone.sum()), EVENT_DTYPE))),
        np.concatenate((append_ms, erased_ms[gone])),
        np.repeat([False, True], (len(events), int(gone.sum()))),
    )


def _logged(
    users: npt.NDArray[np.uint64], events: npt.NDArray[np.void], append_ms: npt.NDArray[np.int64], erase: npt.NDArray[np.bool_]
) -> LoggedActions:
    n = len(users)
    return LoggedActions(users, events, append_ms, np.zeros(n, np.uint64), np.full(n, -1, np.int32), np.full(n, -1, np.int64), erase)

"""Faults put into the code on purpose, which the simulation must find: those that were seen in real products, and some of our own promises.

Each is a patch: of the real code where it is the real code's promise, of the driver where Kafka's client is played, of the disk where it is
the atomic write that everything rests on.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

import streams.core
import streams.view
from features.actions import ERASE, decode_batch
from features.ports import SequenceUnavailableError
from streams.core import WorkerCore, fold_batch
from streams.state import META_KEY
from streams.view import PartitionView
from streams.view_reader import ViewReader

from .schedule import Simulation, SimWorker
from .world import Handle, SimPartition, SimReader, SimView

Patch = pytest.MonkeyPatch


class CommitsFirst(SimWorker):
    """Commits a batch's end to the group before it processes the batch, and starts from there."""

    def apply(self, partition, begin, end):
        self.sim.committed_offsets[partition] = self.sim.logs[partition].plan.offsets[end - 1] + 1
        super().apply(partition, begin, end)

    def start(self, partition, next_offset):
        return max(next_offset, self.sim.committed_offsets.get(partition, 0))


class StartsWhereConfigured(SimWorker):
    """Seeks to a configured start, the log's end, at every assignment."""

    def start(self, partition, next_offset):
        return max(next_offset, self.sim.logs[partition].first_and_next()[1])


def offset_left_out(patch: Patch) -> None:
    def write(self, keys, rows, meta):
        self.store.observer.point(self.store.process, "write")
        self.disk.put(dict(zip(keys, rows, strict=True)))
        self.meta = meta

    patch.setattr(SimPartition, "write", write)


def offset_in_a_write_before(patch: Patch) -> None:
    def write(self, keys, rows, meta):
        self.disk.put({META_KEY: meta.encode()})
        self.store.observer.point(self.store.process, "write")
        self.disk.put(dict(zip(keys, rows, strict=True)))
        self.meta = meta

    patch.setattr(SimPartition, "write", write)


def offset_in_a_write_after(patch: Patch) -> None:
    def write(self, keys, rows, meta):
        self.disk.put(dict(zip(keys, rows, strict=True)))
        self.store.observer.point(self.store.process, "write")
        self.disk.put({META_KEY: meta.encode()})
        self.meta = meta

    patch.setattr(SimPartition, "write", write)


def _offset_moved(by: int) -> Callable[[Patch], None]:
    def moved(kept, store, batch, leader_epoch=-1, view=None):
        keys, rows, meta = fold_batch(kept, store, batch, leader_epoch, view)
        return keys, rows, replace(meta, applied_offset=meta.applied_offset + by)

    return lambda patch: patch.setattr(streams.core, "fold_batch", moved)


def undecodable_ends_the_loop(patch: Patch) -> None:
    def decode(**arguments):
        batch = decode_batch(**arguments)
        if any(reason.startswith("value:") for reason in batch.reasons.values()):
            raise ValueError("a record cannot be decoded")
        return batch

    patch.setattr(streams.core, "decode_batch", decode)


def dead_letters_forgotten(patch: Patch) -> None:
    patch.setattr(WorkerCore, "_bury_rejected", lambda *_: None)


def owner_not_checked(patch: Patch) -> None:
    patch.setattr(streams.view, "check_owner", lambda *_: None)


def _erase_moved(first: bool) -> Callable[[Patch], None]:
    """The batch's erasures are applied before, or behind, all of its actions."""

    def decode(**arguments):
        batch = decode_batch(**arguments)
        is_erase = batch.verdict == ERASE
        order = (~is_erase if first else is_erase).argsort(kind="stable")
        moved = {name: getattr(batch, name)[order] for name in ("append_time_ms", "verdict", "users", "events")}
        return replace(batch, **moved)

    return lambda patch: patch.setattr(streams.core, "decode_batch", decode)


def row_and_watermark_of_two_moments(patch: Patch) -> None:
    real = ViewReader._fetch

    def fetch(self, partition, keys):
        (meta, *_), (_, *rest) = real(self, partition, ()), real(self, partition, keys)
        return meta, *rest

    patch.setattr(ViewReader, "_fetch", fetch)


def later_view_not_adopted(patch: Patch) -> None:
    real = PartitionView.sync

    def sync(self, *arguments):
        copied = real(self, *arguments)
        self.adopted = streams.view._NOTHING
        return copied

    patch.setattr(PartitionView, "sync", sync)


def folds_on_any_view(patch: Patch) -> None:
    def rows(self, keys, _):
        with self._environment.begin() as transaction:
            return [transaction.get(key) for key in keys]

    patch.setattr(PartitionView, "rows", rows)


def torn_view_read(patch: Patch) -> None:
    def environment(self, partition):
        if partition not in self._machine.views:
            raise SequenceUnavailableError("no view")
        return Handle(self._machine.views[partition], lambda where: self._observer.point(None, where), lambda *_: None)

    patch.setattr(SimReader, "_environment", environment)


def replaced_view_written(patch: Patch) -> None:
    patch.setattr(SimView, "_is_replaced", lambda _: False)


def _driven_by(worker_class: type[SimWorker]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(Simulation, "worker_class", worker_class)


MUTATIONS: dict[str, Callable[[Patch], None]] = {
    "the offset left out of the batch": offset_left_out,
    "the offset in a write of its own, before the rows": offset_in_a_write_before,
    "the offset in a write of its own, behind the rows": offset_in_a_write_after,
    "committed before processing": _driven_by(CommitsFirst),
    "the next offset stored as the last one": _offset_moved(1),
    "the last offset stored as the next one": _offset_moved(-1),
    "seeking to a configured start at every rebalance": _driven_by(StartsWhereConfigured),
    "an undecodable record ends the loop": undecodable_ends_the_loop,
    "an undecodable record passed over without a dead letter": dead_letters_forgotten,
    "a generation check ignored": owner_not_checked,
    "an erase applied before its batch": _erase_moved(first=True),
    "an erase applied behind its batch": _erase_moved(first=False),
    "a read that pairs a row with another moment's watermark": row_and_watermark_of_two_moments,
    "a later view overwritten by an earlier state": later_view_not_adopted,
    "a batch folded on a view of another moment": folds_on_any_view,
    "a view read that a power loss may have torn": torn_view_read,
    "a view written that another worker has replaced": replaced_view_written,
}

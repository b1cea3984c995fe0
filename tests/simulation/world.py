"""The simulated machines under the worker core: disks that lose unsynced writes, views that processes share, snapshots, a log.

Everything that can be delayed or die tells `Observer.point` where it is; there a process may be killed, its machine may lose power, or
it may freeze while others go on.
"""

import errno
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import lmdb

from features.ports import SequenceCorruptError, SequenceUnavailableError
from features.sequence import Definition
from streams.core import RetentionPolicy
from streams.errors import FencedError, StateError
from streams.state import META_KEY, Meta
from streams.store import check_meta, initial_meta
from streams.view import PartitionView
from streams.view_reader import ViewReader

from .plan import EPOCH, PartitionPlan

Content = dict[bytes, bytes]


class KilledError(BaseException):
    """A process ended without a word: by SIGKILL, or because its machine lost power. Not for any handler of the code under test."""

    def __init__(self, process: "Process") -> None:
        self.process = process


@dataclass(eq=False)
class Process:
    """A worker's process, from its start to its end. `frozen`: stopped in the middle of a step."""

    machine: "Machine"
    name: str
    alive: bool = True
    frozen: bool = False


class Observer(Protocol):
    """Whoever decides what happens next, and looks at what happened."""

    def point(self, process: Process | None, where: str) -> None:
        """Returns when the process goes on. `process` None: a reader. Raises KilledError where it does not."""
        ...

    def committed(self, partition: int, before: Content, after: Content) -> None:
        """A view's transaction was committed."""
        ...


@dataclass
class SimLog:
    """One partition's log: it holds the plan's records from index `first` up to index `end`."""

    plan: PartitionPlan
    first: int = 0
    end: int = 0

    def first_and_next(self) -> tuple[int, int]:
        """As a broker would say it."""
        offsets = self.plan.offsets
        following = offsets[self.end - 1] + 1 if self.end else 0
        return (0 if not self.first else offsets[self.first] if self.first < self.end else following), following


# Disk and store.


@dataclass
class Disk:
    """One partition's state on a worker's disk. A write is safe from a kill and from a power loss once it is synced."""

    content: Content = field(default_factory=dict)
    synced: Content = field(default_factory=dict)
    unsynced: list[Content] = field(default_factory=list)
    bad_blocks: set[bytes] = field(default_factory=set)
    """Keys whose block cannot be read."""
    is_damaged: bool = False
    """A row is not what it was."""
    refuses_opening: bool = False
    holder: Process | None = None

    def put(self, batch: Content) -> None:
        """One atomic write."""
        self.unsynced.append(batch)
        self.content = self.content | batch
        self.bad_blocks -= batch.keys()

    def sync(self) -> None:
        """Everything is safe."""
        self.synced, self.unsynced = self.content, []

    def crash(self, kept: int) -> int:
        """Keeps the first `kept` of the unsynced writes; returns how many are lost."""
        lost = len(self.unsynced) - kept
        for batch in self.unsynced[:kept]:
            self.synced = self.synced | batch
        self.content, self.unsynced, self.holder = self.synced, [], None
        return lost

    def meta(self) -> Meta | None:
        """Where it stands."""
        encoded = self.content.get(META_KEY)
        return Meta.decode(encoded, "disk") if encoded else None


@dataclass
class Snapshot:
    """A checkpoint in the snapshot store, with whatever damage the disk had. `is_incomplete`: a file is not what its manifest says."""

    content: Content
    bad_blocks: frozenset[bytes] = frozenset()
    is_damaged: bool = False
    is_incomplete: bool = False


class SimStore:
    """See `streams.store.Store`: the partitions of one worker's state folder, for one process of it."""

    def __init__(
        self,
        disks: dict[int, Disk],
        snapshots: dict[int, dict[int, Snapshot]],
        kept: dict[int, Definition],
        process: Process,
        observer: Observer,
    ) -> None:
        self.disks, self.snapshots, self.kept, self.process, self.observer = disks, snapshots, kept, process, observer
        self.full = False
        """The disk takes no more writes."""
        self.on_full: Callable[[], bool] = lambda: False
        """Is told that a write met a full disk; answers whether the write got through nevertheless."""
        self.restored = 0

    def open(self, partition: int, log_epoch: int) -> "SimPartition":
        """See `Store.open`. What must hold of stored bytes is checked by the real code."""
        disk = self.disks.setdefault(partition, Disk())
        self.observer.point(self.process, "open")
        if disk.holder is not None and disk.holder.alive:
            raise StateError(f"partition {partition}: another worker holds it")
        if disk.refuses_opening:
            raise SequenceCorruptError(f"partition {partition}: a file is damaged")
        expected = initial_meta(partition, log_epoch, self.kept)
        meta = disk.meta()
        if meta is not None:
            check_meta(meta, expected, f"partition {partition}")
        elif disk.content:
            raise StateError(f"partition {partition}: has rows but no meta row")
        disk.holder = self.process
        return SimPartition(self, disk, meta or expected)

    def newest_snapshot(self, partition: int, log_epoch: int) -> int | None:
        """See `Store.newest_snapshot`. Like a manifest, it does not tell whether the files are whole."""
        assert log_epoch == EPOCH
        return max(self.snapshots[partition], default=None)

    def restore(self, partition: int, log_epoch: int, *, first: int = 0, skip: int = 0) -> "SimPartition":
        """See `Store.restore`."""
        for offset in sorted(self.snapshots[partition], reverse=True)[skip:]:
            snapshot = self.snapshots[partition][offset]
            if not snapshot.is_incomplete and offset + 1 >= first:
                self.observer.point(self.process, "restore")
                self._replace(
                    partition, Disk(snapshot.content, snapshot.content, bad_blocks=set(snapshot.bad_blocks), is_damaged=snapshot.is_damaged)
                )
                self.restored += 1
                with suppress(SequenceCorruptError):  # the one before it, then
                    return self.open(partition, log_epoch)
        raise StateError(f"partition {partition}: no snapshot could be restored")

    def start_over(self, partition: int, log_epoch: int, start_offset: int) -> "SimPartition":
        """See `Store.start_over`: the folder is renamed, a new one made, and where it starts is written into that."""
        self._replace(partition, Disk())
        held = self.open(partition, log_epoch)
        if start_offset:
            held.write([], [], initial_meta(partition, log_epoch, self.kept, start_offset))
            held.disk.sync()
        return held

    def _replace(self, partition: int, disk: Disk) -> None:
        holder = self.disks[partition].holder
        assert holder is None or not holder.alive, "the partition must be closed"
        self.disks[partition] = disk


class SimPartition:
    """See `streams.store.PartitionStore`."""

    def __init__(self, store: SimStore, disk: Disk, meta: Meta) -> None:
        self.store, self.disk, self.meta = store, disk, meta

    def get(self, keys: Seq[bytes]) -> list[bytes | None]:
        """See `PartitionStore.get`."""
        if self.disk.bad_blocks and not self.disk.bad_blocks.isdisjoint(keys):
            raise SequenceCorruptError("block checksum mismatch")
        return [self.disk.content.get(key) for key in keys]

    def write(self, keys: Seq[bytes], rows: Seq[bytes], meta: Meta) -> None:
        """See `PartitionStore.write`."""
        self.store.observer.point(self.store.process, "write")
        batch = dict(zip(keys, rows, strict=True))
        batch[META_KEY] = meta.encode()
        if not self.store.full:
            self.disk.put(batch)
        elif self.store.on_full():
            self.disk.put(batch)
            raise OSError(errno.ENOSPC, "No space left on device, after the write")
        else:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.meta = meta

    def scan(self) -> Iterator[tuple[bytes, bytes]]:
        """See `PartitionStore.scan`."""
        for key, row in sorted(self.disk.content.items()):
            if key != META_KEY:
                if key in self.disk.bad_blocks:
                    raise SequenceCorruptError("block checksum mismatch")
                yield key, row

    def close(self) -> None:
        """See `PartitionStore.close`. A process that is dead holds nothing any more."""
        if self.disk.holder is self.store.process:
            self.disk.holder = None


# View and reader: the real ones, over an environment in memory.


@dataclass(eq=False)
class Machine:
    """What survives a process and not a power loss: the views, and who is alive."""

    name: str
    boot: int = 0
    views: dict[int, "Environment"] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)


class Environment:
    """What `streams.view` uses of an LMDB environment: readers see the last committed moment, one writer at a time."""

    def __init__(self, boot: int) -> None:
        self.boot = boot
        self.data: Content = {}
        self.before: Content = {}
        self.writer: Process | None = None
        self.full = False

    def tear(self, choose: Callable[[Seq[Content]], Content]) -> None:
        """A power loss: of each key an older or the newer value is on the disk."""
        keys = self.data.keys() | self.before.keys()
        torn = {key: choose((self.data, self.before)).get(key) for key in sorted(keys)}
        self.data = {key: value for key, value in torn.items() if value is not None}


class Handle:
    """A process's own handle of an environment. `pause` is told where a transaction is, `committed` the content before and after."""

    def __init__(self, environment: Environment, pause: Callable[[str], None], committed: Callable[[Content, Content], None]) -> None:
        self.environment, self._pause, self._committed = environment, pause, committed

    @contextmanager
    def begin(self, *, write: bool = False) -> Iterator["Transaction"]:
        """As `lmdb.Environment.begin`."""
        self._pause("transaction")
        transaction = Transaction(self.environment, self._pause)
        yield transaction
        if write:
            self._pause("commit")
            self.environment.before, self.environment.data = self.environment.data, transaction.data
            self._committed(self.environment.before, self.environment.data)

    def open_db(self) -> None:
        """As `lmdb.Environment.open_db`: the one unnamed database."""

    def info(self) -> dict[str, Any]:
        """As `lmdb.Environment.info`."""
        return {"map_size": 0}

    def close(self) -> None:
        """As `lmdb.Environment.close`."""


class Transaction:
    """As `lmdb.Transaction`, and its own cursor."""

    def __init__(self, environment: Environment, pause: Callable[[str], None]) -> None:
        self._environment, self.data, self._pause = environment, environment.data, pause

    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        """As `lmdb.Transaction.get`."""
        return self.data.get(key, default)

    def put(self, key: bytes, value: bytes) -> None:
        """As `lmdb.Transaction.put`."""
        self.data = self.data | {key: value}

    def drop(self, database: None, *, delete: bool) -> None:
        """As `lmdb.Transaction.drop`."""
        assert database is None
        assert not delete
        self.data = {}

    @contextmanager
    def cursor(self) -> Iterator["Transaction"]:
        """As `lmdb.Transaction.cursor`."""
        yield self

    def putmulti(self, items: list[tuple[bytes, bytes]], *, append: bool) -> None:
        """As `lmdb.Cursor.putmulti`."""
        self._pause("putmulti")
        if self._environment.full:
            raise lmdb.MapFullError("the disk is full")
        if append:
            keys = [max(self.data, default=b""), *(key for key, _ in items)]
            assert keys == sorted(set(keys)), "appended keys must ascend"
        self.data = self.data | dict(items)


class Seat:
    """What is left of a worker when its process ends: its disk, and its settings."""

    def __init__(self, name: str, machine: Machine, *, standby: bool, policy: RetentionPolicy) -> None:
        self.name, self.machine, self.standby, self.policy = name, machine, standby, policy
        self.disks: dict[int, Disk] = {}
        self.worker: Any = None


class SimView(PartitionView):
    """The real view's rules over `Environment`: a folder is an entry of the machine's views, a lock is the environment's writer."""

    def __init__(self, process: Process, partition: int, observer: Observer) -> None:
        self._process, self._number, self._observer = process, partition, observer
        super().__init__("views", partition)

    def _is_left_over(self) -> bool:
        found = self._process.machine.views.get(self._number)
        return found is not None and found.boot != self._process.machine.boot

    def _drop(self) -> None:
        self._process.machine.views.pop(self._number, None)

    def _open_files(self) -> None:
        machine = self._process.machine
        self._there = machine.views.setdefault(self._number, Environment(machine.boot))
        self._environment = Handle(
            self._there,
            lambda where: self._observer.point(self._process, where),
            lambda before, after: self._observer.committed(self._number, before, after),
        )

    def _is_replaced(self) -> bool:
        return self._process.machine.views.get(self._number) is not self._there

    def _lock(self) -> None:
        writer = self._there.writer
        if writer is not None and writer.alive and writer is not self._process:
            raise FencedError("another writer does not end its transaction")
        self._there.writer = self._process

    def _unlock(self) -> None:
        if self._there.writer is self._process:
            self._there.writer = None

    def close(self) -> None:
        """See `PartitionView.close`."""


class SimReader(ViewReader):
    """The real reader over `Environment`."""

    def __init__(self, machine: Machine, plans: Seq[PartitionPlan], observer: Observer) -> None:
        super().__init__("views", plans[0].domain, len(plans))
        self._machine, self._observer = machine, observer

    def _environment(self, partition: int) -> Handle:
        found = self._machine.views.get(partition)
        if found is None or found.boot != self._machine.boot:
            raise SequenceUnavailableError(f"no view of partition {partition} yet")
        return Handle(found, lambda where: self._observer.point(None, where), lambda *_: None)

    def meta_read(self, partition: int) -> Meta:
        """Meta of the last read of a partition."""
        return self._metas[partition][1]

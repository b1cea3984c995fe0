"""One seed: the real worker core, view, reader and law under a schedule of faults, compared with the naive fold at every look.

A worker here is `WorkerCore` with a driver that plays `streams.batch_loop`: it opens, applies what is delivered, seeks to where the state
waits, closes what the group takes away and takes again what a stale owner had fenced.
"""

import errno
import logging
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress

import lmdb

import streams.core
import streams.view
from features.ports import SequenceUnavailableError
from features.sequence import as_read, definition
from protos.v1.actions_pb2 import DeadLetter
from streams.core import Held, Log, RetentionPolicy, WorkerCore
from streams.errors import FencedError, StateError, ViewError
from streams.state import META_KEY, Meta, row_key
from streams.view import BEAT_KEY

from .plan import EPOCH, TOPIC, Plan, draw_plan
from .world import Content, Disk, KilledError, Machine, Process, Seat, SimLog, SimReader, SimStore, SimView, Snapshot

MUST_HAPPEN = (
    *("lost_write_crashes", "power_losses", "kills", "freezes", "fences", "two_owners", "rebalances", "batches", "redeliveries"),
    *("cuts", "duplicates", "erases", "dead_letters", "disk_full", "damages", "repairs", "snapshots", "restores", "retention_gaps"),
    *("adoptions", "reads"),
)
"""A run in which one of these never happened proves less than it says."""

_STEPS = (30, 70)
_POINTS_BETWEEN_FAULTS = 22
_DEPTH_MAX = 2
_SNAPSHOTS_MAX = 3
_ROUNDS_MAX = 60


class WrongError(AssertionError):
    """The system under test broke a promise."""


class SimWorker(Process):
    """A worker's process: the core, and what `streams.batch_loop` does around it."""

    def __init__(self, seat: Seat, sim: "Simulation") -> None:
        super().__init__(seat.machine, seat.name)
        self.seat, self.sim = seat, sim
        self.store = SimStore(seat.disks, sim.snapshots, sim.plan.partitions[0].kept, self, sim)
        self.core = WorkerCore(
            sim.plan.domain,
            self.store,
            lambda partition: SimView(self, partition, sim),
            self._bury,
            offset_below_retention=seat.policy,
            at=lambda step: sim.point(self, step),
            folds_on_view=sim.draw.random() < 0.7,
        )
        self.core.follow(Log(TOPIC, EPOCH, len(sim.logs), lambda partition: sim.logs[partition].first_and_next()))
        self.positions: dict[int, int] = {}
        """Offset of the next record that the consumer will give, of the partitions that it fetches."""
        self.opening: dict[int, Held] = {}

    def _bury(self, letters: Seq[tuple[bytes, bytes]]) -> None:
        self.sim.point(self, "bury")
        for _, value in letters:
            letter = DeadLetter.FromString(value)
            self.sim.buried.add((letter.source_partition, letter.source_offset))
        self.sim.happened["dead_letters"] += len(letters)

    def learn(self) -> None:
        """The group's word reaches this worker: what it no longer has is closed, what is new (or was fenced meanwhile) is opened."""
        wanted = set(self.sim.owners) if self.seat.standby else {p for p, seat in self.sim.owners.items() if seat is self.seat}
        for partition in sorted((self.core.held().keys() | self.opening.keys()) - wanted):
            self.positions.pop(partition, None)
            held = self.opening.pop(partition, None)
            if held is not None:
                held.view.close()
                held.store.close()
            self.core.close([partition])
        for partition in sorted(wanted - self.core.held().keys() - self.opening.keys()):
            try:
                held = self.core.prepare(partition)
            except FencedError:
                self.sim.happened["fences"] += 1  # taken over meanwhile: it is opened again if the group still says so
                continue
            self.opening[partition] = held
            self.sim.happened["adoptions"] += held.view.adopted >= 0

    def finish(self) -> None:
        """What was opened is fetched from where its state waits."""
        for partition in sorted(self.opening):
            self.positions[partition] = self.start(partition, self.core.hold(partition, self.opening.pop(partition)))

    def learn_and_finish(self) -> None:
        """Both at once, where opening takes no time."""
        self.learn()
        self.finish()

    def start(self, partition: int, next_offset: int) -> int:
        """Where the consumer begins."""
        del partition
        return next_offset

    def deliver(self, count: int, again: int) -> None:
        """Takes up to `count` records of a partition; `again` of them had come before."""
        behind = [p for p, position in self.positions.items() if again or position < self.sim.logs[p].first_and_next()[1]]
        if not behind:
            return
        partition = self.sim.draw.choice(sorted(behind))
        log, position = self.sim.logs[partition], self.positions[partition]
        if position < log.first_and_next()[0]:  # out of range: the broker no longer has it
            try:
                self.positions[partition] = self.start(partition, self.core.reopen(partition))
            except FencedError:
                self.sim.happened["fences"] += 1
                del self.positions[partition]  # not this worker's until it is opened again
            return
        begin = bisect_left(log.plan.offsets, position)
        if again and begin > log.first:
            self.sim.happened["redeliveries"] += 1
            begin = max(log.first, begin - again)
        end = min(begin + count, log.end)
        if begin < end:
            self.sim.happened["batches"] += 1
            self.sim.happened["two_owners"] += self.sim.has_rival(self, partition)
            self.apply(partition, begin, end)

    def apply(self, partition: int, begin: int, end: int) -> None:
        """One batch, records begin..end by index."""
        offsets = self.sim.logs[partition].plan.offsets
        next_offset = self.core.apply(partition, self.sim.logs[partition].plan.records(begin, end))
        if next_offset is None:
            self.positions.pop(partition)
        else:
            self.positions[partition] = next_offset if next_offset <= offsets[end - 1] else offsets[end - 1] + 1
            self.sim.committed_offsets[partition] = next_offset

    def upkeep(self) -> None:
        """Asks where the log ends."""
        for partition in list(self.core.held()):
            self.core.saw_end(partition, self.sim.logs[partition].first_and_next()[1], self.sim.now())


class Simulation:
    """The world of one seed. `run` plays it to the end."""

    worker_class = SimWorker

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.plan: Plan = draw_plan(self.draw)
        self.logs = [SimLog(plan) for plan in self.plan.partitions]
        self.snapshots: dict[int, dict[int, Snapshot]] = {partition: {} for partition in range(len(self.logs))}
        self.happened: Counter[str] = Counter()
        self.buried: set[tuple[int, int]] = set()
        self.committed_offsets: dict[int, int] = {}
        """What the group was told; nothing starts from there, see `mutations`."""
        self._ends: list[list[int]] = [[log.first_and_next()[1] for log in self.logs]]
        self._calm, self._depth = False, 0
        self._draw_machines()
        self._draw_schedule()

    def _draw_machines(self) -> None:
        here, there = Machine("here"), Machine("there")
        policy: RetentionPolicy = self.draw.choice(("fail", "earliest", "latest"))
        homes = self.draw.choice(((here,), (here, here), (here, here), (here, there), (here, here, there)))
        self.seats = [
            Seat(f"worker-{i}", home, standby=i == 2 or (home is there and self.draw.random() < 0.5), policy=policy)
            for i, home in enumerate(homes)
        ]
        self.owners = {partition: self.draw.choice(self.seats) for partition in range(len(self.logs))}
        self.machines = [here, there] if there in homes else [here]
        self._readers = {machine.name: SimReader(machine, self.plan.partitions, self) for machine in self.machines}
        self._reading = False

    def _draw_schedule(self) -> None:
        """Each seed has some kinds of fault only, so that the others' effects are not always hidden behind a crash."""
        draw = self.draw
        shares = {"kill": 0.6, "power": 0.6, "freeze": 0.6, "full": 0.3, "damage": 0.35, "snapshot": 0.5, "retention": 0.15}
        on = {name: draw.random() < share for name, share in shares.items()}
        self._again = draw.choice((0.0, 0.1, 0.3))
        self._sudden = [name for name in ("kill", "power", "freeze") if on[name]]
        self._fuse = self._new_fuse()
        steps: list[tuple[Callable[[], None], float]] = [
            (self._append, 9),
            (self._deliver, 14),
            (self._learn, 3),
            (self._finish, 3),
            (self._start, 4),
            (self._read, 3),
            (self._upkeep, 1.5),
            (self._sync, 1.5),
            (self._rebalance, 1.5 if len(self.seats) > 1 else 0),
            (self._kill, 0.3 * on["kill"]),
            (self._cut_power, 0.5 * on["power"]),
            (self._fill_disk, 0.7 * on["full"]),
            (self._free_disk, 1.5 * on["full"]),
            (self._damage, 1.0 * on["damage"]),
            (self._snapshot, 2.0 * on["snapshot"]),
            (self._retain, 1.0 * on["retention"]),
        ]
        self._steps = [step for step, _ in steps]
        self._weights: list[float] = []
        for _, weight in steps:
            self._weights.append(weight + (self._weights[-1] if self._weights else 0.0))

    def run(self) -> Counter[str]:
        """Plays the seed; returns what happened.

        Raises:
            AssertionError: a promise was broken. Any other exception: the worker ended as it never should.
        """
        with _quiet(), _small_constants():
            self._start()
            for _ in range(self.draw.randint(*_STEPS)):
                self._step()
            self._converge()
            self._check_end()
        return self.happened

    def now(self) -> int:
        """The world's clock: it ticks whenever a log grows."""
        return len(self._ends) - 1

    def has_rival(self, worker: SimWorker, partition: int) -> bool:
        """Whether another process of the machine believes that it owns the partition, too."""
        return any(
            other is not None and other is not worker and other.machine is worker.machine and partition in other.core.held()
            for other in (seat.worker for seat in self.seats)
        )

    # Faults, wherever a process is.

    def point(self, process: Process | None, where: str) -> None:
        """See `simulation.world.Observer`."""
        del where
        self._fuse -= 1
        if self._fuse > 0 or self._calm:
            return
        self._fuse = self._new_fuse()
        kind = self.draw.choice(self._sudden) if process is not None else "freeze"
        if kind == "freeze":
            self._freeze(process)
        elif kind == "kill":
            self._kill_worker(process)
            raise KilledError(process)
        else:
            self._lose_power(process.machine)
            raise KilledError(process)

    def _new_fuse(self) -> int:
        return 1 + int(self.draw.expovariate(1 / _POINTS_BETWEEN_FAULTS)) if self._sudden else 1 << 30

    def _freeze(self, process: Process | None) -> None:
        """Others go on; then this one does, unless it died meanwhile."""
        if self._depth >= _DEPTH_MAX:
            return
        self._depth += 1
        if process is not None:
            process.frozen = True
            if self.draw.random() < 0.5:
                self._expire(process.seat)
        for _ in range(self.draw.randint(1, 12)):
            self._step()
        self._depth -= 1
        if process is not None:
            process.frozen = False
            if not process.alive:
                raise KilledError(process)
            self.happened["freezes"] += 1

    def _end(self, worker: SimWorker) -> None:
        """The process is gone; what it wrote to files is there."""
        if not worker.alive:
            return
        worker.alive = False
        worker.seat.worker = None
        found = worker.core.statistics()
        self.happened.update(fences=int(found["fenced"]), repairs=int(found["repairs"]), restores=worker.store.restored)
        self.happened["retention_gaps"] += found["records_missed"] > 0

    def _kill_worker(self, worker: SimWorker) -> None:
        """What it wrote since the last flush goes with it; the view, of which every page is the kernel's, stays."""
        self._end(worker)
        self.happened["kills"] += 1
        self.happened["lost_write_crashes"] += self._lose_writes(worker.seat) > 0

    def _lose_writes(self, seat: Seat) -> int:
        return sum(disk.crash(self.draw.randint(0, len(disk.unsynced))) for disk in seat.disks.values())

    def _lose_power(self, machine: Machine) -> None:
        lost = 0
        for seat in self.seats:
            if seat.machine is machine:
                if seat.worker is not None:
                    self._end(seat.worker)
                lost += self._lose_writes(seat)
        machine.boot += 1
        for view in machine.views.values():
            view.tear(self.draw.choice)
        self.happened["power_losses"] += 1
        self.happened["lost_write_crashes"] += lost > 0

    # Steps.

    def _step(self) -> None:
        self.draw.choices(self._steps, cum_weights=self._weights)[0]()

    def _act(self, worker: SimWorker, action: Callable[[], None]) -> None:
        """One step of a worker, and what a supervisor does where its process ends."""
        try:
            try:
                action()
            except StateError:
                # The operator is asked where retention removed what a state waits for, and has it start over.
                if worker.seat.policy != "fail" or not any(log.first for log in self.logs):
                    raise
                worker.seat.policy = self.draw.choice(("earliest", "latest"))
                worker.core.close()
                self._end(worker)
            except (OSError, ViewError) as error:
                if getattr(error, "errno", None) != errno.ENOSPC and not isinstance(error.__cause__, lmdb.MapFullError):
                    raise
                self.happened["disk_full"] += 1
                worker.core.close()
                self._end(worker)
        except KilledError as killed:
            if killed.process is not worker:
                raise

    def _some_worker(self) -> SimWorker | None:
        running = [seat.worker for seat in self.seats if seat.worker is not None and not seat.worker.frozen]
        return self.draw.choice(running) if running else None

    def _append(self) -> None:
        log = self.draw.choice(self.logs)
        log.end = min(log.end + self.draw.randint(1, 6), log.plan.drawn)
        self._ends.append([log.first_and_next()[1] for log in self.logs])

    def _start(self) -> None:
        for seat in self.seats:
            if seat.worker is None:
                seat.worker = self.worker_class(seat, self)
                self._act(seat.worker, seat.worker.learn if self.draw.random() < 0.3 else seat.worker.learn_and_finish)

    def _learn(self) -> None:
        if (worker := self._some_worker()) is not None:
            self._act(worker, worker.learn if self.draw.random() < 0.3 else worker.learn_and_finish)

    def _finish(self) -> None:
        if (worker := self._some_worker()) is not None:
            self._act(worker, worker.finish)

    def _deliver(self) -> None:
        if (worker := self._some_worker()) is not None:
            count = self.draw.choice((1, 1, 1, 2, 2, 3, 5, 9, 40))
            again = self.draw.randint(1, 7) if self.draw.random() < self._again else 0
            self._act(worker, lambda: worker.deliver(count, again))

    def _upkeep(self) -> None:
        if (worker := self._some_worker()) is not None:
            self._act(worker, worker.upkeep)

    def _rebalance(self) -> None:
        """The group gives a partition to another; who had it and who has it learn it in any order."""
        partition = self.draw.choice(list(self.owners))
        others = [seat for seat in self.seats if seat is not self.owners[partition]]
        self.owners[partition] = self.draw.choice(others)
        self.happened["rebalances"] += 1

    def _expire(self, gone: Seat) -> None:
        """A worker's session ends: what it owns goes to others, who learn it before it does."""
        others = [seat for seat in self.seats if seat is not gone]
        if not others:
            return
        for partition, seat in self.owners.items():
            if seat is gone:
                self.owners[partition] = heir = self.draw.choice(others)
                self.happened["rebalances"] += 1
                if heir.worker is not None and not heir.worker.frozen:
                    self._act(heir.worker, heir.worker.learn_and_finish)

    def _kill(self) -> None:
        running = [seat.worker for seat in self.seats if seat.worker is not None]
        if running:
            self._kill_worker(self.draw.choice(running))

    def _cut_power(self) -> None:
        self._lose_power(self.draw.choice(self.machines))

    def _sync(self) -> None:
        for disk in self.draw.choice(self.seats).disks.values():
            disk.sync()

    def _fill_disk(self) -> None:
        worker = self._some_worker()
        if worker is not None:
            worker.store.full, worker.store.on_full = True, lambda: self.draw.random() < 0.3
            for view in worker.machine.views.values():
                view.full = self.draw.random() < 0.5

    def _free_disk(self) -> None:
        for seat in self.seats:
            if seat.worker is not None:
                seat.worker.store.full = False
            for view in seat.machine.views.values():
                view.full = False

    def _damage(self) -> None:
        """A bit of a row, a block, or a whole file, on a disk or in a snapshot."""
        disks = [(partition, disk) for seat in self.seats for partition, disk in seat.disks.items() if len(disk.content) > 1]
        if not disks:
            return
        partition, disk = self.draw.choice(disks)
        kind = self.draw.random()
        key = self.draw.choice(sorted(disk.content.keys() - {META_KEY}))
        disk.sync()
        self.happened["damages"] += 1
        if kind < 0.4:
            row = bytearray(disk.content[key])
            row[self.draw.randrange(len(row))] ^= 1 << self.draw.randrange(8)
            disk.content = disk.synced = disk.content | {key: bytes(row)}
            disk.is_damaged = True
        elif kind < 0.7:
            disk.bad_blocks.add(key)
        elif kind < 0.8 or not self.snapshots[partition]:
            disk.refuses_opening = True
        else:
            self.draw.choice(list(self.snapshots[partition].values())).is_incomplete = True

    def _snapshot(self) -> None:
        """A checkpoint has what the disk has, damage included."""
        worker = self._some_worker()
        if worker is None or not worker.core.held():
            return
        partition = self.draw.choice(sorted(worker.core.held()))
        disk, offset = worker.seat.disks[partition], worker.core.held()[partition].next_offset - 1
        kept = self.snapshots[partition]
        if offset >= 0 and META_KEY in disk.content and offset not in kept:
            disk.sync()
            kept[offset] = Snapshot(disk.content, frozenset(disk.bad_blocks), disk.is_damaged)
            self.happened["snapshots"] += 1
            if len(kept) > _SNAPSHOTS_MAX:
                del kept[min(kept)]

    def _retain(self) -> None:
        log = self.draw.choice(self.logs)
        log.first = self.draw.randint(log.first, log.end)

    # What must hold.

    def _read(self) -> None:
        """A reader's answer is the naive fold at its own watermark."""
        if self._reading:
            return
        self._reading = True
        machine = self.draw.choice(self.machines)
        plan = self.draw.choice(self.plan.partitions)
        try:
            self._check_read(machine, plan.partition, self.draw.choice(sorted(self.plan.domain.sequence)))
        finally:
            self._reading = False

    def _check_read(self, machine: Machine, partition: int, sequence: str) -> int:
        """Checks one read of all of a partition's users; returns its offset, -2 where there was nothing to read."""
        plan, reader, boot = self.plan.partitions[partition], self._readers[machine.name], machine.boot
        readings = None
        with suppress(SequenceUnavailableError):
            readings = reader.read(sequence, [*plan.users, plan.stranger])
        if readings is None or machine.boot != boot:  # or it lost power meanwhile
            return -2
        self.happened["reads"] += 1
        meta, what = reader.meta_read(partition), definition(self.plan.domain, sequence)
        sequence_id = self.plan.domain.sequence[sequence].id
        for reading in readings:
            at = reading.watermark
            where = f"{machine.name}, partition {partition}, user {reading.user_id:x}, sequence {sequence}, offset {at.offset}"
            if (at.log_epoch, at.partition) != (EPOCH, partition):
                raise WrongError(f"read of {where}: watermark {at}")
            clock_ms = plan.clock_ms(meta.start_offset, at.offset)
            if reading.row != as_read(what, plan.row(sequence_id, reading.user_id, meta.start_offset, at.offset), clock_ms):
                raise WrongError(f"read of {where}: not the naive fold at its watermark")
            if reading.log_clock_ms != clock_ms:
                raise WrongError(f"read of {where}: the log clock is not that of the watermark")
        return meta.applied_offset

    def committed(self, partition: int, before: Content, after: Content) -> None:
        """A view in one piece never goes back, and what it says about its age is true."""
        if not after.get(META_KEY):
            return
        meta, beat = Meta.decode(after[META_KEY], "view"), after.get(BEAT_KEY)
        if beat is not None and meta.applied_offset + 1 < self._ends[int.from_bytes(beat, "little")][partition]:
            raise WrongError(f"partition {partition}: the view claims to have been caught up when it was not")
        shown = Meta.decode(before[META_KEY], "view") if before.get(META_KEY) else meta
        if meta.applied_offset < shown.applied_offset:
            raise WrongError(f"partition {partition}: readers go back from offset {shown.applied_offset} to {meta.applied_offset}")

    def _check_disk(self, seat: Seat, partition: int, disk: Disk) -> None:
        """A state is the naive fold at its own offset, row by row and byte by byte."""
        meta, plan = disk.meta(), self.plan.partitions[partition]
        if meta is None:
            if disk.content:
                raise WrongError(f"{seat.name}, partition {partition}: rows without a meta row")
            return
        where = f"{seat.name}, partition {partition}, offset {meta.applied_offset}"
        expected = {
            row_key(sequence_id, user): row
            for sequence_id in plan.kept
            for user in (*plan.users, plan.stranger)
            if (row := plan.row(sequence_id, user, meta.start_offset, meta.applied_offset))
        }
        found = {key: row for key, row in disk.content.items() if key != META_KEY}
        if found != expected:
            raise WrongError(f"{where}: the state is not the naive fold")
        if meta.log_clock_ms != plan.clock_ms(meta.start_offset, meta.applied_offset):
            raise WrongError(f"{where}: the log clock is not the naive one")

    def _converge(self) -> None:
        """No more faults: everything must come to the log's end, and nobody may be stuck."""
        self._calm = True
        for log in self.logs:
            log.end = len(log.plan.offsets)
        self._ends.append([log.first_and_next()[1] for log in self.logs])
        self._free_disk()
        for _ in range(_ROUNDS_MAX):
            self._start()
            for seat in self.seats:
                for action in ("learn", "finish", "upkeep"):
                    if seat.worker is not None:
                        self._act(seat.worker, getattr(seat.worker, action))
            if self._is_at_end():
                return
            for seat in self.seats:
                for _ in self.logs:
                    if seat.worker is not None:
                        self._act(seat.worker, lambda worker=seat.worker: worker.deliver(self.draw.choice((5, 40)), 0))
        raise WrongError(f"no progress: {[seat.worker and seat.worker.core.progress() for seat in self.seats]}")

    def _is_at_end(self) -> bool:
        for partition, log in enumerate(self.logs):
            seats = [self.owners[partition], *(seat for seat in self.seats if seat.standby)]
            for seat in seats:
                held = seat.worker.core.held().get(partition) if seat.worker is not None else None
                if held is None or held.next_offset != log.first_and_next()[1]:
                    return False
        return True

    def _check_end(self) -> None:
        for seat in self.seats:  # also what was left behind by who no longer owns it: a state at its own offset
            for partition, disk in seat.disks.items():
                if not disk.is_damaged:
                    self._check_disk(seat, partition, disk)
        for partition, log in enumerate(self.logs):
            plan = log.plan
            for seat in {self.owners[partition], *(seat for seat in self.seats if seat.standby)}:
                self._check_disk(seat, partition, seat.disks[partition])  # whatever was damaged: each row was read since, and repaired
                for sequence in self.plan.domain.sequence:
                    if self._check_read(seat.machine, partition, sequence) != plan.offsets[-1]:
                        raise WrongError(f"{seat.machine.name}, partition {partition}: the view stays behind")
                meta = seat.disks[partition].meta()
                unburied = [offset for offset in plan.rejected if offset >= meta.start_offset and (partition, offset) not in self.buried]
                if unburied:
                    raise WrongError(f"partition {partition}: rejected records {unburied} were passed over without a dead letter")
            plan.check_oracle()
            self.happened.update(cuts=plan.cuts, duplicates=plan.duplicates, erases=plan.erases)
        for seat in self.seats:
            if seat.worker is not None:
                self._end(seat.worker)
        if self.happened["repairs"] and not self.happened["damages"]:
            raise WrongError("a state was replaced as damaged, and nothing was damaged")


@contextmanager
def _quiet() -> Iterator[None]:
    """The core says loudly what it repairs; here that is the rule."""
    logger = logging.getLogger("streams")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _small_constants() -> Iterator[None]:
    """Limits of the real code, scaled to logs of some dozen records."""
    before = streams.core._RESTORE_AHEAD_RECORDS, streams.view._REBUILD_ROWS
    streams.core._RESTORE_AHEAD_RECORDS, streams.view._REBUILD_ROWS = 6, 2
    try:
        yield
    finally:
        streams.core._RESTORE_AHEAD_RECORDS, streams.view._REBUILD_ROWS = before

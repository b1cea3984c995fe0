"""What tests of sequence readers share: a log of two partitions, its view, a reader service, and a reader built on the naive oracle."""

import asyncio
import queue
import threading
from contextlib import contextmanager, suppress

import numpy as np

from features.actions import ACTION, ERASE, EVENT_DTYPE, REJECTED, Batch
from features.domain import parse_domain
from features.ids import partition_of, user_key
from features.oracle import naive_fold
from features.ports import Position, Reading
from features.sequence import NEVER_ERASED, Row, definition, encode_row
from protos.v1.owners_pb2 import StateAnnouncement, StateRole
from streams.core import fold_batch
from streams.memory import MemoryStore
from streams.owners import Owners
from streams.reader_service import ReaderConfig, serve_reader
from streams.routed_source import RoutedSource
from streams.state import definitions
from streams.view import PartitionView
from streams.view_reader import ViewReader

PARTITIONS = 2
EPOCH = 9
DOMAIN = parse_domain(
    """
name = "test"
[entities]
item = 1
[actions.click]
id = 1
kind = "positive"
[actions.view]
id = 2
kind = "impression"
[sequence.main]
id = 1
length = 4
[sequence.clicks]
id = 2
length = 3
caps = { view = 1 }
[ranker.home]
sequence = "main"
sequence_length = 4
item_space = "items"
[ranker.home.heads.click]
actions = ["click"]
""",
    source="test",
)
USERS = list(range(100, 112))


def partition_for(user: int) -> int:
    return partition_of(user_key(user), PARTITIONS)


def batches(seed: int) -> list[Batch]:
    """Two batches for each partition, with an erasure and a rejected record."""
    random = np.random.default_rng(seed)
    found = []
    for partition in range(PARTITIONS):
        own = [user for user in USERS if partition_for(user) == partition]
        for start in (0, 40):
            n = 40
            events = np.zeros(n, EVENT_DTYPE)
            events["event_time_ms"] = random.integers(1, 1000, n)
            events["event_id"], events["entity_id"] = random.integers(0, 50, n), random.integers(0, 9, n)
            events["action"], events["entity_kind"] = random.integers(1, 3, n), 1
            verdict = np.full(n, ACTION, np.uint8)
            verdict[5], verdict[7] = REJECTED, ERASE
            users = random.choice(own, n).astype(np.uint64)
            users[5] = 0
            events[verdict != ACTION] = np.zeros((), EVENT_DTYPE)
            stamps = 200 + start + np.arange(n)
            found.append(Batch(EPOCH, partition, start + np.arange(n), stamps, verdict, users, events, {5: "value: bad"}))
    return found


class OracleReader:
    """Reads what the oracle says. Its rows are encoded from the naive fold."""

    def __init__(self, batches: list[Batch]) -> None:
        self._folds = {p: naive_fold(b for b in batches if b.partition == p) for p in range(PARTITIONS)}
        self._last = {p: [b for b in batches if b.partition == p][-1] for p in range(PARTITIONS)}
        self._touched: dict[int, int] = {}
        for batch in batches:
            for user, offset, verdict in zip(batch.users.tolist(), batch.offsets.tolist(), batch.verdict.tolist(), strict=True):
                if verdict != REJECTED:
                    self._touched[user] = offset

    def read(self, sequence: str, user_ids: list[int]) -> list[Reading]:
        what = definition(DOMAIN, sequence)
        return [self._reading(what, user) for user in user_ids]

    def _reading(self, what, user: int) -> Reading:
        naive, row = self._folds[partition_for(user)].get(user), b""
        if naive is not None:
            erased = max((append_ms for _, append_ms in naive.erasures), default=NEVER_ERASED)
            place = EPOCH, partition_for(user), self._touched[user]
            row = encode_row(Row(user, what.fingerprint, *place, erased, naive.sequence(what)))
        return Reading(user, row, self.position(user), int(self._last[partition_for(user)].append_time_ms.max()))

    def position(self, user_id: int) -> Position:
        partition = partition_for(user_id)
        return Position(EPOCH, partition, int(self._last[partition].offsets[-1]))

    def statistics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def build_view(folder, batches: list[Batch], *, caught_up_ms: int | None = None) -> None:
    """What a worker does: fold, store, view; `caught_up_ms`: when it last had the log's end."""
    kept, store = definitions(DOMAIN), MemoryStore(definitions(DOMAIN))
    for partition in range(PARTITIONS):
        held, view = store.open(partition, EPOCH), PartitionView(folder, partition, map_bytes=1 << 24)
        view.sync(held.meta, held.scan, 1_000_000)
        for batch in batches:
            if batch.partition == partition:
                keys, rows, meta = fold_batch(kept, held, batch)
                held.write(keys, rows, meta)
                view.write(keys, rows, meta)
        if caught_up_ms is not None:
            view.beat(caught_up_ms)
        view.close()
        held.close()


class Routed:
    """A `RoutedSource` as a `SequenceReader`: its loop runs in a thread of its own."""

    def __init__(self, folder, owners: Owners, *, domain=DOMAIN, partition_count: int = PARTITIONS, **given) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._local = ViewReader(folder, domain, partition_count)

        async def new() -> RoutedSource:
            return RoutedSource(self._local, owners, domain, partition_count, **given)

        self.source = self.run(new())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def read(self, sequence: str, user_ids: list[int], timeout_s: float = 30.0, **given) -> list[Reading]:
        return self.run(self.source.read(sequence, user_ids, timeout_s=timeout_s, **given))

    def position(self, user_id: int) -> Position:
        return self.read("main", [user_id])[0].watermark

    def statistics(self) -> dict[str, float]:
        return self.source.statistics()

    def close(self) -> None:
        self.run(self.source.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()
        self._local.close()


def announced(*said: tuple[str, str, int], log_epoch: int = EPOCH, partitions=range(PARTITIONS)) -> Owners:
    """Owners to whom workers said (instance, address, role), in this order, of every partition."""
    owners = Owners()
    for instance, address, role in said:
        for partition in partitions:
            say(owners, instance, address, role, partition, log_epoch)
    return owners


def say(owners: Owners, instance: str, address: str, role: int, partition: int, log_epoch: int = EPOCH) -> None:
    message = StateAnnouncement(partition=partition, address=address, log_epoch=log_epoch, role=StateRole.Name(role))
    owners.take(f"owner/{partition}/{instance}", message.SerializeToString())


@contextmanager
def serving(config: ReaderConfig):
    """The address of a reader service in a thread of its own."""
    with serving_pages(config) as details:
        yield details["address"]


@contextmanager
def serving_pages(config: ReaderConfig):
    """What a reader service in a thread of its own says when it is ready: its address, and that of its pages where it has any."""
    ready: queue.Queue[dict] = queue.Queue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(serve_reader(config, ready.put))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ready.get(timeout=30)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
        loop.close()

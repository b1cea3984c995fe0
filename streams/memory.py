"""The store in memory: for tests and simulations. The contract suite of stores holds it to the same promises as RocksDB."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

from features.sequence import Definition
from streams.errors import StateError
from streams.state import META_KEY, Meta
from streams.store import check_meta, initial_meta


class MemoryStore:
    """Partitions that outlive their `close`, as files do."""

    def __init__(self, kept: Mapping[int, Definition]) -> None:
        self._kept = dict(kept)
        self._partitions: dict[int, tuple[Meta, dict[bytes, bytes]]] = {}
        self._held: set[int] = set()

    def statistics(self) -> dict[str, float]:
        """Nothing to report."""
        return {}

    def open(self, partition: int, log_epoch: int) -> "MemoryPartition":
        """See `streams.store.Store.open`."""
        if partition in self._held:
            raise StateError(f"partition {partition}: another worker holds it")
        initial = initial_meta(partition, log_epoch, self._kept)
        meta, rows = self._partitions.get(partition, (initial, {}))
        check_meta(meta, initial, f"partition {partition}")
        self._held.add(partition)
        return MemoryPartition(self, partition, meta, rows)

    def newest_snapshot(self, partition: int, log_epoch: int) -> int | None:
        """See `streams.store.Store.newest_snapshot`."""
        del partition, log_epoch
        return None

    def restore(self, partition: int, log_epoch: int, *, first: int = 0, skip: int = 0) -> "MemoryPartition":
        """See `streams.store.Store.restore`."""
        del first, skip
        raise StateError(f"partition {partition} of log {log_epoch:016x}: no snapshots are kept")

    def start_over(self, partition: int, log_epoch: int, start_offset: int) -> "MemoryPartition":
        """See `streams.store.Store.start_over`."""
        self._partitions[partition] = (initial_meta(partition, log_epoch, self._kept, start_offset), {})
        return self.open(partition, log_epoch)

    def _keep(self, partition: int, meta: Meta, rows: dict[bytes, bytes]) -> None:
        self._partitions[partition] = (meta, rows)

    def _release(self, partition: int) -> None:
        self._held.discard(partition)


class MemoryPartition:
    """See `streams.store.PartitionStore`."""

    def __init__(self, store: MemoryStore, partition: int, meta: Meta, rows: dict[bytes, bytes]) -> None:
        self._store, self._partition, self._rows = store, partition, rows
        self.meta = meta

    def get(self, keys: Seq[bytes]) -> list[bytes | None]:
        """See `PartitionStore.get`."""
        return [self._rows.get(key) for key in keys]

    def write(self, keys: Seq[bytes], rows: Seq[bytes], meta: Meta) -> None:
        """See `PartitionStore.write`."""
        changed = self._rows | dict(zip(keys, rows, strict=True))
        self._rows, self.meta = changed, meta
        self._store._keep(self._partition, meta, changed)

    def trim(self, keys: Seq[bytes], rows: Seq[bytes]) -> None:
        """See `PartitionStore.trim`."""
        changed = self._rows | dict(zip(keys, rows, strict=True))
        self._rows = {key: row for key, row in changed.items() if row}
        self._store._keep(self._partition, self.meta, self._rows)

    def scan(self, after: bytes = META_KEY) -> Iterator[tuple[bytes, bytes]]:
        """See `PartitionStore.scan`."""
        yield from sorted((key, row) for key, row in self._rows.items() if key > after)

    def flush_old(self, age_s: float) -> None:
        """See `PartitionStore.flush_old`: memory is all there is."""

    def purge(self, keys: Seq[bytes] | None) -> None:
        """See `PartitionStore.purge`: a replaced row is gone."""

    def stop_purge(self) -> None:
        """See `PartitionStore.stop_purge`."""

    def close(self) -> None:
        """See `PartitionStore.close`."""
        self._store._release(self._partition)

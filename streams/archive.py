"""Reads a topic completely and in order, from Kafka or from a Parquet archive of it: what replay works from.

Reading takes no part in a consumer group and stops at the end offsets of the moment when the log was opened. An archive keeps every record
as it came (key, value, append time), rejected ones too, so the worker's decoder gives the same verdicts and the same clock again. Where a
user was erased since, `rewrite_archive` leaves their records' places: offset and append time, which others' replay needs, and nothing else.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.actions import FORGOTTEN, Batch, append_time_ms, decode_batch
from features.domain import Domain, Encoding
from streams.errors import KafkaUnavailableError
from streams.kafka import KafkaConfig, KafkaError, KafkaException, Message, TopicPartition, answering, log_identity, log_range, new_reader

ARCHIVE_VERSION = 2
"""1 had no column `forgotten`; it is read, too."""
MANIFEST = "archive.json"
_CHUNK_RECORDS = 20_000
_SILENCE_S_MAX = 30.0
SCHEMA = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("append_time_ms", pa.int64(), nullable=False),
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("forgotten", pa.bool_(), nullable=False),
    ]
)


class ArchiveError(ValueError):
    """An archive that cannot be read or written; names the file, what was found and what was expected."""


class DecodingRules(NamedTuple):
    """What of a domain file decides which records of the actions count."""

    future_tolerance_ms: int
    encodings: tuple[Encoding, ...]

    @classmethod
    def of(cls, domain: Domain) -> "DecodingRules":
        """A domain file's."""
        return cls(domain.future_tolerance_ms, domain.encodings)


class Span(NamedTuple):
    """Offsets of a partition: `start` is the first that the log still has, `end` the one behind the last."""

    start: int
    end: int


@dataclass(frozen=True)
class Records:
    """Consecutive records of one partition: offsets int64 [n] ascending, append_time_ms int64 [n] (`append_time_ms` of each).

    forgotten bool [n], None for none: an erased user's accepted records, of which key and value are gone (`features.actions.FORGOTTEN`).
    """

    offsets: npt.NDArray[np.int64]
    append_time_ms: npt.NDArray[np.int64]
    keys: list[bytes | None]
    values: list[bytes | None]
    forgotten: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, rows: npt.NDArray[np.int64]) -> "Records":
        """Some of them, ascending."""
        chosen = rows.tolist()
        forgotten = None if self.forgotten is None else self.forgotten[rows]
        keys, values = [self.keys[i] for i in chosen], [self.values[i] for i in chosen]
        return Records(self.offsets[rows], self.append_time_ms[rows], keys, values, forgotten)


class RecordLog(Protocol):
    """A topic up to the moment when it was opened."""

    @property
    def topic(self) -> str:
        """Its name."""
        ...

    @property
    def log_epoch(self) -> int:
        """Identity of the log that its positions belong to."""
        ...

    @property
    def partitions(self) -> dict[int, Span]:
        """Offsets of each partition."""
        ...

    def read(self, partition: int) -> Iterator[Records]:
        """All records of a partition from `start` to `end`, in offset order, in pieces of bounded size."""
        ...

    def close(self) -> None:
        """Releases what is held."""
        ...


def decode_records(log: RecordLog, partition: int, records: Records, rules: DecodingRules) -> Batch:
    """Records of a log of actions, as a worker decodes them."""
    batch = decode_batch(
        log_epoch=log.log_epoch,
        partition=partition,
        offsets=records.offsets,
        keys=records.keys,
        values=records.values,
        append_times_ms=records.append_time_ms,
        future_tolerance_ms=rules.future_tolerance_ms,
        partition_count=len(log.partitions),
        encodings=rules.encodings,
    )
    if records.forgotten is not None:
        batch.verdict[records.forgotten] = FORGOTTEN
    return batch


class KafkaLog:
    """A topic in Kafka. What is appended after it was opened is not read."""

    def __init__(self, config: KafkaConfig, topic: str, base: str = "") -> None:
        """Asks for the log's identity, which includes `base` (`Topics.base`), and its offsets.

        Raises:
            KafkaUnavailableError: no broker answered.
            TopicError: there is no such topic.
        """
        self._config = config
        identity = log_identity(config, topic, base)
        self.topic, self.log_epoch, self.base = topic, identity.epoch, base
        self._consumer = new_reader(config, "replay", enable_partition_eof=True, queued_min_messages=200_000)
        try:
            with answering(config):
                self.partitions = {p: Span(*log_range(self._consumer, topic, p)) for p in range(identity.partition_count)}
        except BaseException:
            self._consumer.close()
            raise

    def begin_at(self, time_ms: int) -> None:
        """Leaves out what the broker took before a time, and so what was appended before it: milliseconds since 1970-01-01 UTC.

        Raises:
            KafkaUnavailableError: no broker answered, or not for every partition; nothing is left out then.
            MissingTopicError: the topic is gone.
        """
        asked = [TopicPartition(self.topic, partition, time_ms) for partition in self.partitions]
        with answering(self._config):
            found = self._consumer.offsets_for_times(asked, timeout=_SILENCE_S_MAX)
            for first in found:
                if first.error is not None:  # a leader that moves: without this partition's records an hour would be wrong for good
                    raise KafkaException(first.error)
        for first in found:
            start, end = self.partitions[first.partition]  # no such record: an offset below 0
            self.partitions[first.partition] = Span(min(max(start, first.offset), end) if first.offset >= 0 else end, end)

    def read(self, partition: int) -> Iterator[Records]:
        """See `RecordLog.read`. Raises KafkaUnavailableError where the broker stops answering, or the records are gone meanwhile."""
        start, end = self.partitions[partition]
        if start >= end:
            return
        with answering(self._config):
            self._consumer.assign([TopicPartition(self.topic, partition, start)])
            quiet_since = time.monotonic()
            at_end = False
            while not at_end:
                found, at_end = self._split(self._consumer.consume(_CHUNK_RECORDS, timeout=0.2), end)
                if found:
                    yield _records(found)
                    quiet_since = time.monotonic()  # behind the yield: what the caller does with them is no silence of the broker
                elif not at_end and time.monotonic() - quiet_since > _SILENCE_S_MAX:
                    raise KafkaUnavailableError(
                        f"Kafka at {self._config.bootstrap}: nothing of {self.topic} partition {partition} came for {_SILENCE_S_MAX:.0f} s "
                        f"before offset {end}: is the broker running?"
                    )
            self._consumer.unassign()

    @staticmethod
    def _split(messages: list[Message], end: int) -> tuple[list[Message], bool]:
        """The records before `end`, and whether the end was reached: the last record may be a transaction's, which nobody gets to see."""
        found, at_end = [], False
        for message in messages:
            error = message.error()
            if error is None:
                if message.offset() < end:
                    found.append(message)
                at_end |= message.offset() >= end - 1
            elif error.code() == KafkaError._PARTITION_EOF:
                at_end |= message.offset() >= end
            else:
                raise KafkaException(error)
        return found, at_end

    def close(self) -> None:
        """Closes the consumer."""
        self._consumer.close()


def _records(messages: list[Message]) -> Records:
    return Records(
        np.fromiter((message.offset() for message in messages), np.int64, len(messages)),
        np.fromiter((append_time_ms(message.timestamp()[1], message.headers()) for message in messages), np.int64, len(messages)),
        [message.key() for message in messages],
        [message.value() for message in messages],
    )


class ParquetLog:
    """A folder that `write_archive` wrote."""

    def __init__(self, folder: Path) -> None:
        """Opens an archive.

        Raises:
            ArchiveError: the folder is not a whole archive, or of a newer version.
        """
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text("utf-8"))
            if not 1 <= manifest["archive_version"] <= ARCHIVE_VERSION:
                raise ArchiveError(f"{self.folder / MANIFEST}: version {manifest['archive_version']}, this program reads {ARCHIVE_VERSION}")
            self.topic: str = manifest["topic"]
            self.log_epoch = int(manifest["log_epoch"], 16)
            self.base: str = manifest.get("base", "")
            self.partitions = {int(partition): Span(*span) for partition, span in manifest["partitions"].items()}
            self.erasures: frozenset[str] = frozenset(manifest.get("erasures", ()))
            """Names of the erasures after which it was rewritten."""
        except OSError as error:
            raise ArchiveError(
                f"{self.folder / MANIFEST}: cannot be read ({error.strerror}): not an archive, or not written to its end"
            ) from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ArchiveError(f"{self.folder / MANIFEST}: not an archive's manifest: {error!r}") from error

    def read(self, partition: int) -> Iterator[Records]:
        """See `RecordLog.read`. Raises ArchiveError where the file is missing, or its offsets are not ascending inside the span."""
        path = self.folder / file_name(partition)
        after, end = self.partitions[partition]
        try:
            with pq.ParquetFile(path) as file:
                for piece in file.iter_batches(batch_size=65_536):
                    offsets, append_time_ms = (piece.column(name).to_numpy() for name in ("offset", "append_time_ms"))
                    if len(offsets) and (offsets[0] < after or offsets[-1] >= end or (np.diff(offsets) <= 0).any()):
                        raise ArchiveError(f"{path}: offsets must ascend inside {after}..{end - 1}; found {offsets[0]}..{offsets[-1]}")
                    keys, values = piece.column("key").to_pylist(), piece.column("value").to_pylist()
                    forgotten = piece.column("forgotten").to_numpy(zero_copy_only=False) if "forgotten" in piece.schema.names else None
                    yield Records(offsets, append_time_ms, keys, values, forgotten)
                    after = int(offsets[-1]) + 1
        except (OSError, pa.ArrowInvalid) as error:
            raise ArchiveError(f"{path}: cannot be read: {error}") from error

    def close(self) -> None:
        """Nothing is held."""


def write_archive(log: RecordLog, folder: Path, *, base: str = "") -> Path:
    """Copies a log, whole, into a new folder of Parquet files; the manifest comes last, so half an archive is none.

    `base`: id of the base that the log's epoch includes.

    Raises:
        ArchiveError: the folder holds an archive already.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise ArchiveError(f"{folder}: holds an archive already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for partition in sorted(log.partitions):
        with pq.ParquetWriter(folder / file_name(partition), SCHEMA, compression="zstd") as writer:
            for records in log.read(partition):
                writer.write_table(table_of(records))
    write_manifest(folder, log, base, [])
    return folder


def rewrite_archive(log: ParquetLog, change: Callable[[int, Records], Records | None], erasures: Iterable[str]) -> int:
    """Rewrites an archive's files through `change(partition, records)`, None: nothing to change; returns how many files it replaced.

    Each file is replaced when the new one is whole, so that a reader sees the one or the other; the manifest names `erasures` at the end.
    A run that was cut off is made good by the next.

    Raises:
        ArchiveError: a file cannot be read.
    """
    write_manifest(log.folder, log, log.base, sorted(log.erasures))  # of the newest version, before a file has what older programs misread
    replaced = 0
    for partition in sorted(log.partitions):
        path = log.folder / file_name(partition)
        partial = path.with_name(f".{path.name}.part")
        with partial.open("wb") as file:
            changed = False
            with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                for records in log.read(partition):
                    found = change(partition, records)
                    changed |= found is not None
                    writer.write_table(table_of(records if found is None else found))
            file.flush()
            os.fsync(file.fileno())
        if changed:
            partial.replace(path)
            replaced += 1
        else:
            partial.unlink()
    write_manifest(log.folder, log, log.base, sorted(log.erasures.union(erasures)))
    return replaced


def table_of(records: Records) -> pa.Table:
    """Records as an archive's files have them, with the columns of SCHEMA."""
    forgotten = np.zeros(len(records), bool) if records.forgotten is None else records.forgotten
    columns: list[Any] = [records.offsets, records.append_time_ms, records.keys, records.values, forgotten]
    return pa.table(columns, schema=SCHEMA)


def write_manifest(folder: Path, log: RecordLog, base: str, erasures: list[str]) -> None:
    """Makes a folder that has a file of each partition an archive of this log. `erasures`: names of those after which it was rewritten."""
    manifest = {
        "archive_version": ARCHIVE_VERSION,
        "topic": log.topic,
        "log_epoch": f"{log.log_epoch:016x}",
        "base": base,
        "partitions": {str(partition): list(span) for partition, span in sorted(log.partitions.items())},
        "erasures": erasures,
    }
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    temporary.replace(folder / MANIFEST)


def file_name(partition: int) -> str:
    """Of a partition's file."""
    return f"partition-{partition:05d}.parquet"

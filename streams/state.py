"""What one partition's state is called and what stands beside its rows: shared by store and view, so that both hold the same bytes."""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from features.domain import Domain
from features.ports import SequenceCorruptError
from features.sequence import Definition, definition
from streams.errors import StateError

META_KEY = b"\x00"
"""Key of the partition's meta row; it sorts before every row, for sequence ids start at 1."""

_HEAD = struct.Struct("<4sHHiiQqqq")
_ENTRY = struct.Struct("<BQ")
_CRC = struct.Struct("<I")
_MAGIC, _FORMAT_VERSION = b"FRSM", 2


@dataclass(frozen=True)
class Meta:
    """Where a partition's state stands. It is written in the same batch as the rows it belongs to.

    applied_offset: last record folded in, -1 for none; log_clock_ms: greatest append time of the
    accepted records up to there, 0 for none;
    fingerprints: (sequence id, fingerprint) of every sequence kept, ascending;
    start_offset: the state is the fold of the log from this record on: 0 unless retention had removed what came before it;
    leader_epoch: of the last record folded in, -1 for unknown; with it the broker can tell that the log was truncated and grew again.
    """

    log_epoch: int
    partition: int
    applied_offset: int
    log_clock_ms: int
    fingerprints: tuple[tuple[int, int], ...]
    start_offset: int = 0
    leader_epoch: int = -1

    def encode(self) -> bytes:
        """Fixed little-endian bytes with a checksum behind them."""
        head = _HEAD.pack(
            _MAGIC,
            _FORMAT_VERSION,
            len(self.fingerprints),
            self.partition,
            self.leader_epoch,
            self.log_epoch,
            self.applied_offset,
            self.log_clock_ms,
            self.start_offset,
        )
        data = head + b"".join(_ENTRY.pack(*entry) for entry in self.fingerprints)
        return data + _CRC.pack(zlib.crc32(data))

    @staticmethod
    def decode(data: bytes, where: str) -> "Meta":
        """Raises, and names `where`: SequenceCorruptError where the bytes are damaged, StateError where they are of another format."""
        body = data[: -_CRC.size]
        if len(data) < _HEAD.size + _CRC.size or _CRC.pack(zlib.crc32(body)) != data[-_CRC.size :]:
            raise SequenceCorruptError(f"{where}: checksum of the meta row differs")
        magic, version, count, partition, leader_epoch, log_epoch, applied_offset, log_clock_ms, start_offset = _HEAD.unpack_from(body)
        if magic != _MAGIC or version != _FORMAT_VERSION or len(body) != _HEAD.size + count * _ENTRY.size:
            raise StateError(f"{where}: meta row of format {version} is not one that this program reads: upgrade it, or remove this folder")
        entries = tuple(_ENTRY.iter_unpack(body[_HEAD.size :]))
        return Meta(log_epoch, partition, applied_offset, log_clock_ms, entries, start_offset, leader_epoch)

    def lineage(self) -> "Meta":
        """What two states must share to hold equal rows where they stand at equal offsets."""
        return replace(self, applied_offset=-1, log_clock_ms=0, leader_epoch=-1)


def check_base(meta: Meta, base: str, where: str) -> None:
    """Raises StateError where a state should stand on a base (`Topics.base`) and is empty: the log alone would give other rows."""
    if base and meta.applied_offset < 0 and not meta.log_clock_ms:
        raise StateError(
            f"{where}: the log stands on base {base} and there is no state of it here: run `freshrank bootstrap` with the same history, or "
            "restore a snapshot"
        )


def definitions(domain: Domain) -> dict[int, Definition]:
    """The definition of every [sequence.NAME] of a domain, by its id, ascending."""
    return {sequence.id: definition(domain, name) for name, sequence in sorted(domain.sequence.items(), key=lambda item: item[1].id)}


def fingerprints(kept: Mapping[int, Definition]) -> tuple[tuple[int, int], ...]:
    """(sequence id, fingerprint) of each, ascending."""
    return tuple(sorted((number, what.fingerprint) for number, what in kept.items()))


def row_key(sequence_id: int, user_id: int) -> bytes:
    """Key of a user's row: the sequence's id, then the user id, 8 bytes big-endian."""
    return bytes((sequence_id,)) + user_id.to_bytes(8, "big")


def row_keys(sequence_id: int, users: npt.NDArray[np.uint64]) -> list[bytes]:
    """`row_key` of each of users uint64 [n]; ascending where the users are."""
    keys = np.empty((len(users), 9), np.uint8)
    keys[:, 0] = sequence_id
    keys[:, 1:] = users.astype(">u8").view(np.uint8).reshape(-1, 8)
    data = keys.tobytes()
    return [data[start : start + 9] for start in range(0, len(data), 9)]

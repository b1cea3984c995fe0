"""Identities: users, items, events, partitions.

Every id is an opaque unsigned 64-bit integer. Text becomes an id by one hash, xxh3-64 of its UTF-8 bytes, the same in importers, clients
and category features.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

U64 = npt.NDArray[np.uint64]
ID_MAX = 2**64 - 1
_HEX = np.frombuffer(b"".join(b"%04x" % number for number in range(1 << 16)), "<u4")
"""The four digits of each 16-bit number."""


def string_id(text: str) -> int:
    """The id of a string: xxh3-64 of its UTF-8 bytes, seed 0."""
    return xxhash.xxh3_64_intdigest(text.encode())


def string_ids(texts: Iterable[str]) -> U64:
    """`string_id` of each text: uint64 [n]."""
    return np.fromiter((string_id(text) for text in texts), dtype=np.uint64)


class Collisions:
    """Remembers which text each hashed id came from, and reports two texts that share one id."""

    def __init__(self) -> None:
        self._text_by_id: dict[int, str] = {}
        self.found: list[tuple[int, str, str]] = []

    def add(self, text: str) -> int:
        """Hashes `text`; a collision with an earlier, different text is appended to `found` as (id, earlier, text)."""
        hashed = string_id(text)
        earlier = self._text_by_id.setdefault(hashed, text)
        if earlier != text:
            self.found.append((hashed, earlier, text))
        return hashed


def user_key(user_id: int) -> bytes:
    """Kafka key of a user's records: 16 lower-case hexadecimal digits, readable in every tool."""
    return b"%016x" % user_id


@lru_cache(256)  # whoever reads a user asks twice: where the sequence is, and which view has it
def partition_of(key: bytes, partition_count: int) -> int:
    """Partition of a key as Java clients choose it: murmur2 (seed 0x9747b28c), sign bit dropped, modulo the partitions."""
    return (murmur2(key) & 0x7FFFFFFF) % partition_count


def user_keys(users: U64) -> npt.NDArray[np.uint8]:
    """`user_key` of many users: uint8 [n, 16]."""
    return _key_words(users).view(np.uint8)


def _key_words(users: U64) -> npt.NDArray[np.uint32]:
    """`user_key` of many users as little-endian words: uint32 [n, 4]."""
    return _HEX.take(users.astype(">u8").view(">u2").reshape(-1, 4))


def partitions_of(users: U64, partition_count: int) -> npt.NDArray[np.int32]:
    """`partition_of(user_key(user))` of many users: int32 [n]."""
    m = np.uint32(0x5BD1E995)
    h = np.full(len(users), 0x9747B28C ^ 16, np.uint32)
    for k in np.ascontiguousarray(_key_words(users).T) * m:
        h = (h * m) ^ ((k ^ k >> np.uint32(24)) * m)
    h = (h ^ h >> np.uint32(13)) * m
    h ^= h >> np.uint32(15)
    return ((h & np.uint32(0x7FFFFFFF)) % np.uint32(partition_count)).astype(np.int32)


def murmur2(data: bytes) -> int:
    """Kafka's 32-bit murmur2 hash, as an unsigned integer."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    length = len(data)
    h = (0x9747B28C ^ length) & mask
    tail = length & ~3
    for start in range(0, tail, 4):
        k = int.from_bytes(data[start : start + 4], "little") * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if length & 3:
        h = (h ^ int.from_bytes(data[tail:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def derived_event_id(user_id: int, entity_kind: int, entity_id: int, action: int, event_time_ms: int) -> int:
    """Event id for logs that carry none: xxh3-64 over the five fields, so that the same row imported twice is the same event."""
    packed = b"".join(
        value.to_bytes(width, "little")
        for value, width in ((user_id, 8), (entity_id, 8), (event_time_ms, 8), (entity_kind, 1), (action, 1))
    )
    return xxhash.xxh3_64_intdigest(packed)


def log_epoch(cluster_id: str, topic_id: str, partition_count: int, base: str = "") -> int:
    """Identity of a log: positions of two logs are comparable only if their epochs are equal.

    It is derived from what any client can ask the broker for, so a new cluster, a recreated topic or more partitions change it by
    themselves; and from the base, the history that the state stands on (`features.base`), "" for none. Never 0, which stands for "the
    current one" in requests.
    """
    return xxhash.xxh3_64_intdigest("/".join((cluster_id, topic_id, str(partition_count), *([base] if base else []))).encode()) or 1

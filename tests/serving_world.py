"""A small product with tables, releases of two rankers and a state in memory: what the serving tests share."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from features.actions import EVENT_DTYPE
from features.domain import parse_domain
from features.ids import partition_of, user_key
from features.ports import Position, Reading, SequenceReader
from features.sequence import NEVER_ERASED, Row, definition, encode_row, law
from features.tables import Member, write_generation
from inference.release import Release, write_release
from inference.transact import TransActRanker

DOMAIN_TOML = """
name = "test"
[entities]
video = 1
product = 2
[surfaces]
home = 1
[actions]
shown = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
like = { id = 3, kind = "positive" }
unlike = { id = 4, kind = "negative", retracts = "like" }
hide = { id = 5, kind = "negative" }
[sequence.main]
id = 1
length = 100
age_days_max = 30
evict = "log_clock"
[features]
age = { side = "user", kind = "number", missing = -2.0 }
tags = { side = "item", kind = "list", hash_buckets = 8, dimension = 4 }
hour = { side = "request", kind = "category", vocabulary = ["day", "night"], dimension = 4 }
price = { side = "candidate", kind = "number", normalise = "log" }
[ranker.home]
sequence = "main"
sequence_attributes = ["surface", "value"]
item_space = "home_items"
user_space = "home_items"
features = ["age", "tags", "hour", "price"]
candidates_max = 300
[ranker.home.heads]
click = { actions = ["click"] }
hide = { actions = ["hide"], utility = -0.5 }
[ranker.related]
sequence = "main"
sequence_length = 20
item_space = "related_items"
embedding_dimension = 16
[ranker.related.heads]
like = { actions = ["like"] }
"""
DOMAIN = parse_domain(DOMAIN_TOML, source="domain.toml")
NOW_MS = 1_700_000_000_000
VIDEO, PRODUCT = 1, 2
ITEMS, USERS = 500, 50
"""Items 1..500 of both kinds and users 1..50 have vectors."""
EPOCH = 77


def make_model(ranker: str, *, seed: int = 0) -> TransActRanker:
    """A model whose weights come from NumPy's generator, which keeps its numbers between versions."""
    model = TransActRanker(DOMAIN, ranker).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(random.normal(scale=0.1, size=tensor.shape)))
        for name, buffer in model.named_buffers():
            if name.endswith("deviation"):
                buffer.fill_(1.0)
    return model


def write_tables(tables: Path, *, created_ms: int = NOW_MS, seed: int = 1) -> dict[str, str]:
    """A generation of each space; returns their names."""
    random = np.random.default_rng(seed)
    names = {}
    for space, dimension in (("home_items", 32), ("related_items", 16)):
        members = {
            name: Member(np.arange(1, n + 1, dtype=np.uint64), random.normal(size=(n, dimension)).astype(np.float16))
            for name, n in (("item.video", ITEMS), ("item.product", ITEMS), ("user", USERS))
        }
        names[space] = write_generation(tables, space, created_ms, members).name
    tags = random.integers(0, 2**63, (ITEMS, 4)).astype(np.uint64)
    members = {
        "item.video": Member(np.arange(1, ITEMS + 1, dtype=np.uint64), features={"tags": tags}),
        "user": Member(np.arange(1, USERS + 1, dtype=np.uint64), features={"age": random.normal(size=USERS).astype(np.float32)}),
    }
    names["features"] = write_generation(tables, "features", created_ms, members).name
    return names


def write_ranker(
    releases: Path, generations: dict[str, str], ranker: str, *, created_ms: int = NOW_MS, seed: int = 0, small: bytes | None = None
) -> Release:
    """A release with random weights."""
    return write_release(
        releases,
        model=make_model(ranker, seed=seed),
        domain_toml=DOMAIN_TOML,
        ranker=ranker,
        created_ms=created_ms,
        generations=generations,
        metrics={"test": {"auc": 0.5}},
        small=small,
    )


def make_events(count: int, *, seed: int = 2, newest_ms: int = NOW_MS - 1000) -> np.ndarray:
    """Clicks and likes on videos, one a second."""
    random = np.random.default_rng(seed)
    events = np.zeros(count, EVENT_DTYPE)
    events["event_time_ms"] = newest_ms - np.arange(count)[::-1] * 1000
    events["event_id"] = random.integers(1, 2**63, count)
    events["entity_id"] = random.integers(1, ITEMS + 1, count)
    events["entity_kind"] = VIDEO
    events["action"] = random.integers(2, 4, count)
    events["value"] = np.nan
    return events


@dataclass
class MemoryReader:
    """A SequenceReader over rows in memory, with one offset for all of its partitions."""

    partitions: int = 4
    offset: int = 10
    log_clock_ms: int = NOW_MS
    rows: dict[int, bytes] = field(default_factory=dict)
    error: Exception | None = None

    def put(self, user_id: int, events: np.ndarray) -> None:
        at = self._at(user_id)
        kept = law(definition(DOMAIN, "main"), events)
        self.rows[user_id] = encode_row(
            Row(user_id, DOMAIN.sequence_fingerprint("main"), EPOCH, at.partition, at.offset, NEVER_ERASED, kept)
        )

    def read(self, sequence: str, user_ids: list[int]) -> list[Reading]:
        assert sequence == "main"
        self._fail()
        return [Reading(user, self.rows.get(user, b""), self._at(user), self.log_clock_ms) for user in user_ids]

    def position(self, user_id: int) -> Position:
        self._fail()
        return self._at(user_id)

    def statistics(self) -> dict[str, float]:
        return {"rows": len(self.rows)}

    def close(self) -> None:
        pass

    def _at(self, user_id: int) -> Position:
        return Position(EPOCH, partition_of(user_key(user_id), self.partitions), self.offset)

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@dataclass
class ListSink:
    """A RankingSink that keeps records; `full` drops them."""

    records: list[bytes] = field(default_factory=list)
    full: bool = False

    def put(self, user_id: int, record: bytes) -> bool:
        assert user_id >= 0
        if not self.full:
            self.records.append(record)
        return not self.full

    def statistics(self) -> dict[str, float]:
        return {"sent": len(self.records)}

    def close(self) -> None:
        pass


class ImmediateSource:
    """A `SequenceSource` over a reader that answers from memory."""

    def __init__(self, reader: SequenceReader) -> None:
        self._reader = reader

    async def read(
        self, sequence: str, user_ids: Seq[int], *, timeout_s: float, after: Seq[Position] = (), wait_s: float = 0.0
    ) -> list[Reading]:
        """See `SequenceSource.read`; answers at once."""
        del timeout_s, after, wait_s
        return self._reader.read(sequence, user_ids)

    def statistics(self) -> dict[str, float]:
        """See `SequenceSource.statistics`."""
        return self._reader.statistics()

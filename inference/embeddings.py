"""Item and user embeddings from the log alone: factorised co-engagement, the baseline that batch models replace behind the same tables.

Items acted on positively by one user soon after each other are similar: their positive pointwise mutual information is factorised
(truncated SVD), which gives the item vectors. A user's vector is the mean of the vectors of what they acted on positively, so that the dot
product of user and item ranks by itself. Only what the log held before `until_ms` is used.

User vectors are published as several generations in the order of time, each from what came before it. Training gives a request the
generation that serving would have had then; with today's vectors a request would be told its own answer.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from features.actions import EVENT_DTYPE
from features.domain import Domain
from features.erasures import NOBODY, Erased, erased_before_ms
from features.ids import U64
from features.logs import LoggedActions, read_actions
from features.tables import USER, Member, item_member, write_generation

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

PAIR_WINDOW = 10
CONTEXT_SMOOTHING = 0.75
CONFIDENCE_PRIOR = 2.0
WARM_ITERATIONS = 2
SNAPSHOTS = 8


class EmbeddingError(ValueError):
    """The log does not hold what embeddings need; says what is missing."""


@dataclass(frozen=True)
class Positives:
    """Positive actions in the order of the log: users uint64, kinds uint8, ids uint64, append_time_ms int64, each [n]."""

    users: U64
    kinds: npt.NDArray[np.uint8]
    ids: U64
    append_time_ms: I64

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: I64 | slice) -> "Positives":
        """Some of them, in the order of `rows`."""
        return Positives(self.users[rows], self.kinds[rows], self.ids[rows], self.append_time_ms[rows])


@dataclass(frozen=True)
class ItemVectors:
    """kinds uint8 [items], ids uint64 [items], vectors float32 [items, D]; `row` int64 [n] is the item of each positive."""

    kinds: npt.NDArray[np.uint8]
    ids: U64
    vectors: F32
    row: I64


def publish_embeddings(
    domain: Domain,
    ranker_name: str,
    log: str | Path,
    root: str | Path,
    *,
    until_ms: int,
    seed: int = 0,
    snapshots: int = SNAPSHOTS,
    erased: Erased = NOBODY,
) -> list[Path]:
    """Trains on `log` up to `until_ms` (exclusive) and writes generations of the ranker's item and user space below `root`.

    Returns the folders, of each space oldest first; the last one of each is the one to train and serve with (`newest_generations`). All of
    them have one lineage, made from the item vectors: vectors of another factorisation are not comparable with these. The past of users in
    `erased` is left out, whatever the log still holds of it.

    Raises:
        EmbeddingError: no positive action before `until_ms`.
    """
    ranker = domain.ranker[ranker_name]
    positives = positive_actions(domain, log, until_ms, erased)
    items = item_vectors(positives, ranker.embedding_dimension, seed=seed)
    members = {
        item_member(name): Member(items.ids[items.kinds == kind], items.vectors[items.kinds == kind].astype(np.float16))
        for name, kind in domain.entities.items()
    }
    content = b"".join(part.tobytes() for part in (items.kinds, items.ids, items.vectors))
    lineage = hashlib.sha256(content).hexdigest()[:16]
    first_ms = int(positives.append_time_ms.min())
    folders = []
    for space in sorted({ranker.item_space, ranker.user_space} - {None}, key=str):
        # What a space holds does not depend on which of the rankers that share it asks.
        held = members if any(other.item_space == space for other in domain.ranker.values()) else {}
        has_users = any(other.user_space == space for other in domain.ranker.values())
        moments = np.linspace(first_ms, until_ms, snapshots + 1, dtype=np.int64) if has_users else [until_ms]
        for moment_ms in sorted(map(int, set(moments))):
            users = {USER: user_vectors(positives, items, moment_ms)} if has_users else {}
            folders.append(write_generation(root, str(space), moment_ms, {**held, **users}, lineage=lineage, erased=erased))
    return folders


def newest_generations(folders: list[Path]) -> dict[str, str]:
    """Generation by space of what `publish_embeddings` returned: the last one of each space."""
    return {folder.parent.name: folder.name for folder in folders}


def positive_actions(domain: Domain, log: str | Path, until_ms: int, erased: Erased = NOBODY) -> Positives:
    """`positives_of` a canonical log. Raises EmbeddingError: there are none."""
    found = positives_of(domain, read_actions(log, domain), until_ms, erased)
    if not len(found):
        raise EmbeddingError(f"{log}: no positive action before {until_ms} ms; embeddings need some to learn from")
    return found


def positives_of(
    domain: Domain, batches: Iterable[LoggedActions], until_ms: int, erased: Erased = NOBODY, *, since_ms: int = 0
) -> Positives:
    """Positive actions appended before `until_ms` on kinds that the domain names, without those of users erased before it, and without
    the past of users in `erased`, whenever that was. since_ms: those that were appended and happened from then on, so that erasures before
    it need not be known. `batches` are a log from its begin, or from `since_ms`, on; a user's actions come in the log's order.
    """
    wanted = np.zeros(256, bool)
    wanted[[action.id for action in domain.actions.values() if action.kind == "positive"]] = True
    kinds = np.zeros(256, bool)
    kinds[list(domain.entities.values())] = True
    parts, erased_at = [_columns(_NO_ACTIONS, np.zeros(0, np.int64), np.zeros(0, bool))], dict[int, tuple[int, int]]()
    seen = 0
    for batch in batches:
        place = seen + np.arange(len(batch))
        seen += len(batch)
        early = batch.append_time_ms < until_ms
        for i in np.flatnonzero(batch.erase & early).tolist():
            earlier = erased_at.get(int(batch.users[i]), (0, 0))
            erased_at[int(batch.users[i])] = int(place[i]), max(earlier[1], int(batch.append_time_ms[i]))
        keep = early & ~batch.erase & wanted[batch.events["action"]] & kinds[batch.events["entity_kind"]]
        keep &= np.minimum(batch.append_time_ms, batch.events["event_time_ms"]) >= since_ms
        parts.append(_columns(batch, place, keep))
    users, event_kinds, ids, append_time_ms, event_time_ms, place = (np.concatenate(column) for column in zip(*parts, strict=True))
    alive = np.ones(len(users), bool)
    for user, (at, time_ms) in erased_at.items():
        alive &= (users != user) | ((place > at) & (event_time_ms > time_ms))
    alive &= np.minimum(append_time_ms, event_time_ms) > erased_before_ms(erased, users)
    return Positives(users[alive], event_kinds[alive], ids[alive], append_time_ms[alive])


_NO_ACTIONS = LoggedActions.imported(np.zeros(0, np.uint64), np.zeros(0, EVENT_DTYPE), np.zeros(0, np.int64))


def item_vectors(positives: Positives, dimension: int, *, seed: int) -> ItemVectors:
    """Vectors of every item acted on positively, about unit length, shorter where an item was seen seldom.

    Singular vectors are found by a randomised range finder with its own seed: the same log gives the same vectors on the same machine.
    """
    keys = np.stack([positives.kinds.astype(np.uint64), positives.ids], 1)
    distinct, row = np.unique(keys, axis=0, return_inverse=True)
    row = row.reshape(-1).astype(np.int64)
    vectors = factorised(positives.users, row, len(distinct), dimension, seed=seed)
    return ItemVectors(distinct[:, 0].astype(np.uint8), distinct[:, 1], vectors, row)


def factorised(users: U64, row: I64, items: int, dimension: int, *, seed: int, start: F32 | None = None) -> F32:
    """Vectors float32 [items, dimension] from positive actions in the order of the log: user and item (0 to items - 1) of each.

    start: vectors [items, dimension] of a factorisation of about the same, zero where unknown. The search for the singular vectors goes on
    from there: the spectrum is flat, and from a random start each search ends in another space.
    """
    first, second = _pairs(users, row)
    code, count = np.unique(first * items + second, return_counts=True)
    first, second = code // items, code % items
    degree = np.bincount(first, count, minlength=items)
    context = degree**CONTEXT_SMOOTHING
    with np.errstate(divide="ignore"):
        information = np.log(count * context.sum() / (degree[first] * context[second]))
    positive = information > 0
    vectors = np.zeros((items, dimension), np.float32)
    if positive.any():
        matrix = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([first[positive], second[positive]])),
            torch.from_numpy(information[positive].astype(np.float32)),
            (items, items),
            check_invariants=True,
        ).coalesce()
        rank = min(dimension, items)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if start is None:
                left, scale, _ = torch.svd_lowrank(matrix, q=min(items, rank + 8), niter=4)
            else:
                left, scale = _singular(matrix, torch.from_numpy(start)[:, :rank])
        raw = (left[:, :rank] * scale[:rank].sqrt()).numpy()
        length = np.linalg.norm(raw, axis=1, keepdims=True)
        seen = np.bincount(row, minlength=items)[:, None]
        # An item seen once has a direction but little evidence for it: a short vector says so.
        vectors[:, :rank] = raw / np.maximum(length, 1e-6) * (seen / (seen + CONFIDENCE_PRIOR))
    return vectors


def _singular(matrix: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greatest left singular vectors [n, q] and values [q] of a sparse matrix [n, n], by subspace iteration from `start` [n, rank]; q is
    rank + 8 at most. Draws from torch's generator."""
    more = min(len(start), start.shape[1] + 8) - start.shape[1]
    random = torch.randn(len(start), start.shape[1] + more)
    space = functional.pad(start, (0, more)) + random * (1e-3 + (torch.arange(random.shape[1]) >= start.shape[1]))
    for _ in range(WARM_ITERATIONS):
        space = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ space).Q).Q
    left, scale, _ = torch.linalg.svd(torch.sparse.mm(matrix.t(), space).t(), full_matrices=False)
    return space @ left, scale


def user_vectors(positives: Positives, items: ItemVectors, until_ms: int) -> Member:
    """Mean vector of what each user acted on positively before `until_ms`; users without such an action are absent."""
    early = np.flatnonzero(positives.append_time_ms < until_ms)
    early = early[np.argsort(positives.users[early], kind="stable")]
    users, starts = np.unique(positives.users[early], return_index=True)
    if not len(users):
        return Member(np.zeros(0, np.uint64), np.zeros((0, items.vectors.shape[1]), np.float16))
    sums = np.add.reduceat(items.vectors[items.row[early]], starts, axis=0)
    counts = np.diff(np.append(starts, len(early)))[:, None]
    return Member(users, (sums / counts).astype(np.float16))


def _columns(batch: LoggedActions, place: I64, keep: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.generic], ...]:
    events = batch.events[keep]
    return (
        batch.users[keep],
        events["entity_kind"],
        events["entity_id"],
        batch.append_time_ms[keep],
        events["event_time_ms"],
        place[keep],
    )


def _pairs(users: U64, row: I64) -> tuple[I64, I64]:
    """Ordered pairs of different items that a user acted on within PAIR_WINDOW positive actions, both ways: int64 [pairs] each."""
    order = np.argsort(users, kind="stable")
    users, row = users[order], row[order]
    firsts, seconds = [], []
    for distance in range(1, min(PAIR_WINDOW, len(row) - 1) + 1):
        same = (users[distance:] == users[:-distance]) & (row[distance:] != row[:-distance])
        before, after = row[:-distance][same], row[distance:][same]
        firsts += [before, after]
        seconds += [after, before]
    if not firsts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(firsts), np.concatenate(seconds)

"""Item vectors that follow the log: made anew every hour (or what `[ranker.NAME.refresh]` says) from what was known then.

Of articles that live for a day, a daily training has no vector of most that are clicked. Here each generation factorises the co-engagement
of the window before it. Two factorisations are not comparable, so each is turned onto the one before it by the rotation that fits the items
of both best (orthogonal Procrustes), which changes no dot product inside a generation: sequence, candidates and user vectors of different
hours then stand in about one space, and all generations have one lineage. Each factorisation is searched for from the vectors before it,
else vectors would turn by the hour for no reason but the search. Items that the window does not hold keep their last vector.
User vectors are made anew once a day, as a batch job would; `build_dataset` gives each request the generation that was the newest then.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from features.domain import DAY_MS, Domain, Ranker, Refresh
from features.erasures import NOBODY, Erased
from features.tables import USER, Member, item_member, write_generation
from inference.embeddings import EmbeddingError, ItemVectors, Positives, factorised, positive_actions, user_vectors

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_TIME_MS_MAX = 1 << 62


def publish_refreshed(
    domain: Domain, ranker_name: str, log: str | Path, root: str | Path, *, seed: int = 0, erased: Erased = NOBODY
) -> list[Path]:
    """Writes the generations of the ranker's item and user space for the whole log, oldest first; returns their folders.

    A generation of time t knows what the log held strictly before t, so generations behind the training part tell a test nothing too early.

    Raises:
        EmbeddingError: no positive action, or rankers that share the space and ask for different refreshes.
    """
    ranker = domain.ranker[ranker_name]
    spaces = sorted({ranker.item_space, ranker.user_space} - {None}, key=str)
    refresh = _one_refresh(domain, ranker)
    positives = positive_actions(domain, log, _TIME_MS_MAX, erased)
    order = np.argsort(positives.append_time_ms, kind="stable")
    positives = Positives(positives.users[order], positives.kinds[order], positives.ids[order], positives.append_time_ms[order])
    lineage = _lineage(positives, refresh, ranker.embedding_dimension, seed)
    folders: dict[str, list[Path]] = {str(space): [] for space in spaces}
    users, users_ms = Member(np.zeros(0, np.uint64), np.zeros((0, ranker.embedding_dimension), np.float16)), 0
    for moment_ms, items, known in generations(positives, refresh, ranker.embedding_dimension, seed):
        if fresh_users := moment_ms // DAY_MS > users_ms // DAY_MS:
            users, users_ms = user_vectors(positives, items, moment_ms), moment_ms
        held = {
            item_member(name): Member(items.ids[of], items.vectors[of].astype(np.float16))
            for name, kind in domain.entities.items()
            for of in [known & (items.kinds == kind)]
        }
        for space in folders:
            has_items = any(other.item_space == space for other in domain.ranker.values())
            has_users = any(other.user_space == space for other in domain.ranker.values())
            if has_items or fresh_users:
                members = (held if has_items else {}) | ({USER: users} if has_users else {})
                folders[space].append(write_generation(root, space, moment_ms, members, lineage=lineage, erased=erased))
    return [folder for of_space in folders.values() for folder in of_space]


def generations(
    positives: Positives, refresh: Refresh, dimension: int, seed: int
) -> Iterator[tuple[int, ItemVectors, npt.NDArray[np.bool_]]]:
    """Moment, vectors of all items of `positives` (in the order of append time) and which of these the log held before the moment.

    The first moment is that of the first action, where nothing is known; the last one is behind the last action.
    """
    keys = np.stack([positives.kinds.astype(np.uint64), positives.ids], 1)
    distinct, row = np.unique(keys, axis=0, return_inverse=True)
    row = row.reshape(-1).astype(np.int64)
    items = ItemVectors(distinct[:, 0].astype(np.uint8), distinct[:, 1], np.zeros((len(distinct), dimension), np.float32), row)
    known = np.zeros(len(distinct), bool)
    times_ms = positives.append_time_ms
    first_ms, last_ms = int(times_ms[0]), int(times_ms[-1])
    yield first_ms, items, known.copy()
    done = 0
    for moment_ms in range((first_ms // refresh.every_ms + 1) * refresh.every_ms, last_ms + refresh.every_ms + 1, refresh.every_ms):
        since, until = (int(place) for place in times_ms.searchsorted([moment_ms - refresh.window_ms, moment_ms]))
        if until == done:
            continue  # nothing came: the generation before is as good
        done = until
        seen, local = np.unique(row[since:until], return_inverse=True)
        fresh = factorised(positives.users[since:until], local.reshape(-1), len(seen), dimension, seed=seed, start=items.vectors[seen])
        shared = known[seen]
        vectors = items.vectors.copy()
        vectors[seen] = fresh @ rotation(fresh[shared], vectors[seen[shared]])
        items = ItemVectors(items.kinds, items.ids, vectors, row)
        known[row[:until]] = True
        yield moment_ms, items, known.copy()


def rotation(new: F32, old: F32) -> F32:
    """The orthogonal matrix [D, D] with the least sum of squares of `new @ rotation - old`, rows being items of both: float32."""
    left, _, right = np.linalg.svd(new.T.astype(np.float64) @ old)
    turned: F32 = (left @ right).astype(np.float32)
    return turned


def _one_refresh(domain: Domain, ranker: Ranker) -> Refresh:
    for name, other in domain.ranker.items():
        if ranker.item_space in (other.item_space, other.user_space) and other.refresh != ranker.refresh:
            raise EmbeddingError(f"ranker.{name}.refresh: differs from that of another ranker of space {ranker.item_space}")
    if ranker.refresh is None:
        raise EmbeddingError(f"space {ranker.item_space}: its rankers ask for no refresh")
    return ranker.refresh


def _lineage(positives: Positives, refresh: Refresh, dimension: int, seed: int) -> str:
    """Of the settings and what the first generation with vectors is made of: all others are turned onto it, so a log that has grown keeps
    its lineage, and its generations but for the new ones."""
    settings = f"{refresh.model_dump_json()}:{dimension}:{seed}"
    first = positives.append_time_ms // refresh.every_ms == positives.append_time_ms[0] // refresh.every_ms
    columns = (column[first] for column in (positives.users, positives.kinds, positives.ids, positives.append_time_ms))
    return hashlib.sha256(settings.encode() + b"".join(column.tobytes() for column in columns)).hexdigest()[:16]

"""Item vectors that follow the log: made anew every hour (or what `[ranker.NAME.refresh]` says) from what was known then.

Of articles that live for a day, a daily training has no vector of most that are clicked. Here each generation factorises the co-engagement
of the window before it. Two factorisations are not comparable, so each is turned onto the one before it by the rotation that fits the items
of both best (orthogonal Procrustes), which changes no dot product inside a generation: sequence, candidates and user vectors of different
hours then stand in about one space, and all generations have one lineage. Each factorisation is searched for from the vectors before it,
else vectors would turn by the hour for no reason but the search. Items that the window does not hold keep their last vector.
User vectors are made anew once a day, as a batch job would; `build_dataset` gives each request the generation that was the newest then.
A space that holds items and users repeats the users in each generation; one of the users' own has one generation a day.

`publish_refreshed` makes all of this for a whole log. `publish_present` goes on from there, for a running stack: one hour behind the newest
generation, of which it needs nothing but the window's actions.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from features.domain import DAY_MS, Domain, Ranker, Refresh
from features.erasures import NOBODY, Erased, erased_before_ms
from features.logs import LoggedActions
from features.tables import USER, Generation, Member, generations_of, item_member, lineage_of, open_generation, time_of, write_generation
from inference.embeddings import EmbeddingError, ItemVectors, Positives, factorised, positive_actions, positives_of, user_vectors
from inference.release import Release

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SETTLED_MS = 60_000
"""An hour of a running stack is made this long after its begin: then the log has all that came before it, even if clocks differ."""
COUNTED = "actions"
"""Column of users beside their vectors: how many actions each is the mean of."""

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
    positives = _by_time(positive_actions(domain, log, _TIME_MS_MAX, erased))
    lineage = _lineage(positives, refresh, ranker.embedding_dimension, seed)
    folders: dict[str, list[Path]] = {str(space): [] for space in spaces}
    users, users_ms = Member(np.zeros(0, np.uint64)), 0
    for moment_ms, items, known in generations(positives, refresh, ranker.embedding_dimension, seed):
        if fresh_users := moment_ms // DAY_MS > users_ms // DAY_MS:
            users, users_ms = _counted(positives, items, moment_ms), moment_ms
        held = _item_members(domain, items, known)
        for space in folders:
            has_items, has_users = _holds(domain, space)
            if has_items or fresh_users:
                members = (held if has_items else {}) | ({USER: users} if has_users else {})
                folders[space].append(write_generation(root, space, moment_ms, members, lineage=lineage, erased=erased))
    return [folder for of_space in folders.values() for folder in of_space]


def generations(
    positives: Positives, refresh: Refresh, dimension: int, seed: int
) -> Iterator[tuple[int, ItemVectors, npt.NDArray[np.bool_]]]:
    """Moment, vectors of all items of `positives` (in the order of append time) and which of these the log held before the moment.

    The first moment is that of the first action, where nothing is known; the last one is just behind the last action, not the end of its
    hour: no generation is of a time up to which it does not know everything.
    """
    keys = np.stack([positives.kinds.astype(np.uint64), positives.ids], 1)
    distinct, row = np.unique(keys, axis=0, return_inverse=True)
    row = row.reshape(-1).astype(np.int64)
    items = ItemVectors(distinct[:, 0].astype(np.uint8), distinct[:, 1], np.zeros((len(distinct), dimension), np.float32), row)
    known = np.zeros(len(distinct), bool)
    times_ms = positives.append_time_ms
    first_ms, last_ms = int(times_ms[0]), int(times_ms[-1])
    yield first_ms, items, known.copy()
    moments_ms = [*range((first_ms // refresh.every_ms + 1) * refresh.every_ms, last_ms + 1, refresh.every_ms), last_ms + 1]
    for moment_ms, made, _ in _hours(positives, items, known, moments_ms, first_ms, refresh.window_ms, seed):
        yield moment_ms, made, known.copy()


def _hours(
    positives: Positives,
    items: ItemVectors,
    known: npt.NDArray[np.bool_],
    moments_ms: Iterable[int],
    done_ms: int,
    window_ms: int,
    seed: int,
) -> Iterator[tuple[int, ItemVectors, bool]]:
    """Moment, items, and whether its window had an item that was known before; `known` is brought up to date. `items` are of `done_ms`."""
    times_ms, row = positives.append_time_ms, items.row
    done = int(times_ms.searchsorted(done_ms))
    for moment_ms in moments_ms:
        since, until = (int(place) for place in times_ms.searchsorted([moment_ms - window_ms, moment_ms]))
        if until == done:
            continue  # nothing came: the generation before is as good
        done = until
        seen, local = np.unique(row[since:until], return_inverse=True)
        vectors = items.vectors.copy()
        fresh = factorised(positives.users[since:until], local.reshape(-1), len(seen), vectors.shape[1], seed=seed, start=vectors[seen])
        shared = known[seen]
        vectors[seen] = fresh @ rotation(fresh[shared], vectors[seen[shared]])
        items = replace(items, vectors=vectors)
        known[seen] = True
        yield moment_ms, items, bool(shared.any())


def rotation(new: F32, old: F32) -> F32:
    """The orthogonal matrix [D, D] with the least sum of squares of `new @ rotation - old`, rows being items of both: float32."""
    left, _, right = np.linalg.svd(new.T.astype(np.float64) @ old)
    turned: F32 = (left @ right).astype(np.float32)
    return turned


def publish_present(
    domain: Domain,
    ranker_name: str,
    release: Release,
    actions: Callable[[int], Iterable[LoggedActions]],
    root: str | Path,
    now_ms: int,
    *,
    seed: int = 0,
    erased: Erased = NOBODY,
) -> dict[str, str]:
    """Makes a running stack's generations of the present hour, in the lineage that `release` was trained with; returns the newest of each
    space of the ranker.

    They are of the begin of the hour (of `every_ms`) and know what the log held strictly before it. Where one of this moment or a later one
    is there it stays, so that a tick may be repeated, and one that was cut off is made good by the next. Hours that were missed are gone
    through, but not written: nobody was served with them. Where nothing came since the newest one, that is as good, and an hour that the
    log has not reached yet (nothing was appended since its begin, or this clock is ahead) is made by a later tick. Users get what they did
    since theirs were made added to the mean.

    `actions(since_ms)`: what the log holds that was appended from then on, or more, each user's in the log's order. `since_ms` is the begin
    of the window of the first hour to be made, or when the users' vectors were made where that is earlier. Memory is for the positive
    actions since then and for the tables.

    Raises:
        EmbeddingError: the domain file asks for no refresh, or for another one than the release was trained with; or no item of the window
            has a vector in the generation before, so that nothing would make the new ones comparable.
        TableError: the generations that the release was trained with are not there.
    """
    ranker = domain.ranker[ranker_name]
    refresh = _one_refresh(domain, ranker)
    lineage = _lineage_of_release(domain, ranker_name, release, root)
    moment_ms = (now_ms - SETTLED_MS) // refresh.every_ms * refresh.every_ms
    spaces = sorted({ranker.item_space, ranker.user_space} - {None}, key=str)
    found = {str(space): _Space.find(domain, root, str(space), lineage, moment_ms) for space in spaces}
    newest = {space: of.newest for space, of in found.items()}
    due = {space: of for space, of in found.items() if of.is_due(moment_ms)}
    before = found[ranker.item_space].before
    if before is None or not due:
        return newest
    moments_ms = range((before.created_ms // refresh.every_ms + 1) * refresh.every_ms, moment_ms + 1, refresh.every_ms)
    since_ms = min(moments_ms[0] - refresh.window_ms, *(of.users_since_ms(moment_ms) for of in due.values()))
    told, reached = dict(erased), [0]
    positives = _by_time(positives_of(domain, _noting(actions(since_ms), told, reached), moment_ms, erased, since_ms=since_ms))
    # A generation of a time that the log has not reached would miss what is still to come before it, erasures too: clocks differ.
    if max(reached) < moment_ms or not (positives.append_time_ms >= before.created_ms).any():
        return newest
    # Erasures from behind the moment count as well: the one who was erased since then is left out.
    positives = positives.take(np.flatnonzero(positives.append_time_ms > erased_before_ms(told, positives.users)))
    items, known = _merged(domain, before, positives)
    for hour_ms, made, comparable in _hours(positives, items, known, moments_ms, before.created_ms, refresh.window_ms, seed):
        items = made
        if not comparable:
            raise EmbeddingError(
                f"{before.folder}: none of the items of the {refresh.window_ms} ms before {hour_ms} has a vector yet: nothing would make "
                "theirs comparable with those that the release was trained with; train and publish anew"
            )
    for space, of in due.items():
        members = _item_members(domain, items, known) if of.has_items else {}
        if of.has_users:
            members[USER] = of.users(positives, items, moment_ms, told)
        newest[space] = write_generation(root, space, moment_ms, members, lineage=lineage, erased=told).name
    return newest


@dataclass(frozen=True)
class _Space:
    """A space of one lineage. names: of its generations, newest first; before: the newest one from before the moment."""

    names: list[str]
    before: Generation | None
    has_items: bool
    has_users: bool

    @classmethod
    def find(cls, domain: Domain, root: str | Path, space: str, lineage: str, moment_ms: int) -> "_Space":
        names = list(generations_of(root, space, lineage))
        before = next((name for name in names if time_of(name) < moment_ms), None)
        return cls(names, None if before is None else open_generation(root, space, before), *_holds(domain, space))

    @property
    def newest(self) -> str:
        return self.names[0]

    def is_due(self, moment_ms: int) -> bool:
        return time_of(self.newest) < moment_ms and (self.has_items or self._is_new_day(moment_ms))

    def users_since_ms(self, moment_ms: int) -> int:
        """When what its users' vectors know ends: where they are made anew their actions since then count, else erasures alone."""
        assert self.before is not None
        if not self.has_users:
            return moment_ms
        created_ms = self.before.created_ms
        if not self._is_new_day(moment_ms):
            return created_ms
        return min(made_ms for name in self.names if (made_ms := time_of(name)) // DAY_MS == created_ms // DAY_MS)

    def users(self, positives: Positives, items: ItemVectors, moment_ms: int, told: Erased) -> Member:
        """The users of the generation before without those erased since theirs were made; of a new day with what they did since then."""
        assert self.before is not None
        since_ms = self.users_since_ms(moment_ms)
        kept = _without_erased(self.before, told, since_ms)
        if not self._is_new_day(moment_ms):
            return kept
        rows = np.flatnonzero(positives.append_time_ms >= since_ms)
        return _together(kept, _counted(positives.take(rows), replace(items, row=items.row[rows]), moment_ms))

    def _is_new_day(self, moment_ms: int) -> bool:
        return self.has_users and self.before is not None and moment_ms // DAY_MS > self.before.created_ms // DAY_MS


def _lineage_of_release(domain: Domain, ranker_name: str, release: Release, root: str | Path) -> str:
    """The lineage that a release was trained with, which the domain file's `refresh` goes on with."""
    now, trained = domain.ranker[ranker_name], release.domain.ranker[ranker_name]
    for key in ("refresh", "item_space", "user_space", "embedding_dimension"):
        if getattr(now, key) != getattr(trained, key):
            raise EmbeddingError(
                f"{release.release_id}: was trained with {key} {getattr(trained, key)}, ranker.{ranker_name} has {getattr(now, key)}: "
                "vectors of another lineage; train and publish anew"
            )
    spaces = sorted({str(space) for space in (now.item_space, now.user_space) if space is not None})
    lineages = {space: lineage_of(root, space, release.generations[space]) for space in spaces}
    if len(set(lineages.values())) != 1 or "" in lineages.values():
        said = ", ".join(f"{space} of lineage {lineage or 'none'}" for space, lineage in lineages.items())
        raise EmbeddingError(f"{release.release_id}: was trained with {said}, which no refresh makes; train and publish anew")
    return lineages[spaces[0]]


def _noting(batches: Iterable[LoggedActions], told: dict[int, int], reached: list[int]) -> Iterator[LoggedActions]:
    """The batches; as they pass their erasures are added to `told`, and the time that each reaches to `reached`."""
    for batch in batches:
        reached.append(int(batch.append_time_ms.max(initial=0)))
        for i in np.flatnonzero(batch.erase).tolist():
            user, time_ms = int(batch.users[i]), int(batch.append_time_ms[i])
            told[user] = max(told.get(user, time_ms), time_ms)
        yield batch


def _merged(domain: Domain, before: Generation, positives: Positives) -> tuple[ItemVectors, npt.NDArray[np.bool_]]:
    """The items of a generation and of `positives`, and which of them the generation has: zeros stand for the others."""
    members = [(kind, before.ids(item_member(name)), before.vector_table(item_member(name))) for name, kind in domain.entities.items()]
    members = [(kind, ids, table) for kind, ids, table in members if table is not None]
    kinds = np.concatenate([*(np.full(len(ids), kind, np.uint8) for kind, ids, _ in members), positives.kinds])
    ids = np.concatenate([*(ids for _, ids, _ in members), positives.ids])
    distinct, row = np.unique(np.stack([kinds.astype(np.uint64), ids], 1), axis=0, return_inverse=True)
    held, row = np.split(row.reshape(-1).astype(np.int64), [len(ids) - len(positives)])
    vectors, known = np.zeros((len(distinct), before.dimension or 0), np.float32), np.zeros(len(distinct), bool)
    if members:
        vectors[held] = np.concatenate([table[1:] for _, _, table in members if table is not None])
    known[held] = True
    return ItemVectors(distinct[:, 0].astype(np.uint8), distinct[:, 1], vectors, row), known


def _item_members(domain: Domain, items: ItemVectors, known: npt.NDArray[np.bool_]) -> dict[str, Member]:
    return {
        item_member(name): Member(items.ids[of], items.vectors[of].astype(np.float16))
        for name, kind in domain.entities.items()
        for of in [known & (items.kinds == kind)]
    }


def _counted(positives: Positives, items: ItemVectors, until_ms: int) -> Member:
    """`user_vectors`, and how many actions each is the mean of."""
    _, counts = np.unique(positives.users[positives.append_time_ms < until_ms], return_counts=True)
    return replace(user_vectors(positives, items, until_ms), features={COUNTED: counts.astype(np.float32)})


def _without_erased(before: Generation, told: Erased, since_ms: int) -> Member:
    """A generation's users but those erased from `since_ms` on. Where it has no counts, each vector counts as one action's."""
    ids, table, counts = before.ids(USER), before.vector_table(USER), before.column(USER, COUNTED)
    stay = erased_before_ms(told, ids) < since_ms
    vectors = np.zeros((0, before.dimension or 0), np.float16) if table is None else table[1:][stay]
    return Member(ids[stay], vectors, features={COUNTED: np.ones(int(stay.sum()), np.float32) if counts is None else counts[1:][stay]})


def _together(one: Member, other: Member) -> Member:
    """Users of both: the mean over the actions of both."""
    assert one.vectors is not None
    assert other.vectors is not None
    ids, row = np.unique(np.concatenate([one.ids, other.ids]), return_inverse=True)
    counts = np.concatenate([one.features[COUNTED], other.features[COUNTED]])
    sums = np.zeros((len(ids), one.vectors.shape[1]), np.float32)
    np.add.at(sums, row, np.concatenate([one.vectors, other.vectors]).astype(np.float32) * counts[:, None])
    total = np.bincount(row, counts, len(ids)).astype(np.float32)
    return Member(ids, (sums / total[:, None]).astype(np.float16), features={COUNTED: total})


def _by_time(positives: Positives) -> Positives:
    return positives.take(np.argsort(positives.append_time_ms, kind="stable"))


def _holds(domain: Domain, space: str) -> tuple[bool, bool]:
    """Whether a space holds items, and whether it holds users: by all rankers, not by which of them asks."""
    rankers = domain.ranker.values()
    return any(ranker.item_space == space for ranker in rankers), any(ranker.user_space == space for ranker in rankers)


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

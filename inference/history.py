"""What a log held of a user before a moment: the sequences that training requests see."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from features.actions import EVENT_DTYPE
from features.domain import Domain
from features.erasures import NOBODY, Erased, erased_before_ms
from features.logs import FeatureColumn, LoggedRequests, read_actions
from features.sequence import NEVER_ERASED, Definition, Events, definition, law, law_of_groups

I64 = npt.NDArray[np.int64]

EVENTS_AT_ONCE = 1 << 20
"""Events that are folded together: bounds memory where a user has many requests."""


class DatasetError(ValueError):
    """A log that cannot be trained on; says what is missing."""


@dataclass(frozen=True)
class Sequences:
    """What R requests may see: request i has events[starts[i]:starts[i + 1]], ascending by the law; starts int64 [R + 1].

    erased_before_ms int64 [R]: as the user's row had it then.
    """

    events: Events
    starts: I64
    erased_before_ms: I64


class LoggedSequences(Protocol):
    """Where the sequences of logged requests come from: the log's actions (`History`), or what was served (`served_examples`)."""

    def sequences(self, batch: LoggedRequests) -> Iterator[Sequences]:
        """Of the batch's requests in their order, in as many parts as memory asks for."""
        ...


class History:
    """Every user's sequence as it stood at a moment. Moments of one user must not go back.

    Records of a user are taken in the order of their append time. A request sees those appended before it, not at the same millisecond:
    which of the two came first is not known.
    """

    def __init__(self, domain: Domain, ranker_name: str, log: str | Path, erased: Erased = NOBODY) -> None:
        self._what: Definition = definition(domain, domain.ranker[ranker_name].sequence)
        self._erased = erased
        batches = list(read_actions(log, domain))
        if not batches:
            raise DatasetError(f"{log}: no action in it")
        users = np.concatenate([batch.users for batch in batches])
        times = np.concatenate([batch.append_time_ms for batch in batches])
        order = np.lexsort((times, users))  # stable: equal times keep the order of the log
        self._times, users = times[order], users[order]
        self._events: Events = np.concatenate([batch.events for batch in batches])[order]
        self._erase = np.concatenate([batch.erase for batch in batches])[order]
        known = self._erase | (np.minimum(self._times, self._events["event_time_ms"]) > erased_before_ms(erased, users))
        self._times, users, self._events, self._erase = self._times[known], users[known], self._events[known], self._erase[known]
        self._users, starts = np.unique(users, return_index=True)
        self._bounds = np.append(starts, len(users)).astype(np.int64)
        # Of users who erased themselves in the log, and of nobody else, one record after another is looked at.
        erases = np.concatenate([[0], np.cumsum(self._erase)])[self._bounds]
        self._erases = np.diff(erases) > 0
        self._at = self._bounds[:-1].copy()
        self._state: dict[int, tuple[Events, int]] = {}

    def before(self, user_id: int, time_ms: int) -> tuple[Events, int]:
        """The user's sequence from all records appended before `time_ms`, ascending, and erased_before_ms as the user's row has it then.

        Raises:
            ValueError: an earlier moment than one asked for before.
        """
        user = int(self._users.searchsorted(np.uint64(user_id)))
        nothing = np.zeros(0, EVENT_DTYPE), self._erased.get(user_id, NEVER_ERASED)
        if user == len(self._users) or self._users[user] != user_id:
            return nothing
        start, end = self._bounds[user : user + 2].tolist()
        until = start + int(self._times[start:end].searchsorted(time_ms, "left"))
        at = self._checked(np.array([user]), np.array([until]))[0]
        events, erased_before_ms = self._state.get(user, nothing)
        if until > at:
            erases = at + np.flatnonzero(self._erase[at:until])
            if len(erases):
                events, at = events[:0], int(erases[-1]) + 1
                erased_before_ms = max(erased_before_ms, int(self._times[erases].max()))
            new = self._events[at:until]
            new = new[(new["event_time_ms"] > erased_before_ms) & (new["event_time_ms"] > 0)]
            events = law(self._what, np.concatenate((events, new)))
            self._state[user], self._at[user] = (events, erased_before_ms), until
        return events, erased_before_ms

    def sequences(self, batch: LoggedRequests) -> Iterator[Sequences]:
        """`before` of every request of a batch, without a loop over them.

        Raises:
            ValueError: an earlier moment than one asked for before.
        """
        place = self._users.searchsorted(batch.user_id)
        user = np.where(np.append(self._users, np.uint64(0))[place] == batch.user_id, place, -1)
        user[place == len(self._users)] = -1
        until = _positions_before(self._times, self._bounds, user, batch.request_time_ms)
        first = 0
        while first < len(batch):
            # What a request sees is what its user had when this part began, and everything appended since then.
            since = until[first:] - self._checked(user[first:], until[first:])
            most = np.cumsum(since + self._what.length)
            last = first + max(1, int(most.searchsorted(EVENTS_AT_ONCE, "right")))
            yield self._part(batch.user_id[first:last], batch.request_time_ms[first:last], user[first:last], until[first:last])
            first = last

    def _part(self, user_id: npt.NDArray[np.uint64], time_ms: I64, user: I64, until: I64) -> Sequences:
        R = len(user)
        erases = np.append(self._erases, False)[user]
        single, many = np.flatnonzero(erases), np.flatnonzero(~erases & (user >= 0))
        of_user, index = np.unique(user[many], return_inverse=True)
        held = [self._state[each][0] if each in self._state else _NONE for each in of_user.tolist()]
        held_starts = starts_of([len(events) for events in held])
        kept = np.concatenate([*held, _NONE])
        old, old_counts = ragged(held_starts, index), np.diff(held_starts)[index]
        at = self._at[of_user][index]
        new_counts = until[many] - at
        group = np.concatenate((np.repeat(np.arange(len(many)), old_counts), np.repeat(np.arange(len(many)), new_counts)))
        events = np.concatenate((taken(kept, old), taken(self._events, spans(at, new_counts))))
        real = np.flatnonzero(events["event_time_ms"] > 0)
        found, of = law_of_groups(self._what, taken(events, real), group[real], len(many))
        starts = starts_of(np.bincount(of, minlength=len(many)))
        erased_ms = erased_before_ms(self._erased, user_id)
        for each, request in zip(of_user.tolist(), _last_of(index, len(of_user)).tolist(), strict=True):
            self._state[each] = found[starts[request] : starts[request + 1]].copy(), int(erased_ms[many[request]])
            self._at[each] = until[many[request]]
        if not len(single) and len(many) == R:
            return Sequences(found, starts, erased_ms)
        parts: list[Events] = [_NONE] * R
        for request, i in enumerate(many.tolist()):
            parts[i] = found[starts[request] : starts[request + 1]]
        for i in single.tolist():
            parts[i], erased_ms[i] = self.before(int(user_id[i]), int(time_ms[i]))
        return Sequences(np.concatenate(parts), starts_of([len(events) for events in parts]), erased_ms)

    def _checked(self, user: I64, until: I64) -> I64:
        """How far each user's records have been taken (-1: 0 as `until`). Raises ValueError: further than asked for."""
        at: I64 = np.append(self._at, 0)[user]
        wrong = np.flatnonzero(until < at)
        if len(wrong):
            raise ValueError(f"user {self._users[user[wrong[0]]]}: asked for a moment after a later moment")
        return at


_NONE = np.zeros(0, EVENT_DTYPE)


def _positions_before(times: I64, bounds: I64, user: I64, time_ms: I64) -> I64:
    """First record of each user (-1: none) whose time is not before `time_ms`: a binary search for all of them at once."""
    low, high = np.where(user >= 0, bounds[user], 0), np.where(user >= 0, bounds[user + 1], 0)
    while True:
        open_ = np.flatnonzero(low < high)
        if not len(open_):
            return low
        middle = (low[open_] + high[open_]) // 2
        before = times[middle] < time_ms[open_]
        low[open_[before]] = middle[before] + 1
        high[open_[~before]] = middle[~before]


def _last_of(group: I64, groups: int) -> I64:
    """Greatest index of each group."""
    last = np.zeros(groups, np.int64)
    last[group] = np.arange(len(group))  # the last assignment wins
    return last


def starts_of(sizes: Any) -> I64:
    """Where parts of these sizes begin, and where the last one ends: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def ragged(starts: I64, chosen: I64) -> I64:
    """Rows starts[i]:starts[i + 1] of each chosen i, one after the other."""
    return spans(starts[chosen], starts[chosen + 1] - starts[chosen])


def spans(first: I64, counts: I64) -> I64:
    """first[i], first[i] + 1, ... counts[i] of them, one i after the other."""
    shift = np.repeat(first - (np.cumsum(counts) - counts), counts)
    return shift + np.arange(len(shift))


def taken(events: Events, where: I64) -> Events:
    """events[where], moved as opaque bytes: a structure is copied field by field."""
    found: Events = events.view(f"V{EVENT_DTYPE.itemsize}").take(where).view(EVENT_DTYPE)
    return found


def rows_of(column: FeatureColumn, rows: I64) -> FeatureColumn:
    """Some rows of a feature column."""
    if column.lengths is None:
        return FeatureColumn(column.values[rows], None)
    places = ragged(starts_of(column.lengths), rows)
    return FeatureColumn(column.values[places], column.lengths[rows], None if column.weights is None else column.weights[places])


def with_rows(batch: LoggedRequests, rows: I64) -> LoggedRequests:
    """Some candidates, ascending, and the requests that have any of them."""
    owner = np.repeat(np.arange(len(batch)), np.diff(batch.starts))[rows]
    requests, sizes = np.unique(owner, return_counts=True)
    return LoggedRequests(
        starts=starts_of(sizes),
        request_id=batch.request_id[requests],
        user_id=batch.user_id[requests],
        request_time_ms=batch.request_time_ms[requests],
        surface=batch.surface[requests],
        entity_kind=batch.entity_kind[rows],
        entity_id=batch.entity_id[rows],
        position=batch.position[rows],
        labels=batch.labels[ragged(batch.label_starts, rows)],
        label_starts=starts_of(np.diff(batch.label_starts)[rows]),
        features={name: rows_of(column, rows) for name, column in batch.features.items()},
        seen=None if batch.seen is None else batch.seen[rows],
        served=None if batch.served is None else batch.served.take(requests),
        drawn=None if batch.drawn is None else batch.drawn[rows],
    )

"""The label join: which action answers which ranking. A pure function of the two logs; the oracle is features/labels_oracle.py.

1. **What counts.** Left out are shadows; rankings whose request time is more than `future_tolerance_ms` after the time they were served;
   and what is from before an erasure: an action of the erased user, and a ranking that names the user (as user_id or identity), if one of
   its times (action: event, append; ranking: request, served) is not after the erasure's append time, or if its position (action: offset;
   ranking: the user's watermark) is below the erasure's offset in the same log epoch.
2. **Duplicates.** Actions of one user with one event id are one. Its first record counts: the least offset of a log epoch; of several
   epochs, the least append time.
3. **Repeated requests.** Of the rankings with one user_id and one request id, in the order of (served time, partition, offset), one is
   superseded if the next has a request time of at most `window_ms` after its own. A superseded list has no labels and is not written.
4. **Who answers what.** An action with a request id may answer every list of that request id that names its user. An action without one
   answers at most one list: of those that name its user, hold its item, satisfy rule 5 and have
   request time <= event time <= request time + `window_ms`, the last by (request time, request id). It answers none if lists of different
   user_ids name its user with request times from event time - `window_ms` to event time: whose it is, is not known.
5. **Cause before effect.** An action answers a list only if it is behind what the ranking had read: its offset is above the user's
   watermark; where the ranking has no watermark of that log epoch, its append time is after the request time.
6. **Window.** The event time is at most request time + `window_ms`, the append time at most request time + `window_ms` + `late_ms`. With a
   request id there is no lower bound of the event time: a clock may be behind, and rule 5 has proved the order.
7. **Complete.** A list is written once request time + `window_ms` + `grace_ms` < until, and final once request time + `window_ms` +
   `late_ms` < until. A final list never changes by what is appended later, erasures excepted, if every ranking is logged
   within `late_ms` of its request time.
8. **Seen.** A candidate was seen if an impression or any other action that answers the list is on it. Lists without any stay. Of the
   candidates not seen, the first `unseen_max` by position stay.
9. **Labels** of a candidate are the distinct ids of the actions that answer the list on it, without impressions. Where one of them
   retracts another, only the one with the later action stays, by (event time, event id, user).

No rule reads a clock or the order of the arrays. Lists of different users do not meet, except in the last sentence of rule 4: `named`
gives what a caller needs who joins users apart.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.domain import Domain
from features.ids import U64
from features.logs import LoggedActions
from features.sequence import NEVER_ERASED

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Keys = Seq[npt.NDArray[Any]]

OUTCOMES = (
    "no_list",
    "ambiguous",
    "not_a_candidate",
    "not_behind",
    "after_window",
    "too_late",
    "superseded",
    "waiting",
    "joined",
    "duplicate",
    "erased",
    "erasure",
)
"""What became of an action, by number. Of an action that may answer several lists, and of the parts of a join by user, the greatest counts.

no_list, ambiguous: rule 4. not_a_candidate: the list does not hold its item. not_behind: rule 5. after_window, too_late: rule 6.
superseded, waiting: the list is not written, or not yet. erasure: the record is one.
"""
_OUTCOME = {name: number for number, name in enumerate(OUTCOMES)}


@dataclass(frozen=True)
class Rules:
    """What the rules leave open. Times are in milliseconds; impressions: action ids; retracts: (id that retracts, id that it retracts)."""

    window_ms: int
    grace_ms: int
    late_ms: int
    impressions: tuple[int, ...] = ()
    retracts: tuple[tuple[int, int], ...] = ()
    unseen_max: int = 50
    future_tolerance_ms: int = 600_000
    without_id: bool = True
    """Whether actions without a request id answer lists."""

    def __post_init__(self) -> None:
        """Raises ValueError naming what is out of range."""
        if self.window_ms < 0:
            raise ValueError(f"window_ms: {self.window_ms} is below 0")
        if not 0 <= self.grace_ms <= self.late_ms:
            raise ValueError(f"grace_ms: {self.grace_ms} is not in 0..late_ms ({self.late_ms})")
        if self.unseen_max < 0:
            raise ValueError(f"unseen_max: {self.unseen_max} is below 0")

    @classmethod
    def of(cls, domain: Domain, *, window_ms: int, grace_ms: int, late_ms: int, unseen_max: int = 50, without_id: bool = True) -> "Rules":
        """Rules with the domain file's impressions, retractions and future tolerance."""
        actions = domain.actions.values()
        return cls(
            window_ms=window_ms,
            grace_ms=grace_ms,
            late_ms=late_ms,
            impressions=tuple(action.id for action in actions if action.kind == "impression"),
            retracts=tuple((action.id, domain.actions[action.retracts].id) for action in actions if action.retracts is not None),
            unseen_max=unseen_max,
            future_tolerance_ms=domain.future_tolerance_ms,
            without_id=without_id,
        )


@dataclass(frozen=True)
class Lists:
    """r rankings of the ranking log, in any order, with n candidates and k identities.

    request_id uint64, request_time_ms, served_time_ms int64, shadow bool, partition int32 and offset int64 (the ranking's own record): [r].
    starts int64 [r + 1]: candidates starts[i]:starts[i + 1] of ranking i: entity_kind uint8, entity_id uint64 and position int32 (place as
    served), [n], each item and each position once a ranking.
    who_starts int64 [r + 1]: identities of ranking i, user_id first: who uint64, log_epoch uint64 and offset_read int64 (the watermark; 0
    and -1 where the sequence's source was NONE), [k]. All times are above 0 and below 2^62.
    """

    request_id: U64
    request_time_ms: I64
    served_time_ms: I64
    shadow: Bools
    partition: npt.NDArray[np.int32]
    offset: I64
    starts: I64
    entity_kind: npt.NDArray[np.uint8]
    entity_id: U64
    position: npt.NDArray[np.int32]
    who_starts: I64
    who: U64
    log_epoch: U64
    offset_read: I64

    def __len__(self) -> int:
        return len(self.request_id)

    @property
    def user_id(self) -> U64:
        """uint64 [r]."""
        return self.who[self.who_starts[:-1]]


class Named(NamedTuple):
    """Who names whom and when, one entry for each identity of each ranking that counts: who, user_id uint64, request_time_ms int64.

    Entries of several parts may be concatenated, and those of a `who` with one `user_id` alone left out.
    """

    who: U64
    user_id: U64
    request_time_ms: I64


@dataclass(frozen=True)
class Joined:
    """Lists that are written, w of them with c candidates, in the order of (request time, request id, user_id).

    lists int64 [w]: index in `Lists`; final bool [w]. starts int64 [w + 1]; rows int64 [c]: index of the candidate in `Lists`, by position;
    seen bool [c]. label_starts int64 [c + 1], labels uint8: action ids of each candidate, ascending.
    outcome uint8 [actions]: what became of each action, by number of OUTCOMES.
    counts: rankings and what became of them (shadow, future, erased, superseded, waiting, written, final), written lists not_seen and
    labelled, candidates of written lists, seen and cut (rule 8); answers by_id and without_id, of these late (appended after
    request time + window + grace) and clock_behind (event time more than the future tolerance before the request); labels, retracted
    (labels that rule 9 took). Counts of parts of a join by user add up.
    """

    lists: I64
    final: Bools
    starts: I64
    rows: I64
    seen: Bools
    label_starts: I64
    labels: npt.NDArray[np.uint8]
    outcome: npt.NDArray[np.uint8]
    counts: dict[str, int] = field(default_factory=dict)

    def outcomes(self) -> dict[str, int]:
        """How many actions had each outcome."""
        return dict(zip(OUTCOMES, np.bincount(self.outcome, minlength=len(OUTCOMES)).tolist(), strict=True))


def named(lists: Lists, actions: LoggedActions, rules: Rules) -> Named:
    """Entries of the rankings that count (rule 1). A caller who joins users apart gives `join` those of all users."""
    state = _Rankings.of(lists, actions, rules)
    list_of = _owners(lists.who_starts)
    kept = np.flatnonzero(state.standing[list_of])
    return Named(lists.who[kept], lists.user_id[list_of[kept]], lists.request_time_ms[list_of[kept]])


def join(lists: Lists, actions: LoggedActions, rules: Rules, until_ms: int, others: Named | None = None) -> Joined:
    """Which actions answer which rankings, as the module says.

    `actions`: records of every user that `lists` names, in any order; no two have the same log epoch, partition and offset. Erasures are
    among them (also those of the ledger). `until_ms`: every record appended before it is there. `others`: `named` of all rankings, where
    `lists` holds only some users'; these lists' own where None.
    """
    rankings = _Rankings.of(lists, actions, rules)
    outcome = _of_records(actions)
    live = np.flatnonzero(outcome == 0)
    what = _Acting.of(actions, live)
    ambiguous, pairs = _pairs(lists, what, rankings, rules, named(lists, actions, rules) if others is None else others)
    complete = lists.request_time_ms + (rules.window_ms + rules.grace_ms) < until_ms
    verdict = _verdicts(lists, what, pairs, rankings, rules, complete)
    found = np.where(ambiguous, _OUTCOME["ambiguous"], 0).astype(np.uint8)
    np.maximum.at(found, pairs.action, verdict)
    outcome[live] = found
    answers = pairs.take(np.flatnonzero(verdict == _OUTCOME["joined"]))

    written = np.flatnonzero(rankings.standing & ~rankings.superseded & complete)
    written = written[np.argsort(rankings.place[written])]
    final = lists.request_time_ms[written] + (rules.window_ms + rules.late_ms) < until_ms
    rows, starts, seen = _candidates(lists, written, answers, rules)
    on_row, label, retracted = _labels(what, answers, rules)
    at = np.full(len(lists.entity_id), -1, np.int64)
    at[rows] = np.arange(len(rows))
    order = np.lexsort((label, at[on_row]))
    labels_of = np.bincount(at[on_row], minlength=len(rows))
    counts = _count_rankings(rankings, complete) | _count_answers(lists, what, answers, rules)
    counts |= {"written": len(written), "final": int(final.sum()), "labels": len(label), "retracted": retracted}
    owner = _owners(starts)
    counts["not_seen"] = len(written) - len(np.unique(owner[seen]))
    counts["labelled"] = len(np.unique(owner[at[on_row]]))
    candidates = int((lists.starts[written + 1] - lists.starts[written]).sum())
    counts |= {"candidates": candidates, "seen": int(seen.sum()), "cut": candidates - len(rows)}
    return Joined(written, final, starts, rows, seen, _starts(labels_of), label[order], outcome, counts)


# Keys


def _numbered(*parts: Keys) -> list[I64]:
    """Rows of several tables with the same key columns, numbered together: equal keys have one number, and numbers the keys' order."""
    keys = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    order = np.lexsort(tuple(reversed(keys)))
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(_begins(keys, order)) - 1
    return np.split(number, np.cumsum([len(part[0]) for part in parts])[:-1])


def _greatest(keys: Keys, values: I64, wanted: Keys) -> I64:
    """For each wanted key the greatest value that has it; NEVER_ERASED where none has."""
    number, of_wanted = _numbered(keys, wanted)
    best = np.full(len(number) + len(of_wanted), NEVER_ERASED, np.int64)
    np.maximum.at(best, number, values)
    return best[of_wanted]


def _first(keys: Keys, order: Keys) -> I64:
    """Of the rows with equal keys the one that is first in an order: indices."""
    by_key = np.lexsort((*reversed(order), *reversed(keys)))
    return by_key[_begins(keys, by_key)]


def _begins(keys: Keys, order: I64) -> Bools:
    """Which rows, in an order that has equal keys beside each other, are the first ones of their key."""
    begins = np.ones(len(order), bool)
    if len(order):
        begins[1:] = np.logical_or.reduce([key[order][1:] != key[order][:-1] for key in keys])
    return begins


def _starts(sizes: npt.NDArray[Any]) -> I64:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _owners(starts: I64) -> I64:
    """The part that each member of consecutive parts belongs to."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _ranges(low: I64, high: I64) -> tuple[I64, I64]:
    """(i, place) for each place of low[i]:high[i]."""
    counts = high - low
    of = np.repeat(np.arange(len(low)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts - low, counts)


# Rules 1 to 3


def _past(actions: LoggedActions, who: U64, log_epoch: U64, offset: I64, first_ms: I64) -> Bools:
    """Which of these are from before an erasure of `who`."""
    erasures = np.flatnonzero(actions.erase)
    users, epochs = actions.users[erasures], actions.log_epoch[erasures]
    by_time = first_ms <= _greatest([users], actions.append_time_ms[erasures], [who])
    by_place = offset < _greatest([users, epochs], actions.offset[erasures], [who, log_epoch])
    past: Bools = by_time | (by_place & (log_epoch != 0))
    return past


def _of_records(actions: LoggedActions) -> npt.NDArray[np.uint8]:
    """The outcome of erasures, erased actions and duplicates, 0 for all others."""
    outcome = np.zeros(len(actions), np.uint8)
    first_ms = np.minimum(actions.append_time_ms, actions.events["event_time_ms"])
    outcome[_past(actions, actions.users, actions.log_epoch, actions.offset, first_ms)] = _OUTCOME["erased"]
    outcome[actions.erase] = _OUTCOME["erasure"]
    live = np.flatnonzero(outcome == 0)
    users, ids, epochs = actions.users[live], actions.events["event_id"][live], actions.log_epoch[live]
    first = _first([users, ids, epochs], [actions.offset[live], actions.append_time_ms[live]])
    first = first[_first([users[first], ids[first]], [actions.append_time_ms[live][first], epochs[first]])]
    outcome[live] = _OUTCOME["duplicate"]
    outcome[live[first]] = 0
    return outcome


@dataclass(frozen=True)
class _Rankings:
    """What rules 1 and 3 say of each ranking: bool [r]. place int64 [r]: order by request time, request id, user_id and the record."""

    shadow: Bools
    future: Bools
    erased: Bools
    superseded: Bools
    place: I64

    @property
    def standing(self) -> Bools:
        """Which rankings count."""
        standing: Bools = ~(self.shadow | self.future | self.erased)
        return standing

    @classmethod
    def of(cls, lists: Lists, actions: LoggedActions, rules: Rules) -> "_Rankings":
        list_of = _owners(lists.who_starts)
        first_ms = np.minimum(lists.request_time_ms, lists.served_time_ms)
        erased = np.zeros(len(lists), bool)
        erased[list_of[_past(actions, lists.who, lists.log_epoch, lists.offset_read, first_ms[list_of])]] = True
        future = ~lists.shadow & (lists.request_time_ms - rules.future_tolerance_ms > lists.served_time_ms)
        record = (lists.served_time_ms, lists.partition, lists.offset)
        (place,) = _numbered([lists.request_time_ms, lists.request_id, lists.user_id, *record])
        found = cls(lists.shadow, future, erased & ~lists.shadow & ~future, np.zeros(len(lists), bool), place)
        standing = np.flatnonzero(found.standing)
        users, ids = lists.user_id[standing], lists.request_id[standing]
        order = np.lexsort((*(column[standing] for column in reversed(record)), ids, users))
        one, following = order[:-1], order[1:]
        again = (users[one] == users[following]) & (ids[one] == ids[following])
        again &= lists.request_time_ms[standing[following]] <= lists.request_time_ms[standing[one]] + rules.window_ms
        superseded = np.zeros(len(lists), bool)
        superseded[standing[one[again]]] = True
        return replace(found, superseded=superseded)


# Rules 4 to 6


@dataclass(frozen=True)
class _Acting:
    """Actions that are neither erased nor duplicates, [m]."""

    users: U64
    events: npt.NDArray[np.void]
    append_time_ms: I64
    log_epoch: U64
    offset: I64

    @classmethod
    def of(cls, actions: LoggedActions, live: I64) -> "_Acting":
        place = actions.append_time_ms[live], actions.log_epoch[live], actions.offset[live]
        return cls(actions.users[live], actions.events[live], *place)


@dataclass(frozen=True)
class _Pairs:
    """Actions and lists that they may answer, int64 [p]: indices of action, list, identity that acted, and candidate (-1: none)."""

    action: I64
    list_of: I64
    identity: I64
    row: I64

    def take(self, which: I64) -> "_Pairs":
        return _Pairs(self.action[which], self.list_of[which], self.identity[which], self.row[which])

    def followed_by(self, more: "_Pairs") -> "_Pairs":
        return _Pairs(*(np.concatenate(two) for two in zip(vars(self).values(), vars(more).values(), strict=True)))


def _pairs(lists: Lists, what: _Acting, rankings: _Rankings, rules: Rules, others: Named) -> tuple[Bools, _Pairs]:
    """Which actions are ambiguous, bool [m], and all pairs of rule 4."""
    list_of = _owners(lists.who_starts)
    entries = np.flatnonzero(rankings.standing[list_of])
    request_id = what.events["request_id"]
    with_id, without = np.flatnonzero(request_id != 0), np.flatnonzero((request_id == 0) & rules.without_id)

    key, wanted = _numbered([lists.who[entries], lists.request_id[list_of[entries]]], [what.users[with_id], request_id[with_id]])
    order = np.argsort(key, kind="stable")
    key = key[order]
    of, place = _ranges(key.searchsorted(wanted, "left"), key.searchsorted(wanted, "right"))
    identity = entries[order[place]]
    by_id = with_id[of], list_of[identity], identity

    ambiguous = np.zeros(len(what.users), bool)
    ambiguous[without[_is_ambiguous(what, without, rules, others)]] = True
    sure = without[~ambiguous[without]]
    order, low, high = _in_window(lists.who[entries], lists.request_time_ms[list_of[entries]], what, sure, rules)
    of, place = _ranges(low, high)
    identity = entries[order[place]]
    pairs = _with_rows(lists, what, sure[of], list_of[identity], identity)
    pairs = pairs.take(np.flatnonzero((pairs.row >= 0) & _is_behind(lists, what, pairs)))
    pairs = pairs.take(_first([pairs.action], [-rankings.place[pairs.list_of]]))
    return ambiguous, _with_rows(lists, what, *by_id).followed_by(pairs)


def _in_window(who: U64, time_ms: I64, what: _Acting, acting: I64, rules: Rules) -> tuple[I64, I64, I64]:
    """(order, low, high): order[low[i]:high[i]] are the entries of acting i's user with a time in the window before its event."""
    users, event_ms = what.users[acting], what.events["event_time_ms"][acting]
    key, oldest, newest = _numbered([who, time_ms], [users, event_ms - rules.window_ms], [users, event_ms])
    order = np.argsort(key, kind="stable")
    return order, key[order].searchsorted(oldest, "left"), key[order].searchsorted(newest, "right")


def _is_ambiguous(what: _Acting, acting: I64, rules: Rules, others: Named) -> Bools:
    """For which of `acting` different user_ids name the user within the window."""
    by_user_id = np.argsort(others.user_id, kind="stable")
    who, user_id = others.who[by_user_id], others.user_id[by_user_id]
    order, low, high = _in_window(who, others.request_time_ms[by_user_id], what, acting, rules)
    if not len(order):
        return np.zeros(len(acting), bool)
    who, user_id = who[order], user_id[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (who[1:] != who[:-1]) | (user_id[1:] != user_id[:-1])
    run = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    # The newest entry's user_id goes back to the run's begin: another one stands before it in the window, or none does.
    ambiguous: Bools = (high > low) & (run[np.maximum(high, 1) - 1] > low)
    return ambiguous


def _with_rows(lists: Lists, what: _Acting, action: I64, list_of: I64, identity: I64) -> _Pairs:
    """The pairs with the candidate that the action is on."""
    rows = np.arange(len(lists.entity_id))
    events = what.events[action]
    has: Keys = [_owners(lists.starts), lists.entity_kind, lists.entity_id]
    key, wanted = _numbered(has, [list_of, events["entity_kind"], events["entity_id"]])
    found = np.full(len(rows) + len(action), -1, np.int64)
    found[key] = rows
    return _Pairs(action, list_of, identity, found[wanted])


def _is_behind(lists: Lists, what: _Acting, pairs: _Pairs) -> Bools:
    """Rule 5."""
    epoch, action = lists.log_epoch[pairs.identity], pairs.action
    is_same_log = (epoch == what.log_epoch[action]) & (epoch != 0)
    by_place = what.offset[action] > lists.offset_read[pairs.identity]
    by_time = what.append_time_ms[action] > lists.request_time_ms[pairs.list_of]
    behind: Bools = np.where(is_same_log, by_place, by_time)
    return behind


def _verdicts(lists: Lists, what: _Acting, pairs: _Pairs, rankings: _Rankings, rules: Rules, complete: Bools) -> npt.NDArray[np.uint8]:
    """The outcome of each pair."""
    ends_ms = lists.request_time_ms[pairs.list_of] + rules.window_ms
    reasons = {
        "not_a_candidate": pairs.row < 0,
        "not_behind": ~_is_behind(lists, what, pairs),
        "after_window": what.events["event_time_ms"][pairs.action] > ends_ms,
        "too_late": what.append_time_ms[pairs.action] > ends_ms + rules.late_ms,
        "superseded": rankings.superseded[pairs.list_of],
        "waiting": ~complete[pairs.list_of],
    }
    verdict = np.select(list(reasons.values()), [_OUTCOME[name] for name in reasons], _OUTCOME["joined"])
    return verdict.astype(np.uint8)


# Rules 8 and 9


def _candidates(lists: Lists, written: I64, answers: _Pairs, rules: Rules) -> tuple[I64, I64, Bools]:
    """(rows, starts, seen) of the candidates that stay."""
    of, rows = _ranges(lists.starts[written], lists.starts[written + 1])
    order = np.lexsort((lists.entity_id[rows], lists.entity_kind[rows], lists.position[rows], of))
    of, rows = of[order], rows[order]
    is_seen = np.zeros(len(lists.entity_id), bool)
    is_seen[answers.row] = True
    seen = is_seen[rows]
    unseen_before = np.cumsum(~seen) - ~seen  # of this list and those before it
    of_list = np.bincount(of[~seen], minlength=len(written))
    keep = seen | (unseen_before - (np.cumsum(of_list) - of_list)[of] < rules.unseen_max)
    return rows[keep], _starts(np.bincount(of[keep], minlength=len(written))), seen[keep]


def _labels(what: _Acting, answers: _Pairs, rules: Rules) -> tuple[I64, npt.NDArray[np.uint8], int]:
    """(row of `Lists`, action id) of each label, and how many were retracted."""
    events, users = what.events[answers.action], what.users[answers.action]
    (moment,) = _numbered([events["event_time_ms"], events["event_id"], users])
    kept = np.flatnonzero(~np.isin(events["action"], rules.impressions))
    row, action, moment = answers.row[kept], events["action"][kept], moment[kept]
    last = _first([row, action], [-moment])
    row, action, moment = row[last], action[last], moment[last]
    gone = np.zeros(len(row), bool)
    for by, of in rules.retracts:
        retracting, retracted = np.flatnonzero(action == by), np.flatnonzero(action == of)
        _, left, right = np.intersect1d(row[retracting], row[retracted], assume_unique=True, return_indices=True)
        retracting, retracted = retracting[left], retracted[right]
        later = moment[retracting] > moment[retracted]
        gone[np.where(later, retracted, retracting)] = True
    return row[~gone], action[~gone], int(gone.sum())


def _count_rankings(rankings: _Rankings, complete: Bools) -> dict[str, int]:
    found = {"shadow": rankings.shadow, "future": rankings.future, "erased": rankings.erased, "superseded": rankings.superseded}
    found["waiting"] = rankings.standing & ~rankings.superseded & ~complete
    return {"rankings": len(complete), **{name: int(which.sum()) for name, which in found.items()}}


def _count_answers(lists: Lists, what: _Acting, answers: _Pairs, rules: Rules) -> dict[str, int]:
    request_ms, events = lists.request_time_ms[answers.list_of], what.events[answers.action]
    found = {
        "by_id": events["request_id"] != 0,
        "without_id": events["request_id"] == 0,
        "late": what.append_time_ms[answers.action] > request_ms + (rules.window_ms + rules.grace_ms),
        "clock_behind": events["event_time_ms"] < request_ms - rules.future_tolerance_ms,
    }
    return {name: int(which.sum()) for name, which in found.items()}

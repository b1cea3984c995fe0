"""The label join as plain as its rules can be said, record by record: what tests compare `features.labels` with. Never on a hot path."""

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from features.labels import OUTCOMES, Rules

Item = tuple[int, int]
"""Entity kind number and id."""


@dataclass(frozen=True)
class NaiveRanking:
    """A ranking record. who: (identity, log epoch and offset of its watermark; 0 and -1 for none), user_id first; items as served."""

    request_id: int
    request_time_ms: int
    served_time_ms: int
    partition: int
    offset: int
    shadow: bool
    who: tuple[tuple[int, int, int], ...]
    items: tuple[Item, ...]

    @property
    def user_id(self) -> int:
        """Whom it was made for."""
        return self.who[0][0]


@dataclass(frozen=True)
class NaiveRecord:
    """A record of the actions topic: an action, or an erasure (of which only the user and the place in the log mean something)."""

    user: int
    append_time_ms: int
    log_epoch: int
    partition: int
    offset: int
    erase: bool = False
    action: int = 0
    item: Item = (0, 0)
    event_time_ms: int = 0
    event_id: int = 0
    request_id: int = 0


@dataclass
class NaiveList:
    """A written list: the candidates that stay, in the order served, whether each was seen, and its labels."""

    ranking: int
    final: bool
    rows: list[tuple[Item, bool, tuple[int, ...]]] = field(default_factory=list)


def naive_join(
    rankings: Seq[NaiveRanking], records: Seq[NaiveRecord], rules: Rules, until_ms: int
) -> tuple[list[NaiveList], list[str], Counter[str]]:
    """(written lists in order, outcome of each record, `Joined.counts`)."""
    counts: Counter[str] = Counter(rankings=len(rankings))
    standing = []
    for i, ranking in enumerate(rankings):
        reason = _left_out(ranking, records, rules)
        counts[reason] += 1
        if reason == "standing":
            standing.append(i)
    del counts["standing"]
    superseded = {i for i in standing if _is_superseded(i, standing, rankings, rules)}
    counts["superseded"] = len(superseded)

    outcomes, answers = [], list[tuple[int, int]]()
    for n, record in enumerate(records):
        outcome = _of_record(n, records)
        if not outcome:
            targets, outcome = _targets(record, standing, rankings, rules)
            for i in targets:
                found = _verdict(record, rankings[i], rules, i in superseded, until_ms)
                if found == "joined":
                    answers.append((i, n))
                outcome = max(outcome, found, key=OUTCOMES.index)
        outcomes.append(outcome)

    lists = []
    for i in sorted(standing, key=lambda i: (rankings[i].request_time_ms, rankings[i].request_id, rankings[i].user_id)):
        if i not in superseded:
            if rankings[i].request_time_ms + rules.window_ms + rules.grace_ms < until_ms:
                lists.append(_list(i, rankings[i], [records[n] for j, n in answers if j == i], rules, until_ms, counts))
            else:
                counts["waiting"] += 1
    return lists, outcomes, counts


def _left_out(ranking: NaiveRanking, records: Seq[NaiveRecord], rules: Rules) -> str:
    if ranking.shadow:
        return "shadow"
    if ranking.request_time_ms > ranking.served_time_ms + rules.future_tolerance_ms:
        return "future"
    for who, epoch, read in ranking.who:
        if _is_past(records, who, [ranking.request_time_ms, ranking.served_time_ms], epoch, read):
            return "erased"
    return "standing"


def _is_past(records: Seq[NaiveRecord], user: int, times_ms: list[int], epoch: int, offset: int) -> bool:
    for erasure in records:
        if erasure.erase and erasure.user == user:
            if any(time_ms <= erasure.append_time_ms for time_ms in times_ms):
                return True
            if epoch != 0 and epoch == erasure.log_epoch and offset < erasure.offset:
                return True
    return False


def _is_superseded(i: int, standing: list[int], rankings: Seq[NaiveRanking], rules: Rules) -> bool:
    def served(ranking: NaiveRanking) -> tuple[int, int, int]:
        return ranking.served_time_ms, ranking.partition, ranking.offset

    one = rankings[i]
    same = [rankings[j] for j in standing if (rankings[j].user_id, rankings[j].request_id) == (one.user_id, one.request_id)]
    later = [other for other in same if served(other) > served(one)]
    return bool(later) and min(later, key=served).request_time_ms <= one.request_time_ms + rules.window_ms


def _of_record(n: int, records: Seq[NaiveRecord]) -> str:
    """Outcome of an erasure, an erased action and a duplicate; "" for another action."""

    def is_erased(record: NaiveRecord) -> bool:
        return _is_past(records, record.user, [record.append_time_ms, record.event_time_ms], record.log_epoch, record.offset)

    record = records[n]
    if record.erase:
        return "erasure"
    if is_erased(record):
        return "erased"
    firsts: dict[int, NaiveRecord] = {}
    for other in records:
        is_same = not other.erase and (other.user, other.event_id) == (record.user, record.event_id)
        if is_same and not is_erased(other):
            first = firsts.setdefault(other.log_epoch, other)
            if other.offset < first.offset:
                firsts[other.log_epoch] = other
    counting = min(firsts.values(), key=lambda first: (first.append_time_ms, first.log_epoch))
    return "" if counting is record else "duplicate"


def _targets(record: NaiveRecord, standing: list[int], rankings: Seq[NaiveRanking], rules: Rules) -> tuple[list[int], str]:
    """(lists that the action may answer, its outcome if there are none)."""
    naming = [i for i in standing if record.user in [who for who, _, _ in rankings[i].who]]
    if record.request_id:
        return [i for i in naming if rankings[i].request_id == record.request_id], "no_list"
    if not rules.without_id:
        return [], "no_list"
    near = [i for i in naming if rankings[i].request_time_ms <= record.event_time_ms <= rankings[i].request_time_ms + rules.window_ms]
    if len({rankings[i].user_id for i in near}) > 1:
        return [], "ambiguous"
    able = [rankings[i] for i in near if record.item in rankings[i].items and _is_behind(record, rankings[i])]
    if not able:
        return [], "no_list"
    last = max(able, key=lambda one: (one.request_time_ms, one.request_id, one.served_time_ms, one.partition, one.offset))
    return [i for i in near if rankings[i] is last], "no_list"


def _is_behind(record: NaiveRecord, ranking: NaiveRanking) -> bool:
    for who, epoch, read in ranking.who:
        if who == record.user and epoch != 0 and epoch == record.log_epoch:
            return record.offset > read
    return record.append_time_ms > ranking.request_time_ms


def _verdict(record: NaiveRecord, ranking: NaiveRanking, rules: Rules, superseded: bool, until_ms: int) -> str:
    end_ms = ranking.request_time_ms + rules.window_ms
    if record.item not in ranking.items:
        return "not_a_candidate"
    if not _is_behind(record, ranking):
        return "not_behind"
    if record.event_time_ms > end_ms:
        return "after_window"
    if record.append_time_ms > end_ms + rules.late_ms:
        return "too_late"
    if superseded:
        return "superseded"
    return "joined" if end_ms + rules.grace_ms < until_ms else "waiting"


def _list(i: int, ranking: NaiveRanking, answers: list[NaiveRecord], rules: Rules, until_ms: int, counts: Counter[str]) -> NaiveList:
    made = NaiveList(i, ranking.request_time_ms + rules.window_ms + rules.late_ms < until_ms)
    unseen = 0
    for item in ranking.items:
        on_item = [record for record in answers if record.item == item]
        acted = {record.action for record in on_item} - set(rules.impressions)
        labels = acted - _retracted(on_item, rules)
        counts["retracted"] += len(acted) - len(labels)
        unseen += not on_item
        if on_item or unseen <= rules.unseen_max:
            made.rows.append((item, bool(on_item), tuple(sorted(labels))))
    counts.update(written=1, final=made.final, candidates=len(ranking.items), cut=len(ranking.items) - len(made.rows))
    counts["seen"] += sum(seen for _, seen, _ in made.rows)
    counts["labels"] += sum(len(labels) for _, _, labels in made.rows)
    counts["not_seen"] += not any(seen for _, seen, _ in made.rows)
    counts["labelled"] += any(labels for _, _, labels in made.rows)
    for record in answers:
        counts["by_id" if record.request_id else "without_id"] += 1
        counts["late"] += record.append_time_ms > ranking.request_time_ms + rules.window_ms + rules.grace_ms
        counts["clock_behind"] += record.event_time_ms < ranking.request_time_ms - rules.future_tolerance_ms
    return made


def _retracted(on_item: list[NaiveRecord], rules: Rules) -> set[int]:
    last: dict[int, tuple[int, int, int]] = {}
    for record in on_item:
        if record.action in rules.impressions:
            continue
        moment = (record.event_time_ms, record.event_id, record.user)
        last[record.action] = max(moment, last.get(record.action, moment))
    gone = set()
    for by, of in rules.retracts:
        if by in last and of in last:
            gone.add(of if last[by] > last[of] else by)
    return gone

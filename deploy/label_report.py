"""What a labelling pass found, for people and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from features.labels import OUTCOMES
from features.parity import ACCEPTED, EXCLUSIONS

_OUTCOMES = {
    "joined": "answer a list",
    "no_list": "have no list: not of a ranking that is logged, or without a request id and not after one",
    "ambiguous": "without a request id, of a user whom lists of several persons name",
    "not_a_candidate": "are on an item that the list did not hold",
    "not_behind": "had been read by the ranking already",
    "after_window": "happened after the window",
    "too_late": "came after the late time",
    "superseded": "answer a list that was asked for again under its id",
    "waiting": "answer a list that waits for its window",
    "duplicate": "were sent before",
    "erased": "are of a past that was erased",
    "erasure": "are erasures",
}
assert set(_OUTCOMES) == set(OUTCOMES)


_ADDED: tuple[str, ...] = ("lists", "new", "added", "stays", "torn", "only_seen")
_ADDED += ("rows_known", "rows_inline", "rows_rebuilt", "differs", "unproved", "undecodable")

KEEP_LONGER = "set retention.ms of both topics above --window, --late and a day together"


@dataclass
class LabelReport:
    """Counts of one pass: of the lists of open days, and of those shortly before that may meet them in the rules.

    lists: written, of which new ones were in no pass before; added: labels that came to lists of earlier passes. rows_known, rows_inline,
    rows_rebuilt: how the inputs of lists were proved; differs: lists whose rebuilt inputs are others than those that were served; unproved:
    these and those that could not be rebuilt (excluded, by reason); none of them is written. backdated: rankings of closed days.
    stays: lists that stay as an earlier pass wrote them, since retention has taken what they came from; stays_until_ms: the last one's
    request time. torn: new lists of which it has taken actions that may answer them. join: `Joined.counts`. outcomes: what became of the
    actions. only_seen: candidates with an impression and no label.
    """

    number: int = 0
    until_ms: int = 0
    closed_before_ms: int = 0
    buckets: int = 0
    continued: bool = False
    lists: int = 0
    new: int = 0
    added: int = 0
    rankers: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    only_seen: int = 0
    join: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    rows_known: int = 0
    rows_inline: int = 0
    rows_rebuilt: int = 0
    differs: int = 0
    unproved: int = 0
    excluded: dict[str, int] = field(default_factory=dict)
    undecodable: int = 0
    stays: int = 0
    stays_until_ms: int = 0
    torn: int = 0
    shadows: int = 0
    backdated: int = 0
    erased_rows: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    days_written: int = 0
    days_dropped: int = 0
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: int = 0

    def add(self, counts: dict[str, Any], action_names: dict[int, str]) -> None:
        """Adds a bucket's counts, as `deploy.label_bucket` leaves them."""
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + counts[name])
        self.stays_until_ms = max(self.stays_until_ms, counts["stays_until_ms"])
        outcomes = dict(zip(OUTCOMES, counts["outcomes"], strict=True))
        labels = {action_names[int(number)]: count for number, count in counts["labels"].items()}
        for mine, theirs in (
            (self.rankers, counts["rankers"]),
            (self.labels, labels),
            (self.join, counts["join"]),
            (self.outcomes, outcomes),
            (self.excluded, counts["excluded"]),
        ):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count

    @property
    def faults(self) -> list[str]:
        """What must be looked at; none: the pass is good."""
        found = list(self.warnings)
        if self.torn:
            found.append(f"{self.torn} new lists: retention has taken actions that may answer them; {KEEP_LONGER}")
        if self.differs:
            found.append(f"{self.differs} lists: their rebuilt inputs are not those that were served; see `freshrank replay`")
        for reason, count in sorted(self.excluded.items()):
            if reason not in ACCEPTED:
                found.append(f"{count} lists could not be rebuilt: {reason}: {EXCLUSIONS[reason]}")
        if self.labels and not self.only_seen:
            found.append("no impression answers any list: what was seen is not known; log impressions, or label with --all-seen")
        return found

    @property
    def ok(self) -> bool:
        """What the exit code says."""
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        """Everything but what another run of the same pass has otherwise."""
        return {name: value for name, value in asdict(self).items() if name not in ("seconds", "memory_mb", "continued")}

    def to_text(self) -> str:
        """For people."""
        join = self.join.get
        excluded = ", ".join(f"{count} {reason}" for reason, count in sorted(self.excluded.items()))
        lines = [
            f"pass {self.number}{' (continued)' if self.continued else ''}: {self.lists} lists written, {self.new} of them new, "
            f"{self.added} labels added to lists of earlier passes, {self.stays} lists stay as they were",
            "",
            f"rankings     {join('written', 0)} complete, of these {join('final', 0)} final; {join('waiting', 0)} wait for their window",
            f"             left out: {join('superseded', 0)} asked for again, {join('erased', 0)} erased, {self.shadows} shadows, "
            f"{join('future', 0)} from the future, {self.undecodable} not readable",
            f"lists        {join('labelled', 0)} with a label, {join('not_seen', 0)} not seen at all, the rest seen and left",
            f"candidates   {join('candidates', 0)} served, {join('seen', 0)} seen, {join('cut', 0)} of those not seen left out",
            "labels       " + (", ".join(f"{name} {count}" for name, count in sorted(self.labels.items())) or "none"),
            f"             {join('by_id', 0)} answers by request id, {join('without_id', 0)} without; {join('late', 0)} late, "
            f"{join('clock_behind', 0)} by a clock behind, {join('retracted', 0)} taken back",
            "rankers      " + (", ".join(f"{name} {count}" for name, count in sorted(self.rankers.items())) or "none"),
            f"inputs       {self.rows_rebuilt} rebuilt and equal, {self.rows_inline} inline, {self.rows_known} of earlier passes; "
            f"{self.unproved} not proved, {self.differs} differ" + (f"; excluded: {excluded}" if excluded else ""),
            *(f"actions      {count} {_OUTCOMES[name]}" for name, count in self.outcomes.items() if count),
            f"files        {self.days_written} days in {self.buckets} buckets, {self.days_dropped} dropped, {self.erased_rows} rows erased",
            f"cost         {self.memory_mb} MB; " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()),
            *(f"LOOK         {fault}" for fault in self.faults),
        ]
        return "\n".join(lines)

"""Parity: what serving logged against what the log of actions gives, byte for byte.

Pure: records and tensors come in, a report goes out. `PartitionLog` rebuilds a user's row at any watermark with the worker's own law;
`Tally` compares what was served with what was rebuilt and keeps two numbers apart: logic parity (exact, to the logged watermark) and
freshness skew (what the served sequence did not have yet).
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from features.actions import ACTION, ERASE, EVENT_DTYPE, REJECTED, Batch
from features.pack import Packed, Packer, RankInputs
from features.person import rows_digest
from features.ports import SequenceCorruptError
from features.sequence import Definition, Events, apply_batch, as_read, clock_after, decode_row, law
from protos.v1.ranking_pb2 import RankingRecord, Tier

EXCLUSIONS = {
    "erased_since": "the user was erased after the ranking: their past is gone by promise",
    "not_packed": "a tier without the model answered and logged no digest: there is nothing to compare",
    "undecodable": "not a freshrank.v1.RankingRecord with a watermark position for each identity",
    "other_log": "the watermark's epoch is not that of this log: replay against the log that the ranking was served from",
    "other_partition": "a watermark's partition is not the one that holds that identity's records",
    "beyond_log_end": "the watermark is behind the last record of this log: records were lost, or the archive is older than the ranking",
    "log_cut": "the log does not begin at offset 0 (retention): the state at the watermark cannot be rebuilt; replay from an archive",
    "digest_missing": "the model answered, but no digest was logged",
    "definition_differs": "the state was kept by another [sequence] definition than the release's",
    "release_refused": "the logged release cannot be opened",
    "tables_refused": "a logged generation of tables cannot be opened",
    "request_refused": "the logged request is not valid for the logged release",
}
"""Why a ranking was not replayed. Each is counted; only those of ACCEPTED leave the report a pass."""

ACCEPTED = frozenset({"erased_since", "not_packed"})
_EXAMPLES_MAX = 20
_Times = npt.NDArray[np.int64]


class PartitionLog:
    """The records of some users in one partition, from offset 0 on, as the worker decodes them.

    `add` takes the partition's decoded records in offset order; the partition's clock runs over all users' records.
    """

    def __init__(
        self,
        users: Collection[int],
        *,
        base_clock_ms: int = 0,
        base_row: Callable[[Definition, int], bytes | None] = lambda *_: None,
    ) -> None:
        """base_clock_ms, base_row: of the base before offset 0 (`features.base`): its clock, and a user's row in it."""
        self._base_row = base_row
        self._wanted = np.array(sorted(users), np.uint64)
        self._kept: list[tuple[Batch, _Times]] = []
        self._slices: dict[int, slice] | None = None
        self._clock_ms = base_clock_ms
        self._clock_steps: list[tuple[_Times, _Times]] = [(np.array([-1]), np.array([base_clock_ms]))]

    def add(self, batch: Batch) -> None:
        """Keeps the wanted users' records of a batch."""
        counted = np.where(batch.verdict == REJECTED, 0, batch.append_time_ms)
        clock_ms = np.maximum(np.maximum.accumulate(counted), self._clock_ms)
        steps = np.flatnonzero(np.diff(clock_ms, prepend=self._clock_ms))
        self._clock_steps.append((batch.offsets[steps], clock_ms[steps]))
        self._clock_ms = clock_after(batch, self._clock_ms)
        keep = np.flatnonzero(((batch.verdict == ACTION) | (batch.verdict == ERASE)) & np.isin(batch.users, self._wanted))
        if len(keep):
            self._kept.append((_take([batch], keep), clock_ms[keep]))
            self._slices = None

    def clock_at(self, offset: int) -> int:
        """The partition's clock at an offset (-1: of the base), milliseconds; 0: nothing was accepted up to there."""
        if len(self._clock_steps) > 1:
            offsets, clocks = zip(*self._clock_steps, strict=True)
            self._clock_steps = [(np.concatenate(offsets), np.concatenate(clocks))]
        offsets_of_steps, clock_ms = self._clock_steps[0]
        place = int(offsets_of_steps.searchsorted(offset, side="right"))
        return int(clock_ms[place - 1]) if place else 0

    def rows_at(self, what: Definition, user_id: int, offsets: Iterable[int]) -> list[bytes]:
        """The user's row at each offset (ascending), as a reading there gives it: the fold of the base and the records up to and including
        the offset, `as_read` at the partition's clock. b"": there is no row.
        """
        log, clock_ms = self._records(user_id)
        row = self._base_row(what, user_id)
        rows, start = [], 0
        for offset in offsets:
            end = int(np.searchsorted(log.offsets, offset, side="right"))
            if end > start:  # the clock at the last of these records: it is at least each of their append times
                row = apply_batch(what, _take([log], slice(start, end)), [row], int(clock_ms[end - 1]))[0]
                start = end
            rows.append(as_read(what, row or b"", self.clock_at(offset)))
        return rows

    def last_erasure(self, user_id: int) -> int:
        """Offset of the user's last erasure; -1: none."""
        log, _ = self._records(user_id)
        return int(log.offsets[log.verdict == ERASE].max(initial=-1))

    def later_events(self, user_id: int, offset: int, event_time_ms_max: int) -> Events:
        """The user's events behind `offset` with an event time up to `event_time_ms_max`, in offset order."""
        log, _ = self._records(user_id)
        events: Events = log.events[int(np.searchsorted(log.offsets, offset, side="right")) :]
        return events[(events["event_time_ms"] > 0) & (events["event_time_ms"] <= event_time_ms_max)]

    def _records(self, user_id: int) -> tuple[Batch, _Times]:
        if self._slices is None:
            self._index()
        where = (self._slices or {}).get(user_id, slice(0, 0))
        if not self._kept:
            return _EMPTY, np.zeros(0, np.int64)
        log, clock_ms = self._kept[0]
        return _take([log], where), clock_ms[where]

    def _index(self) -> None:
        """Sorts what was kept by user, in offset order within each."""
        self._slices = {}
        if not self._kept:
            return
        batches, clocks = zip(*self._kept, strict=True)
        users = np.concatenate([batch.users for batch in batches])
        order = np.argsort(users, kind="stable")
        self._kept = [(_take(batches, order), np.concatenate(clocks)[order])]
        found, starts = np.unique(users[order], return_index=True)
        ends = [*starts[1:].tolist(), len(users)]
        self._slices = {user: slice(start, end) for user, start, end in zip(found.tolist(), starts.tolist(), ends, strict=True)}


def _take(batches: Seq[Batch], where: npt.NDArray[np.int64] | slice) -> Batch:
    """Some records of batches of one partition, put together."""
    columns: dict[str, Any] = {}
    for name in ("offsets", "append_time_ms", "verdict", "users", "events"):
        parts = [getattr(batch, name) for batch in batches]
        columns[name] = (parts[0] if len(parts) == 1 else np.concatenate(parts))[where]
    return replace(batches[0], reasons={}, **columns)


_EMPTY = Batch(
    0, 0, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.uint64), np.zeros(0, EVENT_DTYPE), {}
)


def edit_distance(served: Events, rebuilt: Events) -> tuple[int, int]:
    """(inserts, deletes) of the shortest edit from the served sequence to the rebuilt one; events are told apart by their 40 bytes.

    The rebuilt sequence holds each event once, so the longest common subsequence is the longest run of increasing places.
    """
    place = {event: i for i, event in enumerate(_each(rebuilt))}
    tails: list[int] = []
    for event in _each(served):
        i = place.get(event)
        if i is not None:
            at = bisect_left(tails, i)
            tails[at : at + 1] = [i]
    return len(rebuilt) - len(tails), len(served) - len(tails)


def bytes_different(served: bytes, rebuilt: bytes) -> int:
    """How many bytes differ, place by place; what one has and the other has not differs."""
    shorter = min(len(served), len(rebuilt))
    a, b = np.frombuffer(served, np.uint8, shorter), np.frombuffer(rebuilt, np.uint8, shorter)
    return int(np.count_nonzero(a != b)) + abs(len(served) - len(rebuilt))


def _each(events: Events) -> list[bytes]:
    data, width = events.tobytes(), EVENT_DTYPE.itemsize
    return [data[start : start + width] for start in range(0, len(data), width)]


def missing_events(what: Definition, packer: Packer, inputs: RankInputs, later: Events) -> tuple[int, _Times]:
    """Freshness skew of one ranking: (events the model would have seen had none been late, event times int64 of those it lacked).

    `later`: the user's events behind the watermark with an event time up to the request (`PartitionLog.later_events`).
    """
    served = inputs.events[packer.visible(inputs)]
    later = later[later["event_time_ms"] > inputs.erased_before_ms]
    if not len(later):
        return len(served), np.zeros(0, np.int64)
    complete = replace(inputs, events=law(what, np.concatenate((inputs.events, later))))
    seen = complete.events[packer.visible(complete)]
    had = set(_each(served))
    lacked = np.array([event not in had for event in _each(seen)], bool)
    return len(seen), seen["event_time_ms"][lacked]


@dataclass
class Report:
    """What a replay found. Everything counted is in rankings unless its name says otherwise.

    Shadows are compared like rankings (digests, bytes, rows, scores), and counted apart: each has a ranking beside it.
    """

    ok: bool = False
    verdict: str = ""
    rankings_read: int = 0
    rankings_replayed: int = 0
    rankings_different: int = 0
    """Replayed rankings and shadows with any difference of digest, inline bytes or row."""
    shadows_read: int = 0
    shadows_replayed: int = 0
    shadows_excluded: dict[str, int] = field(default_factory=dict)
    digests_equal: int = 0
    digests_different: int = 0
    bytes_compared: int = 0
    bytes_different: int = 0
    """Of packed tensors: exact where the ranking log has the bytes, else every byte of each tensor whose digest differs."""
    tensors_different: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    tiers: dict[str, int] = field(default_factory=dict)
    rows_compared: int = 0
    rows_different: int = 0
    sequence_inserts: int = 0
    """Events that the log gives and the served sequence lacked at the same watermark."""
    sequence_deletes: int = 0
    """Events that the served sequence had and the log does not give."""
    sequence_counts: dict[str, float] = field(default_factory=dict)
    hours: dict[str, list[int]] = field(default_factory=dict)
    """By hour of request_time_ms (UTC): [replayed, different]."""
    scores_compared: int = 0
    scores_different: int = 0
    score_difference_max: float = 0.0
    score_tolerance: float = 0.0
    events_visible: int = 0
    """Freshness skew: events with event time up to the request that a complete sequence would have shown the model, over all rankings."""
    events_missing: int = 0
    rankings_missing_events: int = 0
    missing_age_ms: dict[str, float] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)
    events_read: int = 0
    """Records of the actions read, erasures and dead letters included."""
    events_rejected: int = 0
    offsets_without_record: int = 0
    """Places in the log where no record is: control records of transactions, or records that an archive lost."""
    elapsed_s: float = 0.0
    reading_s: float = 0.0
    scoring_s: float = 0.0
    events_per_s: float = 0.0
    """Records read and decoded a second of reading_s."""
    requests_per_s: float = 0.0
    """Rankings replayed a second of the whole run, reading and decoding included, scoring left out."""
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def events_missing_share(self) -> float:
        """Freshness skew as one number, 0 to 1."""
        return self.events_missing / self.events_visible if self.events_visible else 0.0

    def to_json(self) -> str:
        """One JSON object, keys as the fields."""
        return json.dumps({**asdict(self), "events_missing_share": self.events_missing_share}, indent=1)

    def to_text(self) -> str:
        """For people: the verdict, the two numbers, and what was left out and why."""
        lines = [
            self.verdict,
            "",
            f"rankings read        {self.rankings_read}",
            f"rankings replayed    {self.rankings_replayed}  {_listed(self.tiers)}",
            *([f"shadows              {self.shadows_replayed} replayed of {self.shadows_read} read"] if self.shadows_read else []),
            f"digests              {self.digests_equal} equal, {self.digests_different} different",
            f"bytes different      {self.bytes_different} of {self.bytes_compared}",
            *(f"  tensor {name}: {count} rankings" for name, count in sorted(self.tensors_different.items())),
            f"rows                 {self.rows_different} of {self.rows_compared} different",
            f"sequence edits       {self.sequence_inserts} inserts, {self.sequence_deletes} deletes in inline rows",
            f"sequence counts      {_listed(self.sequence_counts)}",
            f"scores               {self.scores_different} of {self.scores_compared} different, greatest difference "
            f"{self.score_difference_max:.2e}, tolerance {self.score_tolerance:.0e}",
            *(f"excluded             {count} {reason}: {EXCLUSIONS[reason]}" for reason, count in sorted(self.excluded.items())),
            *(f"excluded shadows     {count} {reason}: {EXCLUSIONS[reason]}" for reason, count in sorted(self.shadows_excluded.items())),
            f"freshness skew       {self.events_missing} of {self.events_visible} events ({100 * self.events_missing_share:.3f} %) were "
            f"not in the served sequence yet, in {self.rankings_missing_events} rankings",
            *([f"  age at request, ms: {_listed(self.missing_age_ms)}"] if self.missing_age_ms else []),
            *(f"  {hour}Z: {different} of {total} different" for hour, (total, different) in sorted(self.hours.items()) if different),
            f"log                  {_listed(self.log)}",
            f"speed                {self.requests_per_s:.0f} rankings/s without scoring; {self.events_read} events read "
            f"({self.events_rejected} rejected, {self.offsets_without_record} gaps), {self.events_per_s:.0f}/s; "
            f"{self.elapsed_s:.2f} s, of which scoring {self.scoring_s:.2f} s",
            *(f"example              {json.dumps(example)}" for example in self.examples),
        ]
        return "\n".join(lines)


class Tally:
    """Counts comparisons up to a `Report`."""

    def __init__(self) -> None:
        self.report = Report()
        self._missing_ages_ms: list[_Times] = []
        self._counts: list[int] = []

    def exclude(self, reason: str, why: str, record: RankingRecord | None = None) -> None:
        """Counts a ranking that is not replayed; `reason` is one of EXCLUSIONS."""
        _count(self.report.shadows_excluded if record is not None and record.shadow else self.report.excluded, reason)
        if reason not in ACCEPTED:
            self._example(record, excluded=reason, why=why)

    def compare(self, record: RankingRecord, row: bytes, packer: Packer, packed: Packed, further: Seq[bytes] = ()) -> bool:
        """Compares a served ranking with the row and tensors rebuilt for it; whether nothing differs. `further`: rows of the further
        identities, in the request's order."""
        report, tensors = self.report, packed.tensors
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        if record.shadow:
            report.shadows_replayed += 1
        else:
            report.rankings_replayed += 1
            _count(report.tiers, Tier.Name(record.tier))
            self._counts.append(packed.sequence_count)
        report.bytes_compared += sum(sizes.values())
        different: dict[str, int] = {}
        digest_equal = packer.digest(tensors) == record.digest
        if digest_equal:
            report.digests_equal += 1
        else:
            report.digests_different += 1
            different = {name: sizes.get(name, 0) for name in _names_different(packer.tensor_digests(tensors), record.tensor_digests)}
            if not different:  # nothing says which one
                different = {"unnamed": sum(sizes.values())}
        if record.inline:
            served = record.inline_tensors
            exact = {name: bytes_different(served.get(name, b""), tensors[name].tobytes()) for name in tensors}
            different = {name: count for name, count in exact.items() if count} or dict.fromkeys(different, 0)
        rows_agree = self._compare_rows(record, (row, *further))
        for name, count in different.items():
            _count(report.tensors_different, name)
            report.bytes_different += count
        agree = digest_equal and not different and rows_agree
        hour = report.hours.setdefault(str(np.datetime64(record.request.request_time_ms, "ms").astype("datetime64[h]")), [0, 0])
        hour[0] += not record.shadow
        if not agree:
            hour[1] += not record.shadow
            report.rankings_different += 1
            self._example(record, tensors_different=sorted(different), row_different=not rows_agree)
        return agree

    def _compare_rows(self, record: RankingRecord, rows: Seq[bytes]) -> bool:
        if not record.row_digest and not record.inline:
            return True  # logged before there was a digest of rows
        self.report.rows_compared += 1
        logged = (record.inline_row, *record.inline_identity_rows)
        if record.row_digest in (0, rows_digest(rows)) and (not record.inline or logged == tuple(rows)):
            return True
        self.report.rows_different += 1
        if not record.inline:
            return False
        for served_row, row in zip_longest(logged, rows, fillvalue=b""):
            try:
                served = decode_row(served_row).events if served_row else _EMPTY.events
            except SequenceCorruptError:  # logged as it was read, and no sequence at all
                served = _EMPTY.events
            inserts, deletes = edit_distance(served, decode_row(row).events if row else _EMPTY.events)
            self.report.sequence_inserts += inserts
            self.report.sequence_deletes += deletes
        return False

    def add_freshness(self, request_time_ms: int, visible: int, missing_event_times_ms: _Times) -> None:
        """Adds `missing_events` of one ranking."""
        self.report.events_visible += visible
        if len(missing_event_times_ms):
            self.report.events_missing += len(missing_event_times_ms)
            self.report.rankings_missing_events += 1
            self._missing_ages_ms.append(request_time_ms - missing_event_times_ms)

    def compare_scores(self, record: RankingRecord, scores: Mapping[str, tuple[npt.NDArray[np.float32], float]]) -> None:
        """Compares logged with recomputed scores: values float32 [C] and their tolerance, by head; "" is the final score."""
        self.report.scores_compared += 1
        logged = {**record.head_scores, "": record.scores}
        wrong = sorted(set(scores) ^ set(logged))
        for name in set(scores) & set(logged):
            values, tolerance = scores[name]
            served = np.frombuffer(logged[name], "<f4")
            difference = float(np.abs(served - values).max(initial=0.0)) if len(served) == len(values) else float("nan")
            if not difference <= tolerance:
                wrong.append(name)
            self.report.score_tolerance = max(self.report.score_tolerance, tolerance)
            if difference > self.report.score_difference_max:
                self.report.score_difference_max = difference
        if wrong:
            self.report.scores_different += 1
            self._example(record, scores_different=[name or "final" for name in sorted(wrong)])

    def finish(self, *, elapsed_s: float, scoring_s: float) -> Report:
        """The report, with its verdict."""
        report = self.report
        report.elapsed_s, report.scoring_s = elapsed_s, scoring_s
        working_s = max(elapsed_s - scoring_s, 1e-9)
        report.requests_per_s = report.rankings_replayed / working_s
        report.events_per_s = report.events_read / max(report.reading_s, 1e-9)
        report.sequence_counts = _percentiles(self._counts)
        report.missing_age_ms = _percentiles(np.concatenate(self._missing_ages_ms)) if self._missing_ages_ms else {}
        excluded = (*report.excluded.items(), *report.shadows_excluded.items())
        refused = [(reason, count) for reason, count in excluded if reason not in ACCEPTED]
        faults = [
            f"{count} {what}"
            for count, what in (
                (report.rankings_different, "rankings differ"),
                (report.scores_different, "scores differ"),
                (sum(count for _, count in refused), f"rankings could not be replayed ({', '.join(sorted({why for why, _ in refused}))})"),
            )
            if count
        ]
        if not report.rankings_replayed + report.shadows_replayed:
            faults.append("nothing was replayed")
        report.ok = not faults
        report.verdict = f"FAILED: {'; '.join(faults)}" if faults else f"OK: {report.rankings_replayed} rankings replayed, 0 bytes differ"
        return report

    def _example(self, record: RankingRecord | None, **what: Any) -> None:
        if len(self.report.examples) >= _EXAMPLES_MAX:
            return
        place = {} if record is None else _place(record)
        self.report.examples.append({**place, **what})


def _place(record: RankingRecord) -> dict[str, Any]:
    """Ids as text: JSON numbers end at 2^53 in many readers."""
    place = {
        "request_id": f"{record.request.request_id:016x}",
        "user_id": f"{record.request.user_id:016x}",
        "release_id": record.release_id,
    }
    if record.watermark:
        position = record.watermark[0]
        place |= {"log_epoch": f"{position.log_epoch:016x}", "partition": str(position.partition), "offset": str(position.offset)}
    return place


def _names_different(a: Mapping[str, int], b: Mapping[str, int]) -> list[str]:
    if not b:
        return []
    return [name for name in dict.fromkeys((*a, *b)) if name not in a or name not in b or a[name] != b[name]]


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _percentiles(values: Any) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"p{q}": float(value) for q, value in zip((0, 50, 90, 99, 100), np.percentile(values, (0, 50, 90, 99, 100)), strict=True)}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())

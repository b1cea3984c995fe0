"""A labelling pass: the ranking log joined with what was done becomes the served log that training reads (`features.labels` has the rules).

Six steps. 1. Plan: how far both logs are read, and until when lists are judged. 2. Spill: both logs become archives of some users each
(`streams.log_buckets`). 3. Fold: each bucket is joined, and each new list's inputs are proved (`deploy.label_bucket`). 4. Merge: the
buckets' runs become parts of the log, one a day. 5. Commit: a new summary.json names them. 6. Sweep.

A pass that was cut off is continued by the next one with the same plan, whose result is the same, byte for byte; up to its commit readers
see the log as it was. A day whose lists are all final is closed: its parts stay, and no later pass reads its rankings. The lists of later
days are joined anew in each pass, which is how late actions get in; what proved their inputs is kept. Rows of lists that retention has
reached meanwhile stay as they are: a join of what is left would take them, or labels of theirs, away. Both logs are read from where they
begin, so a pass costs what retention leaves of them.
Memory: about `memory_bytes`, 16 bytes for each ranking of a partition and for each identity, and the largest bucket where there are more
than BUCKETS_MAX (16 times `memory_bytes` of records each).
"""

import fcntl
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.label_bucket import (
    DONE,
    IMPRESSIONS_RUN,
    KNOWN,
    SERVED_RUN,
    SHARED,
    STAYS,
    Work,
    concatenated,
    fold_bucket,
    ledger_actions,
    named_shared,
)
from deploy.label_report import KEEP_LONGER, LabelReport
from deploy.replay import ACTIONS as ACTIONS_ARCHIVE
from deploy.replay import RANKINGS as RANKINGS_ARCHIVE
from deploy.replay import ReplayOptions, open_logs
from features.actions import ERASE, Batch
from features.domain import DAY_MS, Domain
from features.erasures import read_ledger
from features.labels import OUTCOMES, Named, Rules
from features.log_erasure import drop_served, of_keys
from features.logs import (
    ACTIONS,
    IMPRESSIONS,
    SERVED,
    SUMMARY,
    LoggedActions,
    LogWriter,
    actions_schema,
    impressions_schema,
    locked,
    read_summary,
    served_schema,
    write_summary,
)
from features.runs import merge_runs, write_run_of
from features.tables import sync_path
from inference.release import ReleaseError, open_release, release_folder
from protos.v1.ranking_pb2 import RankingRecord
from streams.archive import DecodingRules, KafkaLog, ParquetLog, RecordLog, Span, write_manifest
from streams.erasure import LABEL_LOCK, LABEL_PLAN, LABEL_WORK, LEFT_OVER_MS
from streams.log_buckets import Reading, bucket_of, logged_actions, spill_actions, spill_rankings

BUCKETS_MAX = 256
_NEVER_MS = 1 << 62
SMALL_PARTS_MAX, SMALL_PART_ROWS = 64, 1 << 20
"""Of the actions: so many small parts in a row, of fewer rows each, become one. Who reads a log has all of its parts open."""
_RANKING_BYTES, _ACTION_BYTES = 3_000, 300
_SPILLED, _ERASURES, _IDENTITIES = "spilled.json", "erasures.npz", "identities.npy"


class LabelError(ValueError):
    """A pass that cannot be made; says what to do."""


@dataclass(frozen=True)
class LabelOptions:
    """What a pass works on.

    out: the served log's folder. until_ms: lists are judged by what was appended before; of a pass that was cut off its own time counts.
    ledger: the home folder's erasures.jsonl. keep_days: older days are left out. all_seen: of a product without impressions every candidate
    counts as seen. rebuild: starts the log over, with other rules say; what the topics do not have any more is lost then. progress: called
    with (what is read, done, of how many); step: called before each step.
    """

    replay: ReplayOptions
    domain: Domain
    rules: Rules
    out: Path
    until_ms: int
    ledger: Path
    memory_bytes: int = 512 << 20
    keep_days: int | None = None
    all_seen: bool = False
    rebuild: bool = False
    progress: Callable[[str, int, int], None] = lambda *_: None
    step: Callable[[str], None] = lambda _: None


def served_folder(home: Path, domain: Domain) -> Path:
    """Where a home folder's served log is."""
    return home / "logs" / f"{domain.name}.served"


def label(options: LabelOptions) -> LabelReport:
    """Makes one pass, or ends the one that was cut off.

    Raises:
        LabelError: the log was made by other rules or another domain file, or another pass is under way.
        ArchiveError, StreamError: a log cannot be read. LedgerError: the ledger cannot.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    with ExitStack() as stack:
        lock = stack.enter_context((options.out / LABEL_LOCK).open("ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabelError(f"{options.out}: another run of `freshrank label` is under way, or the erasure job tidies up") from None
        rankings, actions = stack.enter_context(open_logs(options.replay))
        report = _Pass(options, rankings, actions).run()
    report.seconds["all"] = round(time.monotonic() - started_s, 3)
    report.memory_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return report


@dataclass(frozen=True)
class _Plan:
    """What a pass is: the same plan on the same logs gives the same parts. Stands in the work folder, and at the end in summary.json.

    spans: offsets of each partition by log ("rankings", "actions"). closed_before_ms: lists from before it are in parts that stay. actions:
    first offset by partition that is not in the log yet. merged: parts of the actions whose rows go in front of this pass's.
    whole_from_ms: see `_Pass._whole_from_ms`. before_ms: `until_ms` of the pass before; 0: none.
    """

    number: int
    until_ms: int
    closed_before_ms: int
    before_ms: int
    buckets: int
    rules: dict[str, Any]
    columns: list[str]
    epochs: dict[str, str]
    spans: dict[str, dict[str, list[int]]]
    actions: dict[str, int]
    merged: list[str]
    whole_from_ms: list[int]


class _Pass:
    def __init__(self, options: LabelOptions, rankings: RecordLog, actions: RecordLog) -> None:
        self.options, self.domain, self.out = options, options.domain, options.out
        self.logs: dict[str, RecordLog] = {"rankings": rankings, "actions": actions}
        self.work = options.out / LABEL_WORK
        self.report = LabelReport()
        self.ledger = read_ledger(options.ledger)
        self.summary = self._summary()
        self.plan = self._plan()

    def run(self) -> LabelReport:
        folders = [self.work / f"bucket-{n:03}" for n in range(self.plan.buckets)]
        with self._step("spill"):
            if not (self.work / _SPILLED).exists():
                self._spill(folders)
        with self._step("fold"):
            self._fold(folders)
        with self._step("merge"):
            parts = self._merge(folders)
        with self._step("commit"):
            self._count(folders)
            self._commit(parts)
        with self._step("sweep"):
            self._sweep()
        return self.report

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.options.step(name)
        started_s = time.monotonic()
        yield
        self.report.seconds[name] = round(time.monotonic() - started_s, 3)

    # 1. Plan

    def _summary(self) -> dict[str, Any]:
        """summary.json as the pass before left it; "label": {} for a log that is made anew."""
        found: dict[str, Any] = read_summary(self.out) if (self.out / SUMMARY).exists() else {"parts": {}, "label": {}}
        if "label" not in found:
            raise LabelError(f"{self.out}: holds an imported log; give `freshrank label` a folder of its own")
        made = found["label"]
        for name, now in (("rules", self._rules()), ("columns", impressions_schema(self.domain, served=True).names)):
            if made and made[name] != now and not self.options.rebuild:
                raise LabelError(f"{self.out}: was made with {name} {made[name]}, now they are {now}; --rebuild starts over")
        return found

    def _rules(self) -> dict[str, Any]:
        """What a log is made by, as JSON has it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self.options.rules) | {"all_seen": self.options.all_seen}))
        return found

    def _plan(self) -> _Plan:
        number = self.summary["label"].get("number", 0) + 1
        plan = self._next_plan(number)
        try:
            kept = _Plan(**json.loads((self.work / LABEL_PLAN).read_text("utf-8")))
        except (OSError, TypeError, ValueError):
            kept = None
        if kept is not None and self._continues(kept, plan):
            self.report.continued = True
            plan = kept
        else:
            self.options.step("plan")
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            _write_json(self.work / LABEL_PLAN, asdict(plan))
        for name, log in self.logs.items():
            if isinstance(log, KafkaLog):  # what came since is for the next pass
                log.partitions = {int(partition): Span(*span) for partition, span in plan.spans[name].items()}
        return plan

    def _next_plan(self, number: int) -> _Plan:
        made = {} if self.options.rebuild else self.summary["label"]
        counts = {name: sum(span.end - span.start for span in log.partitions.values()) for name, log in self.logs.items()}
        size_bytes = counts["rankings"] * _RANKING_BYTES + counts["actions"] * _ACTION_BYTES
        epochs = {name: f"{log.log_epoch:016x}" for name, log in self.logs.items()}
        return _Plan(
            number=number,
            until_ms=self.options.until_ms,
            closed_before_ms=made.get("closed_before_ms", 0),
            before_ms=made.get("until_ms", 0),
            buckets=min(BUCKETS_MAX, 1 + 16 * size_bytes // self.options.memory_bytes),
            rules=self._rules(),
            columns=impressions_schema(self.domain, served=True).names,
            epochs=epochs,
            spans={name: {str(p): list(span) for p, span in sorted(log.partitions.items())} for name, log in self.logs.items()},
            actions=made.get("actions", {}) if made.get("epochs", epochs)["actions"] == epochs["actions"] else {},
            merged=self._small_parts(),
            whole_from_ms=self._whole_from_ms(),
        )

    def _small_parts(self) -> list[str]:
        """The log's newest parts of the actions, where they are small and many: nothing else. Each pass adds one."""
        newest = reversed([] if self.options.rebuild else self.summary["parts"].get(ACTIONS, []))
        small = [*takewhile(lambda part: pq.read_metadata(self.out / part).num_rows < SMALL_PART_ROWS, newest)]
        return small[::-1] if len(small) >= SMALL_PARTS_MAX else []

    def _whole_from_ms(self) -> list[int]:
        """From when on each partition of the actions is whole: 0 where retention has taken nothing, else its first record's append time."""
        log, found = self.logs["actions"], list[int]()
        for partition, span in sorted(log.partitions.items()):
            first = next((int(records.append_time_ms[0]) for records in log.read(partition)), _NEVER_MS) if span.start else 0
            found.append(first)
        return found

    def _continues(self, kept: _Plan, plan: _Plan) -> bool:
        """Whether a pass that was cut off can go on: it is the next one, its rules are these, and the logs still have what it reads. Not
        where it is old: what it has made may hold records that retention or an erasure has taken since."""
        same = ("number", "rules", "columns", "epochs", "before_ms")
        if any(getattr(kept, name) != getattr(plan, name) for name in same) or plan.until_ms - kept.until_ms > LEFT_OVER_MS:
            return False
        for name, log in self.logs.items():
            for partition, (start, end) in kept.spans[name].items():
                now = log.partitions.get(int(partition), Span(0, 0))
                if isinstance(log, ParquetLog) and now != (start, end):
                    return False
                if end > now.end or start < now.start:
                    return False
        return True

    # 2. Spill

    def _spill(self, folders: list[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self._spill_known(folders)
        self.options.step("spill rankings")
        rankings, actions = self.logs["rankings"], self.logs["actions"]
        read = self._advance("rankings", rankings)
        skipped = {"backdated": 0, "shadows": 0}
        rules = self.options.rules
        context_ms = rules.window_ms + rules.late_ms + rules.future_tolerance_ms

        def wanted(record: RankingRecord) -> bool:
            """Lists that are open, and those before that may meet them in the rules."""
            if record.shadow:
                skipped["shadows"] += 1
                return False
            is_closed = record.request.request_time_ms < self.plan.closed_before_ms
            skipped["backdated"] += is_closed and self.plan.before_ms <= record.served_time_ms
            return bool(record.request.request_time_ms >= self.plan.closed_before_ms - context_ms)

        reading = spill_rankings(rankings, [folder / RANKINGS_ARCHIVE for folder in folders], wanted, read, self.options.memory_bytes)
        self.options.step("spill actions")
        erasures = self._spill_actions(folders, reading)
        for folder in folders:
            for name, log in ((RANKINGS_ARCHIVE, rankings), (ACTIONS_ARCHIVE, actions)):
                # A replay of the bucket asks whether the log's begin is there, of which the bucket knows no more than the log.
                write_manifest(folder / name, log, getattr(log, "base", ""), [])
        np.savez(self.work / _ERASURES, **vars(erasures))
        np.save(self.work / _IDENTITIES, np.unique(reading.identities["key"]))
        _write_json(self.work / _SPILLED, skipped)

    def _advance(self, step: str, log: RecordLog) -> Callable[[int], None]:
        total, done = sum(span.end - span.start for span in log.partitions.values()), 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            self.options.progress(step, done, total)

        return advance

    def _spill_known(self, folders: list[Path]) -> None:
        """Rows of `served` of open days, whose inputs are proved."""
        schema = served_schema(self.domain)
        writers: dict[int, Any] = {}
        with ExitStack() as stack:
            for part in self._open_parts(SERVED):
                with pq.ParquetFile(self.out / part) as file:
                    for batch in file.iter_batches(batch_size=4_096, columns=schema.names):
                        bucket = bucket_of(batch.column("user_id").to_numpy(), len(folders))
                        for n in np.unique(bucket).tolist():
                            if n not in writers:
                                writers[n] = stack.enter_context(pq.ParquetWriter(folders[n] / KNOWN, schema, compression="zstd"))
                            writers[n].write_table(pa.Table.from_batches([batch.filter(pa.array(bucket == n))]).cast(schema))

    def _open_parts(self, name: str) -> list[str]:
        """Parts of a table that this pass makes anew."""
        if self.options.rebuild:
            return []
        return [part for part in self.summary["parts"].get(name, []) if _begin_ms(part) >= self.plan.closed_before_ms]

    def _spill_actions(self, folders: list[Path], reading: Reading) -> LoggedActions:
        """Also writes the records that the log has not yet as its next part, behind the parts that it takes the place of; returns the
        erasures among all."""
        log, base = self.logs["actions"], self.options.replay.base
        erasures: list[LoggedActions] = []
        read = self._advance("actions", log)
        with LogWriter(self.out / "actions", self._part_name(), actions_schema(self.domain, order="offset")) as writer:
            for part in self.plan.merged:
                writer.copy(self.out / part)

            def decoded(batch: Batch) -> None:
                found = logged_actions(batch)
                new = found.offset >= self.plan.actions.get(str(batch.partition), 0)
                writer.write_actions(LoggedActions(*(column[new] for column in vars(found).values())))
                if (batch.verdict == ERASE).any():
                    erasures.append(LoggedActions(*(column[found.erase] for column in vars(found).values())))
                read(len(batch))

            own = DecodingRules.of(self.domain)
            rules = [own, *sorted({DecodingRules.of(found) for found in self._domains(reading)} - {own})]
            clock_ms = 0 if base is None else base.clock_ms
            archives = [folder / ACTIONS_ARCHIVE for folder in folders]
            spill_actions(log, archives, reading, rules, clock_ms, decoded, self.options.memory_bytes)
        return concatenated([*erasures, _but(ledger_actions(self.ledger), erasures)])

    def _domains(self, reading: Reading) -> Iterator[Domain]:
        """Of the releases that ranked."""
        for release_id in sorted(reading.releases):
            try:
                yield open_release(release_folder(self.options.replay.releases, release_id)).domain
            except ReleaseError:  # replay says so of each ranking
                continue

    def _part_name(self, day: str = "") -> str:
        return f"{day}.{self.plan.number:06}.parquet" if day else f"{self.plan.number:06}.parquet"

    # 3. Fold

    def _fold(self, folders: list[Path]) -> None:
        options, plan = self.options, self.plan
        with np.load(self.work / _ERASURES) as found:
            erasures = LoggedActions(**{name: found[name] for name in found.files})
        shared = np.load(self.work / _IDENTITIES)
        nobody = Named(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64))
        foreign = [named_shared(folder, self.domain, options.rules, erasures, shared) for folder in folders] if len(shared) else []
        work = Work(
            domain=self.domain,
            rules=options.rules,
            until_ms=plan.until_ms,
            closed_before_ms=plan.closed_before_ms,
            buckets=plan.buckets,
            memory_bytes=options.memory_bytes,
            all_seen=options.all_seen,
            replay=options.replay,
            erasures=erasures,
            shared=shared,
            whole_from_ms=np.array(plan.whole_from_ms, np.int64),
            foreign=Named(*(np.concatenate(parts) for parts in zip(nobody, *foreign, strict=True))),
        )
        for number, folder in enumerate(folders):
            if not (folder / DONE).exists():
                options.step(f"fold {number}")
                fold_bucket(work, number, folder, lambda *_: None)
            options.progress("fold", number + 1, len(folders))

    # 4. Merge

    def _merge(self, folders: list[Path]) -> dict[str, list[str]]:
        """Writes the parts of the open days; returns all of the log's."""
        kept = {} if self.options.rebuild else self.summary["parts"]
        parts = {name: [part for part in kept.get(name, []) if part not in self.plan.merged] for name in (ACTIONS, IMPRESSIONS, SERVED)}
        with pq.ParquetFile(self.out / "actions" / self._part_name()) as file:
            if file.metadata.num_rows:
                parts[ACTIONS].append(f"actions/{self._part_name()}")
        stays = self._write_stays(folders)
        since_ms = 0 if self.options.keep_days is None else self.plan.until_ms - self.options.keep_days * DAY_MS
        for name, run in ((IMPRESSIONS, IMPRESSIONS_RUN), (SERVED, SERVED_RUN)):
            self.options.step(f"merge {name}")
            closed = [part for part in parts[name] if _begin_ms(part) < self.plan.closed_before_ms]
            made = self._write_days(name, [*(folder / run for folder in folders), *stays.get(name, [])])
            parts[name] = [part for part in (*closed, *made) if _begin_ms(part) + DAY_MS > since_ms]
            if set(closed) - set(parts[name]):
                self.report.days_dropped = len(set(closed) - set(parts[name]))
        self.report.days_written = sum(self._part_name() in part for part in parts[SERVED])
        return parts

    def _write_stays(self, folders: list[Path]) -> dict[str, list[Path]]:
        """The rows of lists that stay as they are, from the parts that this pass makes anew, as a run of each table."""
        keys = np.concatenate([np.load(folder / STAYS) for folder in folders])
        if not len(keys):
            return {}
        stay, runs = of_keys(keys), {name: [self.work / f"stays.{name}"] for name in (IMPRESSIONS, SERVED)}

        def rows(name: str) -> Iterator[pa.Table]:
            for part in self._open_parts(name):
                with pq.ParquetFile(self.out / part) as file:
                    for batch in file.iter_batches(batch_size=4_096, columns=self._schema(name).names):
                        yield pa.Table.from_batches([batch.filter(pa.array(stay(batch)))]).cast(self._schema(name))

        with locked(self.out):  # the erasure job rewrites the two tables one after the other
            for name, (run,) in runs.items():
                write_run_of(run, self._schema(name), rows(name), "request_time_ms")
        return runs

    def _schema(self, name: str) -> pa.Schema:
        return impressions_schema(self.domain, served=True) if name == IMPRESSIONS else served_schema(self.domain)

    def _write_days(self, name: str, runs: list[Path]) -> list[str]:
        """Writes the merged runs as one part a day; returns their names."""
        schema, folder, made = self._schema(name), name.removesuffix(".parquet"), list[str]()
        with ExitStack() as stack:
            writer: LogWriter | None = None
            for table in merge_runs(runs, ("request_time_ms", "request_id", "user_id")):
                days = table["request_time_ms"].to_numpy() // DAY_MS
                starts = np.flatnonzero(np.diff(days, prepend=-1))
                for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(days)], strict=True):
                    part = f"{folder}/{self._part_name(_day(int(days[start]) * DAY_MS))}"
                    if not made or made[-1] != part:
                        stack.close()  # the day before is whole
                        writer = stack.enter_context(LogWriter(self.out / folder, Path(part).name, schema))
                        made.append(part)
                    assert writer is not None
                    writer.write(table.slice(start, end - start))
        return made

    # 5. Commit

    def _commit(self, parts: dict[str, list[str]]) -> None:
        """From here on readers see the new log."""
        mine = {name: [self.out / part for part in found if self._part_name() in part] for name, found in parts.items()}
        plan = self.plan
        rules = self.options.rules
        closed_ms = (plan.until_ms - rules.window_ms - rules.late_ms) // DAY_MS * DAY_MS
        made = replace(
            plan,
            closed_before_ms=max(plan.closed_before_ms, closed_ms),
            actions={partition: end for partition, (_, end) in plan.spans["actions"].items()},
        )
        self.options.step("replace")
        with locked(self.out):  # an erasure that is in the ledger by now is done here, a later one by its job, which waits
            ledger = read_ledger(self.options.ledger)
            self.report.erased_rows = drop_served(mine[ACTIONS], mine[IMPRESSIONS], mine[SERVED], ledger) if ledger else 0
            self.report.parts = {name: len(found) for name, found in parts.items()}
            folders = [self.out / name for name in ("actions", "impressions", "served") if (self.out / name).is_dir()]
            for path in (*(path for paths in mine.values() for path in paths), *folders):
                sync_path(path)
            summary = {"domain": self.domain.name, "domain_version": self.domain.version, "parts": parts}
            before = {} if self.options.rebuild else self.summary["label"]
            has_seen = before.get("has_seen", False) or self.options.all_seen or self.report.only_seen > 0
            stays_until_ms = max(before.get("stays_until_ms", 0), self.report.stays_until_ms)
            label = asdict(made) | {"has_seen": has_seen, "stays_until_ms": stays_until_ms}
            write_summary(self.out, summary | {"label": label, "report": self.report.as_json()})
            sync_path(self.out)  # before the parts that the old one names go

    # 6. Sweep

    def _sweep(self) -> None:
        """Removes what no summary names: the work of this pass, parts that were replaced, and those of a pass that was given up."""
        shutil.rmtree(self.work, ignore_errors=True)
        parts = {part for found in read_summary(self.out)["parts"].values() for part in found}
        for name in ("actions", "impressions", "served"):
            for path in (self.out / name).glob("*"):
                if f"{name}/{path.name}" not in parts:
                    path.unlink(missing_ok=True)

    def _count(self, folders: list[Path]) -> None:
        report, plan = self.report, self.plan
        for name in ("number", "until_ms", "closed_before_ms", "buckets"):
            setattr(report, name, getattr(plan, name))
        for name, count in json.loads((self.work / _SPILLED).read_text("utf-8")).items():
            setattr(report, name, count)
        names = {action.id: name for name, action in self.domain.actions.items()}
        shared: list[npt.NDArray[np.void]] = []
        for folder in folders:
            report.add(json.loads((folder / DONE).read_text("utf-8")), names)
            with np.load(folder / SHARED) as found:
                rows = np.zeros(len(found["offset"]), [("partition", "<i4"), ("offset", "<i8"), ("outcome", "u1")])
                for column in rows.dtype.names or ():
                    rows[column] = found[column]
                shared.append(rows)
        if report.stays_until_ms > self.summary["label"].get("stays_until_ms", 0):  # said once, not as long as they stay
            day = _day(report.stays_until_ms)
            report.warnings.append(f"retention has reached lists up to {day} that were not final: they stay as they were; {KEEP_LONGER}")
        rows = np.sort(np.concatenate(shared), order=["partition", "offset", "outcome"])
        last = np.ones(len(rows), bool)
        last[:-1] = (rows["partition"][1:] != rows["partition"][:-1]) | (rows["offset"][1:] != rows["offset"][:-1])
        for number, count in enumerate(np.bincount(rows["outcome"][last], minlength=len(OUTCOMES)).tolist()):
            report.outcomes[OUTCOMES[number]] = report.outcomes.get(OUTCOMES[number], 0) + count


def _but(ledger: LoggedActions, known: list[LoggedActions]) -> LoggedActions:
    """The ledger's erasures that are not among the log's."""
    there = {place for part in known for place in zip(part.log_epoch.tolist(), part.partition.tolist(), part.offset.tolist(), strict=True)}
    places = zip(ledger.log_epoch.tolist(), ledger.partition.tolist(), ledger.offset.tolist(), strict=True)
    new = np.array([place not in there for place in places], bool)
    return LoggedActions(*(column[new] for column in vars(ledger).values()))


def _day(time_ms: int) -> str:
    return str(np.datetime64(time_ms, "ms").astype("datetime64[D]"))


def _begin_ms(part: str) -> int:
    """When the day of a part begins."""
    return int(np.datetime64(Path(part).name.split(".")[0], "ms").astype(np.int64))


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(value, indent=1), "utf-8")
    partial.replace(path)

"""The erasure job: what the record itself does not reach is done here, within a deadline, and written to the audit.

The record in the actions topic takes the user's past out of the state and so out of every later ranking and replay. What is left are bytes:
in archives, canonical logs and tables, which this job rewrites; in the files of stores and views, which the worker purges
(`streams.purge`); in topics and snapshots, which expire. A run may be cut off at any point: the next one does what is left. Give it to a
scheduler on every machine that has a home folder, more often than the actions topic's retention.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from features.actions import ACTION, ERASE, REJECTED, encode_action
from features.base import Base
from features.domain import DAY_MS, Domain
from features.encodings import read_action
from features.erasures import LEDGER, Erased, Erasure, append_lines, erased_before_ms, erased_users, read_ledger
from features.ids import user_key
from features.log_erasure import drop_packed, drop_past
from features.logs import ACTIONS, PACKED, SUMMARY, is_served_log, unnamed_parts
from features.samples import WARM, drop_samples
from features.table_erasure import drop_users, recover_drops
from features.tables import USER, generation_names, open_generation
from protos.v1.ranking_pb2 import RankingRecord
from streams.archive import MANIFEST, DecodingRules, KafkaLog, ParquetLog, RecordLog, Records, Span, decode_records, rewrite_archive
from streams.erasure_audit import AUDIT, Audit, Entry, Status
from streams.errors import StreamError
from streams.history import History
from streams.kafka import KafkaConfig, Topics, oldest_record_ms
from streams.purge import PURGED_FILE, read_purged

CURSOR = Path("audit", "cursor.json")
"""Below the home folder: how far the logs have been searched for erasures."""

BASE_FILE = "base.json"
"""Below the home folder: the base that its state stands on, and where its history is."""

SNAPSHOT_MARGIN_MS = DAY_MS // 12
"""A snapshot that was created this long after the purge was seen, or later, was taken after it."""

LEFT_OVER_MS = DAY_MS
"""A file that was being written when a process was killed, and a state that was set aside as damaged, go after this time."""

LABEL_WORK, LABEL_PLAN, LABEL_LOCK = ".label", "plan.json", ".label.lock"
"""Below a served log: what a pass of `freshrank label` has made so far, in it what the pass began with, and the lock of who works on it.
The pass that goes on with it looks at the ledger at its end."""

_ASIDE = re.compile(r"(\d+)(\.damaged|\.restoring|\.aside-\d+|-\d+)")


@dataclass(frozen=True)
class ErasureJob:
    """What one run works on. `deadline_ms`: the promise, from an erasure's append time on.

    kafka: None where no broker is to be asked: then the topics' places stay as they were. archives: folders of archives outside of `home`;
    those below it are found. expire_snapshots: removes the snapshots created before a time (milliseconds), the last one included; None:
    none are taken.
    """

    home: Path
    domain: Domain
    deadline_ms: int
    kafka: KafkaConfig | None = None
    topics: Topics = field(default_factory=Topics)
    archives: tuple[Path, ...] = ()
    expire_snapshots: Callable[[int], object] | None = None


@dataclass
class Summary:
    """What a run found and did: erasures that were new, rows and records removed by place, what is due and overdue, and warnings."""

    new: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    due: int = 0
    overdue: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def run_job(job: ErasureJob, now_ms: int, progress: Callable[[str], None] = lambda _: None) -> Summary:
    """One run; `progress` is told what is being done. `now_ms`: milliseconds since 1970-01-01 UTC.

    Raises:
        LedgerError: ledger or audit cannot be read: restore it from a backup, since erasures must not be forgotten.
        BaseError: a base's manifest or history cannot be read.
        StreamError, ArchiveError, LogError, TableError: what could not be read; everything before it is done and noted.
    """
    lock_path = job.home / AUDIT.parent / "lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StreamError(f"{job.home}: another run of the erasure job is under way") from None
        return _Run(job, now_ms, progress).run()


class _Run:
    def __init__(self, job: ErasureJob, now_ms: int, progress: Callable[[str], None]) -> None:
        self.job, self.now_ms, self.progress = job, now_ms, progress
        self.summary = Summary()
        self.first_offsets: dict[tuple[int, int], int] = {}
        """First offset that the actions topic still has, by log epoch and partition."""
        self.labelling: list[str] = []
        """Work folders of labelling passes that should be gone, and cannot be removed while a pass runs."""
        self.ledger = read_ledger(job.home / LEDGER)
        self.audit = Audit(job.home / AUDIT)
        self.bases = [Base.from_json(path.read_text("utf-8"), str(path)) for path in job.home.glob(BASE_FILE)]
        found = {path.parent for folder in (job.home, *job.archives) for path in folder.rglob(MANIFEST)}
        self.archives = sorted(folder for folder in found if LABEL_WORK not in folder.parts)

    def run(self) -> Summary:
        self._collect()
        self.summary.new = self.audit.asked(self.ledger, self.job.deadline_ms, self.now_ms)
        erased = erased_users(self.ledger)
        if erased:
            self._sweep()
            self._sweep_labelling()
            for place, rewrite in (
                ("archives", self._rewrite_archives),
                ("canonical logs", self._rewrite_logs),
                ("embeddings", self._rewrite_tables),
                ("warm-up requests", self._rewrite_samples),
            ):
                found = rewrite(erased)
                if found is not None:
                    self.summary.removed[place] = found
                for entry in self.audit.entries.values():
                    if place == "canonical logs" and self.labelling and self._is_watched(entry):
                        self._set(entry, place, "due", f"`freshrank label` is at work in {', '.join(self.labelling)}")
                    else:
                        self._set(entry, place, "absent" if found is None else "done")
                self.audit.write()
        watched = [entry for entry in self.audit.entries.values() if self._is_watched(entry)]
        if watched:
            self._look_around()
        for entry in watched:
            self._judge(entry)
        self.audit.write()
        for entry in self.audit.entries.values():
            self.summary.due += entry.open
            self.summary.overdue += [f"user {entry.last.user_id:016x}: {place}" for place in entry.overdue(self.now_ms)]
        return self.summary

    def _is_watched(self, entry: Entry) -> bool:
        return entry.open or self.now_ms <= entry.deadline_ms

    # Erasures, from the logs to the ledger.

    def _collect(self) -> None:
        cursor = _read_cursor(self.job.home / CURSOR)
        for log in self._logs():
            with closing(log):
                self._collect_from(log, cursor)

    def _collect_from(self, log: RecordLog, cursor: dict[str, int]) -> None:
        for partition, span in sorted(log.partitions.items()):
            if isinstance(log, ParquetLog):
                name = f"{log.folder.absolute()}:{partition}:{span.end}"
            else:
                name = f"{log.log_epoch:016x}:{partition}"
                self.first_offsets[log.log_epoch, partition] = span.start
            reached = cursor.get(name, 0)
            if 0 < reached < span.start:
                gone = f"{log.topic} partition {partition}: offsets {reached} to {span.start - 1} were gone before they were read"
                self.summary.warnings.append(f"{gone}: erasures there are in no ledger; run this job more often than the retention")
            start = max(reached, span.start)
            if start < span.end:
                self.progress(f"searching {log.topic} partition {partition} from offset {start}")
                found = self._search(log, partition, Span(start, span.end))
                append_lines(self.job.home / LEDGER, (erasure.to_json() for erasure in found))
                self.ledger += found
                cursor[name] = span.end
                _write_cursor(self.job.home / CURSOR, cursor)

    def _logs(self) -> Iterator[RecordLog]:
        for folder in self.archives:
            log = ParquetLog(folder)
            if not _is_rankings(log, self.job.topics):
                yield log
        if self.job.kafka is not None:
            yield KafkaLog(self.job.kafka, self.job.topics.actions, self.job.topics.base)

    def _search(self, log: RecordLog, partition: int, span: Span) -> list[Erasure]:
        known = {(erasure.log_epoch, erasure.partition, erasure.offset) for erasure in self.ledger}
        found = []
        if isinstance(log, KafkaLog):
            log.partitions = {**log.partitions, partition: span}
        for records in log.read(partition):
            batch = decode_records(log, partition, records, DecodingRules.of(self.job.domain))
            for i in np.flatnonzero(batch.verdict == ERASE).tolist():
                message = read_action(records.values[i] or b"")
                assert not isinstance(message, str), "the decoder read it"
                place = log.log_epoch, partition, int(records.offsets[i])
                if place not in known:
                    stamp_ms = int(records.append_time_ms[i])
                    found.append(Erasure(message.user_id, message.event_id, *place, stamp_ms, message.erase.reason))
        return found

    # What is rewritten here. Each returns what it removed; None: there is no such place.

    def _rewrite_archives(self, _: Erased) -> int | None:
        for folder in self.archives:
            log = ParquetLog(folder)
            missing = [erasure for erasure in self.ledger if _name(erasure) not in log.erasures]
            if not missing:
                continue
            self.progress(f"rewriting {folder} without {len({erasure.user_id for erasure in missing})} users")
            forget = _ForgetRankings(log, missing) if _is_rankings(log, self.job.topics) else _ForgetActions(log, missing, self.job.domain)
            rewrite_archive(log, forget, map(_name, missing))
            self.summary.removed["archived records"] = self.summary.removed.get("archived records", 0) + forget.count
        return len(self.archives) or None

    def _rewrite_logs(self, _: Erased) -> int | None:
        """A log that is a base's history stays: the base names its files by their content, and nothing could be rebuilt without."""
        held = [Path(source).absolute() for _, source in self.bases]
        logs = self.job.home / "logs"
        imported = {path.parent.absolute() for path in logs.glob(f"*/{ACTIONS}")}
        folders = sorted(imported | {path.parent.absolute() for path in logs.glob(f"*/{SUMMARY}") if is_served_log(path.parent)})
        folders = [folder for folder in folders if not any(source in (folder, folder / ACTIONS, *folder.parents) for source in held)]
        for folder in logs.glob("*"):
            drop_packed(folder, self.ledger)  # also of a history
        for folder in folders:
            self.progress(f"searching {folder}")
        return sum(drop_past(folder, self.ledger) for folder in folders) if folders else None

    def _past_in_history(self) -> set[int]:
        """Erased users whose past stands in the history of a base."""
        erased, found = erased_users(self.ledger), set[int]()
        for base, source in self.bases:
            self.progress(f"searching {source}, the history of base {base.id}")
            with History(source) as history:
                for group in history.row_groups():
                    for records in history.read(group):
                        first_ms = np.minimum(records.append_time_ms, records.events["event_time_ms"])
                        past = ~records.erase & (first_ms <= erased_before_ms(erased, records.users))
                        found |= set(records.users[past].tolist())
        return found

    def _rewrite_tables(self, erased: Erased) -> int | None:
        root, found = self.job.home / "tables", None
        for space in sorted(path.name for path in root.glob("*") if path.is_dir()):
            recover_drops(root, space)
            for generation in generation_names(root, space):
                if USER in open_generation(root, space, generation).members:
                    self.progress(f"searching {root / space / generation}")
                    found = (found or 0) + drop_users(root, space, generation, erased)
        return found

    def _rewrite_samples(self, erased: Erased) -> int | None:
        """Requests that ranking servers keep for their next start. A server that writes them leaves out who is in the ledger."""
        folder = self.job.home / WARM
        return drop_samples(folder, erased) if folder.is_dir() else None

    def _sweep(self) -> None:
        """Removes what killed processes left half written, and old states that were set aside."""
        home, before_s = self.job.home, (self.now_ms - LEFT_OVER_MS) / 1000
        left_over = [
            *home.glob("logs/*/.*.part"),
            *home.glob("logs/*/*/.*.part"),
            *unnamed_parts(home / "logs"),
            *home.glob(f"logs/*/{PACKED}/.*.part"),
            *home.glob("tables/*/.writing-*"),
            *_set_aside(home),
        ]
        left_over += [path for folder in self.archives for path in folder.glob(".*.part")]
        for path in left_over:
            if path.stat().st_mtime < before_s:
                self.progress(f"removing {path}")
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _sweep_labelling(self) -> None:
        """Removes what cut-off passes of `freshrank label` have made, which holds records as the logs had them, a day after they began; at
        once where an erasure that is not done yet must be within a day. The next pass begins anew."""
        home, before_s = self.job.home, (self.now_ms - LEFT_OVER_MS) / 1000
        urgent = any(entry.open and self.now_ms >= entry.deadline_ms - LEFT_OVER_MS for entry in self.audit.entries.values())
        for work in home.glob(f"logs/*/{LABEL_WORK}"):
            begun = next(iter(work.glob(LABEL_PLAN)), work)  # each run of the pass touches other files again
            if not urgent and begun.stat().st_mtime >= before_s:
                continue
            with (work.parent / LABEL_LOCK).open("ab") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.labelling.append(str(work.relative_to(home)))
                    continue
                self.progress(f"removing {work}, and the parts of its pass")
                shutil.rmtree(work)
                for path in (*unnamed_parts(home / "logs"), *home.glob("logs/*/*/.*.part")):
                    if path.is_relative_to(work.parent) and path.is_file():  # a folder is a training's that packs
                        path.unlink()

    # What others do, judged.

    def _look_around(self) -> None:
        """What all entries are judged by: state folders, what was set aside, the topics' oldest records, the history of a base."""
        topics, kafka = self.job.topics, self.job.kafka
        self.states = [path.parent for path in self.job.home.glob("state/**/CURRENT") if path.parent.name.isdigit()]
        self.aside = _set_aside(self.job.home)
        names = {"dead letters": topics.dead_letters, "ranking log": topics.rankings}
        self.oldest_ms = {} if kafka is None else {place: oldest_record_ms(kafka, topic) for place, topic in names.items()}
        self.in_history = self._past_in_history()

    def _judge(self, entry: Entry) -> None:
        home, last = self.job.home, entry.last
        folders = [folder for folder in self.states if folder.name == str(last.partition)]
        unpurged = self._remove_idle(entry, [folder for folder in folders if not _purged(folder, last)])
        own = (f"{last.partition}.", f"{last.partition}-")
        unpurged += [path for path in self.aside if path.name.startswith(own)]  # `_sweep` removes them
        waiting = [str(folder.relative_to(home)) for folder in unpurged]
        purged: Status = "due" if waiting else "done" if folders else "absent"
        self._set(entry, "state", purged, f"the worker purges {', '.join(waiting)}" if waiting else "")
        view_there = (home / "view" / str(last.partition)).exists()
        self._set(entry, "view", purged if view_there else "absent", "with the state" if view_there and waiting else "")
        self._set(entry, "standby", "absent", "a standby's own home has its own job and audit")
        self._set(entry, "training arrays", "absent", "packed under this ledger, or not at all")
        self._judge_snapshots(entry)
        held = {place: first_ms is not None and first_ms <= last.append_time_ms for place, first_ms in self.oldest_ms.items()}
        if self.job.kafka is not None:  # a log that is not the topic's any more is in no topic
            first = self.first_offsets.get((last.log_epoch, last.partition))
            held["actions topic"] = first is not None and first <= last.offset
        for place, still in held.items():
            self._set(entry, place, "due" if still else "done", "records from before it are there until the retention" if still else "")
        detail = "bootstrap again from a history without the user" if last.user_id in self.in_history else ""
        self._set(entry, "base history", "due" if detail else "done" if self.bases else "absent", detail)

    def _judge_snapshots(self, entry: Entry) -> None:
        expire, state = self.job.expire_snapshots, entry.places["state"]
        purged_ms = state.at_ms + SNAPSHOT_MARGIN_MS
        if expire is None:
            self._set(entry, "snapshots", "absent")
        elif state.status == "due" or self.now_ms < purged_ms + SNAPSHOT_MARGIN_MS:
            self._set(entry, "snapshots", "due", "older ones are removed when there are some from after the purge")
        elif entry.places["snapshots"].status != "done":
            self.progress("removing snapshots from before the purge")
            expire(purged_ms)
            self._set(entry, "snapshots", "done")

    def _remove_idle(self, entry: Entry, folders: list[Path]) -> list[Path]:
        """Removes state folders that nobody has opened since half of the time was over: they can be rebuilt. Returns those that stay.

        A partition that has moved to another worker leaves its state behind, which no erasure reaches. RocksDB's lock tells whether another
        process uses one; so the job never runs in a worker's own process.
        """
        if self.now_ms < (entry.first.append_time_ms + entry.deadline_ms) // 2:
            return folders
        left = []
        for folder in folders:
            with (folder / "LOCK").open("ab") as lock:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    left.append(folder)
                    continue
                self.progress(f"removing {folder}: no worker uses it, and the erasure of a user is due there")
                shutil.rmtree(folder)
                self.states.remove(folder)
        if not any(folder.name == str(entry.last.partition) for folder in self.states):
            shutil.rmtree(self.job.home / "view" / str(entry.last.partition), ignore_errors=True)  # nobody writes it any more
        return left

    def _set(self, entry: Entry, place: str, status: Status, detail: str = "") -> None:
        self.audit.set(entry, place, status, detail, self.now_ms)


class _ForgetActions:
    """Changes an archive of actions: an erased user's past goes, and what replay needs of it stays.

    A record before the erasure keeps its offset and append time, from which the partition's clock comes, and loses key and value. A record
    behind it with an event time up to it touches the user's row still, and is dropped from it: it becomes an action of the same user
    that says nothing. Erasures stay as they are.
    """

    def __init__(self, log: ParquetLog, erasures: list[Erasure], domain: Domain) -> None:
        self._log, self._domain = log, domain
        self._erased = erased_users(erasures)
        self._offsets = _last_offsets(erasures, log.log_epoch)
        self._keys = {user_key(user): user for user in self._erased}
        self._ids = {user.to_bytes(8, "little"): user for user in self._erased}
        self.count = 0

    def __call__(self, partition: int, records: Records) -> Records | None:
        batch = decode_records(self._log, partition, records, DecodingRules.of(self._domain))
        forgotten = np.zeros(len(records), bool) if records.forgotten is None else records.forgotten.copy()
        keys, values = list(records.keys), list(records.values)
        before = self.count
        horizons_ms = erased_before_ms(self._erased, batch.users)
        for i in np.flatnonzero((batch.verdict == ACTION) & (horizons_ms >= 0)).tolist():
            user, horizon_ms = int(batch.users[i]), int(horizons_ms[i])
            if self._is_past(user, int(records.offsets[i]), int(records.append_time_ms[i])):
                keys[i], values[i], forgotten[i] = None, None, True
                self.count += 1
            elif user in self._offsets and batch.events["event_time_ms"][i] <= horizon_ms and values[i] != _says_nothing(user):
                values[i] = _says_nothing(user)
                self.count += 1
        for i in np.flatnonzero((batch.verdict == REJECTED) & ~forgotten).tolist():
            whose = self._user_of_rejected(keys[i], values[i])
            if whose is not None and self._is_past(whose, int(records.offsets[i]), int(records.append_time_ms[i])):
                keys[i], values[i] = None, None
                self.count += 1
        if self.count == before:
            return None
        return replace(records, keys=keys, values=values, forgotten=forgotten)

    def _is_past(self, user: int, offset: int, append_time_ms: int) -> bool:
        """Whether a record came before the erasure: by offset in the erasure's own log, else by time."""
        at = self._offsets.get(user)
        return offset < at if at is not None else append_time_ms <= self._erased[user]

    def _user_of_rejected(self, key: bytes | None, value: bytes | None) -> int | None:
        """Whose a record is that no decoder accepted, by its key, by what it says in any encoding, or by the id anywhere in its value."""
        if key in self._keys:
            return self._keys[key]
        message = read_action(value or b"")
        if not isinstance(message, str) and message.HasField("user_id") and message.user_id in self._erased:
            return int(message.user_id)
        return next((user for data, user in self._ids.items() if data in (value or b"")), None)


class _ForgetRankings:
    """Changes an archive of rankings: those of an erased user from before the erasure lose key and value, and are counted by replay. So do
    rankings of a person who had the erased user as a further identity: they hold actions of that user."""

    def __init__(self, log: ParquetLog, erasures: list[Erasure]) -> None:
        self._log, self._erasures = log, erasures
        self._erased = erased_users(erasures)
        self._keys = {user_key(user): user for user in self._erased}
        self.count = 0

    def __call__(self, _: int, records: Records) -> Records | None:
        found = [i for i, key in enumerate(records.keys) if any(self._is_past(records, i, user) for user in self._named(key, records, i))]
        if not found:
            return None
        forgotten = np.zeros(len(records), bool) if records.forgotten is None else records.forgotten.copy()
        keys, values = list(records.keys), list(records.values)
        for i in found:
            keys[i], values[i], forgotten[i] = None, None, True
        self.count += len(found)
        return replace(records, keys=keys, values=values, forgotten=forgotten)

    def _named(self, key: bytes | None, records: Records, i: int) -> list[int]:
        """The erased users whose actions a ranking may hold."""
        named = [self._keys[key]] if key in self._keys else []
        with suppress(DecodeError):
            identities = RankingRecord.FromString(records.values[i] or b"").request.identities
            named += [user for user in identities if user in self._erased]
        return named

    def _is_past(self, records: Records, i: int, user: int) -> bool:
        if records.append_time_ms[i] <= self._erased[user]:
            return True
        try:
            watermark = RankingRecord.FromString(records.values[i] or b"").watermark
        except DecodeError:
            return False
        # Of further identities, only the positions of the erased user's own partition can be compared.
        own = {erasure.partition for erasure in self._erasures if erasure.user_id == user}
        offsets = {at.log_epoch: _last_offsets(self._erasures, at.log_epoch).get(user, -1) for at in watermark}
        return any(at.partition in own and at.offset < offsets[at.log_epoch] for at in watermark)


def _says_nothing(user: int) -> bytes:
    return encode_action(user_id=user, entity_kind=1, entity_id=0, action=1, event_time_ms=1, event_id=0)


def _last_offsets(erasures: list[Erasure], log_epoch: int) -> dict[int, int]:
    """Offset of each user's last erasure in this log."""
    offsets: dict[int, int] = {}
    for erasure in erasures:
        if erasure.log_epoch == log_epoch:
            offsets[erasure.user_id] = max(offsets.get(erasure.user_id, -1), erasure.offset)
    return offsets


def _name(erasure: Erasure) -> str:
    return f"{erasure.log_epoch:016x}:{erasure.partition}:{erasure.offset}"


def _set_aside(home: Path) -> list[Path]:
    """State folders that a worker has replaced, and restored or checkpointed ones that a killed worker did not come to use."""
    return [path for path in home.glob("state/**/*") if path.is_dir() and _ASIDE.fullmatch(path.name)]


def _is_rankings(log: ParquetLog, topics: Topics) -> bool:
    return log.topic == topics.rankings or (log.topic != topics.actions and log.folder.name == "rankings")


def _purged(folder: Path, erasure: Erasure) -> bool:
    """Whether a partition's state folder, and the view beside it, hold nothing any more of what was erased."""
    said = read_purged(folder / PURGED_FILE)
    return said is not None and said.log_epoch == erasure.log_epoch and not said.whole and said.purged_offset >= erasure.offset


def _read_cursor(path: Path) -> dict[str, int]:
    try:
        cursor: dict[str, int] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # everything is searched again; what the ledger has is not added twice
    return cursor


def _write_cursor(path: Path, cursor: dict[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(cursor, indent=1) + "\n", "utf-8")
    partial.replace(path)

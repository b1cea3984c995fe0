"""Replay: rebuilds every logged ranking from the log of actions and the release files, and compares it byte for byte.

It shares no state with the server: rows come from the records up to the logged watermark, tensors from the logged release and generations.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from deploy.base_file import read_base_file, write_base_file
from deploy.processes import kafka_config, topics
from deploy.settings import Settings
from features.actions import REJECTED
from features.base import Base, BaseError, BaseRecords
from features.ids import partition_of, string_id, user_key
from features.pack import Packed, Packer, RankInputs
from features.parity import PartitionLog, Report, Tally, missing_events
from features.person import events_of_rows
from features.request import RequestError, inputs_from_request
from features.sequence import NEVER_ERASED, Events, decode_row, definition
from features.tables import TableError, TableSet
from inference.release import Release, ReleaseError, open_release, release_folder
from protos.v1.actions_pb2 import Position
from protos.v1.ranking_pb2 import SEQUENCE_SOURCE_NONE, TIER_MODEL, RankingRecord
from streams.archive import DecodingRules, KafkaLog, ParquetLog, RecordLog, decode_records, write_archive
from streams.history import open_base, read_base
from streams.kafka import KafkaConfig, Topics

if TYPE_CHECKING:
    from inference.rescore import Rescorer

ACTIONS, RANKINGS = "actions", "rankings"
"""Folders of an archive: one for each topic."""


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay. The logs come from `archive` where it is given, else from `kafka`.

    releases, tables: folders of the release files. archive: folder that `archive_logs` wrote. users_share: share of users, chosen by the
    hash of their key, so that all rankings of a chosen user are replayed. base, history: the base that the state stands on, and where its
    history is; the log says which base it must be. score_sample: how many rankings are scored again, chosen by
    `seed`; device: where ("cpu", "cuda"); served_on: where they were computed ("cpu", "cuda", "auto"), which says how far scores may be
    apart. progress: called with (events read, events there are). only: which records are replayed, of all
    others nothing is counted; on_rebuilt: called with each as it was rebuilt.
    """

    releases: Path
    tables: Path
    archive: Path | None = None
    kafka: KafkaConfig | None = None
    topics: Topics = field(default_factory=Topics)
    base: Base | None = None
    history: str = ""
    users_share: float = 1.0
    score_sample: int = 100
    seed: int = 0
    device: str = "cpu"
    served_on: str = "auto"
    progress: Callable[[int, int], None] | None = None
    only: Callable[[RankingRecord], bool] | None = None
    on_rebuilt: Callable[["Rebuilt"], None] | None = None


def replay_options(settings: Settings, archive: Path | None, history: str, **given: Any) -> ReplayOptions:
    """What a command replays: `archive`, or the Kafka that the settings name or that runs in their home; on the base that was noted there,
    whose history lies at `history` ("": where it was). `given`: other fields; served_on "auto" is what the settings say of models.

    Raises:
        StackNotRunningError: no Kafka is named, and none runs in the home.
    """
    from deploy.stack import running  # which starts everything, and needs all of it

    source: dict[str, Any] = {"archive": archive}
    if archive is None:
        settings = running(settings, needs="kafka")
        source = {"kafka": kafka_config(settings), "topics": topics(settings)}
    based = read_base_file(settings.home if archive is None else archive)
    if based is not None:
        source |= {"base": based[0], "history": history or based[1]}
    if given.get("served_on", "auto") == "auto":
        given["served_on"] = settings.model_device
    return ReplayOptions(releases=settings.home / "releases", tables=settings.home / "tables", **source, **given)


@contextmanager
def open_logs(options: ReplayOptions) -> Iterator[tuple[RecordLog, RecordLog]]:
    """(rankings, actions). Rankings are opened first: every watermark among them is then inside the log of actions as it was opened."""
    logs: list[KafkaLog | ParquetLog] = []
    try:
        for folder, topic, base in ((RANKINGS, options.topics.rankings, ""), (ACTIONS, options.topics.actions, options.topics.base)):
            if options.archive is not None:
                logs.append(ParquetLog(options.archive / folder))
            elif options.kafka is not None:
                logs.append(KafkaLog(options.kafka, topic, base))
            else:
                raise ValueError("archive: neither an archive's folder nor Kafka is given")
        given = options.base.id if options.base is not None else ""
        if logs[1].base != given:
            raise BaseError(
                f"the log of actions stands on base {logs[1].base or 'none'}, given is {given or 'none'}: rows cannot be rebuilt without "
                "the base.json that `freshrank bootstrap` wrote for it"
            )
        yield logs[0], logs[1]
    finally:
        for log in logs:
            log.close()


def archive_logs(options: ReplayOptions, folder: Path) -> None:
    """Copies both topics, whole, into `folder`: what a later replay needs beside the release files. Raises ArchiveError, StreamError."""
    with open_logs(options) as (rankings, actions):
        write_archive(rankings, folder / RANKINGS)
        write_archive(actions, folder / ACTIONS, base=options.topics.base)
        if options.base is not None:
            write_base_file(folder, options.base, options.history)


def replay(options: ReplayOptions) -> Report:
    """Replays and reports; `report.ok` is what the exit code of the command says.

    Raises:
        ArchiveError, StreamError: a log cannot be read. Everything wrong with single rankings, releases or tables stands in the report.
    """
    started = time.monotonic()
    with open_logs(options) as (rankings, actions):
        return _Replay(options, rankings, actions).run(started)


@dataclass(frozen=True)
class Rebuilt:
    """A logged ranking, and its inputs and tensors as the logs and the release files give them; agree: whether no byte of them differs."""

    record: RankingRecord
    release: Release
    packer: Packer
    inputs: RankInputs
    packed: Packed
    agree: bool


class _Excluded(Exception):  # noqa: N818 - not an error: it carries a reason up to where it is counted
    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass(eq=False)
class _Logged:
    """A logged ranking, and what is rebuilt of each of its identities (user_id first), partition by partition."""

    record: RankingRecord
    users: tuple[int, ...]
    rows: dict[int, bytes] = field(default_factory=dict)
    later: dict[int, Events] = field(default_factory=dict)
    """Events behind the watermark that the identity's row has not erased."""
    excluded: bool = False

    def offset(self, i: int) -> int:
        """Where identity i was read; -1 where no state was."""
        return self.record.watermark[i].offset if self.record.watermark else -1


_Wanted = dict[int, dict[int, list[tuple[_Logged, int]]]]
"""(ranking, which of its identities) by partition and user, in the order of the watermarks."""


class _Replay:
    """One run: reads the rankings, then the actions partition by partition."""

    def __init__(self, options: ReplayOptions, rankings: RecordLog, actions: RecordLog) -> None:
        self.options, self.rankings, self.actions = options, rankings, actions
        self.tally = Tally()
        self.report = self.tally.report
        self.report.log = {
            "topic": actions.topic,
            "epoch": f"{actions.log_epoch:016x}",
            "partitions": len(actions.partitions),
            "rankings": rankings.topic,
        }
        self.scoring_s = 0.0
        self._base: BaseRecords | None = None
        self._releases: dict[str, Release | ReleaseError] = {}
        self._packers: dict[tuple[object, ...], Packer | TableError] = {}
        self._rescorers: dict[str, Rescorer] = {}
        self._to_score: set[int] = set()
        self._events_total = 0

    def run(self, started: float) -> Report:
        wanted = self._read_rankings()
        own = [logged for users in wanted.values() for parts in users.values() for logged, i in parts if not i]
        scored = [id(logged.record) for logged in own if logged.record.tier == TIER_MODEL]
        sample = min(self.options.score_sample, len(scored))
        picks = np.random.default_rng(self.options.seed).choice(len(scored), sample, replace=False) if sample else ()
        self._to_score = {scored[i] for i in picks}
        self._events_total = sum(end - start for p, (start, end) in self.actions.partitions.items() if p in wanted)
        self._read_base(wanted)
        for partition in sorted(wanted):
            self._replay_partition(partition, wanted[partition])
        return self.tally.finish(elapsed_s=time.monotonic() - started, scoring_s=self.scoring_s)

    def _read_base(self, wanted: _Wanted) -> None:
        """What the base says of the users whose rankings are replayed."""
        base = self.options.base
        if base is None:
            return
        started = time.monotonic()
        with open_base(base, self.options.history) as history:
            self._base = read_base(base, history, {user for users in wanted.values() for user in users})
        self.report.log |= {"base": base.id, "base_events": base.events}
        self.report.reading_s += time.monotonic() - started

    def _read_rankings(self) -> _Wanted:
        """The rankings that can be replayed."""
        wanted: _Wanted = {}
        for partition in sorted(self.rankings.partitions):
            for records in self.rankings.read(partition):
                forgotten = np.zeros(len(records), bool) if records.forgotten is None else records.forgotten
                if self.options.users_share == 1.0 and self.options.only is None:  # of a share it cannot be told any more whose they were
                    self.report.rankings_read += int(forgotten.sum())
                    for _ in range(int(forgotten.sum())):
                        self.tally.exclude("erased_since", "taken out of the archive")
                for offset, value in ((int(records.offsets[i]), records.values[i]) for i in np.flatnonzero(~forgotten)):
                    try:
                        record = RankingRecord.FromString(value or b"")
                    except DecodeError as error:
                        if self.options.only is not None:
                            continue
                        self.report.rankings_read += 1
                        self.tally.exclude("undecodable", f"{self.rankings.topic} partition {partition} offset {offset}: {error}")
                        continue
                    user_id = record.request.user_id
                    if self.options.only is not None and not self.options.only(record):
                        continue
                    if string_id(user_key(user_id).decode()) >= self.options.users_share * 2**64:
                        continue
                    self.report.rankings_read += not record.shadow
                    self.report.shadows_read += record.shadow
                    try:
                        self._check(record)
                    except _Excluded as excluded:
                        self.tally.exclude(excluded.reason, str(excluded), record)
                    else:
                        logged = _Logged(record, (user_id, *record.request.identities))
                        for i, user in enumerate(logged.users):
                            wanted.setdefault(self._partition_of(user), {}).setdefault(user, []).append((logged, i))
        for users in wanted.values():
            for of_user in users.values():
                of_user.sort(key=lambda part: part[0].offset(part[1]))
        return wanted

    def _partition_of(self, user_id: int) -> int:
        return partition_of(user_key(user_id), len(self.actions.partitions))

    def _check(self, record: RankingRecord) -> None:
        """Raises _Excluded where the logs and the release files at hand cannot answer for this ranking."""
        users = (record.request.user_id, *record.request.identities)
        if len(record.watermark) != (0 if record.sequence_source == SEQUENCE_SOURCE_NONE else len(users)):
            raise _Excluded("undecodable", f"{len(record.watermark)} watermark positions for {len(users)} identities")
        if not record.digest:
            if record.tier == TIER_MODEL:
                raise _Excluded("digest_missing", "no digest")
            raise _Excluded("not_packed", "no digest")
        for user_id, position in zip(users, record.watermark, strict=False):
            self._check_position(user_id, position)
        release = self._release(record)
        if record.sequence_fingerprint != release.sequence_fingerprint:
            ours = f"{release.sequence_fingerprint:016x}"
            raise _Excluded("definition_differs", f"state {record.sequence_fingerprint:016x}, the release's definition is {ours}")

    def _check_position(self, user_id: int, position: Position) -> None:
        if position.log_epoch != self.actions.log_epoch:
            raise _Excluded("other_log", f"epoch {position.log_epoch:016x}, this log is {self.actions.log_epoch:016x}")
        partition = self._partition_of(user_id)
        if position.partition != partition or partition not in self.actions.partitions:
            raise _Excluded("other_partition", f"partition {position.partition}, the user's records are in {partition}")
        start, end = self.actions.partitions[partition]
        if position.offset >= end:
            raise _Excluded("beyond_log_end", f"offset {position.offset}, the log ends at {end - 1}")
        if start > 0 and position.offset >= 0:
            raise _Excluded("log_cut", f"the log begins at offset {start}")

    def _release(self, record: RankingRecord) -> Release:
        found = self._releases.get(record.release_id)
        if found is None:
            try:
                found = open_release(release_folder(self.options.releases, record.release_id))
            except ReleaseError as error:
                found = error
            self._releases[record.release_id] = found
        if isinstance(found, ReleaseError):
            raise _Excluded("release_refused", str(found))
        if found.ranker != record.request.ranker:
            raise _Excluded("release_refused", f"the release is for ranker {found.ranker!r}, the request for {record.request.ranker!r}")
        return found

    def _packer(self, release: Release, record: RankingRecord) -> Packer:
        generations = dict(record.generations)
        key = (release.release_id, *sorted(generations.items()))
        found = self._packers.get(key)
        if found is None:
            try:
                found = self._open_packer(release, generations)
            except TableError as error:
                found = error
            self._packers[key] = found
        if isinstance(found, TableError):
            raise _Excluded("tables_refused", str(found))
        return found

    def _open_packer(self, release: Release, generations: dict[str, str]) -> Packer:
        tables = TableSet.open(self.options.tables, release.domain, release.ranker, generations, verify=True)
        if tables.generations != generations:
            raise TableError(f"logged generations {generations}, the release needs {tables.generations}")
        return Packer(release.domain, release.ranker, tables)

    def _replay_partition(self, partition: int, users: dict[int, list[tuple[_Logged, int]]]) -> None:
        started = time.monotonic()
        logs = self._read_actions(partition, users)
        self.report.reading_s += time.monotonic() - started
        for rules, log in logs.items():
            for user_id, parts in users.items():
                mine = [part for part in parts if DecodingRules.of(self._release(part[0].record).domain) == rules]
                self._rebuild_user(log, user_id, mine)

    def _read_actions(self, partition: int, users: dict[int, list[tuple[_Logged, int]]]) -> dict[DecodingRules, PartitionLog]:
        """The partition's records of these users, decoded by the rules of each release that they were ranked with."""
        of_releases = {DecodingRules.of(self._release(logged.record).domain) for parts in users.values() for logged, _ in parts}
        logs = {rules: self._partition_log(partition, users) for rules in sorted(of_releases)}
        start, end = self.actions.partitions[partition]
        found = 0
        for records in self.actions.read(partition):
            for rules, log in logs.items():
                batch = decode_records(self.actions, partition, records, rules)
                log.add(batch)
            found += len(records)
            self.report.events_read += len(records)
            self.report.events_rejected += int((batch.verdict == REJECTED).sum())
            if self.options.progress is not None:
                self.options.progress(self.report.events_read, self._events_total)
        self.report.offsets_without_record += end - start - found
        return logs

    def _partition_log(self, partition: int, users: Collection[int]) -> PartitionLog:
        base = self._base
        if base is None:
            return PartitionLog(users)
        epoch = self.actions.log_epoch
        return PartitionLog(
            users, base_clock_ms=base.base.clock_ms, base_row=lambda what, user_id: base.row(what, user_id, epoch, partition)
        )

    def _rebuild_user(self, log: PartitionLog, user_id: int, parts: list[tuple[_Logged, int]]) -> None:
        """Rows of one identity at the watermarks of the rankings that read it; a ranking that has all of its rows then is compared."""
        erased_at = log.last_erasure(user_id)
        by_definition: dict[int, list[tuple[_Logged, int]]] = {}
        for logged, i in parts:
            if logged.excluded:
                continue
            if erased_at > logged.offset(i):
                logged.excluded = True
                self.tally.exclude("erased_since", f"erased at offset {erased_at}", logged.record)
            else:
                by_definition.setdefault(logged.record.sequence_fingerprint, []).append((logged, i))
        for same in by_definition.values():
            release = self._release(same[0][0].record)
            what = definition(release.domain, release.domain.ranker[release.ranker].sequence)
            rows = log.rows_at(what, user_id, [logged.offset(i) for logged, i in same])
            for (logged, i), row in zip(same, rows, strict=True):
                logged.rows[i] = row if logged.record.watermark else b""
                later = log.later_events(user_id, logged.offset(i), logged.record.request.request_time_ms)
                erased_before_ms = decode_row(row).erased_before_ms if row else NEVER_ERASED
                logged.later[i] = later[later["event_time_ms"] > erased_before_ms]
                if len(logged.rows) == len(logged.users):
                    try:
                        self._replay_one(logged)
                    except _Excluded as excluded:
                        self.tally.exclude(excluded.reason, str(excluded), logged.record)

    def _replay_one(self, logged: _Logged) -> None:
        record = logged.record
        release, request = self._release(record), record.request
        packer, sequence = self._packer(release, record), release.domain.ranker[release.ranker].sequence
        rows = [logged.rows[i] for i in range(len(logged.users))]
        events, erased_before_ms = events_of_rows(release.domain, sequence, logged.users, rows)
        try:
            inputs = inputs_from_request(release.domain, request, events, erased_before_ms=erased_before_ms)
        except RequestError as error:
            raise _Excluded("request_refused", str(error)) from error
        packed = packer.pack(inputs)
        row, *further = rows if record.watermark else (b"",)
        agree = self.tally.compare(record, row, packer, packed, further)
        if self.options.on_rebuilt is not None:
            self.options.on_rebuilt(Rebuilt(record, release, packer, inputs, packed, agree))
        later: npt.NDArray[np.void] = np.concatenate([logged.later[i] for i in range(len(rows))])
        # Each identity's own erasure has been applied to `later`. A shadow saw what its ranking saw.
        fresh = missing_events(
            definition(release.domain, sequence), packer, dataclasses.replace(inputs, erased_before_ms=NEVER_ERASED), later
        )
        if not record.shadow:
            self.tally.add_freshness(request.request_time_ms, *fresh)
        logged.rows.clear()
        logged.later.clear()
        if agree and id(record) in self._to_score:
            started = time.monotonic()
            self.tally.compare_scores(record, self._rescorer(release).scores(packed.tensors, request.head_weights, record.score_formula))
            self.scoring_s += time.monotonic() - started

    def _rescorer(self, release: Release) -> "Rescorer":
        from inference.rescore import Rescorer  # PyTorch takes seconds and 300 MB: only where scores are asked for

        if release.release_id not in self._rescorers:
            self._rescorers[release.release_id] = Rescorer(release, device=self.options.device, served_on=self.options.served_on)
        return self._rescorers[release.release_id]

"""One bucket of a labelling pass: its users' rankings joined with what was done, each list's inputs proved, as runs in the log's order."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf.message import DecodeError

from deploy.replay import ACTIONS, RANKINGS, Rebuilt, ReplayOptions, replay
from features.actions import EVENT_DTYPE
from features.domain import Domain, Feature
from features.erasures import Erasure
from features.ids import U64, partitions_of
from features.labels import OUTCOMES, Joined, Lists, Named, Rules, join, named
from features.log_erasure import REQUEST_DTYPE
from features.logs import WEIGHTED, LoggedActions, feature_type, impressions_schema, logged_features, served_schema
from features.person import events_of_rows, rows_digest
from features.ports import SequenceCorruptError
from features.runs import write_run
from features.sequence import NEVER_ERASED
from inference.experiments import Choice
from inference.release import Release, ReleaseError, open_release, release_folder
from protos.v1.ranking_pb2 import FeatureColumn, RankingRecord
from streams.archive import DecodingRules, ParquetLog, decode_records
from streams.log_buckets import bucket_of, logged_actions

KNOWN = "known.parquet"
"""In a bucket's folder: rows of the table `served` that earlier passes wrote, of days that may change."""
IMPRESSIONS_RUN, SERVED_RUN, DONE = "impressions.run", "served.run", "done.json"
SHARED = "shared.npz"
"""What became of actions that stand in several buckets."""
STAYS = "stays.npy"
"""REQUEST_DTYPE of the lists whose rows stay as an earlier pass wrote them."""

Key = tuple[int, int, int, int]
"""user_id, request_id, request_time_ms, served_time_ms: what a record of the ranking log is known by, also in a copy of it."""

_CANDIDATE_BYTES, _LIST_BYTES = 100, 5_000


@dataclass(frozen=True)
class Work:
    """What all buckets of a pass share. Lists from before `closed_before_ms` are joined with the others, and not written.

    replay: of which each bucket takes its own archive. erasures: all there are. foreign: entries of lists of all buckets on users whom
    several buckets name (`shared`, ascending). whole_from_ms: append time by partition of the actions, from which on none is gone.
    """

    domain: Domain
    rules: Rules
    until_ms: int
    closed_before_ms: int
    buckets: int
    memory_bytes: int
    all_seen: bool
    replay: ReplayOptions
    erasures: LoggedActions
    shared: U64
    foreign: Named
    whole_from_ms: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Proved:
    """The inputs of a list, as bytes of EVENT_DTYPE and erased_before_ms."""

    events: bytes
    erased_before_ms: int


@dataclass
class _Rankings:
    """A bucket's rankings, in the order of its archive, and where they stand in the ranking log."""

    records: list[RankingRecord] = field(default_factory=list)
    partitions: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    undecodable: int = 0


def named_shared(folder: Path, domain: Domain, rules: Rules, erasures: LoggedActions, shared: U64) -> Named:
    """`features.labels.named` of a bucket's lists, on users whom several buckets name."""
    found = named(_lists(domain, _read_rankings(folder, domain)), erasures, rules)
    kept = np.isin(found.who, shared)
    return Named(found.who[kept], found.user_id[kept], found.request_time_ms[kept])


def fold_bucket(work: Work, number: int, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Joins a bucket and leaves its runs and counts in its folder, DONE last.

    Raises:
        ArchiveError: its archive cannot be read.
    """
    rankings = _read_rankings(folder, work.domain)
    lists = _lists(work.domain, rankings)
    actions = _read_actions(work, number, folder, lists)
    logged = len(actions)
    actions = _with_ledger(actions, work.erasures, lists)
    mine = named(lists, actions, work.rules)
    others = Named(*(np.concatenate(parts) for parts in zip(mine, work.foreign, strict=True)))
    joined = join(lists, actions, work.rules, work.until_ms, others)
    known = pq.read_table(folder / KNOWN) if (folder / KNOWN).exists() else served_schema(work.domain).empty_table()
    proved, counts = _prove(work, folder, rankings, lists, joined, known, progress)
    earlier = {key for key, _ in _from_known(known)}
    torn = {_key(rankings.records[one]) for one in joined.lists[_is_torn(work, folder, lists)[joined.lists]].tolist()}
    stays = (earlier & torn) | (earlier - {_key(record) for record in rankings.records})
    np.save(folder / STAYS, np.array([(request, user, time_ms) for user, request, time_ms, _ in sorted(stays)], REQUEST_DTYPE))
    written = proved.keys() - stays
    kept = np.array([i for i, one in enumerate(joined.lists.tolist()) if _key(rankings.records[one]) in written], np.int64)
    kept = kept[lists.request_time_ms[joined.lists[kept]] >= work.closed_before_ms]
    if work.all_seen:
        joined = replace(joined, seen=np.ones(len(joined.seen), bool))
    impressions, served = _tables(work.domain, rankings, lists, joined, kept, proved)
    batch_rows = max(16, work.memory_bytes // (4 * _CANDIDATE_BYTES * work.buckets))
    write_run(folder / IMPRESSIONS_RUN, impressions, "request_time_ms", batch_rows)
    write_run(folder / SERVED_RUN, served, "request_time_ms", max(16, batch_rows * _CANDIDATE_BYTES // _LIST_BYTES))
    counts |= _counts(work, rankings, joined, kept, served, known)
    counts |= {"stays": len(stays), "stays_until_ms": max((key[2] for key in stays), default=0), "torn": len(torn & written)}
    outcome, is_shared = joined.outcome[:logged], np.isin(actions.users[:logged], work.shared)
    counts["outcomes"] = np.bincount(outcome[~is_shared], minlength=len(OUTCOMES)).tolist()
    place = {name: getattr(actions, name)[:logged][is_shared] for name in ("partition", "offset")}
    np.savez(folder / SHARED, outcome=outcome[is_shared], **place)
    partial = folder / f".{DONE}"
    partial.write_text(json.dumps(counts), "utf-8")
    partial.replace(folder / DONE)


# Reading


def _read_rankings(folder: Path, domain: Domain) -> _Rankings:
    found, log = _Rankings(), ParquetLog(folder / RANKINGS)
    for partition in sorted(log.partitions):
        for records in log.read(partition):
            for offset, value in zip(records.offsets.tolist(), records.values, strict=True):
                try:
                    record = RankingRecord.FromString(value or b"")
                except DecodeError:
                    found.undecodable += 1
                    continue
                if not _is_whole(record, domain):
                    found.undecodable += 1
                    continue
                found.records.append(record)
                found.partitions.append(partition)
                found.offsets.append(offset)
    return found


def _is_whole(record: RankingRecord, domain: Domain) -> bool:
    """Whether a record has what a list needs: candidates with kinds, a score each, a watermark for each identity or none at all."""
    request = record.request
    count = len(request.candidate_ids) // 8
    return (
        count > 0
        and len(record.scores) == 4 * count
        and len(request.candidate_kinds) in (0, count)
        and (bool(request.candidate_kinds or request.candidate_kind) or len(domain.entities) == 1)
        and len(record.watermark) in (0, 1 + len(request.identities))
    )


def _lists(domain: Domain, rankings: _Rankings) -> Lists:
    """The rankings as the join takes them, candidates in the order of the request."""
    records = rankings.records
    requests = [record.request for record in records]
    only_kind = next(iter(domain.entities.values()))
    ids = [np.frombuffer(request.candidate_ids, "<u8") for request in requests]
    kinds = [
        np.frombuffer(request.candidate_kinds, np.uint8)
        if request.candidate_kinds
        else np.full(len(ids[i]), request.candidate_kind or only_kind, np.uint8)
        for i, request in enumerate(requests)
    ]
    who = [identity for request in requests for identity in (request.user_id, *request.identities)]
    read = [position for record in records for position in _watermark(record)]
    return Lists(
        request_id=np.array([request.request_id for request in requests], np.uint64),
        request_time_ms=np.array([request.request_time_ms for request in requests], np.int64),
        served_time_ms=np.array([record.served_time_ms for record in records], np.int64),
        shadow=np.array([record.shadow for record in records], bool),
        partition=np.array(rankings.partitions, np.int32),
        offset=np.array(rankings.offsets, np.int64),
        starts=_starts([len(each) for each in ids]),
        entity_kind=_joined(kinds, np.uint8),
        entity_id=_joined(ids, np.uint64),
        position=_joined([_positions(record) for record in records], np.int32),
        who_starts=_starts([1 + len(request.identities) for request in requests]),
        who=np.array(who, np.uint64),
        log_epoch=np.array([epoch for epoch, _ in read], np.uint64),
        offset_read=np.array([offset for _, offset in read], np.int64),
    )


def _watermark(record: RankingRecord) -> list[tuple[int, int]]:
    """(log epoch, offset) of each identity; 0 and -1 where no state was."""
    read = [(position.log_epoch, position.offset) for position in record.watermark]
    return read or [(0, -1)] * (1 + len(record.request.identities))


def _positions(record: RankingRecord) -> npt.NDArray[np.int32]:
    """Place of each candidate as it was answered: by score, as far as the arm did not shuffle it."""
    order = Choice(shuffle_bound=record.shuffle_bound).order(np.frombuffer(record.scores, "<f4"), record.request.request_id)
    positions = np.empty(len(order), np.int32)
    positions[order] = np.arange(len(order))
    return positions


def _read_actions(work: Work, number: int, folder: Path, lists: Lists) -> LoggedActions:
    """The bucket's actions: of its own users, and of those whom its lists name."""
    log = ParquetLog(folder / ACTIONS)
    named_users, parts = np.unique(lists.who), []
    for partition in sorted(log.partitions):
        for records in log.read(partition):
            batch = decode_records(log, partition, records, DecodingRules.of(work.domain))
            found = logged_actions(batch)
            parts.append(_take(found, (bucket_of(found.users, work.buckets) == number) | np.isin(found.users, named_users)))
    return concatenated(parts)


def _is_torn(work: Work, folder: Path, lists: Lists) -> npt.NDArray[np.bool_]:
    """Lists of which retention, or a move to another log, has taken records of their users from behind what was read for them: bool [r].
    Some of their answers may be among these."""
    log = ParquetLog(folder / ACTIONS)
    place = partitions_of(lists.who, len(log.partitions))
    starts = np.array([span.start for _, span in sorted(log.partitions.items())], np.int64)[place]
    of = np.repeat(np.arange(len(lists)), np.diff(lists.who_starts))
    by_time = (lists.log_epoch != 0) | (lists.request_time_ms[of] < work.whole_from_ms[place])
    torn = np.zeros(len(lists), bool)
    torn[of[np.where(lists.log_epoch == log.log_epoch, lists.offset_read + 1 < starts, by_time)]] = True
    return torn


def _with_ledger(actions: LoggedActions, erasures: LoggedActions, lists: Lists) -> LoggedActions:
    """The actions and those erasures on users whom the lists name that are not among them."""
    there = set(zip(*(column[actions.erase].tolist() for column in _places(actions)), strict=True))
    more = np.array([place not in there for place in zip(*(column.tolist() for column in _places(erasures)), strict=True)], bool)
    return concatenated([actions, _take(erasures, more & np.isin(erasures.users, lists.who))])


def _places(actions: LoggedActions) -> tuple[npt.NDArray[Any], ...]:
    return actions.log_epoch, actions.partition, actions.offset


def _take(actions: LoggedActions, chosen: npt.NDArray[Any]) -> LoggedActions:
    return LoggedActions(*(column[chosen] for column in vars(actions).values()))


def concatenated(parts: list[LoggedActions]) -> LoggedActions:
    """Several as one."""
    empty = LoggedActions.imported(np.zeros(0, np.uint64), np.zeros(0, EVENT_DTYPE), np.zeros(0, np.int64))
    return LoggedActions(*(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in [empty, *parts]), strict=True)))


def ledger_actions(ledger: list[Erasure]) -> LoggedActions:
    """The ledger's erasures as records of the log."""
    events = np.zeros(len(ledger), EVENT_DTYPE)
    events["event_id"] = [erasure.event_id for erasure in ledger]
    return LoggedActions(
        users=np.array([erasure.user_id for erasure in ledger], np.uint64),
        events=events,
        append_time_ms=np.array([erasure.append_time_ms for erasure in ledger], np.int64),
        log_epoch=np.array([erasure.log_epoch for erasure in ledger], np.uint64),
        partition=np.array([erasure.partition for erasure in ledger], np.int32),
        offset=np.array([erasure.offset for erasure in ledger], np.int64),
        erase=np.ones(len(ledger), bool),
    )


# What a list's inputs were


def _key(record: RankingRecord) -> Key:
    request = record.request
    return request.user_id, request.request_id, request.request_time_ms, record.served_time_ms


def _prove(
    work: Work,
    folder: Path,
    rankings: _Rankings,
    lists: Lists,
    joined: Joined,
    known: pa.Table,
    progress: Callable[[int, int], None],
) -> tuple[dict[Key, _Proved], dict[str, Any]]:
    """The inputs of the lists to be written: as an earlier pass proved them, as the record brought them along, or rebuilt by replay."""
    wanted = {
        _key(rankings.records[one]): rankings.records[one]
        for one in joined.lists.tolist()
        if lists.request_time_ms[one] >= work.closed_before_ms
    }
    proved = {key: proof for key, proof in _from_known(known) if key in wanted}
    counts = {"rows_known": len(proved), "differs": 0}
    releases: dict[str, Release | None] = {}
    for key, record in wanted.items():
        if key not in proved and (inline := _from_inline(record, work.replay.releases, releases)) is not None:
            proved[key] = inline
    counts["rows_inline"] = len(proved) - counts["rows_known"]
    missing = wanted.keys() - proved.keys()

    def keep(rebuilt: Rebuilt) -> None:
        if rebuilt.agree:
            proved[_key(rebuilt.record)] = _Proved(rebuilt.inputs.events.tobytes(), rebuilt.inputs.erased_before_ms)

    excluded: dict[str, int] = {}
    if missing:
        options = replace(work.replay, archive=folder, users_share=1.0, score_sample=0, progress=progress, on_rebuilt=keep)
        report = replay(replace(options, only=lambda record: not record.shadow and _key(record) in missing))
        counts["differs"], excluded = report.rankings_different, report.excluded
    counts["rows_rebuilt"] = len(missing & proved.keys())
    return proved, counts | {"excluded": excluded, "unproved": len(missing - proved.keys())}


def _from_known(known: pa.Table) -> Iterator[tuple[Key, _Proved]]:
    columns = ("user_id", "request_id", "request_time_ms", "served_time_ms", "events", "erased_before_ms")
    for *key, events, erased_before_ms in zip(*(known[name].to_pylist() for name in columns), strict=True):
        yield (key[0], key[1], key[2], key[3]), _Proved(events, erased_before_ms)


def _from_inline(record: RankingRecord, folder: Path, releases: dict[str, Release | None]) -> _Proved | None:
    """Of the sampled users: the rows as read, which the record's digest proves. Where no state answered there were none."""
    if not record.watermark:
        return _Proved(b"", NEVER_ERASED) if record.row_digest == rows_digest([b""]) else None
    rows = [record.inline_row, *record.inline_identity_rows]
    if not record.inline or record.row_digest != rows_digest(rows):
        return None
    if record.release_id not in releases:
        try:
            releases[record.release_id] = open_release(release_folder(folder, record.release_id))
        except ReleaseError:  # replay says so
            releases[record.release_id] = None
    release = releases[record.release_id]
    if release is None or record.sequence_fingerprint != release.sequence_fingerprint:
        return None
    try:
        users = (record.request.user_id, *record.request.identities)
        events, erased_before_ms = events_of_rows(release.domain, release.domain.ranker[release.ranker].sequence, users, rows)
    except (SequenceCorruptError, ValueError):
        return None
    return _Proved(events.tobytes(), erased_before_ms)


# The two tables


def _tables(
    domain: Domain, rankings: _Rankings, lists: Lists, joined: Joined, kept: npt.NDArray[np.int64], proved: dict[Key, _Proved]
) -> tuple[pa.Table, pa.Table]:
    """(impressions, served) of the joined lists `kept`."""
    sizes = np.diff(joined.starts)[kept]
    at = np.repeat(joined.starts[kept] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    rows, chosen = joined.rows[at], joined.lists[kept]
    of = np.repeat(chosen, sizes)
    labels = pa.ListArray.from_arrays(pa.array(joined.label_starts.astype(np.int32)), pa.array(joined.labels)).take(pa.array(at))
    records = [rankings.records[one] for one in chosen.tolist()]
    surface = np.array([_surface(domain, record.request.ranker) for record in records], np.uint16)
    columns: dict[str, Any] = {
        "request_id": lists.request_id[of],
        "user_id": lists.user_id[of],
        "request_time_ms": lists.request_time_ms[of],
        "position": lists.position[rows],
        "surface": np.repeat(surface, sizes),
        "entity_kind": lists.entity_kind[rows],
        "entity_id": lists.entity_id[rows],
        "labels": labels,
        "seen": joined.seen[at],
    }
    # Features of the chosen lists only, in their order: candidates of list i begin at first[i].
    first = _starts(np.diff(lists.starts)[chosen])
    place = np.repeat(first[:-1] - lists.starts[chosen], sizes) + rows
    for name in logged_features(domain):
        columns[name] = _feature(domain, name, records).take(pa.array(place))
    schema = impressions_schema(domain, served=True)
    impressions = pa.table([columns[name] for name in schema.names], schema=schema)
    many = np.bincount(np.repeat(np.arange(len(kept)), sizes), np.diff(joined.label_starts)[at], minlength=len(kept)).astype(np.int64)
    return impressions, _served(domain, records, [proved[_key(record)] for record in records], many)


def _served(domain: Domain, records: list[RankingRecord], proved: list[_Proved], labels: npt.NDArray[np.int64]) -> pa.Table:
    schema = served_schema(domain)
    rows = [
        (
            record.request.request_id,
            record.request.user_id,
            record.request.request_time_ms,
            record.served_time_ms,
            record.request.ranker,
            record.release_id,
            json.dumps(dict(record.generations), sort_keys=True),
            record.tier,
            record.sequence_source,
            record.experiment,
            record.arm,
            record.shuffle_bound,
            [record.request.user_id, *record.request.identities],
            [epoch for epoch, _ in _watermark(record)],
            [offset for _, offset in _watermark(record)],
            record.row_digest,
            record.digest,
            proof.events,
            proof.erased_before_ms,
            count,
        )
        for record, proof, count in zip(records, proved, labels.tolist(), strict=True)
    ]
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[] for _ in schema], schema=schema)


def _surface(domain: Domain, ranker: str) -> int:
    """The surface that a ranker is for, where it is one; requests do not say."""
    found = domain.ranker[ranker].surfaces if ranker in domain.ranker else None
    return domain.surfaces[found[0]] if found is not None and len(found) == 1 else 0


def _feature(domain: Domain, name: str, records: list[RankingRecord]) -> pa.Array:
    """A request or candidate feature of all candidates of some records; missing where the request did not say it."""
    feature = domain.features[name]
    per_request = feature.side == "request"
    parts: list[_Values] = []
    for record in records:
        count = len(record.request.candidate_ids) // 8
        given = record.request.request_features if per_request else record.request.candidate_features
        part = _values(given[name] if name in given else FeatureColumn(), feature, 1 if per_request else count)
        parts.append(_Values(*(np.concatenate([of_one] * count) for of_one in part)) if per_request else part)
    if feature.kind == "vector":
        vectors = _joined([part.values.reshape(-1) for part in parts], np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors), type=feature_type(feature))
    values = pa.array(_joined([part.values for part in parts], np.float32 if feature.kind == "number" else np.uint64))
    if feature.kind in ("number", "category"):
        return values
    if feature.kind == "weighted_list":
        weights = pa.array(_joined([part.weights for part in parts], np.float32))
        values = pa.StructArray.from_arrays([values, weights], fields=list(WEIGHTED))
    lengths = _joined([part.lengths for part in parts], np.int64)
    return pa.ListArray.from_arrays(pa.array(_starts(lengths).astype(np.int32)), values)


class _Values(NamedTuple):
    """A feature of n candidates: values [n, ...] or, of lists, [sum of lengths]; lengths int64 [n] and weights float32 [sum], or empty."""

    values: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def _values(column: FeatureColumn, feature: Feature, count: int) -> _Values:
    """What a logged request says of a feature; missing where it is not as it should be (`features.request` refuses such a request)."""
    number, category = np.frombuffer(column.number, "<f4"), np.frombuffer(column.category, "<u8")
    no_lengths, no_weights = np.zeros(0, np.int64), np.zeros(0, np.float32)
    if feature.kind in ("number", "vector"):
        shape = (count, feature.dimension) if feature.kind == "vector" else (count,)
        values = number.reshape(shape) if number.size == math.prod(shape) else np.full(shape, np.nan, np.float32)
        return _Values(values, no_lengths, no_weights)
    if feature.kind == "category":
        return _Values(category if len(category) == count else np.zeros(count, np.uint64), no_lengths, no_weights)
    lengths = np.frombuffer(column.list_length, "<u4").astype(np.int64)
    weights = number if feature.kind == "weighted_list" else no_weights
    if len(lengths) != count or lengths.sum() != len(category) or (feature.kind == "weighted_list" and len(weights) != len(category)):
        return _Values(np.zeros(0, np.uint64), np.zeros(count, np.int64), no_weights)
    return _Values(category, lengths, weights)


# Counting


def _counts(
    work: Work, rankings: _Rankings, joined: Joined, kept: npt.NDArray[np.int64], served: pa.Table, known: pa.Table
) -> dict[str, Any]:
    """What is reported of a bucket, beside how its rows were proved."""
    before = {
        key: labels for (key, _), labels in zip(_from_known(known), known["labels"].to_pylist() if known.num_rows else [], strict=True)
    }
    now = served["labels"].to_pylist()
    keys = [_key(rankings.records[one]) for one in joined.lists[kept].tolist()]
    added = sum(max(0, labels - before[key]) for key, labels in zip(keys, now, strict=True) if key in before)
    rankers: dict[str, int] = {}
    for name in served["ranker"].to_pylist():
        rankers[name] = rankers.get(name, 0) + 1
    labels_of = np.bincount(joined.labels, minlength=256)
    unanswered = joined.seen & (np.diff(joined.label_starts) == 0)
    return {
        "join": joined.counts,
        "undecodable": rankings.undecodable,
        "lists": len(kept),
        "new": sum(key not in before for key in keys),
        "added": added,
        "rankers": rankers,
        "labels": {action.id: int(labels_of[action.id]) for action in work.domain.actions.values() if labels_of[action.id]},
        "only_seen": int(unanswered.sum()),
    }


def _joined(parts: list[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def _starts(sizes: Any) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

"""The law of a user's sequence, and the codec of its row.

A sequence is, after the caps per action, the N greatest events by (event_time_ms, event_id, bytes). Merging is a set union cut to N:
idempotent, commutative, associative. An erasure drops everything at smaller offsets and everything with an event time at or before its
append time, also what arrives later. Eviction follows the log's own clock. State at an offset depends on the records up to it and on the
sequence's definition alone: not on how they were cut into batches, nor on any clock.
"""

import zlib
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from features.actions import ACTION, ERASE, EVENT_DTYPE, REJECTED, Batch
from features.domain import Domain
from features.ports import SequenceCorruptError, SequenceForeignError

Events = npt.NDArray[np.void]
"""EVENT_DTYPE [n], ascending by the law's order: oldest first."""

FORMAT_VERSION = 1
SCHEMA_VERSION = 2
NEVER_ERASED = -1
_MAGIC = int.from_bytes(b"FRSQ", "little")

HEADER_DTYPE = np.dtype(
    [
        ("magic", "<u4"),
        ("crc32", "<u4"),
        ("format_version", "<u2"),
        ("schema_version", "<u2"),
        ("record_width", "<u2"),
        ("count", "<u2"),
        ("user_id", "<u8"),
        ("fingerprint", "<u8"),
        ("log_epoch", "<u8"),
        ("offset", "<i8"),
        ("erased_before_ms", "<i8"),
        ("partition", "<i4"),
        ("reserved", "<u4"),
    ]
)
"""Header of a row, 64 bytes. crc32 is over everything behind it; offset is the last record that touched the row."""

_SCHEMA_1 = np.dtype([field for field in EVENT_DTYPE.descr if field[0] != "request_id"])
_WIDTHS = {1: _SCHEMA_1.itemsize, SCHEMA_VERSION: EVENT_DTYPE.itemsize}
_FINGERPRINT = slice(HEADER_DTYPE.fields["fingerprint"][1], HEADER_DTYPE.fields["fingerprint"][1] + 8)  # type: ignore[index]
_HEADER_WORDS, _EVENT_WORDS = HEADER_DTYPE.itemsize // 8, EVENT_DTYPE.itemsize // 8
_OPAQUE = np.dtype(f"V{EVENT_DTYPE.itemsize}")


def row_bytes_max(length: int) -> int:
    """Size of the longest row of a sequence of `length` events."""
    return HEADER_DTYPE.itemsize + length * EVENT_DTYPE.itemsize


def row_fingerprint(row: bytes) -> int:
    """Fingerprint of a row's definition, read without decoding it; the row is not checked."""
    return int.from_bytes(row[_FINGERPRINT], "little")


@dataclass(frozen=True)
class Definition:
    """What the store keeps of a user: see `features.domain.Sequence`. `caps` holds (action id, most events)."""

    fingerprint: int
    length: int
    caps: tuple[tuple[int, int], ...] = ()
    evict_age_ms: int | None = None


@dataclass(frozen=True)
class Row:
    """A decoded row."""

    user_id: int
    fingerprint: int
    log_epoch: int
    partition: int
    offset: int
    erased_before_ms: int
    events: Events


def definition(domain: Domain, name: str) -> Definition:
    """The definition of [sequence.NAME] of a domain file."""
    sequence = domain.sequence[name]
    caps = tuple(sorted((domain.actions[action].id, cap) for action, cap in sequence.caps.items()))
    return Definition(domain.sequence_fingerprint(name), sequence.length, caps, sequence.evict_age_ms)


def law(what: Definition, events: Events) -> Events:
    """The law for one user: any events in any order, with duplicates, to the sequence, ascending."""
    group = np.zeros(len(events), np.int64)
    ordered, group = _sorted_distinct(events, group)
    return ordered[_kept(what, ordered, group, 1)]


def touched_users(batch: Batch) -> npt.NDArray[np.uint64]:
    """The users whose rows `apply_batch` needs: uint64, ascending."""
    return np.unique(batch.users[batch.verdict != REJECTED])


def clock_after(batch: Batch, clock_before_ms: int) -> int:
    """The partition's clock behind a batch: the greatest append time of all records that were not rejected."""
    return int(batch.append_time_ms.max(initial=clock_before_ms, where=batch.verdict != REJECTED))


def apply_batch(what: Definition, batch: Batch, rows: Seq[bytes | None], clock_before_ms: int) -> list[bytes]:
    """Folds a batch into rows.

    `rows`: the stored row of each of `touched_users(batch)`, None or empty where there is none. `clock_before_ms`: `clock_after` of what
    came before. Returns the new row of each touched user. Records up to a row's own offset are in it already and are passed over.

    Raises:
        SequenceCorruptError: a stored row is damaged, of another user, of another log or of another definition.
    """
    users = touched_users(batch)
    live = np.flatnonzero(batch.verdict != REJECTED)
    group_of_record = np.searchsorted(users, batch.users[live])
    old, old_group, erased_before_ms, row_offsets = _decode_rows(what, batch, rows, users)
    unseen = batch.offsets[live] > row_offsets[group_of_record]
    live, group_of_record = live[unseen], group_of_record[unseen]

    is_erase = batch.verdict[live] == ERASE
    last_erase = np.full(len(users), -1)
    if is_erase.any():
        np.maximum.at(last_erase, group_of_record[is_erase], live[is_erase])
        np.maximum.at(erased_before_ms, group_of_record[is_erase], batch.append_time_ms[live[is_erase]])
        survives = last_erase[old_group] < 0
        old, old_group = old[survives], old_group[survives]

    row_offsets[group_of_record] = batch.offsets[live]  # the last assignment of a group wins: records are in offset order
    horizon_ms = erased_before_ms
    if what.evict_age_ms is not None:
        clock = np.zeros(len(users), np.int64)
        append_time_ms = np.where(batch.verdict == REJECTED, 0, batch.append_time_ms)
        clock[group_of_record] = np.maximum(np.maximum.accumulate(append_time_ms), clock_before_ms)[live]
        horizon_ms = np.maximum(erased_before_ms, clock - what.evict_age_ms - 1)

    is_action = batch.verdict[live] == ACTION
    new_index, new_group = live[is_action], group_of_record[is_action]
    new_index, new_group = _select(new_index > last_erase[new_group], new_index, new_group)
    events, group = _union(old, old_group, *_sorted_distinct(batch.events[new_index], new_group))
    keep = (events["event_time_ms"] > horizon_ms[group]) & (events["event_time_ms"] > 0)
    if not keep.all():
        events, group = events[keep], group[keep]
    keep = _kept(what, events, group, len(users))
    events, group = events[keep], group[keep]
    counts = np.bincount(group, minlength=len(users))
    return _encode_rows(what, batch, users, row_offsets, erased_before_ms, events, counts)


def as_read(what: Definition, row: bytes, log_clock_ms: int) -> bytes:
    """The row as a reading at a partition's clock gives it: the stored one, unless all of its events are evicted by that clock.

    Then it is b"", as of a user without a row, or for an erased user the row without events: that the user was erased stays known for
    ever, for a table made before the erasure may be looked up at any time. No later record can tell the two apart: its own clock evicts
    the same events. So a store may keep such a row or put this one in its place, whenever it likes, and all readings and replays agree.

    Raises:
        SequenceCorruptError: an erased user's row is damaged.
    """
    if what.evict_age_ms is None or not row:
        return row
    width, count = int.from_bytes(row[12:14], "little"), int.from_bytes(row[14:16], "little")
    if count and int.from_bytes(row[-width : len(row) - width + 8], "little") >= log_clock_ms - what.evict_age_ms:
        return row
    if int.from_bytes(row[48:56], "little", signed=True) == NEVER_ERASED:
        return b""
    return encode_row(replace(decode_row(row), events=np.zeros(0, EVENT_DTYPE))) if count else row


def merge_rows(what: Definition, rows: Seq[bytes]) -> Events:
    """The sequence of one person with several identities: each row obeys its own erasures, the union obeys the law."""
    return law(what, np.concatenate([decode_row(row).events for row in rows if row] or [np.zeros(0, EVENT_DTYPE)]))


def sort_history(users: npt.NDArray[np.uint64], events: Events) -> tuple[npt.NDArray[np.uint64], Events]:
    """Sorts many users' events, in any order and with duplicates, by user and the law; equal events of a user count once.

    users uint64 [n], events EVENT_DTYPE [n]. The same as `_sorted_distinct`, several times faster on history, where many events have few
    users: two sorts of one integer each, the second over (user, time) packed into 64 bits, and a lexical one for ties alone.
    """
    if not len(users):
        return users, events
    order = np.argsort(users)
    users = users[order]
    group = np.cumsum(np.concatenate(([False], users[1:] != users[:-1])))
    time_ms = events["event_time_ms"][order]
    oldest_ms = int(time_ms.min())
    time_bits = (int(time_ms.max()) - oldest_ms).bit_length()
    if int(group[-1]).bit_length() + time_bits > 64:
        ordered, group = _sorted_distinct(_taken(events, order), group)
        first = np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))
        return users[first][group], ordered
    key = (group.astype(np.uint64) << np.uint64(time_bits)) | (time_ms - oldest_ms).astype(np.uint64)
    by_time = np.argsort(key)
    key, users, events = key[by_time], users[by_time], _taken(events, order[by_time])
    same = key[1:] == key[:-1]
    if not same.any():
        return users, events
    tied = np.flatnonzero(np.concatenate(([False], same)) | np.concatenate((same, [False])))
    dense = np.cumsum(np.concatenate(([False], key[tied][1:] != key[tied][:-1])))
    settled, settled_group = _sorted_distinct(_taken(events, tied), dense)
    # Distinct events take the first places of their tie; the places that are left over were duplicates.
    gone = np.bincount(dense) - np.bincount(settled_group, minlength=int(dense[-1]) + 1)
    spare = _rank_from_end(dense, int(dense[-1]) + 1) < gone[dense]
    events[tied[~spare]] = settled
    stay = np.ones(len(events), bool)
    stay[tied[spare]] = False
    return (users, events) if stay.all() else (users[stay], _taken(events, np.flatnonzero(stay)))


def cut_history(kept: Iterable[Definition], users: npt.NDArray[np.uint64], events: Events) -> tuple[npt.NDArray[np.uint64], Events]:
    """What any of these definitions still needs of sorted history: folding it with more history gives what the whole would give."""
    group, groups = _groups(users)
    needed = np.zeros(len(events), bool)
    for what in kept:
        needed |= _kept(what, events, group, groups)
    where = np.flatnonzero(needed)
    return users[where], _taken(events, where)


def fold_history(
    what: Definition,
    users: npt.NDArray[np.uint64],
    events: Events,
    erased: Mapping[int, int],
    *,
    clock_ms: int,
    log_epoch: int,
    partition: int,
) -> tuple[npt.NDArray[np.uint64], list[bytes]]:
    """Rows of history that stands before a log's first record: (users uint64 ascending, their rows), at offset -1.

    users, events: as `sort_history` gives them, without what an erasure of the history itself dropped. erased: append time of the last
    erasure by user, in ms; such a user has a row even where nothing is left. clock_ms: the history's clock, by which it evicts. A user of
    whom nothing is left and who was never erased has no row.
    """
    if what.evict_age_ms is not None:
        recent = np.flatnonzero(events["event_time_ms"] >= clock_ms - what.evict_age_ms)
        users, events = users[recent], _taken(events, recent)
    group, groups = _groups(users)
    where = np.flatnonzero(_kept(what, events, group, groups))
    users, events = users[where], _taken(events, where)
    found, first = np.unique(users, return_index=True)
    counts = np.diff(np.append(first, len(users)))
    erased_before_ms = np.full(len(found), NEVER_ERASED, np.int64)
    if erased:
        owners = np.union1d(found, np.fromiter(erased, np.uint64, len(erased)))
        at = np.searchsorted(owners, found)
        all_counts = np.zeros(len(owners), np.int64)
        all_counts[at] = counts
        found, counts = owners, all_counts
        erased_before_ms = np.fromiter((erased.get(user, NEVER_ERASED) for user in owners.tolist()), np.int64, len(owners))
    none = np.zeros(0, np.int64)
    place = Batch(log_epoch, partition, none, none, none.astype(np.uint8), none.astype(np.uint64), np.zeros(0, EVENT_DTYPE), {})
    return found, _encode_rows(what, place, found, np.full(len(found), -1), erased_before_ms, events, counts)


def decode_row(row: bytes, user_id: int | None = None) -> Row:
    """Decodes one row, of this schema or an older one.

    Raises:
        SequenceCorruptError: checksum, layout or user do not agree. The reader answers DATA_LOSS; restore the row from the log.
    """
    if len(row) < HEADER_DTYPE.itemsize:
        raise SequenceCorruptError(f"row of {len(row)} bytes is shorter than its header")
    head = np.frombuffer(row, HEADER_DTYPE, 1)[0]
    _check_header(head, len(row), zlib.crc32(memoryview(row)[8:]), user_id)
    body = memoryview(row)[HEADER_DTYPE.itemsize :]
    if head["schema_version"] == SCHEMA_VERSION:
        events: Events = np.frombuffer(body, EVENT_DTYPE)
    else:  # request_id came with schema 2: 0 is none
        older = np.frombuffer(body, _SCHEMA_1)
        events = np.zeros(len(older), EVENT_DTYPE)
        for name in _SCHEMA_1.names or ():
            events[name] = older[name]
    names = ("user_id", "fingerprint", "log_epoch", "partition", "offset", "erased_before_ms")
    return Row(**{name: int(head[name]) for name in names}, events=events)


def encode_row(row: Row) -> bytes:
    """Encodes one row."""
    head = np.zeros(1, HEADER_DTYPE)
    head["magic"], head["format_version"], head["schema_version"] = _MAGIC, FORMAT_VERSION, SCHEMA_VERSION
    head["record_width"], head["count"] = EVENT_DTYPE.itemsize, len(row.events)
    for name in ("user_id", "fingerprint", "log_epoch", "partition", "offset", "erased_before_ms"):
        head[name] = getattr(row, name)
    data = bytearray(head.tobytes() + row.events.tobytes())
    data[4:8] = zlib.crc32(memoryview(data)[8:]).to_bytes(4, "little")
    return bytes(data)


def _check_header(head: np.void, size: int, crc32: int, user_id: int | None) -> None:
    width = _WIDTHS.get(int(head["schema_version"]))
    wrong = None
    if head["magic"] != _MAGIC:
        wrong = "not a sequence row"
    elif head["crc32"] != crc32:
        wrong = "checksum differs"
    elif head["format_version"] != FORMAT_VERSION or width is None or head["record_width"] != width:
        raise SequenceForeignError(
            f"sequence row: format {head['format_version']}, schema {head['schema_version']} is newer than this program: upgrade it"
        )
    elif size != HEADER_DTYPE.itemsize + width * int(head["count"]):
        wrong = f"{size} bytes do not hold {head['count']} records"
    elif user_id is not None and head["user_id"] != user_id:
        wrong = "it belongs to another user"
    if wrong:
        raise SequenceCorruptError(f"sequence row: {wrong}")


def _decode_rows(
    what: Definition, batch: Batch, rows: Seq[bytes | None], users: npt.NDArray[np.uint64]
) -> tuple[Events, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Events of all rows, their group, and erased_before_ms and offset of each group."""
    erased_before_ms = np.full(len(users), NEVER_ERASED, np.int64)
    offsets = np.full(len(users), -1, np.int64)
    present = [(i, row) for i, row in enumerate(rows) if row]
    if not present:
        return np.zeros(0, EVENT_DTYPE), np.zeros(0, np.int64), erased_before_ms, offsets
    group = np.fromiter((i for i, _ in present), np.int64, len(present))
    sizes = np.fromiter((len(row) for _, row in present), np.int64, len(present))
    if (sizes < HEADER_DTYPE.itemsize).any() or (sizes % 8).any():
        raise SequenceCorruptError("sequence row: its size is not that of any row")
    words = np.frombuffer(b"".join(row for _, row in present), "<u8")
    starts = np.concatenate(([0], np.cumsum(sizes // 8)[:-1]))
    head_words = starts[:, None] + np.arange(_HEADER_WORDS)
    heads = words[head_words].view(HEADER_DTYPE).ravel()
    crc32 = np.fromiter((zlib.crc32(memoryview(row)[8:]) for _, row in present), np.uint32, len(present))
    fine = (heads["magic"] == _MAGIC) & (heads["crc32"] == crc32) & (heads["user_id"] == users[group])
    fine &= (heads["format_version"] == FORMAT_VERSION) & (heads["schema_version"] == SCHEMA_VERSION)
    fine &= sizes == HEADER_DTYPE.itemsize + EVENT_DTYPE.itemsize * heads["count"].astype(np.int64)
    if not fine.all():
        for i, row in present:
            decode_row(row, int(users[i]))  # raises, unless the row is of an older schema
    if not (heads["fingerprint"] == what.fingerprint).all():
        raise SequenceForeignError("sequence row: it was kept by another [sequence] definition; rebuild the state from the log")
    if not ((heads["log_epoch"] == batch.log_epoch) & (heads["partition"] == batch.partition)).all():
        raise SequenceForeignError("sequence row: it belongs to another log or partition; rebuild the state from the log")
    erased_before_ms[group], offsets[group] = heads["erased_before_ms"], heads["offset"]
    if fine.all():
        is_event = np.ones(len(words), bool)
        is_event[head_words] = False
        return words[is_event].view(EVENT_DTYPE), np.repeat(group, heads["count"]), erased_before_ms, offsets
    decoded = [decode_row(row).events for _, row in present]
    return np.concatenate(decoded), np.repeat(group, heads["count"]), erased_before_ms, offsets


def _encode_rows(
    what: Definition,
    batch: Batch,
    users: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.int64],
    erased_before_ms: npt.NDArray[np.int64],
    events: Events,
    counts: npt.NDArray[np.int64],
) -> list[bytes]:
    heads = np.zeros(len(users), HEADER_DTYPE)
    heads["magic"], heads["format_version"], heads["schema_version"] = _MAGIC, FORMAT_VERSION, SCHEMA_VERSION
    heads["record_width"], heads["count"], heads["user_id"] = EVENT_DTYPE.itemsize, counts, users
    heads["fingerprint"], heads["log_epoch"], heads["partition"] = what.fingerprint, batch.log_epoch, batch.partition
    heads["offset"], heads["erased_before_ms"] = offsets, erased_before_ms
    sizes = _HEADER_WORDS + _EVENT_WORDS * counts
    ends = np.cumsum(sizes)
    words = np.empty(int(ends[-1]) if len(ends) else 0, "<u8")
    head_words = (ends - sizes)[:, None] + np.arange(_HEADER_WORDS)
    is_event = np.ones(len(words), bool)
    is_event[head_words] = False
    words[head_words] = heads.view("<u8").reshape(-1, _HEADER_WORDS)
    words[is_event] = events.view("<u8")
    data = words.view(np.uint8).data
    rows = []
    for start, end in zip(((ends - sizes) * 8).tolist(), (ends * 8).tolist(), strict=True):
        crc32 = zlib.crc32(data[start + 8 : end])
        rows.append(b"".join((data[start : start + 4], crc32.to_bytes(4, "little"), data[start + 8 : end])))
    return rows


def _tail_words(events: Events) -> npt.NDArray[np.uint64]:
    """The bytes behind event_id as big-endian numbers: their order is the order of the bytes. uint64 [n, 3]."""
    words = np.ascontiguousarray(events).view("<u8").reshape(-1, _EVENT_WORDS)[:, 2:]
    return words.byteswap()


def _sorted_distinct(events: Events, group: npt.NDArray[np.int64]) -> tuple[Events, npt.NDArray[np.int64]]:
    """Sorts by (group, law) and drops equal events of a group."""
    order = np.lexsort((events["event_id"], events["event_time_ms"], group))
    events, group = events[order], group[order]
    same = (group[1:] == group[:-1]) & (events["event_time_ms"][1:] == events["event_time_ms"][:-1])
    same &= events["event_id"][1:] == events["event_id"][:-1]
    if not same.any():
        return events, group
    tail = _tail_words(events)
    order = np.lexsort((tail[:, 2], tail[:, 1], tail[:, 0], events["event_id"], events["event_time_ms"], group))
    events, group, tail = events[order], group[order], tail[order]
    distinct = np.ones(len(events), bool)
    distinct[1:] = ~(same & (tail[1:] == tail[:-1]).all(axis=1))
    return events[distinct], group[distinct]


def _union(
    old: Events, old_group: npt.NDArray[np.int64], new: Events, new_group: npt.NDArray[np.int64]
) -> tuple[Events, npt.NDArray[np.int64]]:
    """Union of two sorted sets. Groups whose new events are all later than the old ones, the usual case, are appended without a sort."""
    if not len(old) or not len(new):
        return (new, new_group) if not len(old) else (old, old_group)
    groups = int(max(old_group[-1], new_group[-1])) + 1
    last_old, first_new = np.full(groups, -1), np.full(groups, -1)
    last_old[old_group] = np.arange(len(old))
    first_new[new_group[::-1]] = np.arange(len(new))[::-1]
    both = np.flatnonzero((last_old >= 0) & (first_new >= 0))
    tail, head = old[last_old[both]], new[first_new[both]]
    later = head["event_time_ms"] > tail["event_time_ms"]
    later |= (head["event_time_ms"] == tail["event_time_ms"]) & (head["event_id"] > tail["event_id"])
    mixed = np.zeros(groups, bool)
    mixed[both[~later]] = True

    # Each event's place follows from how many of the other set stand before its group (the old ones come first in it): nothing to sort.
    olds, news = np.bincount(old_group, minlength=groups), np.bincount(new_group, minlength=groups)
    old_place = np.arange(len(old)) + (np.cumsum(news) - news)[old_group]
    new_place = np.arange(len(new)) + np.cumsum(olds)[new_group]
    events, group = np.empty(len(old) + len(new), EVENT_DTYPE), np.repeat(np.arange(groups), olds + news)
    events[old_place], events[new_place] = old, new
    where = np.flatnonzero(mixed[group])
    if not len(where):
        return events, group
    merged, merged_group = _sorted_distinct(events[where], group[where])
    if len(merged) == len(where):
        events[where] = merged
        return events, group
    # Equal events became one: each group's union takes its first places, the others go.
    gone = np.bincount(group[where], minlength=groups) - np.bincount(merged_group, minlength=groups)
    spare = _rank_from_end(group[where], groups) < gone[group[where]]
    events[where[~spare]] = merged
    stay = np.ones(len(events), bool)
    stay[where[spare]] = False
    return events[stay], group[stay]


def _kept(what: Definition, events: Events, group: npt.NDArray[np.int64], groups: int) -> npt.NDArray[np.bool_]:
    """Which events of sorted groups stay: caps per action first, then the `length` last of each group."""
    keep = np.ones(len(events), bool)
    for action, cap in what.caps:
        where = np.flatnonzero(events["action"] == action)
        keep[where[_rank_from_end(group[where], groups) >= cap]] = False
    where = np.flatnonzero(keep)
    keep[where[_rank_from_end(group[where], groups) >= what.length]] = False
    return keep


def _rank_from_end(group: npt.NDArray[np.int64], groups: int) -> npt.NDArray[np.int64]:
    """0 for the last of each sorted group, 1 for the one before."""
    ends = np.cumsum(np.bincount(group, minlength=groups))
    rank: npt.NDArray[np.int64] = ends[group] - 1 - np.arange(len(group))
    return rank


def _taken(events: Events, where: npt.NDArray[np.int64]) -> Events:
    """events[where], moved as opaque bytes: NumPy copies a structure field by field, 15 times slower."""
    taken: Events = events.view(_OPAQUE)[where].view(EVENT_DTYPE)
    return taken


def _groups(users: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], int]:
    """Number of each sorted user's group, from 0, and how many there are."""
    if not len(users):
        return np.zeros(0, np.int64), 0
    group: npt.NDArray[np.int64] = np.cumsum(np.concatenate(([False], users[1:] != users[:-1])))
    return group, int(group[-1]) + 1


def _select(mask: npt.NDArray[np.bool_], a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    return a[mask], b[mask]

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
_MAGIC_BYTES = b"FRSQ"
_MAGIC = int.from_bytes(_MAGIC_BYTES, "little")

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
_NO_HEADER = bytes(HEADER_DTYPE.itemsize)
_EVENT_WORDS = EVENT_DTYPE.itemsize // 8
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


def law_of_groups(what: Definition, events: Events, group: npt.NDArray[np.int64], groups: int) -> tuple[Events, npt.NDArray[np.int64]]:
    """The law for many users at once: group int64 [n] says whose each event is, 0 to groups - 1. Returns the sequences one after the other,
    and whose each of their events is."""
    ordered, group = _sorted_distinct(events, group)
    where = np.flatnonzero(_kept(what, ordered, group, groups))
    return _taken(ordered, where), group[where]


def touched_users(batch: Batch) -> npt.NDArray[np.uint64]:
    """The users whose rows `apply_batch` needs: uint64, ascending."""
    return batch.by_user.users


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
    touched = batch.by_user
    if not len(touched.users):
        return []
    old = _check_rows(what, batch, rows)
    evict_ms = np.full(len(old), NEVER_ERASED, np.int64)
    if what.evict_age_ms is not None:
        counted_ms = np.where(batch.verdict == REJECTED, 0, batch.append_time_ms)
        clock_ms = np.maximum(np.maximum.accumulate(counted_ms), clock_before_ms)
        evict_ms = clock_ms[touched.order[touched.ends - 1]] - what.evict_age_ms - 1
    new = _taken(batch.events, touched.order)
    appends = _appends(what, batch, old, new, evict_ms)
    if appends.all():
        return _append(what, batch, old, new, np.arange(len(old)))
    append, merge = np.flatnonzero(appends), np.flatnonzero(~appends)
    found = [b""] * len(old)
    for which, made in ((append, _append(what, batch, old, new, append)), (merge, _merge(what, batch, old, merge, evict_ms[merge]))):
        for i, row in zip(which.tolist(), made, strict=True):
            found[i] = row
    return found


@dataclass(frozen=True)
class _OldRows:
    """The stored rows of the touched users, b"" where there is none, and what their headers say; all arrays [users]."""

    rows: list[bytes]
    is_current: npt.NDArray[np.bool_]
    """Of this schema, or not there at all."""
    counts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    erased_before_ms: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


def _check_rows(what: Definition, batch: Batch, rows: Seq[bytes | None]) -> _OldRows:
    n, users = len(rows), batch.by_user.users
    found = [row or b"" for row in rows]
    sizes = np.fromiter(map(len, found), np.int64, n)
    is_there = sizes > 0
    if (sizes[is_there] < HEADER_DTYPE.itemsize).any():
        raise SequenceCorruptError("sequence row: its size is not that of any row")
    heads = np.frombuffer(b"".join([row[: HEADER_DTYPE.itemsize] or _NO_HEADER for row in found]), HEADER_DTYPE)
    crc32 = np.fromiter((zlib.crc32(memoryview(row)[8:]) for row in found), np.uint32, n)
    counts = heads["count"].astype(np.int64)
    is_current = (heads["magic"] == _MAGIC) & (heads["crc32"] == crc32) & (heads["user_id"] == users)
    is_current &= (heads["format_version"] == FORMAT_VERSION) & (heads["schema_version"] == SCHEMA_VERSION)
    is_current &= sizes == HEADER_DTYPE.itemsize + EVENT_DTYPE.itemsize * counts
    is_current |= ~is_there
    for i in np.flatnonzero(~is_current).tolist():
        decode_row(found[i], int(users[i]))  # raises, unless the row is of an older schema
    if not (heads["fingerprint"][is_there] == what.fingerprint).all():
        raise SequenceForeignError("sequence row: it was kept by another [sequence] definition; rebuild the state from the log")
    if not ((heads["log_epoch"] == batch.log_epoch) & (heads["partition"] == batch.partition))[is_there].all():
        raise SequenceForeignError("sequence row: it belongs to another log or partition; rebuild the state from the log")
    offsets = np.where(is_there, heads["offset"], -1)
    return _OldRows(found, is_current, counts, offsets, np.where(is_there, heads["erased_before_ms"], NEVER_ERASED))


def _appends(what: Definition, batch: Batch, old: _OldRows, new: Events, evict_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Of which users the law only appends: no erasure and no capped action, nothing seen before, late, doubled or evicted.

    An erasure's event is zeros here, so its time is never later than anything.
    """
    touched = batch.by_user
    times, ids = new["event_time_ms"], new["event_id"]
    ascends = np.ones(len(new), bool)
    ascends[1:] = (times[1:] > times[:-1]) | ((times[1:] == times[:-1]) & (ids[1:] > ids[:-1]))
    # Against the last stored event; a row without events has bytes of its header there, which the count overrules.
    last = np.frombuffer(b"".join([row[-EVENT_DTYPE.itemsize :][:16] or _NO_HEADER[:16] for row in old.rows]), "<i8").reshape(-1, 2)
    last_times, last_ids = last[:, 0], last[:, 1].view(np.uint64)
    first_times, first_ids = times[touched.starts], ids[touched.starts]
    ascends[touched.starts] = (first_times > last_times) | ((first_times == last_times) & (first_ids > last_ids)) | (old.counts == 0)
    for action, _ in what.caps:
        ascends &= new["action"] != action
    appends = np.logical_and.reduceat(ascends, touched.starts)
    appends &= old.is_current & (batch.offsets[touched.order[touched.starts]] > old.offsets)
    appends &= first_times > np.maximum(old.erased_before_ms, np.maximum(evict_ms, 0))
    if what.evict_age_ms is not None:
        at = HEADER_DTYPE.itemsize
        oldest_ms = np.frombuffer(b"".join([row[at : at + 8] or _NO_HEADER[:8] for row in old.rows]), "<i8")
        appends &= (oldest_ms > evict_ms) | (old.counts == 0)
    return appends


def _append(what: Definition, batch: Batch, old: _OldRows, new: Events, which: npt.NDArray[np.int64]) -> list[bytes]:
    """New rows of the users that `_appends` found: the newest stored events and the new ones behind them."""
    touched = batch.by_user
    ends = touched.ends[which]
    starts = np.maximum(touched.starts[which], ends - what.length)
    added, counts = ends - starts, old.counts[which]
    dropped = np.maximum(counts + added - what.length, 0)
    offsets = batch.offsets[touched.order[ends - 1]]
    counts += added - dropped
    heads = memoryview(_heads(what, batch, touched.users[which], offsets, old.erased_before_ms[which], counts).tobytes())
    events = memoryview(new.tobytes())
    head, width = HEADER_DTYPE.itemsize, EVENT_DTYPE.itemsize
    pieces: list[memoryview] = []
    add = pieces.append
    at = 0
    columns = (which, head + dropped * width, starts * width, ends * width)
    for i, cut, start, end in zip(*(column.tolist() for column in columns), strict=True):
        add(heads[at : at + head])
        add(memoryview(old.rows[i])[cut:])
        add(events[start:end])
        at += head
    return _with_checksums(pieces, counts)


def _merge(what: Definition, batch: Batch, old: _OldRows, which: npt.NDArray[np.int64], evict_ms: npt.NDArray[np.int64]) -> list[bytes]:
    """New rows of any users, by the whole law. `evict_ms`: of each of `which`."""
    touched = batch.by_user
    sizes = touched.ends[which] - touched.starts[which]
    group = np.repeat(np.arange(len(which)), sizes)
    live = touched.order[np.arange(len(group)) + (touched.starts[which] - (np.cumsum(sizes) - sizes))[group]]
    row_offsets, erased_before_ms = old.offsets[which], old.erased_before_ms[which]
    unseen = batch.offsets[live] > row_offsets[group]
    live, group = live[unseen], group[unseen]
    old_events, old_group = _old_events(old, which)

    is_erase = batch.verdict[live] == ERASE
    last_erase = np.full(len(which), -1)
    if is_erase.any():
        np.maximum.at(last_erase, group[is_erase], live[is_erase])
        np.maximum.at(erased_before_ms, group[is_erase], batch.append_time_ms[live[is_erase]])
        survives = last_erase[old_group] < 0
        old_events, old_group = _taken(old_events, np.flatnonzero(survives)), old_group[survives]

    row_offsets[group] = batch.offsets[live]  # the last assignment of a group wins: its records are in offset order
    horizon_ms = erased_before_ms.copy()
    np.maximum.at(horizon_ms, group, evict_ms[group])  # only a record moves a row's clock

    is_action = (batch.verdict[live] == ACTION) & (live > last_erase[group])
    new, new_group = _taken(batch.events, live[is_action]), group[is_action]
    events, group = _sorted_distinct(np.concatenate((old_events, new)), np.concatenate((old_group, new_group)))
    keep = (events["event_time_ms"] > horizon_ms[group]) & (events["event_time_ms"] > 0)
    if not keep.all():
        events, group = _taken(events, np.flatnonzero(keep)), group[keep]
    keep = _kept(what, events, group, len(which))
    events, group = _taken(events, np.flatnonzero(keep)), group[keep]
    counts = np.bincount(group, minlength=len(which))
    return _encode_rows(what, batch, touched.users[which], row_offsets, erased_before_ms, events, counts)


def _old_events(old: _OldRows, which: npt.NDArray[np.int64]) -> tuple[Events, npt.NDArray[np.int64]]:
    """Stored events of some users, and the place in `which` that each belongs to."""
    at = HEADER_DTYPE.itemsize
    is_current = old.is_current[which].tolist()
    bodies = [old.rows[i][at:] if now else decode_row(old.rows[i]).events.tobytes() for i, now in zip(which, is_current, strict=True)]
    return np.frombuffer(b"".join(bodies), EVENT_DTYPE), np.repeat(np.arange(len(which)), old.counts[which])


def _encode_rows(
    what: Definition,
    batch: Batch,
    users: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.int64],
    erased_before_ms: npt.NDArray[np.int64],
    events: Events,
    counts: npt.NDArray[np.int64],
) -> list[bytes]:
    """Rows of users whose events stand one user behind the other, `counts` of each."""
    heads = memoryview(_heads(what, batch, users, offsets, erased_before_ms, counts).tobytes())
    data = memoryview(events.tobytes())
    ends = np.cumsum(counts)
    pieces: list[memoryview] = []
    at, width = 0, EVENT_DTYPE.itemsize
    for start, end in zip(((ends - counts) * width).tolist(), (ends * width).tolist(), strict=True):
        pieces += (heads[at : at + HEADER_DTYPE.itemsize], data[start:end])
        at += HEADER_DTYPE.itemsize
    return _with_checksums(pieces, counts)


def _heads(
    what: Definition,
    batch: Batch,
    users: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.int64],
    erased_before_ms: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> npt.NDArray[np.void]:
    """Headers of rows, still without their checksums."""
    heads = np.zeros(len(users), HEADER_DTYPE)
    heads["magic"], heads["format_version"], heads["schema_version"] = _MAGIC, FORMAT_VERSION, SCHEMA_VERSION
    heads["record_width"], heads["count"], heads["user_id"] = EVENT_DTYPE.itemsize, counts, users
    heads["fingerprint"], heads["log_epoch"], heads["partition"] = what.fingerprint, batch.log_epoch, batch.partition
    heads["offset"], heads["erased_before_ms"] = offsets, erased_before_ms
    return heads


def _with_checksums(pieces: list[memoryview], counts: npt.NDArray[np.int64]) -> list[bytes]:
    """Rows of `counts` events each, cut from the joined pieces, their checksums set."""
    joined = bytearray().join(pieces)
    if not pieces:
        return []
    ends = np.cumsum(HEADER_DTYPE.itemsize + counts * EVENT_DTYPE.itemsize)
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    data = memoryview(joined)
    crc32 = [zlib.crc32(data[start + 8 : stop]) for start, stop in zip(starts, stops, strict=True)]
    words = np.frombuffer(joined, "<u4")
    words[np.array(starts) // 4 + 1] = crc32
    return [data[start:stop].tobytes() for start, stop in zip(starts, stops, strict=True)]


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
    head = dict(zip(HEADER_DTYPE.names or (), np.frombuffer(row, HEADER_DTYPE, 1).item(), strict=True))
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
    return Row(**{name: head[name] for name in names}, events=events)


def is_whole(row: bytes) -> bool:
    """Whether a row that is passed on undecoded is undamaged: magic and checksum cover every bit. `decode_row` says what is wrong."""
    return row[:4] == _MAGIC_BYTES and row[4:8] == zlib.crc32(memoryview(row)[8:]).to_bytes(4, "little")


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


def _check_header(head: Mapping[str, int], size: int, crc32: int, user_id: int | None) -> None:
    width = _WIDTHS.get(head["schema_version"])
    wrong = None
    if head["magic"] != _MAGIC:
        wrong = "not a sequence row"
    elif head["crc32"] != crc32:
        wrong = "checksum differs"
    elif head["format_version"] != FORMAT_VERSION or width is None or head["record_width"] != width:
        raise SequenceForeignError(
            f"sequence row: format {head['format_version']}, schema {head['schema_version']} is newer than this program: upgrade it"
        )
    elif size != HEADER_DTYPE.itemsize + width * head["count"]:
        wrong = f"{size} bytes do not hold {head['count']} records"
    elif user_id is not None and head["user_id"] != user_id:
        wrong = "it belongs to another user"
    if wrong:
        raise SequenceCorruptError(f"sequence row: {wrong}")


def _tail_words(events: Events) -> npt.NDArray[np.uint64]:
    """The bytes behind event_id as big-endian numbers: their order is the order of the bytes. uint64 [n, 3]."""
    words = np.ascontiguousarray(events).view("<u8").reshape(-1, _EVENT_WORDS)[:, 2:]
    return words.byteswap()


def _sorted_distinct(events: Events, group: npt.NDArray[np.int64]) -> tuple[Events, npt.NDArray[np.int64]]:
    """Sorts by (group, law) and drops equal events of a group."""
    order = _by_group_and_time(events["event_time_ms"], group)
    events, group = _taken(events, order), group[order]
    tied = np.zeros(len(events) + 1, bool)
    np.logical_and(group[1:] == group[:-1], events["event_time_ms"][1:] == events["event_time_ms"][:-1], out=tied[1:-1])
    if not tied.any():
        return events, group
    # Events of one group and time stand together: the rest of the law sorts them among themselves, in their places.
    where = np.flatnonzero(tied[1:] | tied[:-1])
    some, some_group = _taken(events, where), group[where]
    tail = _tail_words(some)
    order = np.lexsort((tail[:, 2], tail[:, 1], tail[:, 0], some["event_id"], some["event_time_ms"], some_group))
    octets = events.view(_OPAQUE)
    octets[where] = some.view(_OPAQUE)[order]
    equal = np.zeros(len(events), bool)
    equal[1:] = tied[1:-1]
    words = events.view("<u8").reshape(-1, _EVENT_WORDS)
    suspects = np.flatnonzero(equal)
    equal[suspects] = (words[suspects] == words[suspects - 1]).all(axis=1)
    distinct = np.flatnonzero(~equal)
    return _taken(events, distinct), group[distinct]


def _by_group_and_time(time_ms: npt.NDArray[np.int64], group: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The stable order by (group, time): by one number where both fit into it, which runs that are sorted already make cheap."""
    if not len(group):
        return group
    first_ms = int(time_ms.min())
    span = int(time_ms.max()) - first_ms + 1
    if span * (int(group.max()) + 1) < 2**63:
        return np.argsort(group * span + (time_ms - first_ms), kind="stable")
    return np.lexsort((time_ms, group))


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
    taken: Events = events.view(_OPAQUE).take(where).view(EVENT_DTYPE)
    return taken


def _groups(users: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], int]:
    """Number of each sorted user's group, from 0, and how many there are."""
    if not len(users):
        return np.zeros(0, np.int64), 0
    group: npt.NDArray[np.int64] = np.cumsum(np.concatenate(([False], users[1:] != users[:-1])))
    return group, int(group[-1]) + 1

"""A base: the history that a state stands on before its log's first record, and how rows come from it.

A service that is years older than its log of actions starts from Parquet files of the past. All of it counts as standing before offset 0,
as one set without an order: its law is that of the log with the words that need an order left out. The manifest names every file with its
content's hash; the digest of the manifest is the base's id, which goes into the log epoch, so positions on two bases never compare.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from features.actions import EVENT_DTYPE, TIME_MS_MAX
from features.logs import LoggedActions
from features.sequence import Definition, fold_history, sort_history

BASE_VERSION = 1
_U64 = npt.NDArray[np.uint64]


class BaseError(ValueError):
    """A base that cannot be used; names what was found and what to do."""


@dataclass(frozen=True)
class BaseFile:
    """One file of the history: its path below the source, its size, and xxh3-128 of its content."""

    name: str
    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Base:
    """The manifest. Everything that rows of the base depend on stands in it.

    events, erasures, rejected: records of each kind. clock_ms: the greatest append time of the accepted records. future_tolerance_ms: by
    which records were rejected. fingerprints: (sequence id, fingerprint) of the definitions that the state keeps, ascending.
    """

    files: tuple[BaseFile, ...]
    events: int
    erasures: int
    rejected: int
    clock_ms: int
    future_tolerance_ms: int
    fingerprints: tuple[tuple[int, int], ...]
    version: int = BASE_VERSION

    @property
    def id(self) -> str:
        """32 hexadecimal digits."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self._fields(), sort_keys=True, separators=(",", ":")).encode())

    def to_json(self, source: str) -> str:
        """The manifest with its id, and the folder or URL where the files are; the latter is no part of the base and may be edited."""
        return json.dumps({"base": self.id, "source": source, "manifest": self._fields()}, indent=1) + "\n"

    def _fields(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["fingerprints"] = [[number, f"{fingerprint:016x}"] for number, fingerprint in self.fingerprints]
        return fields

    @staticmethod
    def from_json(text: str, where: str) -> tuple["Base", str]:
        """(base, source). Raises BaseError, which names `where`, if it is no whole manifest or was changed."""
        try:
            found = json.loads(text)
            fields = found["manifest"]
            if fields["version"] != BASE_VERSION:
                raise BaseError(f"{where}: a base of version {fields['version']}, this program reads {BASE_VERSION}: upgrade it")
            files = tuple(BaseFile(**file) for file in fields["files"])
            fingerprints = tuple((int(number), int(fingerprint, 16)) for number, fingerprint in fields["fingerprints"])
            base = Base(**{**fields, "files": files, "fingerprints": fingerprints})
            identity, source = str(found["base"]), str(found["source"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, BaseError):
                raise
            raise BaseError(f"{where}: not the manifest of a base: {error!r}") from error
        if base.id != identity:
            raise BaseError(f"{where}: the manifest was changed: its digest is {base.id}, it says {identity}; bootstrap again")
        return base, source


def is_accepted(records: LoggedActions, future_tolerance_ms: int) -> npt.NDArray[np.bool_]:
    """Which records of the history count: bool [n]. The same verdicts as `features.actions.decode_batch` gives."""
    events = records.events
    time_ms = events["event_time_ms"]
    action = (time_ms > 0) & (time_ms < TIME_MS_MAX) & (time_ms - future_tolerance_ms <= records.append_time_ms)
    action &= (events["action"] != 0) & (events["entity_kind"] != 0) & ~np.isinf(events["value"])
    return (records.append_time_ms >= 0) & (records.erase | action)


class Erasures:
    """The history's erasures: append time of each user's last one. An erasure drops what was appended or acted up to its append time."""

    def __init__(self, erased: Mapping[int, int] | None = None) -> None:
        """`erased`: append time in ms by user."""
        self._erased = dict(erased or {})
        self._index()

    def _index(self) -> None:
        self._users = np.array(sorted(self._erased), np.uint64)
        self._times_ms = np.array([self._erased[user] for user in self._users.tolist()], np.int64)

    def add(self, users: _U64, append_time_ms: npt.NDArray[np.int64]) -> None:
        """Adds erasures: users uint64 [n], append_time_ms int64 [n]."""
        for user, time_ms in zip(users.tolist(), append_time_ms.tolist(), strict=True):
            self._erased[user] = max(self._erased.get(user, 0), time_ms)
        self._index()

    def survives(self, records: LoggedActions) -> npt.NDArray[np.bool_]:
        """Which records are actions that no erasure drops: bool [n]."""
        alive = ~records.erase
        if len(self._users):
            at = np.searchsorted(self._users, records.users).clip(max=len(self._users) - 1)
            erased_ms = np.where(self._users[at] == records.users, self._times_ms[at], -1)
            alive &= (records.events["event_time_ms"] > erased_ms) & (records.append_time_ms > erased_ms)
        return alive

    def of(self, users: Collection[int] | None = None) -> dict[int, int]:
        """Append time by user, of all or of some."""
        return dict(self._erased) if users is None else {user: self._erased[user] for user in self._erased.keys() & users}


class BaseRecords:
    """The history's accepted records of some users, for replay: what a base says of them, under any definition."""

    def __init__(self, base: Base, users: Iterable[int], erasures: Erasures, history: Iterable[LoggedActions]) -> None:
        """Keeps what concerns these users. `erasures`: of the whole history."""
        self.base = base
        wanted = np.array(sorted(users), np.uint64)
        self._erased = erasures.of(set(wanted.tolist()))
        own_erasures = Erasures(self._erased)
        parts = [(np.zeros(0, np.uint64), np.zeros(0, EVENT_DTYPE))]
        for records in history:
            own = take_records(records, np.flatnonzero(np.isin(records.users, wanted)))
            alive = np.flatnonzero(is_accepted(own, base.future_tolerance_ms) & own_erasures.survives(own))
            parts.append((own.users[alive], own.events[alive]))
        users_of, events_of = zip(*parts, strict=True)
        self._users, self._events = sort_history(np.concatenate(users_of), np.concatenate(events_of))

    def row(self, what: Definition, user_id: int, log_epoch: int, partition: int) -> bytes | None:
        """The user's row at offset -1; None where there is none."""
        user = np.uint64(user_id)
        own = slice(int(np.searchsorted(self._users, user, "left")), int(np.searchsorted(self._users, user, "right")))
        erased = {user_id: self._erased[user_id]} if user_id in self._erased else {}
        place = {"clock_ms": self.base.clock_ms, "log_epoch": log_epoch, "partition": partition}
        _, rows = fold_history(what, self._users[own], self._events[own], erased, **place)
        return rows[0] if rows else None


def take_records(records: LoggedActions, where: npt.NDArray[np.int64]) -> LoggedActions:
    """Some of the records."""
    return LoggedActions(
        records.users[where],
        records.events[where],
        records.append_time_ms[where],
        records.log_epoch[where],
        records.partition[where],
        records.offset[where],
        records.erase[where],
    )

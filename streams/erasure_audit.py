"""The audit of erasures: what was asked, where it was done, and what is still due by when. Appended to, never rewritten.

Each line of the file is one of
    {"kind": "asked", "at_ms", "deadline_ms", and the fields of `features.erasures.Erasure`}
    {"kind": "place", "at_ms", "user_id", "event_id", "place", "status", "detail"}
and a place's newest line counts. It names users by id: an audit of erasures cannot do without; it holds nothing else of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from features.erasures import Erasure, append_lines, read_lines

AUDIT = Path("audit", "erasures.jsonl")
"""The audit's file below the home folder."""

PLACES = (
    "state",
    "view",
    "snapshots",
    "standby",
    "dead letters",
    "ranking log",
    "actions topic",
    "archives",
    "canonical logs",
    "base history",
    "embeddings",
    "training arrays",
    "warm-up requests",
)
"""Where something of a user may stand."""

Status = Literal["done", "due", "absent"]
Key = tuple[int, int, int]
"""User id, event id, and 0; for erasures without an event id the offset."""


@dataclass
class Place:
    """One place of one erasure. at_ms: since when it is so, milliseconds since 1970-01-01 UTC."""

    status: Status = "due"
    at_ms: int = 0
    detail: str = ""


@dataclass
class Entry:
    """One erasure: the records of one user with one event id. first: the one that counts for the deadline; last: what it reaches up to."""

    first: Erasure
    last: Erasure
    asked_ms: int
    deadline_ms: int
    places: dict[str, Place] = field(default_factory=lambda: {name: Place() for name in PLACES})
    records: int = 1

    @property
    def open(self) -> bool:
        """Whether anything is due."""
        return any(place.status == "due" for place in self.places.values())

    def overdue(self, now_ms: int) -> list[str]:
        """Places that are due though the deadline has passed."""
        return [name for name, place in self.places.items() if place.status == "due" and now_ms > self.deadline_ms]


def key_of(erasure: Erasure) -> Key:
    """What a retried erasure shares with the first one."""
    return erasure.user_id, erasure.event_id, 0 if erasure.event_id else erasure.offset


class Audit:
    """One audit file, read whole at the start."""

    def __init__(self, path: Path) -> None:
        """Raises LedgerError: a line cannot be read."""
        self._path = path
        self.entries: dict[Key, Entry] = {}
        self._records: set[tuple[int, int, int]] = set()
        self._unwritten: list[dict[str, Any]] = []
        for said in read_lines(path):
            self._take(said)

    def asked(self, erasures: Iterable[Erasure], deadline_ms: int, now_ms: int) -> int:
        """Adds erasures that it does not have; `deadline_ms`: how long each may take. Returns how many records were new."""
        lines = []
        for erasure in sorted(erasures, key=lambda one: (one.append_time_ms, one.partition, one.offset)):
            if _record(erasure) not in self._records:
                by_ms = erasure.append_time_ms + deadline_ms
                lines.append({"kind": "asked", "at_ms": now_ms, "deadline_ms": by_ms, **erasure.to_json()})
                self._take(lines[-1])
        append_lines(self._path, lines)
        return len(lines)

    def set(self, entry: Entry, name: str, status: Status, detail: str, now_ms: int) -> None:
        """Notes how a place stands, where that is news; `write` puts it into the file."""
        place = entry.places[name]
        if place.at_ms and (place.status, place.detail) == (status, detail):
            return
        user, event, _ = key_of(entry.last)
        said = {"kind": "place", "at_ms": now_ms, "user_id": f"{user:016x}", "event_id": f"{event:016x}", "offset": entry.first.offset}
        self._unwritten.append({**said, "place": name, "status": status, "detail": detail})
        entry.places[name] = Place(status, now_ms, detail)

    def write(self) -> None:
        """Appends what `set` noted. Where a crash comes before, the next run finds the same and notes it then."""
        append_lines(self._path, self._unwritten)
        self._unwritten.clear()

    def of_user(self, user_id: int | None) -> list[Entry]:
        """The erasures of a user, or all, in the order in which they were asked for."""
        return [entry for (user, _, _), entry in self.entries.items() if user_id in (None, user)]

    def _take(self, said: dict[str, Any]) -> None:
        if said["kind"] == "place":
            user, event = int(said["user_id"], 16), int(said["event_id"], 16)
            entry = self.entries.get((user, event, 0 if event else said["offset"]))
            if entry is not None:
                entry.places[said["place"]] = Place(said["status"], said["at_ms"], said["detail"])
            return
        erasure = Erasure.from_json({name: value for name, value in said.items() if name not in ("kind", "at_ms", "deadline_ms")})
        self._records.add(_record(erasure))
        entry = self.entries.get(key_of(erasure))
        if entry is None:
            self.entries[key_of(erasure)] = Entry(erasure, erasure, erasure.append_time_ms, said["deadline_ms"])
            return
        entry.records += 1
        if erasure.append_time_ms >= entry.last.append_time_ms:
            entry.last = erasure
            entry.places = {name: Place() for name in PLACES}  # what came between the two is erased by the second alone


def _record(erasure: Erasure) -> tuple[int, int, int]:
    return erasure.log_epoch, erasure.partition, erasure.offset

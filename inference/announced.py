"""What is announced for a ranker, and so what a server that starts serves.

An announcement counts until a later one, also for servers that start behind it: a rollback holds. Only a release that was made after it, as
`publish` does where no stack runs to announce it to, is newer than what was said.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from inference.release import ReleaseError, newest_releases, release_folder
from protos.v1.ranking_pb2 import ReleaseAnnouncement

PREVIOUS_MAX = 5
"""Releases before the present one that an announcement names."""


@dataclass(frozen=True)
class Announced:
    """One announcement. time_ms: milliseconds since 1970-01-01 UTC; previous: releases announced before it, newest first."""

    release_id: str
    generations: Mapping[str, str] = field(default_factory=dict)
    time_ms: int = 0
    previous: tuple[str, ...] = ()

    @classmethod
    def decode(cls, message: ReleaseAnnouncement) -> "Announced":
        """Of a message."""
        return cls(message.release_id, dict(message.generations), message.announced_time_ms, tuple(message.previous))

    def followed_by(self, release_id: str) -> tuple[str, ...]:
        """`previous` of the announcement of another release behind this one."""
        told = dict.fromkeys((self.release_id, *self.previous))
        return tuple(name for name in told if name != release_id)[:PREVIOUS_MAX]


def options(releases: Path, announced: Mapping[str, Announced]) -> dict[str, list[Announced]]:
    """What may be served for each ranker, best first: a start takes the first that can be. The newest release is always among
    them, one for experiments only where it is announced.

    Raises:
        ReleaseError: the newest release's manifest.json cannot be read.
    """
    newest = newest_releases(releases)
    found: dict[str, list[Announced]] = {}
    for ranker in sorted({*newest, *announced}):
        said, latest = announced.get(ranker), newest.get(ranker)
        if latest is None or said is None:
            found[ranker] = [said] if said is not None else [Announced(str(latest))]
        elif said.release_id == latest:
            found[ranker] = [said]
        elif _created_ms(releases, latest) > said.time_ms:
            found[ranker] = [Announced(latest)]
        else:
            found[ranker] = [said, Announced(latest)]
    return found


def back_to(announced: Announced) -> str | None:
    """The release that a rollback goes to: of those announced before, the last one that is older than the present; None: there is none.

    So a second rollback goes further back, not forth to what the first one left. Ids of a ranker sort by the time of the release.
    """
    return next((name for name in announced.previous if name < announced.release_id), None)


def _created_ms(releases: Path, release_id: str) -> int:
    try:
        return int(json.loads((release_folder(releases, release_id) / "manifest.json").read_bytes())["created_ms"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(f"{release_id}: manifest.json cannot be read: {error}") from error

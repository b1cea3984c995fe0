"""Sequences from wherever they are: this machine's view where it is up to date, the announced owner's reader, else an older state.

A `features.ports.SequenceSource`: everything that waits is awaited. For each partition, in this order:

1. the local view, where it included the log's end within `fresh_ms`;
2. the owner announced last: one call for all users of an address. Where its state is older than `fresh_ms`, standbys are asked too, and the
   furthest state answers;
3. the furthest state among those that answer: standbys, former owners, the local view however old it is;
4. SequenceUnavailableError.

A state counts only if it is of the owner's log, and a row only if it is whole and of its user, wherever it comes from. An announcement that
is not true any more therefore leads on to the next place.
"""

import asyncio
import time
from collections.abc import Coroutine
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from features.domain import Domain
from features.ids import partition_of, user_key
from features.ports import Origin, Position, Reading, SequenceCorruptError, SequenceReader, SequenceUnavailableError
from features.sequence import definition
from features.waiting import includes
from streams.owner_link import OwnerLink
from streams.owners import Owners, Route
from streams.reader_service import users_max
from streams.waiting import wait_for_positions

Answer = TypeVar("Answer")

OLDER_MAX = 4
"""Most other places that are asked where the owner does not answer."""
_PACE_S = 0.1
_COUNTED = ("reads", "users", "local", "owner", "older", "unavailable", "corrupt", "stale", "calls", "failed_calls")


@dataclass
class _Part:
    """The users of one partition in one read, by their place in it."""

    partition: int
    route: Route
    places: list[int] = field(default_factory=list)
    users: list[int] = field(default_factory=list)
    local: list[Reading] | None = None
    found: list[Reading] | None = None
    refusal: Exception | None = None


@dataclass(frozen=True)
class _Question:
    """What is asked of every place. Times by time.monotonic."""

    sequence: str
    fingerprint: int
    until_s: float
    after: Seq[Position]
    wait_until_s: float

    def left_s(self) -> float:
        """Seconds until the answer must be there."""
        return self.until_s - time.monotonic()

    def wait_s(self) -> float:
        """Seconds that may be waited for `after`."""
        return max(0.0, self.wait_until_s - time.monotonic()) if self.after else 0.0


class RoutedSource:
    """Reads from the local view, from owners, and from whoever still has an older state. Used in one event loop.

    Args:
        local: the view of this machine; it may have none of the partitions.
        owners: who has what, kept current by the announcements.
        own_address: the reader that serves the local view, which need not be asked over the network; "" for none.
        fresh_ms: how old a state may be to count as up to date, milliseconds.
        root_certificate, certificate, key, token: see `streams.remote_reader.RemoteReader`.
    """

    def __init__(
        self,
        local: SequenceReader,
        owners: Owners,
        domain: Domain,
        partition_count: int,
        *,
        own_address: str = "",
        fresh_ms: int = 2_000,
        root_certificate: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        token: str | None = None,
    ) -> None:
        self._local, self._owners, self._partition_count = local, owners, partition_count
        self._own_address, self._fresh_ms = own_address, fresh_ms
        self._access: dict[str, Any] = {"root_certificate": root_certificate, "certificate": certificate, "key": key, "token": token}
        self._fingerprints = {name: definition(domain, name).fingerprint for name in domain.sequence}
        self._users_max = {name: users_max(domain, name) for name in domain.sequence}
        self._links: dict[str, OwnerLink] = {}
        self._seen_version = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._counters = dict.fromkeys(_COUNTED, 0)

    async def read(
        self, sequence: str, user_ids: Seq[int], *, timeout_s: float, after: Seq[Position] = (), wait_s: float = 0.0
    ) -> list[Reading]:
        """See `features.ports.SequenceSource.read`; raises as `SequenceReader.read`."""
        now_s = time.monotonic()
        question = _Question(sequence, self._fingerprints[sequence], now_s + timeout_s, after, now_s + wait_s)
        self._counters["reads"] += 1
        self._counters["users"] += len(user_ids)
        self._drop_links()
        parts = self._parts(user_ids)
        for part in parts:
            self._look(question, part)
        if after or any(part.found is None for part in parts):
            await self._ask(question, parts)
        settled = [self._settled(part) for part in parts]
        if after and not all(includes([reading.watermark for reading in found], after) for found in settled):
            # Who waited at an owner has no time left now. An older state is asked again, but not at once.
            await asyncio.sleep(min(question.wait_s(), _PACE_S))
        readings: list[Reading | None] = [None] * len(user_ids)
        for part, found in zip(parts, settled, strict=True):
            for place, reading in zip(part.places, found, strict=True):
                readings[place] = reading
        return [reading for reading in readings if reading is not None]

    def statistics(self) -> dict[str, float]:
        """Counters since start: users by where their sequence came from, calls and what came of them; and the links of now."""
        tripped = sum(link.breaker.tripped for link in self._links.values())
        trips = sum(link.breaker.trips for link in self._links.values())
        local = {f"view_{name}": value for name, value in self._local.statistics().items()}
        return {**self._counters, "links": len(self._links), "links_tripped": tripped, "trips": trips, **local}

    async def close(self) -> None:
        """Closes every channel. The local view stays open."""
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links), *self._closing, return_exceptions=True)

    def _parts(self, user_ids: Seq[int]) -> list[_Part]:
        parts: dict[int, _Part] = {}
        for place, user_id in enumerate(user_ids):
            partition = partition_of(user_key(user_id), self._partition_count)
            part = parts.get(partition)
            if part is None:
                part = parts[partition] = _Part(partition, self._owners.route(partition))
            part.places.append(place)
            part.users.append(user_id)
        return list(parts.values())

    def _look(self, question: _Question, part: _Part) -> None:
        """Reads the local view: an answer where it is up to date, else something to come back to."""
        try:
            part.local = self._local.read(question.sequence, part.users)
        except (SequenceUnavailableError, SequenceCorruptError) as error:
            self._counters["corrupt"] += isinstance(error, SequenceCorruptError)
            part.refusal = error
            return
        if not self._is_of_log(part, part.local):
            part.local = None
        elif self._is_fresh(part.local):
            part.found = part.local

    async def _ask(self, question: _Question, parts: list[_Part]) -> None:
        """Waits on the local view, and asks owners, then others, for the parts that have no answer. All ends with the caller."""
        here = [part for part in parts if part.found is not None]
        away = [part for part in parts if part.found is None]
        waits = [self._wait_here(question, part) for part in here]
        await _together([*waits, self._ask_away(question, away)] if away else waits)

    async def _wait_here(self, question: _Question, part: _Part) -> None:
        try:
            await wait_for_positions(self._local, part.users, question.after, question.wait_s())
            part.found = self._local.read(question.sequence, part.users)
        except (SequenceUnavailableError, SequenceCorruptError):
            pass  # what was read before the wait is an answer still

    async def _ask_away(self, question: _Question, parts: list[_Part]) -> None:
        by_owner: dict[str, list[_Part]] = {}
        for part in parts:
            if part.route.owner not in ("", self._own_address):
                by_owner.setdefault(part.route.owner, []).append(part)
        await _together([self._ask_owner(question, address, asked) for address, asked in by_owner.items()])
        behind = [part for part in parts if part.found is None or not self._is_fresh(part.found)]
        await _together([self._ask_others(question, part) for part in behind])

    async def _ask_owner(self, question: _Question, address: str, parts: list[_Part]) -> None:
        """One call for all users of an owner; it may take half of the time that is left, for others may have to be asked."""
        wait_s = min(question.wait_s(), question.left_s() * 0.8)
        timeout_s = wait_s + (question.left_s() - wait_s) / 2
        most = self._users_max[question.sequence]
        if len(parts) > 1 and sum(len(part.users) for part in parts) > most:
            await _together([self._ask_owner(question, address, [part]) for part in parts])
            return
        users = [user for part in parts for user in part.users]
        calls = [
            self._call(question, address, users[start : start + most], timeout_s, wait_s, Origin.OWNER)
            for start in range(0, len(users), most)
        ]
        try:
            readings = [reading for found in await _together(calls) for reading in found]
        except (SequenceUnavailableError, SequenceCorruptError) as error:
            if len(parts) > 1 and not self._link(address).breaker.tripped:  # one of the partitions is not there: the others may be
                await _together([self._ask_owner(question, address, [part]) for part in parts])
                return
            for part in parts:
                part.refusal = error
            return
        for part in parts:
            found, readings = readings[: len(part.users)], readings[len(part.users) :]
            if self._is_of_log(part, found):
                part.found = found
            else:
                part.refusal = SequenceUnavailableError(f"sequence reader {address}: its state is of another log or partition")

    async def _ask_others(self, question: _Question, part: _Part) -> None:
        """The furthest state of those that answer: standbys where the owner is late, everybody where it does not answer."""
        owner = part.found
        is_owners = part.local is not None and part.route.owner in ("", self._own_address)
        places = part.route.standbys if owner is not None or is_owners else (*part.route.standbys, *part.route.formers)
        others = [place for place in places if place != self._own_address][:OLDER_MAX]
        left_s, most = question.left_s(), self._users_max[question.sequence]
        answers = [] if owner is None else [owner]
        if part.local is not None:
            answers.append([replace(reading, origin=Origin.OLDER) for reading in part.local])
        if len(part.users) <= most and left_s > 0:
            asked = (self._call(question, place, part.users, left_s * 0.8, 0.0, Origin.OLDER) for place in others)
            for found in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(found, list):
                    answers += [found] if self._is_of_log(part, found) else []
                elif isinstance(found, SequenceCorruptError) or part.refusal is None:
                    part.refusal = found if isinstance(found, Exception) else part.refusal
        if answers:
            # Of equally far states the first counts: the owner's before any other's.
            part.found = max(answers, key=lambda readings: readings[0].watermark.offset)

    async def _call(
        self, question: _Question, address: str, users: list[int], timeout_s: float, wait_s: float, origin: Origin
    ) -> list[Reading]:
        self._counters["calls"] += 1
        try:
            return await self._link(address).read(
                question.sequence,
                users,
                question.fingerprint,
                timeout_s=max(timeout_s, 0.001),
                after=question.after,
                wait_s=wait_s,
                origin=origin,
            )
        except (SequenceUnavailableError, SequenceCorruptError) as error:
            self._counters["failed_calls"] += 1
            self._counters["corrupt"] += isinstance(error, SequenceCorruptError)
            raise

    def _settled(self, part: _Part) -> list[Reading]:
        """The part's answer, counted. Raises what kept from one."""
        if part.found is not None:
            self._counters[part.found[0].origin.name.lower()] += len(part.users)
            return part.found
        self._counters["unavailable"] += len(part.users)
        if isinstance(part.refusal, SequenceCorruptError):
            raise part.refusal
        raise SequenceUnavailableError(
            f"partition {part.partition}: neither its owner ({part.route.owner or 'none is announced'}) nor an older state answers: "
            f"{part.refusal or 'what there is belongs to another log'}"
        ) from part.refusal

    def _is_of_log(self, part: _Part, readings: list[Reading]) -> bool:
        """Whether it is the partition's state in the log of its owner; where nobody says which log that is, any."""
        epoch = part.route.log_epoch
        good = all(at.watermark.partition == part.partition and epoch in (0, at.watermark.log_epoch) for at in readings)
        self._counters["stale"] += not good
        return good

    def _is_fresh(self, readings: list[Reading]) -> bool:
        return 0 <= readings[0].state_age_ms <= self._fresh_ms

    def _link(self, address: str) -> OwnerLink:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = OwnerLink(address, **self._access)
        return link

    def _drop_links(self) -> None:
        """Closes the links to addresses that nobody announces any more."""
        if self._seen_version == self._owners.version:
            return
        self._seen_version = self._owners.version
        announced = self._owners.addresses()
        for address in [address for address in self._links if address not in announced]:
            task = asyncio.create_task(self._links.pop(address).close(), name=f"close link {address}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def _together(waits: Seq[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """What each of them gives, once all have ended; raises the first error. One alone costs no task."""
    if len(waits) == 1:
        return [await waits[0]]
    answers = await asyncio.gather(*waits, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]

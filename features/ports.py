"""What the ranking server and replay need from outside of `features` and `inference`: `deploy` hands the real parts in."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol


@dataclass(frozen=True, order=True)
class Position:
    """A place in the log (protos Position). Positions compare only within one log_epoch and partition."""

    log_epoch: int
    partition: int
    offset: int


class Origin(IntEnum):
    """Where a sequence came from, from best to worst; the numbers of protos SequenceSource."""

    LOCAL = 1
    """The view of this machine, up to date."""
    OWNER = 2
    """The reader beside the worker that owns the partition."""
    OLDER = 3
    """An older state that answered in the owner's place."""
    NONE = 4
    """No state answered."""


@dataclass(frozen=True)
class Reading:
    """A user's row and the watermark of the same moment.

    Replay of the log up to and including `watermark` gives exactly `row`. A user without a row has an empty one, and a watermark too.
    """

    user_id: int
    row: bytes
    watermark: Position
    log_clock_ms: int
    """Greatest append time of the partition at the watermark, milliseconds; 0: nothing appended yet."""
    state_age_ms: int = field(default=-1, compare=False)
    """How long before the read the state last included the log's end, by the machine's clock, milliseconds; -1: not known.

    It says when the reading was made, not what was read: two readings of one state are equal.
    """
    origin: Origin = field(default=Origin.LOCAL, compare=False)
    """Whose state it is; like the age, no part of what was read."""


class SequenceReader(Protocol):
    """Reads sequences: one interface for the local view and for a reader service on another machine.

    A local reader answers from memory within microseconds and may be called from an event loop. A remote one waits for the network, up to
    its deadline: call it from a thread. Readers may be shared between threads.
    """

    def read(self, sequence: str, user_ids: Seq[int]) -> list[Reading]:
        """One reading a user, in order; those of one partition and one call to its owner are of one moment.

        Raises:
            KeyError: the domain file does not define the sequence.
            SequenceUnavailableError: no state is there to read (yet), or, remote, no answer came within the deadline.
            SequenceCorruptError: a row fails its checksum or belongs to another user: DATA_LOSS.
        """
        ...

    def position(self, user_id: int) -> Position:
        """The watermark that a read of this user would have now: cheap, for waiting on `after`.

        Raises:
            SequenceUnavailableError: see `read`.
        """
        ...

    def statistics(self) -> dict[str, float]:
        """Counters since start."""
        ...

    def close(self) -> None:
        """Releases what is held."""
        ...


class SequenceSource(Protocol):
    """What the ranking server reads from: wherever a user's sequence is, without ever blocking the event loop."""

    async def read(
        self, sequence: str, user_ids: Seq[int], *, timeout_s: float, after: Seq[Position] = (), wait_s: float = 0.0
    ) -> list[Reading]:
        """See `SequenceReader.read`; an answer, or SequenceUnavailableError, comes within `timeout_s`.

        It may wait up to `wait_s`, less than `timeout_s`, until the readings include `after` (`features.waiting.includes`); one that does
        not answers at once, and is asked again.
        """
        ...

    def statistics(self) -> dict[str, float]:
        """Counters since start."""
        ...


class RankingSink(Protocol):
    """Takes ranking-log records without ever delaying an answer: bounded, drops are counted."""

    def put(self, user_id: int, record: bytes) -> bool:
        """Queues one serialized RankingRecord; False: dropped and counted."""
        ...

    def statistics(self) -> dict[str, float]:
        """Counters since start: sent, dropped, failed."""
        ...

    def close(self) -> None:
        """Sends what is queued, bounded in time."""
        ...


class SequenceUnavailableError(RuntimeError):
    """No state to read: the worker has not published a view, the partition is not here, or its reader service does not answer."""


class SequenceCorruptError(RuntimeError):
    """A stored row is damaged or belongs to another user."""


class SequenceForeignError(SequenceCorruptError):
    """A stored row is whole, but of another log or definition, or of a newer program: nothing to repair, something to configure."""


@dataclass(frozen=True)
class Caller:
    """Who calls, as a `Guard` found out. `name` is empty where callers are not told apart (open calls, one token for all)."""

    name: str
    permissions: frozenset[str]


class Guard(Protocol):
    """Decides who may call which method. One for every service, over gRPC or not."""

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        """Lets a call pass.

        Args:
            method: full name of the gRPC method, such as "/freshrank.v1.Ranking/Rank"; another door asks for the method that it stands for.
            metadata: names in lower case and values; "authorization" is read.

        Raises:
            UnauthenticatedError: no token, or one that does not count (any more).
            ForbiddenError: the caller has not the method's permission, or nobody has it here.
        """
        ...


class UnauthenticatedError(RuntimeError):
    """The call does not say who calls, or cannot prove it: UNAUTHENTICATED."""


class ForbiddenError(RuntimeError):
    """The caller may not use this method: PERMISSION_DENIED."""


@dataclass(frozen=True)
class Door:
    """What a gRPC server lets calls in by: interceptors, channel options and TLS credentials of `grpc`. `deploy/door.py` makes it.

    statistics: what it counted; calls that it refused are `refused_` with a reason.
    """

    interceptors: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    credentials: Any = None
    statistics: Callable[[], Mapping[str, float]] = dict


OPEN_DOOR = Door()
"""Lets everybody in, unencrypted: for loopback, and for a server inside of a test."""

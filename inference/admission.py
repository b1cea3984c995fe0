"""Admission at the door: how many rankings are in work at once, who waits, and who is told to come back later.

Two parts. The *limit* on rankings in work adapts: a window's mean latency against the latency of a server with nothing to wait for says
whether more of them only wait for each other (gradient limiter, as in Netflix's concurrency-limits). The *door* before it lets a burst wait
for a place, but no queue stand: where all places were taken for less than FULL_SHARE_MAX of the last seconds any number may wait, else
half as many as there are places, which wait for about half a ranking (after controlled delay: B. Maurer, Fail at Scale, ACM Queue 13(8),
2015; it looks at how long the queue was not empty, but clients that hold back leave it empty now and then though the server is full). A
server that is asked for more than it can do therefore answers what it takes nearly as fast as ever, and refuses the rest at once.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S_MAX, RETRY_S_MIN = 0.5, 0.005
FULL_SHARE_MAX, FULL_OVER_S = 0.4, 3.0
"""Bursts at a third of what a server can do fill its places for a quarter of the time, a load beyond it for more than half."""
WINDOW_S, WINDOW_RANKINGS_MIN = 0.25, 8
BASELINE_WINDOWS = 240
"""The latency without waiting is the least window mean of so many windows: a model that became slower is found out within a minute."""
TOLERANCE = 1.5
"""A mean latency of up to this many times the least is not yet waiting."""
SMOOTHING = 0.3
LIMIT_FIRST = 2.0


class OverloadedError(RuntimeError):
    """As many rankings as can be done are in work: shed at the door. `retry_after_ms`: when a place is likely."""

    def __init__(self, message: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class Admission:
    """The places of one event loop's rankings.

    Args:
        places_max: most rankings in work at once, whatever the latency says, and most that stand aside. The limit starts at LIMIT_FIRST and
            doubles with each window, until one is slower: a server that begins with all places has a queue before it knows its latency.
        waiting_max: most rankings that wait for a place.
    """

    def __init__(self, places_max: int, waiting_max: int) -> None:
        self.limit = min(LIMIT_FIRST, float(places_max))
        self.in_work = 0
        self.aside = 0
        """Rankings that have given their place back for a while."""
        self._is_starting = True
        self.shed = 0
        self._places_max, self._waiting_max = places_max, waiting_max
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._full_share, self._weighed_s = 0.0, time.monotonic()
        self._window_at_s, self._window_sum_s, self._window_count, self._window_peak = time.monotonic(), 0.0, 0, 0
        self._means_s: deque[float] = deque(maxlen=BASELINE_WINDOWS)

    @property
    def waiting(self) -> int:
        """Rankings that wait for a place."""
        return len(self._waiting)

    async def enter(self, left_s: float) -> None:
        """Takes a place, waiting for one within the rules above and for half of the caller's time at most.

        Raises:
            OverloadedError: none came free.
        """
        self._weigh()
        self._window_peak = max(self._window_peak, self.in_work + len(self._waiting) + 1)
        if self.in_work < int(self.limit) and not self._waiting:
            self.in_work += 1
            return
        if len(self._waiting) >= self._room():
            raise self._overloaded("the queue at the door is full")
        wait_s = min(WAIT_S_MAX, left_s / 2)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():  # the place came at the very moment that the wait ended
                self._pass_on()
            elif place in self._waiting:
                self._waiting.remove(place)
            if isinstance(error, TimeoutError):
                raise self._overloaded(f"no place within {wait_s * 1e3:.0f} ms") from None
            raise

    def leave(self, seconds: float | None) -> None:
        """Gives the place back. `seconds`: how long the ranking took; None: it says nothing about the load (it was refused, say)."""
        if seconds is not None:
            self._observe(seconds)
        self._pass_on()

    @contextmanager
    def taken(self) -> Iterator["Stay"]:
        """What stands between `enter` and `leave`."""
        stay = Stay()
        started_s = time.monotonic()
        try:
            yield stay
        finally:
            self.leave(time.monotonic() - started_s - stay.aside_s if stay.counts else None)

    @contextmanager
    def standing_aside(self, stay: "Stay") -> Iterator[None]:
        """For a ranking in `taken` that waits for something else than work: another one has its place meanwhile.

        It goes on afterwards at once, whatever the limit: it has waited already. Raises OverloadedError: too many stand aside.
        """
        if self.aside >= self._places_max:
            raise self._overloaded(f"{self.aside} rankings wait for their positions")
        started_s = time.monotonic()
        self.aside += 1
        self._pass_on()
        try:
            yield
        finally:
            self.aside -= 1
            self.in_work += 1
            stay.aside_s += time.monotonic() - started_s

    def _room(self) -> int:
        """How many may wait."""
        return self._waiting_max if self._full_share < FULL_SHARE_MAX else min(max(1, int(self.limit / 2)), self._waiting_max)

    def _weigh(self) -> None:
        """Adds the time since the last change to the share of it in which no place was free."""
        now_s = time.monotonic()
        kept = math.exp((self._weighed_s - now_s) / FULL_OVER_S)
        self._full_share = kept * self._full_share + (1 - kept) * (self.in_work >= int(self.limit))
        self._weighed_s = now_s

    def _pass_on(self) -> None:
        self._weigh()
        self.in_work -= 1
        while self._waiting and self.in_work < int(self.limit):
            place = self._waiting.popleft()
            if not place.done():
                self.in_work += 1
                place.set_result(None)

    def _observe(self, seconds: float) -> None:
        self._window_sum_s += seconds
        self._window_count += 1
        now_s = time.monotonic()
        if now_s - self._window_at_s < WINDOW_S or self._window_count < WINDOW_RANKINGS_MIN:
            return
        mean_s = self._window_sum_s / self._window_count
        self._means_s.append(mean_s)
        gradient = min(1.0, max(0.5, TOLERANCE * min(self._means_s) / mean_s))
        # With few in work it is not they who wait for each other: a slow moment of the machine says nothing about the limit.
        if self._window_peak > self.limit / 2:
            self._is_starting = self._is_starting and gradient == 1.0
            self.limit += self.limit if self._is_starting else SMOOTHING * (self.limit * gradient + 1 - self.limit)
            self.limit = min(max(self.limit, 1.0), float(self._places_max))
        self._window_at_s, self._window_sum_s, self._window_count = now_s, 0.0, 0
        self._window_peak = self.in_work + len(self._waiting)

    def _overloaded(self, why: str) -> OverloadedError:
        self.shed += 1
        mean_s = self._means_s[-1] if self._means_s else WAIT_S_MAX
        retry_after_ms = int(1e3 * max(mean_s * (len(self._waiting) + 1) / max(self.limit, 1.0), RETRY_S_MIN)) + 1
        return OverloadedError(
            f"{why}; {self.in_work} rankings are in work: retry in {retry_after_ms} ms, or at another server", retry_after_ms
        )


class Stay:
    """One ranking's stay. `aside_s`: time in it that was no work (waiting for `after`); `counts`: whether it tells of the load;
    called_s: when the call came (time.monotonic), which was before the wait at the door."""

    def __init__(self) -> None:
        self.called_s = time.monotonic()
        self.aside_s = 0.0
        self.counts = False

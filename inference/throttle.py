"""The client's part of overload: not to send what the server would only refuse, and not to ask again without measure.

Adaptive throttling (B. Beyer et al., Site Reliability Engineering, 2016, chapter 21): of the last WINDOW_S a client counts calls and those
that were accepted; when calls are more than FACTOR times the accepted ones, it refuses new ones itself with the probability that brings
them back to that. A refused call is tried again once, after the server's hint, as long as such second tries are a tenth of the calls.
"""

import random
import threading
import time
from collections import deque

WINDOW_S, BUCKET_S = 2.0, 0.1
FACTOR = 1.5
"""Calls that reach the server for each accepted one: the part above 1 finds out when it is well again, and then grows by that factor in
each window. From nothing to everything takes 15 s."""
CALLS_MIN, SHARE_MIN = 5.0, 0.05
"""So many calls in the window, and this share of all, are sent whatever became of the others."""
RETRY_SHARE = 0.1


class Throttle:
    """Counts of one server address. Safe to share between threads."""

    def __init__(self, *, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._buckets: deque[list[float]] = deque()
        self._retries = 1.0
        self.refused_here = 0
        """Calls that were never sent."""

    def allows(self) -> bool:
        """Whether to send a call now."""
        with self._lock:
            calls, accepted = self._totals()
            over = min((calls - FACTOR * accepted - CALLS_MIN) / (calls + 1), 1 - SHARE_MIN)
            allowed = self._random.random() >= over
            self.refused_here += not allowed
            self._add(1, 0)  # a call that was refused here counts too: it was wanted
            self._retries = min(self._retries + RETRY_SHARE, 10.0)
            return allowed

    def accepted(self) -> None:
        """A call was not refused at the server's door for want of places, whatever else became of it."""
        with self._lock:
            self._add(0, 1)

    def may_retry(self) -> bool:
        """Whether a refused call may be tried again; takes one of the allowed retries."""
        with self._lock:
            if self._retries < 1:
                return False
            self._retries -= 1
            return True

    def _add(self, calls: int, accepted: int) -> None:
        now_s = time.monotonic()
        if not self._buckets or now_s - self._buckets[-1][0] >= BUCKET_S:
            self._buckets.append([now_s, 0, 0])
        self._buckets[-1][1] += calls
        self._buckets[-1][2] += accepted

    def _totals(self) -> tuple[float, float]:
        oldest_s = time.monotonic() - WINDOW_S
        while self._buckets and self._buckets[0][0] < oldest_s:
            self._buckets.popleft()
        return sum(bucket[1] for bucket in self._buckets), sum(bucket[2] for bucket in self._buckets)

"""Whether a worker makes progress: measured against the log's end, not by whether its process is up.

The log's end is what a broker answered to another client than the consumer that is judged: one that silently stopped fetching still
believes in the end that it saw last. Three questions have three answers:
- live: would a restart help? False where the loop does not come round, or a partition has lag and makes no progress while a broker
  answers.
- ready: has the state reached the log's end of the moment of assignment? Once true it stays true.
- healthy: is everything as it should be? Also false where nothing is assigned, an assigned partition is not open yet, or no broker says
  where the log ends.
"""

from collections.abc import Mapping
from typing import Any


def lag_s(lag: int, log_clock_ms: int, caught_up_ms: int, now_ms: int) -> float:
    """No record older than this is missing from the state: an upper bound in seconds, 0 at the log's end.

    The next record was appended after the newest one in the state, and after the state last included the log's end (`caught_up_ms`). Both
    are 0 where there was no such moment; where both are, in an empty state that was never at the end, nothing is known and it says 0.
    """
    since_ms = max(log_clock_ms, caught_up_ms)
    return max(0, now_ms - since_ms) / 1000 if lag and since_ms > 0 else 0.0


def judge(
    partitions: Mapping[str, Mapping[str, Any]],
    *,
    assigned: bool,
    caught_up: bool,
    not_open: list[int],
    log_end_age_s: float,
    loop_age_s: float,
    stalled_s: float,
) -> dict[str, Any]:
    """The answers. partitions: lag and no_progress_s of each that is open; log_end_age_s: since a broker said where the log ends;
    loop_age_s: since the loop last came round; stalled_s: what counts as stuck.
    """
    stalled = [number for number, state in partitions.items() if state["lag"] and state["no_progress_s"] > stalled_s]
    end_known, turning = log_end_age_s <= stalled_s, loop_age_s <= stalled_s
    return {
        "healthy": assigned and not stalled and not not_open and end_known and turning,
        "live": turning and not (stalled and end_known),
        "ready": caught_up,
        "assigned": assigned,
        "caught_up": caught_up,
        "stalled": stalled,
        "not_open": not_open,
        "log_end_age_s": round(log_end_age_s, 3),
        "loop_age_s": round(loop_age_s, 3),
    }

"""Progress against lag, with ages given."""

import pytest

from streams.health import judge, lag_s


def judged(lag=0, no_progress_s=0.0, **other):
    partitions = {"0": {"lag": lag, "no_progress_s": no_progress_s}}
    fields = {"assigned": True, "caught_up": True, "not_open": [], "log_end_age_s": 1.0, "loop_age_s": 0.1, "stalled_s": 30.0}
    found = judge(partitions, **{**fields, **other})
    return found["live"], found["healthy"]


@pytest.mark.parametrize(
    ("state", "live", "healthy"),
    [
        ({}, True, True),
        ({"lag": 5_000, "no_progress_s": 2.0}, True, True),  # behind, and working on it
        ({"lag": 1, "no_progress_s": 31.0}, False, False),  # the process is up, the partition is stuck
        ({"lag": 0, "no_progress_s": 3_600.0}, True, True),  # a quiet topic
        ({"lag": 1, "no_progress_s": 31.0, "log_end_age_s": 60.0}, True, False),  # no broker: a restart does not bring it back
        ({"log_end_age_s": 60.0}, True, False),
        ({"loop_age_s": 31.0}, False, False),
        ({"assigned": False}, True, False),  # waits for its group
        ({"not_open": [3]}, True, False),  # restores
    ],
)
def test_live_is_progress_against_lag(state, live, healthy):
    assert judged(**state) == (live, healthy)


def test_ready_stays_true_while_behind():
    found = judge({}, assigned=True, caught_up=True, not_open=[], log_end_age_s=99.0, loop_age_s=0.0, stalled_s=30.0)
    assert found["ready"]
    assert not found["healthy"]


def test_lag_in_seconds_is_bounded_by_the_newest_record_and_by_the_last_time_at_the_end():
    now_ms = 1_000_000
    assert lag_s(0, now_ms - 9_000, 0, now_ms) == 0
    assert lag_s(1, now_ms - 9_000, 0, now_ms) == 9.0
    assert lag_s(1, now_ms - 3_600_000, now_ms - 2_000, now_ms) == 2.0  # a quiet hour, then a record
    assert lag_s(1, 0, now_ms - 2_000, now_ms) == 2.0
    assert lag_s(1, now_ms + 50, 0, now_ms) == 0
    assert lag_s(1, 0, 0, now_ms) == 0

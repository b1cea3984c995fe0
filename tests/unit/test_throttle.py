"""The client's throttle: what counts as a refusal, that some calls always go through, that it ends when the server is well."""

import pytest

from inference import throttle
from inference.throttle import SHARE_MIN, WINDOW_S, Throttle


class Clock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throttle, "time", clock)
    return clock


def sent(held: Throttle, clock: Clock, calls_per_s: int, seconds: float, takes_per_s: float) -> list[bool]:
    """Whether each call was sent to a server that takes so many a second."""
    found, places = [], 0.0
    for _ in range(int(calls_per_s * seconds)):
        clock.now_s += 1 / calls_per_s
        places = min(places + takes_per_s / calls_per_s, 2.0)
        found.append(held.allows())
        if found[-1] and places >= 1:
            places -= 1
            held.accepted()
    return found


def test_of_ten_times_too_many_calls_a_little_more_are_sent_than_the_server_takes(clock):
    found = sent(Throttle(seed=1), clock, 500, 60, 50)[-5_000:]
    assert 1.2 < sum(found) / 500 < 2.0  # calls to the server for each one that it takes


def test_a_dead_server_is_still_asked_now_and_then(clock):
    found = sent(Throttle(seed=1), clock, 500, 60, 0)[-10_000:]
    assert 0.5 * SHARE_MIN < sum(found) / len(found) < 1.5 * SHARE_MIN


def test_soon_after_the_server_is_well_again_all_calls_are_sent(clock):
    held = Throttle(seed=1)
    sent(held, clock, 500, 30, 0)
    sent(held, clock, 500, 10 * WINDOW_S, 1_000)
    found = sent(held, clock, 500, 5, 1_000)
    assert sum(found) == len(found)


def test_second_tries_are_a_tenth_of_the_calls(clock):
    held = Throttle(seed=1)
    tries = 0
    for _ in range(1_000):
        clock.now_s += 0.1
        held.allows()
        held.accepted()
        tries += held.may_retry()
    assert 95 <= tries <= 105

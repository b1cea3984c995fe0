"""The door of the ranking service: places, waiting, refusing, and how the limit follows the latency."""

import asyncio

import pytest

from inference import admission
from inference.admission import Admission, OverloadedError


class Clock:
    """Stands in for `time.monotonic` of the module."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


def rankings(door: Admission, clock: Clock, latency_of, seconds: float) -> None:
    """A server that always has as many rankings in work as it may; `latency_of(in work)`, seconds each."""
    end_s = clock.now_s + seconds
    while clock.now_s < end_s:
        latency_s = latency_of(int(door.limit))
        clock.now_s += latency_s / int(door.limit)
        door.in_work = door._window_peak = int(door.limit)
        door.leave(latency_s)


def test_the_limit_falls_to_where_rankings_only_wait_for_each_other_and_rises_again(clock):
    door = Admission(64, 8)
    # One ranking after the other takes 20 ms, whatever is in work beside it waits: more than two or three are of no use.
    rankings(door, clock, lambda in_work: 0.02 * in_work, 1.0)
    door._means_s.append(0.02)  # what an unloaded moment looked like
    rankings(door, clock, lambda in_work: 0.02 * in_work, 30.0)
    assert 2 <= int(door.limit) <= 3
    # The work became parallel (more cores, a GPU): the latency no longer depends on what is in work.
    rankings(door, clock, lambda _: 0.02, 60.0)
    assert int(door.limit) > 30


def test_a_limit_that_nobody_reaches_says_nothing(clock):
    door = Admission(64, 8)
    door.limit = 5.0
    for i in range(200):
        clock.now_s += 0.05
        door.in_work = door._window_peak = 2
        door.leave(0.01 if i < 100 else 1.0)  # nor where the machine is slow for another reason
    assert door.limit == 5.0


def test_a_slower_model_becomes_the_new_measure(clock):
    door = Admission(8, 8)
    rankings(door, clock, lambda _: 0.01, 5.0)
    rankings(door, clock, lambda _: 0.1, 10.0)
    assert int(door.limit) == 1 or door.limit < 3
    rankings(door, clock, lambda _: 0.1, 600.0)
    assert int(door.limit) == 8


def test_what_nobody_counted_says_nothing_about_the_load(clock):
    door = Admission(64, 8)
    for _ in range(100):
        door.in_work += 1
        with door.taken():  # nobody says that it counts: an error left it
            clock.now_s += 0.01
    assert not door._means_s
    assert (door.limit, door.in_work) == (admission.LIMIT_FIRST, 0)


def test_the_limit_begins_low_and_doubles_while_nothing_gets_slower(clock):
    door = Admission(64, 8)
    assert door.limit == admission.LIMIT_FIRST
    rankings(door, clock, lambda _: 0.01, 2.0)
    assert door.limit == 64.0
    # One after the other: what lies beyond the first few only waits, and is found out before many have come.
    door = Admission(64, 8)
    limits = []
    for _ in range(100):
        rankings(door, clock, lambda in_work: 0.05 * in_work, 0.5)
        limits.append(door.limit)
    assert max(limits) < 6


def run(scenario) -> None:
    asyncio.run(scenario())


def test_places_go_to_the_waiting_in_their_order():
    async def scenario() -> None:
        door, order = Admission(1, 8), []

        async def ranking(name: str) -> None:
            await door.enter(10.0)
            with door.taken() as stay:
                stay.counts = False
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(ranking(name) for name in "abcd"))
        assert order == list("abcd")
        assert (door.in_work, door.waiting, door.shed) == (0, 0, 0)

    run(scenario)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    async def scenario() -> None:
        door = Admission(1, 1)
        await door.enter(10.0)
        waiting = asyncio.create_task(door.enter(10.0))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="queue at the door is full") as refused:
            await door.enter(10.0)
        assert refused.value.retry_after_ms > 0
        door.leave(None)
        await waiting
        assert door.in_work == 1

    run(scenario)


def test_a_wait_ends_in_time_and_leaves_no_place_taken():
    async def scenario() -> None:
        door = Admission(1, 8)
        await door.enter(10.0)
        with pytest.raises(OverloadedError, match="no place within 10 ms"):
            await door.enter(0.02)
        assert (door.in_work, door.waiting, door.shed) == (1, 0, 1)
        door.leave(None)
        assert door.in_work == 0

    run(scenario)


def test_who_gives_up_waiting_takes_no_place_along():
    async def scenario() -> None:
        door = Admission(1, 8)
        await door.enter(10.0)
        gone, stays = (asyncio.create_task(door.enter(10.0)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        door.leave(None)
        await stays
        # A place that comes in the same turn of the loop as the cancellation is passed on as well.
        third, fourth = (asyncio.create_task(door.enter(10.0)) for _ in range(2))
        await asyncio.sleep(0)
        door.leave(None)
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        await asyncio.wait_for(fourth, 5.0)
        assert (door.in_work, door.waiting) == (1, 0)

    run(scenario)


def test_who_stands_aside_gives_the_place_to_another_and_goes_on_at_once():
    async def scenario() -> None:
        door, released = Admission(1, 8), asyncio.Event()

        async def waits_for_a_position() -> None:
            await door.enter(10.0)
            with door.taken() as stay:
                with door.standing_aside(stay):
                    await released.wait()
                assert (door.in_work, stay.aside_s > 0) == (2, True)

        waiting = asyncio.create_task(waits_for_a_position())
        await asyncio.sleep(0)
        assert (door.in_work, door.aside) == (0, 1)
        await door.enter(10.0)  # the place is free
        released.set()
        await waiting
        with pytest.raises(OverloadedError, match="no place"):
            await door.enter(0.02)  # the other one has it still
        door.leave(None)
        assert (door.in_work, door.aside) == (0, 0)

    run(scenario)


def test_no_more_stand_aside_than_there_are_places():
    async def scenario() -> None:
        door = Admission(1, 8)
        with (
            door.standing_aside(admission.Stay()),
            pytest.raises(OverloadedError, match="wait for their positions"),
            door.standing_aside(admission.Stay()),
        ):
            pass

    run(scenario)


def test_a_burst_may_wait_and_a_standing_queue_may_not(clock):
    async def scenario() -> None:
        door = Admission(1, 100)

        async def room(busy_s: float, free_s: float = 0.0) -> int:
            """How many may wait when the one place was taken for so long, and free before that."""
            clock.now_s += free_s
            await door.enter(10.0)
            clock.now_s += busy_s
            door._weigh()
            found = door._room()
            door.leave(None)
            return found

        assert await room(0.5) == 100, "a busy time begins"
        assert await room(5.0) == 1
        # Clients that hold back leave gaps: the server is full nevertheless.
        assert {await room(0.2, 0.15) for _ in range(100)} == {1}
        # Bursts with room between them are no standing queue.
        assert [await room(0.3, 0.8) for _ in range(100)][-50:] == [100] * 50

    run(scenario)

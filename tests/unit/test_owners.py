"""What announcements say of owners, the breaker before an address, and when positions are included: without a network."""

import itertools

import pytest
from readers_world import EPOCH, announced, say

from features.ports import Position
from features.waiting import includes
from streams.owner_link import Breaker
from streams.owners import FORMER, OWNER, STANDBY, Owners, Route


def test_the_owner_announced_last_is_the_owner_and_those_before_are_former_ones():
    owners = announced(("a", "a:1", OWNER), ("b", "b:1", STANDBY), ("c", "c:1", OWNER))
    assert owners.route(0) == Route(EPOCH, "c:1", ("b:1",), ("a:1",))
    assert owners.route(7) == Route(), "nobody said anything of it"
    say(owners, "a", "a:1", OWNER, 0)
    assert owners.route(0) == Route(EPOCH, "a:1", ("b:1",), ("c:1",))
    assert owners.route(1).owner == "c:1"
    say(owners, "a", "a:1", FORMER, 0)
    assert owners.route(0) == Route(EPOCH, "c:1", ("b:1",), ("a:1",)), "handed over: who owned it before is all that is known"
    assert owners.addresses() == {"a:1", "b:1", "c:1"}


def test_states_of_another_log_than_the_owners_are_left_out():
    owners = announced(("a", "a:1", OWNER), ("b", "b:1", STANDBY), log_epoch=5)
    say(owners, "c", "c:1", OWNER, 0, 6)
    assert owners.route(0) == Route(6, "c:1")


def test_a_tombstone_withdraws_and_an_address_is_named_once():
    owners = announced(("a", "x:1", OWNER), ("b", "x:1", STANDBY), ("c", "y:1", STANDBY), ("d", "y:1", FORMER), partitions=[0])
    assert owners.route(0) == Route(EPOCH, "x:1", ("y:1",), ())
    before = owners.version
    owners.take("owner/0/a", None)
    assert owners.version > before
    assert owners.route(0) == Route(EPOCH, "", ("y:1", "x:1"), ())


def test_what_is_no_announcement_of_an_owner_is_passed_over_or_named():
    owners = Owners()
    owners.take("release/home", b"\xff")
    assert (owners.version, owners.addresses()) == (0, frozenset())
    with pytest.raises(ValueError, match="owner/0/a"):
        owners.take("owner/0/a", b"\xff")
    with pytest.raises(ValueError, match="x"):
        owners.take("owner/x/a", b"")


def test_a_breaker_asks_again_by_one_probe_at_growing_intervals():
    now = [100.0]
    breaker = Breaker(lambda: now[0])
    assert breaker.admits()
    assert breaker.admits()
    breaker.failed()
    breaker.failed()  # the second of two calls that were under way together
    assert (breaker.tripped, breaker.trips, breaker.admits()) == (True, 1, False)
    waited = []
    for _ in range(8):
        start = now[0]
        while not breaker.admits():
            now[0] += 0.01
        waited.append(now[0] - start)
        assert not breaker.admits(), "one probe at a time"
        breaker.failed()
    assert 0.1 <= waited[0] <= 0.14
    assert all(1.3 * before < after for before, after in itertools.pairwise(waited[:5]))
    assert 5.0 <= waited[-1] <= 6.3, "never longer than that"
    now[0] += 7
    assert breaker.admits()
    breaker.forgotten()  # its caller went away: the next one probes
    assert breaker.admits()
    breaker.succeeded()
    assert (breaker.tripped, breaker.admits(), breaker.admits(), breaker.trips) == (False, True, True, 1)


@pytest.mark.parametrize(
    ("after", "included"),
    [
        ([], True),
        ([Position(0, 1, 5)], True),
        ([Position(9, 1, 6)], False),
        ([Position(0, 1, 6)], False),
        ([Position(9, 1, 5), Position(0, 2, 8)], False),
        ([Position(8, 1, 99), Position(0, 3, 99)], True),
    ],
)
def test_positions_of_the_same_log_and_partition_are_compared(after, included):
    assert includes([Position(9, 1, 5), Position(9, 2, 7)], after) == included

"""Positions across moves."""

import pytest

from features.lineage import Lineage, Predecessor
from features.ports import Position

A, B, C = 0xA, 0xB, 0xC


@pytest.fixture
def lineage():
    found = Lineage()
    found.add(Predecessor(A, B, {0: 10, 1: -1}))
    found.add(Predecessor(B, C, {0: 5}))
    return found


@pytest.mark.parametrize(
    ("epoch", "wanted", "included"),
    [
        (B, Position(A, 0, 10), True),
        (B, Position(A, 0, 11), False),
        (B, Position(A, 1, 0), False),
        (C, Position(A, 0, 3), True),
        (C, Position(B, 0, 6), False),
        (C, Position(C, 0, 6), None),
        (A, Position(B, 0, 1), None),
        (B, Position(7, 0, 1), None),
    ],
)
def test_positions_of_predecessors_come_first(lineage, epoch, wanted, included):
    assert lineage.includes(epoch, wanted) is included


def test_a_circle_of_moves_is_not_followed_for_ever(lineage):
    lineage.add(Predecessor(C, A, {0: 1}))
    assert lineage.includes(9, Position(A, 0, 1)) is None


def test_bytes():
    predecessor = Predecessor(2**64 - 1, B, {3: 9, 0: -1})
    assert Predecessor.decode(predecessor.encode()) == predecessor
    with pytest.raises(ValueError, match="predecessor"):
        Predecessor.decode(b'{"log_epoch": "a"}')
    with pytest.raises(ValueError, match="Expecting"):
        Predecessor.decode(b"no json")

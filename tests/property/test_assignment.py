"""Who gets which arm, and the bounded shuffle: functions of ids alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.experiments import SHARES, choose, shadows_of, shuffled
from protos.v1.ranking_pb2 import Arm, Experiment, Shadow

SHARES_OF_ARMS = st.lists(st.integers(1, SHARES // 4), min_size=1, max_size=4)
USERS = np.random.default_rng(3).integers(0, 2**64, 1_500, np.uint64).tolist()

PINNED = ["arm0", "arm0", "arm1", "arm0", "arm1"]


def experiment(shares, name="exp"):
    return Experiment(name=name, arms=[Arm(name=f"arm{i}", share=share, shuffle=1) for i, share in enumerate(shares)])


def arms_of(what):
    return [choose(what, user).arm for user in USERS]


@settings(max_examples=30, deadline=None)
@given(SHARES_OF_ARMS, st.text(min_size=1, max_size=20))
def test_shares_hold(shares, name):
    arms = arms_of(experiment(shares, name))
    for i, share in enumerate(shares):
        expected = share / SHARES
        assert abs(arms.count(f"arm{i}") / len(USERS) - expected) < 6 * np.sqrt(expected * (1 - expected) / len(USERS)) + 1e-3


@settings(max_examples=30, deadline=None)
@given(SHARES_OF_ARMS, st.integers(1, SHARES // 8))
def test_an_arm_at_the_end_moves_nobody_between_the_others(shares, added):
    shares = [max(1, share // 2) for share in shares]
    before, after = arms_of(experiment(shares)), arms_of(experiment([*shares, added]))
    moved = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert moved <= {("", f"arm{len(shares)}")}


def test_arms_are_the_same_in_every_process_and_version():
    what = experiment([2_500, 2_500], "pinned")
    assert [choose(what, user).arm for user in (1, 2, 3, 42, 2**64 - 1)] == PINNED
    assert [choose(None, user).experiment for user in (1, 2)] == ["", ""]
    assert choose(experiment([1], "x"), 5).experiment == "x"  # the rest of the users are in the experiment, too


def test_another_name_spreads_the_users_anew():
    one, other = arms_of(experiment([5_000], "one")), arms_of(experiment([5_000], "other"))
    assert 0.4 < np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.6


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**64 - 1))
def test_a_shuffle_moves_each_candidate_by_at_most_its_bound(count, bound, request_id):
    order = np.random.default_rng(count).permutation(count)
    found = shuffled(order, bound, request_id)
    place = {candidate: i for i, candidate in enumerate(order.tolist())}
    assert sorted(found.tolist()) == sorted(order.tolist())
    assert max(abs(place[candidate] - i) for i, candidate in enumerate(found.tolist())) <= bound
    np.testing.assert_array_equal(found, shuffled(order, bound, request_id))


def test_a_shuffle_reaches_its_bound_and_differs_by_request():
    order = np.arange(50)
    moved = [shuffled(order, 3, request_id) for request_id in range(200)]
    assert max(np.abs(found - order).max() for found in moved) == 3
    assert len({found.tobytes() for found in moved}) == 200


def test_a_shadow_sees_its_share_of_requests_whatever_the_arm():
    what = Experiment(name="exp", shadows=[Shadow(release_id="a", share=1_000), Shadow(release_id="b", share=SHARES)])
    seen = [shadows_of(what, request_id) for request_id in USERS]
    assert all("b" in found for found in seen)
    assert 0.07 < np.mean(["a" in found for found in seen]) < 0.13
    assert shadows_of(None, 1) == []

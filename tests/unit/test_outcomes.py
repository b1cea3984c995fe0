"""What users did with each arm's lists, and what becomes of a canary."""

import numpy as np
import pytest

from inference.outcomes import GO_ON, PROMOTE, STOP, decide, outcomes, outcomes_table

UTILITIES = {"click": 1.0, "hide": -2.0}
ENOUGH = {"lists_min": 1000, "users_min": 200}


def arm(name, *, lists, click, hide, seed, first_user):
    """Lists of one arm, four a user: (arms, users, labels)."""
    random = np.random.default_rng(seed)
    labels = np.stack([random.poisson(click, lists), random.binomial(1, hide, lists)], 1)
    return np.full(lists, name), first_user + np.arange(lists, dtype=np.uint64) // np.uint64(4), labels.astype(np.int64)


def of(*arms):
    return outcomes(*(np.concatenate(parts) for parts in zip(*arms, strict=True)), ("click", "hide"), UTILITIES)


def test_the_figures_are_means_over_users_of_means_over_their_lists():
    arms = np.array(["", "", "", "b", "b"])
    users = np.array([1, 1, 2, 3, 4], np.uint64)
    labels = np.array([[1, 0], [3, 0], [0, 1], [5, 0], [1, 0]])
    control, canary = outcomes(arms, users, labels, ("click", "hide"), UTILITIES)
    assert (control.arm, control.lists, control.users, canary.lists) == ("", 3, 2, 2)
    assert control.per_list == {"click": 1.0, "hide": 0.5}  # (2 + 0) / 2, (0 + 1) / 2
    assert control.empty_share == pytest.approx(1 / 3)
    assert control.differences == {}
    assert canary.differences["click"][0] == 2.0
    assert [control.per_list["click"], canary.per_list["click"]] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("click", "hide", "decision"),
    [(1.0, 0.05, PROMOTE), (1.3, 0.05, PROMOTE), (0.7, 0.05, STOP), (1.0, 0.15, STOP), (1.0, 0.0, PROMOTE)],
)
def test_a_canary_is_stopped_where_users_like_it_less_beyond_chance(click, hide, decision):
    control, canary = of(
        arm("", lists=4000, click=1.0, hide=0.05, seed=1, first_user=0),
        arm("canary", lists=2000, click=click, hide=hide, seed=2, first_user=10**6),
    )
    found, reason = decide(canary, control, UTILITIES, **ENOUGH)
    assert found == decision, reason
    low, high = canary.differences["click"][1:]
    assert low < canary.differences["click"][0] < high


def test_harm_is_seen_before_there_is_enough_and_good_news_waits():
    control = arm("", lists=4000, click=1.0, hide=0.05, seed=1, first_user=0)
    bad, good = (arm("canary", lists=400, click=click, hide=0.05, seed=2, first_user=10**6) for click in (0.2, 1.5))
    for one, decision in ((bad, STOP), (good, GO_ON)):
        before, canary = of(control, one)
        assert decide(canary, before, UTILITIES, **ENOUGH)[0] == decision


def test_an_arm_without_lists_goes_on():
    (control,) = of(arm("", lists=100, click=1.0, hide=0.0, seed=1, first_user=0))
    canary = outcomes(np.array(["b"]), np.array([1], np.uint64), np.array([[1, 0]]), ("click", "hide"), UTILITIES)
    assert canary[0].lists == 0  # the control
    assert decide(canary[1], canary[0], UTILITIES, **ENOUGH)[0] == GO_ON
    assert np.isnan(canary[1].differences["click"]).all()
    assert outcomes_table([control, canary[1]], "t").row_count == 4


def test_few_users_without_a_rare_label_stop_nobody():
    """A bootstrap of users who all have none has no width: that is not "beyond chance"."""
    for lists in (4, 120, 400):
        rare = arm("canary", lists=lists, click=1.0, hide=0.0, seed=2, first_user=10**6)
        rare[2][:, 0] = 0  # nobody clicked
        control, canary = of(arm("", lists=4000, click=0.02, hide=0.05, seed=1, first_user=0), rare)
        assert decide(canary, control, UTILITIES, **ENOUGH)[0] == GO_ON

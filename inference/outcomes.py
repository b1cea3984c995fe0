"""What users did with the lists of each arm of an experiment: labels a list by head, and whether a canary may go on.

A list counts as its user saw it: the labels on its seen candidates. Lists of a user are averaged, then users, as HIT@3 is. Arms have
different users, so the interval of a difference comes from a bootstrap that draws the users of both arms. Who looks at a canary every hour
stops a good one by chance more often than the interval says; that is the cheaper mistake.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from features.domain import Domain
from features.logs import LogError, Served, read_requests
from inference.dataset import labels_of
from inference.metrics import user_means

Array = npt.NDArray[Any]

PROMOTE, STOP, GO_ON = "promote", "stop", "go on"
DRAWS = 1000
HARM_USERS_MIN, LABELS_MIN = 50, 20
"""Users of each arm, and labels that the canary's lists might have had, before a head may stop it."""


@dataclass(frozen=True)
class Outcome:
    """One arm against the control. per_list: labels a list by head; differences: (difference, low, high) of a 95 % interval; empty_share:
    lists without any label of a head that users should give.
    """

    arm: str
    lists: int
    users: int
    per_list: Mapping[str, float]
    empty_share: float
    differences: Mapping[str, tuple[float, float, float]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def outcomes(
    arms: npt.NDArray[Any],
    users: npt.NDArray[np.uint64],
    labels: npt.NDArray[np.int64],
    heads: Sequence[str],
    utilities: Mapping[str, float],
    *,
    control: str = "",
    seed: int = 0,
) -> list[Outcome]:
    """Each arm's outcome, the control first, then by name.

    Args:
        arms: arm of each list [R]; `control` are the users beyond the arms.
        users: its user [R].
        labels: how many of its seen candidates have a label of each head [R, H].
        heads: H names.
        utilities: by head; above 0: users should give it.
        control: name of the arm that the others are compared with.
        seed: of the bootstrap.
    """
    wanted = np.array([utilities.get(head, 0.0) > 0 for head in heads], bool)
    empty = np.asarray(~np.any(labels[:, wanted] > 0, axis=1), bool)
    of_arms = {arm: np.array([name == arm for name in arms.tolist()], bool) for arm in (control, *sorted(set(arms.tolist()) - {control}))}
    means = {
        arm: {head: user_means(labels[of_arm, column], users[of_arm])[1] for column, head in enumerate(heads)}
        for arm, of_arm in of_arms.items()
    }
    found = []
    for arm, of_arm in of_arms.items():
        differences = {} if arm == control else {head: _difference(means[arm][head], means[control][head], seed) for head in heads}
        found.append(
            Outcome(
                arm=arm,
                lists=int(of_arm.sum()),
                users=len(np.unique(users[of_arm])),
                per_list={head: _mean(values) for head, values in means[arm].items()},
                empty_share=float(empty[of_arm].mean()) if of_arm.any() else float("nan"),
                differences=differences,
            )
        )
    return found


def outcomes_of_log(
    domain: Domain,
    ranker_name: str,
    log: str | Path,
    arms_of: Callable[[Served], tuple[Array, Array]],
    *,
    from_ms: int = 0,
    control: str = "",
) -> list[Outcome]:
    """`outcomes` of a served log's lists from `from_ms` on of which anything was seen.

    arms_of: the arm of each request of `Served` [r], and which of them count, bool [r].

    Raises:
        LogError: it is no served log, or cannot be read.
    """
    heads = domain.ranker[ranker_name].heads
    arms: list[Array] = [np.zeros(0, object)]
    users, counts = [np.zeros(0, np.uint64)], [np.zeros((0, len(heads)), np.int64)]
    for batch in read_requests(log, domain):
        if batch.served is None or batch.seen is None:
            raise LogError(f"{log}: not a served log")
        arm, chosen = arms_of(batch.served)
        rows = np.repeat(np.arange(len(batch)), np.diff(batch.starts))
        seen = np.bincount(rows[batch.seen], minlength=len(batch)) > 0
        chosen = chosen & seen & (batch.served.column("ranker") == ranker_name) & (batch.request_time_ms >= from_ms)
        labels = labels_of(domain, ranker_name, batch)[0] & batch.seen[:, None]
        arms.append(arm[chosen])
        users.append(batch.user_id[chosen])
        counts.append(np.stack([np.bincount(rows, column, minlength=len(batch)) for column in labels.T], 1).astype(np.int64)[chosen])
    utilities = {name: head.utility for name, head in heads.items()}
    return outcomes(np.concatenate(arms), np.concatenate(users), np.concatenate(counts), list(heads), utilities, control=control)


def decide(canary: Outcome, control: Outcome, utilities: Mapping[str, float], *, lists_min: int, users_min: int) -> tuple[str, str]:
    """What is to happen with a canary, and why: STOP where users do less of what they should, or more of what they should not, and chance
    does not explain it; GO_ON until both arms have lists and users enough; else PROMOTE.

    A head says nothing of a canary that could hardly have had LABELS_MIN of its labels: a bootstrap of users without any has no width.
    """
    for head, (difference, low, high) in canary.differences.items():
        sign = np.sign(utilities.get(head, 0.0))
        expected = canary.lists * max(control.per_list[head], canary.per_list[head])
        if min(canary.users, control.users) < HARM_USERS_MIN or not expected >= LABELS_MIN:
            continue
        if (sign > 0 and high < 0) or (sign < 0 and low > 0):
            return STOP, f"{head}: {difference:+.4f} a list ({low:+.4f} to {high:+.4f})"
    users_min = max(users_min, HARM_USERS_MIN)
    for arm in (canary, control):
        name = arm.arm or "the control"
        if arm.lists < lists_min or arm.users < users_min:
            return GO_ON, f"{name} has {arm.lists} lists of {arm.users} users; {lists_min} of {users_min} are needed"
    return PROMOTE, "no head is worse beyond chance"


def outcomes_table(found: Sequence[Outcome], title: str) -> Table:
    """For the terminal."""
    table = Table(title=title)
    for column in ("arm", "lists", "users", "head", "labels a list", "difference", "95 % interval", "lists without"):
        table.add_column(column, justify="left" if column in ("arm", "head") else "right")
    for one in found:
        for i, (head, value) in enumerate(one.per_list.items()):
            about = (one.arm or "control", str(one.lists), str(one.users)) if i == 0 else ("", "", "")
            difference, low, high = one.differences.get(head, (float("nan"),) * 3)
            shown = ("", "") if difference != difference else (f"{difference:+.4f}", f"{low:+.4f} .. {high:+.4f}")
            table.add_row(*about, head, f"{value:.4f}", *shown, f"{one.empty_share:.1%}" if i == 0 else "")
    return table


def _difference(own: npt.NDArray[np.float64], other: npt.NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """Difference of the means with its 2.5 and 97.5 per cent points; NaN where an arm has nobody."""
    if not len(own) or not len(other):
        return (float("nan"),) * 3
    random = np.random.default_rng(seed)
    draws = [_draw(own, random) - _draw(other, random) for _ in range(DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(own.mean() - other.mean()), float(low), float(high)


def _draw(values: npt.NDArray[np.float64], random: np.random.Generator) -> float:
    return float(values[random.integers(0, len(values), len(values))].mean())


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")

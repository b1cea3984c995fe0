"""The gate before a release: is a newly trained ranker worse than what is served, on the latest requests that neither was trained on?

Both see the same requests, each packed with its own domain file and table generations. What is compared is the AUC of each head that both
have, with the interval of a bootstrap over users that draws the same users for both.

What it cannot know: labels exist only on lists that were served, so a model close to the served one has an advantage that live traffic
would not give it. A canary (docs/experiments.md) decides between two that pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from features.domain import Domain
from features.erasures import NOBODY, Erased
from features.logs import LogError
from features.tables import TableError
from inference.dataset import Dataset, build_dataset
from inference.evaluate import Scored, compare, scores_of
from inference.history import DatasetError
from inference.packed import default_cache
from inference.release import Release, load_model
from inference.train import TIME_MS_MAX
from inference.transact import NoopRanker, TransActRanker

I64 = npt.NDArray[np.int64]
PASSED, REFUSED, UNKNOWN = "passed", "refused", "cannot be judged"


@dataclass(frozen=True)
class Limits:
    """What a comparison must have to count, and what it may cost.

    requests_min: requests that neither was trained on; below, nothing is said.
    positives_min: labels of a head on them; a head with fewer is not judged.
    auc_loss_max: how much lower a head's AUC may be as long as chance explains it.
    """

    requests_min: int = 500
    positives_min: int = 50
    auc_loss_max: float = 0.005


@dataclass(frozen=True)
class Contender:
    """A trained ranker. trained_before_ms: no request from this time on had a part in its weights, None: not known."""

    name: str
    model: TransActRanker | NoopRanker
    domain: Domain
    generations: Mapping[str, str]
    trained_before_ms: int | None

    @classmethod
    def of(cls, release: Release) -> "Contender":
        """A release. Raises ReleaseError."""
        before_ms = release.manifest.get("trained", {}).get("before_ms")
        return cls(release.release_id, load_model(release), release.domain, release.generations, before_ms)


@dataclass(frozen=True)
class Verdict:
    """decision: PASSED, REFUSED or UNKNOWN, for `reasons`. heads: figures by head and metric, as `evaluate.compare` gives them,
    "with" being the candidate and "without" the incumbent. judged: the heads that had labels enough.
    """

    decision: str
    reasons: tuple[str, ...]
    incumbent: str = ""
    requests: int = 0
    from_ms: int = 0
    heads: Mapping[str, Mapping[str, Any]] | None = None
    judged: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the candidate may be published."""
        return self.decision == PASSED

    def for_manifest(self) -> dict[str, Any]:
        """What a release's manifest says that let it be published."""
        said = {"decision": self.decision, "reasons": list(self.reasons), "incumbent": self.incumbent}
        return {**said, "forced": not self.passed}


def judge(
    ranker: str,
    candidate: Contender,
    incumbent: Contender | None,
    log: str | Path,
    tables_root: str | Path,
    *,
    limits: Limits | None = None,
    erased: Erased = NOBODY,
) -> Verdict:
    """Compares a candidate with the incumbent on the requests of `log` behind what either was trained on.

    Args:
        ranker: name of the ranker in both domain files.
        candidate: what would be published.
        incumbent: what is served; None: nothing yet, and the candidate passes.
        log: folder of a canonical log whose latest requests both are judged on.
        tables_root: folder of the spaces.
        limits: see Limits.
        erased: users whose past is left out.

    Raises:
        DatasetError, TableError, LogError: the log or a table cannot be used for the candidate.
    """
    limits = limits or Limits()
    if incumbent is None:
        return Verdict(PASSED, ("it is the first release of this ranker",))
    said: dict[str, Any] = {"incumbent": incumbent.name}
    if not isinstance(candidate.model, TransActRanker) or not isinstance(incumbent.model, TransActRanker):
        return Verdict(PASSED, ("one of the two has no weights to compare",), **said)
    unknown = next((who.name for who in (candidate, incumbent) if who.trained_before_ms is None), None)
    if unknown is not None:
        return Verdict(UNKNOWN, (f"{unknown} does not say which requests it was trained on",), **said)
    from_ms = max(int(who.trained_before_ms or 0) for who in (candidate, incumbent))
    mine = _later(ranker, candidate, log, tables_root, from_ms, erased)
    try:
        theirs = _later(ranker, incumbent, log, tables_root, from_ms, erased)
    except (DatasetError, LogError, TableError) as error:
        return Verdict(UNKNOWN, (f"what {incumbent.name} needs is not there any more: {error}",), from_ms=from_ms, **said)
    count = len(mine[1])
    about: dict[str, Any] = {"requests": count, "from_ms": from_ms, **said}
    if count < limits.requests_min:
        return Verdict(UNKNOWN, (f"{count} requests that neither was trained on; {limits.requests_min} are needed",), **about)
    if not all(np.array_equal(*pair) for pair in zip(_which(*mine), _which(*theirs), strict=True)):
        return Verdict(UNKNOWN, ("the two have different requests: their surfaces differ",), **about)
    scored = scores_of(candidate.model, *mine), scores_of(incumbent.model, *theirs)
    return _decide(*scored, (candidate.model, incumbent.model), limits, about)


def gate_table(verdict: Verdict) -> Table:
    """The verdict's figures for the terminal."""
    table = Table(title=f"candidate against {verdict.incumbent or 'nothing'}: {verdict.requests} later requests")
    for column in ("head", "AUC of the candidate", "of the incumbent", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for head, figures in (verdict.heads or {}).items():
        row = figures["auc"]
        if head not in verdict.judged or row["difference"] is None:
            table.add_row(head, "too few labels", "", "", "")
            continue
        interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
        table.add_row(head, f"{row['with']:.4f}", f"{row['without']:.4f}", f"{row['difference']:+.4f}", interval)
    return table


def _later(ranker: str, who: Contender, log: str | Path, tables_root: str | Path, from_ms: int, erased: Erased) -> tuple[Dataset, I64]:
    """The log as a contender packs it, and its requests from `from_ms` on."""
    generations, cache = who.generations, default_cache(log)
    dataset, _ = build_dataset(who.domain, ranker, log, tables_root, generations=generations, erased=erased, cache=cache)
    return dataset, dataset.part(from_ms, TIME_MS_MAX)


def _which(dataset: Dataset, part: I64) -> tuple[npt.NDArray[Any], ...]:
    """What tells requests apart: users, times, numbers of candidates."""
    return dataset.user_id[part], dataset.request_time_ms[part], np.diff(dataset.starts)[part]


def _decide(mine: Scored, theirs: Scored, models: tuple[TransActRanker, TransActRanker], limits: Limits, about: dict[str, Any]) -> Verdict:
    """The verdict over requests that both have. Labels are those of the candidate's domain file."""
    own, others_heads = (model.head_names for model in models)
    reasons = [f"head {head}: the incumbent has it, the candidate not" for head in others_heads if head not in own]
    if not np.isfinite(mine.probabilities).all():
        reasons.append("its scores are not all finite")
    heads: dict[str, Any] = {}
    judged = []
    for column, head in enumerate(own):
        labels = mine.labels[:, column]
        if head not in others_heads or labels.all() or not labels.any():
            continue
        others = theirs.probabilities[:, others_heads.index(head)]
        heads[head] = compare(np.nan_to_num(mine.probabilities[:, column]), others, labels, mine.request_row, mine.users)
        if min(labels.sum(), (~labels).sum()) < limits.positives_min:
            continue
        judged.append(head)
        row = heads[head]["auc"]
        if row["high"] < 0:
            reasons.append(f"head {head}: AUC {row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}): worse, and not by chance")
        elif row["difference"] < -limits.auc_loss_max:
            reasons.append(f"head {head}: AUC {row['difference']:+.4f}, more than the {limits.auc_loss_max} that are allowed")
    figures: dict[str, Any] = {"heads": heads, "judged": tuple(judged), **about}
    if reasons:
        return Verdict(REFUSED, tuple(reasons), **figures)
    if not judged:
        return Verdict(UNKNOWN, (f"no head that both have has {limits.positives_min} labels of either kind",), **figures)
    return Verdict(PASSED, ("no judged head is worse",), **figures)

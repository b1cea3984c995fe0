"""How a model ages: quality by days since its training, frozen against trained on each day.

Paper: TransAct, section 5.2 (its ranker loses its gain within days and is trained twice a week).
Deviates: one log, one lineage of embeddings that all variants share, so that only weights age; days are UTC days of the request's time.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from features.domain import DAY_MS, Domain
from features.erasures import NOBODY, Erased
from inference.checkpoints import TrainError
from inference.dataset import Dataset, build_dataset
from inference.history import DatasetError
from inference.metrics import head_metrics
from inference.packed import default_cache
from inference.plots import plot_decay
from inference.train import TrainOptions, predict, train
from inference.transact import TransActRanker

FROZEN, DAILY, WITHOUT = "frozen", "trained daily", "without the sequence"
VALIDATION_SHARE = 0.1
REQUESTS_MIN = 50
"""A later day with fewer requests is left out."""


def decay(
    domain: Domain,
    ranker_name: str,
    log: str | Path,
    tables_root: str | Path,
    out: str | Path,
    options: TrainOptions,
    *,
    generations: dict[str, str],
    until_ms: int,
    erased: Erased = NOBODY,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains on the requests before `until_ms`, then measures each later day; writes `decay.json` and `decay.png` into `out`.

    Args:
        domain, ranker_name, log, tables_root: as for `train`.
        out: folder to write to.
        options: of each training; the daily ones take a third of the learning rate and two epochs.
        generations: tables of the part before `until_ms`.
        until_ms: begin of a UTC day.
        erased: users whose past is left out.
        report: told what is being done.

    Returns:
        {"ranker", "trained_until_ms", "days": [{"day", "requests", "heads": {head: {variant: {metric: value}}}}]}.

    Raises:
        TrainError: no later day has REQUESTS_MIN requests, or a part is empty.
    """
    out, options = Path(out), replace(options, small=False)
    dataset, tables = build_dataset(domain, ranker_name, log, tables_root, generations=generations, erased=erased, cache=default_cache(log))
    days = later_days(dataset, until_ms)
    if not days:
        raise TrainError(f"no day from {_date(until_ms)} on has {REQUESTS_MIN} requests")
    validation_ms = _validation_from(dataset, 0, until_ms)
    fixed = (0, validation_ms, until_ms, days[0] + DAY_MS)
    train_into = partial(train, domain, ranker_name, log, tables_root, dataset=dataset, generations=tables.generations)
    models: dict[str, TransActRanker] = {}
    for name, use_sequence in ((FROZEN, True), (WITHOUT, False)):
        report(f"train {name} until {_date(until_ms)}")
        models[name] = train_into(out / name.replace(" ", "-"), replace(options, use_sequence=use_sequence), parts=fixed).model
    rows = []
    daily = models[FROZEN]
    for day_ms in days:
        if day_ms > days[0] and len(dataset.part(day_ms - DAY_MS, day_ms)) > 1:
            report(f"train on until {_date(day_ms)}")
            parts = (max(0, day_ms - 7 * DAY_MS), _validation_from(dataset, day_ms - DAY_MS, day_ms), day_ms, day_ms + DAY_MS)
            short = replace(options, epochs=2, learning_rate=options.learning_rate / 3)
            daily = train_into(out / "daily", short, parts=parts, start=daily.state_dict()).model
        part = dataset.part(day_ms, day_ms + DAY_MS)
        heads: dict[str, dict[str, Any]] = {name: {} for name in daily.head_names}
        for variant, model in ((FROZEN, models[FROZEN]), (DAILY, daily), (WITHOUT, models[WITHOUT])):
            for head, figures in head_metrics(*predict(model, dataset, part), model.head_names).items():
                heads[head][variant] = figures.as_dict()
        rows.append({"day": _date(day_ms), "days_since": (day_ms - until_ms) // DAY_MS + 1, "requests": len(part), "heads": heads})
    result = {"ranker": ranker_name, "trained_until_ms": until_ms, "days": rows}
    (out / "decay.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    plot_decay(result, out / "decay.png")
    return result


def later_days(dataset: Dataset, until_ms: int) -> list[int]:
    """Begins of the UTC days from `until_ms` on that have REQUESTS_MIN requests."""
    days, counts = np.unique(dataset.request_time_ms // DAY_MS, return_counts=True)
    return [int(day) * DAY_MS for day, count in zip(days, counts, strict=True) if day * DAY_MS >= until_ms and count >= REQUESTS_MIN]


def half_time_ms(times_ms: npt.NDArray[np.int64]) -> int:
    """Begin of the UTC day by which half of the days have passed."""
    days = np.unique(times_ms // DAY_MS)
    if not len(days):
        raise DatasetError("the log has no request")
    return int(days[len(days) // 2]) * DAY_MS


def validation_from(times_ms: npt.NDArray[np.int64]) -> int:
    """Where the last VALIDATION_SHARE of ascending request times [n] begins; 0 without any."""
    return int(times_ms[min(len(times_ms) - 1, int(len(times_ms) * (1 - VALIDATION_SHARE)))]) if len(times_ms) else 0


def decay_table(result: dict[str, Any]) -> Table:
    """For the terminal."""
    table = Table(title=f"ranker {result['ranker']} by days since its training")
    for column in ("head", "day", "requests", *(f"AUC {name}" for name in (FROZEN, DAILY, WITHOUT)), "HIT@3 frozen", "HIT@3 trained daily"):
        table.add_column(column, justify="left" if column in ("head", "day") else "right", no_wrap=column in ("head", "day"))
    for head in result["days"][0]["heads"]:
        for row in result["days"]:
            of = row["heads"][head]
            values = [of[name]["auc"] for name in (FROZEN, DAILY, WITHOUT)] + [of[name]["hit"] for name in (FROZEN, DAILY)]
            shown = ["" if value is None else f"{value:.4f}" for value in values]
            table.add_row(head, f"{row['day']} ({row['days_since']})", str(row["requests"]), *shown)
    return table


def _validation_from(dataset: Dataset, from_ms: int, until_ms: int) -> int:
    """Where the last VALIDATION_SHARE of the requests of a time begins."""
    part = dataset.part(from_ms, until_ms)
    if len(part) < 2:
        raise TrainError(f"{len(part)} requests from {_date(from_ms)} to {_date(until_ms)}")
    return validation_from(dataset.request_time_ms[part])


def _date(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d")

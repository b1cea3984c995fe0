"""Runs tables of configurations: every cell with every seed within a budget, over the same requests, resumed where it was interrupted.

Below the folder of an ablation:
    cells/<cell>-<seed>/result.json, scores.npz   what a finished run reached on the test part
    cells/<cell>-<seed>/training                  checkpoints of one that is under way
    truth.npz                                     labels and requests of the test part
    ablation.json, ablation.md, <table>.png       `inference.ablation_report`

A result counts while everything that it depends on is the same: domain file, log, tables, options, budget, seed. Requests are packed once
for each definition of what the model may see (length and actions of the sequence); cells that differ in the model alone share it.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from features.domain import Domain
from features.erasures import NOBODY, Erased
from features.logs import ACTIONS, IMPRESSIONS, SUMMARY, is_served_log
from inference.ablations import CELLS, AblationError, AblationTable, Cell, configured
from inference.baseline import Columns, boosted, columns_of
from inference.checkpoints import TrainError
from inference.dataset import Dataset, build_dataset, ranker_requests, split_times
from inference.evaluate import Scored, diversity, scores_of
from inference.metrics import head_metrics
from inference.train import TIME_MS_MAX, TrainOptions, train

RESULT, SCORES, TRUTH = "result.json", "scores.npz", "truth.npz"


@dataclass(frozen=True)
class Run:
    """One cell with one seed."""

    name: str
    seed: int
    cell: Cell
    domain: Domain
    definition: str
    """What has to be the same for two runs to share packed requests."""

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class Results:
    """What the runs reached: `of` by cell and seed, with probabilities float32 [N, H] in the order of `truth`; `skipped` says why.

    drawn: how each candidate came into the log, uint8 [N] (`features.logs.AS_LOGGED`, UNIFORM, POPULAR), where it tells; None otherwise.
    """

    truth: Scored
    of: Mapping[tuple[str, int], tuple[dict[str, Any], npt.NDArray[np.float32]]]
    skipped: Mapping[str, str]
    about: dict[str, Any]
    drawn: npt.NDArray[np.uint8] | None = None


def ablate(
    domain: Domain,
    ranker_name: str,
    log: str | Path,
    tables_root: str | Path,
    out: str | Path,
    tables: Mapping[str, AblationTable],
    *,
    seeds: int,
    options: TrainOptions,
    cells: Mapping[str, Cell] = CELLS,
    generations: Mapping[str, str] | None = None,
    erased: Erased = NOBODY,
    report: Callable[[str], None] = lambda _: None,
) -> Results:
    """Runs what is missing of these tables and returns all of it.

    Args:
        domain: the product, as it is without changes.
        ranker_name: which of its rankers.
        log: folder of the canonical log.
        tables_root: folder of the spaces.
        out: folder to write to, and to go on from.
        tables: which tables; cells of several run once.
        seeds: 0 up to seeds - 1; they are those of training, the embeddings are the same.
        options: of every training. `seconds_max` is the budget of one run: a training's, or a search for trees.
        cells: by name, those that the tables name among them.
        generations: tables to train with, by space.
        erased: users whose past is left out.
        report: gets a line for each run that ends.

    Raises:
        AblationError: no cell of a table can be run.
        TrainError, BaselineError, DatasetError, LogError, TableError: see there.
    """
    out = Path(out)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    runs, skipped = planned(domain, ranker_name, tables, cells, seeds)
    for name, reason in skipped.items():
        report(f"{name}: left out: {reason}")
    world = _World(ranker_name, Path(log), Path(tables_root), out, options, generations, erased)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not options.progress) as bar:
        task = bar.add_task("ablate", total=len(runs))
        for run in runs:
            bar.update(task, description=f"{run.name}, seed {run.seed}")
            result = world.result(run) or world.run(run)
            auc = ", ".join(f"{head} {figures['auc'] or float('nan'):.4f}" for head, figures in result["heads"].items())
            report(f"{run.name}, seed {run.seed}: AUC {auc}; {result['seconds']:.0f} s")
            bar.advance(task)
    found = {(run.name, run.seed): (world.result(run) or {}, np.load(world.folder(run) / SCORES)["probabilities"]) for run in runs}
    sampled = None if domain.log is None or is_served_log(log) else domain.log.negatives
    about = world.about | {"seeds": seeds, "negatives": None if sampled is None else sampled.model_dump()}
    return Results(world.truth, found, skipped, about, None if sampled is None else _drawn(domain, ranker_name, log, erased, world.truth))


def _drawn(domain: Domain, ranker_name: str, log: str | Path, erased: Erased, truth: Scored) -> npt.NDArray[np.uint8] | None:
    """`Results.drawn`; None: the log is from before the column."""
    drawn = [batch.drawn for batch in ranker_requests(domain, ranker_name, log, erased)]
    return np.concatenate([part for part in drawn if part is not None])[truth.rows] if all(part is not None for part in drawn) else None


def planned(
    domain: Domain, ranker_name: str, tables: Mapping[str, AblationTable], cells: Mapping[str, Cell], seeds: int
) -> tuple[list[Run], dict[str, str]]:
    """The runs of these tables, those that share packed requests one after the other, and cells that this domain file does not allow."""
    runs, skipped = [], dict[str, str]()
    for name in dict.fromkeys(name for table in tables.values() for name in (table.reference, *table.rows)):
        try:
            changed = configured(domain, ranker_name, cells[name])
        except AblationError as error:
            skipped[name] = str(error)
            continue
        ranker = changed.ranker[ranker_name]
        definition = ranker.model_dump_json(exclude={"model"}) + str(bool(ranker.model.position_max))
        runs += [Run(name, seed, cells[name], changed, definition) for seed in range(seeds)]
    if not runs:
        raise AblationError("; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    order = list(dict.fromkeys(run.definition for run in runs))
    return sorted(runs, key=lambda run: (order.index(run.definition), run.seed)), skipped


class _World:
    """What the runs share: the log, its parts, and the requests packed for one definition at a time."""

    def __init__(
        self,
        ranker_name: str,
        log: Path,
        tables_root: Path,
        out: Path,
        options: TrainOptions,
        generations: Mapping[str, str] | None,
        erased: Erased,
    ) -> None:
        self.ranker_name, self.log, self.tables_root, self.out = ranker_name, log, tables_root, out
        self.options = replace(options, progress=False, small=False)
        self.generations = None if generations is None else dict(generations)
        self.erased = erased
        self._definition = ""
        self._dataset: Dataset | None = None
        self._columns: dict[bool, Columns] = {}
        """Of the packed requests, without and with cosines."""
        self._truth: Scored | None = None

    @cached_property
    def _depends_on(self) -> dict[str, Any]:
        """What results depend on beside the run."""
        log = xxhash.xxh3_64()
        for path in (self.log / name for name in (SUMMARY, ACTIONS, IMPRESSIONS)):
            if path.exists():
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        log.update(chunk)
        options = {name: value for name, value in asdict(self.options).items() if name not in ("seed", "threads", "progress")}
        return {
            "ranker": self.ranker_name,
            "log": log.hexdigest(),
            "generations": self.generations,
            "options": json.loads(json.dumps(options)),
        }

    @property
    def about(self) -> dict[str, Any]:
        """For the report."""
        return {
            "ranker": self.ranker_name,
            "seconds_max": self.options.seconds_max,
            "epochs_max": self.options.epochs,
            "threads": self.options.threads,
            "requests": len(self.truth.users),
            "users": len(np.unique(self.truth.users)),
            "candidates": len(self.truth.labels),
        }

    @property
    def truth(self) -> Scored:
        """Labels and requests of the test part; its probabilities are empty."""
        if self._truth is None:
            kept = np.load(self.out / TRUTH)
            self._truth = Scored(np.zeros((0, 0), np.float32), *(kept[name] for name in ("labels", "request_row", "users", "rows")))
        return self._truth

    def folder(self, run: Run) -> Path:
        """Where a run writes to."""
        return self.out / "cells" / run.folder

    def key(self, run: Run) -> str:
        """Identity of everything that a result depends on."""
        parts = {"seed": run.seed, "cell": asdict(run.cell), "domain": run.domain.model_dump_json(exclude={"log"}), **self._depends_on}
        return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True, default=list).encode())

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a run has left; None: nothing, or of another log, budget, domain file."""
        path = self.folder(run) / RESULT
        if not path.is_file() or not (self.out / TRUTH).is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found if found["key"] == self.key(run) else None

    def run(self, run: Run) -> dict[str, Any]:
        """Trains and measures one run, and keeps what it reached."""
        dataset, parts = self._packed(run)
        folder, started = self.folder(run), time.monotonic()
        scored, about = self._boosted(run, dataset, parts) if run.cell.baseline else self._trained(run, dataset, parts)
        self._check_truth(scored)
        heads = tuple(run.domain.ranker[self.ranker_name].heads)
        figures = head_metrics(scored.probabilities, scored.labels, scored.request_row, scored.users, heads)
        result = {
            "key": self.key(run),
            "cell": run.name,
            "seed": run.seed,
            "seconds": time.monotonic() - started,
            **about,
            "heads": {head: figure.as_dict() for head, figure in figures.items()},
            "diversity": diversity(run.domain, self.ranker_name, dataset, scored),
        }
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / SCORES, probabilities=scored.probabilities)
        _write(folder / RESULT, json.dumps(result, indent=1))  # last: what has it is finished
        shutil.rmtree(folder / "training", ignore_errors=True)
        return result

    def _packed(self, run: Run) -> tuple[Dataset, dict[str, npt.NDArray[np.int64]]]:
        if self._dataset is None or self._definition != run.definition:
            self._dataset, self._columns = None, {}  # before the next is packed: two do not have to fit
            given = {"generations": self.generations, "erased": self.erased}
            self._dataset, _ = build_dataset(run.domain, self.ranker_name, self.log, self.tables_root, **given)  # type: ignore[arg-type]
            self._definition = run.definition
        validation_ms, test_ms = split_times(run.domain, self.ranker_name, self.log, self.options.fractions)
        limits = {"train": (0, validation_ms), "validation": (validation_ms, test_ms), "test": (test_ms, TIME_MS_MAX)}
        return self._dataset, {name: self._dataset.part(*between) for name, between in limits.items()}

    def _trained(self, run: Run, dataset: Dataset, parts: Mapping[str, npt.NDArray[np.int64]]) -> tuple[Scored, dict[str, Any]]:
        options = replace(self.options, seed=run.seed)
        training = self.folder(run) / "training"

        def start() -> Any:
            return train(
                run.domain,
                self.ranker_name,
                self.log,
                self.tables_root,
                training,
                options,
                resume=True,
                dataset=dataset,
                generations=self.generations,
                erased=self.erased,
            )

        try:
            trained = start()
        except TrainError:  # what was under way had other options
            if not training.exists():
                raise
            shutil.rmtree(training)
            trained = start()
        epochs = trained.metrics["epochs"]
        about = {
            "epochs": len(epochs),
            "best_epoch": trained.metrics["best_epoch"],
            "rows_per_second": float(np.mean([epoch["rows_per_second"] for epoch in epochs])),
            "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        }
        return scores_of(trained.model, dataset, parts["test"]), about

    def _boosted(self, run: Run, dataset: Dataset, parts: Mapping[str, npt.NDArray[np.int64]]) -> tuple[Scored, dict[str, Any]]:
        cosines = run.cell.vectors
        if cosines not in self._columns:
            self._columns[cosines] = columns_of(run.domain, self.ranker_name, self.log, dataset, cosines=cosines, erased=self.erased)
        heads = tuple(run.domain.ranker[self.ranker_name].heads)
        seconds_max = self.options.seconds_max or 60.0
        probabilities, about = boosted(
            run.cell.baseline,
            self._columns[cosines],
            dataset,
            parts,
            heads,
            seconds_max=seconds_max,
            seed=run.seed,
            threads=self.options.threads,
        )
        test = np.sort(parts["test"])
        rows = dataset.candidate_rows(test)
        request_row = np.repeat(np.arange(len(test)), np.diff(dataset.starts)[test])
        return Scored(probabilities, dataset.labels[rows], request_row, dataset.user_id[test], rows), {"baseline": about}

    def _check_truth(self, scored: Scored) -> None:
        """Keeps the test part of the first run; every other one has to have the same."""
        path = self.out / TRUTH
        depends = np.array(json.dumps(self._depends_on, sort_keys=True))
        users = np.unique(scored.users, return_inverse=True)[1].astype(np.uint64)  # who is who, not who: no erasure need come here
        own = {"labels": scored.labels, "request_row": scored.request_row, "users": users, "rows": scored.rows, "depends": depends}
        if path.is_file():
            kept = np.load(path)
            if all(np.array_equal(kept[name], value) for name, value in own.items()):
                return
            if kept["depends"] == depends:
                raise AblationError(f"{path}: another test part of the same log: give the ablation a new folder")
        np.savez_compressed(path, **own)  # type: ignore[arg-type]
        self._truth = None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text + "\n", "utf-8")
    partial.replace(path)

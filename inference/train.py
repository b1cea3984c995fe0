"""Trains a ranker from a canonical log: temporal parts, warm-up and cosine, early stop on validation, a checkpoint an epoch, resume.

`train` writes `model.safetensors`, `metrics.json`, `curves.png` and `checkpoints/` into its folder. The same seed, log and machine give the
same weights as long as no time budget ends the run.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch.nn import functional

from features.domain import Domain
from features.erasures import NOBODY, Erased
from features.tables import TableSet
from features.tensors import tensor_fingerprint
from inference.calibration import calibrate
from inference.dataset import Dataset, build_dataset, split_times
from inference.metrics import head_metrics
from inference.plots import plot_curves, plot_reliability
from inference.small import SMALL_FILE
from inference.train_small import EPOCHS, train_small
from inference.transact import TransActRanker

I64 = npt.NDArray[np.int64]
EVALUATION_ROWS = 4096
TIME_MS_MAX = 2**62


class TrainError(RuntimeError):
    """A training that cannot start or go on; says what differs and what to do."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train. `fractions`: shares of the requests in the train, validation and test part, in the order of time."""

    epochs: int = 10
    learning_rate: float = 3e-3
    warm_up: float = 0.1
    """Share of the steps in which the learning rate rises."""
    batch_rows: int = 1024
    patience: int = 2
    """Epochs without a better validation loss before training stops."""
    seconds_max: float | None = None
    """Budget in seconds, packing included; the cosine then follows whichever ends first, steps or time."""
    seed: int = 0
    threads: int = 2
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    use_sequence: bool = True
    progress: bool = True
    small: bool = True
    """Whether the small model is trained, too: it is released beside one with the sequence."""

    def what_decides(self) -> dict[str, Any]:
        """Options that a resumed run must share with the interrupted one."""
        return {name: value for name, value in asdict(self).items() if name not in ("threads", "progress", "seconds_max", "small")}


@dataclass(frozen=True)
class TrainResult:
    """model: the best epoch's, in eval mode. metrics: what metrics.json holds. generations: by space, those to release with the model."""

    model: TransActRanker
    metrics: dict[str, Any]
    generations: dict[str, str]
    folder: Path


@dataclass
class _State:
    """Where a run stands behind an epoch."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    domain: Domain,
    ranker_name: str,
    log: str | Path,
    tables_root: str | Path,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    resume: bool = False,
    dataset: Dataset | None = None,
    generations: Mapping[str, str] | None = None,
    erased: Erased = NOBODY,
    after_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
) -> TrainResult:
    """Trains one ranker.

    Args:
        domain: the product.
        ranker_name: which of its rankers.
        log: folder of the canonical log.
        tables_root: folder of the embedding and feature spaces (`publish_embeddings` of the training part comes before).
        out: folder to write to.
        options: see TrainOptions.
        resume: go on behind the newest checkpoint in `out`; without one, start.
        dataset: what `build_dataset` made of the same arguments, to save packing it again.
        generations: tables to train with, by space (`newest_generations` of what `publish_embeddings` returned); of a space that is not
            named, the newest.
        erased: users whose past is left out (`features.erasures`).
        after_epoch: gets each epoch's figures, behind its checkpoint.

    Raises:
        TrainError: a checkpoint of another run, or an empty part.
        DatasetError, TableError, LogError: see there.
    """
    options = options or TrainOptions()
    started = time.monotonic()
    out = Path(out)
    torch.set_num_threads(options.threads)
    with _progress(options.progress) as bar:
        if dataset is None:
            task = bar.add_task("pack requests", total=None)
            report = partial(bar.advance, task)
            dataset, tables = build_dataset(domain, ranker_name, log, tables_root, generations=generations, packed=report, erased=erased)
        else:
            tables = TableSet.open(tables_root, domain, ranker_name, generations)
        validation_ms, test_ms = split_times(domain, ranker_name, log, options.fractions)
        run = _Run(domain, ranker_name, dataset, (validation_ms, test_ms), options, out, bar, tables.generations)
        state = run.resume() if resume else run.start()
        while not run.finished(state, time.monotonic() - started):
            figures = run.epoch(state, started)
            after_epoch(figures)
    metrics = run.finish(state)
    return TrainResult(run.model, metrics, tables.generations, out)


def load_trained(domain: Domain, ranker_name: str, folder: str | Path) -> tuple[TransActRanker, dict[str, Any]]:
    """The model that `train` left in a folder, in eval mode, and its metrics.json.

    Raises:
        TrainError: the folder holds no finished training of this ranker, or the domain file has changed since.
    """
    folder = Path(folder)
    try:
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text("utf-8"))
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise TrainError(f"{error.filename}: no such file; train into {folder} first") from error
    fingerprint = tensor_fingerprint(domain, ranker_name)
    if metrics["ranker"] != ranker_name or metrics["tensors"] != fingerprint:
        found = f"ranker {metrics['ranker']}, tensors {metrics['tensors']}"
        raise TrainError(f"{folder}: {found}; the domain file gives ranker {ranker_name}, tensors {fingerprint}: train again")
    model = TransActRanker(domain, ranker_name, use_sequence=metrics["options"]["use_sequence"])
    model.load_state_dict(weights)
    return model.eval(), metrics


def predict(
    model: TransActRanker, dataset: Dataset, requests: I64, *, rows_max: int = EVALUATION_ROWS
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], I64, npt.NDArray[np.uint64]]:
    """Probabilities float32 [N, H], labels bool [N, H], request rows int64 [N] and users of the requests uint64 [R], for `head_metrics`."""
    model.eval()
    order, probabilities = [], []
    for chosen in dataset.batches(requests, rows_max, None):
        batch = dataset.batch(chosen)
        order.append(chosen)
        probabilities.append(model.probabilities(batch.tensors, batch.request_row).numpy())
    visited = np.concatenate(order)
    sizes = np.diff(dataset.starts)[visited]
    labels = dataset.labels[dataset.candidate_rows(visited)]
    return np.concatenate(probabilities), labels, np.repeat(np.arange(len(visited)), sizes), dataset.user_id[visited]


class _Run:
    """One training: model, optimiser, parts."""

    def __init__(
        self,
        domain: Domain,
        ranker_name: str,
        dataset: Dataset,
        part_times: tuple[int, int],
        options: TrainOptions,
        out: Path,
        bar: Progress,
        generations: dict[str, str],
    ) -> None:
        self.dataset, self.options, self.out, self.bar = dataset, options, out, bar
        self._of = domain, ranker_name
        limits = (0, *part_times, TIME_MS_MAX)
        self.parts = {name: dataset.part(*limits[i : i + 2]) for i, name in enumerate(("train", "validation", "test"))}
        for name, part in self.parts.items():
            if not len(part):
                raise TrainError(f"the {name} part is empty: fractions {options.fractions} of {len(dataset)} requests; give it more")
        torch.manual_seed(options.seed)
        self.model = TransActRanker(domain, ranker_name, use_sequence=options.use_sequence)
        self.model.fit_normalisation(dataset.rows_for_normalisation(self.parts["train"]))
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=options.learning_rate)
        self.about = {
            "ranker": ranker_name,
            "tensors": tensor_fingerprint(domain, ranker_name),
            "options": json.loads(json.dumps(options.what_decides())),
            "generations": generations,
            "parts": {name: self._describe(part) for name, part in self.parts.items()},
        }
        self.steps = options.epochs * len(dataset.batches(self.parts["train"], options.batch_rows, np.random.default_rng(options.seed)))

    def start(self) -> _State:
        """A fresh run: earlier checkpoints in the folder go."""
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        self.out.mkdir(parents=True, exist_ok=True)
        return _State()

    def resume(self) -> _State:
        """Behind the newest checkpoint, or a fresh run."""
        found = sorted((self.out / "checkpoints").glob("epoch-*"))
        if not found:
            return self.start()
        kept = json.loads((found[-1] / "state.json").read_text("utf-8"))
        for key, value in self.about.items():
            if kept["about"][key] != value:
                theirs = f"{found[-1]}: {key} of the interrupted run is {kept['about'][key]}"
                raise TrainError(f"{theirs}, of this one {value}; give the same, or start without resume")
        self.model.load_state_dict(load_file(found[-1] / "model.safetensors"))
        self.optimiser.load_state_dict(torch.load(found[-1] / "optimiser.pt", weights_only=True))
        return _State(**kept["state"])

    def finished(self, state: _State, seconds: float) -> bool:
        """Whether no epoch is left, none got better, or the budget is spent."""
        late = self.options.seconds_max is not None and seconds >= self.options.seconds_max and state.epoch > 0
        return late or state.epoch >= self.options.epochs or state.epoch - state.best_epoch >= self.options.patience

    def epoch(self, state: _State, started: float) -> dict[str, Any]:
        """One pass over the training part, then the figures of the validation part and a checkpoint."""
        state.epoch += 1
        began = time.monotonic()
        # Each epoch has seeds of its own, so that a resumed run draws what an uninterrupted one would have.
        seed = self.options.seed * 1_000_003 + state.epoch
        torch.manual_seed(seed)
        window = torch.Generator().manual_seed(seed)
        batches = self.dataset.batches(self.parts["train"], self.options.batch_rows, np.random.default_rng(seed))
        task = self.bar.add_task(f"epoch {state.epoch}", total=len(batches))
        self.model.train()
        total = rows = 0.0
        for chosen in batches:
            share = self._share_done(state.step, time.monotonic() - started)
            if share >= 1 and rows:
                break  # the budget is spent
            batch = self.dataset.batch(chosen)
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(share, self.options)
            logits = self.model(batch.tensors, batch.request_row, generator=window)
            loss = functional.binary_cross_entropy_with_logits(logits, batch.labels, batch.weights, reduction="sum")
            self.optimiser.zero_grad()
            (loss / len(batch.labels)).backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
            state.step += 1
            total, rows = total + float(loss.detach()), rows + len(batch.labels)
            self.bar.advance(task)
        self.bar.update(task, completed=len(batches))
        seconds = time.monotonic() - began
        figures = {"epoch": state.epoch, "train_loss": total / rows, "rows_per_second": rows / seconds, **self._figures("validation")}
        if not math.isfinite(figures["loss"]):
            raise TrainError(
                f"epoch {state.epoch}: the loss is {figures['loss']}; lower the learning rate (now {self.options.learning_rate})"
            )
        if figures["loss"] < state.best_loss:
            state.best_epoch, state.best_loss = state.epoch, figures["loss"]
        state.history.append(figures)
        state.seconds += time.monotonic() - began
        self._checkpoint(state)
        return figures

    def finish(self, state: _State) -> dict[str, Any]:
        """Loads the best epoch, measures the test part, writes the results."""
        self.model.load_state_dict(load_file(self._folder(state.best_epoch) / "model.safetensors"))
        calibration = self._calibrate()
        metrics = {
            **self.about,
            "best_epoch": state.best_epoch,
            "training_seconds": state.seconds,
            "epochs": state.history,
            "test": self._figures("test"),
        }
        if calibration:
            metrics["calibration"] = calibration
            plot_reliability(calibration, self.out / "calibration.png")
        if self.options.use_sequence and self.options.small:
            metrics["test_small"] = self._train_small()
        save_file(self.model.eval().state_dict(), self.out / "model.safetensors")
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
        plot_curves(metrics, self.out / "curves.png")
        return metrics

    def _calibrate(self) -> dict[str, Any]:
        """Fits the model's calibration on the validation part; what it changes on the test part, empty where the model has none."""
        if self.model.calibration is None:
            return {}
        validation, test = (predict(self.model, self.dataset, self.parts[name])[:2] for name in ("validation", "test"))
        return calibrate(self.model.calibration, self.model.head_names, validation, test)

    def _train_small(self) -> dict[str, Any]:
        """Trains the small model on the same part, writes it, and measures the test part."""
        task = self.bar.add_task("small model", total=EPOCHS)
        report = partial(self.bar.advance, task)
        small = train_small(*self._of, self.dataset, self.parts["train"], seed=self.options.seed, report=report)
        save_numpy(small.weights, self.out / SMALL_FILE)
        part = self.parts["test"]
        probabilities = np.concatenate([small.probabilities(self.dataset.request(i)) for i in part.tolist()])
        labels, sizes = self.dataset.labels[self.dataset.candidate_rows(part)], np.diff(self.dataset.starts)[part]
        request_row = np.repeat(np.arange(len(part)), sizes)
        heads = head_metrics(probabilities, labels, request_row, self.dataset.user_id[part], self.model.head_names)
        return {"heads": {name: figures.as_dict() for name, figures in heads.items()}}

    def _share_done(self, step: int, seconds: float) -> float:
        of_time = 0.0 if self.options.seconds_max is None else seconds / self.options.seconds_max
        return max(step / self.steps, of_time)

    def _figures(self, part: str) -> dict[str, Any]:
        """Weighted loss a row, as in training, and every head's metrics."""
        probabilities, labels, request_row, users = predict(self.model, self.dataset, self.parts[part])
        visited = np.concatenate(self.dataset.batches(self.parts[part], EVALUATION_ROWS, None))
        weights = self.dataset.weights[self.dataset.candidate_rows(visited)]
        p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
        loss = float(-(weights * np.where(labels, np.log(p), np.log1p(-p))).sum() / len(labels))
        heads = head_metrics(probabilities, labels, request_row, users, self.model.head_names)
        return {"loss": loss, "heads": {name: figures.as_dict() for name, figures in heads.items()}}

    def _describe(self, part: I64) -> dict[str, int]:
        times = self.dataset.request_time_ms[part]
        rows = int(np.diff(self.dataset.starts)[part].sum())
        return {"requests": len(part), "rows": rows, "from_ms": int(times[0]), "until_ms": int(times[-1])}

    def _folder(self, epoch: int) -> Path:
        return self.out / "checkpoints" / f"epoch-{epoch:04d}"

    def _checkpoint(self, state: _State) -> None:
        """Writes the epoch's checkpoint whole or not at all, and keeps only this one and the best."""
        target = self._folder(state.epoch)
        partial = target.with_name(f".{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(self.model.state_dict(), partial / "model.safetensors")
        torch.save(self.optimiser.state_dict(), partial / "optimiser.pt")
        (partial / "state.json").write_text(json.dumps({"about": self.about, "state": asdict(state)}), "utf-8")
        partial.rename(target)
        for folder in target.parent.glob("epoch-*"):
            if folder not in (target, self._folder(state.best_epoch)):
                shutil.rmtree(folder)


def learning_rate(share: float, options: TrainOptions) -> float:
    """Linear warm-up, then a cosine to a hundredth; `share` of the run done, 0 to 1."""
    if share < options.warm_up:
        return options.learning_rate * max(share / options.warm_up, 0.01)
    rest = min(1.0, (share - options.warm_up) / max(1e-9, 1 - options.warm_up))
    return options.learning_rate * max(0.01, 0.5 * (1 + math.cos(math.pi * rest)))


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not shown)

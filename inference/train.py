"""Trains a ranker from a canonical log: temporal parts, warm-up and cosine, early stop on validation, checkpoints, resume.

`train` writes `model.safetensors`, `metrics.json`, `curves.png`, `report.html`, `tensorboard/` and `checkpoints/` into its folder. The same
seed, log and machine give the same weights as long as no time budget ends the run, and a run that was killed ends where it would have
without that. `torchrun` starts several processes: each batch is shared out among them, and the first one does everything else.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from features.domain import Domain, ModelSettings
from features.erasures import NOBODY, Erased
from features.logs import is_served_log
from features.tables import TableSet
from features.tensors import tensor_fingerprint
from inference.calibration import Calibration, calibrate
from inference.checkpoints import WEIGHTS, Checkpoints, Passed, State
from inference.checkpoints import TrainError as TrainError
from inference.dataset import Dataset, build_dataset, split_times
from inference.metrics import head_metrics
from inference.packed import default_cache
from inference.parallel import Ranks, joined, threads_each
from inference.plots import plot_curves, plot_reliability
from inference.report import REPORT, reliability_bins, write_report
from inference.small import SMALL_FILE
from inference.train_small import EPOCHS, train_small
from inference.train_step import Stepper
from inference.training_log import EVENTS, TrainingLog
from inference.transact import TransActRanker

I64 = npt.NDArray[np.int64]
EVALUATION_ROWS = 4096
TIME_MS_MAX = 2**62
_DECIDES_NOTHING = ("threads", "progress", "seconds_max", "checkpoint_s", "small")


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
    """Budget in seconds, behind packing and across interruptions; the cosine then follows whichever ends first, steps or time."""
    seed: int = 0
    threads: int = 2
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    use_sequence: bool = True
    piece_tokens: int = 12_800
    """Tokens (candidates times actions) that go through the model at once: gradients of a batch are accumulated. Bounds memory too."""
    bf16: bool = False
    """Products of matrices in bfloat16, weights and sums in float32."""
    checkpoint_s: float = 300.0
    """Seconds from one checkpoint within an epoch to the next."""
    progress: bool = True
    small: bool = True
    """Whether the small model is trained, too: it is released beside one with the sequence."""

    def what_decides(self) -> dict[str, Any]:
        """Options that a resumed run must share with the interrupted one."""
        return {name: value for name, value in asdict(self).items() if name not in _DECIDES_NOTHING}


@dataclass(frozen=True)
class TrainResult:
    """model: the best epoch's, in eval mode. metrics: what metrics.json holds. generations: by space, those to release with the model."""

    model: TransActRanker
    metrics: dict[str, Any]
    generations: dict[str, str]
    folder: Path


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
    start: Mapping[str, Tensor] | None = None,
    parts: tuple[int, int, int, int] | None = None,
    after_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
    after_step: Callable[[int, float], None] = lambda _, __: None,
) -> TrainResult:
    """Trains one ranker.

    Args:
        domain: the product.
        ranker_name: which of its rankers.
        log: folder of the canonical log.
        tables_root: folder of the embedding and feature spaces (`publish_embeddings` of the training part comes before).
        out: folder to write to.
        options: see TrainOptions.
        resume: go on behind the newest checkpoint in `out`, also within an epoch; without one, start.
        dataset: what `build_dataset` made of the same arguments, to save packing it again.
        generations: tables to train with, by space (`newest_generations` of what `publish_embeddings` returned); of a space that is not
            named, the newest.
        erased: users whose past is left out (`features.erasures`).
        start: weights to go on from, with the normalisation in them; None: new ones. Where no epoch makes the validation loss better, the
            result is what it started from.
        parts: times (milliseconds) at which the training, validation and test part begin, and the last one ends; None: by
            `options.fractions` of all requests.
        after_epoch: gets each epoch's figures, behind its checkpoint.
        after_step: gets each step's number and loss a row, behind its checkpoint if there is one.

    Raises:
        TrainError: a checkpoint of another run, or an empty part.
        DatasetError, TableError, LogError: see there.
    """
    options = options or TrainOptions()
    out = Path(out)
    torch.set_num_threads(threads_each(options.threads))
    with joined() as ranks, TrainingLog(out if ranks.is_first else None, shown=options.progress and ranks.is_first) as log_of_run:
        report = partial(log_of_run.advance, log_of_run.task("pack requests")) if dataset is None else lambda _: None
        of_log = partial(build_dataset, domain, ranker_name, log, tables_root, erased=erased, cache=default_cache(log), packed=report)
        if dataset is None:
            # The first process packs; the others find what it left.
            chosen = ranks.from_first(lambda: of_log(generations=generations)[1].generations)
            dataset, tables = of_log(generations=chosen)
        else:
            tables = TableSet.open(tables_root, domain, ranker_name, generations)
        if parts is None:
            parts = (0, *split_times(domain, ranker_name, log, options.fractions), TIME_MS_MAX)
        run = _Run(domain, ranker_name, dataset, parts, options, out, log_of_run, tables.generations, ranks, start, log)
        state = run.resume() if resume else run.start()
        started = time.monotonic() - state.seconds - state.passed.seconds
        while not ranks.from_first(lambda: run.finished(state, time.monotonic() - started)):
            figures = run.epoch(state, started, after_step)
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
        weights = load_file(folder / WEIGHTS)
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
        limits: tuple[int, int, int, int],
        options: TrainOptions,
        out: Path,
        log: TrainingLog,
        generations: dict[str, str],
        ranks: Ranks,
        start: Mapping[str, Tensor] | None,
        log_folder: str | Path,
    ) -> None:
        self.dataset, self.options, self.out, self.log, self.ranks = dataset, options, out, log, ranks
        self._of = domain, ranker_name
        self.parts = {name: dataset.part(*limits[i : i + 2]) for i, name in enumerate(("train", "validation", "test"))}
        for name, part in self.parts.items():
            if not len(part):
                raise TrainError(f"the {name} part is empty: {limits} ms of {len(dataset)} requests; give it more")
        _check_positions(domain.ranker[ranker_name].model, dataset, self.parts["train"])
        torch.manual_seed(options.seed)
        self.model = TransActRanker(domain, ranker_name, use_sequence=options.use_sequence)
        self._continues = start is not None
        if start is None:
            self.model.fit_normalisation(dataset.rows_for_normalisation(self.parts["train"]))
        else:
            self._load(start)
        self.stepper = Stepper(self.model, seed=options.seed, piece_tokens=options.piece_tokens, bf16=options.bf16, ranks=ranks)
        self.about = {
            "ranker": ranker_name,
            "tensors": tensor_fingerprint(domain, ranker_name),
            "options": json.loads(json.dumps(options.what_decides())),
            "generations": generations,
            "served": is_served_log(log_folder),
            "start": "" if start is None else _identity(start),
            "parts": {name: self._describe(part) for name, part in self.parts.items()},
        }
        self.checkpoints = Checkpoints(out / "checkpoints", self.about)
        self.batches = len(dataset.batches(self.parts["train"], options.batch_rows, np.random.default_rng(options.seed)))
        """Of an epoch, about: another order may give one more or less."""
        self.steps = options.epochs * self.batches

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise TrainError(f"the weights to go on from are of another model: {error}") from error
        if self.model.calibration is not None:  # it is fitted at the end, to what comes out in front of it
            self.model.calibration = Calibration(self.model.calibration.kind, len(self.model.head_names))

    def start(self) -> State:
        """A fresh run: earlier checkpoints in the folder go."""
        if self.ranks.is_first:
            self.checkpoints.clear()
            shutil.rmtree(self.out / EVENTS, ignore_errors=True)
            self.out.mkdir(parents=True, exist_ok=True)
        state = State()
        if self._continues:
            state.best_loss = self.ranks.from_first(lambda: self._figures("validation")[0]["loss"])
            if self.ranks.is_first:
                self.checkpoints.save(state, self.model, self.stepper.optimiser, best=True)
        return state

    def resume(self) -> State:
        """Behind the newest checkpoint, or a fresh run."""
        return self.checkpoints.restore(self.model, self.stepper.optimiser) or self.start()

    def finished(self, state: State, seconds: float) -> bool:
        """Whether no epoch is left, none got better, or the budget is spent."""
        late = self.options.seconds_max is not None and seconds >= self.options.seconds_max and state.epoch > 0
        return late or state.epoch >= self.options.epochs or state.epoch - state.best_epoch >= self.options.patience

    def epoch(self, state: State, started: float, after_step: Callable[[int, float], None]) -> dict[str, Any]:
        """The rest of a pass over the training part, then the figures of the validation part and a checkpoint."""
        # Each epoch has an order of its own and each step its draws, so that a resumed run goes the way of an uninterrupted one.
        order = np.random.default_rng(self.options.seed * 1_000_003 + state.epoch + 1)
        batches = self.dataset.batches(self.parts["train"], self.options.batch_rows, order)
        self.log.begin(state, state.epoch + 1, len(batches))
        self.model.train()
        saved = time.monotonic()
        for chosen in batches[state.batch :]:
            began = time.perf_counter()
            share = self._share_done(state.step, started)
            if share >= 1 and state.passed.rows:
                break  # the budget is spent
            rate = learning_rate(share, self.options)
            done = self.stepper.step(self.dataset, chosen, state.step, rate)
            state.step, state.batch = state.step + 1, state.batch + 1
            for passed in (state.passed, state.of_curve):
                passed.add(done.loss, done.rows, time.perf_counter() - began, done.wait_s)
            self.log.step(state, done, rate, self.steps)
            if self.ranks.is_first and time.monotonic() - saved >= self.options.checkpoint_s:
                self.checkpoints.save(state, self.model, self.stepper.optimiser)
                saved = time.monotonic()
            after_step(state.step, done.loss / done.rows)
        return self._end_epoch(state)

    def _end_epoch(self, state: State) -> dict[str, Any]:
        began, passed = time.monotonic(), state.passed
        figures = {
            "epoch": state.epoch + 1,
            "train_loss": passed.loss / passed.rows,
            "rows_per_second": passed.rows / passed.seconds,
            "data_wait_share": passed.wait_s / passed.seconds,
            **self.ranks.from_first(lambda: self._figures("validation")[0]),
        }
        state.epoch, state.batch, state.passed = state.epoch + 1, 0, Passed()
        if not math.isfinite(figures["loss"]):
            raise TrainError(
                f"epoch {state.epoch}: the loss is {figures['loss']}; lower the learning rate (now {self.options.learning_rate})"
            )
        better = figures["loss"] < state.best_loss
        if better:
            state.best_epoch, state.best_loss = state.epoch, figures["loss"]
        state.history.append(figures)
        state.seconds += passed.seconds + time.monotonic() - began
        self.log.end(state, figures)
        if self.ranks.is_first:
            self.checkpoints.save(state, self.model, self.stepper.optimiser, best=better)
        return figures

    def finish(self, state: State) -> dict[str, Any]:
        """Loads the best epoch, measures the test part, writes the results: all of it in the first process."""
        metrics = self.ranks.from_first(lambda: self._finish(state))
        self.model.load_state_dict(load_file(self.out / WEIGHTS))
        self.model.eval()
        return metrics

    def _finish(self, state: State) -> dict[str, Any]:
        self.checkpoints.restore_best(state, self.model)
        calibration = self._calibrate()
        test, bins = self._figures("test")
        metrics = {
            **self.about,
            "best_epoch": state.best_epoch,
            "training_seconds": state.seconds,
            "epochs": state.history,
            "curve": state.curve,
            "test": test,
            "reliability": bins,
        }
        if calibration:
            metrics["calibration"] = calibration
            plot_reliability(calibration, self.out / "calibration.png")
        if self.options.use_sequence and self.options.small:
            metrics["test_small"] = self._train_small()
        save_file(self.model.eval().state_dict(), self.out / WEIGHTS)
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
        plot_curves(metrics, self.out / "curves.png")
        write_report(metrics, self.out / REPORT)
        return metrics

    def _calibrate(self) -> dict[str, Any]:
        """Fits the model's calibration on the validation part; what it changes on the test part, empty where the model has none."""
        if self.model.calibration is None:
            return {}
        validation, test = (predict(self.model, self.dataset, self.parts[name])[:2] for name in ("validation", "test"))
        return calibrate(self.model.calibration, self.model.head_names, validation, test)

    def _train_small(self) -> dict[str, Any]:
        """Trains the small model on the same part, writes it, and measures the test part."""
        report = partial(self.log.advance, self.log.task("small model", EPOCHS))
        small = train_small(*self._of, self.dataset, self.parts["train"], seed=self.options.seed, report=report)
        save_numpy(small.weights, self.out / SMALL_FILE)
        part = self.parts["test"]
        probabilities = np.concatenate([small.probabilities(self.dataset.request(i)) for i in part.tolist()])
        labels, sizes = self.dataset.labels[self.dataset.candidate_rows(part)], np.diff(self.dataset.starts)[part]
        request_row = np.repeat(np.arange(len(part)), sizes)
        heads = head_metrics(probabilities, labels, request_row, self.dataset.user_id[part], self.model.head_names)
        return {"heads": {name: figures.as_dict() for name, figures in heads.items()}}

    def _share_done(self, step: int, started: float) -> float:
        """Share of the run that is done, of steps or of time: whichever ends first."""
        of_steps, seconds_max = step / self.steps, self.options.seconds_max
        if seconds_max is None:
            return of_steps
        return max(of_steps, self.ranks.from_first(lambda: (time.monotonic() - started) / seconds_max))

    def _figures(self, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weighted loss a row, as in training, and every head's metrics; and its calibration."""
        probabilities, labels, request_row, users = predict(self.model, self.dataset, self.parts[part])
        visited = np.concatenate(self.dataset.batches(self.parts[part], EVALUATION_ROWS, None))
        weights = self.dataset.weights[self.dataset.candidate_rows(visited)]
        p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
        loss = float(-(weights * np.where(labels, np.log(p), np.log1p(-p))).sum() / len(labels))
        names = self.model.head_names
        heads = head_metrics(probabilities, labels, request_row, users, names)
        bins = {name: reliability_bins(probabilities[:, i], labels[:, i]) for i, name in enumerate(names)}
        return {"loss": loss, "heads": {name: figures.as_dict() for name, figures in heads.items()}}, bins

    def _describe(self, part: I64) -> dict[str, int]:
        times = self.dataset.request_time_ms[part]
        rows = int(np.diff(self.dataset.starts)[part].sum())
        return {"requests": len(part), "rows": rows, "from_ms": int(times[0]), "until_ms": int(times[-1])}


def _check_positions(settings: ModelSettings, dataset: Dataset, part: I64) -> None:
    """Raises TrainError: no candidate stood where all of them stand when they are served, so that place's row would be what it began as."""
    if settings.position_max:
        position = dataset.of_candidate["position"][dataset.candidate_rows(part)]
        if not (np.minimum(position, settings.position_max - 1) == settings.position_served).any():
            raise TrainError(
                f"position_max: no candidate of the training part stood at place {settings.position_served} (position_served); "
                "the log may have no positions"
            )


def _identity(weights: Mapping[str, Tensor]) -> str:
    """Of weights, 16 hexadecimal digits: a resumed run must have started from the same."""
    return hashlib.sha256(save({name: tensor.contiguous() for name, tensor in sorted(weights.items())})).hexdigest()[:16]


def learning_rate(share: float, options: TrainOptions) -> float:
    """Linear warm-up, then a cosine to a hundredth; `share` of the run done, 0 to 1."""
    if share < options.warm_up:
        return options.learning_rate * max(share / options.warm_up, 0.01)
    rest = min(1.0, (share - options.warm_up) / max(1e-9, 1 - options.warm_up))
    return options.learning_rate * max(0.01, 0.5 * (1 + math.cos(math.pi * rest)))

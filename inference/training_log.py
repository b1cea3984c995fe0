"""What a training tells while it runs: a progress bar with loss, AUC and samples a second, and TensorBoard's event files."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from inference.checkpoints import Passed, State
from inference.metrics import auc
from inference.train_step import Stepped

EVENTS = "tensorboard"
"""Folder of the event files, below that of a training: `tensorboard --logdir` reads it."""

WRITTEN = ("auc", "ndcg", "hit", "log_loss")
CURVE_POINTS = 400
AUC_ROWS = 8_192
"""The live AUC is of the newest candidates, of the first head, as they were scored just before the model learned from them."""


class TrainingLog:
    """One for a run. `shown`: whether there is a bar; `folder` None: no event files (another process writes them)."""

    def __init__(self, folder: Path | None, *, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[figures]}"), disable=not shown)
        self._folder, self._shown = folder, shown
        self._writer: SummaryWriter | None = None
        self._newest: list[tuple[np.ndarray, np.ndarray]] = []
        self._task, self._batches = TaskID(0), 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def task(self, name: str, total: int | None = None) -> TaskID:
        """Another bar; `advance` moves it."""
        return self._bar.add_task(name, total=total, figures="")

    def advance(self, task: TaskID, by: int = 1) -> None:
        """Moves a bar."""
        self._bar.advance(task, by)

    def begin(self, state: State, epoch: int, batches: int) -> None:
        """An epoch begins, or goes on behind `state`. Events of later steps, which a killed run may have written, no longer count."""
        if self._writer is None and self._folder is not None:
            self._writer = SummaryWriter(str(self._folder / EVENTS), purge_step=state.step + 1 if state.step else None)
        self._batches = batches
        self._task = self.task(f"epoch {epoch}", batches)
        self._bar.advance(self._task, state.batch)

    def step(self, state: State, done: Stepped, rate: float, steps: int) -> None:
        """A step is done, of about `steps` of the run. What is drawn and written is a mean of a few of them."""
        self._newest.append((done.probability.numpy(), done.label.numpy()))
        while sum(len(label) for _, label in self._newest[1:]) > AUC_ROWS:
            self._newest.pop(0)
        self._bar.advance(self._task)
        if state.step % max(1, steps // CURVE_POINTS):
            return
        of = state.of_curve
        loss, rows_per_s = of.loss / max(of.rows, 1), of.rows / max(of.seconds, 1e-9)
        state.curve.append([state.step, loss])
        state.of_curve = Passed()
        if not self._shown and self._writer is None:
            return
        live = auc(*(np.concatenate(parts) for parts in zip(*self._newest, strict=True)))
        self._bar.update(self._task, figures=f"loss {loss:.4f}  AUC {live:.3f}  {rows_per_s:,.0f} samples/s")
        self._write(state.step, {"train/loss": loss, "train/auc": live, "train/samples_per_s": rows_per_s, "train/learning_rate": rate})

    def end(self, state: State, figures: dict[str, Any]) -> None:
        """An epoch's figures."""
        self._bar.update(self._task, completed=self._batches)
        found = {"validation/loss": figures["loss"]}
        for head, of in figures["heads"].items():
            found |= {f"validation/{name}/{head}": of[name] for name in WRITTEN if of[name] is not None}
        self._write(state.step, found)
        if self._writer is not None:
            self._writer.flush()

    def _write(self, step: int, figures: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

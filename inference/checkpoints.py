"""Where a training stands, and the folders that it goes on from after a kill."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "model.safetensors"


class TrainError(RuntimeError):
    """A training that cannot start or go on; says what differs and what to do."""


@dataclass
class Passed:
    """What went through the model since some moment: the sum of the loss, candidates, seconds, and seconds in which data was waited for."""

    loss: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0

    def add(self, loss: float, rows: int, seconds: float, wait_s: float) -> None:
        """Counts a step."""
        self.loss, self.rows = self.loss + loss, self.rows + rows
        self.seconds, self.wait_s = self.seconds + seconds, self.wait_s + wait_s


@dataclass
class State:
    """Where a run stands. `epoch`: epochs that are done; `batch`: batches of the next one that are, `passed` with them.

    best: the checkpoint of the best epoch. history: every epoch's figures. curve: loss a row of the training part, as [step, loss],
    a point for a few steps; `of_curve` is what the next point is made of.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    best: str = ""
    seconds: float = 0.0
    passed: Passed = field(default_factory=Passed)
    history: list[dict[str, Any]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    of_curve: Passed = field(default_factory=Passed)


class Checkpoints:
    """The newest checkpoint of a training and its best epoch's, below `folder`. A checkpoint is whole or not there."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """`about`: what a resumed run must share with the interrupted one."""
        self._folder, self._about = folder, about

    def clear(self) -> None:
        """Removes those of an earlier run."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def save(self, state: State, model: nn.Module, optimiser: torch.optim.Optimizer, *, best: bool = False) -> None:
        """Writes one; `best`: of the best epoch up to now."""
        target = self._folder / f"epoch-{state.epoch:04d}-step-{state.step:08d}"
        if best:
            state.best = target.name
        partial = target.with_name(f".{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(model.state_dict(), partial / WEIGHTS)
        torch.save(optimiser.state_dict(), partial / "optimiser.pt")
        (partial / "state.json").write_text(json.dumps({"about": self._about, "state": asdict(state)}), "utf-8")
        shutil.rmtree(target, ignore_errors=True)  # of a run that was cut off here and has come here again
        partial.rename(target)
        for folder in self._folder.glob("epoch-*"):
            if folder.name not in (target.name, state.best):
                shutil.rmtree(folder)

    def restore(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> State | None:
        """Goes back to the newest one; None: there is none.

        Raises:
            TrainError: it is another run's.
        """
        found = sorted(self._folder.glob("epoch-*"))
        if not found:
            return None
        kept = json.loads((found[-1] / "state.json").read_text("utf-8"))
        for key, value in self._about.items():
            if kept["about"].get(key) != value:
                theirs = f"{found[-1]}: {key} of the interrupted run is {kept['about'].get(key)}"
                raise TrainError(f"{theirs}, of this one {value}; give the same, or start without resume")
        model.load_state_dict(load_file(found[-1] / WEIGHTS))
        optimiser.load_state_dict(torch.load(found[-1] / "optimiser.pt", weights_only=True))
        said = kept["state"]
        return State(**{**said, "passed": Passed(**said["passed"]), "of_curve": Passed(**said["of_curve"])})

    def restore_best(self, state: State, model: nn.Module) -> None:
        """The weights of the best epoch."""
        model.load_state_dict(load_file(self._folder / state.best / WEIGHTS))

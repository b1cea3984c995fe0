"""One step of training: a batch of requests, in pieces that fit the cache, on one process or several."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from inference.dataset import Dataset
from inference.parallel import Ranks
from inference.transact import TransActRanker

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stepped:
    """What a step did: the weighted loss of all `rows` candidates, of all processes; seconds that its data took.

    probability, label: float32 [n], of the first head, this process's candidates.
    """

    loss: float
    rows: int
    wait_s: float
    probability: Tensor
    label: Tensor


class Stepper:
    """A model with its optimiser. The same seed, step and batch give the same step, wherever a run was interrupted."""

    def __init__(self, model: TransActRanker, *, seed: int, piece_tokens: int, bf16: bool = False, ranks: Ranks | None = None) -> None:
        """`piece_tokens`: tokens (candidates times actions) that go through the model at once; gradients of a batch are accumulated."""
        self.model, self._ranks = model, ranks or Ranks()
        self._seed, self._piece_tokens, self._bf16 = seed, piece_tokens, bf16
        self.optimiser = torch.optim.Adam(model.parameters(), fused=True)
        self._forward: nn.Module = model
        if self._ranks.size > 1:
            self._forward = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def step(self, dataset: Dataset, chosen: I64, number: int, rate: float) -> Stepped:
        """Trains on the requests `chosen`; `number`: of the step, `rate`: its learning rate."""
        begin_s = time.perf_counter()
        ranks, rows = self._ranks, int((dataset.starts[chosen + 1] - dataset.starts[chosen]).sum())
        # Drawn for the whole batch, whoever computes which part of it.
        windows = self._draws(number, len(chosen))
        lengths = self._lengths(dataset, chosen, windows)
        mine = np.argsort(lengths, kind="stable")[ranks.rank :: ranks.size]
        share = 1.0 if len(mine) else 0.0  # every process takes part in the sum of gradients
        mine = mine if len(mine) else np.zeros(1, np.int64)
        pieces = dataset.pieces(chosen[mine], lengths[mine], self._piece_tokens)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        wait_s, total = time.perf_counter() - begin_s, 0.0
        seen: list[tuple[Tensor, Tensor]] = []
        for place, piece in enumerate(pieces):
            begin_s = time.perf_counter()
            batch = dataset.batch(chosen[mine[piece]])
            wait_s += time.perf_counter() - begin_s
            window_ms = None if windows is None else windows[mine[piece]]
            with self._sync(place == len(pieces) - 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                    logits = self._forward(batch.tensors, batch.request_row, window_ms=window_ms)
                loss = functional.binary_cross_entropy_with_logits(logits.float(), batch.labels, batch.weights, reduction="sum") * share
                (loss * (ranks.size / rows)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            seen.append((torch.sigmoid(logits.detach()[:, 0].float()), batch.labels[:, 0]))
        self.optimiser.step()
        if ranks.size > 1:
            total = float(ranks.sum(torch.tensor(total, dtype=torch.float64)))
        return Stepped(total, rows, wait_s, *(torch.cat(parts) for parts in zip(*seen, strict=True)))

    def _draws(self, number: int, requests: int) -> Tensor | None:
        """Seeds dropout, and draws the time windows of a batch."""
        of_dropout, of_windows = np.random.SeedSequence([self._seed, number]).generate_state(2, np.uint64).tolist()
        torch.manual_seed((of_dropout + self._ranks.rank) % 2**63)
        if not self.model.use_sequence:
            return None
        return self.model.sequence.draw_window_ms(requests, torch.Generator().manual_seed(of_windows % 2**63))

    def _lengths(self, dataset: Dataset, chosen: I64, windows: Tensor | None) -> I64:
        """Actions of each request that cost something."""
        if not self.model.use_sequence:
            return np.zeros(len(chosen), np.int64)
        if windows is None or not self.model.train_sequence.applies:
            return dataset.sequence_starts[chosen + 1] - dataset.sequence_starts[chosen]
        return dataset.lengths_behind(chosen, windows[:, 0].numpy())

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """Gradients are summed over the processes with the last piece."""
        with contextlib.nullcontext() if last or not isinstance(self._forward, DistributedDataParallel) else self._forward.no_sync():
            yield

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        return self.optimiser.state_dict()

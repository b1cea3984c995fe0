"""Trains the small model (`inference/small.py`) on a part of a packed dataset: one pass for the inputs, a few for the weights."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from features.domain import Domain
from inference.dataset import Dataset
from inference.small import HIDDEN, RANGE_MAX, SmallInputs, SmallModel

ROWS_MAX = 100_000
"""Candidates that it is trained on, of the newest requests: the model has some thousand weights, and more change it little."""
EPOCHS, BATCHES, BATCH_ROWS_MAX, LEARNING_RATE, DECAY = 6, 50, 2048, 1e-2, 1e-5
"""A pass has at least BATCHES steps, of BATCH_ROWS_MAX candidates at most."""


def train_small(
    domain: Domain,
    ranker_name: str,
    dataset: Dataset,
    requests: npt.NDArray[np.int64],
    *,
    seed: int = 0,
    report: Callable[[], object] = lambda: None,
) -> SmallModel:
    """Trains on `requests` (rows of the dataset, in the order of time). `report` is called once a pass.

    Loss and label weights are those of the large model.
    """
    inputs = SmallInputs(domain, ranker_name)
    heads = len(domain.ranker[ranker_name].heads)
    sizes = np.diff(dataset.starts)[requests]
    newest = requests[np.cumsum(sizes[::-1])[::-1] <= ROWS_MAX]
    dense, codes, labels, weights = _inputs(inputs, dataset, newest if len(newest) else requests[-1:])
    generator = torch.Generator().manual_seed(seed)
    mean, scale = dense.mean(0), 1.0 / torch.clamp(dense.std(0, correction=0), min=1e-3)
    dense = ((dense - mean) * scale).clamp(-RANGE_MAX, RANGE_MAX)
    parameters = {
        "hidden": torch.randn(inputs.width, HIDDEN, generator=generator) * (2.0 / max(inputs.width, 1)) ** 0.5,
        "hidden_bias": torch.zeros(HIDDEN),
        "out": torch.randn(HIDDEN, heads, generator=generator) * (1.0 / HIDDEN) ** 0.5,
        "bias": torch.zeros(heads),
        **{column.key: torch.zeros(column.codes, heads) for column in inputs.codes},
    }
    for value in parameters.values():
        value.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=DECAY)
    batch_rows = min(max(len(dense) // BATCHES, 1), BATCH_ROWS_MAX)
    steps = EPOCHS * -(-len(dense) // batch_rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=LEARNING_RATE, total_steps=max(steps, 2))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(dense), generator=generator).split(batch_rows):  # type: ignore[no-untyped-call]
            hidden = functional.relu(dense[rows] @ parameters["hidden"] + parameters["hidden_bias"])
            logits = hidden @ parameters["out"] + parameters["bias"]
            for key, of in codes.items():
                logits = logits + parameters[key][of[rows]].mean(1)
            loss = functional.binary_cross_entropy_with_logits(logits, labels[rows], weights[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        report()
    found = {name: value.detach().numpy() for name, value in parameters.items()}
    return SmallModel(domain, ranker_name, {"mean": mean.numpy(), "scale": scale.numpy(), **found})


def _inputs(
    inputs: SmallInputs, dataset: Dataset, requests: npt.NDArray[np.int64]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Inputs [N, F], codes by weight [N, width], labels and weights [N, H] of some requests."""
    dense: list[npt.NDArray[np.float32]] = []
    codes: dict[str, list[npt.NDArray[np.int64]]] = {column.key: [] for column in inputs.codes}
    for i in requests.tolist():
        tensors = dataset.request(i)
        dense.append(inputs.dense(tensors))
        for column in inputs.codes:
            codes[column.key].append(column.of(tensors, len(dense[-1])))
    rows = dataset.candidate_rows(requests)
    joined = {key: torch.from_numpy(np.concatenate(parts)) for key, parts in codes.items()}
    labels, weights = torch.from_numpy(dataset.labels[rows].astype(np.float32)), torch.from_numpy(dataset.weights[rows])
    return torch.from_numpy(np.concatenate(dense)), joined, labels, weights

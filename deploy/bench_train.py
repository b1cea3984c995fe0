"""Benchmark `train`: training on a CPU, two threads, against what anybody would write first.

The model in the paper's size (100 actions, two layers, one head, full-rank crossing) on the impression lists of a simulated log. The plain
side: a PyTorch `Dataset` of candidates, each with its padded sequence, a shuffling `DataLoader`, the same ranker around
`nn.TransformerEncoder`, `torch.optim.Adam`. Ours: the step of `freshrank train` from the packed arrays. Both start from the same weights;
steps of BATCH_ROWS candidates take turns, so that what else the machine does meets both.

`full`: the same with every sequence as long as the model takes, where nothing is won by leaving padding out.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from deploy.bench_model import LIBRARY_NAMES
from deploy.learn import Workspace, import_data
from deploy.paper_size import SIMULATOR, paper_size
from deploy.simulator import Simulator
from features.domain import Domain
from inference.dataset import Dataset, build_dataset, split_times
from inference.embeddings import publish_embeddings
from inference.history import starts_of
from inference.train import TrainOptions
from inference.train_step import Stepper
from inference.transact import SequenceEncoder, TransActRanker

THREADS = 2
USERS, REQUESTS = 500, 20_000
BATCH_ROWS = 1024
STEPS = 4
"""Steps of each side in a run."""
TOLERANCE = 1e-4


class PlainRanker(TransActRanker):
    """The ranker with the sequence encoder that anybody would write: `nn.TransformerEncoder` over [N, L, E], the candidate beside each
    action, the sequence repeated for each candidate, with a padding mask.

    Deviates: padded rows take no part in the max pool and are zero in the first K, as in `SequenceEncoder`, so that both are one function.
    """

    def __init__(self, domain: Domain, ranker_name: str) -> None:
        super().__init__(domain, ranker_name)
        self.plain = PlainTransformer(self.sequence)

    def forward(
        self,
        tensors: Any,
        request_row: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        window_ms: Tensor | None = None,
    ) -> Tensor:
        """Logits, float32 [N, H]: every candidate is a request of its own."""
        assert request_row is not None
        if window_ms is None:
            window_ms = self.sequence.draw_window_ms(len(request_row), generator)
        candidate = self.candidate_vectors(tensors)
        return self.behind_sequence(tensors, candidate, request_row, self.plain(self.sequence, tensors, candidate, window_ms), window_ms)


class PlainTransformer(nn.Module):
    """The transformer of a `SequenceEncoder`, from PyTorch's own layers."""

    def __init__(self, encoder: SequenceEncoder) -> None:
        super().__init__()
        layers: list[Any] = list(encoder.layers)
        E, heads, F = layers[0].out.in_features, layers[0].heads, layers[0].wide.out_features
        layer = nn.TransformerEncoderLayer(E, heads, F, layers[0].dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, len(layers), enable_nested_tensor=False)
        for mine, theirs in zip(self.transformer.layers, layers, strict=True):
            mine.load_state_dict(dict(zip(LIBRARY_NAMES, theirs.state_dict().values(), strict=True)))

    def forward(self, encoder: SequenceEncoder, tensors: Any, candidate: Tensor, window_ms: Tensor | None) -> Tensor:
        """Compressed sequence of each candidate, float32 [N, (K + 1) E]."""
        L, K = tensors["sequence_action"].shape[1], encoder.first_k
        valid = torch.arange(L) < tensors["sequence_count"].reshape(-1, 1)  # [N, L]
        if window_ms is not None:
            valid = valid & (tensors["sequence_age_ms"] >= window_ms)
        x = torch.cat([encoder.tokens(tensors, valid), candidate[:, None].expand(-1, L, -1)], -1)  # [N, L, E]
        # A row without any action would be a softmax of nothing: it attends to its padding, and is dropped below.
        x = self.transformer(x, src_key_padding_mask=~(valid | ~valid.any(1, keepdim=True)))
        x = x.masked_fill(~valid[..., None], -1e9)
        first = x[:, :K].masked_fill(~valid[:, :K, None], 0.0).flatten(1)
        return torch.cat([first, x.amax(1).masked_fill(~valid.any(1, keepdim=True), 0.0)], 1)


class PlainDataset(TorchDataset[dict[str, Any]]):
    """One candidate an item, from arrays in memory: its request's tensors with the sequence padded to the model's length, and its own."""

    def __init__(self, dataset: Dataset, requests: np.ndarray, length: int) -> None:
        self.rows = dataset.candidate_rows(requests)
        self.request = np.repeat(requests, np.diff(dataset.starts)[requests])
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        of, row, request = self.dataset, self.rows[index], self.request[index]
        low, high = of.sequence_starts[request], of.sequence_starts[request + 1]
        item = {name: values[request] for name, values in of.of_request.items()}
        item |= {name: values[row] for name, values in of.of_candidate.items()}
        for name, values in of.of_sequence.items():
            item[name] = np.zeros((self.length, *values.shape[1:]), values.dtype)
            item[name][: high - low] = values[low:high]
        item["labels"], item["weights"] = of.labels[row].astype(np.float32), of.weights[row]
        return {name: np.array(value) for name, value in item.items()}


@dataclass
class World:
    """A simulated log, packed, and the requests to train on."""

    domain: Domain
    dataset: Dataset
    train: np.ndarray


def bench_train(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Both sides in turn on the log as it is, then with full sequences.

    Raises:
        RuntimeError: the two models do not agree.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        made = make_world(folder, console)
        full = replace(made, dataset=with_full_sequences(made.dataset, made.domain.ranker["home"].sequence_length))
        apart = difference(made)
        if not apart <= TOLERANCE:
            raise RuntimeError(f"the two models do not agree: {apart:.2g} apart, allowed {TOLERANCE}")
        console.print(f"  the same logits from both models: {apart:.1g} apart")
        return [run(made, console, "", number) | run(full, console, "full_", number) for number in range(runs)]
    finally:
        torch.set_num_threads(before)


def make_world(folder: Path, console: Console, *, users: int = USERS, requests: int = REQUESTS) -> World:
    """Simulates, imports and packs."""
    path = folder / "paper-size.toml"
    path.write_text(paper_size(SIMULATOR.read_text("utf-8")), "utf-8")
    Simulator(1, users=users, held_back=users // 10).write(folder / "published", requests=requests)
    work = Workspace(path, folder / "home")
    import_data(work, folder / "published")
    domain, fractions = work.domain, TrainOptions().fractions
    validation_ms, _ = split_times(domain, "home", work.log, fractions)
    publish_embeddings(domain, "home", work.log, work.tables, until_ms=validation_ms, snapshots=1)
    begin_s = time.perf_counter()
    dataset, _ = build_dataset(domain, "home", work.log, work.tables)
    seconds = time.perf_counter() - begin_s
    train = dataset.part(0, validation_ms)
    lengths = np.diff(dataset.sequence_starts)[train]
    console.print(
        f"  {len(dataset):,} requests packed in {seconds:.1f} s; {len(train):,} to train on, "
        f"{dataset.starts[-1] / len(dataset):.0f} candidates each, {lengths.mean():.0f} actions on average ({lengths.max()} at most)"
    )
    return World(domain, dataset, train)


def with_full_sequences(dataset: Dataset, length: int) -> Dataset:
    """The same requests, each with `length` actions: those of other requests behind its own."""
    R, have = len(dataset), int(dataset.sequence_starts[-1])
    places = (dataset.sequence_starts[:-1, None] + np.arange(length)) % have  # [R, length]
    of_sequence = {name: values.take(places.reshape(-1), axis=0) for name, values in dataset.of_sequence.items()}
    counts = {"sequence_count": np.full((R, 1), length, np.int32)}
    return replace(dataset, of_sequence=of_sequence, of_request=dataset.of_request | counts, sequence_starts=starts_of(np.full(R, length)))


def models(made: World) -> tuple[TransActRanker, PlainRanker]:
    """Ours and the plain one with the same weights."""
    torch.manual_seed(0)
    ours = TransActRanker(made.domain, "home")
    plain = PlainRanker(made.domain, "home")
    plain.load_state_dict(ours.state_dict(), strict=False)
    plain.plain = PlainTransformer(plain.sequence)
    return ours, plain


def difference(made: World) -> float:
    """How far the logits of both models are apart on the longest requests, without dropout."""
    ours, plain = models(made)
    for module in (*ours.modules(), *plain.modules()):
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    chosen = made.dataset.by_length(made.train)[-4:]
    batch = made.dataset.batch(chosen)
    items = PlainDataset(made.dataset, chosen, made.domain.ranker["home"].sequence_length)
    rows = next(iter(DataLoader(items, batch_size=len(items))))
    none = torch.zeros(len(chosen), 1, dtype=torch.float64)
    with torch.no_grad():
        first = ours(batch.tensors, batch.request_row, window_ms=none)
        second = plain(rows, torch.arange(len(items)), window_ms=torch.zeros(len(items), 1, dtype=torch.float64))
    return float((first - second).abs().max())


def run(made: World, console: Console, prefix: str, number: int) -> dict[str, float]:
    """One run: STEPS steps of each side in turn, behind one that warms up."""
    ours, plain = models(made)
    stepper = Stepper(ours.train(), seed=number, piece_tokens=TrainOptions().piece_tokens)
    order = np.random.default_rng(number)
    batches = chain.from_iterable(made.dataset.batches(made.train, BATCH_ROWS, order) for _ in repeat(None))
    plain_steps = train_plain(made, plain.train(), number)
    rows = {"ours": 0, "plain": 0}
    seconds = dict.fromkeys(rows, 0.0)
    wait_s = 0.0
    for step in range(STEPS + 1):
        chosen = next(batches)
        begin_s = time.perf_counter()
        done = stepper.step(made.dataset, chosen, step, 1e-3)
        middle_s = time.perf_counter()
        plain_rows = next(plain_steps)
        if step:
            rows["ours"], rows["plain"] = rows["ours"] + done.rows, rows["plain"] + plain_rows
            seconds["ours"] += middle_s - begin_s
            seconds["plain"] += time.perf_counter() - middle_s
            wait_s += done.wait_s
    rate = {name: rows[name] / seconds[name] for name in rows}
    figures = {
        f"{prefix}samples_per_s_ratio": rate["ours"] / rate["plain"],
        f"{prefix}samples_per_s": rate["ours"],
        f"{prefix}plain_samples_per_s": rate["plain"],
        f"{prefix}data_wait_share": wait_s / seconds["ours"],
    }
    console.print(f"  run {number + 1}{', full sequences' if prefix else ''}: " + ", ".join(f"{n} {v:.3g}" for n, v in figures.items()))
    return figures


def train_plain(made: World, model: PlainRanker, seed: int) -> Iterator[int]:
    """Trains a step at each `next`; yields its candidates."""
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    window = torch.Generator().manual_seed(seed)
    items = PlainDataset(made.dataset, made.train, made.domain.ranker["home"].sequence_length)
    loader = DataLoader(items, batch_size=BATCH_ROWS, shuffle=True, generator=torch.Generator().manual_seed(seed))
    for batch in chain.from_iterable(repeat(loader)):
        labels, weights = batch.pop("labels"), batch.pop("weights")
        logits = model(batch, torch.arange(len(labels)), generator=window)
        loss = functional.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum") / len(labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        yield len(labels)

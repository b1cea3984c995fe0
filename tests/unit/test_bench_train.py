"""What `freshrank bench train` compares is one function of the same weights, trained by both sides."""

import numpy as np
import torch
from rich.console import Console

from deploy.bench_train import PlainDataset, difference, make_world, models, train_plain, with_full_sequences


def test_both_sides_compute_the_same(tmp_path):
    made = make_world(tmp_path, Console(quiet=True), users=20, requests=150)
    assert difference(made) < 1e-4
    length = made.domain.ranker["home"].sequence_length
    items = PlainDataset(made.dataset, made.train, length)
    assert len(items) == made.dataset.starts[len(made.train)]
    assert items[len(items) - 1]["sequence_action"].shape == (length,)
    full = with_full_sequences(made.dataset, length)
    assert (np.diff(full.sequence_starts) == length).all()
    torch.manual_seed(1)
    _, plain = models(made)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    assert next(train_plain(made, plain.train(), 0)) == 1024
    assert any(not torch.equal(value, before[name]) for name, value in plain.plain.state_dict(prefix="plain.").items())

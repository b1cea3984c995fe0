"""The sequence encoder of training against the plain one, which is its definition: outputs and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transact_fast import make_domain, make_model
from torch import Tensor

from inference.transact import SequenceEncoder, TransActRanker
from inference.transact_train import TrainEncoder

L = 12


def request(counts: list[int], candidates: list[int], seed: int, kinds: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    R = len(counts)
    tensors = {
        "sequence_count": torch.tensor(counts, dtype=torch.int32)[:, None],
        "sequence_action": torch.randint(0, 256, (R, L), generator=generator),
        "sequence_age_ms": torch.arange(L).repeat(R, 1) * 10,
        "sequence_embedding": torch.randn(R, L, 6, generator=generator),
    }
    if kinds == 2:
        tensors["sequence_kind"] = torch.randint(0, 3, (R, L), generator=generator)
    row = torch.arange(R).repeat_interleave(torch.tensor(candidates))
    return tensors, torch.randn(len(row), 6, generator=generator).double(), row


def encoders(model: TransActRanker) -> tuple[SequenceEncoder, TrainEncoder]:
    sequence = model.double().train().sequence
    for layer in sequence.layers:
        layer.dropout = 0.0
    return sequence, TrainEncoder(sequence)


def outcome(encode, model: TransActRanker, tensors: dict[str, Tensor], candidate: Tensor, row: Tensor, window: Tensor | None):
    model.zero_grad()
    given_candidate = candidate.clone().requires_grad_()
    out = encode(tensors, given_candidate, row, window)
    (out * torch.linspace(0.5, 2.0, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.sequence.named_parameters()} | {"candidate": given_candidate.grad}


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, L), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    layers=st.integers(1, 3),
    kinds=st.integers(1, 2),
    first_k=st.sampled_from([1, 5, 12]),
    window_ms=st.none() | st.integers(0, 130),
    data=st.data(),
)
def test_outputs_and_gradients_are_those_of_the_plain_encoder(counts, seed, layers, kinds, first_k, window_ms, data) -> None:
    candidates = data.draw(st.lists(st.integers(1, 3), min_size=len(counts), max_size=len(counts)))
    model = make_model(make_domain(layers=layers, kinds=kinds, first_k=first_k), seed)
    plain, fast = encoders(model)
    given_ = request(counts, candidates, seed, kinds)
    window = None if window_ms is None else torch.full((len(counts), 1), float(window_ms), dtype=torch.float64)
    (expected, gradients), (found, of_found) = (outcome(encode, model, *given_, window) for encode in (plain, fast))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(of_found[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_dropout_leaves_the_mean_where_it_is() -> None:
    model = make_model(make_domain(layers=1))
    sequence, fast = encoders(model)
    tensors, candidate, row = request([12], [400], 1, 1)
    candidate = candidate[:1].expand(400, -1)

    def mean(encode) -> Tensor:
        torch.manual_seed(0)
        return torch.stack([encode(tensors, candidate, row, None).mean(0) for _ in range(30)]).mean(0).detach()

    for layer in sequence.layers:
        layer.dropout = 0.3
    torch.testing.assert_close(mean(fast), mean(sequence), rtol=0, atol=0.06)


def test_several_heads_take_the_plain_encoder() -> None:
    model = make_model(make_domain(heads=2)).train()
    assert not model.train_sequence.applies
    assert make_model(make_domain()).train_sequence.applies


@pytest.mark.parametrize("heads", [1, 2])
def test_training_uses_the_windows_that_it_is_given(heads: int) -> None:
    model = make_model(make_domain(heads=heads)).train()
    for layer in model.sequence.layers:
        layer.dropout = 0.0
    tensors, candidate, row = request([12, 9], [2, 1], 0, 1)
    tensors |= {"candidate_embedding": candidate.float()}
    window = torch.tensor([[35.0], [0.0]], dtype=torch.float64)
    masked = model(tensors, row, window_ms=window)
    cut = {name: value.clone() for name, value in tensors.items()}
    cut["sequence_action"][0, :4], cut["sequence_embedding"][0, :4] = 3, 9.0
    torch.testing.assert_close(model(cut, row, window_ms=window), masked)
    assert not torch.allclose(model(cut, row, window_ms=torch.zeros(2, 1, dtype=torch.float64)), masked)

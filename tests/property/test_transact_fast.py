"""The fast sequence encoder against the plain one, which is its definition."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from features.domain import Domain, parse_domain
from features.tensors import DYNAMIC, tensor_table
from inference import transact_fast
from inference.transact import TransActRanker

L = 12
TEXT = """
name = "test"
[entities]
video = 1
%(second_kind)s
[surfaces]
home = 1
related = 2
[actions]
click = { id = 1, kind = "positive" }
hide = { id = 255, kind = "negative" }
[sequence.main]
id = 1
length = 12
[ranker.home]
sequence = "main"
sequence_length = 12
sequence_attributes = %(attributes)s
item_space = "items"
embedding_dimension = 6
refresh = {}
heads.click = { actions = ["click"] }
[ranker.home.model]
action_dimension = 4
feedforward = 8
hidden = [8]
cross_layers = 1
dropout = 0.3
first_k = %(first_k)d
layers = %(layers)d
attention_heads = %(heads)d
similarities = %(similarities)s
"""


def make_domain(
    *, layers: int = 2, heads: int = 1, first_k: int = 5, attributes: tuple[str, ...] = (), kinds: int = 1, similarities: bool = False
) -> Domain:
    given = {"second_kind": "product = 2" if kinds == 2 else "", "attributes": list(attributes), "similarities": str(similarities).lower()}
    return parse_domain(TEXT % (given | {"first_k": first_k, "layers": layers, "heads": heads}), source="test")


def make_model(domain: Domain, seed: int = 0) -> TransActRanker:
    """In eval mode, with biases and norms that training could have left."""
    torch.manual_seed(seed)
    model = TransActRanker(domain, "home").eval()
    with torch.no_grad():
        for parameter in model.sequence.layers.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def make_tensors(domain: Domain, lengths: list[int], candidates: list[int], seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Stacked requests, and the request of each candidate; what lies behind a sequence's end is not finite."""
    random = np.random.default_rng(seed)
    tensors = {}
    for row in tensor_table(domain, "home"):
        shape = [sum(candidates) if size == DYNAMIC else size for size in row.shape]
        shape = shape if row.per_candidate else [len(lengths), *shape]
        values = random.integers(0, 3, shape) if row.dtype.kind == "i" else random.normal(size=shape)
        tensors[row.name] = torch.from_numpy(values.astype(row.dtype))
    tensors["sequence_count"] = torch.tensor(lengths, dtype=tensors["sequence_count"].dtype).reshape(-1, 1)
    for request, length in enumerate(lengths):
        tensors["sequence_embedding"][request, length:] = float("nan")
    return tensors, torch.arange(len(lengths)).repeat_interleave(torch.tensor(candidates))


def encode(model: TransActRanker, tensors: dict[str, Tensor], row: Tensor) -> tuple[Tensor, Tensor]:
    """(fast, plain), in the dtype of the model's weights."""
    candidate = tensors["candidate_embedding"].to(model.heads.weight.dtype)
    with torch.no_grad():
        return model.fast_sequence(tensors, candidate, row), model.sequence(tensors, candidate, row, None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_plain_encoder(data: st.DataObject) -> None:
    domain = make_domain(
        layers=data.draw(st.integers(1, 3), label="layers"),
        heads=data.draw(st.sampled_from([1, 1, 2, 3, 4]), label="heads"),
        first_k=data.draw(st.integers(1, L), label="first_k"),
        attributes=data.draw(st.sampled_from([(), ("surface",), ("value",), ("surface", "value")]), label="attributes"),
        kinds=data.draw(st.integers(1, 2), label="kinds"),
    )
    requests = data.draw(st.lists(st.tuples(st.integers(0, L), st.integers(0, 5)), min_size=1, max_size=4), label="length, candidates")
    seed = data.draw(st.integers(0, 2**16), label="seed")
    tokens_at_once = data.draw(st.sampled_from([1, 24, 10_000]), label="tokens at once")
    model = make_model(domain, seed)
    tensors, row = make_tensors(domain, [length for length, _ in requests], [candidates for _, candidates in requests], seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transact_fast, "TOKENS_AT_ONCE", tokens_at_once)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            fast, plain = encode(model.to(dtype), tensors, row)
            assert fast.dtype == dtype
            torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_peaks_of_history_and_candidate_far_apart(heads: int, seed: int) -> None:
    domain = make_domain(heads=heads)
    model = make_model(domain, seed)
    with torch.no_grad():
        model.sequence.layers[0].qkv.weight[: 2 * model.sequence.layers[0].out.in_features] *= 12  # type: ignore[union-attr, index]
    tensors, row = make_tensors(domain, [L, 7], [5, 5], seed)
    assert least_denominator(model, tensors) < np.finfo(np.float32).tiny
    fast, plain = encode(model, tensors, row)
    exact_fast, exact = encode(copy.deepcopy(model).double(), tensors, row)
    torch.testing.assert_close(exact_fast, exact, rtol=1e-10, atol=1e-10)
    # Scores of hundreds have few digits behind the point, in the plain form too.
    assert (fast - exact).abs().max() <= 1e-5 + 4 * (plain - exact).abs().max()


def least_denominator(model: TransActRanker, tensors: dict[str, Tensor]) -> float:
    """Least exp(A - max) exp(B - max) over tokens and candidates of the first request, float64."""
    encoder = copy.deepcopy(model.sequence).double()
    layer = encoder.layers[0]
    with torch.no_grad():
        history = encoder.tokens(tensors, encoder.valid(tensors))[0]
        width = history.shape[1]
        of_history, of_candidate = layer.qkv.weight.tensor_split([width], 1)
        q, k, _ = (history @ of_history.T + layer.qkv.bias).view(len(history), 3, layer.heads, -1).permute(1, 2, 0, 3)
        c = (tensors["candidate_embedding"][:5].double() @ of_candidate.T).view(5, 3, layer.heads, -1)[:, 0].transpose(0, 1)
        A, B = (part @ k.transpose(1, 2) * q.shape[-1] ** -0.5 for part in (q, c))
        A, B = ((part - part.amax(-1, keepdim=True)).exp() for part in (A, B))
        return float((A @ B.transpose(1, 2)).min())


def test_ranking_takes_it_in_eval_mode_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = make_domain(attributes=("surface", "value"), kinds=2)
    model = make_model(domain)
    tensors, row = make_tensors(domain, [0, L, 3], [2, 240, 3])
    with torch.no_grad():
        expected = torch.sigmoid(model(tensors, row))
    monkeypatch.setattr(model.sequence, "forward", lambda *_: pytest.fail("the plain encoder was asked"))
    torch.testing.assert_close(model.probabilities(tensors, row), expected, rtol=0, atol=1e-5)
    monkeypatch.undo()
    few, few_row = make_tensors(domain, [L] * 4, [2] * 4)
    monkeypatch.setattr(transact_fast, "_encode", lambda *_: pytest.fail("the fast encoder was asked"))
    model.probabilities(few, few_row)
    model.train().probabilities(tensors, row)


def test_weights_that_change_are_folded_again() -> None:
    domain = make_domain()
    model = make_model(domain)
    tensors, row = make_tensors(domain, [9], [4])
    seen = []

    def check(changed: TransActRanker) -> None:
        fast, plain = encode(changed, tensors, row)
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
        seen.append(fast.float())

    check(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tensors, row).sum().backward()
    optimizer.step()
    check(model)
    model.load_state_dict(make_model(domain, seed=1).state_dict())
    check(model)
    model.load_state_dict(make_model(domain, seed=2).state_dict(), assign=True)
    check(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.sequence.layers[0].narrow.weight *= 2.0  # type: ignore[union-attr, operator]
    check(copied)
    check(model)
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(seen))


def test_unchanged_weights_are_folded_once_and_inference_tensors_do() -> None:
    domain = make_domain()
    tensors, row = make_tensors(domain, [9], [4])
    model = make_model(domain)
    with torch.inference_mode():
        fast, _ = encode(model, tensors, row)
        folded = model.fast_sequence._folded
        made_here = make_model(domain)
        again, _ = encode(made_here, tensors, row)
    encode(model, tensors, row)
    assert model.fast_sequence._folded is folded
    torch.testing.assert_close(fast, again, rtol=0, atol=1e-6)

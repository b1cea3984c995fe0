"""The GPU form of the model against the plain one, which is its definition.

The kernel's function and the layout of its buffer are tested everywhere: Triton's interpreter runs the kernel on the CPU, in float32. What
needs a GPU is left out where PyTorch finds none, and says so.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from deploy.bench_model_cuda import bench_model_cuda
from features.domain import Domain
from inference.rescore import TOLERANCE
from inference.transact import TransActRanker
from inference.transact_cuda import REQUEST_ROW, CudaRanker, FusedEncoder, Layout
from tests.property.test_transact_fast import L, make_domain, make_model, make_tensors

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch finds no CUDA device on this machine")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Domain, TransActRanker, dict[str, Tensor], Tensor]:
    """A model and a batch of requests."""
    domain = make_domain(
        layers=draw(st.integers(1, 3)),
        first_k=draw(st.integers(1, L)),
        attributes=draw(st.sampled_from([(), ("surface",), ("value",), ("surface", "value")])),
        kinds=draw(st.integers(1, 2)),
    )
    requests = draw(st.lists(st.tuples(st.integers(0, L), st.integers(1, 4)), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**16))
    tensors, row = make_tensors(domain, [length for length, _ in requests], [candidates for _, candidates in requests], seed)
    return domain, make_model(domain, seed), tensors, row


EXAMPLES = 25
COMPARED: list[float] = []
"""Greatest difference of each case."""


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases())
def kernel_equals_plain(case: tuple[Domain, TransActRanker, dict[str, Tensor], Tensor]) -> None:
    """What the test below runs where Triton, the language, was imported for its interpreter."""
    _, model, tensors, row = case
    candidate = model.candidate_vectors(tensors)
    assert FusedEncoder.applies(model.sequence)
    with torch.no_grad():
        fused = FusedEncoder(model.sequence, "cpu", torch.float32)(tensors, candidate, row)
        plain = model.sequence(tensors, candidate, row, None)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=2e-5)
    COMPARED.append(float((fused - plain).abs().max()))


def interpreted() -> int:
    """How many cases were compared. Hypothesis's function cannot be sent to a process, this one can."""
    COMPARED.clear()
    kernel_equals_plain()
    return len(COMPARED)


def test_the_kernel_equals_the_plain_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(interpreted).result() >= EXAMPLES


@pytest.mark.parametrize("what", [{"heads": 2}, {"layers": 2, "heads": 3}])
def test_forms_that_the_kernel_does_not_compute(what: dict[str, int]) -> None:
    assert not FusedEncoder.applies(make_model(make_domain(**what)).sequence)  # type: ignore[arg-type]


def test_a_feedforward_wider_than_the_token_is_not_the_kernels() -> None:
    encoder = make_model(make_domain()).sequence
    assert FusedEncoder.applies(encoder)
    encoder.layers[0].wide.out_features = 128  # type: ignore[union-attr]
    assert not FusedEncoder.applies(encoder)


@settings(max_examples=50, deadline=None)
@given(candidates=st.sampled_from([1, 5, 16]), requests=st.integers(1, 8), used=st.integers(1, 8), kinds=st.integers(1, 2))
def test_tensors_of_a_buffer_lie_apart(candidates: int, requests: int, used: int, kinds: int) -> None:
    domain = make_domain(attributes=("surface", "value"), kinds=kinds)
    layout, used = Layout(domain, "home", candidates, requests), min(used, requests)
    buffer = torch.zeros(layout.bytes(requests), dtype=torch.uint8)
    views = layout.views(buffer)
    want, row = make_tensors(domain, [3] * used, [candidates] + [0] * (used - 1))
    views[REQUEST_ROW].copy_(row)
    for name, value in want.items():
        views[name][: len(value)] = value
    # What is copied of it, somewhere else, is all of it.
    other = torch.zeros_like(buffer)
    other[: layout.bytes(used)] = buffer[: layout.bytes(used)]
    for name, value in want.items():
        found = layout.views(other)[name]
        assert found.dtype == value.dtype
        torch.testing.assert_close(found[: len(value)], value, rtol=0, atol=0, equal_nan=True)


def test_the_benchmark_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no CUDA device"):
        bench_model_cuda(1, tmp_path, Console())


@on_gpu
def test_which_forms_have_one_for_the_gpu() -> None:
    assert CudaRanker.serves(make_model(make_domain()))


@on_gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("attributes", "similarities"), [((), False), (("surface", "value"), False), ((), True)])
def test_a_gpu_gives_the_probabilities_of_the_definition(fused: bool, attributes: tuple[str, ...], similarities: bool) -> None:
    domain = make_domain(attributes=attributes, kinds=2, similarities=similarities)
    model = make_model(domain)
    ranker = CudaRanker(model, domain, "home", fused=fused, buckets=(4, 16), requests_max=3)
    assert ranker.fused == fused
    for seed, lengths, candidates in (
        (0, [L], [1]),
        (1, [0], [4]),
        (2, [5, 0, L], [3, 1, 2]),
        (3, [1, 2, 3, 4, 5], [9, 1, 0, 7, 16]),
        (4, [7], [100]),
    ):
        tensors, row = make_tensors(domain, lengths, candidates, seed)
        found = ranker.probabilities(tensors, row)
        assert found.dtype == torch.float32
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, model.probabilities(tensors, row), rtol=0, atol=TOLERANCE["cuda"])


@on_gpu
@pytest.mark.parametrize("similarities", [False, True])
def test_requests_of_a_batch_are_ranked_as_one_by_one_on_a_gpu(similarities: bool) -> None:
    domain = make_domain(attributes=("surface",), similarities=similarities)
    ranker = CudaRanker(make_model(domain), domain, "home", buckets=(16,))
    tensors, row = make_tensors(domain, [4, L, 0], [5, 7, 2])
    together = ranker.probabilities(tensors, row)
    for request in range(3):
        mine = row == request
        alone = {name: value[mine] if ranker.per_candidate[name] else value[request : request + 1] for name, value in tensors.items()}
        assert torch.equal(together[mine], ranker.probabilities(alone, row[mine] - request))


@on_gpu
def test_nothing_of_an_earlier_request_shows_on_a_gpu() -> None:
    domain = make_domain()
    model = make_model(domain)
    ranker = CudaRanker(model, domain, "home", buckets=(8, 64))
    tensors, row = make_tensors(domain, [6], [3])
    before = ranker.probabilities(tensors, row)
    for candidates in ([4, 4], [40, 4], [1, 1]):
        other, other_row = make_tensors(domain, [L, L], candidates, 1)
        other["candidate_embedding"][:] = float("nan")
        assert ranker.probabilities(other, other_row).isnan().all()
        assert torch.equal(ranker.probabilities(tensors, row), before)

"""What `freshrank bench model` compares is one function, with padding too."""

import pytest
import torch

from deploy.bench_model import PlainEncoder
from deploy.paper_size import make_request, paper_domain
from inference.transact import TransActRanker


@pytest.mark.parametrize("length", [37, 100])
def test_the_library_encoder_gives_what_the_fast_one_gives(length: int) -> None:
    domain = paper_domain(attributes=False)
    model = TransActRanker(domain, "home", use_sequence=True).eval()
    plain = PlainEncoder(model.sequence).eval()
    tensors = make_request(domain, model, 3)
    tensors["sequence_count"][:] = length
    candidate = tensors["candidate_embedding"].float()
    with torch.no_grad():
        fast = model.fast_sequence(tensors, candidate, torch.zeros(3, dtype=torch.int64))
        assert fast.shape == (3, 11 * 96)
        torch.testing.assert_close(plain(tensors, candidate), fast, rtol=0, atol=1e-5)

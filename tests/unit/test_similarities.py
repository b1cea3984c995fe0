"""Cosines as inputs of the ranker: what they are, what hides an action from them, and what they leave as it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoders import domain_with
from test_transact import DOMAIN, join, make_model, make_request
from torch import Tensor

from features.domain import load_domain
from inference.ablations import CELLS, AblationError, configured
from inference.similarities import Similarities

ACTIONS = (1, 2, 255)


def cosine(a: Tensor, b: Tensor) -> float:
    """0 where one has no vector."""
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else 0.0


def expected(request: dict[str, Tensor], hidden: int) -> list[list[float]]:
    """The rows of `Similarities` for a request whose newest `hidden` actions are not seen, one pair of vectors after another."""
    rows = []
    actions = list(zip(request["sequence_action"].tolist(), request["sequence_embedding"].float(), strict=True))
    actions = [pair for pair in actions[hidden : int(request["sequence_count"][0])] if pair[1].any()]
    for candidate in request["candidate_embedding"].float():
        row = [cosine(request["user_embedding"].float(), candidate)]
        cosines = [(action, cosine(vector, candidate)) for action, vector in actions]
        row.append(cosines[0][1] if cosines else 0.0)
        for asked in (*ACTIONS, None):
            group = [found for action, found in cosines if asked in (action, None)]
            row += [float(np.mean(group)), max(group)] if group else [0.0, 0.0]
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    hidden=st.integers(0, 5),
    without=st.sets(st.integers(0, 19)),
    seed=st.integers(0, 1000),
)
def test_they_are_the_cosines_of_what_is_seen(counts: list[int], hidden: int, without: set[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    requests = []
    for count in counts:
        request = make_request(count, 3, seed=int(random.integers(1000)))
        request["sequence_action"] = torch.from_numpy(random.choice(ACTIONS, 20).astype(np.uint8))
        request["sequence_embedding"][sorted(without)] = 0.0  # items that no generation knows
        request["candidate_embedding"][2] = 0.0
        request["sequence_embedding"][count:] = float("nan")
        requests.append(request)
    similarities = Similarities(DOMAIN, "home", user=True, sequence=True)
    assert sum(similarities.widths) == 2 + 2 * (len(ACTIONS) + 1)
    tensors, row = join(requests, make_model())
    place = torch.arange(20)
    found = similarities(tensors, row, (place >= hidden) & (place < tensors["sequence_count"].reshape(-1, 1)))
    wanted = (
        torch.tensor([row for request in requests for row in expected(request, hidden)]) * DOMAIN.ranker["home"].embedding_dimension ** 0.5
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 3])  # one: `TrainEncoder`, which cuts the sequence; several: the plain one, which masks
def test_an_action_within_the_window_is_hidden_from_them_too(heads: int) -> None:
    model = make_model(domain_with(f"similarities = true, attention_heads = {heads}")).train()
    request = make_request(12, 2)
    request["sequence_embedding"][4:12] = 0.0  # what is left has no vector
    tensors, row = join([request], model)
    window_ms = (request["sequence_age_ms"][4].double() - 1).reshape(1, 1)
    with torch.no_grad():
        for part in model.sequence.parameters():
            part.zero_()  # only the similarities may tell
        seen, unseen = model(tensors, row), model(tensors, row, window_ms=window_ms)
        changed = {**tensors, "sequence_embedding": tensors["sequence_embedding"].clone()}
        changed["sequence_embedding"][:, :4] += 1.0
        assert not torch.allclose(model(changed, row), seen)
        torch.testing.assert_close(model(changed, row, window_ms=window_ms), unseen)


def test_the_model_has_only_those_that_it_may_have() -> None:
    widths = {
        "similarities = true": (1, 1, 2, 2, 2, 2),
        "similarities = true, action_types = false": (1, 1, 2),
        "similarities = true, user_embedding = false": (1, 2, 2, 2, 2),
        'similarities = true, encoder = "none"': (1,),
        'similarities = true, encoder = "none", user_embedding = false': (),
    }
    for form, expected_widths in widths.items():
        model = make_model(domain_with(form)).eval()
        assert model.similarities is not None
        assert model.similarities.widths == expected_widths, form
        assert model(make_request(5, 3)).shape == (3, 2)
    assert make_model(domain_with("similarities = true"), use_sequence=False).similarities.widths == (1,)  # type: ignore[union-attr]


def test_without_them_a_model_has_the_weights_that_it_had() -> None:
    plain, asked = make_model().state_dict(), make_model(domain_with("similarities = true")).state_dict()
    assert plain.keys() == asked.keys()
    assert asked["crosses.0.weight.weight"].shape[0] - plain["crosses.0.weight.weight"].shape[0] == 10
    assert make_model().similarities is None


def test_they_are_of_refreshed_vectors_only() -> None:
    with pytest.raises(AblationError, match="similarities needs refresh"):
        configured(load_domain("domains/simulator.toml"), "home", CELLS["similarities"])
    assert configured(load_domain("domains/globo.toml"), "news", CELLS["similarities"]).ranker["news"].model.similarities

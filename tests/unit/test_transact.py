"""The model by itself: padding, masks, sequence lengths, features."""

import numpy as np
import pytest
import torch
from torch import Tensor

from features.domain import Domain, parse_domain
from features.tensors import tensor_table
from inference.transact import HOUR_MS, TransActRanker

TEXT = """
name = "test"
[entities]
video = 1
product = 2
[surfaces]
home = 1
related = 2
[actions]
shown = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
hide = { id = 255, kind = "negative" }
[sequence.main]
id = 1
length = 20
[features]
age = { side = "user", kind = "number", normalise = "standard", missing = -2.0 }
hour = { side = "request", kind = "category", vocabulary = ["day", "night"] }
views = { side = "item", kind = "number", normalise = "log" }
tags = { side = "item", kind = "list", hash_buckets = 8 }
price = { side = "candidate", kind = "number", normalise = "none" }
[ranker.home]
sequence = "main"
sequence_length = 20
sequence_attributes = ["surface", "value"]
item_space = "items"
user_space = "items"
embedding_dimension = 6
features = ["age", "hour", "views", "tags", "price"]
model = { action_dimension = 4, feedforward = 8, first_k = 5, hidden = [16, 8], cross_rank = 0, dropout = 0.0 }
heads.click = { actions = ["click"] }
heads.hide = { actions = ["hide"] }
"""
DOMAIN = parse_domain(TEXT, source="test")
EVERY_LENGTH = (0, 1, 4, 5, 6, 19, 20)


def make_model(domain: Domain = DOMAIN, *, seed: int = 0, use_sequence: bool = True) -> TransActRanker:
    torch.manual_seed(seed)
    return TransActRanker(domain, "home", use_sequence=use_sequence)


def make_request(count: int, candidates: int, seed: int = 0) -> dict[str, Tensor]:
    """One request's tensors as the table shapes them; what lies behind `count` is random too."""
    random = np.random.default_rng(seed)
    tensors = {}
    for row in tensor_table(DOMAIN, "home"):
        shape = [candidates if size == -1 else size for size in row.shape]
        values = random.integers(0, 3, shape) if row.dtype.kind == "i" else random.normal(size=shape)
        tensors[row.name] = torch.from_numpy(values.astype(row.dtype))
    tensors["sequence_count"][0] = count
    tensors["sequence_age_ms"] = torch.sort(torch.randint(0, 48 * HOUR_MS, (20,), generator=torch.Generator().manual_seed(seed))).values
    return tensors


def join(requests: list[dict[str, Tensor]], model: TransActRanker) -> tuple[dict[str, Tensor], Tensor]:
    """The training layout of several requests."""
    tensors = {
        name: (torch.cat if model.per_candidate[name] else torch.stack)([request[name] for request in requests]) for name in requests[0]
    }
    counts = torch.tensor([len(request["candidate_embedding"]) for request in requests])
    return tensors, torch.arange(len(requests)).repeat_interleave(counts)


def test_train_eval_and_no_grad_agree_with_padding_present() -> None:
    model = make_model()
    tensors, row = join([make_request(count, 3, seed=count) for count in EVERY_LENGTH], model)
    trained = model.train()(tensors, row)
    evaluated = model.eval()(tensors, row)
    with torch.no_grad():
        without = model(tensors, row)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-6)
    torch.testing.assert_close(evaluated, without, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.probabilities(tensors, row), torch.sigmoid(without), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", EVERY_LENGTH)
def test_one_request_equals_the_same_request_in_a_batch_of_longer_ones(count: int) -> None:
    model = make_model().eval()
    request = make_request(count, 4, seed=7)
    tensors, row = join([make_request(20, 2, seed=1), request, make_request(3, 5, seed=2)], model)
    alone, together = model(request), model(tensors, row)
    assert alone.shape == (4, 2)
    torch.testing.assert_close(together[2:6], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", EVERY_LENGTH)
def test_padding_contents_do_not_matter(count: int) -> None:
    model = make_model().eval()
    request = make_request(count, 3)
    expected = model(request)
    for name in ("sequence_embedding", "sequence_value"):
        request[name][count:] = float("nan")
    for name in ("sequence_action", "sequence_kind", "sequence_surface", "sequence_age_ms"):
        request[name][count:] = 255
    longest = make_request(20, 1, seed=3)
    tensors, row = join([request, longest], model)
    torch.testing.assert_close(model(request), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(tensors, row)[:3], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, 4, 11])
def test_every_action_of_the_sequence_counts(place: int) -> None:
    model = make_model().eval()
    request = make_request(12, 3)
    before = model(request)
    request["sequence_embedding"][place] += 3.0
    assert not torch.allclose(model(request), before, atol=1e-4)


def test_an_action_id_above_the_known_ones_is_no_padding() -> None:
    model = make_model().eval()
    request = make_request(5, 2)
    outputs = []
    for action in (1, 255, 200):
        request["sequence_action"][0] = action
        outputs.append(model(request))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-4)


def test_a_candidate_scores_the_same_alone() -> None:
    model = make_model().eval()
    request = make_request(8, 200)
    together = model.probabilities(request)
    for candidate in (0, 127, 128, 199):
        alone = {name: value[candidate : candidate + 1] if model.per_candidate[name] else value for name, value in request.items()}
        torch.testing.assert_close(model.probabilities(alone)[0], together[candidate], rtol=1e-5, atol=1e-6)
    nobody = {name: value[:0] if model.per_candidate[name] else value for name, value in request.items()}
    assert model.probabilities(nobody).shape == (0, 2)


@pytest.mark.parametrize("heads", [1, 2])
def test_encoder_equals_the_library_layer(heads: int) -> None:
    domain = parse_domain(TEXT.replace("cross_rank = 0", f"attention_heads = {heads}"), source="test")
    model = make_model(domain).eval()
    encoder = model.sequence
    tensors, row = join([make_request(count, 2, seed=count) for count in (3, 9, 20)], model)
    candidate = tensors["candidate_embedding"].float()  # any vectors: both sides get the same
    E = encoder.width // 6
    x = torch.zeros(6, 20, E)
    value = tensors["sequence_value"]
    x[:, :, encoder.pad :] = torch.cat(
        [
            encoder.action(tensors["sequence_action"])[row],
            tensors["sequence_embedding"].float()[row] * 6**0.5,
            encoder.kind(tensors["sequence_kind"])[row],
            encoder.surface(torch.where(tensors["sequence_surface"] > 2, 0, tensors["sequence_surface"]))[row],
            torch.stack([torch.log1p(value.clamp(min=0)), torch.zeros_like(value)], -1)[row],
            candidate[:, None].expand(-1, 20, -1),
        ],
        -1,
    )
    padding = torch.arange(20) >= tensors["sequence_count"][row]
    for own in encoder.layers:
        library = torch.nn.TransformerEncoderLayer(E, heads, 8, dropout=0.0, batch_first=True)
        names = ["self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias"]
        names += [f"{part}.{kind}" for part in ("norm1", "linear1", "linear2", "norm2") for kind in ("weight", "bias")]
        library.load_state_dict(dict(zip(names, own.state_dict().values(), strict=True)))
        x = library(x, src_key_padding_mask=padding)
    output = encoder(tensors, candidate, row, None)
    first = x[:, :5].masked_fill(padding[:, :5, None], 0.0).flatten(1)
    pooled = x.masked_fill(padding[:, :, None], -1e9).amax(1)
    torch.testing.assert_close(output, torch.cat([first, pooled], 1), rtol=1e-5, atol=1e-5)


def test_time_window_masks_young_actions_one_window_a_request() -> None:
    model = make_model().train()
    encoder = model.sequence
    request = make_request(12, 1)
    tensors, row = join([request, request], model)
    candidate = tensors["candidate_embedding"].float()
    window_ms = torch.tensor([[0.0], [float(request["sequence_age_ms"][0]) + 0.5]])
    output = encoder(tensors, candidate, row, window_ms)
    E = output.shape[1] // 6
    assert output[0, :E].abs().sum() > 0
    assert output[1, :E].abs().sum() == 0  # the newest action itself is masked
    older = encoder(tensors, candidate, row, torch.full((2, 1), 48.0 * HOUR_MS))
    assert (older == 0).all()

    drawn = encoder.draw_window_ms(1000, torch.Generator().manual_seed(5))
    assert drawn is not None
    assert drawn.unique().numel() == 1000
    assert 0 <= drawn.min() < HOUR_MS
    assert 23 * HOUR_MS < drawn.max() <= 24 * HOUR_MS
    assert torch.equal(drawn, encoder.draw_window_ms(1000, torch.Generator().manual_seed(5)))  # type: ignore[arg-type]


def test_time_window_is_drawn_in_training_only() -> None:
    model = make_model()
    request = make_request(12, 3)
    request["sequence_age_ms"] = torch.zeros(20, dtype=torch.int64)  # every window hides all of it
    open_ = model.eval()(request)
    torch.testing.assert_close(model.eval()(request, generator=torch.Generator()), open_, rtol=0, atol=0)
    assert not torch.allclose(model.train()(request, generator=torch.Generator()), open_, atol=1e-4)


def test_fully_masked_rows_have_finite_outputs_and_gradients() -> None:
    model = make_model().train()
    tensors, row = join([make_request(0, 2), make_request(6, 2, seed=1)], model)
    tensors["sequence_age_ms"] = torch.zeros_like(tensors["sequence_age_ms"])
    output = model(tensors, row, generator=torch.Generator().manual_seed(0))
    assert output.isfinite().all()
    output.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


def test_normalisation_is_fitted_and_missing_is_not_average() -> None:
    model = make_model().eval()
    ages = torch.tensor([[10.0], [20.0], [30.0], [float("nan")]])
    views = torch.tensor([[0.0], [np.e - 1], [float("inf")]])
    model.fit_normalisation({"user_number": ages, "item_number": views, "candidate_number": torch.tensor([[5.0], [7.0]])})
    user, candidate, item = model.features["user"], model.features["candidate"], model.features["item"]
    scaled = user({"user_number": torch.tensor([[20.0], [30.0], [float("nan")], [1e30]])})[:, 0]
    torch.testing.assert_close(scaled, torch.tensor([0.0, 1.5**0.5, -2.0, 10.0]))
    torch.testing.assert_close(candidate({"candidate_number": torch.tensor([[5.0], [1e9]])})[:, 0], torch.tensor([5.0, 1000.0]))
    codes = torch.zeros(2, 4, dtype=torch.int32)
    of_views = item({"item_number": torch.tensor([[np.e - 1], [0.0]], dtype=torch.float32), "item_list_tags": codes})[:, 0]
    torch.testing.assert_close(of_views, torch.tensor([1.0, -1.0]))


def test_a_list_is_the_mean_of_its_rows_and_an_empty_one_is_learned() -> None:
    item = make_model().features["item"]
    table = item.lists["tags"].weight  # type: ignore[index, union-attr]
    codes = torch.tensor([[3, 0, 5, 0], [0, 0, 0, 0]], dtype=torch.int32)
    output = item({"item_number": torch.zeros(2, 1), "item_list_tags": codes})[:, 1:]
    torch.testing.assert_close(output[0], (table[3] + table[5]) / 2)
    torch.testing.assert_close(output[1], table[0])


def test_every_tensor_of_the_table_is_used() -> None:
    model = make_model().eval()
    request = make_request(20, 3)
    before = model(request)
    for row in tensor_table(DOMAIN, "home"):
        if row.name == "sequence_age_ms":
            continue  # the mask's, in training only
        changed = dict(request)
        changed[row.name] = request[row.name] // 2 if row.name == "sequence_count" else (request[row.name] + 1) % 3
        assert not torch.allclose(model(changed), before, atol=1e-5), row.name


def test_without_the_sequence_it_is_ignored() -> None:
    model = make_model(use_sequence=False).eval()
    torch.testing.assert_close(
        model(make_request(9, 3, seed=4)), model({**make_request(9, 3, seed=4), "sequence_count": torch.tensor([0])})
    )


def test_low_rank_crossing_and_several_attention_heads() -> None:
    domain = parse_domain(TEXT.replace("cross_rank = 0", "cross_rank = 4, attention_heads = 4"), source="test")
    model = make_model(domain).eval()
    assert model(make_request(5, 3)).shape == (3, 2)
    assert sum(p.numel() for p in model.crosses.parameters()) < sum(p.numel() for p in make_model().crosses.parameters())

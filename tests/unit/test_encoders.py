"""Every form that a domain file may ask for keeps the rules of the model: padding, masks, lengths; and computes what it says."""

import pytest
import torch
from test_transact import EVERY_LENGTH, TEXT, join, make_model, make_request
from torch import Tensor, nn

from features.domain import Domain, DomainError, ModelSettings, load_domain, parse_domain
from features.tensors import tensor_fingerprint, tensor_table
from inference.encoders import Average, Convolution, Recurrent, compress
from inference.transact import TransActRanker

FORMS = (
    "similarities = true",
    'similarities = true, encoder = "average", action_types = false',
    'similarities = true, interaction = "transformer", token_dimension = 8',
    'encoder = "average"',
    'encoder = "bst"',
    'encoder = "cnn"',
    'encoder = "rnn"',
    'encoder = "lstm"',
    'encoder = "lstm", fusion = "token", layers = 1',
    'encoder = "cnn", fusion = "token", output = "first"',
    'fusion = "token"',
    'fusion = "token", attention_heads = 3',
    'output = "first"',
    'output = "pool"',
    "action_types = false",
    'encoder = "bst", action_types = false, attention_heads = 4',
    'interaction = "transformer", token_dimension = 8, attention_heads = 2',
    'interaction = "transformer", token_dimension = 8, encoder = "average"',
)


def domain_with(form: str) -> Domain:
    refresh = "\nrefresh = {}" if "similarities" in form else ""
    return parse_domain(
        TEXT.replace("cross_rank = 0", f"cross_rank = 0, {form}").replace("dimension = 6", f"dimension = 6{refresh}"), source="test"
    )


@pytest.mark.parametrize("form", FORMS)
def test_train_eval_and_no_grad_agree_with_padding_present(form: str) -> None:
    model = make_model(domain_with(form))
    tensors, row = join([make_request(count, 3, seed=count) for count in EVERY_LENGTH], model)
    trained = model.train()(tensors, row)
    evaluated = model.eval()(tensors, row)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.probabilities(tensors, row), torch.sigmoid(evaluated), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 1, 5, 19])
def test_neither_longer_neighbours_nor_padding_contents_matter(form: str, count: int) -> None:
    model = make_model(domain_with(form)).eval()
    request = make_request(count, 4, seed=7)
    alone = model(request)
    assert alone.shape == (4, 2)
    for name in ("sequence_embedding", "sequence_value"):
        request[name][count:] = float("nan")
    for name in ("sequence_action", "sequence_kind", "sequence_surface", "sequence_age_ms"):
        request[name][count:] = 255
    tensors, row = join([make_request(20, 2, seed=1), request, make_request(3, 5, seed=2)], model)
    torch.testing.assert_close(model(tensors, row)[2:6], alone, rtol=1e-5, atol=1e-5)
    nobody = {name: value[:0] if model.per_candidate[name] else value for name, value in request.items()}
    assert model.probabilities(nobody).shape == (0, 2)


@pytest.mark.parametrize("encoder", ["average", "bst", "cnn", "rnn", "lstm", "transformer"])
@pytest.mark.parametrize("fusion", ["concatenate", "token"])
def test_a_hidden_action_is_as_if_it_were_not_there(encoder: str, fusion: str) -> None:
    """The window hides the newest actions, the count those behind the oldest. The first K go by place, so only the pool is asked for."""
    if (encoder, fusion) in (("average", "token"), ("bst", "token"), ("cnn", "token")):
        return  # no such form; and the candidate's neighbour in a convolution is the newest place, hidden or not
    form = f'encoder = "{encoder}"' + ("" if encoder in ("average", "bst") else f', fusion = "{fusion}", output = "pool"')
    domain = domain_with(form)
    model = make_model(domain).train()
    request = make_request(12, 2)
    window_ms = request["sequence_age_ms"][4].double().reshape(1, 1)  # hides places 0 to 3
    shorter = {name: value.clone() for name, value in request.items()}
    for row in tensor_table(domain, "home"):
        if row.name.startswith("sequence_") and row.name != "sequence_count":
            shorter[row.name][:-4] = request[row.name][4:]
    shorter["sequence_count"][0] = 8
    outputs = []
    for given, window in ((request, window_ms), (shorter, None)):
        tensors, of = join([given], model)
        outputs.append(model.sequence(tensors, tensors["candidate_embedding"].float(), of, window))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_fully_masked_rows_have_finite_outputs_and_gradients(form: str) -> None:
    model = make_model(domain_with(form)).train()
    tensors, row = join([make_request(0, 2), make_request(6, 2, seed=1)], model)
    tensors["sequence_age_ms"] = torch.zeros_like(tensors["sequence_age_ms"])
    output = model(tensors, row, generator=torch.Generator().manual_seed(0))
    assert output.isfinite().all()
    output.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_of_the_table_is_used(form: str) -> None:
    domain = domain_with(form)
    model = make_model(domain).eval()
    request = make_request(20, 3)
    before = model(request)
    for row in tensor_table(domain, "home"):
        if row.name == "sequence_age_ms":
            continue
        changed = dict(request)
        changed[row.name] = request[row.name] // 2 if row.name == "sequence_count" else (request[row.name] + 1) % 3
        used = row.name != "sequence_action" or "action_types = false" not in form
        if row.name == "sequence_count" and "first" in form:
            continue  # the first K of 20 may be the first K of 10
        assert torch.allclose(model(changed), before, atol=1e-6) != used, row.name


def test_only_the_average_is_the_same_for_every_candidate() -> None:
    for form in FORMS:
        model = make_model(domain_with(form)).eval()
        tensors, row = join([make_request(9, 3)], model)
        output = model.sequence(tensors, tensors["candidate_embedding"].float(), row, None)
        assert output.shape == (3, sum(model.sequence.widths))
        assert torch.equal(output[0], output[1]) == ("average" in form), form


def test_the_fast_encoder_is_asked_for_its_own_form_only(monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(20, 300)
    for form in (*FORMS, "cross_layers = 1"):
        model = make_model(domain_with(form)).eval()
        expected = torch.sigmoid(model(request))
        if not model.sequence.has_fast:
            monkeypatch.setattr(model.fast_sequence, "pays", lambda *_: pytest.fail("it was asked"))
        torch.testing.assert_close(model.probabilities(request), expected, rtol=0, atol=1e-5)
    assert [make_model(domain_with(form)).sequence.has_fast for form in FORMS[-5:]] == [False, True, False, True, False]


def test_ages_count_for_bst_alone() -> None:
    for form, expected in (('encoder = "bst"', True), ("cross_layers = 1", False)):
        model = make_model(domain_with(form)).eval()
        request = make_request(9, 3)
        older = {**request, "sequence_age_ms": request["sequence_age_ms"] * 4 + 3_600_000}
        assert torch.allclose(model(request), model(older), atol=1e-6) != expected


def test_what_the_file_switches_off_is_not_seen() -> None:
    request = make_request(9, 3)
    no_user = make_model(domain_with("user_embedding = false")).eval()
    torch.testing.assert_close(no_user(request), no_user({**request, "user_embedding": request["user_embedding"] + 1}))
    no_sequence = make_model(domain_with('encoder = "none"')).eval()
    assert not no_sequence.use_sequence
    torch.testing.assert_close(no_sequence(request), make_model(use_sequence=False).eval()(request))


def test_the_place_counts_in_training_and_is_one_place_in_serving() -> None:
    model = make_model(domain_with("position_max = 4, position_served = 1"))
    tensors, row = join([make_request(9, 5)], model)
    tensors["candidate_embedding"][:] = tensors["candidate_embedding"][0]
    for name, value in tensors.items():
        if model.per_candidate[name]:
            value[:] = value[0].clone()
    tensors["position"] = torch.tensor([1, 0, 3, 9, -1], dtype=torch.int32)
    trained, served = model.train()(tensors, row), model.eval()(tensors, row)
    torch.testing.assert_close(served, trained[:1].expand(5, -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained[2], trained[3], rtol=1e-5, atol=1e-6)  # the last place stands for all behind it
    assert len({tuple(logits) for logits in trained[[0, 1, 2, 4]].tolist()}) == 4
    del tensors["position"]
    torch.testing.assert_close(model.probabilities(tensors, row), torch.sigmoid(served), rtol=0, atol=1e-6)


def test_average_is_the_mean_of_valid_tokens() -> None:
    history = torch.arange(12.0).reshape(2, 3, 2)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    history = history.masked_fill(~valid[:, :, None], 0.0)
    output = Average(2)(history, torch.zeros(3, 2), valid, torch.zeros(2, 3), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(output, torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))


@pytest.mark.parametrize("encoder", ["rnn", "lstm"])
def test_recurrent_runs_from_the_oldest_to_the_newest(encoder: str) -> None:
    torch.manual_seed(0)
    mixer = Recurrent(3, ModelSettings(encoder=encoder, layers=2, dropout=0.0))  # type: ignore[arg-type]
    x, real = torch.randn(2, 5, 3), torch.tensor([[True] * 3 + [False] * 2, [False, True, True, False, True]])
    output = mixer(x, real)
    for example in range(2):
        places = real[example].nonzero()[:, 0].flip(0)  # oldest first
        expected = mixer.cell(x[example, places][None])[0][0]
        torch.testing.assert_close(output[example, places], expected)
    assert not output[~real].any()


def test_convolution_sees_neighbours_and_no_padding() -> None:
    torch.manual_seed(0)
    mixer = Convolution(2, ModelSettings(encoder="cnn", layers=1, dropout=0.0))
    x, real = torch.randn(1, 4, 2), torch.tensor([[True, True, True, False]])
    (layer,) = mixer.layers
    assert isinstance(layer, nn.Conv1d)
    for place in range(3):
        total = layer.bias.clone()  # type: ignore[union-attr]
        for shift in (-1, 0, 1):
            if 0 <= place + shift < 3:
                total = total + layer.weight[:, :, shift + 1] @ x[0, place + shift]
        torch.testing.assert_close(mixer(x, real)[0, place], x[0, place] + total.relu())
    assert not mixer(x, real)[0, 3].any()


def test_compress_keeps_what_was_asked_for() -> None:
    x, real = torch.randn(2, 3, 2), torch.tensor([[True, True, False], [False, False, False]])

    def of(output: str, k: int = 4) -> Tensor:
        return compress(x, real, x, real, k, output)

    first, pooled = of("first"), of("pool")
    torch.testing.assert_close(of("both"), torch.cat([first, pooled], 1))
    torch.testing.assert_close(first[0], torch.cat([x[0, :2].flatten(), torch.zeros(4)]))
    torch.testing.assert_close(pooled[0], x[0, :2].amax(0))
    assert not of("both")[1].any()
    torch.testing.assert_close(of("first", 1)[0], x[0, 0])


def test_releases_from_before_the_forms_keep_their_identity() -> None:
    known = {
        ("kuairand", "feed"): "7467e4a4584eacc1",
        ("simulator", "home"): "424d8a384c987e63",
        ("simulator", "related"): "b02da44eb134811c",
    }
    for (name, ranker), fingerprint in known.items():
        assert tensor_fingerprint(load_domain(f"domains/{name}.toml"), ranker) == fingerprint
    prints = {tensor_fingerprint(domain_with(form), "home") for form in (*FORMS, "cross_layers = 2")}
    assert len(prints) == len(FORMS) + 1
    names = {name.split(".")[0] for name in make_model().state_dict()}
    assert names == {"sequence", "kind", "features", "crosses", "hidden", "heads"}
    assert {name.split(".")[1] for name in make_model().sequence.state_dict() if name.startswith("layers")} == {"0", "1"}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ('encoder = "gru"', "encoder"),
        ('encoder = "bst", output = "pool"', "neither fusion nor output"),
        ('encoder = "none", fusion = "token"', "neither fusion nor output"),
        ("position_max = 3, position_served = 3", "below position_max"),
        ('interaction = "transformer", token_dimension = 9, attention_heads = 2', "token_dimension"),
        ('interaction = "transformer", cross_layers = 0', "cross_layers"),
    ],
)
def test_a_form_that_cannot_be_is_named(form: str, message: str) -> None:
    with pytest.raises(DomainError, match=message):
        domain_with(form)


def test_the_end_to_end_ranker_has_a_token_for_each_feature() -> None:
    model: TransActRanker = make_model(domain_with('interaction = "transformer", token_dimension = 8'))
    assert model.interaction is not None
    # candidate, user, kind; age, hour, views, tags, price; five first tokens and the pool
    assert len(model.interaction.widths) == 3 + 5 + 6
    assert not hasattr(model, "crosses")

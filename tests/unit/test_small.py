"""The small model: its inputs, its answer, its training, its place in a release."""

import numpy as np
import pytest
from serving_world import DOMAIN, DOMAIN_TOML, NOW_MS, make_model, write_tables

from features.domain import parse_domain
from features.tensors import tensor_table
from inference.dataset import Dataset
from inference.release import SMALL_FILE, ReleaseError, load_small, open_release, write_release
from inference.small import HIDDEN, SmallInputs, SmallModel, small_shapes
from inference.train_small import train_small


def tensors_of(candidates: int = 5, count: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = {}
    for row in tensor_table(DOMAIN, "home"):
        shape = [candidates if size == -1 else size for size in row.shape]
        value = random.integers(0, 3, shape) if row.dtype.kind == "i" else random.normal(size=shape)
        tensors[row.name] = value.astype(row.dtype)
    tensors["sequence_action"] = random.integers(1, 6, 100).astype(np.int32)
    tensors["sequence_count"][:] = count
    return tensors


def weights_of(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = small_shapes(SmallInputs(DOMAIN, "home"), 2)
    return {name: random.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_inputs_are_means_and_maxima_by_action():
    inputs, tensors = SmallInputs(DOMAIN, "home"), tensors_of()
    dense = inputs.dense(tensors)
    assert dense.shape == (5, inputs.width)
    similar = tensors["candidate_embedding"].astype(np.float32) @ tensors["sequence_embedding"][:60].astype(np.float32).T
    actions = tensors["sequence_action"][:60]
    # shown, click, like, hide in the order of the domain file; unlike takes back and has no place; all of them behind.
    for group, action in enumerate((1, 2, 3, 5)):
        of = similar[:, actions == action]
        np.testing.assert_allclose(dense[:, 3 * group], of.mean(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dense[:, 3 * group + 1], of.max(1), rtol=1e-6)
        np.testing.assert_allclose(dense[:, 3 * group + 2], np.log1p(of.shape[1]), rtol=1e-6)
    np.testing.assert_allclose(dense[:, 12], similar.mean(1), rtol=1e-4, atol=1e-6)
    user = tensors["candidate_embedding"].astype(np.float32) @ tensors["user_embedding"].astype(np.float32)
    np.testing.assert_allclose(dense[:, 15], user, rtol=1e-5)


def test_what_stands_behind_the_count_and_what_is_missing_do_not_leak():
    inputs, tensors = SmallInputs(DOMAIN, "home"), tensors_of(count=0)
    tensors["candidate_number"][:] = np.nan
    dense = inputs.dense(tensors)
    assert np.isfinite(dense).all()
    assert (dense[:, :15] == 0).all()
    assert (dense[:, -2:] == [0.0, 1.0]).all()


def test_the_answer_is_the_written_out_formula_and_does_not_depend_on_the_other_candidates():
    model, tensors = SmallModel(DOMAIN, "home", weights_of()), tensors_of()
    weights, probability = model.weights, model.probabilities(tensors)
    dense = model.inputs.dense(tensors)
    scaled = np.clip((dense - weights["mean"]) * weights["scale"], -8, 8)
    logits = np.maximum(scaled @ weights["hidden"] + weights["hidden_bias"], 0) @ weights["out"] + weights["bias"]
    logits = logits + weights["code.hour"][tensors["request_category"][0]]
    logits = logits + weights["code.tags"][tensors["item_list_tags"]].mean(1)
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logits)), rtol=1e-4, atol=1e-6)
    one = {
        name: value[2:3] if name in ("candidate_embedding", "candidate_kind", "candidate_number", "item_list_tags") else value
        for name, value in tensors.items()
    }
    np.testing.assert_allclose(model.probabilities(one), probability[2:3], rtol=1e-5)


def test_weights_of_another_ranker_are_refused_by_name():
    weights = weights_of()
    weights["out"] = np.zeros((HIDDEN, 3), np.float32)
    with pytest.raises(ValueError, match=r"small model: out has shape \(32, 3\), the domain file gives \(32, 2\)"):
        SmallModel(DOMAIN, "home", weights)


def test_training_finds_what_decides():
    domain = parse_domain(DOMAIN_TOML.replace('features = ["age", "tags", "hour", "price"]', 'features = ["price"]'), source="domain.toml")
    random = np.random.default_rng(1)
    requests, candidates, D = 400, 10, 32
    vectors = random.normal(size=(requests, candidates, D)) / np.sqrt(D)
    history = random.normal(size=(requests, 20, D)) / np.sqrt(D)
    history[:, 0] = vectors[:, 3]  # the user acted on something just like candidate 3, which is then clicked
    labels = np.zeros((requests, candidates, 2), bool)
    labels[:, 3, 0] = True
    starts, sequence_starts = np.arange(requests + 1) * candidates, np.arange(requests + 1) * 20
    dataset = Dataset(
        user_id=np.arange(requests, dtype=np.uint64),
        request_time_ms=np.arange(requests, dtype=np.int64),
        starts=starts,
        labels=labels.reshape(-1, 2),
        weights=np.ones((requests * candidates, 2), np.float32),
        of_request={"sequence_count": np.full((requests, 1), 20, np.int32), "user_embedding": np.zeros((requests, D), np.float16)},
        of_candidate={
            "candidate_embedding": vectors.reshape(-1, D).astype(np.float16),
            "candidate_number": np.full((requests * candidates, 1), np.nan, np.float32),
        },
        of_sequence={
            "sequence_action": np.full(requests * 20, 2, np.int32),
            "sequence_embedding": history.reshape(-1, D).astype(np.float16),
        },
        sequence_starts=sequence_starts,
    )
    model = train_small(domain, "home", dataset, np.arange(300))
    held_back = [model.probabilities(dataset.request(i))[:, 0].argmax() for i in range(300, 400)]
    assert held_back.count(3) > 90
    again = train_small(domain, "home", dataset, np.arange(300))
    assert all((again.weights[name] == value).all() for name, value in model.weights.items())


def test_a_release_may_have_one_and_a_damaged_one_is_refused(tmp_path):
    from safetensors.numpy import save

    generations = write_tables(tmp_path / "tables")
    given = {"domain_toml": DOMAIN_TOML, "ranker": "home", "created_ms": NOW_MS, "generations": generations, "metrics": {}}
    without = write_release(tmp_path / "releases", model=make_model("home"), **given)
    assert load_small(without) is None
    release = write_release(tmp_path / "releases", model=make_model("home"), small=save(weights_of()), **given)
    assert release.release_id != without.release_id
    small = load_small(release)
    np.testing.assert_array_equal(small.weights["out"], weights_of()["out"])
    (release.folder / SMALL_FILE).write_bytes(b"x")
    with pytest.raises(ReleaseError, match=r"small\.safetensors: sha256"):
        open_release(release.folder)
    other = save(weights_of() | {"out": np.zeros((1, 1), np.float32)})
    with pytest.raises(ReleaseError, match="small model: out has shape"):
        load_small(write_release(tmp_path / "releases", model=make_model("home"), small=other, **given))

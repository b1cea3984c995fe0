"""Forms of the model from a log to a release: positions come from the log, calibration is fitted and kept, every form learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_training import DOMAIN, DOMAIN_TEXT, OPTIONS, intent_log

from deploy.learn import Workspace, release
from features.domain import parse_domain
from inference.dataset import build_dataset, split_times
from inference.embeddings import newest_generations, publish_embeddings
from inference.release import load_model
from inference.train import load_trained, predict, train

MODEL = "time_window_hours_max = 0.02"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """(log, tables, generations)."""
    folder = tmp_path_factory.mktemp("forms")
    log = intent_log().write(folder / "log")
    validation_ms, _ = split_times(DOMAIN, "home", log, OPTIONS.fractions)
    return log, folder / "tables", newest_generations(publish_embeddings(DOMAIN, "home", log, folder / "tables", until_ms=validation_ms))


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_calibration_is_fitted_on_validation_and_released(tmp_path: Path, world: tuple[Path, Path, dict[str, str]], kind: str) -> None:
    log, tables, generations = world
    text = DOMAIN_TEXT.replace(MODEL, f'{MODEL}, calibration = "{kind}", position_max = 8')
    domain = parse_domain(text, source="toy")
    (tmp_path / "toy.toml").write_text(text)
    work = Workspace(tmp_path / "toy.toml", tmp_path / "home")
    options = replace(OPTIONS, epochs=2)
    dataset, _ = build_dataset(domain, "home", log, tables, generations=generations)
    assert dataset.of_candidate["position"].tolist() == list(range(8)) * len(dataset)
    result = train(domain, "home", log, tables, work.training("home"), options, dataset=dataset, generations=generations)

    # A click weighs 3 in the loss and 1 in the log: without correction it is foretold too often.
    found = result.metrics["calibration"]["click"]
    assert found["after"]["error"] < 0.7 * found["before"]["error"]
    assert result.metrics["test"]["heads"]["click"]["calibration_error"] == pytest.approx(found["after"]["error"], abs=1e-4)
    assert (work.training("home") / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert result.metrics["calibration"]["hide"]["before"]["error"] == pytest.approx(
        result.metrics["calibration"]["hide"]["after"]["error"], abs=1e-5
    )

    loaded, _ = load_trained(domain, "home", work.training("home"))
    released = load_model(release(work, "home"))
    test = dataset.part(result.metrics["parts"]["test"]["from_ms"], 2**62)
    of_training = predict(result.model, dataset, test)[0]
    for model in (loaded, released):
        np.testing.assert_array_equal(predict(model, dataset, test)[0], of_training)  # type: ignore[arg-type]
    batch = dataset.batch(test[:1])
    served = {name: value for name, value in batch.tensors.items() if name != "position"}  # serving sends none
    np.testing.assert_array_equal(released.probabilities(served, batch.request_row).numpy(), predict(released, dataset, test[:1])[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form", ['encoder = "average"', 'encoder = "bst"', 'encoder = "cnn"', 'encoder = "lstm"', 'fusion = "token"', 'output = "pool"']
)
def test_every_form_learns_from_the_sequence(tmp_path: Path, world: tuple[Path, Path, dict[str, str]], form: str) -> None:
    log, tables, generations = world
    domain = parse_domain(DOMAIN_TEXT.replace(MODEL, f"{MODEL}, {form}"), source="toy")
    options = replace(OPTIONS, epochs=6, batch_rows=128, patience=6, small=False)
    result = train(domain, "home", log, tables, tmp_path, options, generations=generations)
    assert result.metrics["test"]["heads"]["click"]["auc"] > 0.6
    assert "test_small" not in result.metrics

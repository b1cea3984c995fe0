"""Calibration: probabilities come back to the rates, the order stays, a release keeps it."""

import numpy as np
import pytest
import torch
from serving_world import DOMAIN_TOML, NOW_MS
from test_transact import TEXT, make_model, make_request

from features.domain import parse_domain
from inference.calibration import KNOTS, SLOPE_MIN, Calibration, calibrate, fit_isotonic, fit_platt, logit
from inference.metrics import calibration_error
from inference.plots import plot_reliability
from inference.release import load_model, open_release, write_release
from inference.transact import TransActRanker

KINDS = ("platt", "isotonic")


def biased(seed: int, n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, 2] of a model that is too sure and too high, and labels of the true ones; the second head has no label."""
    random = np.random.default_rng(seed)
    true = random.normal(-1.5, 1.0, n)
    said = 1 / (1 + np.exp(-(2.0 * true + 1.0)))
    labels = random.random(n) < 1 / (1 + np.exp(-true))
    return np.stack([said, said], 1).astype(np.float32), np.stack([labels, np.zeros(n, bool)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_error_falls_and_order_stays(kind: str, tmp_path) -> None:
    calibration = Calibration(kind, 2)
    test = biased(1)
    found = calibrate(calibration, ("click", "hide"), biased(0), test)
    before, after = (found["click"][side]["error"] for side in ("before", "after"))
    assert before == pytest.approx(calibration_error(test[0][:, 0], test[1][:, 0]))
    assert before > 0.05
    assert after < 0.02
    corrected = calibration.corrected_probabilities(test[0])
    order = np.argsort(test[0][:, 0], kind="stable")
    assert (np.diff(corrected[order, 0]) >= -1e-6).all()
    np.testing.assert_allclose(corrected[:, 1], test[0][:, 1], atol=1e-5)  # no label: as it was
    plot_reliability(found, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_as_it_is_made_it_changes_nothing_and_ascends_everywhere(kind: str) -> None:
    calibration = Calibration(kind, 2)
    logits = torch.linspace(-60, 60, 500)[:, None].expand(-1, 2)
    torch.testing.assert_close(calibration(logits), logits)
    calibration.fit(*biased(3, 2000))
    assert (calibration(logits).diff(dim=0) > 0).all()
    assert calibration(logits[:0]).shape == (0, 2)


def test_platt_finds_slope_and_offset_and_never_falls() -> None:
    p, labels = biased(0, 50_000)
    slope, offset = fit_platt(logit(p[:, 0]), labels[:, 0])
    assert (slope, offset) == (pytest.approx(0.5, abs=0.03), pytest.approx(-0.5, abs=0.05))
    assert fit_platt(logit(p[:, 0]), ~labels[:, 0])[0] == SLOPE_MIN
    separable = fit_platt(np.array([-1.0, -1.0, 1.0, 1.0]), np.array([False, False, True, True]))
    assert np.isfinite(separable).all()


def test_isotonic_is_the_monotone_regression() -> None:
    # Two bins out of order are pooled: rates 0.25, (0.75, 0.25 -> 0.5), 1.0 of four examples each.
    x = np.repeat([-2.0, -1.0, 1.0, 2.0], 4)
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1], bool)
    places, values = fit_isotonic(x, labels)
    assert len(places) == len(values) == KNOTS
    np.testing.assert_allclose(places[:3], [-2.0, 0.0, 2.0])
    rates = np.array([1.5 / 5, 4.5 / 9, 4.5 / 5])
    np.testing.assert_allclose(values[:3], np.log(rates / (1 - rates)), atol=1e-9)
    random = np.random.default_rng(2)
    for _ in range(20):
        places, values = fit_isotonic(random.normal(size=300).round(1), random.random(300) < 0.3)
        assert (np.diff(places) > 0).all()
        assert (np.diff(values) >= SLOPE_MIN * np.diff(places) * 0.999).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_keeps_it(kind: str, tmp_path) -> None:
    text = DOMAIN_TOML.replace("[ranker.related]", f'[ranker.related.model]\ncalibration = "{kind}"\n[ranker.related]')
    domain = parse_domain(text, source="test")
    model = TransActRanker(domain, "related").eval()
    heads = len(model.head_names)
    p, labels = biased(5, 500)
    model.calibration.fit(np.repeat(p[:, :1], heads, 1), np.repeat(labels[:, :1], heads, 1))
    generations = {"related_items": "20231114T221320000Z-0123abcd"}
    release = write_release(
        tmp_path, model=model, domain_toml=text, ranker="related", created_ms=NOW_MS, generations=generations, metrics={}
    )
    loaded = load_model(open_release(release.folder))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_the_corrected_ones(kind: str) -> None:
    domain = parse_domain(TEXT.replace("cross_rank = 0", f'cross_rank = 0, calibration = "{kind}"'), source="test")
    model = make_model(domain).eval()
    request = make_request(9, 200)
    raw = torch.sigmoid(model(request))
    torch.testing.assert_close(model.probabilities(request), raw, rtol=0, atol=1e-5)
    p, labels = biased(4, 2000)
    model.calibration.fit(p, np.repeat(labels[:, :1], 2, 1))
    expected = model.calibration.corrected_probabilities(raw.detach().numpy())
    np.testing.assert_allclose(model.probabilities(request).numpy(), expected, atol=1e-5)
    assert np.abs(expected - raw.detach().numpy()).max() > 0.05

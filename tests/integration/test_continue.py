"""Training on from a release, and how a model ages."""

from dataclasses import replace

import pytest
import torch
from test_training import DOMAIN, DOMAIN_TEXT, OPTIONS, START_MS, intent_log

from deploy.learn import Workspace, continue_ranker, release
from features.domain import DAY_MS, parse_domain
from inference.checkpoints import TrainError
from inference.dataset import build_dataset, split_times
from inference.decay import DAILY, FROZEN, WITHOUT, decay, decay_table, half_time_ms
from inference.embeddings import newest_generations, publish_embeddings
from inference.release import load_model, write_release
from inference.train import TIME_MS_MAX, train

CONTINUED = replace(OPTIONS, epochs=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A home folder whose release was trained on the first half of the log."""
    home = tmp_path_factory.mktemp("continue")
    work = Workspace(home / "toy.toml", home)
    work.domain_path.write_text(DOMAIN_TEXT)
    intent_log(users=100).write(work.log)
    validation_ms, half_ms = split_times(DOMAIN, "home", work.log, (0.4, 0.1, 0.5))
    folders = publish_embeddings(DOMAIN, "home", work.log, work.tables, until_ms=validation_ms)
    parts = (0, validation_ms, half_ms, half_ms + DAY_MS)
    train(DOMAIN, "home", work.log, work.tables, work.training("home"), OPTIONS, generations=newest_generations(folders), parts=parts)
    return work


@pytest.fixture(scope="module")
def first(work):
    return release(work, "home")


def test_it_goes_on_with_what_has_come_since(work, first):
    before_ms = first.manifest["trained"]["before_ms"]
    result = continue_ranker(work, "home", first, CONTINUED, days=1)
    parts = result.metrics["parts"]
    dataset, _ = build_dataset(DOMAIN, "home", work.log, work.tables)
    assert parts["train"]["from_ms"] >= before_ms - DAY_MS
    assert parts["validation"]["from_ms"] > before_ms
    new = dataset.part(before_ms, TIME_MS_MAX)
    assert parts["test"]["requests"] == pytest.approx(0.2 * len(new), abs=2)
    assert result.generations == dict(first.generations), "items stay where the weights know them"
    old, weights = load_model(first).state_dict(), result.model.state_dict()
    assert {name for name in old if not torch.equal(old[name], weights[name])} >= {"heads.weight", "sequence.action.weight"}
    for name in ("features.candidate.mean", "features.candidate.deviation"):
        assert torch.equal(old[name], weights[name]), "what normalises stays too"
    continued = release(work, "home")
    assert continued.manifest["trained"]["before_ms"] == parts["test"]["from_ms"]


def test_where_nothing_gets_better_the_start_stays(work, first, tmp_path):
    start = load_model(first).state_dict()
    validation_ms, test_ms = split_times(DOMAIN, "home", work.log, OPTIONS.fractions)
    result = train(
        DOMAIN,
        "home",
        work.log,
        work.tables,
        tmp_path,
        replace(OPTIONS, epochs=2, learning_rate=10.0),
        generations=first.generations,
        start=start,
        parts=(0, validation_ms, test_ms, TIME_MS_MAX),
    )
    assert result.metrics["best_epoch"] == 0
    assert all(torch.equal(start[name], weight) for name, weight in result.model.state_dict().items())


def test_what_cannot_go_on_says_why(work, first, tmp_path):
    model = load_model(first)
    common = {"model": model, "ranker": "home", "created_ms": START_MS, "generations": first.generations, "metrics": {}}
    silent = write_release(tmp_path, domain_toml=DOMAIN_TEXT, **common)
    with pytest.raises(TrainError, match="does not say which requests"):
        continue_ranker(work, "home", silent, CONTINUED)
    changed = Workspace(tmp_path / "toy.toml", work.home)
    changed.domain_path.write_text(DOMAIN_TEXT.replace('features = ["score", "labels_of_item", "hour"]', 'features = ["score"]'))
    with pytest.raises(TrainError, match="train anew"):
        continue_ranker(changed, "home", first, CONTINUED)
    with pytest.raises(TrainError, match="of another model"):
        train(DOMAIN, "home", work.log, work.tables, tmp_path / "out", OPTIONS, start={"heads.bias": torch.zeros(2)})


def test_a_model_ages_by_the_day(work, tmp_path):
    dataset, _ = build_dataset(DOMAIN, "home", work.log, work.tables)
    until_ms = half_time_ms(dataset.request_time_ms)
    assert until_ms % DAY_MS == 0
    folders = publish_embeddings(DOMAIN, "home", work.log, work.tables, until_ms=until_ms)
    generations = newest_generations(folders)
    result = decay(DOMAIN, "home", work.log, work.tables, tmp_path, OPTIONS, generations=generations, until_ms=until_ms)
    days = result["days"]
    assert [day["days_since"] for day in days] == list(range(1, len(days) + 1))
    assert sum(day["requests"] for day in days) <= len(dataset.part(until_ms, TIME_MS_MAX))
    first, last = days[0]["heads"]["click"], days[-1]["heads"]["click"]
    assert first[FROZEN] == first[DAILY], "on the first day nothing has been trained on"
    assert last[FROZEN] != last[DAILY]
    assert first[FROZEN]["auc"] > first[WITHOUT]["auc"]
    assert (tmp_path / "decay.png").stat().st_size > 1000
    assert decay_table(result).row_count == 2 * len(days)
    later_ms = until_ms + 1000 * DAY_MS
    with pytest.raises(TrainError, match="no day from"):
        decay(DOMAIN, "home", work.log, work.tables, tmp_path, OPTIONS, generations=generations, until_ms=later_ms)


def test_calibration_is_fitted_to_the_weights_that_go_on(work, first, tmp_path):
    """It corrects what comes out of the new weights, not what the old correction has made of it."""
    domain = parse_domain(DOMAIN_TEXT.replace("model = { ", 'model = { calibration = "platt", '), source="toy")
    half_ms = first.manifest["trained"]["before_ms"]
    parts = (0, half_ms - DAY_MS, half_ms, TIME_MS_MAX)
    given = {"generations": first.generations, "parts": parts}
    base = train(domain, "home", work.log, work.tables, tmp_path / "base", OPTIONS, **given)
    same = replace(OPTIONS, epochs=1, learning_rate=1e-9)
    start = base.model.state_dict()
    again = train(domain, "home", work.log, work.tables, tmp_path / "again", same, start=start, **given)
    for name in ("calibration.slope", "calibration.offset"):
        torch.testing.assert_close(again.model.state_dict()[name], start[name], rtol=1e-3, atol=1e-3)


def test_a_place_that_the_log_never_has_is_refused(work, tmp_path):
    domain = parse_domain(DOMAIN_TEXT.replace("model = { ", "model = { position_max = 20, position_served = 15, "), source="toy")
    with pytest.raises(TrainError, match="position_served"):
        train(domain, "home", work.log, work.tables, tmp_path, OPTIONS)

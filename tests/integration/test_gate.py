"""The gate before a release: two trained rankers on the same later requests."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import DOMAIN, DOMAIN_TEXT, OPTIONS, intent_log

from features.domain import parse_domain
from inference.dataset import build_dataset, split_times
from inference.embeddings import publish_embeddings
from inference.gate import PASSED, REFUSED, UNKNOWN, Contender, Limits, judge
from inference.metrics import auc
from inference.release import open_release, write_release
from inference.train import TIME_MS_MAX, predict, train
from inference.transact import NoopRanker, TransActRanker

LIMITS = Limits(requests_min=100, positives_min=20)
FEW_HIDES = ("click",)  # nobody of this log hides anything


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(log, tables, contender with the sequence, contender without it)."""
    folder = tmp_path_factory.mktemp("gate")
    log = intent_log(users=100).write(folder / "log")
    validation_ms, _ = split_times(DOMAIN, "home", log, OPTIONS.fractions)
    publish_embeddings(DOMAIN, "home", log, folder / "tables", until_ms=validation_ms)

    def contender(name, **changes):
        result = train(DOMAIN, "home", log, folder / "tables", folder / name, replace(OPTIONS, **changes))
        return Contender(name, result.model, DOMAIN, result.generations, result.metrics["parts"]["test"]["from_ms"])

    return log, folder / "tables", contender("with"), contender("without", use_sequence=False)


def judged(world, candidate, incumbent, limits=LIMITS):
    return judge("home", candidate, incumbent, world[0], world[1], limits=limits)


def test_the_first_release_passes(world):
    assert judged(world, world[2], None).passed


def test_the_better_one_passes_and_the_worse_one_is_refused(world):
    *_, good, bad = world
    verdict = judged(world, good, bad)
    assert (verdict.decision, verdict.judged, verdict.incumbent) == (PASSED, FEW_HIDES, "without")
    assert verdict.heads["click"]["auc"]["low"] > 0
    verdict = judged(world, bad, good)
    assert verdict.decision == REFUSED
    assert "head click: AUC -" in verdict.reasons[0]
    assert "not by chance" in verdict.reasons[0]


def test_it_is_judged_on_requests_that_neither_was_trained_on(world):
    log, tables, good, bad = world
    dataset, _ = build_dataset(DOMAIN, "home", log, tables)
    later_ms = int(dataset.request_time_ms[-150])
    verdict = judged(world, good, replace(bad, trained_before_ms=later_ms))
    part = dataset.part(later_ms, TIME_MS_MAX)
    assert (verdict.from_ms, verdict.requests) == (later_ms, len(part))
    probabilities, labels, _request_row, _ = predict(good.model, dataset, part)
    assert verdict.heads["click"]["auc"]["with"] == pytest.approx(auc(probabilities[:, 0], labels[:, 0]), abs=1e-6)


def test_the_same_one_twice_differs_by_nothing_whatever_its_sequence_length(world):
    *_, good, _ = world
    verdict = judged(world, good, good)
    assert verdict.passed
    row = verdict.heads["click"]["auc"]
    assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    # Batches are sorted by the sequence's length, which another length changes: rows must still be those of the same requests.
    shorter = parse_domain(DOMAIN_TEXT.replace("sequence_length = 8", "sequence_length = 2"), source="toy")
    model = TransActRanker(shorter, "home")
    model.load_state_dict(good.model.state_dict())
    row = judged(world, replace(good, domain=shorter, model=model.eval()), good).heads["click"]["auc"]
    assert row["with"] > 0.6


def test_what_cannot_be_judged_is_not_passed(world):
    *_, good, bad = world
    for verdict, reason in (
        (judged(world, good, bad, Limits(requests_min=10**6)), "requests that neither was trained on"),
        (judged(world, good, bad, Limits(requests_min=100, positives_min=10**6)), "labels of either kind"),
        (judged(world, replace(good, trained_before_ms=None), bad), "does not say"),
    ):
        assert verdict.decision == UNKNOWN
        assert not verdict.passed
        assert reason in verdict.reasons[0]


def test_a_head_that_is_gone_and_scores_that_are_none_are_refused(world):
    *_, good, bad = world
    text = DOMAIN_TEXT.replace('heads.hide = { actions = ["hide"] }\n', "")
    fewer = parse_domain(text, source="toy")
    torch.manual_seed(0)
    verdict = judged(world, replace(good, domain=fewer, model=TransActRanker(fewer, "home").eval()), bad)
    assert verdict.decision == REFUSED
    assert any("head hide: the incumbent has it" in reason for reason in verdict.reasons)
    broken = TransActRanker(DOMAIN, "home")
    broken.load_state_dict(good.model.state_dict())
    with torch.no_grad():
        broken.heads.bias[:] = float("nan")
    verdict = judged(world, replace(good, model=broken.eval()), bad)
    assert verdict.decision == REFUSED
    assert "not all finite" in verdict.reasons[0]


def test_a_small_loss_that_chance_explains_is_allowed_up_to_the_limit(world):
    *_, good, _ = world
    base = judged(world, good, good).heads["click"]["auc"]["with"]
    for seed in range(20):
        worse = TransActRanker(DOMAIN, "home")
        worse.load_state_dict(good.model.state_dict())
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in worse.heads.parameters():
                value += 0.02 * torch.randn(value.shape, generator=random)
        candidate = replace(good, model=worse.eval())
        row = judged(world, candidate, good).heads["click"]["auc"]
        if row["difference"] < -1e-4 and row["high"] >= 0:
            break
    else:
        pytest.fail("no candidate is worse by chance; take other seeds")
    loss = -row["difference"]
    assert row["without"] == base
    assert judged(world, candidate, good, replace(LIMITS, auc_loss_max=2 * loss)).passed
    refused = judged(world, candidate, good, replace(LIMITS, auc_loss_max=loss / 2))
    assert refused.decision == REFUSED
    assert "that are allowed" in refused.reasons[0]


def test_a_release_says_what_it_was_trained_on(world, tmp_path):
    *_, good, _ = world
    release = write_release(
        tmp_path,
        model=good.model,
        domain_toml=DOMAIN_TEXT,
        ranker="home",
        created_ms=1_700_000_000_000,
        generations=good.generations,
        metrics={},
        trained={"before_ms": good.trained_before_ms, "gate": {"decision": PASSED}},
    )
    found = Contender.of(open_release(release.folder))
    assert found.trained_before_ms == good.trained_before_ms
    assert judged(world, found, good).heads["click"]["auc"]["difference"] == 0
    noop = replace(good, model=NoopRanker(DOMAIN, "home"))
    assert judged(world, good, noop).passed
    assert np.isfinite(judged(world, good, found).heads["click"]["auc"]["with"])


def test_an_incumbent_that_cannot_be_asked_any_more_is_no_reason_to_pass(world):
    *_, good, bad = world
    gone = replace(bad, generations={**bad.generations, "items": "20000101T000000000Z-00000000"})
    verdict = judged(world, good, gone)
    assert verdict.decision == UNKNOWN
    assert "not there any more" in verdict.reasons[0]

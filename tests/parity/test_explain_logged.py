"""`freshrank explain --request-id`: what was served is rebuilt, scored by the release's weights, and shown with each action's effect."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_replay import ERASED, START_MS
from test_replay_shadows import shadowed_world
from typer.testing import CliRunner

from deploy import cli
from deploy.explain_page import bar
from deploy.explaining import NotExplainedError, explain_logged
from deploy.replay import ACTIONS, RANKINGS, Rebuilt, ReplayOptions, replay
from features.ids import user_key
from inference.explain import ACTIONS_MAX, kendall_tau, variants
from inference.release import load_model
from inference.scoring import best_first, final_scores, head_weights
from protos.v1.ranking_pb2 import RankingRecord
from streams.archive import write_archive


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shadowed_world(tmp_path_factory.mktemp("explained"))


@pytest.fixture(scope="module")
def options(world):
    return archived(world, world.releases.parent / "archive")


def archived(world, folder) -> ReplayOptions:
    write_archive(world.actions, folder / ACTIONS)
    write_archive(world.rankings, folder / RANKINGS)
    return ReplayOptions(releases=world.releases, tables=world.tables, archive=folder)


@pytest.fixture(scope="module")
def rebuilt(options) -> Rebuilt:
    """A ranking with a long sequence and several candidates, that has a shadow."""
    found: list[Rebuilt] = []
    report = replay(ReplayOptions(**{**vars(options), "score_sample": 0, "on_rebuilt": found.append}))
    assert report.ok
    shadowed = {one.record.request.request_id for one in found if one.record.shadow}
    return max(
        (one for one in found if not one.record.shadow and one.record.request.request_id in shadowed and len(one.inputs.candidate_ids) > 3),
        key=lambda one: one.packed.sequence_count,
    )


def scores_by_hand(release, packer, inputs):
    model, packed = load_model(release), packer.pack(inputs)
    probability = model.probabilities({name: torch.from_numpy(np.array(value)) for name, value in packed.tensors.items()}).numpy()
    return final_scores(probability, head_weights(packer.domain.ranker["home"], {}))


def test_a_logged_ranking_is_explained_from_what_it_was_made_of(options, rebuilt):
    record = rebuilt.record
    explained = explain_logged(options, record.request.request_id)
    found = explained.explanation
    assert explained.record == record
    assert not explained.warnings
    assert "byte for byte" in explained.notes[0]
    served = np.frombuffer(record.scores, "<f4")
    order = best_first(served)
    assert np.frombuffer(found.response.ranked_ids, "<u8").tolist() == rebuilt.inputs.candidate_ids[order].tolist()
    assert found.response.scores == served[order].tobytes()
    assert found.response.head_scores["click"] == np.frombuffer(record.head_scores["click"], "<f4")[order].tobytes()
    assert sum(action.seen for action in found.actions) == rebuilt.packed.sequence_count > 3
    places = list(range(len(rebuilt.inputs.events)))[::-1]
    left_out = [(place, action) for place, action in zip(places, found.actions, strict=True) if action.left_out]
    assert len(left_out) >= rebuilt.packed.sequence_count
    for place, action in left_out:
        without = replace(rebuilt.inputs, events=np.delete(rebuilt.inputs.events, place))
        scores = scores_by_hand(rebuilt.release, rebuilt.packer, without)
        np.testing.assert_allclose(np.frombuffer(action.effect, "<f4"), (served - scores)[order], atol=1e-5)
        assert action.kendall_tau == pytest.approx(kendall_tau(served, scores), abs=1e-5, nan_ok=True)


def test_a_shadow_is_explained_by_its_own_release(options, rebuilt):
    shadow_release = next(folder.name for folder in sorted(options.releases.iterdir()) if folder.name != rebuilt.record.release_id)
    explained = explain_logged(options, rebuilt.record.request.request_id, shadow_release=shadow_release)
    assert explained.record.shadow
    assert explained.explanation.response.release_id == shadow_release
    assert not explained.warnings
    assert {feature.name for feature in explained.explanation.features} == {"price", "tags", "hour", "retrieval"}
    assert sum(action.seen for action in explained.explanation.actions) <= 5


def test_at_most_the_newest_actions_are_left_out_and_a_retraction_has_its_effect(rebuilt):
    events = np.repeat(rebuilt.inputs.events[-1:], 40)
    events["event_time_ms"] = rebuilt.inputs.request_time_ms - np.arange(40)[::-1] * 100 - 1
    events["entity_kind"], events["action"], events["entity_id"] = 1, 2, np.arange(1, 41)
    events["action"][-1], events["entity_id"][-1] = 3, 39  # unlike takes the like before it back
    inputs = replace(rebuilt.inputs, events=events)
    found = variants(rebuilt.packer, inputs)
    seen = rebuilt.packer.visible(inputs)
    assert len(seen) == 8
    assert [variant.place for variant in found] == [39, *seen.tolist()]
    assert 38 in rebuilt.packer.visible(found[0].inputs)
    assert len(found) <= ACTIONS_MAX


def test_differences_from_what_was_served_are_said(world, tmp_path, rebuilt):
    kept = {partition: list(records) for partition, records in world.rankings.records.items()}
    for records in world.rankings.records.values():
        for place, (time_ms, key, value) in enumerate(records):
            record = RankingRecord.FromString(value)
            if record.request.request_id == rebuilt.record.request.request_id and not record.shadow:
                record.tensor_digests["sequence_action"] ^= 1
                record.digest = bytes(16)
                record.row_digest ^= 1
                record.scores = (np.frombuffer(record.scores, "<f4") + 1).tobytes()
                records[place] = (time_ms, key, record.SerializeToString())
    try:
        options = archived(world, tmp_path / "archive")
    finally:
        world.rankings.records.update(kept)
    explained = explain_logged(options, rebuilt.record.request.request_id)
    inputs, scores = explained.warnings
    assert "differ from those that were served (tensor sequence_action, the row)" in inputs
    assert "differ from the served ones by up to 1.0e+00" in scores


def test_scores_of_a_gpu_are_within_what_a_gpu_may_differ(world, tmp_path, rebuilt, monkeypatch):
    moved, request_id = [], rebuilt.record.request.request_id
    kept = {partition: list(records) for partition, records in world.rankings.records.items()}
    for records in world.rankings.records.values():
        for place, (time_ms, key, value) in enumerate(records):
            record = RankingRecord.FromString(value)
            if record.request.request_id == request_id and not record.shadow:
                record.scores = (np.frombuffer(record.scores, "<f4") + np.float32(0.01)).tobytes()
                records[place] = (time_ms, key, record.SerializeToString())
                moved.append(place)
    try:
        options = archived(world, tmp_path / "archive")
    finally:
        world.rankings.records.update(kept)
    assert moved
    on_cpu = explain_logged(replace(options, served_on="cpu"), request_id)
    assert [warning for warning in on_cpu.warnings if "differ from the served ones by up to 1.0e-02" in warning]
    assert not explain_logged(replace(options, served_on="cuda"), request_id).warnings
    arguments = ["explain", "--request-id", str(request_id), "--archive", str(options.archive), "--home", str(options.releases.parent)]

    def said(*more: str) -> str:
        result = CliRunner(env={"COLUMNS": "400"}).invoke(cli.app, [*arguments, *more], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    assert "differ from the served ones" in said("--served-on", "cpu")
    assert "differ from the served ones" not in said("--served-on", "cuda")
    monkeypatch.setenv("FRESHRANK_MODEL_DEVICE", "cuda")
    assert "differ from the served ones" not in said(), "the settings say where the models ran"
    assert "differ from the served ones" in said("--served-on", "cpu"), "the command line comes first"


def test_what_cannot_be_explained_says_why(world, options):
    with pytest.raises(NotExplainedError, match=r"request_id 5: the ranking log has no such ranking"):
        explain_logged(options, 5)
    for records in world.rankings.records.values():
        for _, key, value in records:
            if key == user_key(ERASED):
                request_id = RankingRecord.FromString(value).request.request_id
                with pytest.raises(NotExplainedError, match="cannot be rebuilt: the user was erased after the ranking"):
                    explain_logged(options, request_id)
                return


def test_the_command_shows_a_page_and_writes_it_as_one_file(options, rebuilt, tmp_path):
    html = tmp_path / "why.html"
    arguments = ["explain", "--request-id", str(rebuilt.record.request.request_id), "--archive", str(options.archive)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        cli.app, [*arguments, "--home", str(options.releases.parent), "--html", str(html)], catch_exceptions=False
    )
    assert result.exit_code == 0
    page = html.read_text("utf-8")
    for text in (result.output, page):
        assert "byte for byte" in text
        assert rebuilt.record.release_id in text
        assert "what the user did" in text
        assert "█" in text
        assert "features of user and request" in text
    assert "<title>request " in page
    assert "src=" not in page
    assert "href=" not in page
    assert str(START_MS) not in page  # times are words


@pytest.mark.parametrize(
    ("arguments", "what"),
    [([], "give either --request-id"), (["--user", "1", "--request-id", "2"], "give either"), (["--user", "1"], "item ids, separated")],
)
def test_the_command_says_what_it_needs(tmp_path, arguments, what):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["explain", *arguments, "--home", str(tmp_path)])
    assert result.exit_code == 2
    assert what in result.output


def test_a_bar_points_the_way_of_its_effect():
    assert bar(1.0, 1.0).plain == " " * 12 + "│" + "█" * 12
    assert bar(-0.5, 1.0).plain == " " * 6 + "█" * 6 + "│" + " " * 12
    assert bar(0.0, 0.0).plain == " " * 12 + "│" + " " * 12

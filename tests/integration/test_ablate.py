"""`freshrank ablate`: cells share what they may see, finished runs are kept, the tables say what was measured."""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_refreshed import clicks, imported
from test_training import DOMAIN, DOMAIN_TEXT, OPTIONS, intent_log
from typer.testing import CliRunner

from deploy import cli
from features.domain import parse_domain
from features.logs import AS_LOGGED, IMPRESSIONS, POPULAR, UNIFORM
from inference import ablate as ablate_module
from inference.ablate import Results, _drawn, ablate, planned
from inference.ablation_report import COLUMNS, DRAWN_COLUMNS, OF_HEAD, drawn_rows, markdown, rows_of, summary, terminal_tables
from inference.ablations import CELLS, TABLES, AblationError, AblationTable, Cell, configured, read_tables
from inference.dataset import build_dataset, split_times
from inference.embeddings import newest_generations, publish_embeddings
from inference.evaluate import Scored
from inference.metrics import reciprocal_ranks, user_means
from inference.plots import plot_ablation
from inference.refreshed import publish_refreshed

QUICK = replace(OPTIONS, epochs=2, small=False)
TOY = {
    "toy": AblationTable("Toy", "no_sequence", {"no_sequence": (0.0, 0.0), "transact": (9.4, -14.86), "short": (None, None)}),
}
TOY_CELLS = {**CELLS, "short": Cell(ranker={"sequence_length": 2}), "long": Cell(ranker={"sequence_length": 500})}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """(log, tables, generations)."""
    folder = tmp_path_factory.mktemp("ablate")
    log = intent_log(users=60, requests=8).write(folder / "log")
    validation_ms, _ = split_times(DOMAIN, "home", log, OPTIONS.fractions)
    return log, folder / "tables", newest_generations(publish_embeddings(DOMAIN, "home", log, folder / "tables", until_ms=validation_ms))


def run(world: tuple[Path, Path, dict[str, str]], out: Path, tables: dict[str, AblationTable] = TOY, **changes: object) -> Results:
    log, tables_root, generations = world
    given = {"seeds": 2, "options": QUICK, "cells": TOY_CELLS, "generations": generations} | changes
    return ablate(DOMAIN, "home", log, tables_root, out, tables, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def results(world: tuple[Path, Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The toy table: (folder, results)."""
    out = tmp_path_factory.mktemp("out")
    return out, run(world, out)


@pytest.mark.parametrize("name", sorted(CELLS))
def test_every_cell_is_a_valid_ranker(name: str) -> None:
    cell = CELLS[name]
    refreshed = cell.vectors or "similarities" in cell.model
    if name.startswith("length_") or refreshed:  # the toy keeps few actions, and refreshes nothing
        with pytest.raises(AblationError, match="refresh" if refreshed else "sequence_length"):
            configured(DOMAIN, "home", cell)
        return
    ranker = configured(DOMAIN, "home", cell).ranker["home"]
    assert {key: getattr(ranker.model, key) for key in cell.model} == dict(cell.model)
    assert ranker.sequence_actions == (("click",) if cell.positives else ("click", "hide"))
    assert ranker.heads == DOMAIN.ranker["home"].heads


def test_every_table_names_cells_and_its_reference() -> None:
    for table in TABLES.values():
        assert table.reference in table.rows
        assert set(table.rows) <= set(CELLS)


def test_cells_that_see_the_same_share_packed_requests(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    tables = {**TOY, "more": AblationTable("", "bst_positives", dict.fromkeys(("bst_positives", "bst_all", "transact"), (None, None)))}
    runs, skipped = planned(DOMAIN, "home", tables, TOY_CELLS, 3)
    assert len(runs) == 5 * 3
    assert not skipped
    seen = [one.definition for one in runs]
    assert len(set(seen)) == 3
    assert sum(a != b for a, b in itertools.pairwise(seen)) == 2  # one after the other
    log, root, generations = world
    with pytest.MonkeyPatch.context() as patch:
        packs = []
        patch.setattr(ablate_module, "build_dataset", lambda *a, **b: packs.append(1) or build_dataset(*a, **b))
        ablate(
            DOMAIN, "home", log, root, tmp_path, TOY, seeds=1, options=replace(QUICK, epochs=1), cells=TOY_CELLS, generations=generations
        )
    assert len(packs) == 2


def test_finished_runs_are_kept_and_others_run_again(world: tuple[Path, Path, dict[str, str]], results: tuple[Path, Results]) -> None:
    out, first = results
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate_module, "train", lambda *_, **__: pytest.fail("it ran again"))
        patch.setattr(ablate_module, "build_dataset", lambda *_, **__: pytest.fail("it packed again"))
        again = run(world, out)
        assert again.of.keys() == first.of.keys()
        for key, (_, probabilities) in first.of.items():
            np.testing.assert_array_equal(again.of[key][1], probabilities)
    kept = {path: path.read_bytes() for path in out.rglob("result.json")}
    assert len(kept) == 6
    assert not list(out.rglob("training"))

    def again_trained(*_: object, **__: object) -> None:
        raise ArithmeticError("it runs again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate_module, "train", again_trained)
        with pytest.raises(ArithmeticError):
            run(world, out, options=replace(QUICK, learning_rate=1e-4))


def test_an_interrupted_run_goes_on(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    whole = run(world, tmp_path / "whole", seeds=1)
    original, calls = ablate_module.train, []

    def interrupted(*given: object, **named: object) -> object:
        calls.append(given)
        if len(calls) == 2:

            def stop(_: object) -> None:
                raise KeyboardInterrupt

            named["after_epoch"] = stop
        return original(*given, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate_module, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "cut", seeds=1)
    assert len(list((tmp_path / "cut").rglob("result.json"))) == 1
    assert list((tmp_path / "cut").rglob("epoch-0001-*"))
    resumed = run(world, tmp_path / "cut", seeds=1)
    for key, (_, probabilities) in whole.of.items():
        np.testing.assert_array_equal(resumed.of[key][1], probabilities)


def test_the_tables_say_what_was_measured(results: tuple[Path, Results], tmp_path: Path) -> None:
    _, of = results
    found = summary(DOMAIN, "home", of, TOY)
    json.dumps(found, allow_nan=False)
    click = found["cells"]["transact"]["heads"]["click"]
    values = [of.of["transact", seed][0]["heads"]["click"]["auc"] for seed in range(2)]
    assert click["auc"]["mean"] == pytest.approx(np.mean(values))
    assert click["auc"]["spread"] == pytest.approx(np.std(values, ddof=1))
    against = found["tables"]["toy"]["rows"]["transact"]["against_reference"]["click"]
    base = found["cells"]["no_sequence"]["heads"]["click"]
    assert against["auc"]["mean"] == pytest.approx(click["auc"]["mean"] - base["auc"]["mean"])
    assert against["auc"]["low"] < against["auc"]["mean"] < against["auc"]["high"]
    assert against["hit_lift_percent"]["mean"] == pytest.approx(100 * (click["hit"]["mean"] / base["hit"]["mean"] - 1))
    means = {}
    for cell in ("transact", "no_sequence"):
        ranks = [reciprocal_ranks(of.of[cell, seed][1][:, 0], of.truth.labels[:, 0], of.truth.request_row) for seed in range(2)]
        means[cell] = np.mean([user_means(of_request, of.truth.users)[1].mean() for of_request in ranks])
    assert against["mrr"]["mean"] == pytest.approx(means["transact"] - means["no_sequence"])
    assert against["mrr_lift_percent"]["mean"] == pytest.approx(100 * (means["transact"] / means["no_sequence"] - 1))
    assert against["mrr_lift_percent"]["low"] < against["mrr_lift_percent"]["mean"] < against["mrr_lift_percent"]["high"]
    assert found["lower_is_better"] == ["hide"]
    assert found["tables"]["toy"]["rows"]["no_sequence"]["against_reference"] is None
    rows = rows_of(found, "toy", "hide")
    assert [len(row) for row in rows] == [len(COLUMNS)] * 3
    assert [row[7] for row in rows] == ["+0.00", "-14.86", ""]
    assert [row[7] for row in rows_of(found, "toy", "click")] == ["+0.00", "+9.40", ""]
    lifts = [row[COLUMNS.index("MRR lift % (95 %)")] for row in rows_of(found, "toy", "click")]
    assert [" to " in lift for lift in lifts] == [False, True, True]
    text = markdown(found, "freshrank ablate --table toy")
    assert "candidates as the log has them, none sampled;" in text
    assert "head hide (lower is better)" in text
    assert text.count("| transact |") == 2
    assert len(terminal_tables(found)) == 2
    plot_ablation(found, "toy", tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_say_which_candidates_were_drawn(tmp_path: Path) -> None:
    domain, log = imported(tmp_path / "news", clicks(hours=12))
    generations = newest_generations(publish_refreshed(domain, "home", log, tmp_path / "tables"))
    tables = {"t": AblationTable("", "no_sequence", dict.fromkeys(("no_sequence",), (None, None)))}
    of = ablate(
        domain,
        "home",
        log,
        tmp_path / "tables",
        tmp_path / "out",
        tables,
        seeds=1,
        options=replace(QUICK, epochs=1),
        generations=generations,
    )
    text = markdown(summary(domain, "home", of, tables), "freshrank ablate --table t")
    assert "candidates: what was clicked, and sampled negatives, 3 by item, of the 24 h before;" in text
    assert of.drawn is not None
    np.testing.assert_array_equal(of.drawn == AS_LOGGED, of.truth.labels[:, 0])
    assert DRAWN_COLUMNS[1] not in text  # of one kind only
    (log / IMPRESSIONS).write_bytes(_without_column(log / IMPRESSIONS, "drawn"))  # as logs were before
    assert _drawn(domain, "home", log, {}, of.truth) is None


def _without_column(path: Path, name: str) -> bytes:
    table = pq.read_table(path)
    out = io.BytesIO()
    pq.write_table(table.drop_columns([name]), out)
    return out.getvalue()


def test_mrr_among_each_kind_of_negatives_alone() -> None:
    """Users 1 and 2 with a list each: the clicked one first among the uniform ones, second and third among the popular ones."""
    drawn = np.array([AS_LOGGED, UNIFORM, POPULAR, POPULAR, AS_LOGGED, UNIFORM, POPULAR, AS_LOGGED, POPULAR], np.uint8)
    request_row = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])  # the third has no uniform one
    scores = np.array([0.5, 0.4, 0.6, 0.7, 0.5, 0.1, 0.9, 0.5, 0.2], np.float32)[:, None]
    truth = Scored(scores[:0], (drawn == AS_LOGGED)[:, None], request_row, np.array([1, 2, 2], np.uint64), np.arange(9))
    diverse = {"intra_list_distance": None, "category_entropy": None}
    heads = {"click": dict.fromkeys(OF_HEAD, 0.5)}
    of = {(name, seed): ({"heads": heads, "diversity": diverse}, scores * sign) for name, sign in (("a", 1), ("b", -1)) for seed in (0, 1)}
    domain = parse_domain(DOMAIN_TEXT, source="toy")
    clicks_only = domain.model_copy(
        update={"ranker": {"home": domain.ranker["home"].model_copy(update={"heads": {"click": domain.ranker["home"].heads["click"]}})}}
    )
    table = {"t": AblationTable("", "b", dict.fromkeys(("b", "a"), (None, None)))}
    about = {
        "ranker": "home",
        "requests": 3,
        "users": 2,
        "candidates": 9,
        "seeds": 2,
        "seconds_max": 1.0,
        "epochs_max": 1,
        "threads": 1,
        "negatives": None,
    }
    found = summary(clicks_only, "home", Results(truth, of, {}, about, drawn), table)
    figures = found["cells"]["a"]["heads"]["click"]
    assert figures["mrr_uniform"]["mean"] == 1.0
    assert figures["mrr_popular"]["mean"] == pytest.approx(np.mean([1 / 3, 1 / 2, 1]))
    by_user = {name: np.mean([popular[0], np.mean(popular[1:])]) for name, popular in (("a", [1 / 3, 1 / 2, 1]), ("b", [1, 1, 1 / 2]))}
    lift = found["tables"]["t"]["rows"]["a"]["against_reference"]["click"]["mrr_popular_lift_percent"]["mean"]
    assert lift == pytest.approx(100 * (by_user["a"] / by_user["b"] - 1))
    assert found["cells"]["b"]["heads"]["click"]["mrr_uniform"]["mean"] == 0.5
    against = found["tables"]["t"]["rows"]["a"]["against_reference"]["click"]
    assert against["mrr_uniform_lift_percent"]["mean"] == pytest.approx(100.0)
    rows = drawn_rows(found, "t", "click")
    assert [len(row) for row in rows] == [len(DRAWN_COLUMNS)] * 2
    assert " | ".join(DRAWN_COLUMNS) in markdown(found, "freshrank ablate")


def test_rows_of_all_cells_are_the_same_examples(world: tuple[Path, Path, dict[str, str]], results: tuple[Path, Results]) -> None:
    _, of = results
    log, root, generations = world
    dataset, _ = build_dataset(DOMAIN, "home", log, root, generations=generations)
    np.testing.assert_array_equal(of.truth.labels, dataset.labels[of.truth.rows])
    np.testing.assert_array_equal(np.diff(of.truth.rows), 1)
    assert of.truth.rows[-1] == len(dataset.labels) - 1
    users = dataset.user_id[-len(of.truth.users) :]
    np.testing.assert_array_equal(of.truth.users, np.unique(users, return_inverse=True)[1])  # who is who, not who


def test_the_baseline_is_a_cell(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    tables = {"b": AblationTable("", "lambdamart", dict.fromkeys(("lambdamart", "gbdt", "no_sequence"), (None, None)))}
    of = run(world, tmp_path, tables, seeds=1, options=replace(QUICK, epochs=1, seconds_max=2.0))
    assert of.of["lambdamart", 0][0]["baseline"]["compares_within"] == "request"
    assert summary(DOMAIN, "home", of, tables)["tables"]["b"]["rows"]["gbdt"]["against_reference"]["click"]["auc"]["mean"] is not None


def test_cells_of_ones_own_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "cells.toml"
    path.write_text('[cell.wide]\nmodel = { hidden = [32] }\n[table.mine]\nreference = "transact"\nrows = ["transact", "wide"]\n')
    cells, tables = read_tables(path)
    assert configured(DOMAIN, "home", cells["wide"]).ranker["home"].model.hidden == (32,)
    assert tables["mine"].rows == {"transact": (None, None), "wide": (None, None)}
    for wrong in (
        '[table.mine]\nreference = "x"\nrows = ["x"]',
        "[table.mine]\nrows = []",
        "[cell.a]\nsize = 3",
        "=",
        '[table.m]\nreference = "gbdt"\nrows = []',
    ):
        path.write_text(wrong)
        with pytest.raises(AblationError, match=str(path)):
            read_tables(path)
    with pytest.raises(AblationError, match="sequence_length"):
        planned(DOMAIN, "home", {"t": AblationTable("", "long", {"long": (None, None)})}, TOY_CELLS, 1)


def test_the_command_lists_tables_and_writes_its_results(world: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    assert "bst_positives" in CliRunner().invoke(cli.app, ["ablate"]).output
    unknown = CliRunner().invoke(cli.app, ["ablate", "--table", "nothing"])
    assert isinstance(unknown.exception, AblationError)
    (tmp_path / "toy.toml").write_text(DOMAIN_TEXT)
    home = tmp_path / "home"
    (home / "logs").mkdir(parents=True)
    (home / "logs" / "toy").symlink_to(world[0])
    given = ["ablate", "--table", "fusion", "--seeds", "1", "--epochs", "1", "--seconds", "30", "--threads", "1"]
    result = CliRunner().invoke(cli.app, [*given, "--domain", str(tmp_path / "toy.toml"), "--home", str(home)])
    assert result.exit_code == 0, result.output
    out = home / "ablation" / "home"
    assert sorted(path.name for path in out.iterdir()) == ["ablation.json", "ablation.md", "cells", "fusion.png", "truth.npz"]
    found = json.loads((out / "ablation.json").read_text())
    assert set(found["cells"]) == {"transact", "candidate_token"}
    assert found["about"]["threads"] == 1
    assert parse_domain(DOMAIN_TEXT, source="toy") == DOMAIN

"""Every metric of a ranking server is exposed and moves; its dashboard and its part of the manual say what it exposes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from serving_world import DOMAIN, NOW_MS, VIDEO, make_events, write_ranker, write_tables
from test_worker_metrics import metrics_in
from worker_world import scraped

from features.pack import Packer, RankInputs
from features.tables import TableSet
from inference.server_metrics import CODES, METRICS, PREFIX, ServerMetrics, exposed_names
from inference.telemetry import HISTOGRAMS, STAGES, Telemetry

DEPLOY = Path(__file__).parents[2] / "deploy"
PARTS = ("releases_", "sink_", "reader_", "in_flight", "waiting", "limit", "shed", "door_")


@pytest.fixture(scope="module")
def packed_and_served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    generations = write_tables(folder / "tables", created_ms=NOW_MS - 5_000)
    release = write_ranker(folder / "releases", generations, "home")
    packer = Packer(DOMAIN, "home", TableSet.open(folder / "tables", DOMAIN, "home"))
    inputs = RankInputs(7, NOW_MS, make_events(12), np.arange(1, 31, dtype=np.uint64), np.full(30, VIDEO, np.uint8))
    return packer.pack(inputs), SimpleNamespace(release=release, packer=packer)


def rank_once(telemetry: Telemetry, packed, seconds: float) -> None:
    """What a ranking reports, every counter with it."""
    for stage in STAGES:
        telemetry.time(stage, seconds)
    for metric in METRICS:
        if metric.source and not metric.source.startswith(PARTS):
            telemetry.count(metric.source)
    for name in ("rankings", "tier_embedding", "model_timeouts", "sequence_older", "status_internal"):
        telemetry.count(name)
    telemetry.observe_inputs(packed, 40)
    telemetry.observe("loop_lag_seconds", 0.002)


def test_every_metric_is_exposed_and_moves(packed_and_served):
    packed, served = packed_and_served
    telemetry, state = Telemetry(), {"moved": 1.0, "now_s": NOW_MS / 1e3}
    figures = {metric.source for metric in METRICS if metric.source.startswith(PARTS)} | {"door_refused_forbidden"}
    metrics = ServerMetrics(
        telemetry,
        lambda: dict.fromkeys(figures, state["moved"]),
        lambda: {"home": served},
        lambda: state["moved"] > 1,
        lambda: state["now_s"],
    )
    rank_once(telemetry, packed, 0.0035)
    before, types = scraped(metrics.exposition().decode())
    state |= {"moved": 2.0, "now_s": NOW_MS / 1e3 + 9}
    rank_once(telemetry, packed, 0.3)
    after, _ = scraped(metrics.exposition().decode())
    for metric in METRICS:
        family = PREFIX + metric.name.removesuffix("_total")
        assert types[family] == metric.kind, metric.name
        names = [f"{family}_bucket", f"{family}_count", f"{family}_sum"] if metric.kind == "histogram" else [PREFIX + metric.name]
        for name in names:
            labels = {label for sample in after[name] for label, _ in sample}
            assert labels == ({metric.label} if metric.label else set()) | ({"le"} if name.endswith("_bucket") else set()), name
            if metric.name not in ("resident_memory_bytes", "cpu_seconds_total"):  # a quick process may use no tick in between
                assert after[name] != before[name], name
    assert {name for name in after if name.startswith(PREFIX)} == exposed_names()
    assert after[PREFIX + "table_age_seconds"] == {(("space", "features"),): 14, (("space", "home_items"),): 14}
    assert after[PREFIX + "release_age_seconds"] == {(("ranker", "home"),): 9}
    assert after[PREFIX + "rankings_total"][("tier", "embedding"),] == 2
    assert after[PREFIX + "calls_total"] == {(("code", code),): 2 * (code in ("ok", "internal")) for code in CODES}
    assert after[PREFIX + "refused_total"] == {(("reason", "forbidden"),): 2}
    assert after[PREFIX + "candidates_sum"] == {(): 60}
    assert after[PREFIX + "sequence_age_seconds_sum"] == {(): 2}  # make_events ends a second before NOW_MS
    assert after[PREFIX + "state_age_seconds_sum"][()] == pytest.approx(0.08)
    total = {dict(labels)["le"]: n for labels, n in after[PREFIX + "stage_seconds_bucket"].items() if ("stage", "total") in labels}
    assert (total["0.003"], total["0.004"], total["0.2"], total["0.5"], total["+Inf"]) == (0, 1, 1, 2, 2)


def test_a_fresh_server_exposes_its_counters_at_zero_and_no_figure_that_a_part_has_not():
    samples, types = scraped(ServerMetrics(Telemetry(), dict, dict, lambda: False).exposition().decode())
    assert samples[PREFIX + "shed_total"] == {(): 0}
    assert set(samples[PREFIX + "calls_total"]) == {(("code", code),) for code in CODES}
    assert PREFIX + "models_in_use" in types
    assert PREFIX + "models_in_use" not in samples


def test_what_has_no_age_is_not_observed(packed_and_served):
    telemetry = Telemetry()
    packed = packed_and_served[0]
    telemetry.observe_inputs(packed, -1)  # a reader that does not know the age
    assert sum(telemetry.histograms()["state_age_seconds"].counts) == 0
    assert sum(telemetry.histograms()["candidates"].counts) == 1


def test_the_dashboard_shows_metrics_that_exist_and_every_metric():
    dashboard = json.loads((DEPLOY / "grafana" / "serving.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = {name for panel in panels for target in panel["targets"] for name in metrics_in(target["expr"])}
    assert asked <= exposed_names(), asked - exposed_names()
    shown = {name.removeprefix(PREFIX) for name in asked}
    assert {metric.name for metric in METRICS if not any(name.startswith(metric.name) for name in shown)} == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    for panel in panels:
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_manual_lists_every_metric_as_it_is(metric):
    manual = (DEPLOY.parent / "docs" / "operations.md").read_text()
    assert f"| {PREFIX}{metric.name} | {metric.kind} | {metric.label or '-'} | {metric.help} |" in manual
    assert metric.help.endswith(".")
    assert (metric.kind == "counter") == metric.name.endswith("_total")


def test_histograms_that_can_be_observed_are_exposed():
    assert {metric.name for metric in METRICS if metric.kind == "histogram"} == {"stage_seconds", *HISTOGRAMS}

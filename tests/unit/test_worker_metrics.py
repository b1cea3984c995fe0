"""Every metric of the list is exposed and moves; dashboards and alerts ask only for metrics that exist."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from worker_world import applied, scraped

from features.described import Histogram
from inference.server_metrics import exposed_names as server_names
from streams.metrics import METRICS, PREFIX, REASON_KINDS, VISIBLE_BOUNDS_MS, WorkerMetrics, exposed_names
from streams.rates import Rate
from streams.reader_metrics import exposed_names as reader_names

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS_OWN = {"up"}


def sources(moved: float) -> tuple[dict, dict, dict]:
    """Health, statistics and windows in which every figure is `moved`."""
    own = {metric.source: moved for metric in METRICS if metric.source}
    partitions = {str(n): {metric.source: moved for metric in METRICS if metric.label == "partition" and metric.source} for n in (0, 3)}
    health = {"healthy": True, "caught_up": moved > 1, "partitions": partitions}
    health |= {"snapshots": {0: {"offset": 5, "age_s": moved}}, "restores": {3: moved / 4}}
    return health, own, {0: Rate(100, 1, moved, 0, moved * 1000)}


def test_every_metric_is_exposed_and_moves():
    state = {"moved": 1.0}
    metrics = WorkerMetrics(*(lambda i=i: sources(state["moved"])[i] for i in range(3)))
    now_ms = time.time_ns() // 1_000_000
    metrics.observe(applied([now_ms - 3_000], partition=3, reasons=None))
    metrics.observe(applied([now_ms], reasons={0: "value: bad"}))
    before, types = scraped(metrics.exposition().decode())
    state["moved"] = 2.0
    started_s = time.process_time()
    while time.process_time() < started_s + 0.03:  # the kernel counts CPU time in hundredths
        pass
    metrics.observe(applied([now_ms, now_ms - 70_000], partition=3))
    metrics.observe(applied([now_ms], reasons={0: "value: bad"}))
    after, _ = scraped(metrics.exposition().decode())
    for metric in METRICS:
        family = PREFIX + metric.name.removesuffix("_total")
        assert types[family] == metric.kind, metric.name
        names = [f"{family}_bucket", f"{family}_count", f"{family}_sum"] if metric.kind == "histogram" else [PREFIX + metric.name]
        for name in names:
            assert name in exposed_names()
            labels = {label for sample in after[name] for label, _ in sample}
            assert labels == ({metric.label} if metric.label else {"le"} if name.endswith("_bucket") else set()), name
            if metric.name not in ("healthy", "partitions", "resident_memory_bytes"):  # memory that was freed before may be used again
                assert after[name] != before[name], name
    assert all(value > 1 << 20 for value in after[PREFIX + "resident_memory_bytes"].values())
    assert {name for name in after if name.startswith(PREFIX)} == exposed_names()
    assert after[PREFIX + "events_total"] == {(("partition", "0"),): 2, (("partition", "3"),): 3}
    dead = {dict(labels)["reason"]: count for labels, count in after[PREFIX + "dead_letters_total"].items()}
    assert dead == {**dict.fromkeys(REASON_KINDS, 0), "value": 2}
    assert after[PREFIX + "visible_seconds_count"] == {(): 3}  # what was rejected never becomes visible


def test_what_has_no_source_yet_has_no_sample():
    metrics = WorkerMetrics(lambda: {"healthy": False, "caught_up": False, "partitions": {}}, dict)
    samples, types = scraped(metrics.exposition().decode())
    assert PREFIX + "snapshot_age_seconds" in types
    assert PREFIX + "snapshot_age_seconds" not in samples
    assert samples[PREFIX + "healthy"] == {(): 0}


def test_a_histogram_counts_as_a_loop_would():
    random = np.random.default_rng(5)
    histogram = Histogram(VISIBLE_BOUNDS_MS)
    values = [random.integers(0, high, n) for high, n in ((2, 10), (70_000, 500), (1, 3), (100_000_000, 20))]
    for part in [*values, np.array([5, 5]), np.array([], np.int64), np.array(VISIBLE_BOUNDS_MS)]:
        histogram.add_all(part)
    every = np.concatenate([*values, [5, 5], VISIBLE_BOUNDS_MS])
    expected = [float((every <= bound).sum()) for bound in VISIBLE_BOUNDS_MS] + [float(len(every))]
    assert [count for _, count in histogram.buckets(1e-3)] == expected
    assert histogram.buckets(1e-3)[0][0] == "0.001"
    assert histogram.buckets(1e-3)[-1][0] == "+Inf"
    assert histogram.total == every.sum()


def metrics_in(expression: str) -> set[str]:
    """Names in a query that are neither functions nor words of the language."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on) \([^)]*\)", " ", expression)
    return set(re.findall(r"[a-z_]\w*(?!\w|\s*\()", bare)) - {"and", "or", "unless"}


def test_queries_are_taken_apart():
    assert metrics_in('up{job="x"} == 0') == {"up"}
    assert metrics_in('rate(a_total{i=~"$x"}[5m]) / (sum by (le) (rate(b_total[$__rate_interval])) + c > 0.5 and d)') == {
        "a_total",
        "b_total",
        "c",
        "d",
    }


def test_alerts_ask_for_metrics_that_exist_and_have_a_runbook():
    rules = [rule for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    assert len(rules) >= 10
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        asked = metrics_in(rule["expr"])
        assert asked, rule["alert"]
        known = exposed_names() | reader_names() | server_names() | PROMETHEUS_OWN
        assert asked <= known, (rule["alert"], asked - known)
        assert rule["annotations"]["runbook"].endswith("."), rule["alert"]
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_dashboard_shows_metrics_that_exist_and_every_metric():
    dashboard = json.loads((DEPLOY / "grafana" / "streams.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = {name for panel in panels for target in panel["targets"] for name in metrics_in(target["expr"])}
    assert asked <= exposed_names() | reader_names(), asked - exposed_names() - reader_names()
    assert reader_names() <= asked
    shown = {name.removeprefix(PREFIX) for name in asked}
    missing = {metric.name for metric in METRICS if not any(name.startswith(metric.name) for name in shown)}
    assert missing == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_carry_their_unit_and_help_is_a_sentence(metric):
    assert metric.help.endswith(".")
    assert (metric.kind == "counter") == metric.name.endswith("_total")


def test_the_manual_lists_every_metric_and_alert_as_it_is():
    manual = (DEPLOY.parent / "docs" / "operations.md").read_text()
    for metric in METRICS:
        assert f"| {PREFIX}{metric.name} | {metric.kind} | {metric.label or '-'} | {metric.help} |" in manual
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert f"| {rule['alert']} ({rule['labels']['severity']}) | `{rule['expr']}`" in manual
            assert f"| {rule['annotations']['runbook']} |" in manual

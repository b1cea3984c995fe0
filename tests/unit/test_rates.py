"""Reports of rates, and their fold into windows."""

import pytest
from worker_world import applied

from streams import rates
from streams.rates import RateReporter, Report, fold, summarise


def test_reports_survive_the_topic():
    report = Report(3, 1_780_000_000, "ab12cd34", 500, 2, 40)
    assert Report.decode(report.encode()) == report
    for wrong in (b"", b"[]", b"{}", b'{"partition": "x"}', b"\xff"):
        with pytest.raises(ValueError, match="not a rate report"):
            Report.decode(wrong)


def test_the_fold_is_idempotent_and_adds_workers_and_seconds():
    reports = [Report(0, 100, "a", 50, 1, 30), Report(0, 101, "a", 30, 0, 90), Report(0, 101, "b", 20, 0, -1)]
    window: rates.Window = {}
    for report in [*reports, *reports[::-1]]:
        window = fold(window, report)
    assert summarise(100.0, window, now_s=1_000.0) == (100, 100, 10.0, 1, 90)
    assert summarise(100.0, window, now_s=104.0).events_per_s == 25.0
    assert summarise(100.0, {}, now_s=1_000.0) == (100, 0, 0.0, 0, -1)


def test_a_second_is_reported_once_and_only_when_it_is_over(monkeypatch):
    now_ns = 1_780_000_000_000_000_000
    monkeypatch.setattr(rates.time, "time_ns", lambda: now_ns)
    now_ms = now_ns // 1_000_000
    reporter = RateReporter()
    reporter.observe(applied(append_times_ms=[now_ms - 30, now_ms - 5]))
    reporter.observe(applied(append_times_ms=[now_ms - 70], reasons={0: "value: bad"}))
    assert reporter.drain() == []
    now_ns += 1_000_000_000
    (report,) = reporter.drain()
    assert (report.partition, report.second, report.events, report.dead_letters, report.visible_ms_max) == (0, 1_780_000_000, 3, 1, 30)
    assert reporter.drain(everything=True) == []
    reporter.observe(applied(append_times_ms=[now_ms], reasons={0: "value: bad"}))
    assert [report.visible_ms_max for report in reporter.drain(everything=True)] == [-1]

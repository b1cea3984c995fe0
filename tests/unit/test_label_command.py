"""What `freshrank label` takes and says."""

import pytest
import typer

from deploy.label_report import LabelReport
from deploy.wording import parse_duration
from features.labels import OUTCOMES
from features.parity import EXCLUSIONS


def test_durations_are_numbers_with_units():
    assert [parse_duration(text, "--window") for text in ("90s", "15m", "1h", "7d")] == [90_000, 900_000, 3_600_000, 604_800_000]
    for wrong in ("", "1", "h", "-1h", "15min", "1 week"):
        with pytest.raises(typer.BadParameter, match="number with a unit"):
            parse_duration(wrong, "--window")


def counts(**more):
    names = ("lists", "new", "added", "only_seen", "rows_known", "rows_inline", "rows_rebuilt", "unproved", "undecodable", "stays")
    found = dict.fromkeys(names, 1) | dict.fromkeys(("differs", "torn", "stays_until_ms"), 0)
    found |= {"join": {"written": 2, "by_id": 3}, "rankers": {"home": 1}, "labels": {"2": 5}}
    return found | {"outcomes": [1] * len(OUTCOMES), "excluded": {"not_packed": 1}} | more


def test_a_report_adds_buckets_and_says_what_is_wrong():
    report = LabelReport()
    for _ in range(2):
        report.add(counts(), {2: "click"})
    assert (report.lists, report.labels, report.join, report.rankers) == (2, {"click": 10}, {"written": 4, "by_id": 6}, {"home": 2})
    assert report.outcomes == dict.fromkeys(OUTCOMES, 2)
    assert report.ok, "a tier that logs no digest is no fault"
    assert "click 10" in report.to_text()
    assert "2 lists stay as they were" in report.to_text()
    assert "LOOK" not in report.to_text()
    for fault, said in (
        (counts(excluded={"log_cut": 3}), EXCLUSIONS["log_cut"]),
        (counts(differs=1), "not those that were served"),
        (counts(torn=2), "2 new lists: retention has taken actions"),
    ):
        other = LabelReport()
        other.add(fault, {2: "click"})
        assert not other.ok
        assert said in other.to_text()
    silent = LabelReport()
    silent.add(counts(only_seen=0), {2: "click"})
    assert "no impression" in silent.to_text()
    assert LabelReport().ok, "nothing served is no fault"

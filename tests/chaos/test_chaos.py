"""Twenty kills and every other fault on real parts: `freshrank chaos` as CI runs it; docs/streams.md has the longer run's result."""

import pytest
from rich.console import Console

from deploy.chaos import run_chaos

pytestmark = pytest.mark.servers


def test_nothing_is_lost_or_counted_twice_under_chaos():
    report = run_chaos(20, 1, Console(stderr=True), outage_s=10.0)
    assert report.ok, report.to_text()
    assert sum(report.kills.values()) >= 20
    assert set(report.other_faults) == {"a frozen worker", "a rebalance while restoring", "a full disk", "10 s without brokers"}
    assert report.acknowledged > 1_000

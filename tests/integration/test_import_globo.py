"""Globo's clicks through the shipped domain file, against a plain reading of the file."""

import csv
import gzip
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from features.domain import load_domain
from features.logs import read_actions, read_requests
from streams.importer import import_log

ROOT = Path(__file__).parents[2]
FILE = Path(os.environ.get("FRESHRANK_DATA", ROOT.parent / "shared" / "data")) / "globo" / "clicks_sample_12000users.csv.gz"


@pytest.mark.skipif(not FILE.exists() and os.environ.get("CI") != "true", reason=f"{FILE} is not there (no terms, so not shipped)")
def test_clicks_become_requests_with_what_was_clicked_the_day_before(tmp_path):
    domain = load_domain(ROOT / "domains" / "globo.toml")
    summary = import_log(domain, FILE.parent, tmp_path, created_ms=1, memory_bytes=64 << 20)
    with gzip.open(FILE, "rt", newline="") as file:
        rows = list({tuple(row.items()): row for row in csv.DictReader(file)}.values())
    assert summary["rejected"] == {}
    assert sum(map(len, read_actions(tmp_path, domain))) == summary["actions"] > 0.99 * len(rows)
    sampled = summary["negatives"]
    assert sampled["requests"] / len(rows) == pytest.approx(0.2, abs=0.02)
    assert sampled["negatives"] / sampled["requests"] > 19.9
    clicked = defaultdict(list)
    of_user = defaultdict(set)
    for row in rows:
        clicked[int(row["click_article_id"])].append(int(row["click_timestamp"]))
        of_user[int(row["user_id"])].add((int(row["click_article_id"]), int(row["click_timestamp"])))
    times = {item: np.sort(np.array(moments)) for item, moments in clicked.items()}
    day_ms, looked_at = 86_400_000, 0
    for batch in read_requests(tmp_path, domain):
        for i in range(0, len(batch), 211):
            looked_at += 1
            user, at_ms, span = int(batch.user_id[i]), int(batch.request_time_ms[i]), range(batch.starts[i], batch.starts[i + 1])
            known = {item for item, ms in of_user[user] if ms < at_ms}
            for n in span:
                item = int(batch.entity_id[n])
                before = int(np.searchsorted(times[item], at_ms))
                assert item not in known
                assert batch.features["clicks_24h"].values[n] >= 1  # of the one clicked too: nothing tells it apart by itself
                assert batch.features["clicks_24h"].values[n] == before - np.searchsorted(times[item], at_ms - day_ms)
                if len(batch.labels[batch.label_starts[n] : batch.label_starts[n + 1]]):
                    assert (item, at_ms) in of_user[user]
                assert batch.features["age"].values[n] == np.float32(at_ms - times[item][0])
    assert looked_at > 200

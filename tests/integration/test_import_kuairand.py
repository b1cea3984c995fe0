"""The publishers' KuaiRand files through the shipped domain file, against what a plain reading of the CSV says."""

import csv
import gzip
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from deploy.simulator import KUAIRAND_FILES, write_kuairand_like
from features.domain import load_domain
from features.ids import derived_event_id, string_id
from features.logs import read_actions, read_requests
from features.tables import open_generation
from streams.importer import import_log

ROOT = Path(__file__).parents[2]
FLAGS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "hate": "is_hate",
    "profile_enter": "is_profile_enter",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = Path(os.environ.get("FRESHRANK_DATA", ROOT.parent / "shared" / "data")) / "kuairand-pure"
    if folder.is_dir():
        return folder
    assert os.environ.get("CI") != "true", f"{folder}: KuaiRand is required where CI=true"
    print(f"{folder} is not there: a generated log in its format takes its place")
    folder = tmp_path_factory.mktemp("kuairand")
    write_kuairand_like(folder)
    return folder


@pytest.fixture(scope="module")
def rows(data):
    path = data / KUAIRAND_FILES[0]
    with path.open(newline="") if path.exists() else gzip.open(f"{path}.gz", "rt", newline="") as file:
        return list({tuple(row.items()): row for row in csv.DictReader(file)}.values())


@pytest.fixture(scope="module")
def imported(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("log")
    domain = load_domain(ROOT / "domains" / "kuairand.toml")
    return domain, out, import_log(domain, data, out, created_ms=1, memory_bytes=64 << 20)


def test_every_row_and_every_flag_is_an_action(imported, rows):
    domain, out, summary = imported
    assert summary["rejected"] == {}
    batches = list(read_actions(out, domain))
    events, users = np.concatenate([batch.events for batch in batches]), np.concatenate([batch.users for batch in batches])
    count = Counter(events["action"].tolist())
    expected = {"impression": len(rows)} | {name: sum(row[column] == "1" for row in rows) for name, column in FLAGS.items()}
    assert {name: count[domain.actions[name].id] for name in expected} == expected
    append_time_ms = np.concatenate([batch.append_time_ms for batch in batches])
    assert (np.diff(append_time_ms) >= 0).all()
    assert (append_time_ms == events["event_time_ms"]).all()
    assert len(np.unique(np.stack([users, events["event_id"]]), axis=1).T) == len(events)
    row = rows[len(rows) // 2]
    time_ms, user, video = int(row["time_ms"]), int(row["user_id"]), int(row["video_id"])
    found = events[(users == user) & (events["event_time_ms"] == time_ms) & (events["action"] == 1)]
    assert found["event_id"].tolist() == [derived_event_id(user, 1, video, 1, time_ms)]
    assert found["value"].tolist() == [np.float32(row["play_time_ms"])]
    assert found["surface"].tolist() == [int(row["tab"]) + 1]


def test_requests_are_what_a_plain_reading_makes(imported, rows):
    domain, out, _ = imported
    gap_ms = domain.log.request_gap_ms
    by_user = defaultdict(list)
    for row in rows:
        by_user[int(row["user_id"])].append((int(row["time_ms"]), int(row["video_id"]), row))
    expected = {}
    for user, shown in by_user.items():
        last_ms = None
        for time_ms, video, row in sorted(shown, key=lambda item: item[:2]):
            if last_ms is None or time_ms - last_ms >= gap_ms:
                first_ms = time_ms
            last_ms = time_ms
            answers = {domain.actions[name].id for name, column in FLAGS.items() if row[column] == "1"}
            expected.setdefault((user, first_ms), {}).setdefault(video, set()).update(answers)
    found = {}
    last_key = (0, 0)
    for batch in read_requests(out, domain):
        for n in range(len(batch)):
            key = int(batch.request_time_ms[n]), int(batch.request_id[n])
            assert key > last_key
            last_key = key
            span = range(int(batch.starts[n]), int(batch.starts[n + 1]))
            labels = {int(batch.entity_id[i]): set(batch.labels[batch.label_starts[i] : batch.label_starts[i + 1]].tolist()) for i in span}
            assert len(labels) == len(span)
            found[int(batch.user_id[n]), int(batch.request_time_ms[n])] = labels
    assert found == expected


def test_item_and_user_features_are_the_files(imported, data):
    domain, out, _ = imported
    tables = open_generation(out / "tables", "features", verify=True)
    plain = data / KUAIRAND_FILES[2]
    with plain.open(newline="") if plain.exists() else gzip.open(f"{plain}.gz", "rt", newline="") as file:
        videos = {int(row["video_id"]): row for row in csv.DictReader(file)}
    several = next(video for video, row in videos.items() if row["tag"].count(",") == 1)
    unknown_length = next(video for video, row in videos.items() if not row["video_duration"])
    row, other, nothing = tables.rows("item.video", np.array([several, unknown_length, 2**63], np.uint64))
    assert tables.column("item.video", "tag")[row].tolist() == [*map(string_id, videos[several]["tag"].split(",")), 0, 0]
    assert tables.column("item.video", "author_id")[row] == string_id(videos[several]["author_id"])
    assert np.isnan(tables.column("item.video", "video_duration")[other])
    assert nothing == 0
    assert len(tables.ids("item.video")) == len(videos)
    assert {name for name, feature in domain.features.items() if tables.column("user", name) is None} == {
        name for name, feature in domain.features.items() if feature.side != "user"
    }

"""Counters as of a moment against loops over the records; the trees find what the counters hold."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_refreshed import clicks, imported
from test_training import CLICK, DOMAIN, HIDE, SHOWN, START_MS, Log

from features.as_of import AsOf
from features.logs import read_actions, read_requests
from inference.baseline import DAY_MS, LATEST, PRIOR, BaselineError, Columns, boosted, columns_of
from inference.dataset import Dataset, build_dataset
from inference.embeddings import publish_embeddings
from inference.metrics import auc
from inference.refreshed import publish_refreshed


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 30)), max_size=20),
    st.lists(st.tuples(st.integers(-1, 5), st.integers(-10, 40)), min_size=1, max_size=10),
    st.integers(0, 30),
    st.sampled_from([1, 2**56]),
)
def test_as_of_counts_what_was_there_before(records: list[tuple[int, int]], asked: list[tuple[int, int]], window: int, unit: int) -> None:
    """Also where times are as far apart as numbers can be."""
    group, time = np.array(records, np.int64).reshape(-1, 2).T
    of, moment = np.array(asked, np.int64).T
    counts = AsOf(group, time * unit)
    assert counts.before(of, moment * unit).tolist() == [sum(g == q and t < m for g, t in records) for q, m in asked]
    within = [sum(g == q and m - window <= t < m for g, t in records) for q, m in asked]
    assert counts.before(of, moment * unit, (moment - window) * unit).tolist() == within
    for found, (q, _) in zip(counts.first(of).tolist(), asked, strict=True):
        times = [t * unit for g, t in records if g == q]
        assert found == min(times) if times else np.isnan(found)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset, Columns]:
    """A random log over 40 days: (log, dataset, columns)."""
    folder = tmp_path_factory.mktemp("baseline")
    random = np.random.default_rng(4)
    log = Log()
    for _ in range(400):
        user, item = int(random.integers(0, 5)), int(random.integers(0, 6))
        append_ms = START_MS + int(random.integers(0, 40 * DAY_MS))
        action = int(random.choice([SHOWN, SHOWN, CLICK, HIDE]))
        log.act(user, item, action, append_ms - int(random.integers(0, 1000)), append_ms=append_ms)
    for _ in range(60):
        items = random.choice(8, 4, replace=False).tolist()  # 6 and 7 are in no action
        log.request(int(random.integers(0, 6)), START_MS + int(random.integers(0, 41 * DAY_MS)), {item: [] for item in items})
    log.write(folder / "log")
    publish_embeddings(DOMAIN, "home", folder / "log", folder / "tables", until_ms=START_MS + 41 * DAY_MS, snapshots=1)
    dataset, _ = build_dataset(DOMAIN, "home", folder / "log", folder / "tables")
    return folder / "log", dataset, columns_of(DOMAIN, "home", folder / "log", dataset)


def test_columns_are_what_the_log_held_before_the_request(packed: tuple[Path, Dataset, Columns]) -> None:
    log, dataset, columns = packed
    assert columns.categories == ("hour", "labels_of_item")
    assert columns.values.shape == (len(dataset.labels), len(columns.names))
    column = {name: columns.values[:, i] for i, name in enumerate(columns.names)}
    (actions,), (requests,) = read_actions(log, DOMAIN), read_requests(log, DOMAIN)
    records = list(
        zip(
            actions.users.tolist(),
            actions.events["entity_id"].tolist(),
            actions.events["action"].tolist(),
            actions.append_time_ms.tolist(),
            strict=True,
        )
    )
    for i in range(len(dataset)):
        user, now = int(requests.user_id[i]), int(requests.request_time_ms[i])
        before = [record for record in records if record[3] < now]
        for row in range(int(requests.starts[i]), int(requests.starts[i + 1])):
            item = int(requests.entity_id[row])
            for days in (1, 7, 30):
                recent = [record for record in before if record[1] == item and record[3] >= now - days * DAY_MS]
                shown, clicks = sum(r[2] == SHOWN for r in recent), sum(r[2] == CLICK for r in recent)
                base = (sum(r[2] == CLICK for r in before) + 0.5) / (sum(r[2] == SHOWN for r in before) + 1)
                rate = (clicks + PRIOR * min(base, 1.0)) / (max(shown, clicks) + PRIOR)
                assert column[f"item_click_rate_{days}d"][row] == pytest.approx(rate, rel=1e-5)
                assert column[f"item_impressions_{days}d"][row] == pytest.approx(np.log1p(shown), abs=1e-5)
            times = [record[3] for record in before if record[1] == item]
            age = column["item_age_hours"][row]
            assert np.isnan(age) if not times else age == pytest.approx((now - min(times)) / 3_600_000, rel=1e-5)
            latest = [record for record in before if record[0] == user][-LATEST:]
            assert column["same_item_of_latest"][row] == sum(record[1] == item for record in latest)
            recent = [r for r in before if r[0] == user and r[3] >= now - 30 * DAY_MS]
            assert column["user_impressions_30d"][row] == pytest.approx(np.log1p(sum(r[2] == SHOWN for r in recent)), abs=1e-5)


def test_another_log_is_refused(packed: tuple[Path, Dataset, Columns], tmp_path: Path) -> None:
    log = Log()
    log.act(1, 1, CLICK, START_MS)
    log.request(1, START_MS + 1, {1: [CLICK]})
    with pytest.raises(BaselineError, match="pack it again"):
        columns_of(DOMAIN, "home", log.write(tmp_path), packed[1])


def test_cosines_are_those_of_the_refreshed_vectors(tmp_path: Path) -> None:
    domain, log = imported(tmp_path / "news", clicks(hours=12))
    publish_refreshed(domain, "home", log, tmp_path / "tables")
    dataset, _ = build_dataset(domain, "home", log, tmp_path / "tables")
    columns = columns_of(domain, "home", log, dataset, cosines=True)
    column = {name: columns.values[:, i] for i, name in enumerate(columns.names)}
    assert columns_of(domain, "home", log, dataset).names == columns.names[:-4]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        length = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / length) if length else float("nan")

    known = 0
    for i in range(0, len(dataset), 7):
        request = {name: values.astype(np.float64) for name, values in dataset.request(i).items()}
        for row, candidate in zip(range(*dataset.starts[i : i + 2]), request["candidate_embedding"], strict=True):
            found = [value for value in (cosine(candidate, action) for action in request["sequence_embedding"]) if value == value]
            wanted = [found[0], np.mean(found), max(found)] if found else [np.nan] * 3
            wanted += [cosine(candidate, request["user_embedding"])]
            got = [column[f"cosine_{name}"][row] for name in ("newest", "mean", "greatest", "user")]
            np.testing.assert_allclose(got, wanted, atol=1e-5)
            known += bool(found)
    assert known > 100


@pytest.mark.parametrize("kind", ["gbdt", "lambdamart", "rates"])
def test_the_trees_find_which_items_are_liked(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    log = Log()
    for number in range(300):
        now = START_MS + number * 600_000
        user = int(random.integers(0, 30))
        answers: dict[int, list[int]] = {}
        for item in random.choice(20, 6, replace=False).tolist():
            clicked = random.random() < (0.7 if item < 5 else 0.05)
            answers[item] = [CLICK] if clicked else []
            log.act(user, item, SHOWN, now + item)
            if clicked:
                log.act(user, item, CLICK, now + 1000 + item)
        log.request(user, now, answers)
    log.write(tmp_path / "log")
    publish_embeddings(DOMAIN, "home", tmp_path / "log", tmp_path / "tables", until_ms=START_MS + 200 * 600_000, snapshots=1)
    dataset, _ = build_dataset(DOMAIN, "home", tmp_path / "log", tmp_path / "tables")
    columns = columns_of(DOMAIN, "home", tmp_path / "log", dataset)
    parts = {"train": np.arange(200), "validation": np.arange(200, 240), "test": np.arange(240, 300)}
    found, about = boosted(kind, columns, dataset, parts, ("click", "hide"), seconds_max=2.0, threads=1)
    rows = dataset.candidate_rows(parts["test"])
    assert found.shape == (len(rows), 2)
    assert auc(found[:, 0], dataset.labels[rows, 0]) > 0.75
    assert abs(found[:, 0].mean() - dataset.labels[rows, 0].mean()) < 0.1
    assert np.ptp(found[:, 1]) == 0.0  # nothing was hidden: nothing to learn
    assert kind == "rates" or about["heads"]["click"]["trials"] >= 1
    assert about.get("compares_within") == ("request" if kind == "lambdamart" else None)


def test_where_lists_are_short_users_are_compared_with_each_other(tmp_path: Path) -> None:
    """One item a request, and who asks decides. Compared within a user's day, what followed a click would tell the click: trees would
    learn that a low rate is good."""
    random = np.random.default_rng(1)
    log, requests = Log(), 1800
    for number in range(requests):
        now, user, item = START_MS + number * 300_000, int(random.integers(0, 12)), int(random.integers(0, 20))
        clicked = random.random() < 0.1 + 0.06 * user
        log.act(user, item, SHOWN, now)
        if clicked:
            log.act(user, item, CLICK, now + 1000)
        log.request(user, now, {item: [CLICK] if clicked else []})
    log.write(tmp_path / "log")
    publish_embeddings(DOMAIN, "home", tmp_path / "log", tmp_path / "tables", until_ms=START_MS + requests * 200_000, snapshots=1)
    dataset, _ = build_dataset(DOMAIN, "home", tmp_path / "log", tmp_path / "tables")
    columns = columns_of(DOMAIN, "home", tmp_path / "log", dataset)
    parts = {"train": np.arange(1200), "validation": np.arange(1200, 1500), "test": np.arange(1500, requests)}
    found, about = boosted("lambdamart", columns, dataset, parts, ("click",), seconds_max=3.0, threads=1)
    assert about["compares_within"] == "500 candidates"
    assert auc(found[:, 0], dataset.labels[dataset.candidate_rows(parts["test"]), 0]) > 0.6

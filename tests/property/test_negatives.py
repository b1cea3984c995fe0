"""Sampled negatives against what a plain reading of the clicks allows, and how often each item is drawn."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.domain import DomainError, parse_domain
from features.logs import ACTIONS, AS_LOGGED, IMPRESSIONS, POPULAR, UNIFORM, read_actions, read_requests
from streams import negatives
from streams.buckets import item_keys, mixed
from streams.importer import import_log
from streams.negatives import _previous

T = 1_700_000_000_000
HOUR_MS = 3_600_000
DOMAIN = """
name = "news"
[entities]
article = 1
video = 2
[actions]
click = { id = 2, kind = "positive" }
like = { id = 3, kind = "positive" }
[sequence.main]
id = 1
[features.device]
side = "request"
kind = "category"
vocabulary = ["phone", "desk"]
[features.clicks]
side = "candidate"
kind = "number"
counter = { action = "click", window_ms = 3_600_000 }
[ranker.home]
sequence = "main"
item_space = "c"
features = ["device", "clicks"]
[ranker.home.heads.click]
actions = ["click"]
[log]
files = ["log.csv"]
user = "user"
entity = "item"
entity_kind = "article"
entity_kind_column = "kind"
time = "time"
negatives = { action = "click", uniform = 2, popular = 2, window_ms = 7_200_000 }
[[log.actions]]
action = "click"
[[log.actions]]
action = "like"
column = "liked"
"""


def imported(rows, folder, text=DOMAIN, **options):
    """Rows (user, item, kind, time, device, liked) as requests: (user, time, device, counters, [(kind, item, labels)])."""
    domain = parse_domain(text, source="news.toml")
    csv = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / "log.csv").write_text("user,item,kind,time,device,liked\n" + csv)
    summary = import_log(domain, folder, folder / "out", created_ms=T, **options)
    requests = []
    for batch in read_requests(folder / "out", domain):
        for i in range(len(batch)):
            span = range(batch.starts[i], batch.starts[i + 1])
            candidates = [
                (
                    int(batch.entity_kind[n]),
                    int(batch.entity_id[n]),
                    batch.labels[batch.label_starts[n] : batch.label_starts[n + 1]].tolist(),
                )
                for n in span
            ]
            assert (batch.position[span.start : span.stop] == -1).all()
            how = batch.drawn[span.start : span.stop].tolist()
            assert [one == AS_LOGGED for one in how] == [bool(labels) for *_, labels in candidates]
            asked = domain.log.negatives
            assert how.count(UNIFORM) <= asked.uniform
            assert how.count(POPULAR) <= asked.popular
            assert len(set(batch.features["device"].values[span.start : span.stop].tolist())) == 1
            counted = batch.features["clicks"].values[span.start : span.stop].tolist()
            requests.append((int(batch.user_id[i]), int(batch.request_time_ms[i]), counted, candidates))
    return requests, summary


ROWS = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.integers(1, 7),
        st.sampled_from(["article", "video", ""]),
        st.integers(0, 12).map(lambda at: T + at * HOUR_MS // 2),
        st.sampled_from(["phone", "desk", ""]),
        st.sampled_from([0, 0, 1]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.booleans(), st.sampled_from([1 << 10, 512 << 20]))
def test_candidates_are_what_was_clicked_before_and_is_new_to_the_user(rows, repeats, memory_bytes):
    text = DOMAIN.replace("window_ms = 7_200_000", f"window_ms = 7_200_000, repeats = {str(repeats).lower()}")
    with tempfile.TemporaryDirectory() as folder:
        requests, summary = imported(rows, Path(folder), text, memory_bytes=memory_bytes)
    clicks = {(user, 2 if kind == "video" else 1, item, time_ms) for user, item, kind, time_ms, _, _ in rows}  # one event each
    for user, at_ms, counted, candidates in requests:
        items = [(kind, item) for kind, item, _ in candidates]
        assert len(set(items)) == len(items)
        mine = {(kind, item) for who, kind, item, ms in clicks if who == user and ms == at_ms}
        recent = {(kind, item) for _, kind, item, ms in clicks if at_ms - 2 * HOUR_MS <= ms < at_ms}
        known = {(kind, item) for who, kind, item, ms in clicks if who == user and ms < at_ms}
        drawn = {(kind, item) for kind, item, labels in candidates if not labels}
        assert {(kind, item) for kind, item, labels in candidates if 2 in labels} == (mine & recent) - (set() if repeats else known)
        assert drawn
        assert drawn <= recent - mine
        assert repeats or not drawn & known
        possible = len(recent - mine - (set() if repeats else known))
        assert len(drawn) == min(4, possible) or possible > 4  # a few items: all of them are found
        by_hand = [sum((k, i) == item and at_ms - HOUR_MS <= ms < at_ms for _, k, i, ms in clicks) for item in items]
        assert counted == by_hand
    everyone = {(who, ms) for who, _, _, ms in clicks}
    made = {(user, at_ms) for user, at_ms, *_ in requests}
    for user, at_ms in everyone - made:  # a click makes no request only where nothing could stand in it
        recent = {(kind, item) for _, kind, item, ms in clicks if at_ms - 2 * HOUR_MS <= ms < at_ms}
        known = set() if repeats else {(kind, item) for who, kind, item, ms in clicks if who == user and ms < at_ms}
        mine = {(kind, item) for who, kind, item, ms in clicks if who == user and ms == at_ms}
        assert not (mine & recent) - known or not recent - mine - known
    told = summary["negatives"]
    assert told["requests"] == summary["requests"] == len(requests)
    assert told["negatives"] == sum(not labels for *_, candidates in requests for *_, labels in candidates)


def many(count=4000, users=400):
    random = np.random.default_rng(5)
    items = np.where(random.random(count) < 0.5, 1, random.integers(2, 30, count))
    times = np.sort(random.integers(0, 48 * HOUR_MS, count))
    return [
        (int(user), int(item), "", T + int(at), "phone", 0)
        for user, item, at in zip(random.integers(1, users, count), items, times, strict=True)
    ]


@pytest.mark.parametrize(("kind", "share"), [("uniform", 1 / 29), ("popular", 0.5)])
def test_each_kind_draws_by_its_chances(tmp_path, kind, share):
    """Item 1 has half of the clicks, and is one of 29. One negative a request, so that none is used up."""
    asked = "uniform = 1" if kind == "uniform" else "popular = 1"
    text = DOMAIN.replace("uniform = 2, popular = 2, window_ms = 7_200_000", f"{asked}, window_ms = 86_400_000, repeats = true")
    requests, summary = imported(many(), tmp_path, text)
    drawn = Counter(item for *_, candidates in requests for _, item, labels in candidates if not labels)
    others = [at for at, (*_, candidates) in enumerate(requests) if (1, 1, [2]) not in candidates]  # who clicked it cannot be dealt it
    of_others = sum(any(item == 1 and not labels for _, item, labels in requests[at][3]) for at in others)
    assert of_others / len(others) == pytest.approx(share, abs=0.05)
    assert len(drawn) == 29
    assert f"1 {'popularity-matched' if kind == 'popular' else 'uniform'} negatives from the 24 h before it, seed 0" in summary["notes"][0]
    places = Counter(next(n for n, (_, _, labels) in enumerate(candidates) if labels) for *_, candidates in requests)
    assert places[0] / len(requests) == pytest.approx(0.5, abs=0.04)  # the place of the positive says nothing


def test_a_log_has_one_outcome_whatever_the_memory_and_another_seed_another(tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "BLOCK_REQUESTS", 300)
    rows = many(2000, 50)
    contents = []
    for name, order, memory_bytes, seed in (("a", rows, 512 << 20, 0), ("b", rows[::-1], 1 << 16, 0), ("c", rows, 512 << 20, 1)):
        (tmp_path / name).mkdir()
        text = DOMAIN.replace("window_ms = 7_200_000", f"window_ms = 7_200_000, seed = {seed}")
        imported(order, tmp_path / name, text, memory_bytes=memory_bytes)
        contents.append([(tmp_path / name / "out" / file).read_bytes() for file in (ACTIONS, IMPRESSIONS)])
    assert contents[0] == contents[1]
    assert contents[0][0] == contents[2][0]
    assert contents[0][1] != contents[2][1]


def test_a_share_of_the_clicks_is_asked_and_all_of_them_are_actions(tmp_path):
    (tmp_path / "all").mkdir()
    whole, _ = imported(many(), tmp_path / "all")
    some, summary = imported(many(), tmp_path, DOMAIN.replace("window_ms = 7_200_000", "window_ms = 7_200_000, share = 0.25"))
    assert len(some) / len(whole) == pytest.approx(0.25, abs=0.05)
    assert {request[:2] for request in some} < {request[:2] for request in whole}
    domain = parse_domain(DOMAIN, source="news.toml")
    assert summary["actions"] == sum(map(len, read_actions(tmp_path / "all" / "out", domain)))


@given(st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=5))
def test_the_click_before_is_found_over_batches(batches):
    known, last, at, told = np.zeros(0, np.uint64), np.zeros(0, np.int64), 0, []
    for batch in batches:
        previous, known, last = _previous(np.array(batch, np.uint64), at, known, last)
        at += len(batch)
        told += previous.tolist()
    flat = [key for batch in batches for key in batch]
    assert told == [max((n for n in range(place) if flat[n] == key), default=-1) for place, key in enumerate(flat)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("uniform = 2, popular = 2, ", "", "log.negatives: uniform, popular: at least one negative"),
        ('negatives = { action = "click"', 'negatives = { action = "open"', "log.negatives.action: 'open' is not defined"),
        ('like = { id = 3, kind = "positive" }', 'like = { id = 3, kind = "impression" }', "log.negatives: the log says what was shown"),
        ('counter = { action = "click", window_ms = 3_600_000 }', 'column = "liked"', "features.clicks: a drawn candidate has no column"),
        ('action = "click"\n', 'action = "like"\n', "log.negatives.action: no rule of log.actions gives 'click'"),
        ('time = "time"', 'time = "time"\ncandidates = "shown"', "log: negatives: a log with candidates"),
    ],
)
def test_what_a_domain_file_may_ask_for(old, new, message):
    assert DOMAIN.count(old) == 1
    with pytest.raises(DomainError, match=message):
        parse_domain(DOMAIN.replace(old, new), source="news.toml")


def test_pairs_of_small_numbers_do_not_meet():
    """A weak mix of user and item made articles of one user look read by another."""
    users, items, kinds = (axis.ravel() for axis in np.meshgrid(np.arange(60), np.arange(60), np.arange(1, 4), indexing="ij"))
    keys = item_keys(kinds.astype(np.uint8), items.astype(np.uint64))
    assert len(np.unique(mixed(users.astype(np.uint64), keys))) == len(users)

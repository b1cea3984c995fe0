"""Counters against a count by hand, and that nothing after a request's moment changes what it is told."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.domain import DomainError, parse_domain
from features.logs import ACTIONS, IMPRESSIONS, read_actions, read_requests
from features.tensors import tensor_fingerprint
from streams.counters import counters
from streams.importer import import_log

T = 1_700_000_000_000
HOUR_MS = 3_600_000
DOMAIN = """
name = "shop"
[entities]
product = 1
video = 2
[actions]
impression = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
buy = { id = 3, kind = "positive" }
[sequence.main]
id = 1
[features.price]
side = "candidate"
kind = "number"
[features.clicks_1h]
side = "candidate"
kind = "number"
counter = { action = "click", window_ms = 3_600_000 }
[features.shown]
side = "candidate"
kind = "number"
counter = { action = "impression" }
[features.click_rate_24h]
side = "candidate"
kind = "number"
counter = { action = "click", rate_of = "impression", window_ms = 86_400_000, prior = 5 }
[features.buy_rate]
side = "candidate"
kind = "number"
counter = { action = "buy", rate_of = "click", prior = 0 }
[features.age]
side = "candidate"
kind = "number"
counter = { action = "click", age = true }
[ranker.home]
sequence = "main"
item_space = "c"
features = ["price"]
[ranker.home.heads.click]
actions = ["click"]
[log]
files = ["log.csv"]
user = "user"
entity = "item"
entity_kind = "product"
entity_kind_column = "kind"
time = "time"
append_time = "append"
request_gap_ms = 1000
[[log.actions]]
action = "impression"
column = "event"
equals = ["impression"]
[[log.actions]]
action = "click"
column = "event"
equals = ["click"]
[[log.actions]]
action = "buy"
column = "event"
equals = ["buy"]
"""


def domain_of(text=DOMAIN):
    return parse_domain(text, source="shop.toml")


def imported(rows, folder, **options):
    """The log of rows (user, item, kind, event, time, append): actions and, by (request id, kind, item), each impression's counters."""
    domain = domain_of()
    (folder / "log.csv").write_text("user,item,kind,event,time,append,price\n" + "".join(",".join(map(str, row)) + ",1\n" for row in rows))
    import_log(domain, folder, folder / "out", created_ms=T, **options)
    told = {}
    for batch in read_requests(folder / "out", domain):
        for i in range(len(batch)):
            for row in range(batch.starts[i], batch.starts[i + 1]):
                item = int(batch.entity_kind[row]), int(batch.entity_id[row])
                values = {name: float(batch.features[name].values[row]) for name in counters(domain)}
                told[int(batch.request_id[i]), *item] = int(batch.request_time_ms[i]), values
    actions = [
        (int(event["entity_kind"]), int(event["entity_id"]), domain.action_names()[int(event["action"])], int(append_ms))
        for batch in read_actions(folder / "out", domain)
        for event, append_ms in zip(batch.events, batch.append_time_ms, strict=True)
    ]
    return actions, told


def by_hand(counter, actions, item, at_ms):
    """The counter's value as its definition says it."""

    def count(name, since_ms, of_item=None):
        return sum(
            action == name and since_ms <= append_ms < at_ms and of_item in (None, (kind, entity))
            for kind, entity, action, append_ms in actions
        )

    since_ms = -1 if counter.window_ms is None else at_ms - counter.window_ms
    if counter.age:
        times = [ms for kind, entity, action, ms in actions if (kind, entity) == item and action == counter.action and ms < at_ms]
        return np.float32(at_ms - min(times)) if times else np.float32(np.nan)
    if counter.rate_of is None:
        return np.float32(count(counter.action, since_ms, item))
    if not (shown := count(counter.rate_of, -1)):
        return np.float32(np.nan)
    of = count(counter.rate_of, since_ms, item) + counter.prior
    share = count(counter.action, -1) / shown
    return np.float32((count(counter.action, since_ms, item) + counter.prior * share) / of) if of else np.float32(np.nan)


ROWS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from(["product", "video", ""]),
        st.sampled_from(["impression", "impression", "click", "buy"]),
        st.sampled_from([0, 1, HOUR_MS - 1, HOUR_MS, HOUR_MS + 1, 24 * HOUR_MS, 24 * HOUR_MS + 1, 100 * HOUR_MS]),
        st.sampled_from([0, 0, 1, HOUR_MS]),
    ),
    min_size=1,
    max_size=40,
)


def timed(rows):
    return [(user, item, kind, event, T + at, T + at + late) for user, item, kind, event, at, late in rows]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([1 << 10, 512 << 20]))
def test_every_value_is_the_count_by_hand(rows, memory_bytes):
    with tempfile.TemporaryDirectory() as folder:
        actions, told = imported(timed(rows), Path(folder), memory_bytes=memory_bytes)
    for (_, *item), (at_ms, values) in told.items():
        for name, counter in counters(domain_of()).items():
            np.testing.assert_array_equal(np.float32(values[name]), by_hand(counter, actions, tuple(item), at_ms), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS, st.sampled_from([HOUR_MS, 24 * HOUR_MS, 24 * HOUR_MS + 1]))
def test_what_is_appended_later_changes_no_value(rows, others, cut_ms):
    """Two logs that agree up to a moment tell the requests up to it the same, whatever follows (and stands at the moment itself)."""
    before = [row for row in timed(rows) if row[5] < T + cut_ms]
    later = [(9, *row[1:4], max(row[4], T + cut_ms), max(row[5], T + cut_ms)) for row in timed(others)]
    if not before:
        return
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        _, alone = imported(before, Path(one))
        _, followed = imported([*later, *before], Path(two))
    for key, (at_ms, values) in alone.items():
        assert at_ms < T + cut_ms
        np.testing.assert_equal(followed[key][1], values)


def test_rows_of_one_millisecond_do_not_tell_each_other(tmp_path):
    rows = [(1, 7, "", "impression", T, T), (1, 7, "", "click", T, T), (2, 7, "", "impression", T + 1, T + 1)]
    _, told = imported(rows, tmp_path)
    by_time = dict(told.values())
    assert by_time[T]["clicks_1h"] == by_time[T]["shown"] == 0
    assert np.isnan(by_time[T]["click_rate_24h"])
    assert (by_time[T + 1]["clicks_1h"], by_time[T + 1]["shown"], by_time[T + 1]["click_rate_24h"]) == (1, 1, 1)


def test_the_files_do_not_depend_on_the_memory_or_the_order_of_rows(tmp_path):
    random = np.random.default_rng(3)
    rows = [
        (int(user), int(item), "", event, T + int(at), T + int(at))
        for user, item, event, at in zip(
            random.integers(1, 30, 3000),
            random.zipf(1.5, 3000).clip(max=50),
            random.choice(["impression", "click"], 3000),
            random.integers(0, 48 * HOUR_MS, 3000),
            strict=True,
        )
    ]
    contents = []
    for name, order, memory_bytes in (("one", rows, 512 << 20), ("two", rows[::-1], 1 << 16)):
        (tmp_path / name).mkdir()
        imported(order, tmp_path / name, memory_bytes=memory_bytes)
        contents.append([(tmp_path / name / "out" / file).read_bytes() for file in (ACTIONS, IMPRESSIONS)])
        assert sorted(path.name for path in (tmp_path / name / "out").iterdir()) == [ACTIONS, IMPRESSIONS, "summary.json"]
    assert contents[0] == contents[1]


CANDIDATE = 'side = "candidate"\nkind = "number"\ncounter = { action = "impression" }'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((CANDIDATE, CANDIDATE.replace("candidate", "item")), "a counter is a number of side candidate"),
        ((CANDIDATE, CANDIDATE + '\ncolumn = "price"'), "a counter is a number of side candidate without a column"),
        (('action = "impression" }', 'action = "hover" }'), "features.shown.counter: 'hover' is not defined"),
        (('rate_of = "click"', 'rate_of = "hover"'), "features.buy_rate.counter: 'hover' is not defined"),
        (("window_ms = 3_600_000", "window_ms = 0"), "counter.window_ms"),
        (("age = true", "age = true, window_ms = 5"), "age: the time since the first action has neither"),
    ],
)
def test_what_a_domain_file_may_ask_for(change, message):
    with pytest.raises(DomainError, match=message):
        domain_of(DOMAIN.replace(*change))


def test_a_counter_is_part_of_what_a_release_understands_and_nothing_else_changes():
    with_features = DOMAIN.replace('features = ["price"]', 'features = ["price", "shown"]')
    other = with_features.replace('counter = { action = "impression" }', 'counter = { action = "click" }')
    assert tensor_fingerprint(domain_of(with_features), "home") != tensor_fingerprint(domain_of(other), "home")
    unused = DOMAIN.replace("window_ms = 3_600_000", "window_ms = 7_200_000")
    assert tensor_fingerprint(domain_of(), "home") == tensor_fingerprint(domain_of(unused), "home")

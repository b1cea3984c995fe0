import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from rich.console import Console

from deploy.simulator import Simulator, write_kuairand_like
from features.actions import EVENT_DTYPE, TIME_MS_MAX
from features.domain import load_domain, parse_domain
from features.ids import derived_event_id, string_id
from features.logs import (
    ACTIONS,
    LogError,
    LoggedActions,
    LogWriter,
    actions_schema,
    read_actions,
    read_requests,
    read_summary,
)
from features.tables import open_generation
from streams import published
from streams.check import check
from streams.importer import import_log, print_summary
from streams.published import PublishedError

DOMAINS = Path(__file__).parents[2] / "domains"
T = 1_700_000_000_000
BASE = """
name = "shop"
[entities]
product = 1
video = 2
[surfaces]
home = 7
[actions]
impression = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
buy = { id = 3, kind = "positive" }
[sequence.main]
id = 1
[features.shelf]
side = "item"
kind = "category"
vocabulary = ["a", "b"]
[features.tags]
side = "item"
kind = "list"
hash_buckets = 10
length_max = 2
[features.age]
side = "user"
kind = "number"
[features.price]
side = "candidate"
kind = "number"
[features.query]
side = "request"
kind = "category"
hash_buckets = 10
[ranker.home]
sequence = "main"
item_space = "c"
[ranker.home.heads.click]
actions = ["click"]
[log]
files = ["log.csv"]
user = "user"
entity = "item"
entity_kind = "product"
time = "time"
"""
WIDE = """
[[log.actions]]
action = "impression"
[[log.actions]]
action = "click"
column = "clicked"
[[log.actions]]
action = "buy"
column = "bought"
"""
LONG = "".join(f'[[log.actions]]\naction = "{name}"\ncolumn = "event"\nequals = ["{name}"]\n' for name in ("impression", "click", "buy"))


def without_features(text):
    for name in ("shelf", "tags", "age", "price", "query"):
        start = text.index(f"[features.{name}]")
        text = text[:start] + text[text.index("\n[", start) + 1 :]
    return text


def run(folder, domain_text, files, **options):
    """Imports files (name to text) and returns domain, actions of all batches, requests of all batches, summary."""
    data, out = folder / "data", folder / "out"
    data.mkdir(exist_ok=True)
    for name, text in files.items():
        (data / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    domain = parse_domain(domain_text, source="shop.toml")
    summary = import_log(domain, data, out, **{"created_ms": T, **options})
    actions = list(read_actions(out, domain))
    return domain, actions[0], list(read_requests(out, domain)), summary


def names(events):
    return [(int(event["entity_id"]), int(event["action"]), int(event["event_time_ms"])) for event in events]


def labels(requests, row):
    return requests.labels[requests.label_starts[row] : requests.label_starts[row + 1]].tolist()


def test_wide_rows_are_an_impression_and_its_actions(tmp_path):
    rows = [f"5,70,{T},1,0", f"5,71,{T + 999},1,1", f"5,72,{T + 2000},0,0", f"4,70,{T + 1},0,0"]
    text = without_features(BASE) + "request_gap_ms = 1000\n" + WIDE
    _, actions, (requests,), summary = run(tmp_path, text, {"log.csv": "\n".join(["user,item,time,clicked,bought", *rows]) + "\n"})
    assert sorted(names(actions.events[actions.users == 5])) == [
        (70, 1, T), (70, 2, T), (71, 1, T + 999), (71, 2, T + 999), (71, 3, T + 999), (72, 1, T + 2000),
    ]  # fmt: skip
    assert (np.diff(actions.append_time_ms) >= 0).all()
    assert (actions.append_time_ms == actions.events["event_time_ms"]).all()
    assert requests.user_id.tolist() == [5, 4, 5]
    assert requests.request_time_ms.tolist() == [T, T + 1, T + 2000]
    assert np.diff(requests.starts).tolist() == [2, 1, 1]
    assert [labels(requests, row) for row in range(4)] == [[2], [2, 3], [], []]
    first = xxhash.xxh3_64_intdigest((5).to_bytes(8, "little") + T.to_bytes(8, "little"))
    assert int(requests.request_id[0]) == first
    assert set(actions.events["request_id"][actions.events["entity_id"] == 71].tolist()) == {first}
    event = actions.events[(actions.events["entity_id"] == 71) & (actions.events["action"] == 3)][0]
    assert int(event["event_id"]) == derived_event_id(5, 1, 71, 3, T + 999)
    assert (summary["rows"], summary["actions"], summary["impressions"], summary["requests"]) == (4, 7, 4, 3)


def test_long_rows_answer_the_latest_impression_within_the_gap(tmp_path):
    rows = [
        (1, 9, "impression", T),
        (1, 9, "click", T + 10),
        (1, 9, "impression", T + 5000),
        (1, 9, "buy", T + 5999),
        (1, 9, "click", T + 6000),  # too late for the second impression
        (1, 8, "click", T + 20),  # never shown
        (2, 9, "click", T + 20),  # shown to another user
    ]
    text = without_features(BASE) + "request_gap_ms = 1000\n" + LONG
    csv = "user,item,event,time\n" + "".join(f"{user},{item},{event},{time}\n" for user, item, event, time in rows)
    _, actions, (requests,), summary = run(tmp_path, text, {"log.csv": csv})
    assert [labels(requests, row) for row in range(len(requests.entity_id))] == [[2], [3]]
    request_of = {key: int(event["request_id"]) for key, event in zip(names(actions.events), actions.events, strict=True)}
    assert request_of[9, 2, T + 10] == int(requests.request_id[0])
    assert request_of[9, 3, T + 5999] == int(requests.request_id[1])
    assert request_of[9, 2, T + 6000] == request_of[8, 2, T + 20] == 0
    assert summary["noted"]["action: answers no impression"]["rows"] == 3
    assert "log.csv:6" in summary["noted"]["action: answers no impression"]["examples"]


def test_requests_by_column_take_late_actions_and_separate_users(tmp_path):
    rows = [
        (1, 9, "impression", T, "a", 1),
        (1, 8, "impression", T, "a", 0),
        (2, 9, "impression", T, "a", 0),
        (1, 9, "buy", T + 10**8, "a", ""),
        (1, 9, "click", T + 1, "", ""),
        (1, 9, "impression", T + 2, "a", 2),
    ]
    text = without_features(BASE) + 'request = "request"\nposition = "place"\n' + LONG
    csv = "user,item,event,time,request,place\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    _, actions, (requests,), summary = run(tmp_path, text, {"log.csv": csv})
    assert len(requests) == 2
    assert len(set(requests.request_id.tolist())) == 2
    mine = int(np.flatnonzero(requests.user_id == 1)[0])
    rows_of = slice(*requests.starts[mine : mine + 2])
    assert requests.entity_id[rows_of].tolist() == [8, 9]  # in the order of positions
    assert requests.position[rows_of].tolist() == [0, 1]
    assert [labels(requests, row) for row in range(rows_of.start, rows_of.stop)] == [[], [3]]
    assert 0 in actions.events["request_id"][actions.events["action"] == 2]
    assert summary["noted"]["impression: of an item that the request has already; one candidate"]["rows"] == 1
    assert (actions.events["action"] == 1).sum() == 4


def test_a_row_with_candidates_is_a_request(tmp_path):
    text = without_features(BASE).replace("[ranker.home]\n", '[features.price]\nside = "candidate"\nkind = "number"\n[ranker.home]\n')
    text += 'candidates = "shown"\n[[log.actions]]\naction = "impression"\n'
    text += '[[log.actions]]\naction = "click"\ncolumn = "event"\nequals = ["click"]\n'
    csv = f"user,item,event,time,shown,price\n3,8,click,{T},9 8 7,1.5 2.5 3.5\n3,,,{T + 50},5 6,4 x\n3,1,click,{T + 60},5  6,4\n"
    _, actions, (requests,), summary = run(tmp_path, text, {"log.csv": csv})
    assert requests.entity_id.tolist() == [9, 8, 7, 5, 6]
    assert requests.position.tolist() == [0, 1, 2, 0, 1]
    assert [labels(requests, row) for row in range(5)] == [[], [2], [], [], []]
    np.testing.assert_array_equal(requests.features["price"].values, np.array([1.5, 2.5, 3.5, 4, np.nan], np.float32))
    assert len(actions) == 6
    assert (actions.events["request_id"][actions.events["event_time_ms"] == T] == requests.request_id[0]).all()
    assert summary["rejected"] == {"features.price: not as many values as candidates": {"rows": 1, "examples": ["log.csv:4: price='4'"]}}


def test_clicks_alone_give_actions_and_a_note(tmp_path):
    text = without_features(BASE) + '[[log.actions]]\naction = "click"\n'
    _, actions, requests, summary = run(tmp_path, text, {"log.csv": f"user,item,time\n1,2,{T}\n1,3,{T + 1}\n"})
    assert len(actions) == 2
    assert requests == []
    assert "no impressions" in summary["notes"][0]


def test_string_ids_hash_by_xxh3_and_kinds_and_surfaces_are_read(tmp_path):
    text = without_features(BASE) + 'user_ids = "string"\nentity_ids = "string"\nevent_id = "id"\nevent_ids = "string"\nsurface = "page"\n'
    text += 'entity_kind_column = "kind"\nvalue = "dwell"\nappend_time = "stored"\nsurfaces = { "Front page" = "home" }\n' + LONG
    csv = "user,item,event,time,stored,kind,page,dwell,id\n"
    csv += f"Zoë,x1,click,{T},{T + 5},video,Front page,2.5,e1\n"
    csv += f"ann,x1,click,{T},{T + 1},,elsewhere,inf,e2\nann,x1,click,{T},{T + 1},clip,,,e3\n"
    _, actions, _, summary = run(tmp_path, text, {"log.csv": csv})
    assert actions.users.tolist() == [string_id("ann"), string_id("Zoë")]
    event = actions.events[1]
    assert (int(event["entity_id"]), int(event["entity_kind"]), int(event["surface"])) == (string_id("x1"), 2, 7)
    assert (float(event["value"]), int(event["event_id"])) == (2.5, string_id("e1"))
    assert actions.append_time_ms.tolist() == [T + 1, T + 5]
    assert np.isnan(actions.events["value"][0])
    assert list(summary["rejected"]) == ["entity_kind: not one of product, video"]
    assert summary["noted"]["surface: unknown; taken as none"]["examples"] == ["log.csv:3: page='elsewhere'"]
    assert "value: not a finite number; taken as none" in summary["noted"]


def test_rejected_rows_are_counted_by_reason_with_file_and_line(tmp_path):
    rows = [
        f"1,2,click,{T}",
        f",2,click,{T}",
        f"-1,2,click,{T}",
        f"1,18446744073709551616,click,{T}",
        "1,2,click,yesterday",
        "1,2,click,0",
        "1,2,click",
        f"1,2,share,{T}",
        f"18446744073709551615,2,click,{T}",
        "1,2,click,1000",
    ]
    csv = "user,item,event,time\n" + "\n".join(rows) + "\n"
    _, actions, _, summary = run(tmp_path, without_features(BASE) + LONG, {"log.csv": csv})
    assert sorted(actions.users.tolist()) == [1, 1, 2**64 - 1]
    found = {reason: (entry["rows"], entry["examples"]) for reason, entry in summary["rejected"].items()}
    assert found == {
        "user: empty or not an unsigned 64-bit integer": (2, ["log.csv:3: user=None", "log.csv:4: user='-1'"]),
        "entity: empty or not an unsigned 64-bit integer": (1, ["log.csv:5: item='18446744073709551616'"]),
        "time: empty or not a time in ms": (1, ["log.csv:6: time='yesterday'"]),
        "time: must be above 0": (1, ["log.csv:7: time='0'"]),
        "row: 3 columns where the header has 4": (1, ["log.csv:8: 1,2,click"]),
        "actions: unknown, no rule matches (event)": (1, ["log.csv:9: event='share'"]),
    }
    assert summary["noted"]["time: before the year 2000; is time_unit right?"]["examples"] == ["log.csv:11: time='1000'"]
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=200))
    assert "log.csv:6: time='yesterday'" in text.getvalue()
    assert read_summary(tmp_path / "out") == json.loads(json.dumps(summary))


def test_an_event_time_ahead_of_its_append_time_is_rejected(tmp_path):
    text = without_features(BASE) + 'append_time = "stored"\n' + LONG
    csv = f"user,item,event,time,stored\n1,2,click,{T},{T - 600_000}\n1,3,click,{T},{T - 600_001}\n"
    _, actions, _, summary = run(tmp_path, text, {"log.csv": csv})
    assert actions.events["entity_id"].tolist() == [2]
    assert list(summary["rejected"]) == ["append_time: the event time is further ahead than future_tolerance_ms"]


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_a_quote_that_is_not_closed_costs_its_own_row_alone(tmp_path, name):
    rows = [f'{n},{n},click,{T + n},"said ""{n}"", loud"' for n in range(20)]
    rows[3] = f"3,3,click,{T + 3}"
    rows[10] = f'10,10,click,{T + 10},"a tablet'
    rows[11] = f'11,11,click,{T + 11},7" tablet'  # inside of a field that has no quotes around it, it is a character
    rows[15] = f"15,15,click,{T + 15},,"
    rows[17] = f"17,17,share,{T + 17},"
    csv = "user,item,event,time,text\n" + "\r\n".join(rows)
    _, actions, _, summary = run(tmp_path, without_features(BASE) + LONG, {name: csv})
    assert actions.users.tolist() == [n for n in range(20) if n not in (3, 10, 15, 17)]
    assert summary["rows"] == 20
    assert {reason: (entry["rows"], entry["examples"]) for reason, entry in summary["rejected"].items()} == {
        "row: a quote that is not closed on its line": (1, [f'{name}:12: 10,10,click,{T + 10},"a tablet']),
        "row: 4 columns where the header has 5": (1, [f"{name}:5: 3,3,click,{T + 3}"]),
        "row: 6 columns where the header has 5": (1, [f"{name}:17: 15,15,click,{T + 15},,"]),
        "actions: unknown, no rule matches (event)": (1, [f"{name}:19: event='share'"]),
    }


def test_quotes_are_looked_at_in_whole_lines_whatever_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "BLOCK_BYTES", 100)
    rows = [f'{n},{n},"click",{T + n}' if n % 3 else f'{n},{n},"click,{T + n}' for n in range(60)]
    _, actions, _, summary = run(tmp_path, without_features(BASE) + LONG, {"log.csv": "user,item,event,time\n" + "\n".join(rows)})
    assert actions.users.tolist() == [n for n in range(60) if n % 3]
    assert summary["rejected"]["row: a quote that is not closed on its line"]["rows"] == 20
    assert summary["rows"] == 60


def test_a_times_limit_is_the_workers(tmp_path):
    csv = f"user,item,event,time\n1,2,click,{T}\n1,3,click,{float(TIME_MS_MAX)}\n1,4,click,{TIME_MS_MAX}\n"
    _, actions, _, summary = run(tmp_path, without_features(BASE) + LONG, {"log.csv": csv})
    assert actions.events["entity_id"].tolist() == [2]
    assert summary["rejected"]["time: empty or not a time in ms"]["rows"] == 2
    moments = pa.array([T // 1000, TIME_MS_MAX // 1000 + 1], pa.timestamp("s"))
    pq.write_table(pa.table({"user": [1, 1], "item": [2, 3], "event": ["click"] * 2, "time": moments}), tmp_path / "data" / "log.parquet")
    text = without_features(BASE).replace("log.csv", "log.parquet") + 'format = "parquet"\n' + LONG
    _, actions, _, summary = run(tmp_path, text, {})
    assert actions.events["entity_id"].tolist() == [2]
    assert summary["rejected"]["time: must be below 2^62 ms"]["rows"] == 1


@pytest.mark.parametrize(
    ("unit", "text", "time_ms"),
    [
        ("s", "1700000000", T),
        ("s", "1700000000.25", T + 250),
        ("us", "1700000000123456", T + 123),
        ("iso8601", "2023-11-14T22:13:20", T),
        ("iso8601", "2023-11-14T23:13:20+01:00", T),
        ("iso8601", "2023-11-14T22:13:20.5Z", T + 500),
    ],
)
def test_time_units(tmp_path, unit, text, time_ms):
    csv = f"user,item,event,time\n1,2,click,{text}\n1,2,buy,{text}\n"
    _, actions, _, _ = run(tmp_path, without_features(BASE) + f'time_unit = "{unit}"\n' + LONG, {"log.csv": csv})
    assert actions.events["event_time_ms"].tolist() == [time_ms, time_ms]


def test_ratings_reach_a_number(tmp_path):
    text = without_features(BASE) + '[[log.actions]]\naction = "buy"\ncolumn = "stars"\nat_least = 4\n[[log.actions]]\naction = "click"\n'
    _, actions, _, _ = run(tmp_path, text, {"log.csv": f"user,item,time,stars\n1,2,{T},4.5\n1,3,{T},3.5\n1,4,{T},\n"})
    assert sorted(names(actions.events)) == [(2, 2, T), (2, 3, T), (3, 2, T), (4, 2, T)]


def test_files_without_header_other_separator_and_gzip(tmp_path):
    text = without_features(BASE) + 'separator = "\\t"\ncolumns = ["user", "item", "event", "time"]\n' + LONG
    text = text.replace('files = ["log.csv"]', 'files = ["log-*.csv"]')
    files = {"log-1.csv.gz": f"1\t2\tclick\t{T}\n1\t2\tbogus\t{T}\n", "log-2.csv": f"1\t3\tclick\t{T}\n"}
    _, actions, _, summary = run(tmp_path, text, files)
    assert sorted(actions.events["entity_id"].tolist()) == [2, 3]
    assert summary["rejected"]["actions: unknown, no rule matches (event)"]["examples"] == ["log-1.csv.gz:2: event='bogus'"]


def test_parquet_reads_as_csv_does(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    columns = {"user": [1, None, 1], "item": [2.0, 3.0, 2.5], "clicked": [True, True, False], "bought": [0, 1, 0]}
    moments = np.array([T, T + 1, T + 2], "datetime64[ms]").astype("datetime64[us]")
    pq.write_table(pa.table(columns | {"time": moments}), data / "log.parquet")
    text = without_features(BASE).replace("log.csv", "log.parquet") + 'format = "parquet"\n' + WIDE
    _, actions, (requests,), summary = run(tmp_path, text, {})
    assert sorted(names(actions.events)) == [(2, 1, T), (2, 2, T)]
    assert labels(requests, 0) == [2]
    assert summary["rejected"]["user: empty or not an unsigned 64-bit integer"]["examples"] == ["log.parquet:2: user=None"]
    assert summary["rejected"]["entity: empty or not an unsigned 64-bit integer"]["examples"] == ["log.parquet:3: item=2.5"]


FEATURED = BASE + WIDE + '[log.items.product]\nfiles = ["items.csv"]\nid = "id"\n[log.users]\nfiles = ["users.csv"]\nid = "id"\n'


def test_features_of_all_sides(tmp_path):
    files = {
        "log.csv": f"user,item,time,clicked,bought,price,query\n1,70,{T},0,0,2.5,shoes\n1,71,{T + 1},0,0,,hats\n",
        "items.csv": 'id,shelf,tags\n71,b,"x,y,z"\n70,,\n71,a,x\nx,a,x\n',
        "users.csv": "id,age\n1,30\n2,NULL\n",
    }
    domain, _, (requests,), summary = run(tmp_path, FEATURED, files)
    np.testing.assert_array_equal(requests.features["price"].values, np.array([2.5, np.nan], np.float32))
    assert requests.features["query"].values.tolist() == [string_id("shoes")] * 2  # the request's, as it was at its first impression
    tables = open_generation(tmp_path / "out" / "tables", "features", summary["tables"]["generation"], verify=True)
    rows = tables.rows("item.product", np.array([70, 71, 72], np.uint64))
    shelf, tags = tables.column("item.product", "shelf"), tables.column("item.product", "tags")
    assert shelf is not None
    assert tags is not None
    assert shelf[rows].tolist() == [0, string_id("b"), 0]
    assert tags[rows].tolist() == [[0, 0], [string_id("x"), string_id("y")], [0, 0]]
    age = tables.column("user", "age")
    assert age is not None
    np.testing.assert_array_equal(age[tables.rows("user", np.array([1, 2], np.uint64))], np.array([30, np.nan], np.float32))
    assert summary["noted"]["item.product: id is there twice; the first row counts"]["rows"] == 1
    assert summary["rejected"]["item.product: id: empty or not an unsigned 64-bit integer"]["examples"] == ["items.csv:5: id='x'"]
    assert domain.name == summary["domain"]


def test_features_are_as_old_as_the_log_so_that_an_erasure_hides_them_for_good(tmp_path):
    files = {
        "log.csv": f"user,item,time,clicked,bought,price,query,stored\n1,70,{T + 9},0,0,1,q,{T + 50}\n1,71,{T},1,0,1,q,{T + 20}\n",
        "items.csv": "id,shelf,tags\n70,a,x\n",
        "users.csv": "id,age\n1,30\n",
    }
    text = FEATURED.replace('time = "time"\n', 'time = "time"\nappend_time = "stored"\n')
    names = [run(tmp_path, text, files, created_ms=None)[3]["tables"]["generation"] for _ in range(2)]
    assert names[0] == names[1]
    assert open_generation(tmp_path / "out" / "tables", "features").created_ms == T + 50
    files["log.csv"] = files["log.csv"].replace(str(T + 50), str(4 * T))  # a stray row: the tables are not from the future
    run(tmp_path, text, files, created_ms=None)
    assert open_generation(tmp_path / "out" / "tables", "features").created_ms < 2 * T


def test_any_order_of_rows_gives_the_same_log_and_duplicates_go(tmp_path):
    rng = random.Random(5)
    rows = [
        f"{rng.randrange(40)},{rng.randrange(9)},{T + rng.randrange(900) * 1000},{rng.randrange(2)},{rng.randrange(2)}" for _ in range(600)
    ]
    rows = sorted(set(rows))
    again = rows[:7]
    header = "user,item,time,clicked,bought\n"
    text = without_features(BASE) + "request_gap_ms = 20000\n" + WIDE
    (tmp_path / "one").mkdir()
    one = run(tmp_path / "one", text, {"log.csv": header + "\n".join(rows) + "\n"})
    shuffled = [*rows, *again]
    rng.shuffle(shuffled)
    (tmp_path / "two").mkdir()
    two = run(tmp_path / "two", text, {"log.csv": header + "\n".join(shuffled) + "\n"}, memory_bytes=16 * 4000)
    for name in ("actions.parquet", "impressions.parquet"):
        left, right = (pq.read_table(tmp_path / side / "out" / name) for side in ("one", "two"))
        assert left.num_rows > 500
        assert [column for column in left.column_names if column != "value" and left[column] != right[column]] == []
    assert two[3]["noted"]["row: an exact duplicate, dropped"]["rows"] == 7
    assert "row: an exact duplicate, dropped" not in one[3]["noted"]
    assert not list((tmp_path / "two/out").glob(".*"))


@pytest.mark.parametrize(
    ("change", "files", "message"),
    [
        (("log.csv", "none*.csv"), {"log.csv": "a\n"}, r"no file matches 'none\*\.csv'.*there: log\.csv"),
        (
            ('user = "user"', 'user = "usr"'),
            {"log.csv": "user,item,event,time\n"},
            r"log\.csv: log\.user: no column 'usr'; there: user, item",
        ),
        (('user = "user"', 'user = "user"'), {"log.csv": ""}, r"log\.csv: is empty"),
        (('user = "user"', 'user = "user"'), {"log.csv": "user,item,event,time\nx,1,click,1\n"}, r"none of 1 rows can be read"),
        (("log.csv", "log.csv.gz"), {"log.csv.gz": "user,item,event,time\n1,2,click,3\n"}, None),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, change, files, message):
    text = (without_features(BASE) + LONG).replace(*change)
    if message is None:
        assert len(run(tmp_path, text, files)[1]) == 1
        return
    with pytest.raises(PublishedError, match=message):
        run(tmp_path, text, files)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_truncated_gzip_file_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    whole = gzip.compress(("user,item,event,time\n" + "".join(f"1,{n},click,{T + n * 7919}\n" for n in range(5000))).encode())
    (tmp_path / "data" / "log.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PublishedError, match=r"log\.csv\.gz: cannot be read as csv"):
        run(tmp_path, without_features(BASE) + LONG, {})


def test_the_log_writer_refuses_disorder_and_leaves_nothing(tmp_path):
    domain = parse_domain(without_features(BASE) + LONG, source="shop.toml")

    def actions(times):
        return LoggedActions.imported(np.ones(len(times), np.uint64), np.zeros(len(times), EVENT_DTYPE), np.array(times, np.int64))

    def write(*batches):
        with LogWriter(tmp_path, ACTIONS, actions_schema(domain)) as writer:
            for times in batches:
                writer.write_actions(actions(times))

    with pytest.raises(LogError, match="out of order of append_time_ms"):
        write([1, 2], [1])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LogError, match="freshrank import"):
        next(read_actions(tmp_path, domain))
    write([1, 2])
    (batch,) = read_actions(tmp_path, domain)
    assert batch.append_time_ms.tolist() == [1, 2]
    other = parse_domain((without_features(BASE) + LONG).replace('"shop"', '"store"'), source="store.toml")
    with pytest.raises(LogError, match=r"freshrank\.domain is shop, expected store"):
        next(read_actions(tmp_path, other))


def test_requests_are_read_whole_whatever_the_batch(tmp_path):
    rows = [f"{user},{item},{T + user * 10},0,0" for user in range(30) for item in range(user % 7 + 1)]
    text = without_features(BASE) + WIDE
    domain, _, (whole,), _ = run(tmp_path, text, {"log.csv": "user,item,time,clicked,bought\n" + "\n".join(rows) + "\n"})
    for batch_rows in (1, 3, 10):
        parts = list(read_requests(tmp_path / "out", domain, batch_rows=batch_rows))
        assert len(parts) > 1
        assert np.concatenate([part.request_id for part in parts]).tolist() == whole.request_id.tolist()
        assert np.concatenate([np.diff(part.starts) for part in parts]).tolist() == np.diff(whole.starts).tolist()
        assert np.concatenate([part.entity_id for part in parts]).tolist() == whole.entity_id.tolist()


def test_check_tells_what_is_wrong_with_examples(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "log.csv").write_text(
        "user,item,time,clicked,bought,price,query\n"
        + "".join(f"{n % 5},{n % 7},{T + n * 1000},{n % 2},0,1,q\n" for n in range(200))
        + f"1,99,{T},1,0,1,q\n1,2,{T + 1},5,0,1,q\nx,2,{T},1,0,1,q\n1,99,{T},1,0,1,q\n1,2,12,0,0,1,q\n"
    )
    (data / "items.csv").write_text("id,shelf,tags\n" + "".join(f"{n},{'ab?'[n % 3]},\n" for n in range(7)))
    (data / "users.csv").write_text("id,age\n0,1\n1,1\n2,1\n3,\n")
    report = check(parse_domain(FEATURED, source="shop.toml"), data)
    found = {reason: (entry["rows"], entry["examples"]) for reason, entry in report.problems.items()}
    assert found["rejected: user: empty or not an unsigned 64-bit integer"] == (1, ["log.csv:204: user='x'"])
    assert found["noted: actions: clicked has a value that no rule names"] == (1, ["log.csv:203: clicked='5'"])
    assert found["noted: time: before the year 2000; is time_unit right?"] == (1, ["log.csv:206: time='12'"])
    assert found["noted: row: an exact duplicate, dropped"] == (1, ["log.csv:205"])
    assert found["unseen: item without a row in the files of item.product"] == (2, ["99"])
    assert found["unseen: user without a row in the files of user"][1] == ["4"]
    assert found["actions.buy: no row is this action; is its rule in [[log.actions]] right?"][0] == 1
    assert found["time: more than 365 days from the middle of the log"] == (1, ["1970-01-01T00:00:00.012Z"])
    assert report.actions == {"impression": 203, "click": 101, "buy": 0}
    assert 0 < report.labels["home.click (head)"] < 1
    assert report.distributions["candidates of a request"]["p100"] == 8  # item 99 among them
    assert report.features["item.product.shelf"]["outside_vocabulary"] == pytest.approx(2 / 7)
    assert report.features["user.age"]["missing"] == 0.25
    assert json.loads(json.dumps(report.as_json()))["problems"].keys() == report.problems.keys()
    text = io.StringIO()
    report.print(Console(file=text, width=200))
    assert "log.csv:203: clicked='5'" in text.getvalue()


def test_what_looks_like_markup_is_printed_as_it_is_and_nothing_is_cut(tmp_path):
    rows = f"[/b],1,{T},1,0\n[red],{'[x]' * 30},{T},0,0\n[/b],nobody,{T},[/i],0\n[/b],,{T},0,0\n"
    text = (
        without_features(BASE)
        + 'entity_ids = "string"\nuser_ids = "string"\n'
        + WIDE
        + '[[log.actions]]\naction = "buy"\ncolumn = "bought"\n'
    )
    _, _, _, summary = run(tmp_path, text, {"log.csv": "user,item,time,clicked,bought\n" + rows})
    report = check(parse_domain(text, source="shop.toml"), tmp_path / "data")
    for width in (40, 200):
        printed = io.StringIO()
        print_summary(summary, Console(file=printed, width=width))
        report.print(Console(file=printed, width=width))
        assert "\u2026" not in printed.getvalue()
    assert printed.getvalue().count("clicked='[/i]'") == 2
    assert "is its rule in [[log.actions]] right?" in printed.getvalue()


def test_the_simulator_is_seeded_and_its_log_reads_without_a_complaint(tmp_path):
    Simulator(3, users=50, held_back=5, items=200).write(tmp_path / "a", requests=60)
    Simulator(3, users=50, held_back=5, items=200).write(tmp_path / "b", requests=60)
    Simulator(4, users=50, held_back=5, items=200).write(tmp_path / "c", requests=60)
    assert (tmp_path / "a/events.csv").read_bytes() == (tmp_path / "b/events.csv").read_bytes() != (tmp_path / "c/events.csv").read_bytes()
    report = check(load_domain(DOMAINS / "simulator.toml"), tmp_path / "a")
    assert [problem for problem in report.problems if "no row is this action" not in problem] == []
    assert report.distributions["candidates of a request"] == {"mean": 20, "p50": 20, "p90": 20, "p99": 20, "p100": 20}
    assert report.summary["requests"] == 60


def test_a_live_users_clicks_follow_the_intent():
    simulator = Simulator(3, users=50, held_back=50, items=500)
    clicked = dict.fromkeys((True, False), 0)
    shown = dict.fromkeys((True, False), 0)
    for user_id in simulator.held_back_users:
        user = simulator.user(user_id)
        for n in range(4):
            request = simulator.request(user, T + n * 60_000)
            assert len(set(request.candidate_ids.tolist())) == 20
            clicks = {action.entity_id for action in simulator.respond(request) if action.action == "click"}
            for item in request.candidate_ids.tolist():
                of_intent = bool(simulator._weight[item - 1, user.intent] > 0)
                shown[of_intent] += 1
                clicked[of_intent] += item in clicks
    assert clicked[True] / shown[True] > 5 * clicked[False] / shown[False]


def test_the_stand_in_has_the_publishers_form(tmp_path):
    write_kuairand_like(tmp_path, users=30, videos=40, impressions=400)
    report = check(load_domain(DOMAINS / "kuairand.toml"), tmp_path)
    assert report.summary["rejected"] == {}
    assert report.summary["rows"] == 400
    assert all(shares["missing"] < 0.1 for shares in report.features.values())
    assert report.features["tab"]["outside_vocabulary"] == 0

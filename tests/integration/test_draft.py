"""Drafted domain files: what is guessed from real and odd logs, and that an import takes each as it is."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from features.domain import parse_domain
from features.logs import read_requests
from inference.dataset import build_dataset
from inference.embeddings import newest_generations, publish_embeddings
from streams.draft import DraftError, draft_domain
from streams.importer import import_log
from streams.published import PublishedError
from streams.sample import read_sample

DATA = Path(os.environ.get("FRESHRANK_DATA", Path(__file__).parents[3] / "shared" / "data"))
T = 1_700_000_000
real = pytest.mark.skipif(not DATA.is_dir() and os.environ.get("CI") != "true", reason=f"{DATA} is not there")


def drafted(path, tmp_path, **given):
    """Domain, draft and the import's summary of a log."""
    text, draft = draft_domain(path, **given)
    domain = parse_domain(text, source="draft.toml")
    summary = import_log(domain, path.parent, tmp_path / "log", created_ms=1)
    assert summary["rejected"] == {}, text
    assert summary["requests"] > 0, text
    return domain, draft, summary


def write(folder, text, name="log.csv"):
    (folder / name).write_text(text)
    return folder / name


@real
def test_kuairand(tmp_path):
    (path,) = (DATA / "kuairand-pure").glob("log_standard*")
    domain, draft, summary = drafted(path, tmp_path)
    flags = {"click", "like", "follow", "comment", "forward", "hate", "long_view", "profile_enter"}
    assert set(domain.actions) == flags | {"impression"}
    assert {name for name, action in domain.actions.items() if action.kind == "negative"} == {"hate"}
    assert set(domain.ranker["main"].heads) == {"click", "long_view", "profile_enter"}
    assert (domain.log.user, domain.log.entity, domain.log.time, domain.log.time_unit) == ("user_id", "video_id", "time_ms", "ms")
    assert (domain.log.value, domain.log.surface) == ("play_time_ms", "tab")
    assert domain.features["duration_ms"].side == "item"
    assert {"comment_stay_time", "profile_stay_time", "date", "hourmin"} <= {name for name, _ in draft.left_out}  # what happened after
    assert summary["impressions"] > 200_000


@real
def test_kuairand_with_its_tables(tmp_path):
    folder = DATA / "kuairand-pure"
    (path,), (items,), (users,) = (list(folder.glob(f"{name}*")) for name in ("log_standard", "video_features", "user_features"))
    domain, draft, summary = drafted(path, tmp_path, items=items, users=users)
    assert summary["tables"]["rows"]["user"] == 27_285
    sides = {name: (feature.side, feature.kind) for name, feature in domain.features.items()}
    assert sides["author_id"] == sides["music_type"] == ("item", "category")
    assert sides["tag"] == ("item", "list")
    assert sides["video_duration"] == ("item", "number")
    assert sides["fans_user_num"] == ("user", "number")
    assert "duration_ms" in {name for name, _ in draft.left_out}  # of the item, but not in its file


@real
def test_globo(tmp_path):
    (path,) = (DATA / "globo").glob("*.csv.gz")
    domain, draft, summary = drafted(path, tmp_path)
    assert (domain.log.user, domain.log.entity, domain.log.time) == ("user_id", "click_article_id", "click_timestamp")
    assert list(domain.actions) == ["click"]
    assert {"session_id", "session_start", "session_size"} <= {name for name, _ in draft.left_out}
    assert 0.1 < domain.log.negatives.share < 0.25  # about 50,000 requests
    assert 40_000 < summary["negatives"]["requests"] < 60_000
    assert summary["tables"] == {} or "click_country" in domain.features


@real
def test_lastfm_listens_have_no_times_and_tags_have_days(tmp_path):
    with tarfile.open(DATA / "lastfm-hetrec" / "lastfm_hetrec.tar.xz") as archive:
        for name in ("user_artists.dat", "user_taggedartists.dat"):
            file = archive.extractfile(f"lastfm_hetrec/raw/{name}")
            (tmp_path / name).write_bytes(file.read())
    domain, _, summary = drafted(tmp_path / "user_artists.dat", tmp_path / "listens")
    assert (domain.log.user, domain.log.entity, domain.log.time, domain.log.value) == ("userID", "artistID", None, "weight")
    assert domain.log.separator == "\t"
    assert summary["noted"]["time: the log has none; each row counts as a second after the one before it"]["rows"] == 92_834
    text, _ = draft_domain(tmp_path / "user_taggedartists.dat")
    domain = parse_domain(text, source="draft.toml")
    assert domain.log.time_parts == ("year", "month", "day")
    summary = import_log(domain, tmp_path, tmp_path / "tags", created_ms=1)
    assert summary["requests"] > 500  # what a user tagged on one day has one time, and is one request
    assert sum(reason["rows"] for reason in summary["rejected"].values()) < 20  # days of 1956, as the publishers have them


def rows_of(header, count, row, seed=1):
    random = np.random.default_rng(seed)
    lines = [",".join(map(str, row(random, n))) for n in range(count)]
    return header + "\n" + "\n".join(lines) + "\n"


def test_one_action_string_ids_and_nothing_else(tmp_path):
    text = rows_of("visitorid,itemid,timestamp", 400, lambda r, n: (f"v-{r.integers(40)}", f"sku{r.integers(60)}", T + 60 * n))
    domain, draft, _ = drafted(write(tmp_path, text), tmp_path)
    assert (domain.log.user_ids, domain.log.entity_ids, domain.log.time_unit) == ("string", "string", "s")
    assert domain.log.negatives is not None
    assert ("actions", "click", "one action only: every row; UNSURE: no column says which; call it what it is") in draft.reasons


def test_events_by_name_with_prices(tmp_path):
    """An impression log by events: price is of the moment, a brand is the item's, a city the user's."""

    def row(random, n):
        user, item = int(random.integers(30)), int(random.integers(40))
        event = random.choice(["impression", "impression", "add_to_cart", "purchase", "hide"])
        return (
            f"u{user}",
            item,
            event,
            f"2024-03-01T{n // 60 % 24:02}:{n % 60:02}:00Z",
            f"s{n // 5}",
            n % 5,
            10 + item + n % 7 / 2,
            f"b{item % 6}",
            f"c{user % 4}",
        )

    text = rows_of("user,product_id,event_type,event_time,search_id,rank,price,brand,city", 900, row)
    domain, _, summary = drafted(write(tmp_path, text), tmp_path)
    log = domain.log
    assert (log.time_unit, log.request, log.position, log.value) == ("iso8601", "search_id", "rank", None)
    kinds = {name: action.kind for name, action in domain.actions.items()}
    assert kinds == {"impression": "impression", "add_to_cart": "positive", "purchase": "positive", "hide": "negative"}
    sides = {name: (feature.side, feature.kind) for name, feature in domain.features.items()}
    assert (sides["price"], sides["brand"], sides["city"]) == (("candidate", "number"), ("item", "category"), ("user", "category"))
    assert summary["tables"]["rows"] == {"item.product": 40, "user": 30}
    assert log.negatives is None


def test_impression_lists_with_one_clicked_item(tmp_path):
    def row(random, n):
        shown = random.choice(200, 8, replace=False)
        clicked = "" if n % 7 == 0 else f"N{random.choice(shown)}"
        return (
            f"U{random.integers(50)}",
            T * 1000 + 60_000 * n,
            " ".join(f"N{item}" for item in shown),
            clicked,
            random.choice(["phone", "desk"]),
        )

    domain, _, summary = drafted(write(tmp_path, rows_of("reader,ms,shown,clicked,device", 400, row)), tmp_path)
    assert (domain.log.candidates, domain.log.entity, domain.log.entity_ids, domain.log.candidates_separator) == (
        "shown",
        "clicked",
        "string",
        " ",
    )
    assert summary["impressions"] == 3200
    batch = next(iter(read_requests(tmp_path / "log", domain)))
    click = domain.actions["click"].id
    assert batch.label(click).sum() == sum(n % 7 != 0 for n in range(400))


def test_parquet_with_lists_and_timestamps(tmp_path):
    random = np.random.default_rng(2)
    shown = [random.choice(100, 5, replace=False).tolist() for _ in range(300)]
    times = pa.array(np.arange(300) * 10_000 + T * 1000, pa.timestamp("ms"))
    columns = {
        "uid": random.integers(0, 20, 300),
        "impressions": shown,
        "bought": [int(random.choice(each)) for each in shown],
        "at": times,
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    domain, _, summary = drafted(tmp_path / "log.parquet", tmp_path)
    assert (domain.log.format, domain.log.candidates, domain.log.entity) == ("parquet", "impressions", "bought")
    assert "buy" in domain.actions or "bought" in domain.actions
    assert summary["impressions"] == 1500


def test_ratings_and_genres(tmp_path):
    text = rows_of(
        "userId,movieId,rating,timestamp,genres",
        500,
        lambda r, n: (
            r.integers(1, 30),
            (m := r.integers(1, 60)),
            r.integers(1, 11) / 2,
            T + n * 500,
            "|".join(["a", "b", "c"][: 1 + m % 3]),
        ),
    )
    domain, _, _ = drafted(write(tmp_path, text), tmp_path)
    (rule,) = [rule for rule in domain.log.actions if rule.action == "like"]
    assert (rule.column, rule.at_least) == ("rating", 4.0)
    assert domain.log.value == "rating"
    assert (domain.features["genres"].side, domain.features["genres"].kind, domain.features["genres"].separator) == ("item", "list", "|")


def test_users_without_history_and_a_draft_that_trains(tmp_path):
    """Every user comes once: sequences are empty, and all is packed all the same."""
    text = rows_of("user_id,item_id,ts,clicked", 300, lambda r, n: (n, r.integers(20), T + n, int(r.random() < 0.3)))
    domain, _, _ = drafted(write(tmp_path, text), tmp_path)
    folders = publish_embeddings(domain, "main", tmp_path / "log", tmp_path / "tables", until_ms=(T + 200) * 1000)
    dataset, _ = build_dataset(domain, "main", tmp_path / "log", tmp_path / "tables", generations=newest_generations(folders))
    assert len(dataset) == 300
    assert dataset.of_request["sequence_count"].max() == 0


def test_what_cannot_be_guessed_is_asked_for(tmp_path):
    path = write(tmp_path, rows_of("a,b,c", 50, lambda r, _: (r.random(), r.random(), r.random())))
    with pytest.raises(DraftError, match="no column looks like the user's id; name it with --user"):
        draft_domain(path)
    path = write(tmp_path, rows_of("left,right,c", 50, lambda r, n: (r.integers(5, 9), r.integers(10, 30), T + n)))
    domain, _, _ = drafted(path, tmp_path, item="left", user="right")
    assert (domain.log.user, domain.log.entity, domain.log.time) == ("right", "left", "c")
    with pytest.raises(DraftError, match="no column 'middle'; there: left, right, c"):
        draft_domain(path, user="middle")
    for text, message in (("", "needs a header line"), ("1,2,3\n4,5,6\n", "its first line is no header"), ("a,b\n", "needs a header line")):
        with pytest.raises(PublishedError, match=message):
            draft_domain(write(tmp_path, text, "odd.csv"))
    with pytest.raises(PublishedError, match="cannot be read"):
        draft_domain(tmp_path / "absent.csv")


def test_a_sample_knows_its_size_and_the_separator(tmp_path):
    text = "user;item;ts\n" + "".join(f"{n % 50};{n};{T + n}\n" for n in range(20_000))
    path = tmp_path / "big.csv.gz"
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(text.encode())
    path.write_bytes(buffer.getvalue())
    sample = read_sample(path, rows_max=1000)
    assert (sample.rows, sample.separator) == (1000, ";")
    assert 5_000 < sample.rows_about < 80_000
    assert read_sample(path).rows_about == 20_000


def test_the_command_writes_a_file_once_and_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, rows_of("user_id,item_id,ts", 50, lambda r, n: (r.integers(9), r.integers(9), T + n)), "shop_clicks.csv")
    result = CliRunner().invoke(app, ["domain", "--from", "shop_clicks.csv"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "time_unit" in result.output
    assert parse_domain((tmp_path / "shop_clicks.toml").read_text(), source="x").name == "shop_clicks"
    with pytest.raises(FileExistsError, match="--force replaces it"):
        CliRunner().invoke(app, ["domain", "--from", "shop_clicks.csv"], catch_exceptions=False)

"""Vectors and weighted lists from the published file and from the wire to the model, on each side; and that domains without them are as
they were."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deploy.http_wire import FieldError, _column
from features.actions import EVENT_DTYPE
from features.domain import DomainError, load_domain, parse_domain
from features.ids import string_id
from features.logs import read_requests
from features.pack import Packer
from features.request import RequestError, inputs_from_request
from features.tables import Member, item_member, open_generation, write_generation
from features.tensors import tensor_fingerprint, tensor_table
from inference.client import feature_column, rank_request
from inference.dataset import _chosen, build_dataset
from inference.transact import RAW_MAX, SideFeatures, TransActRanker
from protos.v1.ranking_pb2 import FeatureColumn
from streams.check import check
from streams.importer import import_log

ROOT = Path(__file__).parents[2]
T = 1_700_000_000_000
DOMAIN = """
name = "shop"
[entities]
product = 1
[actions]
impression = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
[sequence.main]
id = 1
[features]
text = { side = "candidate", kind = "vector", dimension = 3 }
why = { side = "candidate", kind = "weighted_list", hash_buckets = 50, length_max = 2, dimension = 4, separator = "|" }
place = { side = "request", kind = "vector", dimension = 2, separator = " " }
words = { side = "request", kind = "weighted_list", vocabulary = ["red", "blue"], length_max = 3, dimension = 2, separator = " " }
picture = { side = "item", kind = "vector", dimension = 2, separator = " " }
topics = { side = "item", kind = "weighted_list", vocabulary = ["a", "b", "c"], length_max = 2, dimension = 2, separator = " " }
taste = { side = "user", kind = "vector", dimension = 2, separator = " " }
tags = { side = "user", kind = "weighted_list", hash_buckets = 9, length_max = 2, dimension = 2, separator = " " }
[ranker.home]
sequence = "main"
sequence_length = 5
item_space = "items"
embedding_dimension = 2
features = ["text", "why", "place", "words", "picture", "topics", "taste", "tags"]
model = { action_dimension = 2, feedforward = 4, first_k = 2, hidden = [4], cross_rank = 4, dropout = 0.0 }
heads.click = { actions = ["click"] }
[log]
files = ["log.csv"]
user = "user"
entity = "item"
entity_kind = "product"
time = "time"
[[log.actions]]
action = "impression"
[[log.actions]]
action = "click"
column = "clicked"
[log.items.product]
files = ["items.csv"]
id = "id"
[log.users]
files = ["users.csv"]
id = "id"
"""
LOG = f"""user,item,time,clicked,text,why,place,words
1,70,{T},1,"0.5,nan,2",x:2|y|z:1,5 6,red:0.5 green:2
1,71,{T + 1},0,"1,2",x:-1|y:abc,7 8,blue
2,70,{T + 2},0,,,,
"""
ITEMS = "id,picture,topics\n70,1 2,a:1 b:0.25 c:9\n71,x 2,\n"
USERS = "id,taste,tags\n1,3 4,t:1e2\n"


@pytest.fixture
def imported(tmp_path):
    for name, text in (("log.csv", LOG), ("items.csv", ITEMS), ("users.csv", USERS)):
        (tmp_path / name).write_text(text)
    domain = parse_domain(DOMAIN, source="shop.toml")
    summary = import_log(domain, tmp_path, tmp_path / "log", created_ms=T, tables_root=tmp_path / "tables")
    ids = np.array([70, 71], np.uint64)
    write_generation(tmp_path / "tables", "items", T, {item_member("product"): Member(ids, np.eye(2, dtype=np.float16))})
    return domain, tmp_path, summary


def test_a_published_file_becomes_the_log_and_the_tables(imported):
    domain, folder, summary = imported
    (batch,) = read_requests(folder / "log", domain)
    assert batch.entity_id.tolist() == [70, 71, 70]
    text, why, words = (batch.features[name] for name in ("text", "why", "words"))
    np.testing.assert_array_equal(text.values, np.array([[0.5, np.nan, 2], [np.nan] * 3, [np.nan] * 3], np.float32))
    assert why.lengths.tolist() == [2, 2, 0]  # cut at length_max
    assert why.values.tolist() == [string_id("x"), string_id("y"), string_id("x"), string_id("y")]
    assert why.weights.tolist() == [2, 1, 0, 0]
    assert words.weights.tolist() == [0.5, 2, 0.5, 2]  # the request's, as they were at its first impression
    np.testing.assert_array_equal(batch.features["place"].values, np.array([[5, 6], [5, 6], [np.nan, np.nan]], np.float32))
    noted = {reason: found["rows"] for reason, found in summary["noted"].items()}
    assert noted["features.text: not as many finite numbers as its dimension; taken as missing, whole or in the places that are none"] == 2
    assert noted["features.why: a weight that is no number of 0 or more; taken as 0"] == 1
    chosen = _chosen(batch, np.array([1]))
    assert (chosen.features["why"].lengths.tolist(), chosen.features["why"].weights.tolist()) == ([0], [])
    tables = open_generation(folder / "tables", "features")
    rows = tables.rows("item.product", np.array([70, 71, 9], np.uint64))
    np.testing.assert_array_equal(tables.column("item.product", "picture")[rows], np.array([[1, 2], [np.nan, 2], [np.nan] * 2], np.float32))
    assert tables.column("item.product", "topics")[rows].tolist() == [[string_id("a"), string_id("b")], [0, 0], [0, 0]]
    assert tables.column("item.product", "topics__weights")[rows[:2]].tolist() == [[1, 0.25], [0, 0]]
    report = check(domain, folder)
    assert report.features["text"]["missing"] == pytest.approx(2 / 3)
    assert report.features["item.product.picture"]["missing"] == 0, "one place is"


def test_parquet_has_lists_structs_and_maps(imported, tmp_path):
    domain, folder, _ = imported
    (plain,) = read_requests(folder / "log", domain)
    weighted = pa.list_(pa.struct([("key", pa.string()), ("score", pa.float64())]))
    pq.write_table(
        pa.table(
            {
                "user": [1, 1, 2],
                "item": [70, 71, 70],
                "time": [T, T + 1, T + 2],
                "clicked": [1, 0, 0],
                "text": pa.array([[0.5, None, 2], None, None], pa.list_(pa.float64(), 3)),
                "why": pa.array([[("x", 2), ("y", 1), ("z", 1)], [("x", -1), ("y", None)], None], weighted),
                "place": pa.array([[5, 6], [7, 8], None], pa.list_(pa.int64())),
                "words": pa.array([[("red", 0.5), ("green", 2)], [("blue", 1)], []], pa.map_(pa.string(), pa.float32())),
            }
        ),
        folder / "log.parquet",
    )
    text = DOMAIN.replace('files = ["log.csv"]', 'files = ["log.parquet"]\nformat = "parquet"')
    text = text.replace('id = "id"', 'id = "id"\nformat = "csv"')
    other = parse_domain(text, source="shop.toml")
    import_log(other, folder, tmp_path / "other", created_ms=T)
    (batch,) = read_requests(tmp_path / "other", other)
    for name, column in plain.features.items():
        for mine, theirs in zip(batch.features[name], column, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_training_and_serving_pack_the_same(imported):
    """The tensors of a request built from the log and from the wire, and the model's answer to both."""
    domain, folder, _ = imported
    dataset, tables = build_dataset(domain, "home", folder / "log", folder / "tables")
    first = dataset.request(0)
    assert first["candidate_weight_why"].tolist() == [[2, 1], [0, 0]]
    assert first["request_weight_words"].tolist() == [0.5, 2, 0]
    assert first["request_list_words"].tolist() == [2, 1, 0]
    assert first["item_weight_topics"].tolist() == [[1, 0.25], [0, 0]]
    assert first["user_vector_taste"].tolist() == [3, 4]
    request = rank_request(
        "home",
        1,
        [70, 71],
        request_time_ms=T,
        candidate_features={"text": [[0.5, math.nan, 2], [math.nan] * 3], "why": [{"x": 2, "y": 1, "z": 1}, {"x": 0, "y": 0}]},
        request_features={"place": np.array([5, 6]), "words": {"red": 0.5, "green": 2}},
    )
    inputs = inputs_from_request(domain, request, np.zeros(0, EVENT_DTYPE))
    served = Packer(domain, "home", tables).pack(inputs).tensors
    for row in tensor_table(domain, "home"):
        count = int(served["sequence_count"][0])
        values = served[row.name][:count] if row.name in dataset.of_sequence else served[row.name]
        assert values.tobytes() == first[row.name].tobytes(), row.name
    model = TransActRanker(domain, "home").eval()
    batch = dataset.batch(np.arange(2))
    with torch.no_grad():
        together = model(batch.tensors, batch.request_row)
        alone = model(dataset.batch(np.array([1])).tensors, torch.zeros(1, dtype=torch.int64))
    assert together.isfinite().all()
    torch.testing.assert_close(together[2:], alone)


def test_the_model_reads_weights_and_missing_vectors():
    domain = parse_domain(DOMAIN, source="shop.toml")
    torch.manual_seed(0)
    side = SideFeatures(domain, "home", "candidate")
    side.absent["text"].data = torch.tensor([7.0, 8, 9])
    table = side.lists["why"].weight
    nan = math.nan
    tensors = {
        "candidate_list_why": torch.tensor([[5, 6], [5, 0], [0, 0], [5, 6], [5, 6]], dtype=torch.int32),
        "candidate_weight_why": torch.tensor([[1.0, 3], [0.25, 0], [0, 0], [0, 0], [1e30, 1e30]]),
        "candidate_vector_text": torch.tensor([[1.0, 2, 3], [nan, nan, nan], [0, 0, 0], [1e9, -1e9, nan], [0, 0, 0]]),
    }
    out = side(tensors)
    assert out.shape == (5, side.width) == (5, 7)
    expected = [(table[5] + 3 * table[6]) / 4, table[5], table[0], table[0], (table[5] + table[6]) / 2]
    torch.testing.assert_close(out[:, :4], torch.stack(expected))
    vectors = torch.tensor([[1.0, 2, 3], [7, 8, 9], [0, 0, 0], [RAW_MAX, -RAW_MAX, 9], [0, 0, 0]])
    torch.testing.assert_close(out[:, 4:], vectors)
    out.sum().backward()
    assert side.absent["text"].grad is not None
    assert side.absent["text"].grad.tolist() == [1, 1, 2]
    assert all(parameter.grad.isfinite().all() for parameter in side.parameters())


def f32(*values):
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("name", "column", "part", "message"),
    [
        ("text", {"number": f32(1, 2, 3)}, "number", "3 values; 6 are needed"),
        ("text", {"number": f32(1, 2, 3, 4, 5, math.inf)}, "number", "finite, or NaN"),
        ("text", {"number": f32(*range(6)), "category": bytes(8)}, "category", "must be empty for a feature of kind 'vector'"),
        (
            "why",
            {"category": bytes(16), "list_length": bytes([2, 0, 0, 0] + [0] * 4), "number": f32(1)},
            "number",
            "1 values; 2 are needed",
        ),
        ("why", {"category": bytes(16), "list_length": bytes([2, 0, 0, 0] + [0] * 4), "number": f32(1, -1)}, "number", "0 or more"),
        ("why", {"category": bytes(16), "list_length": bytes([2, 0, 0, 0] + [0] * 4), "number": f32(1, math.nan)}, "number", "0 or more"),
    ],
)
def test_a_wrong_column_is_refused_by_name(name, column, part, message):
    domain = parse_domain(DOMAIN, source="shop.toml")
    request = rank_request("home", 1, [70, 71], request_time_ms=T)
    request.candidate_features[name].CopyFrom(FeatureColumn(**column))
    with pytest.raises(RequestError, match=message) as raised:
        inputs_from_request(domain, request, np.zeros(0, EVENT_DTYPE))
    assert raised.value.field == f"candidate_features[{name!r}].{part}"


def test_json_columns():
    domain = parse_domain(DOMAIN, source="shop.toml")
    column = feature_column(_column(domain, "f", "text", [[1, 2, 3], None]))
    np.testing.assert_array_equal(np.frombuffer(column.number, "<f4"), np.array([1, 2, 3] + [np.nan] * 3, np.float32))
    column = feature_column(_column(domain, "f", "why", [None, {"x": 0.5}]))
    assert np.frombuffer(column.list_length, "<u4").tolist() == [0, 1]
    assert np.frombuffer(column.category, "<u8").tolist() == [string_id("x")]
    for name, value, message in (
        ("text", [1, 2], r"must be a list of 3 numbers"),
        ("text", ["a", "b", "c"], r"must be a list of 3 numbers"),
        ("why", ["x"], r"must be an object of text and weight"),
    ):
        with pytest.raises(FieldError, match=message) as raised:
            _column(domain, "f", name, [value])
        assert raised.value.field == "f[0]"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "vector", dimension = 3', 'kind = "vector"', "features.text: a vector needs dimension"),
        ("dimension = 3", "dimension = 3, hash_buckets = 3", "features.text: a vector has neither"),
        ("[ranker.home]", 'old__weights = { side = "item", kind = "number" }\n[ranker.home]', "features.old__weights: allowed are names"),
        ("[ranker.home]", "w" * 32 + ' = { side = "item", kind = "weighted_list", hash_buckets = 2 }\n[ranker.home]', "31 characters"),
        ("hash_buckets = 50, ", "", "features.why: a weighted_list needs either vocabulary or hash_buckets"),
    ],
)
def test_what_a_domain_file_may_say(old, new, message):
    with pytest.raises(DomainError, match=message):
        parse_domain(DOMAIN.replace(old, new), source="shop.toml")


@pytest.mark.parametrize(
    ("path", "fingerprints"),
    [
        ("domains/simulator.toml", {"home": "424d8a384c987e63", "related": "b02da44eb134811c"}),
        ("tests/golden/domain.toml", {"home": "795f14b4b4f9e587"}),
        ("domains/kuairand.toml", {"feed": "7467e4a4584eacc1"}),
    ],
)
def test_domains_from_before_these_kinds_have_their_fingerprints(path, fingerprints):
    domain = load_domain(ROOT / path)
    assert {name: tensor_fingerprint(domain, name) for name in fingerprints} == fingerprints

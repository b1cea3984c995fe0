"""Every wrong part of a request is refused by its name; a right one becomes the arrays that pack() takes."""

import numpy as np
import pytest

from features.actions import EVENT_DTYPE
from features.domain import parse_domain
from features.request import LIST_VALUES_MAX, RequestError, inputs_from_request
from protos.v1.ranking_pb2 import FeatureColumn, RankRequest

TEXT = """
name = "shop"
[actions.click]
id = 1
kind = "positive"
[sequence.main]
id = 1
[ranker.home]
sequence = "main"
item_space = "trained"
candidates_max = 3
features = ["score", "source", "reasons", "hour", "price"]
heads.click = { actions = ["click"] }
[features]
score = { side = "candidate", kind = "number" }
source = { side = "candidate", kind = "category", hash_buckets = 10 }
reasons = { side = "candidate", kind = "list", hash_buckets = 10 }
unused = { side = "candidate", kind = "number" }
hour = { side = "request", kind = "number" }
price = { side = "item", kind = "number" }
[entities]
product = 1
"""
ONE_KIND = parse_domain(TEXT, source="one.toml")
KINDS = parse_domain(TEXT + "video = 9\n", source="kinds.toml")
EVENTS = np.zeros(2, EVENT_DTYPE)


def u64(*values):
    return np.array(values, "<u8").tobytes()


def f32(*values):
    return np.array(values, "<f4").tobytes()


def u32(*values):
    return np.array(values, "<u4").tobytes()


def request(**fields):
    return RankRequest(**{"ranker": "home", "user_id": 2**64 - 1, "candidate_ids": u64(5, 0), "request_time_ms": 1_000, **fields})


def test_a_full_request():
    inputs = inputs_from_request(
        KINDS,
        request(
            candidate_ids=u64(5, 5),
            candidate_kinds=bytes([1, 9]),
            candidate_features={
                "score": FeatureColumn(number=f32(0.5, np.nan)),
                "source": FeatureColumn(category=u64(7, 0)),
                "reasons": FeatureColumn(category=u64(1, 2, 3), list_length=u32(0, 3)),
            },
            request_features={"hour": FeatureColumn(number=f32(13))},
        ),
        EVENTS,
        erased_before_ms=77,
    )
    assert (inputs.user_id, inputs.request_time_ms, inputs.erased_before_ms) == (2**64 - 1, 1_000, 77)
    assert inputs.events is EVENTS
    assert (inputs.candidate_ids.tolist(), inputs.candidate_kinds.tolist()) == ([5, 5], [1, 9])
    columns = inputs.candidate_features
    assert columns["score"].number.tolist()[0] == 0.5
    assert np.isnan(columns["score"].number[1])
    assert columns["source"].category.tolist() == [7, 0]
    assert (columns["reasons"].category.tolist(), columns["reasons"].lengths.tolist()) == ([1, 2, 3], [0, 3])
    assert inputs.request_features["hour"].number.tolist() == [13]


def test_kinds_of_all_candidates():
    assert inputs_from_request(ONE_KIND, request(), EVENTS).candidate_kinds.tolist() == [1, 1]
    assert inputs_from_request(KINDS, request(candidate_kind=9), EVENTS).candidate_kinds.tolist() == [9, 9]


def candidate(name, **column):
    return {"candidate_features": {name: FeatureColumn(**column)}}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"ranker": "gone"}, "ranker", "'gone' is not known; rankers: home"),
        ({"identities": [1, 2, 3, 4, 5]}, "identities", "5 further identities; at most 4"),
        ({"identities": [1, 2, 1]}, "identities", "1 stands there twice"),
        ({"identities": [1, 2**64 - 1]}, "identities", "is user_id, which is read anyway"),
        ({"request_time_ms": 0}, "request_time_ms", "0 is not a time"),
        ({"request_time_ms": 2**62}, "request_time_ms", "is not a time"),
        ({"candidate_ids": b""}, "candidate_ids", "0 candidates; ranker home takes 1 to 3"),
        ({"candidate_ids": u64(1, 2, 3, 4)}, "candidate_ids", "4 candidates"),
        ({"candidate_ids": b"1234567"}, "candidate_ids", "7 bytes are not whole"),
        ({"candidate_ids": u64(3, 1, 3)}, "candidate_ids", "3 stands there twice"),
        ({"candidate_kind": 2}, "candidate_kind", r"2 is not an entity kind; kinds: 1 \(product\)"),
        ({"candidate_kinds": b"\1"}, "candidate_kinds", "1 kinds for 2 candidates"),
        ({"candidate_kinds": b"\1\2"}, "candidate_kinds", "2 is not an entity kind"),
        ({"candidate_kinds": b"\1\1", "candidate_kind": 1}, "candidate_kind", "must be 0"),
        (candidate("price", number=f32(1, 2)), "candidate_features['price']", "it has: score, source, reasons"),
        (candidate("unused", number=f32(1, 2)), "candidate_features['unused']", "no such feature"),
        (candidate("hour", number=f32(1, 2)), "candidate_features['hour']", "no such feature of side 'candidate'"),
        (candidate("score", number=f32(1)), "candidate_features['score'].number", "1 values; 2 are needed"),
        (candidate("score", number=f32(1, 2)[:-1]), "candidate_features['score'].number", "not whole"),
        (candidate("score", number=f32(1, -np.inf)), "candidate_features['score'].number", "must be finite, or NaN"),
        (candidate("score", number=f32(1, 2), category=u64(1)), "candidate_features['score'].category", "must be empty"),
        (candidate("source", category=u64(1, 2, 3)), "candidate_features['source'].category", "3 values; 2 are needed"),
        (candidate("source", category=u64(1, 2), list_length=u32(1, 1)), "candidate_features['source'].list_length", "must be empty"),
        (candidate("source", number=f32(1, 2)), "candidate_features['source'].number", "must be empty"),
        (candidate("reasons", category=u64(1, 2)), "candidate_features['reasons'].list_length", "0 values; 2 are needed"),
        (candidate("reasons", category=u64(1), list_length=u32(1, 1)), "candidate_features['reasons'].category", "1 values; 2 are needed"),
        (candidate("reasons", list_length=u32(0, LIST_VALUES_MAX + 1)), "candidate_features['reasons'].list_length", "at most 64"),
        ({"request_features": {"hour": FeatureColumn(number=f32(1, 2))}}, "request_features['hour'].number", "2 values; 1 are needed"),
        ({"request_features": {"score": FeatureColumn(number=f32(1))}}, "request_features['score']", "it has: hour"),
    ],
)
def test_what_is_refused(fields, field, message):
    with pytest.raises(RequestError, match=message) as caught:
        inputs_from_request(ONE_KIND, request(**fields), EVENTS)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_several_kinds_need_one_named():
    with pytest.raises(RequestError, match=r"candidate_kind: 0 is not an entity kind; kinds: 1 \(product\), 9 \(video\)"):
        inputs_from_request(KINDS, request(), EVENTS)

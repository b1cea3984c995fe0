"""pack() against its naive oracle: retractions, unknown actions and kinds, take-downs, ages, future events, missing ids, erased users,
several kinds, lists, categories with vocabulary and hash, sequences of 0, 1, N and more events. Through tables written to disk."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.actions import EVENT_DTYPE
from features.domain import parse_domain
from features.ids import string_id
from features.pack import Column, ManyInputs, Packer, RankInputs
from features.pack_oracle import NaiveTables, naive_pack
from features.sequence import Definition, law
from features.tables import Member, TableSet, write_generation

TIME_MS, CREATED_MS = 1_000_000, 500
TOLERANCE_MS, AGE_MS = 50, 300
IDS = [0, 1, 2, 3, 7, 2**63, 2**64 - 1]
TEXTS = ["ios", "android", "web", "tv"]
COMMON = f"""
name = "shop"
future_tolerance_ms = {TOLERANCE_MS}
[surfaces]
home = 1
search = 300
[actions]
view = {{ id = 1, kind = "impression" }}
click = {{ id = 2, kind = "positive" }}
like = {{ id = 3, kind = "positive" }}
unlike = {{ id = 4, kind = "negative", retracts = "like" }}
unclick = {{ id = 5, kind = "negative", retracts = "click" }}
dislike = {{ id = 6, kind = "negative", retracts = "like" }}
[sequence.main]
id = 1
length = 50
age_days_max = {AGE_MS / 86_400_000 + 1e-12}
[features]
price = {{ side = "item", kind = "number" }}
brand = {{ side = "item", kind = "category", hash_buckets = 3 }}
tags = {{ side = "item", kind = "list", vocabulary = ["ios", "android"], length_max = 3 }}
age = {{ side = "user", kind = "number" }}
height = {{ side = "user", kind = "number" }}
country = {{ side = "user", kind = "category", vocabulary = ["tv", "web"] }}
likes = {{ side = "user", kind = "list", hash_buckets = 5, length_max = 2 }}
hour = {{ side = "request", kind = "number" }}
device = {{ side = "request", kind = "category", vocabulary = ["ios", "android", "web"] }}
query = {{ side = "request", kind = "list", hash_buckets = 9, length_max = 2 }}
score = {{ side = "candidate", kind = "number" }}
position = {{ side = "candidate", kind = "number" }}
source = {{ side = "candidate", kind = "category", hash_buckets = 2 }}
reasons = {{ side = "candidate", kind = "list", vocabulary = ["tv"], length_max = 2 }}
picture = {{ side = "item", kind = "vector", dimension = 2 }}
topics = {{ side = "item", kind = "weighted_list", vocabulary = ["ios", "tv"], length_max = 2 }}
taste = {{ side = "user", kind = "vector", dimension = 3 }}
interests = {{ side = "user", kind = "weighted_list", hash_buckets = 4, length_max = 2 }}
place = {{ side = "request", kind = "vector", dimension = 2 }}
words = {{ side = "request", kind = "weighted_list", hash_buckets = 6, length_max = 3 }}
text = {{ side = "candidate", kind = "vector", dimension = 1 }}
sources = {{ side = "candidate", kind = "weighted_list", vocabulary = ["web"], length_max = 2 }}
[ranker.home]
sequence = "main"
sequence_length = 4
sequence_attributes = ["surface", "value"]
item_space = "both"
user_space = "both"
embedding_dimension = 2
heads.click = {{ actions = ["click"] }}
features = [
  "score", "age", "tags", "price", "country", "hour", "position", "brand", "height", "device", "source", "query", "reasons", "likes",
  "sources", "text", "words", "place", "interests", "taste", "topics", "picture",
]
[ranker.related]
sequence = "main"
sequence_length = 1
sequence_actions = ["click", "unlike"]
item_space = "items"
embedding_dimension = 3
heads.click = {{ actions = ["click"] }}
[ranker.search]
sequence = "main"
sequence_length = 50
sequence_actions = ["like", "view"]
item_space = "items"
user_space = "both"
embedding_dimension = 3
heads.click = {{ actions = ["click"] }}
[entities]
product = 1
"""
DOMAINS = {
    "one kind": parse_domain(COMMON.replace('user_space = "both"\nembedding_dimension = 3', "embedding_dimension = 3"), source="one"),
    "kinds": parse_domain(
        COMMON.replace('user_space = "both"\nembedding_dimension = 3', "embedding_dimension = 3") + "video = 2\nshop = 200\n",
        source="kinds",
    ),
}
U64 = np.uint64


def vectors(rows, dimension, start):
    return (np.arange(start, start + rows * dimension).reshape(rows, dimension) / 8).astype(np.float16)


def hashes(*texts):
    return [string_id(text) if text else 0 for text in texts]


def members(takedowns):
    spaces = {
        "both": {
            "item.product": Member(np.array([7, 1, 2**63], U64), vectors(3, 2, 1), np.array([9, -9], np.float16)),
            "item.video": Member(np.array([0, 1], U64), vectors(2, 2, 50)),
            "user": Member(np.array([0, 42], U64), vectors(2, 2, 90), np.array([5, 6], np.float16)),
        },
        "items": {
            "item.product": Member(np.array([2**64 - 1, 0, 2], U64), vectors(3, 3, 7)),
            "item.shop": Member(np.array([], U64), vectors(0, 3, 0)),
        },
        "features": {
            "item.product": Member(
                np.array([3, 1, 0], U64),
                features={
                    "price": np.array([1.5, np.nan, -0.0], np.float32),
                    "brand": np.array([5, 0, 2**64 - 1], U64),
                    "tags": np.array([hashes("android", "tv", "ios"), hashes("ios", "", ""), hashes("", "", "")], U64),
                    "picture": np.array([[1.5, -0.0], [np.nan, 2], [3, 4]], np.float32),
                    "topics": np.array([hashes("tv", "web"), hashes("ios", ""), hashes("", "")], U64),
                    "topics__weights": np.array([[0.5, 2], [1, 9], [7, 0]], np.float32),
                },
            ),
            "item.video": Member(np.array([1, 2], U64), features={"price": np.array([8, 9], np.float32)}),
            "user": Member(
                np.array([42, 7], U64),
                features={
                    "age": np.array([30, 40], np.float32),
                    "height": np.array([np.nan, 2], np.float32),
                    "country": np.array(hashes("web", "ios"), U64),
                    "likes": np.array([[1, 0], [6, 7]], U64),
                    "taste": np.array([[1, 2, 3], [-1, np.nan, 0]], np.float32),
                    "interests": np.array([[5, 0], [6, 7]], U64),
                    "interests__weights": np.array([[0.25, 0], [1, 0]], np.float32),
                },
            ),
        },
    }
    if takedowns:
        spaces["takedowns"] = {"item.product": Member(np.array([2, 1], U64)), "item.shop": Member(np.array([0], U64))}
    return spaces


PACKERS = []
"""(packer, naive tables) of every domain, with and without take-downs, and ranker."""


@pytest.fixture(scope="module", autouse=True)
def packers(tmp_path_factory):
    for takedowns in (False, True):
        root = tmp_path_factory.mktemp("tables")
        spaces = members(takedowns)
        for space, content in spaces.items():
            write_generation(root, space, CREATED_MS, content)
        for domain in DOMAINS.values():
            opened = {name: TableSet.open(root, domain, name) for name in domain.ranker}
            PACKERS.extend((Packer(domain, name, tables), NaiveTables(spaces, CREATED_MS)) for name, tables in opened.items())
    yield
    PACKERS.clear()


# As bits: several NaNs, -0.0, the smallest and the greatest number.
NUMBER_BITS = st.sampled_from([0x7FC00000, 0xFFC00000, 0x7F800001, 0, 0x80000000, 0x3FC00000, 1, 0x7F7FFFFF])
EVENTS = st.lists(
    st.tuples(
        st.sampled_from([TIME_MS + TOLERANCE_MS + 1, TIME_MS + TOLERANCE_MS, TIME_MS - AGE_MS, TIME_MS - AGE_MS - 1, 1])
        | st.integers(TIME_MS - AGE_MS, TIME_MS + TOLERANCE_MS),
        st.integers(0, 3),
        st.sampled_from(IDS[:4]) | st.sampled_from(IDS),
        st.just(0),
        NUMBER_BITS,
        st.sampled_from([0, 1, 300, 65535]),
        st.sampled_from([1, 1, 1, 2, 200, 255]),
        st.sampled_from([2, 3, 3, 4, 1, 5, 6, 99]),
    ),
    max_size=30,
)
FEW_ITEMS = st.lists(
    st.tuples(
        st.integers(TIME_MS, TIME_MS + TOLERANCE_MS + 10),
        st.integers(0, 99),
        st.sampled_from([3, 7]),
        st.just(0),
        st.just(0),
        st.just(0),
        st.just(1),
        st.sampled_from([1, 2, 3, 4, 5, 6]),
    ),
    min_size=3,
    max_size=10,
)
HASH = st.sampled_from([0, *hashes(*TEXTS), 1, 2**64 - 1])


def floats(bits):
    return np.array(bits, np.uint32).view(np.float32)


def events_of(rows):
    events = np.array(rows, EVENT_DTYPE)
    events["value"] = floats([row[4] for row in rows])
    return law(Definition(1, 1000), events)


def columns(side, domain, count):
    """A strategy of columns for the home ranker's features of a side; each may be absent."""
    made = {}
    for name, feature in domain.features.items():
        if feature.side != side:
            continue
        if feature.kind == "number":
            made[name] = st.lists(NUMBER_BITS, min_size=count, max_size=count).map(lambda v: Column(number=floats(v)))
        elif feature.kind == "category":
            made[name] = st.lists(HASH, min_size=count, max_size=count).map(lambda v: Column(category=np.array(v, U64)))
        elif feature.kind == "vector":
            size = count * feature.dimension
            shape = (count, feature.dimension)
            made[name] = st.lists(NUMBER_BITS, min_size=size, max_size=size).map(
                lambda v, shape=shape: Column(number=floats(v).reshape(shape))
            )
        elif feature.kind == "weighted_list":
            weighted = st.lists(
                st.lists(st.tuples(HASH, st.sampled_from([0.0, -0.0, 0.5, 1e30])), max_size=4), min_size=count, max_size=count
            )
            made[name] = weighted.map(
                lambda v: Column(
                    category=np.array([one for row in v for one, _ in row], U64),
                    lengths=np.array([len(row) for row in v], np.uint32),
                    weights=np.array([weight for row in v for _, weight in row], np.float32),
                )
            )
        else:
            lists = st.lists(st.lists(HASH, max_size=4), min_size=count, max_size=count)
            made[name] = lists.map(
                lambda v: Column(
                    category=np.array([one for row in v for one in row], U64), lengths=np.array([len(row) for row in v], np.uint32)
                )
            )
    return st.fixed_dictionaries({}, optional=made)


@st.composite
def requests(draw, domain, events=EVENTS):
    kinds = st.sampled_from(sorted(domain.entities.values()))
    candidates = draw(st.lists(st.tuples(kinds, st.sampled_from(IDS)), min_size=1, max_size=6, unique=True))
    return RankInputs(
        user_id=draw(st.sampled_from([0, 7, 42, 43])),
        request_time_ms=TIME_MS,
        events=events_of(draw(events)),
        candidate_ids=np.array([item for _, item in candidates], U64),
        candidate_kinds=np.array([kind for kind, _ in candidates], np.uint8),
        candidate_features=draw(columns("candidate", domain, len(candidates))),
        request_features=draw(columns("request", domain, 1)),
        erased_before_ms=draw(st.sampled_from([-1, CREATED_MS - 1, CREATED_MS])),
    )


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_retractions_equal_the_oracle(data):
    packer, naive = PACKERS[data.draw(st.sampled_from([i for i, (packer, _) in enumerate(PACKERS) if packer.ranker_name != "related"]))]
    inputs = data.draw(requests(packer.domain, FEW_ITEMS))
    slow = naive_pack(packer.domain, packer.ranker_name, naive, inputs).tensors
    for name in ("sequence_action", "sequence_age_ms"):
        assert packer.pack(inputs).tensors[name].tolist() == slow[name].tolist()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_pack_equals_the_oracle(data):
    packer, naive = PACKERS[data.draw(st.integers(0, len(PACKERS) - 1))]
    inputs = data.draw(requests(packer.domain))
    fast, slow = packer.pack(inputs), naive_pack(packer.domain, packer.ranker_name, naive, inputs)
    assert list(fast.tensors) == [row.name for row in packer.table]
    for row in packer.table:
        a, b = fast.tensors[row.name], slow.tensors[row.name]
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), row.name
    assert replace(fast, tensors={}) == replace(slow, tensors={})
    assert packer.digest(fast.tensors) == packer.digest(slow.tensors)


def joined(columns_of, names):
    """Columns of several requests as one; a feature that one of them lacks is left out."""
    found = {}
    for name in names:
        columns = [each[name] for each in columns_of if name in each]
        if len(columns) == len(columns_of):
            parts = {part: [getattr(column, part) for column in columns] for part in ("number", "category", "lengths", "weights")}
            found[name] = Column(**{part: None if values[0] is None else np.concatenate(values) for part, values in parts.items()})
    return found


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_many_requests_are_packed_as_each_of_them(data):
    packer, _ = PACKERS[data.draw(st.integers(0, len(PACKERS) - 1))]
    events = data.draw(st.sampled_from([EVENTS, FEW_ITEMS]))
    several = data.draw(st.lists(requests(packer.domain, events), min_size=1, max_size=5))
    several = [replace(one, request_time_ms=TIME_MS + data.draw(st.integers(-20, 20))) for one in several]
    of_candidate = joined([one.candidate_features for one in several], packer.domain.features)
    of_request = joined([one.request_features for one in several], packer.domain.features)
    several = [
        replace(
            one,
            candidate_features={name: value for name, value in one.candidate_features.items() if name in of_candidate},
            request_features={name: value for name, value in one.request_features.items() if name in of_request},
        )
        for one in several
    ]
    many = packer.pack_many(
        ManyInputs(
            user_id=np.array([one.user_id for one in several], U64),
            request_time_ms=np.array([one.request_time_ms for one in several]),
            erased_before_ms=np.array([one.erased_before_ms for one in several]),
            events=np.concatenate([one.events for one in several]),
            event_starts=np.cumsum([0, *(len(one.events) for one in several)]),
            candidate_ids=np.concatenate([one.candidate_ids for one in several]),
            candidate_kinds=np.concatenate([one.candidate_kinds for one in several]),
            starts=np.cumsum([0, *(len(one.candidate_ids) for one in several)]),
            candidate_features=of_candidate,
            request_features=of_request,
        )
    )
    assert list(many) == [row.name for row in packer.table]
    one_by_one = [packer.pack(one).tensors for one in several]
    counts = [int(tensors["sequence_count"][0]) for tensors in one_by_one]
    for row in packer.table:
        values = [tensors[row.name] for tensors in one_by_one]
        if row.name.startswith("sequence_") and row.name != "sequence_count":
            expected = np.concatenate([value[:count] for value, count in zip(values, counts, strict=True)])
        else:
            expected = np.concatenate(values) if row.per_candidate else np.stack(values)
        got = many[row.name]
        assert (got.dtype, got.shape, got.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), row.name


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_changed_byte_changes_the_digest_and_names_its_tensor(data):
    packer = PACKERS[0][0]
    tensors = packer.pack(data.draw(requests(packer.domain))).tensors
    name = data.draw(st.sampled_from(sorted(tensors)))
    changed = bytearray(tensors[name].tobytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = {**tensors, name: np.frombuffer(bytes(changed), tensors[name].dtype).reshape(tensors[name].shape)}
    assert packer.digest(other) != packer.digest(tensors)
    before, after = packer.tensor_digests(tensors), packer.tensor_digests(other)
    assert [each for each in before if before[each] != after[each]] == [name]


@pytest.mark.parametrize("name", ["candidate_embedding", "sequence_count"])
def test_a_tensor_that_is_not_the_tables_has_no_digest(name):
    packer = PACKERS[0][0]
    good = {row.name: np.zeros([2 if size < 0 else size for size in row.shape], row.dtype) for row in packer.table}
    packer.digests(good)
    for wrong in (good[name].astype(np.float64), good[name][None], np.concatenate((good[name],) * 2, axis=-1)):
        with pytest.raises(ValueError, match=f"tensor {name} is "):
            packer.digests({**good, name: wrong})
    with pytest.raises(ValueError, match=f"tensor {name} is absent"):
        packer.digests({other: tensor for other, tensor in good.items() if other != name})

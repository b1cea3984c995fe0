"""The directory of a large table's ids finds what a binary search finds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.id_index import IdIndex

TOP = 2**64 - 1


IDS = st.one_of(st.integers(0, 300), st.integers(0, TOP), st.integers(TOP - 50, TOP), st.integers(2**40, 2**40 + 2_000))


@given(st.sets(IDS, max_size=200), st.lists(st.integers(0, TOP), max_size=20))
def test_every_id_is_found_where_it_is_and_no_other(known, others):
    ids = np.array(sorted(known), np.uint64)
    asked = np.array([*known, *(i ^ 1 for i in known), 0, TOP, *others], np.uint64)
    place_of = {i: place + 1 for place, i in enumerate(ids.tolist())}
    assert IdIndex(ids, ids_min=0).rows(asked).tolist() == [place_of.get(i, 0) for i in asked.tolist()]


@pytest.mark.parametrize(
    ("ids", "even"),
    [
        (np.arange(1, 200_001), True),
        (np.unique(np.random.default_rng(1).integers(0, TOP, 200_000, np.uint64, endpoint=True)), True),
        (np.concatenate((np.arange(150_000), np.arange(2**60, 2**60 + 150_000))), False),
    ],
    ids=["counted", "hashed", "two clusters"],
)
def test_large_tables(ids, even):
    ids = ids.astype(np.uint64)
    index = IdIndex(ids)
    assert (index._starts is not None) == even, "the directory is there where it is of use"
    random = np.random.default_rng(2)
    places = random.integers(0, len(ids), 5_000)
    assert np.array_equal(index.rows(ids[places]), places + 1)
    strangers = np.setdiff1d(random.integers(0, TOP, 5_000, np.uint64), ids)
    assert not index.rows(strangers).any()
    assert index.rows(np.zeros(0, np.uint64)).shape == (0,)

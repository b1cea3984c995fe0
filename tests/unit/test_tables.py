"""Generations of tables: written whole or not at all, found by name, checked against the domain file, looked up at once."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from features.domain import parse_domain
from features.tables import (
    NONE,
    USER,
    Member,
    TableError,
    TableSet,
    _content,
    _Meta,
    generation_names,
    generations_of,
    lineage_of,
    open_generation,
    time_of,
    write_generation,
)

U64 = np.uint64
DOMAIN = parse_domain(
    """
name = "shop"
[entities]
product = 1
video = 2
[actions.click]
id = 1
kind = "positive"
[sequence.main]
id = 1
[ranker.home]
sequence = "main"
item_space = "trained"
user_space = "trained"
embedding_dimension = 2
features = ["price", "tags", "age"]
heads.click = { actions = ["click"] }
[ranker.search]
sequence = "main"
item_space = "trained"
embedding_dimension = 2
heads.click = { actions = ["click"] }
[features]
price = { side = "item", kind = "number" }
tags = { side = "item", kind = "list", hash_buckets = 10, length_max = 2 }
age = { side = "user", kind = "number" }
""",
    source="domain.toml",
)
VECTORS = np.array([[1, 2], [3, 4], [5, 6]], np.float16)
ITEMS = Member(np.array([9, 2**64 - 1, 0], U64), VECTORS, np.array([-1, -2], np.float16))
USERS = Member(np.array([42], U64), VECTORS[:1])
PRICES = np.array([1.5, np.nan], np.float32)
FEATURES = Member(np.array([9, 0], U64), features={"price": PRICES, "tags": np.array([[7, 0], [8, 9]], U64)})
AGES = Member(np.array([42], U64), features={"age": np.array([30], np.float32)})


@pytest.fixture
def root(tmp_path):
    write_generation(tmp_path, "trained", 1_000, {"item.product": ITEMS, USER: USERS})
    write_generation(tmp_path, "features", 1_000, {"item.product": FEATURES, USER: AGES})
    return tmp_path


def test_look_up_of_known_and_unknown_ids(root):
    table = open_generation(root, "trained", verify=True)
    ids = np.array([0, 1, 9, 2**64 - 1, 9], U64)
    assert table.vectors("item.product", ids).tolist() == [[5, 6], [-1, -2], [1, 2], [3, 4], [1, 2]]
    assert table.rows("item.product", ids).tolist() == [1, 0, 2, 3, 2]
    assert table.ids("item.product").tolist() == [0, 9, 2**64 - 1]
    assert table.vectors(USER, np.array([1], U64)).tolist() == [[0, 0]]
    assert table.rows("item.video", ids).tolist() == [0] * 5
    with pytest.raises(TableError, match=r"item\.video has no vectors; it has members item\.product, user"):
        table.vectors("item.video", ids)


def test_missing_rows_of_features(root):
    table = open_generation(root, "features")
    assert np.isnan(table.column("item.product", "price")[0])
    assert table.column("item.product", "price")[1:].tolist()[1] == 1.5  # of id 9, the greater one
    assert table.column("item.product", "tags").tolist() == [[0, 0], [8, 9], [7, 0]]
    assert table.column("item.product", "age") is None


def test_a_member_without_rows(tmp_path):
    write_generation(tmp_path, "takedowns", 0, {"item.product": Member(np.zeros(0, U64))})
    assert open_generation(tmp_path, "takedowns", verify=True).rows("item.product", np.array([0, 5], U64)).tolist() == [0, 0]


def test_names_sort_by_time_and_content(tmp_path):
    later = write_generation(tmp_path, "trained", 1_700_000_000_007, {USER: USERS})
    earlier = write_generation(tmp_path, "trained", 1_699_999_999_999, {USER: replace(USERS, vectors=VECTORS[1:2])})
    assert later.name.startswith("20231114T221320007Z-")
    assert generation_names(tmp_path, "trained") == [earlier.name, later.name]
    newest = open_generation(tmp_path, "trained")
    assert (newest.name, newest.created_ms, newest.space, newest.dimension) == (later.name, 1_700_000_000_007, "trained", 2)
    assert open_generation(tmp_path, "trained", earlier.name).vectors(USER, np.array([42], U64)).tolist() == [[3, 4]]
    assert write_generation(tmp_path, "trained", 1_700_000_000_007, {USER: USERS}) == later
    assert write_generation(tmp_path, "trained", 1_700_000_000_007, {USER: replace(USERS, ids=np.array([43], U64))}) != later


def test_of_one_moment_the_generation_written_last_is_the_newest(tmp_path):
    made = {}
    for user in range(8):  # by their names alone half of them would stand wrong
        member = {USER: replace(USERS, ids=np.array([user], U64))}
        made[user] = write_generation(tmp_path, "trained", 5_000, member, lineage="a1").name
        assert open_generation(tmp_path, "trained").name == made[user]
        assert next(generations_of(tmp_path, "trained", "a1")) == made[user]
    later = write_generation(tmp_path, "trained", 6_000, {USER: USERS}, lineage="a1").name
    again = write_generation(tmp_path, "trained", 5_000, {USER: replace(USERS, ids=np.array([3], U64))}, lineage="a1").name
    assert again == made[3]
    order = [made[user] for user in (0, 1, 2, 4, 5, 6, 7, 3)]
    assert generation_names(tmp_path, "trained") == [*order, later]
    assert [open_generation(tmp_path, "trained", name, verify=True).name for name in order] == order
    (tmp_path / "trained" / made[7] / "meta.json").write_text("{")  # a damaged one hides no other
    assert set(generation_names(tmp_path, "trained")) == {*order, later}
    (name,) = generation_names(write_generation(tmp_path, "alone", 1_000, {USER: USERS}).parents[1], "alone")
    assert "revision" not in json.loads((tmp_path / "alone" / name / "meta.json").read_text()), "earlier programs read it"
    assert time_of(later) == 6_000


def test_rows_do_not_depend_on_the_order_given(tmp_path):
    order = np.array([2, 0, 1])
    one = write_generation(tmp_path, "a", 5, {"item.product": ITEMS})
    other = write_generation(tmp_path, "b", 5, {"item.product": replace(ITEMS, ids=ITEMS.ids[order], vectors=VECTORS[order])})
    assert one.name == other.name


def test_half_a_generation_is_not_there(root):
    (name,) = generation_names(root, "trained")
    with pytest.raises(TableError, match="twice"):
        write_generation(root, "trained", 2_000, {USER: USERS, "item.product": replace(ITEMS, ids=np.array([9, 9, 0], U64))})
    assert [path.name for path in (root / "trained").iterdir()] == [name]
    (root / "trained" / name / "meta.json").unlink()
    with pytest.raises(TableError, match=r"trained: no generation there; publish one first"):
        open_generation(root, "trained")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (Member(np.array([1, 1], U64)), "user.ids: 1 stands there twice"),
        (Member(np.array([1], np.int64)), r"user.ids: must be uint64 \[n\], not int64 \[1\]"),
        (Member(np.array([1], U64), VECTORS), "user.vectors: 3 rows for 1 ids"),
        (Member(np.array([1], U64), VECTORS[:1].astype(np.float32)), r"user.vectors: must be float16 \[n, D\], not float32"),
        (Member(np.array([1], U64), np.array([[np.inf]], np.float16)), "vectors must be finite"),
        (Member(np.array([1], U64), features={"age": np.array([np.inf], np.float32)}), r"user\.age\.npy: numbers must be finite"),
        (Member(np.array([1], U64), features={"age": np.array([1.0])}), "user.age: must be float32"),
        (Member(np.array([1], U64), features={"../age": np.array([1], np.float32)}), "'../age' cannot be the name"),
    ],
)
def test_what_cannot_be_written(tmp_path, member, message):
    with pytest.raises(TableError, match=message):
        write_generation(tmp_path, "trained", 1, {USER: member})


def test_what_cannot_be_named(tmp_path):
    for arguments, message in (
        (("../trained", 1, {USER: USERS}), "space '../trained'"),
        (("trained", 1, {"product": USERS}), "member 'product'"),
        (("trained", -1, {USER: USERS}), "created_ms: -1"),
        (("trained", 1, {USER: USERS, "item.product": Member(np.array([1], U64), VECTORS[:1, :1])}), r"several dimensions: \[1, 2\]"),
    ):
        with pytest.raises(TableError, match=message):
            write_generation(tmp_path, *arguments)


def test_a_changed_row_is_refused_with_both_sums(root):
    (name,) = generation_names(root, "trained")
    path = root / "trained" / name / "item.product.vectors.npy"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(TableError, match=r"item\.product\.vectors\.npy: its sha256 is [0-9a-f]{64}; meta.json says [0-9a-f]{64}"):
        open_generation(root, "trained", verify=True)
    path.write_bytes(changed[:-2])
    with pytest.raises(TableError, match=r"item\.product\.vectors\.npy"):
        open_generation(root, "trained")
    path.unlink()
    with pytest.raises(TableError, match=r"vectors\.npy: cannot be read"):
        open_generation(root, "trained")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "format_version is 2, expected 1"),
        ("space", "other", "space is 'other', expected 'trained'"),
        ("generation", "x", "generation is 'x', expected '1970"),
        ("rows", {"item.product": 2, "user": 1}, r"item\.product\.ids has 3 rows; meta.json says 2 ids"),
        ("files", {}, "content is '[0-9a-f]{8}', expected '[0-9a-f]{8}'"),
        ("more", 1, "not of format 1"),
    ],
)
def test_a_changed_meta_is_refused(root, key, value, message):
    (name,) = generation_names(root, "trained")
    path = root / "trained" / name / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(TableError, match=message):
        open_generation(root, "trained")


def test_a_generation_that_is_not_there(root):
    with pytest.raises(TableError, match=r"'20200101T000000000Z-00000000' is not there; space trained has 1970"):
        open_generation(root, "trained", "20200101T000000000Z-00000000")


def test_a_set_opens_what_its_ranker_needs(root):
    home, search = TableSet.open(root, DOMAIN, "home"), TableSet.open(root, DOMAIN, "search")
    assert sorted(home.generations) == ["features", "takedowns", "trained"]
    assert home.users is home.items
    assert home.generations["takedowns"] == NONE
    assert sorted(search.generations) == ["takedowns", "trained"]
    assert (search.users, search.features) == (None, None)


def test_pins_open_what_was_open_then(root):
    before = TableSet.open(root, DOMAIN, "home")
    write_generation(root, "trained", 2_000, {"item.product": ITEMS, USER: USERS})
    write_generation(root, "takedowns", 2_000, {"item.product": Member(np.array([9], U64))})
    after = TableSet.open(root, DOMAIN, "home")
    assert after.generations["trained"] > before.generations["trained"]
    kinds, ids = np.array([1, 2, 1], np.uint8), np.array([9, 9, 0], U64)
    assert after.taken_down(kinds, ids).tolist() == [True, False, False]
    again = TableSet.open(root, DOMAIN, "home", before.generations)
    assert again.generations == before.generations
    assert not again.taken_down(kinds, ids).any()
    assert TableSet.open(root, DOMAIN, "home", {"features": before.generations["features"]}).generations == after.generations


def test_generations_of_one_lineage_are_told_apart(tmp_path):
    old, other, new = (
        write_generation(tmp_path, "trained", time_ms, {USER: USERS}, lineage=lineage).name
        for time_ms, lineage in ((1_000, "a1"), (1_000, "b2"), (2_000, "a1"))
    )
    unnamed = write_generation(tmp_path, "trained", 3_000, {USER: USERS}).name
    assert len({old, other, new, unnamed}) == 4
    assert [list(generations_of(tmp_path, "trained", lineage)) for lineage in ("a1", "b2", "", "c3")] == [
        [new, old],
        [other],
        [unnamed],
        [],
    ]
    assert open_generation(tmp_path, "trained", new).lineage == lineage_of(tmp_path, "trained", old) == "a1"
    meta = tmp_path / "trained" / new / "meta.json"
    meta.write_text(meta.read_text().replace('"a1"', '"b2"'))
    with pytest.raises(TableError, match="content"):
        lineage_of(tmp_path, "trained", new)
    with pytest.raises(TableError, match="lineage"):
        write_generation(tmp_path, "trained", 1_000, {USER: USERS}, lineage="a/b")


def test_a_generation_without_a_lineage_in_its_meta_reads(root):
    (name,) = generation_names(root, "trained")
    meta = root / "trained" / name / "meta.json"
    said = json.loads(meta.read_text())
    assert said.pop("lineage") == ""
    meta.write_text(json.dumps(said))
    assert open_generation(root, "trained", name, verify=True).lineage == ""


def test_a_generation_of_another_folder_is_refused(root, tmp_path):
    (name,) = generation_names(root, "trained")
    shutil.copytree(root / "trained", tmp_path / "x" / "trained")
    for outside in (
        f"../../{tmp_path.name}/x/trained/{name}",
        f"../trained/{name}",
        f"./{name}",
        str(tmp_path / "x" / "trained" / name),
        "",
    ):
        with pytest.raises(TableError, match="is not there"):
            open_generation(root, "trained", outside)
        with pytest.raises(TableError, match="is not there"):
            TableSet.open(root, DOMAIN, "home", {"trained": outside})


@pytest.mark.parametrize("file_name", ["../user.ids.npy", "/tmp/user.ids.npy", "user.ids.npy/../user.x.npy", "user.ids", "other.ids.npy"])
def test_a_file_outside_of_its_folder_is_refused(root, file_name):
    (name,) = generation_names(root, "trained")
    folder = root / "trained" / name
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][file_name] = meta["files"]["user.ids.npy"]
    forged = f"{name[:-8]}{_content(_Meta.model_validate(meta).checksums, '')}"
    (folder / "meta.json").write_text(json.dumps(meta | {"generation": forged}))
    folder.rename(folder.with_name(forged))
    with pytest.raises(TableError, match=r"meta\.json: files: .* is not"):
        open_generation(root, "trained", forged)


def test_kinds_are_looked_up_apart(root):
    tables = TableSet.open(root, DOMAIN, "home")
    found = tables.find(tables.items, np.array([2, 1, 1, 200], np.uint8), np.array([9, 9, 5, 9], U64))
    assert found.missing.tolist() == [True, False, True, True]
    out = np.full((4, 2), 7, np.float16)
    found.fill_vectors(out)
    assert out.tolist() == [[7, 7], [1, 2], [-1, -2], [7, 7]]


def test_a_user_erased_since_is_missing(root):
    tables = TableSet.open(root, DOMAIN, "home")
    assert [bool(tables.find_user(tables.items, 42, erased).missing[0]) for erased in (-1, 999, 1_000, 5_000)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("space", "members", "message"),
    [
        (
            "trained",
            {"item.product": Member(np.array([1], U64), VECTORS[:1, :1])},
            "have dimension 1; ranker.home.embedding_dimension is 2",
        ),
        ("trained", {"item.product": ITEMS}, r"has vectors of item\.product; ranker\.home needs user"),
        ("trained", {USER: USERS}, r"has vectors of user; ranker\.home needs item\.product or item\.video"),
        ("features", {"item.product": FEATURES}, r"no column age in user; features\.age of the domain file"),
        (
            "features",
            {"item.product": replace(FEATURES, features={"price": PRICES, "tags": np.ones((2, 3), U64)}), USER: AGES},
            r"item\.product\.tags is uint64 \['n', 3\]; features\.tags of the domain file needs uint64 \['n', 2\]",
        ),
    ],
)
def test_tables_that_do_not_fit_the_domain_file(root, space, members, message):
    write_generation(root, space, 9_000, members)
    with pytest.raises(TableError, match=message):
        TableSet.open(root, DOMAIN, "home")

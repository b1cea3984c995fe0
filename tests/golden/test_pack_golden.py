"""The digest of fixed inputs must never change by accident: it is what served rankings are compared with.

After an intended change, write the golden file anew from the repository's root and say in CHANGELOG.md that older ranking logs differ:

    PYTHONPATH=. .venv/bin/python tests/golden/test_pack_golden.py > tests/golden/pack.json
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from features.actions import EVENT_DTYPE
from features.domain import load_domain
from features.ids import string_id
from features.pack import Column, Packer, RankInputs, digest, tensor_digests
from features.sequence import Definition, law
from features.tables import Member, TableSet, write_generation

HERE = Path(__file__).parent
TIME_MS = 1_700_000_000_000
NAN = np.float32(np.nan)


def hashed(*texts):
    return np.array([string_id(text) if text else 0 for text in texts], np.uint64)


def numbers(*values):
    return np.array(values, np.float32)


def write_tables(root):
    ids = np.arange(0, 60, 3, dtype=np.uint64)
    vectors = ((np.arange(80) * 37 % 101 - 50) / 16).astype(np.float16).reshape(20, 4)
    product = Member(ids, vectors, np.array([1, 0, 0, -1], np.float16))
    write_generation(root, "trained", TIME_MS, {"item.product": product, "item.video": Member(ids[:5], vectors[5:10]), "user": product})
    features = {
        "price": numbers(*(value / 4 for value in range(19)), NAN),
        "brand": hashed(*["acme", "globex", "initech", ""] * 5),
        "tags": hashed(*["a", "b", "c", "d", "", ""] * 10).reshape(20, 3),
    }
    user = {"age": numbers(*range(20)), "country": hashed(*(f"country {i}" for i in range(20)))}
    write_generation(root, "features", TIME_MS, {"item.product": Member(ids, features=features), "user": Member(ids, features=user)})
    write_generation(root, "takedowns", TIME_MS, {"item.product": Member(np.array([6], np.uint64))})


def fixed_inputs():
    """Twelve events of which the model sees eight or fewer: unknown, late, old, retracted and taken-down ones among them."""
    day_ms, product, video = 86_400_000, 1, 7
    rows = [
        (TIME_MS - day_ms - 1, 1, 3, 0, 1.0, 1, product, 2),  # too old
        (TIME_MS - day_ms, 2, 3, 0, 1.5, 1, product, 2),
        (TIME_MS - 9_000, 3, 0, 0, NAN, 2, product, 2),  # item 0 is an item
        (TIME_MS - 8_000, 4, 9, 5, NAN, 0, product, 3),  # retracted
        (TIME_MS - 8_000, 5, 9, 5, NAN, 0, video, 3),
        (TIME_MS - 7_000, 6, 9, 0, NAN, 2, product, 4),
        (TIME_MS - 6_000, 7, 6, 0, 2.0, 1, product, 2),  # taken down
        (TIME_MS - 5_000, 8, 2**64 - 1, 0, 2.5, 9, product, 2),  # no vector; a surface without a name
        (TIME_MS - 4_000, 9, 12, 0, 3.0, 1, product, 99),  # unknown action
        (TIME_MS - 3_000, 10, 12, 0, 3.5, 1, 99, 2),  # unknown kind
        (TIME_MS + 1_000, 11, 15, 0, 4.0, 1, product, 1),  # the clocks differ
        (TIME_MS + 1_001, 12, 18, 0, 4.5, 1, product, 2),  # too far ahead
    ]
    return RankInputs(
        user_id=21,
        request_time_ms=TIME_MS,
        events=law(Definition(1, 50), np.array(rows, EVENT_DTYPE)),
        candidate_ids=np.array([0, 3, 4, 57, 3], np.uint64),
        candidate_kinds=np.array([product, product, product, product, video], np.uint8),
        candidate_features={
            "score": Column(number=numbers(0.5, NAN, -0.0, 1e-40, 3e38)),
            "reasons": Column(category=hashed("near", "far", "new", "new", ""), lengths=np.array([0, 1, 3, 0, 1], np.uint32)),
        },
        request_features={"hour": Column(number=numbers(13)), "device": Column(category=hashed("android"))},
    )


def fixed_digests(root):
    write_tables(root)
    domain = load_domain(HERE / "domain.toml")
    packer = Packer(domain, "home", TableSet.open(root, domain, "home"))
    tensors = packer.pack(fixed_inputs()).tensors
    assert packer.digest(tensors) == digest(domain, "home", tensors)
    each = tensor_digests(domain, "home", tensors)
    return {"digest": digest(domain, "home", tensors).hex(), "tensors": {name: f"{value:016x}" for name, value in each.items()}}, tensors


def test_digests_of_fixed_inputs(tmp_path):
    found, tensors = fixed_digests(tmp_path)
    golden = json.loads((HERE / "pack.json").read_text("utf-8"))
    assert found["tensors"] == golden["tensors"]
    assert list(found["tensors"]) == list(golden["tensors"]), "the order of the digest"
    assert found == golden
    assert tensors["sequence_action"].tolist() == [1, 2, 3, 2, 2, 0, 0, 0]
    assert tensors["sequence_age_ms"].tolist() == [0, 5_000, 8_000, 9_000, 86_400_000, 0, 0, 0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        json.dump(fixed_digests(folder)[0], sys.stdout, indent=1)
        sys.stdout.write("\n")

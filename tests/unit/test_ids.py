import numpy as np
import pytest

from features.ids import Collisions, derived_event_id, log_epoch, murmur2, partition_of, partitions_of, string_id, user_key, user_keys


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # what org.apache.kafka.common.utils.Utils.murmur2 returns
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
    ],
)
def test_murmur2_is_the_one_of_java_clients(data, expected):
    assert murmur2(data) == expected % 2**32


def test_key_is_16_hex_digits_and_partitions_spread():
    assert user_key(42) == b"000000000000002a"
    assert user_key(2**64 - 1) == b"f" * 16
    users = np.array([0, 1, 42, 2**64 - 1, *range(10**9, 10**9 + 20)], np.uint64)
    assert [bytes(key) for key in user_keys(users)] == [user_key(int(user)) for user in users]
    assert partitions_of(users, 7).tolist() == [partition_of(user_key(int(user)), 7) for user in users]
    assert {partition_of(user_key(user), 4) for user in range(50)} == {0, 1, 2, 3}


def test_text_hashes_by_xxh3_64_and_collisions_are_told():
    assert string_id("") == 0x2D06800538D394C2
    seen = Collisions()
    seen._text_by_id[string_id("b")] = "a"  # no pair of colliding texts is at hand: pretend one
    assert (seen.add("x"), seen.found) == (string_id("x"), [])
    seen.add("b")
    assert seen.found == [(string_id("b"), "a", "b")]


def test_derived_event_id_depends_on_every_field():
    base = (1, 2, 3, 4, 5)
    others = {derived_event_id(*(value + (place == changed) for place, value in enumerate(base))) for changed in range(5)}
    assert len(others | {derived_event_id(*base)}) == 6


def test_epoch_changes_with_cluster_topic_and_partitions():
    epochs = {log_epoch("c", "t", 4), log_epoch("d", "t", 4), log_epoch("c", "u", 4), log_epoch("c", "t", 5)}
    assert len(epochs) == 4
    assert 0 not in epochs

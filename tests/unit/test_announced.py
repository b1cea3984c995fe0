"""What an announcement means to a server that starts behind it, and where a rollback goes."""

import json

import pytest

from inference.announced import PREVIOUS_MAX, Announced, back_to, options
from inference.release import ReleaseError
from protos.v1.ranking_pb2 import ReleaseAnnouncement

A, B, C = (f"home-20240101T00000{second}Z-00000000" for second in (1, 2, 3))


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate((A, B, C)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"created_ms": 1000 * (i + 1) + 500}))
    return tmp_path


def ids(folder, **announced):
    return {ranker: [one.release_id for one in found] for ranker, found in options(folder, announced).items()}


def test_without_an_announcement_the_newest_serves(folder):
    assert ids(folder) == {"home": [C]}


def test_an_announcement_holds_over_releases_that_were_there_already(folder):
    assert ids(folder, home=Announced(A, time_ms=3_500)) == {"home": [A, C]}, "C is the second choice: A may be gone"
    assert options(folder, {"home": Announced(C, {"items": "g"}, 3_500)})["home"][0].generations == {"items": "g"}


def test_a_release_made_behind_the_announcement_is_newer_than_what_was_said(folder):
    assert ids(folder, home=Announced(A, time_ms=3_499)) == {"home": [C]}


def test_a_release_for_experiments_serves_once_it_is_announced_and_not_before(folder):
    (folder / C / "manifest.json").write_text(json.dumps({"created_ms": 3_500, "only": True}))
    assert ids(folder) == {"home": [B]}
    assert ids(folder, home=Announced(A, time_ms=1_600)) == {"home": [B]}
    assert ids(folder, home=Announced(A, time_ms=2_600)) == {"home": [A, B]}, "a server that starts again during a canary"
    assert ids(folder, home=Announced(C, time_ms=3_600)) == {"home": [C, B]}


def test_an_announced_release_that_is_not_here_yet_is_named_all_the_same(tmp_path):
    assert ids(tmp_path, home=Announced(A, time_ms=1)) == {"home": [A]}


def test_an_unreadable_manifest_of_the_newest_is_named(folder):
    (folder / C / "manifest.json").write_text("{}")
    with pytest.raises(ReleaseError, match=f"{C}: manifest.json cannot be read"):
        options(folder, {"home": Announced(A, time_ms=1)})


def test_the_last_five_before_it_are_remembered_each_once():
    said = Announced(A)
    for name in ("b", "c", "b", "d", "e", "f", "g"):
        said = Announced(name, previous=said.followed_by(name))
    assert said.previous == ("f", "e", "d", "b", "c")
    assert len(said.previous) == PREVIOUS_MAX


def test_rollbacks_go_further_back_not_forth():
    now = Announced(C, previous=(B, A))
    assert back_to(now) == B
    now = Announced(B, previous=now.followed_by(B))
    assert now.previous == (C, A)
    assert back_to(now) == A
    assert back_to(Announced(A, previous=(B, C))) is None


def test_an_announcement_of_before_there_was_previous_is_read():
    assert Announced.decode(ReleaseAnnouncement(ranker="home", release_id=A, announced_time_ms=7)) == Announced(A, {}, 7, ())

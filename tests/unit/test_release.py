"""Releases: written once, verified wholly, refused with both sides named."""

import json

import pytest
import torch
from serving_world import DOMAIN, DOMAIN_TOML, NOW_MS, make_model

from inference.release import (
    ReleaseError,
    _content,
    blank_request,
    load_model,
    newest_releases,
    open_release,
    release_folder,
    write_release,
    write_triton_model,
)

GENERATIONS = {"related_items": "20231114T221320000Z-0123abcd"}


def write(folder, **changes):
    given = {
        "model": make_model("related"),
        "domain_toml": DOMAIN_TOML,
        "ranker": "related",
        "created_ms": NOW_MS,
        "generations": GENERATIONS,
        "metrics": {"auc": 0.75, "empty": float("nan")},
    } | changes
    return write_release(folder, **given)


def forge(release, change):
    """A release whose manifest was changed by someone who also renewed its id."""
    manifest = json.loads((release.folder / "manifest.json").read_text())
    change(manifest)
    manifest.pop("release_id")
    release_id = f"{release.release_id[:-8]}{_content(manifest)}"
    folder = release.folder.rename(release.folder.with_name(release_id))
    (folder / "manifest.json").write_text(json.dumps({"release_id": release_id, **manifest}))
    return folder


def test_what_is_written_is_what_is_opened(tmp_path):
    written = write(tmp_path)
    release = open_release(tmp_path / written.release_id)
    assert release.release_id.startswith("related-20231114T221320Z-")
    assert (release.ranker, release.created_ms, release.generations) == ("related", NOW_MS, GENERATIONS)
    assert release.domain == DOMAIN
    assert release.metrics == {"auc": 0.75, "empty": None}
    assert release.sequence_fingerprint == DOMAIN.sequence_fingerprint("main")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        [release.release_id, "domain.toml", "manifest.json", "model.safetensors"]
    )
    expected = make_model("related").state_dict()
    model = load_model(release)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])


def test_the_same_release_is_written_once_and_other_weights_are_another(tmp_path):
    assert write(tmp_path).release_id == write(tmp_path).release_id
    assert write(tmp_path, model=make_model("related", seed=1)).release_id != write(tmp_path).release_id
    assert len(list(tmp_path.iterdir())) == 2


def test_the_model_without_the_sequence_is_itself_after_a_round_trip(tmp_path):
    from inference.transact import TransActRanker

    release = write(tmp_path, model=TransActRanker(DOMAIN, "related", use_sequence=False))
    assert not load_model(release).use_sequence


def test_the_newest_release_is_the_latest_whole_one(tmp_path):
    assert newest_releases(tmp_path / "absent") == {}
    write(tmp_path)
    newest = write(tmp_path, created_ms=NOW_MS + 60_000)
    unfinished = write(tmp_path, created_ms=NOW_MS + 120_000)
    (unfinished.folder / "manifest.json").unlink()
    assert newest_releases(tmp_path) == {"related": newest.release_id}


@pytest.mark.parametrize("name", ["model.safetensors", "domain.toml", "manifest.json"])
def test_a_changed_byte_is_refused_by_file(tmp_path, name):
    release = write(tmp_path)
    path = release.folder / name
    data = path.read_bytes()
    at = data.index(b"related") if name != "model.safetensors" else len(data) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ReleaseError, match=rf"{release.release_id}.*"):
        open_release(release.folder)


@pytest.mark.parametrize("name", ["model.safetensors", "domain.toml", "manifest.json"])
def test_a_missing_file_is_named(tmp_path, name):
    release = write(tmp_path)
    (release.folder / name).unlink()
    with pytest.raises(ReleaseError, match=name):
        open_release(release.folder)


def test_a_tensor_that_the_domain_file_does_not_give_is_refused_with_both_sides(tmp_path):
    def widen(manifest):
        next(row for row in manifest["inputs"] if row["name"] == "sequence_age_ms")["shape"] = [50]

    folder = forge(write(tmp_path), widen)
    with pytest.raises(ReleaseError, match=r"tensor sequence_age_ms: manifest.json has int64 \[50\], domain.toml gives int64 \[20\]"):
        open_release(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor_fingerprint", "0" * 16),
        ("sequence", {"name": "main", "fingerprint": "0" * 16}),
        ("spaces", [{"name": "related_items", "dimension": 8, "dtype": "float16"}]),
    ],
)
def test_an_interface_of_another_domain_file_is_refused(tmp_path, key, value):
    folder = forge(write(tmp_path), lambda manifest: manifest.update({key: value}))
    with pytest.raises(ReleaseError, match=f"{key}: manifest.json has .*, domain.toml gives "):
        open_release(folder)


def test_a_newer_format_says_to_upgrade(tmp_path):
    folder = forge(write(tmp_path), lambda manifest: manifest.update(format_version=2))
    with pytest.raises(ReleaseError, match="format_version 2 is not 1: upgrade"):
        open_release(folder)


def test_weights_of_another_model_are_refused(tmp_path):
    release = write(tmp_path, model=make_model("home"))
    with pytest.raises(ReleaseError, match=r"model\.safetensors and domain\.toml do not agree"):
        load_model(release)


def test_a_release_needs_the_generations_of_its_spaces(tmp_path):
    with pytest.raises(ReleaseError, match="needs space 'related_items', given: other"):
        write(tmp_path, generations={"other": "x"})
    with pytest.raises(ReleaseError, match="ranker: 'nowhere' is not in the domain file; allowed: home, related"):
        write(tmp_path, ranker="nowhere")


@pytest.mark.parametrize("name", ["", "..", "../related-20231114T221320Z-00000000", "related-20231114T221320Z-00000000/..", "/etc", "a\0b"])
def test_a_name_from_outside_never_leaves_the_folder(tmp_path, name):
    with pytest.raises(ReleaseError, match="release_id"):
        release_folder(tmp_path, name)


def test_the_triton_model_is_generated_once(tmp_path):
    release = write(tmp_path / "releases")
    repository = tmp_path / "repository"
    assert write_triton_model(release, repository, threads=3) == release.release_id
    folder = repository / release.release_id
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == ["1", "1/model.py", "config.pbtxt"]
    assert str(release.folder) in (folder / "config.pbtxt").read_text()
    times = [path.stat().st_mtime_ns for path in folder.rglob("*")]
    write_triton_model(release, repository, threads=3)
    assert [path.stat().st_mtime_ns for path in folder.rglob("*")] == times
    write_triton_model(release, repository, threads=1)
    assert 'key: "threads" value: { string_value: "1" }' in (folder / "config.pbtxt").read_text()


def test_a_blank_request_has_the_tables_shapes():
    blank = blank_request(DOMAIN, "related", 7)
    assert blank["candidate_embedding"].shape == (7, 16)
    assert blank["sequence_embedding"].shape == (20, 16)
    assert blank["sequence_count"].tolist() == [20]

"""One suite over a folder and an S3 server: what a snapshot promises, whatever holds it."""

import json
import logging
import shutil
from dataclasses import replace

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from features.sequence import Definition
from streams.errors import SnapshotError, StateError
from streams.snapshots import Manifest, ManifestError, Snapshots, _checksum, set_aside
from streams.state import fingerprints, row_key, row_keys
from streams.store import RocksStore

KEPT = {1: Definition(fingerprint=11, length=3)}
EPOCH, FINGERPRINTS = 77, fingerprints(KEPT)


@pytest.fixture(scope="module")
def s3_server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def new_snapshots(request, tmp_path, monkeypatch):
    """`new_snapshots(**options)`: the same place from another process."""
    if request.param == "folder":
        return lambda **given: Snapshots(str(tmp_path / "snapshots"), **{"grace_s": 0.0, **given})
    address = request.getfixturevalue("s3_server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bucket = f"b{abs(hash(tmp_path))}"
    boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket=bucket)
    options = {"client_kwargs": {"endpoint_url": address, "region_name": "us-east-1"}}
    return lambda **given: Snapshots(f"s3://{bucket}/state", options=options, **{"grace_s": 0.0, **given})


@pytest.fixture
def snapshots(new_snapshots):
    return new_snapshots()


class State:
    """A partition with seeded rows, and what it should hold."""

    def __init__(self, folder):
        self.folder = folder
        self.store = RocksStore(folder / "state", KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20, lock_wait_s=0.0)
        self.held = self.store.open(0, EPOCH)
        self.random = np.random.default_rng(1)
        self.checkpoints = 0

    def write(self, count=200):
        """New rows for some users; returns everything that is there now."""
        users = np.sort(self.random.choice(1_000, count, replace=False)).astype(np.uint64)
        offset = self.held.meta.applied_offset + count
        rows = [self.random.bytes(500) for _ in users]
        self.held.write(row_keys(1, users), rows, replace(self.held.meta, applied_offset=offset, log_clock_ms=offset * 10))
        return self.rows()

    def rows(self):
        return self.held.meta, list(self.held.scan())

    def take(self, snapshots, **given):
        self.checkpoints += 1
        path = self.folder / f"checkpoint-{self.checkpoints}"
        self.held.checkpoint(path)
        return snapshots.take(path, self.held.meta, **given)

    def restored(self, snapshots, **given):
        """What a new worker restores: (meta, rows), and the report."""
        self.checkpoints += 1
        folder = self.folder / f"other-{self.checkpoints}"
        report = snapshots.restore(0, EPOCH, folder / "0", kept=FINGERPRINTS, **given)
        held = RocksStore(folder, KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
        found = held.meta, list(held.scan())
        held.write([row_key(1, 5)], [b"goes on"], replace(held.meta, applied_offset=held.meta.applied_offset + 1))
        assert held.get([row_key(1, 5)]) == [b"goes on"]
        held.close()
        return found, report


@pytest.fixture
def state(tmp_path):
    found = State(tmp_path)
    yield found
    found.held.close()


def damage(snapshots, file, how):
    path = f"{snapshots._root}/objects/{file.hash}"
    data = bytearray(snapshots._fs.cat_file(path))
    snapshots._fs.rm_file(path)
    if how == "missing":
        return
    if how == "shorter":
        data = data[:-1]
    else:
        data[len(data) // 2] ^= 1
    snapshots._fs.pipe_file(path, bytes(data))


def tables(manifest):
    return [file for file in manifest.files if file.name.endswith(".sst")]


def objects(snapshots):
    return {path.rpartition("/")[2] for path in snapshots._fs.find(f"{snapshots._root}/objects")}


def test_a_restored_partition_equals_the_original_and_goes_on(snapshots, new_snapshots, state):
    expected = state.write()
    taken = state.take(snapshots)
    assert taken.bytes_uploaded == taken.manifest.size
    seen = []
    found, report = state.restored(new_snapshots(), progress=lambda done, total: seen.append((done, total)))
    assert found == expected
    assert report.manifest == taken.manifest
    assert report.passed_over == ()
    assert seen == sorted(seen)
    assert seen[-1] == (taken.manifest.size, taken.manifest.size)


def test_only_new_files_are_uploaded(snapshots, state):
    state.write()
    first = state.take(snapshots)
    expected = state.write()
    second = state.take(snapshots)
    before = {file.hash for file in first.manifest.files}
    new = {file.hash: file.size for file in second.manifest.files if file.hash not in before}
    assert (second.files_uploaded, second.bytes_uploaded) == (len(new), sum(new.values()))
    assert {file.hash for file in tables(first.manifest)} < {file.hash for file in tables(second.manifest)}
    assert second.files_uploaded < len(second.manifest.files)
    assert state.restored(snapshots)[0] == expected


def test_the_same_moment_is_uploaded_once(snapshots, new_snapshots, state):
    state.write()
    taken = state.take(snapshots)
    again = state.take(new_snapshots())
    assert (again.manifest, again.files_uploaded) == (taken.manifest, 0)


@pytest.mark.parametrize("how", ["missing", "shorter", "bit"])
def test_where_a_file_is_damaged_the_snapshot_before_is_restored(snapshots, state, caplog, how):
    expected = state.write()
    state.take(snapshots)
    before = objects(snapshots)
    state.write()
    newest = state.take(snapshots).manifest
    damage(snapshots, next(file for file in tables(newest) if file.hash not in before), how)
    with caplog.at_level(logging.ERROR):
        found, report = state.restored(snapshots)
    assert found == expected
    assert len(report.passed_over) == 1
    assert newest.name in report.passed_over[0]
    assert "SNAPSHOT DAMAGED" in caplog.text


def test_a_damaged_manifest_is_passed_over(snapshots, state, caplog):
    expected = state.write()
    state.take(snapshots)
    state.write()
    path = f"{snapshots._root}/{state.take(snapshots).manifest.name}"
    data = bytearray(snapshots._fs.cat_file(path))
    data[len(data) // 2] ^= 1
    snapshots._fs.pipe_file(path, bytes(data))
    assert state.restored(snapshots)[0] == expected
    assert len(snapshots.manifests()) == 1
    assert "SNAPSHOT DAMAGED" in caplog.text


def test_where_nothing_is_good_the_error_says_why_and_nothing_is_touched(snapshots, state, tmp_path):
    with pytest.raises(StateError, match="could be restored: there is none"):
        state.restored(snapshots)
    state.write()
    manifest = state.take(snapshots).manifest
    damage(snapshots, tables(manifest)[0], "bit")
    kept = tmp_path / "kept" / "0"
    kept.mkdir(parents=True)
    (kept / "000001.sst").write_text("precious")
    with pytest.raises(StateError, match="is damaged"):
        snapshots.restore(0, EPOCH, kept, kept=FINGERPRINTS)
    assert [path.name for path in kept.parent.iterdir()] == ["0"]
    assert (kept / "000001.sst").read_text() == "precious"


def test_a_snapshot_is_of_use_only_for_its_definitions_and_where_the_log_continues_it(snapshots, state):
    state.write()
    offset = state.take(snapshots).manifest.applied_offset
    assert snapshots.newest(0, EPOCH, FINGERPRINTS).applied_offset == offset
    assert snapshots.newest(0, EPOCH, FINGERPRINTS, first=offset + 1).applied_offset == offset
    assert snapshots.newest(0, EPOCH, FINGERPRINTS, first=offset + 2) is None
    assert snapshots.newest(0, EPOCH, ((1, 12),)) is None
    assert snapshots.newest(1, EPOCH, FINGERPRINTS) is None
    assert snapshots.newest(0, EPOCH + 1, FINGERPRINTS) is None
    with pytest.raises(StateError, match=f"the log now starts at {offset + 2}, behind it"):
        state.restored(snapshots, first=offset + 2)


def test_older_snapshots_on_demand(snapshots, state):
    expected = state.write()
    oldest = state.take(snapshots).manifest
    state.write()
    state.take(snapshots)
    assert state.restored(snapshots, skip=1)[0] == expected
    assert state.restored(snapshots, offset=oldest.applied_offset)[0] == expected


class CrashError(BaseException):
    """A killed process: nothing catches it."""


@pytest.mark.parametrize("whole", [False, True])
def test_a_crash_at_any_step_leaves_only_good_snapshots(new_snapshots, state, monkeypatch, whole):
    """Each write is interrupted once, before it or half-way (where the file system shows half-written files)."""
    snapshots = new_snapshots(transfers=1)
    if snapshots._is_whole and not whole:
        pytest.skip("an object store shows whole objects only")
    expected = state.write()
    state.take(snapshots)
    state.write()
    crashes = 0
    for step in range(100):
        with monkeypatch.context() as patch:
            dying = new_snapshots(transfers=1)
            left = [step]

            def interrupted(do, path, *, left=left, pipe=dying._fs.pipe_file):
                if left[0] == 0:
                    if not whole:
                        pipe(path, b"half")
                    raise CrashError
                left[0] -= 1
                return do()

            put, pipe = dying._fs.put_file, dying._fs.pipe_file
            patch.setattr(dying._fs, "put_file", lambda local, path, **_: interrupted(lambda: put(local, path), path))  # noqa: B023
            patch.setattr(dying._fs, "pipe_file", lambda path, data: interrupted(lambda: pipe(path, data), path))  # noqa: B023
            try:
                state.take(dying)
                break
            except CrashError:
                crashes += 1
        there = new_snapshots()
        assert there.verify(there.manifests()) == {}
        assert len(there.manifests()) == len(there._names())
        assert state.restored(new_snapshots())[0] == expected
    assert crashes >= 3
    assert state.restored(new_snapshots())[0] == state.rows()


def test_expiry_keeps_the_newest_and_what_they_name(snapshots, state):
    for _ in range(4):
        expected = state.write()
        state.take(snapshots)
    newest = snapshots.manifests()
    orphan = f"{snapshots._root}/objects/{'0' * 32}"
    snapshots._fs.pipe_file(orphan, b"of an upload that died")
    expired = snapshots.expire(2)
    assert (expired.manifests, snapshots.manifests()) == (2, newest[:2])
    assert objects(snapshots) == {file.hash for manifest in newest[:2] for file in manifest.files}
    assert expired.objects == len({file.hash for m in newest for file in m.files} - objects(snapshots)) + 1
    assert expired.bytes > 0
    assert snapshots.verify(newest[:2]) == {}
    assert state.restored(snapshots)[0] == expected
    assert snapshots.expire(2) == type(expired)(0, 0, 0)


def test_expiry_leaves_what_is_young(new_snapshots, state):
    snapshots = new_snapshots(grace_s=3600.0)
    for _ in range(3):
        state.write()
        state.take(snapshots)
    before = objects(snapshots)
    snapshots._fs.pipe_file(f"{snapshots._root}/objects/{'0' * 32}", b"of an upload that runs")
    assert snapshots.expire(1).manifests == 0
    assert objects(snapshots) == before | {"0" * 32}


def test_expiry_by_age_takes_the_last_one_too(snapshots, state):
    state.write()
    created_ms = state.take(snapshots).manifest.created_ms
    assert snapshots.expire(1, created_before_ms=created_ms).manifests == 0
    assert snapshots.expire(1, created_before_ms=created_ms + 1).manifests == 1
    assert objects(snapshots) == set()


def test_a_damaged_manifest_does_not_count_as_one_that_is_kept(snapshots, state):
    expected = state.write()
    good = state.take(snapshots).manifest
    for _ in range(2):
        state.write()
        snapshots._fs.pipe_file(f"{snapshots._root}/{state.take(snapshots).manifest.name}", b"{}")
    assert snapshots.expire(1).manifests == 0
    assert snapshots.manifests() == [good]
    assert state.restored(snapshots)[0] == expected


def test_an_expiry_during_an_upload_takes_nothing_from_it(new_snapshots, state, monkeypatch):
    """The other process has looked for manifests before this one is there, and removes behind it what no manifest named."""
    snapshots, other = new_snapshots(), new_snapshots()
    state.write()
    state.take(snapshots)
    expected = state.write()
    write = snapshots._write

    def expire_before_the_manifest(name, put):
        if name.endswith(".json"):
            for path in other._fs.find(f"{other._root}/objects"):
                other._fs.rm_file(path)
        write(name, put)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "_write", expire_before_the_manifest)
        manifest = state.take(snapshots).manifest
    assert snapshots.verify([manifest]) == {}
    assert state.restored(snapshots)[0] == expected


def test_verify_names_what_is_damaged_and_the_next_snapshot_repairs_it(snapshots, state):
    state.write()
    first = state.take(snapshots).manifest
    table = tables(first)[0]
    damage(snapshots, table, "bit")
    assert list(snapshots.verify([first])) == [table.hash]
    assert list(snapshots.verify([first], remove_damaged=True)) == [table.hash]
    assert "is missing" in snapshots.verify([first])[table.hash]
    expected = state.write()
    assert table in state.take(snapshots).manifest.files
    assert snapshots.verify(snapshots.manifests()) == {}
    assert state.restored(snapshots)[0] == expected


def test_two_owners_of_a_moment_are_both_right(snapshots, new_snapshots, state, tmp_path):
    """The same rows in files of their own, uploaded one over the other: whoever restores gets one of them, whole."""
    other = RocksStore(tmp_path / "elsewhere", KEPT, cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(0, EPOCH)
    for i in range(3):
        users, rows = np.arange(i * 50, (i + 1) * 50, dtype=np.uint64), [bytes([i]) * 300] * 50
        meta = replace(state.held.meta, applied_offset=i)
        state.held.write(row_keys(1, users), rows, meta)
        other.write(row_keys(1, users), rows, meta)
        other.checkpoint(tmp_path / f"flushed-{i}")
    expected = state.rows()
    taken = state.take(snapshots)
    again = new_snapshots().take(tmp_path / "flushed-2", other.meta)
    other.close()
    assert again.manifest == taken.manifest
    assert state.restored(snapshots)[0] == expected


def test_a_cancelled_upload_is_taken_up_by_the_next(new_snapshots, state):
    snapshots = new_snapshots(grace_s=3600.0, transfers=1)
    state.write()
    asked = []

    def cancelled():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(SnapshotError, match="cancelled"):
        state.take(snapshots, cancelled=cancelled)
    assert snapshots.manifests() == []
    assert len(objects(snapshots)) == 2
    taken = state.take(snapshots)
    assert taken.files_uploaded <= len(taken.manifest.files) - 2 + 1  # RocksDB's own MANIFEST differs from one checkpoint to the next


def test_partitions_and_logs_are_apart(snapshots, state):
    state.write()
    state.take(snapshots)
    meta = replace(state.held.meta, partition=12, log_epoch=2**64 - 1)
    snapshots.take(state.folder / "checkpoint-1", meta)
    assert [(m.log_epoch, m.partition) for m in snapshots.manifests()] == [(EPOCH, 0), (2**64 - 1, 12)]
    assert [m.partition for m in snapshots.manifests(partition=12)] == [12]
    assert [m.partition for m in snapshots.manifests(log_epoch=EPOCH)] == [0]


# What does not depend on where snapshots are.


def test_an_unknown_place_is_an_error_without_the_password():
    with pytest.raises(SnapshotError, match="snapshots at nothing://host/x cannot be set up"):
        Snapshots("nothing://user:secret@host/x")


def test_an_unreachable_place_is_an_error_without_the_credentials():
    options = {"key": "someone", "secret": "hidden", "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}}
    options["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    with pytest.raises(SnapshotError, match="cannot be listed") as found:
        Snapshots("s3://bucket/x", options=options).manifests()
    assert "hidden" not in str(found.value)


def test_manifest_bytes_round_trip_and_any_damage_is_found():
    manifest = Manifest(2**64 - 1, 3, 5, 50, 2, -1, ((1, 2**64 - 1),), 99, ())
    data = manifest.encode()
    assert Manifest.decode(data, "here") == manifest
    for i in range(len(data) - 1):
        if data[i : i + 1].isspace():
            continue
        broken = bytearray(data)
        broken[i] ^= 2
        with pytest.raises(ManifestError, match="here: "):
            Manifest.decode(bytes(broken), "here")


def test_a_manifest_cannot_name_a_file_outside():
    fields = json.loads(Manifest(1, 0, 5, 50, 0, -1, (), 99, ()).encode())
    fields["files"] = [{"name": "../evil", "hash": "0" * 32, "size": 1}]
    del fields["checksum"]
    fields["checksum"] = _checksum(fields)
    with pytest.raises(ManifestError, match="none of a checkpoint"):
        Manifest.decode(json.dumps(fields).encode(), "here")


def test_a_table_is_hashed_once(tmp_path, state, monkeypatch):
    import streams.snapshots

    snapshots, read = Snapshots(str(tmp_path / "snapshots")), []
    digest = streams.snapshots._digest
    monkeypatch.setattr(streams.snapshots, "_digest", lambda file, *rest: (read.append(file.name), digest(file, *rest))[1])
    state.write()
    state.take(snapshots)
    first = {name.rpartition("/")[2] for name in read}
    read.clear()
    state.write()
    state.take(snapshots)
    again = [name for name in read if name.endswith(".sst")]
    assert len(again) == 1
    assert again[0].rpartition("/")[2] not in first


def test_what_is_set_aside_is_bounded_and_nothing_empty_takes_its_place(tmp_path):
    folder = tmp_path / "0"
    for i in range(4):
        folder.mkdir()
        (folder / "000001.sst").write_text(str(i))
        assert set_aside(folder) == tmp_path / f"0.aside-{i + 1}"
    assert {path.name: (path / "000001.sst").read_text() for path in tmp_path.iterdir()} == {"0.aside-3": "2", "0.aside-4": "3"}
    folder.mkdir()
    (folder / "000001.log").touch()
    assert set_aside(folder) is None
    assert set_aside(folder) is None
    assert not folder.exists()


def test_a_checkpoint_is_one_moment_while_rows_are_written(tmp_path, state):
    snapshots = Snapshots(str(tmp_path / "snapshots"))
    for _ in range(5):
        expected = state.write()
        path = tmp_path / f"at-{expected[0].applied_offset}"
        state.held.start_flush()
        state.held.checkpoint(path)
        state.write()
        snapshots.take(path, expected[0])
        shutil.rmtree(path)
        state.write()
        found, report = state.restored(snapshots)
        assert found == expected
        assert report.manifest.applied_offset == expected[0].applied_offset

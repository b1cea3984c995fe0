"""`freshrank snapshot`: from a person's side, over a folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy import cli
from deploy.wording import manifest_table
from features.domain import load_domain
from streams.snapshots import Snapshots
from streams.state import definitions, row_keys
from streams.store import RocksStore


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Two snapshots of a stopped worker's partition 2."""
    monkeypatch.setenv("FRESHRANK_SNAPSHOT_URL", str(tmp_path / "snapshots"))
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    snapshots = Snapshots(str(tmp_path / "snapshots"))
    store = RocksStore(tmp_path / "state" / "worker-0", kept(), cache_bytes=1 << 20, write_buffer_bytes=1 << 20)
    held = store.open(2, 77)
    for i, offset in enumerate((99, 199)):
        users = np.arange(50, dtype=np.uint64) + np.uint64(1_000 * i)
        held.write(row_keys(1, users), [bytes(500)] * 50, replace(held.meta, applied_offset=offset, log_clock_ms=1_700_000_000_000))
        held.checkpoint(tmp_path / str(offset))
        snapshots.take(tmp_path / str(offset), held.meta)
    held.close()
    return tmp_path


def kept():
    from deploy.settings import load_settings

    return definitions(load_domain(load_settings().domain))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["snapshot", *arguments])


@pytest.mark.parametrize("command", ["list", "verify", "restore", "expire"])
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output


def test_list(home):
    lines = run("list").output.splitlines()
    assert [line.split()[5] for line in lines if "000000000000004d" in line] == ["199", "99"]
    found = json.loads(run("list", "--json", "--partition", "2", "--epoch", "4d").output)
    assert [manifest["applied_offset"] for manifest in found] == [199, 99]
    assert json.loads(run("list", "--json", "--partition", "1").output) == []
    table = manifest_table(Snapshots(str(home / "snapshots")).manifests()[0])
    assert "000000000000004d:2:199, taken" in str(table.title)
    assert "log clock 2023-11-14 22:13:20 UTC" in str(table.title)


def test_verify_and_restore_over_a_damaged_file(home):
    assert run("verify").output.strip() == "2 of 2 snapshots are good"
    newest, before = Snapshots(str(home / "snapshots")).manifests()
    table = next(file for file in newest.files if file.name.endswith(".sst") and file not in before.files)
    (home / "snapshots" / "objects" / table.hash).write_bytes(b"damage")
    result = run("verify")
    assert result.exit_code == 1
    assert "1 of 2 snapshots are good" in result.output
    result = run("restore", "--partition", "2", "--into", str(home / "elsewhere"))
    assert result.exit_code == 0
    assert "at offset 99" in result.output


def test_restore_an_older_one_in_place_of_the_state(home):
    result = run("restore", "--partition", "2", "--offset", "99")
    assert result.exit_code == 0
    assert sorted(path.name for path in (home / "state" / "worker-0").iterdir()) == ["2", "2.aside-1"]
    held = RocksStore(home / "state" / "worker-0", kept(), cache_bytes=1 << 20, write_buffer_bytes=1 << 20).open(2, 77)
    assert (held.meta.applied_offset, sum(1 for _ in held.scan())) == (99, 50)
    held.close()


def test_expire(home):
    assert run("expire", "--keep", "1").output == "0 snapshots and 0 files removed, 0.0 MB\n"  # younger than an hour
    assert len(Snapshots(str(home / "snapshots")).manifests()) == 2


def test_without_a_place_it_says_which_setting(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["freshrank", "snapshot", "list", "--home", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "--url or the setting snapshot_url" in capsys.readouterr().err


def test_options_must_be_json_and_are_not_shown(monkeypatch):
    from deploy.settings import SettingsError, load_settings

    monkeypatch.setenv("FRESHRANK_SNAPSHOT_OPTIONS", '{"secret": "hidden"}')
    assert "hidden" not in repr(load_settings())
    monkeypatch.setenv("FRESHRANK_SNAPSHOT_OPTIONS", "[hidden")
    with pytest.raises(SettingsError, match="must be a JSON object") as found:
        load_settings()
    assert "hidden" not in str(found.value)


@pytest.mark.usefixtures("home")
def test_a_snapshot_is_read_as_a_person():
    shown = CliRunner().invoke(cli.app, ["inspect", "snapshot", "2"]).output
    for expected in ("000000000000004d:2:199", "the domain file's", " ago)", "CURRENT"):
        assert expected in shown, expected
    older = CliRunner().invoke(cli.app, ["inspect", "snapshot", "2", "--offset", "99", "--epoch", "4d", "--json"]).output
    assert json.loads(older)["applied_offset"] == 99
    missing = CliRunner().invoke(cli.app, ["inspect", "snapshot", "3"])
    assert missing.exit_code == 2
    assert "no such snapshot" in missing.output

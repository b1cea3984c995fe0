"""Who trains, judges and releases a ranker does it alone; who comes second is told by whom the training is in use."""

import os
from pathlib import Path

import pytest

from deploy import cli
from deploy.learn import Workspace
from inference.checkpoints import TrainError

DOMAIN = Path("domains/simulator.toml")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["freshrank", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("command", ["publish", "train"])
def test_a_training_that_is_in_use_is_neither_published_nor_written(command, tmp_path, monkeypatch, capsys):
    work = Workspace(DOMAIN, tmp_path)
    arguments = (command, "--ranker", "home", "--home", str(tmp_path), "--domain", str(DOMAIN))
    with work.alone_with("home", "freshrank cycle"):
        code, said = run(monkeypatch, capsys, *arguments)
    assert code == 1
    for part in (str(tmp_path / "training" / "home"), "`freshrank cycle`", f"process {os.getpid()}"):
        assert part in said
    code, said = run(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "in use" not in said, "nothing is left of the one before"


@pytest.mark.parametrize("command", [("demo",), ("demo", "--loop")])
def test_nor_does_a_demo_write_it(command, tmp_path, monkeypatch, capsys):
    work = Workspace(DOMAIN, tmp_path)
    with work.alone_with(work.domain.ranker_name(None), "freshrank train"):
        code, said = run(monkeypatch, capsys, *command, "--home", str(tmp_path))
    assert code == 1
    assert "in use by `freshrank train`" in said
    written = ("demo", "logs", "releases", "domain.toml")
    assert not any((tmp_path / name).exists() for name in written), "nothing was written before"


@pytest.mark.parametrize("command", [("demo",), ("demo", "--loop")])
def test_a_demo_leaves_the_home_of_another_product_alone(command, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "domain.toml"
    kept.write_bytes((DOMAIN.parent / "kuairand.toml").read_bytes())
    code, said = run(monkeypatch, capsys, *command, "--home", str(tmp_path))
    assert code == 1
    assert "is the home folder of 'kuairand': name another one with --home" in " ".join(said.split())
    assert kept.read_bytes() == (DOMAIN.parent / "kuairand.toml").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["domain.toml"]


def test_one_at_a_time_and_the_newest_holder_is_named(tmp_path):
    work = Workspace(DOMAIN, tmp_path)
    with work.alone_with("home", "freshrank train, a name that is long"), work.alone_with("other", "freshrank train"):
        pass
    match = rf"in use by `freshrank publish` \(process {os.getpid()}\)"
    with work.alone_with("home", "freshrank publish"), pytest.raises(TrainError, match=match), work.alone_with("home", "x"):
        pass

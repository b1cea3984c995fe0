"""`make setup` says plainly what a machine lacks, and needs nothing installed to say it."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy import setup_check


def test_this_machine_can_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9e9))
    assert setup_check.problems(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("platform.machine", lambda: "aarch64", "Linux on aarch64"),
        ("deploy.setup_check.glibc", lambda: (2, 31), "glibc 2.35 or newer .* 2.31"),
        ("deploy.setup_check.glibc", lambda: (), "another libc"),
        ("sys.version_info", (3, 13, 1), "locked for Python 3.11.*PYTHON="),
        ("deploy.setup_check.LIBRARY", "libpython-none.so", "libpython-none.so.*apt-get install libpython3.11"),
        ("importlib.util.find_spec", lambda _: None, "apt-get install python3.11-venv"),
        ("shutil.disk_usage", lambda _: SimpleNamespace(free=3e9), "8 GB .* has 3.0 GB free"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, says: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9e9))
    monkeypatch.setattr(name, value)
    (found,) = setup_check.problems(tmp_path)
    monkeypatch.undo()  # pytest itself needs what was replaced
    assert re.search(says, found)


def test_disk_counts_only_before_the_environment_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3e9))
    (tmp_path / ".venv").mkdir()
    assert setup_check.problems(tmp_path) == []


def test_it_imports_the_standard_library_alone() -> None:
    tree = ast.parse(Path(setup_check.__file__).read_text("utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names

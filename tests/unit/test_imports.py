"""Who may import whom (ARCHITECTURE.md), and where each heavy library lives."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "protos": set(),
    "features": {"protos"},
    "streams": {"protos", "features"},
    "inference": {"protos", "features"},
    "deploy": {"protos", "features", "streams", "inference"},
}
HOMES = {
    "rocksdict": {"streams/store.py"},
    "lmdb": {"streams/view.py", "streams/view_reader.py"},
    "faust": {"streams/worker.py"},
    "mode": {"streams/worker.py"},
    "confluent_kafka": {
        "streams/kafka.py",
        "streams/producer.py",
        "streams/batch_loop.py",
        "streams/ranking_log.py",
        "streams/broadcast.py",
    },
    "tritonclient": {"inference/triton.py"},
}
HOME_FOLDERS = {
    "torch": (
        "inference/",
        "deploy/triton_shim.py",
        "deploy/bench_model.py",
        "deploy/bench_model_cuda.py",
        "deploy/bench_train.py",
        "deploy/paper_size.py",
    ),
    "grpc": ("streams/", "inference/", "deploy/", "protos/"),
}


def imports():
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for name in names:
                    yield package, path.relative_to(ROOT).as_posix(), name.split(".")[0]


def test_packages_import_only_what_they_may():
    wrong = [(path, top) for package, path, top in imports() if top in MAY_IMPORT and top != package and top not in MAY_IMPORT[package]]
    assert wrong == []


@pytest.mark.parametrize("library", sorted(HOMES))
def test_heavy_libraries_have_one_home(library):
    found = {path for _, path, top in imports() if top == library}
    assert found
    assert found <= HOMES[library]


@pytest.mark.parametrize("library", sorted(HOME_FOLDERS))
def test_heavy_libraries_stay_in_their_folder(library):
    found = [path for _, path, top in imports() if top == library]
    assert found
    assert [path for path in found if not path.startswith(HOME_FOLDERS[library])] == []


def test_features_knows_neither_network_nor_clock():
    wrong = [
        (path, top)
        for package, path, top in imports()
        if package == "features" and top in {"time", "datetime", "socket", "asyncio", "torch"}
    ]
    assert wrong == []


def test_no_source_file_is_over_600_lines():
    generated = ("_pb2.py", "_pb2_grpc.py")
    long = [p for package in (*MAY_IMPORT, "tests") for p in (ROOT / package).rglob("*.py") if len(p.read_text("utf-8").splitlines()) > 600]
    assert [p.name for p in long if not p.name.endswith(generated)] == []

"""Real servers for tests: one broker for the session, and Triton servers on request."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.kafka_server import KafkaServer
from deploy.settings import load_settings
from deploy.simulator import write_kuairand_like
from deploy.triton_server import TritonServer

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see deploy/cli.py


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A real broker, shared by the session: tests take topic names of their own and never stop it."""
    with KafkaServer(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TritonServer]]:
    """`triton(repository, load=[...])` starts a real Triton for this test; it stops at the test's end."""
    servers: list[TritonServer] = []

    def start(repository: Path, *, load: tuple[str, ...] = (), threads: int = 1) -> TritonServer:
        servers.append(TritonServer(tmp_path_factory.mktemp("triton"), repository, load=load, threads=threads))
        return servers[-1].start()

    yield start
    for server in reversed(servers):
        server.stop()


@pytest.fixture(scope="session")
def kuairand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KuaiRand's files below FRESHRANK_DATA; where they are absent, a generated log in their format. CI needs the real ones."""
    data = load_settings().data / "kuairand-pure"
    if data.is_dir():
        return data
    if os.environ.get("CI") == "true":
        pytest.fail(f"{data}: the real KuaiRand log is required where CI=true; set FRESHRANK_DATA")
    folder = tmp_path_factory.mktemp("kuairand")
    write_kuairand_like(folder)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which log stood for KuaiRand."""
    data = load_settings().data / "kuairand-pure"
    which = "the publishers' files" if data.is_dir() else f"a generated log in its format (no {data.name} below FRESHRANK_DATA)"
    terminalreporter.write_line(f"KuaiRand: {which}")

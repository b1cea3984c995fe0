"""Two server processes at one port are replaced under load: no call fails, and health tells before a port closes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_world import DOMAIN, DOMAIN_TOML, NOW_MS, VIDEO, write_tables
from streams_world import eventually

from deploy.bench_drain import Processes, Traffic
from deploy.settings import Settings, load_settings
from deploy.stack import server_pages
from deploy.supervisor import free_ports
from deploy.triton_server import TritonServer
from inference.client import RankingClient, rank_request
from inference.release import write_release, write_triton_model
from inference.transact import NoopRanker

pytestmark = pytest.mark.servers


SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
CANDIDATES = list(range(100, 150))


def request(i):
    return rank_request("home", i % 50 + 1, CANDIDATES, kinds=VIDEO)


def two_ports():
    """The lower one of two neighbours that are free now."""
    for _ in range(100):
        (port,) = free_ports(1)
        with socket.socket() as next_one, contextlib.suppress(OSError):
            next_one.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two free ports side by side")


def page(url):
    """(status, body) of a page."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@dataclass
class Served:
    settings: Settings
    process: subprocess.Popen
    processes: Processes
    address: str
    web_port: int


@pytest.fixture(scope="module")
def served(tmp_path_factory, kafka):
    """`freshrank server` with two processes, a real Triton, and a model that costs nothing."""
    folder = tmp_path_factory.mktemp("drain")
    home, ready = folder / "home", folder / "home" / "run" / "server.json"
    (folder / "domain.toml").write_text(DOMAIN_TOML)
    release = write_release(
        home / "releases",
        model=NoopRanker(DOMAIN, "home"),
        domain_toml=DOMAIN_TOML,
        ranker="home",
        created_ms=NOW_MS,
        generations=write_tables(home / "tables"),
        metrics={},
    )
    web_port = two_ports()
    repository = home / "triton" / "repository"
    write_triton_model(release, repository, threads=1)
    with TritonServer(folder / "triton", repository, threads=1, load=(release.release_id,)) as triton:
        settings = load_settings(
            home=home,
            domain=folder / "domain.toml",
            kafka_bootstrap=kafka.bootstrap,
            triton_url=triton.grpc_url,
            partitions=1,
            server_processes=2,
            server_web_port=web_port,
            server_leave_s=0.1,
            **{f"topic_{kind}": f"drain-{kind}" for kind in ("actions", "dead_letters", "rankings", "announcements", "rates")},
        )
        environment = os.environ | settings.as_environment() | {"FRESHRANK_READY_FILE": str(ready)}
        subprocess.run([sys.executable, "-m", "deploy.cli", "topics"], env=environment, check=True, timeout=60, capture_output=True)
        with (folder / "server.log").open("w") as log:
            process = subprocess.Popen([sys.executable, "-m", "deploy.cli", "server"], env=environment, stdout=log, stderr=log)
        try:
            eventually(lambda: ready.exists() or process.poll() is not None, "both processes are ready", 90)
            address = json.loads(ready.read_text())["endpoint"]
            children = home / "servers" / address.rpartition(":")[2]
            yield Served(settings, process, Processes(process.pid, ready, children), address, web_port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "server.log").read_text()
        finally:
            process.kill()
            process.wait()


def test_a_rolling_restart_and_a_kill_lose_no_call(served):
    before = served.processes.pids()
    assert all("libtorch" not in Path(f"/proc/{pid}/maps").read_text() for pid in before)  # a second to load, and 200 MB
    with Traffic(served.address, request, 60) as traffic, ThreadPoolExecutor(1) as pool, grpc.insecure_channel(served.address) as channel:
        eventually(lambda: traffic.answered > 30, "calls are answered")
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="freshrank.v1.Ranking"), timeout=120)
        assert next(health).status == SERVING
        restarted = pool.submit(served.processes.restart)
        assert next(health).status == NOT_SERVING
        health.cancel()
        after = restarted.result(120)
        killed = served.processes.kill(1)
        seen = traffic.answered
        eventually(lambda: traffic.answered > seen + 30, "calls are answered again")
    assert len({*before, *after, killed}) == 5
    assert served.process.poll() is None
    assert (traffic.sync.failures, traffic.asyncio.failures) == ({}, {})
    assert min(traffic.sync.tiers.total(), traffic.asyncio.tiers.total()) > 30


def test_each_process_has_pages_at_a_port_of_its_own_and_connections(served):
    urls = server_pages(served.settings)
    assert urls == [f"http://127.0.0.1:{served.web_port}", f"http://127.0.0.1:{served.web_port + 1}"]
    assert [page(f"{url}/ready/")[0] for url in urls] == [200, 200]
    with RankingClient(served.address, timeout_s=10.0, channels=32) as client:
        for i in range(32):
            client.call(request(i))
    for url in urls:  # 32 connections all at one of two would be chance of 2^-31
        assert 'freshrank_server_calls_total{code="ok"}' in page(f"{url}/metrics")[1].lower()

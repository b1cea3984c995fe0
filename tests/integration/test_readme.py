"""The examples of the README, run as they stand there, against `freshrank up`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import psutil
import pytest

from deploy.bench import write_untrained_release

ROOT = Path(__file__).parents[2]
DOMAIN = ROOT / "domains" / "simulator.toml"


def example(name):
    """The shell block behind `<!-- tested: name -->`."""
    return re.search(rf"<!-- tested: {name} -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_untrained_release(home, DOMAIN, np.random.default_rng(1))
    # Far from the test's own deadline: a machine that runs other tests too may take seconds for the first ranking.
    variables = os.environ | {"FRESHRANK_HOME": str(home), "FRESHRANK_RANK_TIMEOUT_MS": "5000"}
    command = [sys.executable, "-m", "deploy.cli", "up", "--json", "--domain", str(DOMAIN)]
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as up:
        endpoints = json.loads(up.stdout.readline())
        yield variables | {"KAFKA": endpoints["kafka"], "SERVER": endpoints["server"], "UP": str(up.pid)}
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0


def listening(pid):
    """Addresses on which a process and its children wait for connections."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    connections = [one for process in processes for one in process.net_connections("inet")]
    return [ip_address(one.laddr.ip) for one in connections if one.status == psutil.CONN_LISTEN]


def test_every_port_of_the_stack_is_on_loopback(environment):
    found = listening(int(environment["UP"]))
    assert len(found) >= 7  # Kafka's two, Triton's three, the worker's page, reader, server
    assert [address for address in found if not (getattr(address, "ipv4_mapped", None) or address).is_loopback] == []


def run(name, environment):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example(name)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_produce_and_rank(environment):
    assert "1 actions seen, newest action" in run("command line", environment)


def test_kcat_and_grpcurl(environment):
    for tool in ("kcat", "grpcurl"):
        if shutil.which(tool) is None:
            assert os.environ.get("CI") != "true", f"{tool} is required where CI=true"
            pytest.skip(f"{tool} is not installed")
    printed = json.loads(run("kcat and grpcurl", environment))
    answer = {name.replace("_", "").lower(): value for name, value in printed.items()}  # by grpcurl's version: snake or camel case
    assert answer["tier"] == "TIER_MODEL"
    assert len(answer["headscores"]) == 3

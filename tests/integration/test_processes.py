"""Worker, reader and server as processes with JSON logs: every line is one, pages are where settings say, `top` finds the server."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest
from streams_world import DOMAIN_TOML, eventually

from deploy.supervisor import free_ports

pytestmark = pytest.mark.servers


def test_three_processes_log_json_and_serve_their_pages(tmp_path, kafka):
    (tmp_path / "domain.toml").write_text(DOMAIN_TOML)
    (port,) = free_ports(1)
    settings = {"HOME": tmp_path / "home", "DOMAIN": tmp_path / "domain.toml", "KAFKA_BOOTSTRAP": kafka.bootstrap, "LOG_FORMAT": "json"}
    settings |= {f"TOPIC_{kind.upper()}": f"processes-{kind}" for kind in ("actions", "dead_letters", "rankings", "announcements", "rates")}
    settings |= {"TRITON_URL": "127.0.0.1:1", "PARTITIONS": 1, "WORKER_WEB_PORT": port}
    environment = os.environ | {f"FRESHRANK_{name}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "deploy.cli"]
    made = subprocess.run([*command, "topics"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert made.stdout.startswith("processes-actions: 1 partitions, log epoch ")
    run = tmp_path / "home" / "run"
    with ExitStack() as stack:
        processes, logs = {}, {name: tmp_path / f"{name}.log" for name in ("worker", "reader", "server")}
        for name, log in logs.items():
            ready = {"FRESHRANK_READY_FILE": str(run / f"{name}.json")}
            stderr = stack.enter_context(log.open("w"))
            processes[name] = subprocess.Popen([*command, name], env=environment | ready, stderr=stderr, stdout=stderr)
            stack.callback(processes[name].kill)
        for name, process in processes.items():
            eventually(lambda n=name, p=process: (run / f"{n}.json").exists() or p.poll() is not None, f"{name} is ready", 90)
            assert process.poll() is None, logs[name].read_text()
        web = json.loads((run / "server.json").read_text())["web"]
        of_reader = json.loads((run / "reader.json").read_text())["web"]
        pages = [f"http://127.0.0.1:{port}/{page}" for page in ("live/", "ready/", "metrics")] + [f"{web}/live/", f"{web}/metrics"]
        pages += [f"{of_reader}/live/", f"{of_reader}/metrics"]
        for page in pages:
            with urllib.request.urlopen(page, timeout=20) as answer:
                assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="503"):  # there is no release yet
            urllib.request.urlopen(f"{web}/ready/", timeout=20)
        top = [*command, "top", "--once", "--json", "--every-s", "0.1"]
        frame = json.loads(subprocess.run(top, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout)
        (row,) = frame["servers"].values()
        assert (row["ready"], row["models"]) == (False, "0 of 0")
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        assert {name: process.wait(60) for name, process in processes.items()} == dict.fromkeys(processes, 0)
    lines = {name: [json.loads(line) for line in log.read_text().splitlines()] for name, log in logs.items()}
    assert all({"time", "level", "logger", "message"} <= set(line) for found in lines.values() for line in found)
    assert any("ranking server stopped" in line["message"] for line in lines["server"])
    assert lines["worker"]

"""deploy/compose.yaml against the code: its commands, settings, ports, files and versions. (Its containers are not started.)"""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
import typer
import yaml

from deploy import cli
from deploy.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service.get("image") == "freshrank:local"}
PORTS = {
    "worker": ("worker_web_port",),
    "reader": ("reader_port", "reader_web_port"),
    "server": ("server_port", "server_web_port"),
    "http": ("http_port",),
}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def settings_of(name, monkeypatch) -> Settings:
    for variable in [variable for variable in os.environ if variable.startswith("FRESHRANK_")]:
        monkeypatch.delenv(variable)
    for variable, value in OURS[name]["environment"].items():
        assert isinstance(value, str), variable  # YAML's own booleans and numbers reach a container as other texts
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:\?[^}]*\}", "a-token", value))
    return load_settings()


def test_its_head_says_that_it_was_not_run():
    assert "not run" in (DEPLOY / "compose.yaml").read_text().split("\nservices:")[0]


def test_every_process_of_ours_is_there():
    assert set(OURS) == {"topics", "worker", "reader", "server", "http"}


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_a_command_with_settings_that_exist(name, monkeypatch):
    commands = typer.main.get_command(cli.app).commands
    assert OURS[name]["command"] == [name]
    assert name in commands
    found = settings_of(name, monkeypatch)  # an unknown variable, or a value that is not allowed, is an error
    assert found.home == Path("/var/lib/freshrank")
    assert found.server_token is not None


@pytest.mark.parametrize("name", OURS)
def test_ports_are_those_of_the_settings_and_published_on_loopback_only(name, monkeypatch):
    found = settings_of(name, monkeypatch)
    published = OURS[name].get("ports", [])
    assert {int(port.rsplit(":", 1)[1]) for port in published} == {getattr(found, setting) for setting in PORTS.get(name, ())}
    if "healthcheck" in OURS[name]:
        probed = int(re.search(r"127\.0\.0\.1:(\d+)/live/", OURS[name]["healthcheck"]["test"][-1])[1])
        assert probed == getattr(found, PORTS[name][-1])


def test_everything_is_published_on_loopback():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_addresses_name_services_and_their_ports(monkeypatch):
    found = settings_of("http", monkeypatch)
    assert found.server_address == f"server:{settings_of('server', monkeypatch).server_port}"
    listeners = SERVICES["kafka"]["environment"]
    assert listeners["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{found.kafka_bootstrap}"
    assert f":{found.kafka_bootstrap.rsplit(':', 1)[1]}" in listeners["KAFKA_LISTENERS"]
    triton, port = found.triton_url.split(":")
    assert f"--grpc-port={port}" in SERVICES[triton]["command"]
    assert f"--model-repository={found.home}/triton/repository" in SERVICES[triton]["command"]
    assert f"home:{found.home}" in SERVICES[triton]["volumes"]


def test_prometheus_scrapes_the_pages_under_the_names_that_alerts_ask_for(monkeypatch):
    jobs = {job["job_name"]: job for job in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]}
    worker, server = settings_of("worker", monkeypatch), settings_of("server", monkeypatch)
    assert jobs["freshrank-worker"]["static_configs"] == [{"targets": [f"worker:{worker.worker_web_port}"]}]
    reader = settings_of("reader", monkeypatch)
    assert jobs["freshrank-reader"]["static_configs"] == [{"targets": [f"reader:{reader.reader_web_port}"]}]
    assert jobs["freshrank-server"]["static_configs"] == [{"targets": [f"server:{server.server_web_port}"]}]
    assert "--metrics-port=8002" in SERVICES["triton"]["command"]
    assert jobs["triton"]["static_configs"] == [{"targets": ["triton:8002"]}]
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    assert set(re.findall(r'job="([^"]+)"', alerts)) <= set(jobs)
    assert worker.worker_web_host == reader.reader_web_host == server.server_host == "0.0.0.0"


def test_what_is_mounted_is_there():
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            if source.startswith(".") and source != "./certificates":
                assert (DEPLOY / source).exists(), (name, volume)
            elif not source.startswith("."):
                assert source in COMPOSE["volumes"], (name, volume)
    mounted = {volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    assert {f"./grafana/{path.name}" for path in (DEPLOY / "grafana").glob("*.json")} <= mounted


def test_every_service_waited_for_is_one():
    for service in SERVICES.values():
        assert set(service.get("depends_on", [])) <= set(SERVICES)
        assert service.get("pid", "service:worker").removeprefix("service:") in SERVICES


def test_the_image_copies_what_exists_and_has_each_target():
    targets = set(re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, re.M))
    assert {service["build"]["target"] for service in SERVICES.values() if "build" in service} == targets
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()


def test_tritons_packages_are_the_locked_ones_and_all_that_the_shim_imports():
    pins = dict(re.findall(r"\b([a-z]+)==([\d.]+)", DOCKERFILE))
    lock = (ROOT / "requirements.lock").read_text()
    for name, version in pins.items():
        assert f"\n{name}=={version} \\\n" in lock, name
    imported, waiting = set(), [DEPLOY / "triton_shim.py", ROOT / "inference" / "transact.py"]
    while waiting:  # what is imported when the shim is; inside of functions only load_model's are reached, which reads safetensors
        path = waiting.pop()
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in getattr(node, "names", [])]
            for name in names if isinstance(node, ast.Import | ast.ImportFrom) else []:
                ours = ROOT / (name.replace(".", "/") + ".py")
                if ours.exists() and ours not in imported:
                    waiting.append(ours)
                    imported.add(ours)
                elif not ours.exists() and name.split(".")[0] not in sys.stdlib_module_names:
                    imported.add(name.split(".")[0])
    theirs = {name for name in imported if isinstance(name, str)} - {"triton_python_backend_utils"}
    assert {"torch", "numpy"} <= theirs
    assert theirs <= set(pins), theirs - set(pins)

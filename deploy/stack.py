"""The local stack: Kafka, Triton, worker, reader and server as supervised processes on free loopback ports in one folder.

A second start keeps the data. Where the settings name an outside Kafka or Triton, that one is used instead.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy.kafka_server import KafkaServer
from deploy.processes import kafka_config, topics
from deploy.settings import Settings, is_loopback
from deploy.supervisor import Command, Supervisor, free_ports
from deploy.triton_server import TritonServer
from features.domain import load_domain
from inference.client import RankingClient
from streams.kafka import ensure_topics

SERVING = ("worker", "reader", "server")


class StackNotRunningError(RuntimeError):
    """No local stack runs in the folder, and the settings name no outside parts."""


class Stack:
    """Starts everything in order, as a context manager; `settings` then names the endpoints. Stops in reverse, leaving only data."""

    def __init__(
        self, settings: Settings, *, on_event: Callable[[str, str], None] | None = None, serving: tuple[str, ...] = SERVING
    ) -> None:
        self.settings = settings
        self.supervisor = Supervisor(settings.home, on_event)
        self._serving = serving
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.supervisor)
            self._start()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.__exit__(kind, error, trace)

    def endpoints(self) -> dict[str, str]:
        """Address of each part by name."""
        found = {name: str(child.statistics().get("endpoint", "")) for name, child in self.supervisor.children.items()}
        return {"kafka": self.settings.kafka_bootstrap, "triton": self.settings.triton_url, **found}

    def _start(self) -> None:
        settings = self.settings
        home = settings.home
        keep_domain(settings.domain, home)
        triton = None
        if not settings.triton_url:
            server = TritonServer(
                home / "triton",
                home / "triton" / "repository",
                threads=settings.torch_threads,
                restart=True,
                otlp_endpoint=settings.otlp_endpoint,
            )
            triton = self.supervisor.start(server.command())
            settings = settings.model_copy(update={"triton_url": server.grpc_url})
        if not settings.kafka_bootstrap:
            broker = KafkaServer(home / "kafka", restart=True)
            self.supervisor.start(broker.command()).wait_ready()
            settings = settings.model_copy(update={"kafka_bootstrap": broker.bootstrap})
        if triton is not None:
            triton.wait_ready()
        ensure_topics(
            kafka_config(settings),
            topics(settings),
            partition_count=settings.partitions,
            replication_factor=settings.replication_factor,
            retention_ms=settings.retention_ms,
        )
        # Ports are chosen here, so that a process that the supervisor restarts is found where it was.
        server_port, reader_port = free_ports(2)
        settings = settings.model_copy(
            update={"server_port": settings.server_port or server_port, "reader_port": settings.reader_port or reader_port}
        )
        if "reflection" not in self.settings.model_fields_set and all(map(is_loopback, (settings.server_host, settings.reader_host))):
            settings = settings.model_copy(update={"reflection": True})  # a stack that nobody else reaches is there to be looked at
        if not settings.reader_advertised_address and "reader" in self._serving:
            settings = settings.model_copy(update={"reader_advertised_address": f"{settings.reader_host}:{settings.reader_port}"})
        self.settings = settings
        for name in self._serving:  # in order: the reader and the server read the view that the worker writes
            details = self.supervisor.start(process(name, settings)).wait_ready()
            if name == "server":
                self.settings = settings.model_copy(update={"server_address": details["endpoint"]})


def process(name: str, settings: Settings) -> Command:
    """One of freshrank's own processes, with these settings."""
    return Command(name, (sys.executable, "-m", "deploy.cli", name), settings.as_environment(), ready_within_s=120)


KEPT_DOMAIN = "domain.toml"


def keep_domain(domain: Path, home: Path) -> Path:
    """The home folder's own copy of the domain file, which commands use that name no other."""
    kept = home / KEPT_DOMAIN
    if domain.resolve() != kept.resolve():
        load_domain(domain)
        home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(domain, kept)
    return kept


def running(settings: Settings, *, needs: str) -> Settings:
    """Settings that reach the stack which runs in the home folder, or the outside parts that they name already.

    Args:
        settings: as the user gave them.
        needs: "kafka" or "server", the part that the command talks to.

    Raises:
        StackNotRunningError: that part is not there.
    """
    found = settings
    addresses = {"kafka": "kafka_bootstrap", "triton": "triton_url", "server": "server_address"}
    for name, key in addresses.items():
        if not getattr(found, key):
            found = found.model_copy(update={key: endpoint(settings.home, name)})
    if not getattr(found, addresses[needs]):
        raise StackNotRunningError(f"{needs}: none runs in {settings.home}; start the stack with `freshrank up`, or set {addresses[needs]}")
    return found


def ranking_client(settings: Settings, *, timeout_s: float) -> RankingClient:
    """A client of the ranking server that the settings name, with their token and authority."""
    token = settings.server_token.get_secret_value() if settings.server_token else None
    return RankingClient(
        settings.server_address,
        timeout_s=timeout_s,
        root_certificate=settings.tls_authority,
        certificate=settings.tls_client_certificate,
        key=settings.tls_client_key,
        token=token,
    )


def endpoint(home: Path, name: str) -> str:
    """Address of a running part of a local stack; empty if it does not run."""
    try:
        details: dict[str, Any] = json.loads((home / "run" / f"{name}.json").read_text("utf-8"))
    except FileNotFoundError:
        return ""
    try:
        os.kill(details["pid"], 0)
    except ProcessLookupError:
        return ""
    return str(details["endpoint"])


def worker_pages(settings: Settings) -> list[str]:
    """Web addresses of the workers that run in the home folder.

    Raises:
        StackNotRunningError: none does.
    """
    names = sorted(path.stem for path in (settings.home / "run").glob("worker*.json"))
    found = [address for address in (endpoint(settings.home, name) for name in names) if address]
    if not found:
        raise StackNotRunningError(f"worker: none runs in {settings.home}; start the stack with `freshrank up`, or name one with --url")
    return found


def server_pages(settings: Settings) -> list[str]:
    """Web addresses of the ranking servers that run in the home folder, each process of a server that has several; none where none does."""
    homes = (settings.home, *sorted((settings.home / "servers").glob("*")))
    paths = [(home, path) for home in homes for path in sorted((home / "run").glob("server*.json"))]
    found = [json.loads(path.read_text("utf-8")).get("web", "") for home, path in paths if endpoint(home, path.stem)]
    return [str(address) for address in found if address]

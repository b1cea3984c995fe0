"""`freshrank bench NAME`: each starts what it needs and stops it. Medians over runs, with machine and versions.

The ranking benchmarks use the model in the paper's size (100 actions, first K = 10, full-rank crossing) over the simulator's domain, with
weights as initialised: what a ranking costs does not depend on what the weights have learned.
"""

import contextlib
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from deploy.bench_ingest import bench_ingest
from deploy.bench_large import bench_large
from deploy.kafka_jars import kafka_version
from deploy.learn import now_ms
from deploy.paper_size import SIMULATOR, paper_size
from deploy.processes import kafka_config, topics
from deploy.replay import ReplayOptions
from deploy.replay import replay as replay_logs
from deploy.settings import Settings, load_settings
from deploy.stack import Stack, ranking_client
from features.actions import EVENT_DTYPE
from features.domain import Domain, load_domain
from features.ports import Position
from features.tables import Member, item_member, write_generation
from features.tensors import stored_columns
from inference.client import feature_column
from inference.release import write_release
from inference.small import SmallInputs, small_shapes
from inference.transact import TransActRanker
from protos.v1.ranking_pb2 import TIER_SMALL, RankRequest
from streams.kafka import end_offsets
from streams.producer import ActionProducer

Runs = list[dict[str, float]]
USERS, ITEMS, HISTORY = 1_000, 10_000, 100
EVENTS_PER_S = 1_000
RANK_S, RANKINGS_PER_S, CANDIDATES = 30.0, 5, 100
REPLAY_RANKINGS, REPLAY_CANDIDATES = 1_500, 20
_UNITS = (
    ("bytes_", "bytes"),
    ("_ms", "ms"),
    ("per_cpu_s", "rankings/CPU s"),
    ("samples_per_s_ratio", "1"),
    ("samples_per_s", "samples/s"),
    ("_ratio", "1"),
    ("events_per_s", "events/s"),
    ("requests_per_s", "requests/s"),
    ("cpu_us_per_event", "us"),
    ("_mb", "MB"),
    ("_s_per_gb", "s/GB"),
    ("_gb", "GB"),
    ("restore_s", "s"),
    ("restore_cpu_s", "s"),
    ("ready_s", "s"),
    ("detection_s", "s"),
    ("view_s", "s"),
)


BENCHES = {
    "ingest": "deploy.bench:ingest",
    "large": "deploy.bench_large:bench_large",
    "decode": "deploy.bench_decode:bench_decode",
    "freshness": "deploy.bench_freshness:bench_freshness",
    "read": "deploy.bench_read:bench_read",
    "rank": "deploy.bench:rank",
    "replay": "deploy.bench:replay",
    "release": "deploy.bench_release:bench_release",
    "bootstrap": "deploy.bench_bootstrap:bench_bootstrap",
    "growth": "deploy.bench_growth:bench_growth",
    "peers": "deploy.bench_peers:bench_peers",
    "restore": "deploy.bench_restore:bench_restore",
    "overload": "deploy.bench_overload:bench_overload",
    "service": "deploy.bench_service:bench_service",
    "model": "deploy.bench_model:bench_model",
    "model-cuda": "deploy.bench_model_cuda:bench_model_cuda",
    "train": "deploy.bench_train:bench_train",
    "curve": "deploy.bench_curve:bench_curve",
    "scale": "deploy.bench_scale:bench_scale",
    "drain": "deploy.bench_drain:bench_drain",
    "feast": "deploy.bench_feast:bench_feast",
}
"""Name of each benchmark, and the function (runs, scratch folder, console) -> figures of each run that measures it."""
PLOTS = {"growth": "deploy.bench_growth:plot_growth", "curve": "deploy.bench_curve:plot_curve"}
"""Benchmarks whose result people would rather look at, and the function (result, PNG file) that draws it."""


def run_bench(name: str, runs: int, console: Console) -> dict[str, Any]:
    """Runs one benchmark; returns {"name", "machine", "versions", "figures"}. Raises ValueError: there is no such benchmark."""
    if name not in BENCHES:
        raise ValueError(f"bench: {name!r} is not one of {', '.join(BENCHES)}")
    bench: Callable[[int, Path, Console], Runs] = _function(BENCHES[name])
    with tempfile.TemporaryDirectory(prefix="freshrank-bench-") as folder:
        found = bench(runs, Path(folder), console)
    figures = {}
    for figure in found[0]:
        values = [run[figure] for run in found]
        figures[figure] = {"median": statistics.median(values), "min": min(values), "max": max(values), "unit": unit_of(figure)}
    return {"name": name, "machine": machine(), "versions": versions(), "figures": figures}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the result of a benchmark of PLOTS into a PNG file; does nothing for another one."""
    if result["name"] in PLOTS:
        _function(PLOTS[result["name"]])(result, path)


def _function(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def unit_of(figure: str) -> str:
    """Unit of a figure by its name."""
    return next((unit for part, unit in _UNITS if part in figure), "1")


def machine() -> str:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpu = f", {sys.modules['torch'].cuda.get_device_name()}" if "torch" in sys.modules and sys.modules["torch"].cuda.is_available() else ""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores {model}, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}{gpu}"


def versions() -> dict[str, str]:
    """Versions of what does the work."""
    packages = ("numpy", "torch", "confluent-kafka", "faust-streaming", "rocksdict", "lmdb", "grpcio", "nvidia-pytriton")
    return {"python": platform.python_version(), "kafka": kafka_version(), **{name: version(name) for name in packages}}


def ingest(runs: int, folder: Path, console: Console) -> Runs:
    """A waiting topic, folded into an empty state."""
    console.print("fills a topic of 3,000,000 records, then folds it into an empty state, once a run")
    found: Runs = bench_ingest(folder, runs=runs)["runs"]
    console.print("then the same into a state of 2,000,000 users, beyond memory")
    return [small | large for small, large in zip(found, bench_large(runs, folder / "large", console), strict=True)]


@dataclass
class World:
    """A running stack with a release, items, and users with full histories."""

    stack: Stack
    domain: Domain
    producer: ActionProducer
    random: np.random.Generator
    items: int
    user_ids: npt.NDArray[np.uint64]
    """Items have ids from 1 to `items`; users of `user_ids` have a history."""

    @property
    def settings(self) -> Settings:
        """Settings with the stack's endpoints."""
        return self.stack.settings

    def produce(self, event_time_ms: int | None = None) -> tuple[int, int, Future[Position]]:
        """One click of a random user: (user, event id, position)."""
        user_id, event_id = int(self.random.choice(self.user_ids)), int(self.random.integers(1, 2**63))
        future = self.producer.produce(
            user_id=user_id,
            entity_kind="item",
            entity_id=int(self.random.integers(1, self.items + 1)),
            action="click",
            event_id=event_id,
            event_time_ms=event_time_ms,
        )
        return user_id, event_id, future

    def request(self, candidates: int) -> RankRequest:
        """A ranking of random candidates for a random user."""
        ids = self.random.choice(self.items, candidates, replace=False).astype("<u8") + np.uint64(1)
        return RankRequest(
            ranker="home",
            user_id=int(self.random.choice(self.user_ids)),
            candidate_ids=ids.tobytes(),
            candidate_features={"retrieval_score": feature_column(self.random.random(candidates).tolist())},
            request_features={"device": feature_column(["phone"])},
        )


@contextlib.contextmanager
def world(
    folder: Path,
    serving: tuple[str, ...],
    *,
    model: Callable[[Domain, str], Any] = TransActRanker,
    small: bool = False,
    items: int = ITEMS,
    users: int = USERS,
    **given: Any,
) -> Iterator[World]:
    """A running stack with an untrained release of `model` and tables of items and users; USERS of them, all over the table, have full
    histories.
    """
    path = folder / "paper-size.toml"
    path.write_text(paper_size(SIMULATOR.read_text("utf-8")), "utf-8")
    settings = load_settings(home=folder / "home", domain=path, kafka_bootstrap="", triton_url="", rank_timeout_ms=5000, **given)
    random = np.random.default_rng(1)
    domain = write_untrained_release(settings.home, path, random, model=model, small=small, items=items, users=users)
    user_ids = np.linspace(1, users, USERS).astype(np.uint64)
    with Stack(settings, serving=serving) as stack:
        producer = ActionProducer(kafka_config(stack.settings), domain, topics(stack.settings).actions)
        try:
            events = np.zeros(USERS * HISTORY, EVENT_DTYPE)
            events["event_time_ms"] = now_ms() - random.integers(1, 10**7, len(events))
            events["event_id"] = random.integers(1, 2**63, len(events))
            events["entity_id"] = random.integers(1, items + 1, len(events))
            events["entity_kind"], events["action"], events["value"] = 1, domain.actions["click"].id, np.nan
            producer.produce_many(np.repeat(user_ids, HISTORY), events)
            producer.flush()
            yield World(stack, domain, producer, random, items, user_ids)
        finally:
            producer.close()


def write_untrained_release(
    home: Path,
    domain_path: Path,
    random: np.random.Generator,
    *,
    model: Callable[[Domain, str], Any] = TransActRanker,
    small: bool = False,
    items: int = ITEMS,
    users: int = USERS,
) -> Domain:
    """Tables with random contents and a release of the domain's ranker `home` with weights as initialised, below `home`; with a `small`
    model too. Ids begin with 1.
    """
    domain = load_domain(domain_path)
    dimension = domain.ranker["home"].embedding_dimension
    tables = home / "tables"

    def vectors(n: int) -> npt.NDArray[np.float16]:
        made = random.standard_normal((n, dimension), np.float32)
        made /= np.sqrt(dimension)
        return made.astype(np.float16)

    item_ids, user_ids = np.arange(1, items + 1, dtype=np.uint64), np.arange(1, users + 1, dtype=np.uint64)
    members = {item_member("item"): Member(item_ids, vectors(items)), "user": Member(user_ids, vectors(users))}
    spaces = {domain.ranker["home"].item_space: write_generation(tables, domain.ranker["home"].item_space, now_ms(), members).name}
    columns: dict[str, dict[str, np.ndarray]] = {"item": {}, "user": {}}
    for name, feature in domain.features.items():
        if feature.side in columns:
            n = items if feature.side == "item" else users
            for column, dtype, shape in stored_columns(name, feature):
                columns[feature.side][column] = random.integers(1, 100, (n, *shape)).astype(dtype)
    features = {item_member("item"): Member(item_ids, features=columns["item"]), "user": Member(user_ids, features=columns["user"])}
    spaces["features"] = write_generation(tables, "features", now_ms(), features).name
    write_release(
        home / "releases",
        model=model(domain, "home").eval(),
        domain_toml=domain_path.read_text("utf-8"),
        ranker="home",
        created_ms=now_ms(),
        generations=spaces,
        metrics={},
        small=_untrained_small(domain, random) if small else None,
    )
    return domain


def _untrained_small(domain: Domain, random: np.random.Generator) -> bytes:
    from safetensors.numpy import save

    shapes = small_shapes(SmallInputs(domain, "home"), len(domain.ranker["home"].heads))
    found: bytes = save({name: random.normal(scale=0.1, size=shape).astype(np.float32) for name, shape in shapes.items()})
    return found


def rank(runs: int, folder: Path, console: Console) -> Runs:
    """Rankings with the model in the paper's size, at the client, during ingest."""
    console.print(
        f"{RANKINGS_PER_S} rankings/s at constant intervals, {CANDIDATES} candidates, {RANK_S:.0f} s a run, {EVENTS_PER_S} events/s"
    )
    with world(folder, ("worker", "server"), torch_threads=2, small=True) as running:
        return [_rank_run(running) for _ in range(runs)]


def _rank_run(running: World) -> dict[str, float]:
    stop = threading.Event()
    tiers: list[int] = []

    def ingest() -> None:
        begin_s, i = time.perf_counter(), 0
        while not stop.is_set():
            time.sleep(max(0.0, begin_s + i / EVENTS_PER_S - time.perf_counter()))
            running.produce()
            i += 1

    def ask(due_s: float, request: RankRequest) -> float:
        answer = client.call(request)
        tiers.append(answer.tier)
        return (time.perf_counter() - due_s) * 1e3

    requests = [running.request(CANDIDATES) for _ in range(int(RANK_S * RANKINGS_PER_S))]
    producing = threading.Thread(target=ingest)
    with ranking_client(running.settings, timeout_s=5.0) as client, ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            client.call(running.request(CANDIDATES))
        producing.start()
        begin_s = time.perf_counter()
        pending = []
        for i, request in enumerate(requests):
            due_s = begin_s + i / RANKINGS_PER_S
            time.sleep(max(0.0, due_s - time.perf_counter()))
            pending.append(pool.submit(ask, due_s, request))
        found_ms = [future.result() for future in pending]
        stop.set()
        producing.join()
    running.producer.flush()
    if set(tiers) != {1}:
        raise RuntimeError(f"rankings came from tiers {sorted(set(tiers))}, not all from the model")
    p50, p99 = np.percentile(found_ms, (50, 99))
    return {"rank_ms_p50": float(p50), "rank_ms_p99": float(p99), "small_ms_p99": _small_ms_p99(running)}


def _small_ms_p99(running: World) -> float:
    """The tier of the small model at the same rate, at the client."""
    found_ms = []
    with ranking_client(running.settings, timeout_s=5.0) as client:
        begin_s = time.perf_counter()
        for i in range(int(RANK_S * RANKINGS_PER_S)):
            request = running.request(CANDIDATES)
            request.tier = TIER_SMALL
            due_s = begin_s + i / RANKINGS_PER_S
            time.sleep(max(0.0, due_s - time.perf_counter()))
            if client.call(request).tier != TIER_SMALL:
                raise RuntimeError("another tier than the small model answered")
            found_ms.append((time.perf_counter() - due_s) * 1e3)
    return float(np.percentile(found_ms, 99))


def replay(runs: int, folder: Path, console: Console) -> Runs:
    """Replay of a ranking log from Kafka, without scoring."""
    console.print(
        f"{REPLAY_RANKINGS} rankings of {REPLAY_CANDIDATES} candidates, {USERS * HISTORY} events; each run replays all, without scoring"
    )
    with world(folder, ("worker", "server"), torch_threads=2) as running:
        with ranking_client(running.settings, timeout_s=10.0) as client:
            for _ in range(REPLAY_RANKINGS):
                user_id, _, future = running.produce()
                request = running.request(REPLAY_CANDIDATES)
                request.user_id = user_id
                at = future.result()
                request.after.add(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset)
                client.call(request)
        _wait_for_rankings(running.settings)
        home = running.settings.home
        options = ReplayOptions(
            releases=home / "releases",
            tables=home / "tables",
            kafka=kafka_config(running.settings),
            topics=topics(running.settings),
            score_sample=0,
        )
        found = []
        for _ in range(runs):
            report = replay_logs(options)
            if report.rankings_replayed < REPLAY_RANKINGS:
                raise RuntimeError(f"only {report.rankings_replayed} of {REPLAY_RANKINGS} rankings were replayed: {report.verdict}")
            found.append(
                {
                    "requests_per_s": report.requests_per_s,
                    "events_per_s": report.events_per_s,
                    "bytes_different": float(report.bytes_different),
                }
            )
        return found


def _wait_for_rankings(settings: Settings) -> None:
    """Returns when the ranking log, which never delays an answer, has reached Kafka."""
    deadline_s = time.monotonic() + 10
    partitions = range(settings.partitions)
    while sum(end_offsets(kafka_config(settings), settings.topic_rankings, partitions).values()) < REPLAY_RANKINGS:
        if time.monotonic() > deadline_s:
            raise RuntimeError("the ranking log did not reach Kafka within 10 s")

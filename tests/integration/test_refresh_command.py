"""The present hour's vectors of a running stack: what they are made of, what a tick leaves, and `freshrank refresh` under traffic."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from confluent_kafka.admin import AdminClient
from serving_world import ImmediateSource, ListSink, MemoryReader
from test_refreshed import DOMAIN, HOUR_MS, clicks, imported
from test_releases import eventually
from typer.testing import CliRunner

import inference.refreshed as refreshed
from deploy import cli
from deploy.announcing import News, announce_release
from deploy.bench_release import Proof, distinct_model
from deploy.experiments import announce_experiment, make_experiment
from deploy.processes import kafka_config, topics
from deploy.settings import Settings, load_settings
from deploy.stack import StackNotRunningError
from deploy.triton_server import TritonServer
from features.actions import EVENT_DTYPE
from features.domain import DAY_MS, Domain, Refresh, parse_domain
from features.logs import LoggedActions
from features.tables import (
    USER,
    Generation,
    Member,
    generation_names,
    generations_of,
    lineage_of,
    open_generation,
    time_of,
    write_generation,
)
from inference.client import RankingClient
from inference.embeddings import EmbeddingError
from inference.refreshed import COUNTED, SETTLED_MS, publish_present, publish_refreshed
from inference.release import Release, write_release
from inference.server import RankingServer, ServerConfig
from protos.v1.ranking_pb2 import RankingRecord, RankRequest
from streams.archive import KafkaLog, Span
from streams.broadcast import Announcements
from streams.errors import KafkaUnavailableError, MissingTopicError
from streams.kafka import ensure_topics
from streams.producer import ActionProducer

T = 1_700_002_800_000
APART = DOMAIN.replace('user_space = "together"', 'user_space = "readers"')
TRAINED_HOURS, HOURS = 20, 30


def logged(rows: npt.NDArray[np.int64], erased: tuple[tuple[int, int], ...] = ()) -> LoggedActions:
    """Clicks, and erasures (user, time), as a log of actions holds them."""
    events = np.zeros(len(rows) + len(erased), EVENT_DTYPE)
    users = np.concatenate([rows[:, 0], [user for user, _ in erased]]).astype(np.uint64)
    times = np.concatenate([rows[:, 2], [time_ms for _, time_ms in erased]]).astype(np.int64)
    events["entity_id"][: len(rows)] = rows[:, 1]
    events["event_time_ms"][: len(rows)] = rows[:, 2]
    events["entity_kind"][: len(rows)], events["action"][: len(rows)] = 1, 2
    order = np.argsort(times, kind="stable")
    part = LoggedActions.imported(users[order], events[order], times[order])
    return LoggedActions(**{**vars(part), "erase": (np.arange(len(events)) >= len(rows))[order]})


class Product:
    """A ranker that was released after TRAINED_HOURS, and its log since."""

    def __init__(self, folder: Path, text: str = DOMAIN) -> None:
        folder.mkdir(exist_ok=True)
        self.rows, self.root, self.erased = clicks(HOURS), folder / "tables", ()
        self.domain = parse_domain(text, source="news.toml")
        _, log = imported(folder / "log", self.rows[self.rows[:, 2] < T + TRAINED_HOURS * HOUR_MS])
        made = publish_refreshed(self.domain, "home", log, self.root)
        self.release = released(folder / "releases", text, {path.parent.name: path.name for path in made})
        self.asked: list[int] = []

    def actions(self, since_ms: int) -> Iterable[LoggedActions]:
        self.asked.append(since_ms)
        everything = logged(self.rows, self.erased)
        kept = everything.append_time_ms >= since_ms
        yield LoggedActions(**{name: column[kept] for name, column in vars(everything).items()})

    def tick(self, hour: float, **given) -> dict[str, str]:
        now_ms = int(T + hour * HOUR_MS)
        return publish_present(self.domain, "home", self.release, self.actions, self.root, now_ms, **given)

    def opened(self, names: dict[str, str], space: str = "together") -> Generation:
        return open_generation(self.root, space, names[space], verify=True)


def released(folder: Path, text: str, generations: dict[str, str], created_ms: int = T) -> Release:
    return write_release(
        folder,
        model=distinct_model(parse_domain(text, source="news.toml"), "home", 1),
        domain_toml=text,
        ranker="home",
        created_ms=created_ms,
        generations=generations,
        metrics={},
    )


def likeness(one: npt.NDArray[np.float16], two: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    a, b = one.astype(np.float32), two.astype(np.float32)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-6)


@pytest.mark.parametrize(("text", "users_in"), [(DOMAIN, "together"), (APART, "readers")], ids=["one space", "two spaces"])
def test_hour_by_hour_it_is_what_the_whole_log_gives(tmp_path: Path, text: str, users_in: str) -> None:
    product = Product(tmp_path, text)
    _, log = imported(tmp_path / "whole", product.rows)
    whole = [
        open_generation(path.parents[1], path.parent.name, path.name)
        for path in publish_refreshed(product.domain, "home", log, tmp_path / "all")
    ]
    expected = {(held.space, held.created_ms): held for held in whole}
    trained = dict(product.release.generations)
    assert product.tick(TRAINED_HOURS + 0.1) == trained, "nothing came since: what it was trained with is as good"
    product.asked.clear()
    for hour in range(TRAINED_HOURS + 1, HOURS):
        names = product.tick(hour + 0.1)
        for space in {"together", users_in}:
            made = product.opened(names, space)
            of = expected[space, made.created_ms]
            assert made.lineage == of.lineage
            for member in made.members:
                np.testing.assert_array_equal(made.ids(member), of.ids(member))
                like = likeness(made.vector_table(member)[1:], of.vector_table(member)[1:])
                # Users: a mean of what was added day by day is not that of all actions with the newest vectors, but nearly.
                assert like.min() > (0.9 if member == USER else 0.999), (space, member, hour)
                if member == USER:
                    np.testing.assert_array_equal(made.column(USER, COUNTED), of.column(USER, COUNTED))
        assert product.opened(names).created_ms == T + hour * HOUR_MS
        assert names == product.tick(hour + 0.9), "a tick that is repeated finds it there"
    assert len(product.asked) == HOURS - TRAINED_HOURS - 1, "and reads nothing"
    days = {time_ms // DAY_MS for _, time_ms in expected}
    assert len(generation_names(product.root, "readers")) == (0 if users_in == "together" else len(days))


def test_an_hour_that_the_log_has_not_reached_is_left_to_a_later_tick(tmp_path: Path) -> None:
    """A clock that is ahead would write an hour without what is still to come before it, erasures too."""
    product = Product(tmp_path)
    made = product.tick(25.1)
    product.rows = product.rows[product.rows[:, 2] < T + 27 * HOUR_MS]
    assert product.tick(28.1) == made
    product.rows = clicks(HOURS)
    assert product.opened(product.tick(28.1)).created_ms == T + 28 * HOUR_MS


def test_hours_that_were_missed_are_gone_through(tmp_path: Path) -> None:
    """Behind an outage longer than the window: no item of the present window was there before it."""
    product, steady = Product(tmp_path / "one"), Product(tmp_path / "two")
    for hour in range(TRAINED_HOURS + 1, HOURS):
        ticked = steady.opened(steady.tick(hour + 0.1))
    late = product.opened(product.tick(HOURS - 1 + 0.1))
    assert (late.created_ms, late.lineage) == (ticked.created_ms, ticked.lineage)
    assert len(product.asked) == 1
    for member in late.members:
        np.testing.assert_array_equal(late.ids(member), ticked.ids(member))
        assert likeness(late.vector_table(member)[1:], ticked.vector_table(member)[1:]).min() > (0.9 if member == USER else 0.999)
    assert len(generation_names(product.root, "together")) < len(generation_names(steady.root, "together"))


def test_only_the_window_is_needed_and_no_hour_before_it_is_over(tmp_path: Path) -> None:
    product = Product(tmp_path, APART)
    window_ms = product.domain.ranker["home"].refresh.window_ms
    names = product.tick(22.5)
    assert product.asked == [T + 20 * HOUR_MS - window_ms], "of the first hour that is missed"
    assert product.opened(names).created_ms == T + 22 * HOUR_MS
    cut_ms = int(T + 23 * HOUR_MS)
    assert product.tick(23.0) == names, "the log may lack what came last, if clocks differ"
    later = product.opened(product.tick(23 + SETTLED_MS / HOUR_MS))
    assert later.created_ms == cut_ms
    assert product.asked[1:] == [cut_ms - window_ms]
    assert set(later.ids("item.article").tolist()) == set(product.rows[product.rows[:, 2] < cut_ms, 1].tolist())
    product.rows = product.rows[product.rows[:, 2] < cut_ms]
    assert product.tick(28.1) == product.tick(23.5), "where nothing came the newest is as good"


def test_a_tick_that_was_cut_off_between_two_spaces_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(tmp_path, APART)
    hour = 25.5  # a day begins at T + 25 h
    written: list[str] = []

    def cut(root, space, *rest, **given):
        if written:
            raise KeyboardInterrupt
        written.append(space)
        return write_generation(root, space, *rest, **given)

    monkeypatch.setattr(refreshed, "write_generation", cut)
    with pytest.raises(KeyboardInterrupt):
        product.tick(hour)
    monkeypatch.undo()
    assert written == ["readers"]
    names = product.tick(hour)
    assert {product.opened(names, space).created_ms for space in names} == {T + 25 * HOUR_MS}
    other = Product(tmp_path / "other", APART)
    assert other.tick(hour) == names, "byte for byte what a tick that was not cut off makes"


@pytest.mark.parametrize("text", [DOMAIN, APART], ids=["one space", "two spaces"])
@pytest.mark.parametrize("told_by", ["log", "ledger"])
def test_an_erased_users_past_goes_into_no_later_hour(tmp_path: Path, text: str, told_by: str) -> None:
    product = Product(tmp_path, text)
    space = "readers" if text == APART else "together"
    at_ms = int(T + 23.5 * HOUR_MS)
    silent, active = 7, 8
    product.rows = product.rows[(product.rows[:, 0] != silent) | (product.rows[:, 2] < at_ms)]
    product.tick(23.2)
    ledger = {silent: at_ms, active: at_ms}
    if told_by == "log":
        product.erased, ledger = tuple(ledger.items()), {}
    told = {"erased": ledger}
    if text == DOMAIN:
        held = product.opened(product.tick(24.2, **told))
        assert not {silent, active} & set(held.ids(USER).tolist()), "at once, not at the next day's beginning"
    held = product.opened(product.tick(25.2, **told), space)
    assert held.created_ms == T + 25 * HOUR_MS
    assert silent not in held.ids(USER)
    done = product.rows[(product.rows[:, 0] == active) & (product.rows[:, 2] > at_ms) & (product.rows[:, 2] < held.created_ms)]
    row = held.rows(USER, np.array([active], np.uint64))[0]
    assert (held.column(USER, COUNTED)[row] if row else 0) == len(done), "what came behind the erasure counts"
    # A log that never had their past gives the same items.
    made = []
    for name, erased, gone in (("erased", True, False), ("never", False, True), ("as it was", False, False)):
        other = Product(tmp_path / name, text)
        past = np.isin(other.rows[:, 0], [silent, active]) & (other.rows[:, 2] <= at_ms)
        other.rows = other.rows[~past] if gone else other.rows
        other.erased = product.erased if erased else ()
        items = other.opened(other.tick(26.2, erased=ledger if erased else {}))
        made.append((items.ids("item.article").tobytes(), items.vector_table("item.article").tobytes()))
    assert made[0] == made[1] != made[2]


def test_who_was_erased_since_the_hour_began_is_in_none_of_its_vectors(tmp_path: Path) -> None:
    product, only = Product(tmp_path), 999_999
    product.rows = np.concatenate([product.rows, [[8, only, int(T + 24.5 * HOUR_MS)]]])
    product.erased = ((8, int(T + 25.1 * HOUR_MS)),)
    held = product.opened(product.tick(25.2))
    assert (held.created_ms, 8 in held.ids(USER), only in held.ids("item.article")) == (T + 25 * HOUR_MS, False, False)
    product.erased = ()
    assert only in product.opened(product.tick(26.2)).ids("item.article")


def test_what_is_refused(tmp_path: Path) -> None:
    product = Product(tmp_path)
    other = product.domain.model_copy(
        update={"ranker": {"home": product.domain.ranker["home"].model_copy(update={"refresh": Refresh(window_ms=DAY_MS)})}}
    )
    plain = parse_domain(DOMAIN.replace("refresh = {", "# "), source="news.toml")
    for domain, release, message in (
        (plain, product.release, "ask for no refresh"),
        (other, product.release, "was trained with refresh every_ms=3600000 window_ms=21600000, ranker.home has .*window_ms=86400000"),
        (
            product.domain,
            released(tmp_path / "plain", DOMAIN.replace("refresh = {", "# "), dict(product.release.generations)),
            "was trained with refresh None",
        ),
    ):
        with pytest.raises(EmbeddingError, match=message):
            publish_present(domain, "home", release, product.actions, product.root, T + 25 * HOUR_MS)
    vectors = np.eye(8, dtype=np.float16)
    members = {"item.article": Member(np.arange(8, dtype=np.uint64), vectors), USER: Member(np.arange(8, dtype=np.uint64), vectors)}
    unnamed = write_generation(product.root, "together", T, members).name
    with pytest.raises(EmbeddingError, match="of lineage none, which no refresh makes"):
        publish_present(
            product.domain,
            "home",
            released(tmp_path / "unnamed", DOMAIN, {"together": unnamed}),
            product.actions,
            product.root,
            T + 25 * HOUR_MS,
        )
    product.rows[:, 1] += 1_000_000  # an outage longer than articles live
    with pytest.raises(EmbeddingError, match=r"none of the items of the 21600000 ms before .* has a vector yet"):
        product.tick(25.1)
    assert product.opened(dict(product.release.generations)).lineage != ""


@contextmanager
def serving(home: Settings, triton: Callable[..., TritonServer]) -> Iterator[tuple[str, RankingServer, ListSink]]:
    """A warm ranking server in this process, and where it logs."""
    (repository := home.home / "repository").mkdir()
    config = ServerConfig(
        releases=home.home / "releases", tables=home.home / "tables", repository=repository, triton=triton(repository).grpc_url,
        timeout_s=10.0, model_timeout_s=10.0, unload_delay_s=600.0, model_device="cpu",
    )  # fmt: skip
    sink = ListSink()
    server = RankingServer(config, ImmediateSource(MemoryReader()), sink)
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)

    try:
        address = run(server.start())
        run(server.warm())
        yield address, server, sink
    finally:
        run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def refresh(home: Settings) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["refresh", "--ranker", "home", "--json"], env=home.as_environment())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def ask(address: str, requests: list[RankRequest], over: Event) -> int:
    """Asks one request after the other until `over`; how many were answered. Raises RankError where one fails."""
    answers = 0
    with RankingClient(address, timeout_s=10.0) as client:
        while not over.is_set():
            client.call(requests[answers % len(requests)])
            answers += 1
    return answers


def request(user: int, rows: npt.NDArray[np.int64]) -> RankRequest:
    items = np.unique(rows[:, 1])[-60:]
    candidates = np.random.default_rng(user).choice(items, 20, replace=False).astype("<u8")
    return RankRequest(ranker="home", user_id=user, candidate_ids=candidates.tobytes(), request_time_ms=int(rows[-1, 2]))


def released_apart(home: Settings, domain: Domain, log: Path) -> Release:
    """A release of another lineage, for experiments only."""
    made = publish_refreshed(domain, "home", log, home.home / "tables", seed=1)
    return write_release(
        home.home / "releases",
        model=distinct_model(domain, "home", 2),
        domain_toml=DOMAIN,
        ranker="home",
        created_ms=T,
        generations={"together": made[-1].name},
        metrics={},
        only=True,
    )


@pytest.fixture
def home(kafka, tmp_path: Path) -> Settings:
    """A home folder whose ranker was released TRAINED_HOURS after the log's begin, which is so that its last hour is the present one."""
    path = tmp_path / "news.toml"
    path.write_text(DOMAIN)
    names = {f"topic_{name}": f"{name}-{tmp_path.name}" for name in ("actions", "dead_letters", "rankings", "announcements", "rates")}
    settings = load_settings(home=tmp_path / "home", domain=path, kafka_bootstrap=kafka.bootstrap, **names)
    ensure_topics(kafka_config(settings), topics(settings), partition_count=2)
    return settings


def rows_until(now_ms: int) -> npt.NDArray[np.int64]:
    rows = clicks(HOURS)
    rows[:, 2] += (now_ms - SETTLED_MS) // HOUR_MS * HOUR_MS - (T + (HOURS - 1) * HOUR_MS)
    return rows[rows[:, 2] < now_ms]


def canarys_hour(home: Settings, domain: Domain, log: Path, held: Generation, said: dict[str, Any], now_ms: int) -> None:
    """A canary of another training has vectors of its own lineage."""
    canary = released_apart(home, domain, log)
    announce_experiment(home, "home", make_experiment("home", "try", [f"canary={canary.release_id}:5%"], (), now_ms))
    assert refresh(home) == said | {"announced": False}
    of_canary = open_generation(home.home / "tables", "together", canary.generations["together"])
    newest = next(generations_of(home.home / "tables", "together", of_canary.lineage))
    assert (of_canary.lineage != held.lineage, time_of(newest)) == (True, held.created_ms)


def test_the_command_serves_the_present_hour_while_requests_are_answered(home: Settings, triton, tmp_path: Path, monkeypatch) -> None:
    now_ms = time.time_ns() // 1_000_000
    monkeypatch.setattr("deploy.learn.now_ms", lambda: now_ms)  # no hour may end within the test
    rows = rows_until(now_ms)
    begin_ms = int(rows[0, 2]) // HOUR_MS * HOUR_MS
    cut_ms = begin_ms + TRAINED_HOURS * HOUR_MS
    domain, log = imported(tmp_path / "log", rows[rows[:, 2] < cut_ms])
    made = publish_refreshed(domain, "home", log, home.home / "tables")
    first = {"together": made[-1].name}
    release = released(home.home / "releases", DOMAIN, first, created_ms=cut_ms)
    producer = ActionProducer(kafka_config(home), domain, home.topic_actions)
    since = logged(rows[rows[:, 2] >= cut_ms - 10 * HOUR_MS])  # the topic is older than the window
    since.events["event_id"] = 1 + np.arange(len(since))
    producer.produce_many(since.users, since.events, since.append_time_ms)
    erased = int(since.users[-1])
    producer.erase(erased, "asked for", event_id=1)
    producer.flush()
    producer.close()
    news = News()
    topic = Announcements(kafka_config(home), home.topic_announcements, on_change=news.take)
    with serving(home, triton) as (address, server, sink), closing(topic):
        news.attach(server)
        requests = [request(user, rows) for user in range(1, 9)]

        def served() -> str:
            return str(server.releases.served["home"].generations["together"])

        over = Event()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask, address, requests, over)
            try:
                eventually(lambda: sink.records or asking.done())
                said = refresh(home)
                eventually(lambda: served() != first["together"] or asking.done())
                seen = len(sink.records)
                eventually(lambda: len(sink.records) > seen + 8 or asking.done())
            finally:
                over.set()
            answers = asking.result()
        assert said["announced"]
        assert said["release_id"] == release.release_id
        held = open_generation(home.home / "tables", "together", said["generations"]["together"], verify=True)
        assert held.lineage == lineage_of(home.home / "tables", "together", first["together"])
        assert held.created_ms == (now_ms - SETTLED_MS) // HOUR_MS * HOUR_MS
        theirs = (rows[:, 0] == erased) & (rows[:, 2] >= cut_ms)
        assert set(held.ids("item.article").tolist()) == set(rows[~theirs & (rows[:, 2] < held.created_ms), 1].tolist())
        assert erased not in held.ids(USER)
        eventually(lambda: len(sink.records) >= answers)  # a record is made behind its answer
        records = [RankingRecord.FromString(record) for record in sink.records]
        assert answers == len(records), "none failed: a failure ends the asking"
        proof = Proof(
            home.home / "releases",
            home.home / "tables",
            "together",
            [(release.release_id, name) for name in (first["together"], held.name)],
            requests,
        )
        assert all(proof.holds(record) for record in records)
        assert {record.generations["together"] for record in records} == {first["together"], held.name}, "the load met both"
        switches = server.releases.switches
        assert refresh(home) == said | {"announced": False}
        assert server.releases.switches == switches, "a tick that finds all done changes nothing"
        canarys_hour(home, domain, log, held, said, now_ms)
        announce_release(home, "home", release.release_id, now_ms, first)  # as a tick that was cut off would leave it
        assert refresh(home) == said
        eventually(lambda: served() == held.name)
    with pytest.raises(StackNotRunningError):
        refresh(home.model_copy(update={"kafka_bootstrap": "", "home": tmp_path / "nothing"}))


def test_a_log_is_read_from_a_time_on(home: Settings) -> None:
    producer = ActionProducer(kafka_config(home), parse_domain(DOMAIN, source="news.toml"), home.topic_actions)
    click: dict[str, Any] = {"entity_kind": "article", "action": "click", "user_id": 1}
    placed = []
    for item in range(3):
        placed.append(producer.produce(**click, entity_id=item))
        producer.flush()
        since_s = time.monotonic()
        eventually(lambda since_s=since_s: time.monotonic() - since_s > 0.002)  # the next one is of a later millisecond
    producer.close()
    partition = placed[0].result(1).partition
    log = KafkaLog(kafka_config(home), home.topic_actions)
    with closing(log):
        (records,) = log.read(partition)
        times = records.append_time_ms.tolist()
        assert len(set(times)) == 3
        for time_ms, start in ((times[0], 0), (times[1], 1), (times[2], 2), (times[2] + 1, 3), (times[0], 3)):
            log.begin_at(time_ms)
            assert log.partitions[partition] == Span(start, 3), "it never goes back"
            assert log.partitions[1 - partition] == Span(0, 0)
            assert [len(found) for found in log.read(partition)] == ([3 - start] if start < 3 else [])


def test_a_log_that_cannot_be_asked_for_its_times_is_left_as_it_was(home: Settings) -> None:
    with closing(KafkaLog(kafka_config(home), home.topic_actions)) as log:
        log.partitions[2] = Span(0, 1)  # as where the topic was made anew since, with fewer partitions
        before = dict(log.partitions)
        with pytest.raises(KafkaUnavailableError, match=f"Kafka at {home.kafka_bootstrap} does not answer as needed .*partition"):
            log.begin_at(1)
        assert log.partitions == before, "the partitions that were answered for neither"
        del log.partitions[2], before[2]
        log.begin_at(1)
        before = dict(log.partitions)
        admin = AdminClient(kafka_config(home).client("test"))
        admin.delete_topics([home.topic_actions])[home.topic_actions].result(30)
        eventually(lambda: home.topic_actions not in admin.list_topics(timeout=30).topics)
        with pytest.raises(MissingTopicError, match="create the topics first"):
            log.begin_at(1)
        assert log.partitions == before

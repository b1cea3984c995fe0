"""The local broker and the local Triton are the real ones: they store, survive SIGKILL, and answer with the right numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from deploy.kafka_jars import JarsMissingError, check_jars, jars_folder, locked_jars
from deploy.kafka_server import KafkaServer
from deploy.triton_server import TritonServer

pytestmark = pytest.mark.servers

QUIET = {"log_level": 0}

DOUBLE_MODEL = """
import torch
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            values = torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, "X").to_dlpack())
            doubled = pb_utils.Tensor.from_dlpack("Y", torch.utils.dlpack.to_dlpack(values * 2 + torch.get_num_threads() * 1000))
            answers.append(pb_utils.InferenceResponse(output_tensors=[doubled]))
        return answers
"""

DOUBLE_CONFIG = """
name: "double"
backend: "python"
input [{ name: "X" data_type: TYPE_FP32 dims: [ -1, 3 ] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [ -1, 3 ] }]
instance_group [{ kind: KIND_CPU count: 1 }]
"""


def write_double(repository: Path) -> None:
    (repository / "double" / "1").mkdir(parents=True)
    (repository / "double" / "config.pbtxt").write_text(DOUBLE_CONFIG)
    (repository / "double" / "1" / "model.py").write_text(DOUBLE_MODEL)


def create_topic(bootstrap: str, name: str) -> None:
    client = AdminClient({"bootstrap.servers": bootstrap, **QUIET})  # held: its futures fail once it is collected
    for future in client.create_topics([NewTopic(name, 2, 1)]).values():
        future.result(timeout=10)


def produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, **QUIET})
    for value in values:
        producer.produce(topic, value, partition=1)
    assert producer.flush(10) == 0


def consume(bootstrap: str, topic: str, count: int) -> list[bytes | None]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "unused", "enable.auto.commit": False, **QUIET})
    try:
        consumer.assign([TopicPartition(topic, 1, 0)])
        messages = consumer.consume(count, timeout=10)
        assert [message.error() for message in messages] == [None] * count
        return [message.value() for message in messages]
    finally:
        consumer.close()


def test_broker_gives_back_what_was_produced(kafka: KafkaServer) -> None:
    create_topic(kafka.bootstrap, "parts.round-trip")
    sent = [b"%d" % number for number in range(100)]
    produce(kafka.bootstrap, "parts.round-trip", sent)
    assert consume(kafka.bootstrap, "parts.round-trip", 100) == sent


def test_a_second_start_in_the_folder_keeps_data_and_address(tmp_path: Path) -> None:
    with KafkaServer(tmp_path / "broker") as first:
        create_topic(first.bootstrap, "kept")
        produce(first.bootstrap, "kept", [b"before the kill"])
        first.kill()
        with pytest.raises(RuntimeError, match="not running"):
            _ = first.pid
    with KafkaServer(tmp_path / "broker") as second:
        assert second.bootstrap == first.bootstrap
        assert consume(second.bootstrap, "kept", 1) == [b"before the kill"]


def test_missing_and_changed_jars_are_named(tmp_path: Path) -> None:
    with pytest.raises(JarsMissingError, match="make setup"):
        KafkaServer(tmp_path / "broker", jars=tmp_path / "none").start()
    jars = tmp_path / "jars"
    jars.mkdir()
    for name in locked_jars():
        (jars / name).symlink_to(jars_folder() / name)
    check_jars(jars, bytes_too=True)
    changed = sorted(locked_jars())[3]
    (jars / changed).unlink()
    (jars / changed).write_bytes(b"not a jar")
    with pytest.raises(JarsMissingError, match=changed):
        check_jars(jars, bytes_too=True)


def test_triton_answers_and_comes_back_after_a_kill(triton: Callable[..., TritonServer], tmp_path: Path) -> None:
    write_double(tmp_path)
    server = triton(tmp_path, load=("double",), threads=2)
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(infer(server, values), values * 2 + 2000)
    server.kill()
    server.start()
    np.testing.assert_array_equal(infer(server, values), values * 2 + 2000)


def infer(server: TritonServer, values: np.ndarray) -> np.ndarray:
    with triton_grpc.InferenceServerClient(server.grpc_url) as client:
        tensor = triton_grpc.InferInput("X", list(values.shape), "FP32")
        tensor.set_data_from_numpy(values)
        answer = client.infer("double", [tensor], client_timeout=30).as_numpy("Y")
    assert answer is not None
    return answer


def test_triton_leaves_no_model_process_behind(triton: Callable[..., TritonServer], tmp_path: Path) -> None:
    write_double(tmp_path)
    server = triton(tmp_path, load=("double",))
    stubs = [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
    assert stubs
    server.stop()
    assert not [pid for pid in stubs if Path(f"/proc/{pid}").exists()]
    assert not list(Path("/dev/shm").glob(f"{server._regions}*"))

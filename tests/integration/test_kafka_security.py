"""A broker that demands TLS, SCRAM and access rights: the settings reach every client, and each role needs no more than its rights."""

import datetime
import ipaddress
import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka.admin import AclBinding, AclOperation, AclPermissionType, AdminClient, ResourcePatternType, ResourceType
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from streams_world import DOMAIN, World, check_fold, eventually, new_world, random_load, worker

from deploy.kafka_server import KafkaServer, Security
from streams.errors import KafkaUnavailableError, ProduceError
from streams.kafka import KafkaConfig, end_offsets, log_identity
from streams.producer import ActionProducer
from streams.ranking_log import RankingLog

pytestmark = pytest.mark.servers

PASSWORDS = {"admin": "admin-secret", "worker": "worker-secret", "producer": "producer-secret", "server": "server-secret"}
NAME = "secured"
# What README says that each role needs.
RIGHTS = [
    ("producer", "actions", AclOperation.WRITE),
    ("server", "actions", AclOperation.DESCRIBE),
    ("server", "rankings", AclOperation.WRITE),
    ("server", "announcements", AclOperation.READ),
    ("worker", "actions", AclOperation.READ),
    ("worker", "actions", AclOperation.DESCRIBE_CONFIGS),
    ("worker", "dead-letters", AclOperation.WRITE),
    ("worker", "dead-letters", AclOperation.READ),
    ("worker", "dead-letters", AclOperation.DESCRIBE_CONFIGS),
    ("worker", "rankings", AclOperation.DESCRIBE_CONFIGS),
    *(("worker", topic, what) for topic in ("rates", "rates-windows") for what in (AclOperation.READ, AclOperation.WRITE)),
]


def certificates(folder: Path) -> tuple[Path, Path]:
    """(authority, broker's key and chain), PEM."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, public_key, issuer: str, alternative: x509.ExtensionType) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        builder = builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        return (
            builder.not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(alternative, critical=True)
            .sign(authority_key, hashes.SHA256())
        )

    authority = certificate("authority", authority_key.public_key(), "authority", x509.BasicConstraints(ca=True, path_length=None))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    broker = certificate("127.0.0.1", key.public_key(), "authority", names)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    authority_path, broker_path = folder / "authority.pem", folder / "broker.pem"
    authority_path.write_bytes(authority.public_bytes(pem))
    broker_path.write_bytes(private + broker.public_bytes(pem))
    return authority_path, broker_path


def client(authority: Path, user: str, password: str | None = None) -> dict[str, str]:
    return {
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": str(authority),
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": user,
        "sasl.password": password or PASSWORDS[user],
    }


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secured")
    authority, broker = certificates(folder)
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required"
    security = Security(
        protocol="SASL_SSL",
        properties={
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
            "listener.name.broker.scram-sha-512.sasl.jaas.config": f'{login} username="admin" password="{PASSWORDS["admin"]}";',
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(broker),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(authority),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:admin;User:ANONYMOUS",  # the controller's own listener, on loopback, has no names
        },
        format_arguments=tuple(
            part for user, password in PASSWORDS.items() for part in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={password}]")
        ),
        client=client(authority, "admin"),
    )
    with KafkaServer(folder / "kafka", security=security) as server:
        yield server, authority


@pytest.fixture(scope="module")
def world(secured, tmp_path_factory) -> World:
    server, authority = secured
    found = new_world(KafkaConfig(server.bootstrap, client(authority, "admin")), tmp_path_factory.mktemp("world"), NAME)
    admin = AdminClient(found.kafka.client("admin"))
    literal, allow = ResourcePatternType.LITERAL, AclPermissionType.ALLOW
    wanted = [AclBinding(ResourceType.TOPIC, f"{NAME}-{topic}", literal, f"User:{user}", "*", what, allow) for user, topic, what in RIGHTS]
    wanted.append(AclBinding(ResourceType.GROUP, NAME, ResourcePatternType.PREFIXED, "User:worker", "*", AclOperation.READ, allow))
    for future in admin.create_acls(wanted).values():
        future.result()
    return found


def as_user(secured, user: str, password: str | None = None) -> KafkaConfig:
    server, authority = secured
    return KafkaConfig(server.bootstrap, client(authority, user, password))


def test_each_role_works_with_no_more_than_its_rights(world, secured):
    producer = ActionProducer(as_user(secured, "producer"), DOMAIN, world.topics.actions)
    producer.produce_many(*random_load(1_000, 30, seed=1))
    producer.flush()
    config = replace(world.config, kafka=as_user(secured, "worker"), erasure_deadline_ms=30 * 24 * 3600 * 1000)
    with worker(config) as running:
        rates = running.ready()["health"].replace("/health/", "/rates/")
        reader = world.reader()
        assert check_fold(world, reader) == 30
        reader.close()
        eventually(lambda: json.loads(urllib.request.urlopen(rates, timeout=10).read())["partitions"], "the windows of rates")
    producer.close()
    rankings = RankingLog(as_user(secured, "server"), world.topics.rankings, queue_max=10)
    assert rankings.put(1, b"record")
    rankings.close()
    assert rankings.statistics()["sent"] == 1


def test_a_role_cannot_do_what_is_not_its_own(world, secured):
    kafka = as_user(secured, "server")
    producer = ActionProducer(kafka, DOMAIN, world.topics.actions)
    with pytest.raises(ProduceError, match=r"(?i)authoriz"):
        producer.produce(user_id=1, entity_kind="item", entity_id=1, action="click").result()
    with pytest.raises(ProduceError, match=r"(?i)authoriz"):
        producer.close()
    with pytest.raises(KafkaUnavailableError, match="credentials"):
        end_offsets(as_user(secured, "producer"), world.topics.rankings, [0])


def test_a_wrong_password_is_said_so(world, secured):
    with pytest.raises(KafkaUnavailableError, match="credentials"):
        log_identity(as_user(secured, "worker", "guessed"), world.topics.actions, timeout_s=3.0)


def test_without_tls_nothing_is_answered(world, secured):
    server, _ = secured
    with pytest.raises(KafkaUnavailableError):
        log_identity(KafkaConfig(server.bootstrap), world.topics.actions, timeout_s=2.0)

"""Every setting of every process, typed, in one place.

A setting comes from an argument of `load_settings`, else from the environment (`FRESHRANK_` and its name in capitals), else from the TOML
file (`freshrank.toml` in the working directory, or the one that FRESHRANK_CONFIG names), else from the default here.
"""

import json
import os
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

ENVIRONMENT_PREFIX = "FRESHRANK_"
CONFIG_VARIABLE = "FRESHRANK_CONFIG"
OTHER_VARIABLES = {CONFIG_VARIABLE, "FRESHRANK_READY_FILE", "FRESHRANK_KAFKA_JARS", "FRESHRANK_SERVER_REUSES_PORT"}
"""Variables with the prefix that are no settings: the file, what a supervisor hands to its children, where the jars are."""
_CHECKOUT = Path(__file__).parents[1]


class SettingsError(ValueError):
    """A setting is wrong; the message names it, where it came from and what is allowed."""


def _is_address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if value and not (host and colon and port.isdigit() and int(port) < 1 << 16):
        raise ValueError("must be host:port, or empty for the local stack's")
    return value


Address = Annotated[str, AfterValidator(_is_address)]
Port = Annotated[int, Field(ge=0, le=65535)]
TopicName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]


class Settings(BaseSettings):
    """All settings. Sizes and times carry their unit at the end of the name; 0 as a port means any free one."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, env_ignore_empty=False)

    home: Path = Field(Path(".freshrank"), description="Folder of everything a stack keeps: log, state, tables, releases, log files.")
    domain: Path = Field(
        _CHECKOUT / "domains" / "simulator.toml", description="The domain file: what differs from one product to the next."
    )
    data: Path = Field(_CHECKOUT.parent / "shared" / "data", description="Folder of published logs, for tests and the demo.")

    kafka_bootstrap: str = Field("", description="host:port[,host:port] of an outside Kafka; empty: the local stack starts one.")
    kafka_properties: dict[str, str] = Field(
        {}, description="librdkafka properties for every client, such as security.protocol and sasl.*; JSON in the environment."
    )
    topic_actions: TopicName = Field("freshrank.actions.v1", description="The one order of all actions (LogAppendTime).")
    topic_dead_letters: TopicName = Field("freshrank.dead-letters.v1", description="Records that could not be decoded, with the reason.")
    topic_rankings: TopicName = Field("freshrank.rankings.v1", description="What was ranked for whom, for training and replay.")
    topic_announcements: TopicName = Field("freshrank.announcements.v1", description="Compacted: what every process must learn.")
    topic_rates: TopicName = Field(
        "freshrank.rates.v1",
        description="Events and freshness by partition and second, kept for an hour; its windows in <name>-windows.",
    )
    log_base: str = Field(
        "",
        pattern=r"^([0-9a-f]{32})?$",
        description="Base that the state stands on, as `freshrank bootstrap` printed it.",
    )
    partitions: PositiveInt = Field(4, description="Partitions of the actions and rankings topics when they are created.")
    replication_factor: PositiveInt = Field(1, description="Replicas of topics when they are created; 3 on a production cluster.")
    retention_ms: int = Field(-1, ge=-1, description="How long created topics keep actions and rankings; -1: for ever.")

    erasure_deadline_days: PositiveFloat = Field(30.0, description="The promise: nothing of an erased user is anywhere after this time.")
    erasure_strict: bool = Field(False, description="A worker does not start while a topic keeps records longer than the promise.")
    erasure_service: bool = Field(False, description="The reader also serves freshrank.v1.Erasure; set server_token with it.")
    erasure_archives: list[str] = Field([], description="Archives outside of the home folder that the erasure job rewrites; JSON.")

    triton_url: Address = Field("", description="host:port of an outside Triton's gRPC service; empty: the local stack starts one.")
    torch_threads: PositiveInt = Field(1, description="CPU threads of each model instance and of training.")
    model_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where models in Triton compute; auto: on a GPU if it has one."
    )

    tls_certificate: Path | None = Field(None, description="PEM certificate chain of the servers; with tls_key they serve TLS.")
    tls_authority: Path | None = Field(None, description="PEM certificate of the authority that commands trust when they call the server.")
    tls_key: Path | None = Field(None, validate_default=True, description="PEM private key of tls_certificate.")
    server_token: SecretStr | None = Field(
        None, description="Bearer token that every ranking and sequence call must carry; none: calls are open."
    )
    server_host: str = Field("127.0.0.1", validate_default=True, description="Address the ranking server binds; without TLS only loopback.")
    server_port: Port = Field(0, description="Port of the ranking server.")
    server_processes: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Processes that rank at one port; the kernel shares connections between them, so clients need several channels."
    )
    server_drain_s: PositiveFloat = Field(5.0, description="How long a server that is told to stop lets rankings under way end.")
    server_leave_s: float = Field(
        0.5,
        ge=0,
        le=60,
        description="How long it still takes calls before that, while health says NOT_SERVING: a probe's period or more.",
    )
    server_connection_age_s: float = Field(
        120.0, ge=0, description="With several processes: age at which a connection moves to any of them, with no call lost; 0: none."
    )
    server_address: Address = Field("", description="host:port of the ranking server that commands call; empty: the local stack's.")
    reader_host: str = Field(
        "127.0.0.1", validate_default=True, description="Address the sequence reader binds; without TLS only loopback."
    )
    reader_port: Port = Field(0, description="Port of the sequence reader.")
    reader_calls_max: PositiveInt = Field(256, description="Calls that the sequence reader answers at once; more get RESOURCE_EXHAUSTED.")
    reader_watches_max: PositiveInt = Field(64, description="Watches of the sequence reader at once; they count as calls, too.")
    reader_advertised_address: Address = Field(
        "", description="host:port of this home's reader as other machines reach it: the worker announces it. Empty: not announced."
    )
    sequence_fresh_ms: PositiveInt = Field(
        2_000, description="A state that included the log's end this long ago is up to date; else the server asks the announced owner."
    )
    reflection: bool = Field(
        False, description="gRPC reflection, for tools such as grpcurl; a local stack on loopback has it on unless it is set."
    )

    rank_timeout_ms: PositiveInt = Field(500, description="Time for a ranking whose caller set no deadline.")
    rank_deadline_ms_max: PositiveInt = Field(10_000, description="Longest deadline that a caller may set; a longer one counts as this.")
    after_wait_ms_max: PositiveInt = Field(2_000, description="Longest wait for the positions of `after`; then the answer is flagged.")
    rankings_max: PositiveInt = Field(64, description="Most rankings in work at once in a process; the limit adapts below it.")
    rankings_waiting_max: PositiveInt = Field(256, description="Most rankings that wait for a place; more get RESOURCE_EXHAUSTED at once.")
    model_batch_requests_max: PositiveInt = Field(8, description="Most requests that a model in Triton answers at once.")
    model_batch_delay_us: int = Field(0, ge=0, description="How long Triton waits for more requests of a batch, microseconds.")
    message_bytes_max: PositiveInt = Field(1 << 20, description="Largest request that the ranking server accepts, in bytes.")
    ranking_log_queue_max: PositiveInt = Field(10_000, description="Ranking records that wait for Kafka; more are dropped and counted.")
    inline_share: float = Field(0.01, ge=0, le=1, description="Share of users, by hash, whose packed bytes are logged inline.")

    worker_instance: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = Field(
        "worker-0", description="Name of this worker in its group, the same after each restart; every worker needs its own."
    )
    worker_standby: bool = Field(
        False, description="Also follow the partitions that other workers own, to take over at once; needs a home folder of its own."
    )
    worker_session_timeout_ms: PositiveInt = Field(
        10_000, description="A worker that is silent for this long loses its partitions; the broker sets the least (6 s by default)."
    )
    offset_below_retention: Literal["fail", "earliest", "latest"] = Field(
        "fail", description="Where retention removed records that the state waits for: stop, or start over at the log's start or end."
    )
    snapshot_url: str = Field("", description="Where snapshots of the state go: a folder, s3://bucket/path, any fsspec URL; empty: none.")
    snapshot_options: SecretStr = Field(
        SecretStr("{}"), validate_default=True, description="Options and credentials of that file system, as a JSON object; never logged."
    )
    snapshot_every_s: PositiveFloat = Field(600.0, description="Time between two snapshots of a partition.")
    snapshot_keep: PositiveInt = Field(3, description="Snapshots of a partition that stay; younger ones than an hour stay, too.")
    worker_batch_events_max: PositiveInt = Field(80_000, description="Most records that the worker takes at once when it is behind.")
    worker_queue_mb: Annotated[int, Field(ge=4, le=2047)] = Field(
        64, description="Most records, in MB, that the worker fetches ahead of a slow disk; as much again of dead letters may wait."
    )
    serving_slice_ms: float = Field(
        0.5, ge=0, le=100, description="CPU time slice of the reader and the ranking server, longer than a read; 0: the kernel's own."
    )
    rocksdb_cache_mb: PositiveInt = Field(256, description="Block cache, shared by all partitions of a worker.")
    rocksdb_direct_reads: bool = Field(
        False, description="RocksDB reads and writes its files beside the page cache, and batches take old rows from it, not from the view."
    )
    rocksdb_write_buffer_mb: PositiveInt = Field(128, description="Write buffers, shared by all partitions of a worker.")
    view_map_mb: PositiveInt = Field(4096, description="Largest size of the view that readers map; it takes what it needs.")

    server_web_port: Port = Field(0, description="Port of the ranking server's pages /live/, /ready/ and /metrics, on server_host.")
    reader_web_host: str = Field(
        "127.0.0.1", description="Address of the sequence reader's pages /live/, /ready/ and /metrics: plain HTTP, no user in it."
    )
    reader_web_port: Port = Field(0, description="Port of the sequence reader's pages.")
    worker_web_host: str = Field(
        "127.0.0.1", description="Address of the worker's pages /live/, /ready/, /health/, /rates/ and /metrics: plain HTTP, no user in it."
    )
    worker_web_port: Port = Field(0, description="Port of the worker's pages.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines of worker, reader, server and HTTP door.")
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="URL that spans are posted to as OTLP/HTTP, such as http://collector:4318/v1/traces; empty: no traces.",
    )
    trace_share: float = Field(0.0, ge=0, le=1, description="Share traced of the calls without a traceparent; one that has it decides.")
    slow_ms: float = Field(0.0, ge=0, description="A ranking that takes longer writes a log line with its stages; 0: none does.")
    http_host: str = Field("127.0.0.1", validate_default=True, description="Address the HTTP door binds; without TLS only loopback.")
    http_port: Port = Field(0, description="Port of the HTTP door.")
    http_body_bytes_max: PositiveInt = Field(1 << 20, description="Largest body that the HTTP door reads, in bytes.")
    http_channels: PositiveInt = Field(4, description="Connections of the HTTP door to the ranking servers behind server_address.")
    auth_issuer: str = Field("", description="What the claim `iss` of JSON Web Tokens must be; needed with auth_jwks.")
    auth_audience: str = Field("", description="What the claim `aud` of JSON Web Tokens must include; needed with auth_jwks.")
    auth_jwks: Path | None = Field(
        None,
        description="JWKS file of the public keys that sign callers' JSON Web Tokens (RS256, ES256, EdDSA); read again when it changes.",
    )
    admin_methods: bool = Field(False, description="Methods that need the permission `admin` can be called at all.")
    tls_client_authority: Path | None = Field(
        None, description="PEM certificates that sign clients' certificates; with it the servers refuse clients without one."
    )
    tls_client_certificate: Path | None = Field(None, description="PEM certificate that commands present when they call the server.")
    tls_client_key: Path | None = Field(None, description="PEM private key of tls_client_certificate.")
    calls_per_client_max: PositiveInt = Field(
        256, description="Calls of one caller (by token, else by address) at once, in each server process; more get RESOURCE_EXHAUSTED."
    )
    metadata_bytes_max: Annotated[int, Field(ge=1_024, le=1 << 20)] = Field(
        16 << 10, description="Most bytes of a call's metadata, its token among them; more are refused with RESOURCE_EXHAUSTED."
    )

    @field_validator("auth_jwks", "tls_client_authority", "tls_client_key")
    @classmethod
    def _needs(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        needed = {
            "auth_jwks": ("auth_issuer", "auth_audience"),
            "tls_client_authority": ("tls_certificate",),
            "tls_client_key": ("tls_client_certificate",),
        }
        missing = [name for name in needed[str(info.field_name)] if name in info.data and not info.data[name]]
        if value is not None and missing:
            raise ValueError(f"needs {' and '.join(missing)} to be set, too")
        return value

    @field_validator("tls_key")
    @classmethod
    def _both_or_neither(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_certificate" in info.data and (value is None) != (info.data["tls_certificate"] is None):
            raise ValueError("tls_certificate and tls_key belong together: set both or neither")
        return value

    @field_validator("snapshot_options")
    @classmethod
    def _json_object(cls, value: SecretStr) -> SecretStr:
        try:
            found = json.loads(value.get_secret_value())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError("must be a JSON object in a string")  # noqa: TRY004
        return value

    @field_validator("server_host", "reader_host", "http_host")
    @classmethod
    def _open_only_with_tls(cls, value: str, info: ValidationInfo) -> str:
        if "tls_key" in info.data and info.data["tls_key"] is None and not is_loopback(value):
            raise ValueError(f"{value} is not a loopback address: set tls_certificate and tls_key, or bind 127.0.0.1")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Argument, environment, file: in this order."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_path())

    def as_environment(self) -> dict[str, str]:
        """The same settings as variables for a child process, paths made absolute; secrets are in clear. Unset ones are absent."""
        variables = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            elif isinstance(value, Path):
                value = str(value.absolute())
            if value is not None:
                variables[f"{ENVIRONMENT_PREFIX}{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
        return variables


def config_path() -> Path:
    """The TOML file that settings are read from; the default one may be absent."""
    return Path(os.environ.get(CONFIG_VARIABLE) or "freshrank.toml")


def load_settings(**arguments: Any) -> Settings:
    """Settings from all sources; an argument that is None counts as not given.

    Raises:
        SettingsError: naming each wrong setting, its source and what is allowed.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    path = config_path()
    known = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    unknown = sorted(name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    if unknown:
        raise SettingsError(f"variable {unknown[0]}: is no setting of freshrank; see deploy/settings.py for their names")
    if os.environ.get(CONFIG_VARIABLE) and not path.is_file():
        raise SettingsError(f"{CONFIG_VARIABLE} names {path}, which is no file")
    try:
        return Settings(**given)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: {error}") from error
    except ValidationError as error:
        lines = [_explain(str(".".join(map(str, part["loc"]))), part["msg"], given, path) for part in error.errors(include_input=False)]
        raise SettingsError("\n".join(lines)) from error
    except ValueError as error:  # pydantic-settings' own: a variable that should hold JSON does not
        raise SettingsError(f"{error}: a variable {ENVIRONMENT_PREFIX}* of this setting must hold JSON") from error


def _explain(setting: str, message: str, given: dict[str, Any], path: Path) -> str:
    name = setting.split(".")[0]
    if name in given:
        source = "argument"
    elif f"{ENVIRONMENT_PREFIX}{name.upper()}" in os.environ:
        source = f"variable {ENVIRONMENT_PREFIX}{name.upper()}"
    elif path.is_file() and name in tomllib.loads(path.read_text(encoding="utf-8")):
        source = str(path)
    else:
        source = "default"
    text = "is no setting of freshrank" if message.startswith("Extra inputs") else message.removeprefix("Value error, ")
    return f"setting {setting} (from {source}): {text}"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""Settings: which source wins, that a child gets the same ones, and that an error names setting and source."""

import os
from pathlib import Path

import pytest

from deploy.settings import SettingsError, load_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables and no file of the machine that runs the test."""
    for name in [name for name in os.environ if name.startswith("FRESHRANK_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_argument_beats_variable_beats_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("freshrank.toml").write_text("partitions = 5\nrankings_max = 6\nrank_timeout_ms = 7\n")
    monkeypatch.setenv("FRESHRANK_PARTITIONS", "50")
    monkeypatch.setenv("FRESHRANK_RANKINGS_MAX", "60")
    settings = load_settings(partitions=500, home=None)
    assert (settings.partitions, settings.rankings_max, settings.rank_timeout_ms) == (500, 60, 7)
    assert settings.home == Path(".freshrank")


def test_a_child_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_settings(
        home=Path("here"),
        kafka_properties={"sasl.password": 'a"b'},
        server_token="secret",
        inline_share=0.5,
        reflection=False,
        partitions=3,
    )
    assert "secret" not in repr(given)
    for name, value in given.as_environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == given.model_copy(
        update={"home": Path("here").absolute(), "domain": given.domain.absolute(), "data": given.data.absolute()}
    )


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PARTITIONS", "none", "partitions .from variable FRESHRANK_PARTITIONS.: .*integer"),
        ("KAFKA_PROPERTIES", "a=b", "kafka_properties.*JSON"),
        ("KAFKA_PROPERTIES", '{"a": []}', "kafka_properties.a .from variable FRESHRANK_KAFKA_PROPERTIES"),
        ("SERVER_HOST", "0.0.0.0", "server_host .*tls_certificate"),
        ("READER_HOST", "0.0.0.0", "reader_host .*tls_certificate"),
        ("TLS_KEY", "key.pem", "tls_key .*both or neither"),
        ("TLS_CLIENT_AUTHORITY", "a.pem", "tls_client_authority .*tls_certificate"),
        ("TLS_CLIENT_KEY", "k.pem", "tls_client_key .*tls_client_certificate"),
        ("AUTH_JWKS", "jwks.json", "auth_jwks .*auth_issuer and auth_audience"),
        ("CALLS_PER_CLIENT_MAX", "0", "calls_per_client_max"),
        ("TRITON_URL", "nohost", "triton_url .*host:port"),
        ("TOPIC_ACTIONS", "a b", "topic_actions .from variable"),
        ("CONFIG", "absent.toml", "absent.toml"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(f"FRESHRANK_{name}", value)
    with pytest.raises(SettingsError, match=says):
        load_settings()


def test_a_wrong_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.toml").write_text("partitionz = 3\nrank_timeout_ms = 0\n")
    monkeypatch.setenv("FRESHRANK_CONFIG", "mine.toml")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "setting partitionz (from mine.toml): is no setting" in str(caught.value)
    assert "setting rank_timeout_ms (from mine.toml)" in str(caught.value)


def test_nothing_is_open_that_was_not_opened() -> None:
    settings = load_settings()
    assert (settings.reflection, settings.admin_methods, settings.erasure_service) == (False, False, False)
    assert {settings.server_host, settings.reader_host} == {"127.0.0.1"}


def test_tls_opens_the_servers_to_the_network() -> None:
    settings = load_settings(server_host="0.0.0.0", reader_host="::", tls_certificate=Path("c.pem"), tls_key=Path("k.pem"))
    assert (settings.server_host, settings.reader_host) == ("0.0.0.0", "::")

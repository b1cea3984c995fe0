"""The guard: the table of methods, static tokens, JSON Web Tokens, their cache and their keys."""

import base64
import hmac
import importlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey

from deploy import guard as guard_module
from deploy.guard import ADMIN, ALGORITHMS, ERASE, OPEN, PERMISSIONS, RANK, KeyFile, Tokens
from deploy.settings import SettingsError
from features.ports import ForbiddenError, UnauthenticatedError

RANK_METHOD, ERASE_METHOD, HEALTH = "/freshrank.v1.Ranking/Rank", "/freshrank.v1.Erasure/Erase", "/grpc.health.v1.Health/Check"
NOW_S = 1_700_000_000
KEYS = {
    "ES256": ECKey.generate_key("P-256", {"kid": "ec"}, True),
    "RS256": RSAKey.generate_key(2048, {"kid": "rsa"}, True),
    "EdDSA": OKPKey.generate_key("Ed25519", {"kid": "ed"}, True),
}
pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # what signs here warns; the guard must not


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def signed(key=KEYS["ES256"], algorithm="ES256", **changes) -> str:
    claims = {"sub": "feed", "iss": "issuer", "aud": ["freshrank"], "exp": NOW_S + 60, "scope": "rank explain"} | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode({"alg": algorithm, "kid": key.kid}, claims, key, algorithms=[*ALGORITHMS, "HS256"])


def write_keys(path: Path, *keys) -> Path:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"keys": [key.as_dict(private=False) for key in keys]}))
    os.replace(fresh, path)  # noqa: PTH105
    return path


def bearer(token: str) -> list[tuple[str, str]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path / "jwks.json", *KEYS.values())


@pytest.fixture
def world(keys):
    """(guard, its clock, its keys' clock, the keys' file)."""
    clock, looks = Clock(NOW_S), Clock(0.0)
    return Tokens("static", KeyFile(keys, clock_s=looks), "issuer", "freshrank", clock_s=clock, cache_max=3), clock, looks, keys


def test_every_method_of_every_service_has_a_permission():
    names = [path.stem for path in (Path(__file__).parents[2] / "protos" / "v1").glob("*_pb2.py")]
    files = [importlib.import_module(f"protos.v1.{name}").DESCRIPTOR for name in names]
    methods = {
        f"/{service.full_name}/{method.name}" for file in files for service in file.services_by_name.values() for method in service.methods
    }
    assert RANK_METHOD in methods
    assert methods <= set(PERMISSIONS)
    assert {name for name, permission in PERMISSIONS.items() if permission == OPEN} == {HEALTH, "/grpc.health.v1.Health/Watch"}


def test_a_method_that_is_not_in_the_table_is_denied_to_everybody():
    for guard in (Tokens(), Tokens("static")):
        with pytest.raises(ForbiddenError, match=r"/a\.B/C"):
            guard.check("/a.B/C", bearer("static"))


def test_without_a_secret_calls_are_open_and_with_one_they_need_it():
    assert Tokens().check(RANK_METHOD, None).permissions >= {RANK, ERASE}
    guard = Tokens("static")
    assert guard.check(RANK_METHOD, bearer("static")).name == ""
    assert guard.check(RANK_METHOD, [("authorization", "bearer static")]).name == ""  # the scheme's case does not matter
    assert guard.check(HEALTH, None).permissions == set()
    bad = [None, [], bearer("other"), bearer(""), bearer("static "), [("authorization", "static")], bearer("static") * 2, bearer("sötatic")]
    for metadata in bad:
        with pytest.raises(UnauthenticatedError, match=r"^authorization: "):
            guard.check(RANK_METHOD, metadata)


def test_admin_methods_are_off_unless_they_are_enabled():
    table = {"/a.B/C": ADMIN}
    with pytest.raises(ForbiddenError, match="admin_methods"):
        Tokens("static", permissions=table).check("/a.B/C", bearer("static"))
    Tokens("static", permissions=table, admin=True).check("/a.B/C", bearer("static"))


@pytest.mark.parametrize("algorithm", sorted(KEYS))
def test_a_token_carries_permissions(world, algorithm):
    guard = world[0]
    caller = guard.check(RANK_METHOD, bearer(signed(KEYS[algorithm], algorithm)))
    assert (caller.name, caller.permissions) == ("feed", {"rank", "explain"})
    listed = signed(KEYS[algorithm], algorithm, scope=None, permissions=["erase", "paint", 7])
    assert guard.check(ERASE_METHOD, bearer(listed)).permissions == {"erase"}
    with pytest.raises(ForbiddenError, match="'rank'"):
        guard.check(RANK_METHOD, bearer(listed))
    assert guard.check(RANK_METHOD, bearer("static")).name == ""


PUBLIC_PEM = KEYS["RS256"].as_bytes(encoding="PEM", private=False)


def encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


HEADER = encoded(b'{"alg":"none","kid":"ec"}').decode()


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (signed(exp=NOW_S), "expired"),
        (signed(exp=NOW_S - 3600), "expired"),
        (signed(exp=None), "not valid"),
        (signed(exp="soon"), "not valid"),
        (signed(exp=float("inf")), "not valid|expired"),
        (signed(iss="other"), "not valid"),
        (signed(iss=None), "not valid"),
        (signed(aud="other"), "not valid"),
        (signed(aud=None), "not valid"),
        (signed(sub=None), "not valid"),
        (signed(sub=""), "not valid"),
        (signed(sub=["feed"]), "not valid"),
        (signed(scope=["rank"]), "not valid"),
        (signed(nbf=NOW_S + 60), "not valid"),
        (signed(ECKey.generate_key("P-256", {"kid": "ec"}, True)), "not valid"),
        (signed(ECKey.generate_key("P-256", {"kid": "elsewhere"}, True)), "not valid"),
        (signed()[:-4] + "AAAA", "not valid"),
        (HEADER + "." + signed().split(".")[1] + ".", "not valid"),
        ("a.b.c", "not valid"),
    ],
)
def test_a_token_that_does_not_count_is_refused(world, token, says):
    with pytest.raises(UnauthenticatedError, match=f"^authorization: the token.*({says})"):
        world[0].check(RANK_METHOD, bearer(token))
    assert world[0].statistics()["verified"] == 0


def test_a_public_key_is_no_shared_secret(world):
    """The old confusion: a token that claims HS256, signed with the bytes of the public key."""
    header, claims = {"alg": "HS256", "kid": "rsa"}, {"sub": "feed", "iss": "issuer", "aud": "freshrank", "exp": NOW_S + 60}
    text = b".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
    signature = encoded(hmac.digest(PUBLIC_PEM, text, "sha256"))
    with pytest.raises(UnauthenticatedError, match="not valid"):
        world[0].check(RANK_METHOD, bearer((text + b"." + signature).decode()))


def test_a_clock_slightly_behind_the_issuers_refuses_nothing(world):
    world[0].check(RANK_METHOD, bearer(signed(iat=NOW_S + 3, nbf=NOW_S + 3)))


def test_a_verified_token_is_kept_until_it_expires_and_no_longer(world):
    guard, clock, _, _ = world
    token = signed(exp=NOW_S + 60)
    for _ in range(5):
        guard.check(RANK_METHOD, bearer(token))
    assert (guard.statistics()["verified"], guard.statistics()["cached"]) == (1, 1)
    clock.now_s = NOW_S + 59.9
    guard.check(RANK_METHOD, bearer(token))
    clock.now_s = NOW_S + 60.0
    with pytest.raises(UnauthenticatedError, match="expired"):
        guard.check(RANK_METHOD, bearer(token))
    assert (guard.statistics()["verified"], guard.statistics()["cached"]) == (1, 0)


def test_the_tokens_that_are_kept_are_bounded(world):
    guard = world[0]
    tokens = [signed(sub=str(i)) for i in range(5)]
    for token in tokens:
        guard.check(RANK_METHOD, bearer(token))
    assert guard.statistics()["cached"] == 3
    guard.check(RANK_METHOD, bearer(tokens[-1]))
    assert guard.statistics()["verified"] == 5
    guard.check(RANK_METHOD, bearer(tokens[0]))
    assert guard.statistics()["verified"] == 6


def test_a_key_that_was_taken_back_counts_no_more_also_for_known_tokens(world):
    guard, _, looks, path = world
    token = signed()
    guard.check(RANK_METHOD, bearer(token))
    write_keys(path, KEYS["RS256"])
    guard.check(RANK_METHOD, bearer(token))  # the file is looked at once a second
    looks.now_s += 1
    with pytest.raises(UnauthenticatedError, match="not valid"):
        guard.check(RANK_METHOD, bearer(token))
    guard.check(RANK_METHOD, bearer(signed(KEYS["RS256"], "RS256")))


def test_an_unknown_key_is_looked_for_at_once_but_not_for_ever(world, monkeypatch):
    guard, _, looks, path = world
    reads = []
    read = guard_module._public_keys
    monkeypatch.setattr(guard_module, "_public_keys", lambda path: reads.append(path) or read(path))
    guard.check(RANK_METHOD, bearer(signed()))  # the file was looked at just now
    fresh = ECKey.generate_key("P-256", {"kid": "fresh"}, True)
    write_keys(path, fresh)
    guard.check(RANK_METHOD, bearer(signed(fresh)))
    assert len(reads) == 1
    stranger = ECKey.generate_key("P-256", {"kid": "stranger"}, True)
    for _ in range(50):
        with pytest.raises(UnauthenticatedError):
            guard.check(RANK_METHOD, bearer(signed(stranger)))
    assert len(reads) == 1
    looks.now_s += 1
    with pytest.raises(UnauthenticatedError):
        guard.check(RANK_METHOD, bearer(signed(stranger)))
    assert len(reads) == 2


def test_a_damaged_file_leaves_the_keys_from_before_in_use(world, caplog):
    guard, _, looks, path = world
    for content in (
        "{",
        '{"keys": []}',
        '{"keys": [{"kty": "oct", "k": "AAAA"}]}',
        json.dumps({"keys": [KEYS["ES256"].as_dict(private=True)]}),
    ):
        path.write_text(content)
        looks.now_s += 1
        guard.check(RANK_METHOD, bearer(signed(sub=str(looks.now_s))))
    path.unlink()
    looks.now_s += 1
    guard.check(RANK_METHOD, bearer(signed()))
    assert caplog.text.count("the keys from before stay in use") == 5
    assert KEYS["ES256"].as_dict(private=True)["d"] not in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "jwks.json"),
        ("[]", "keys"),
        ('{"keys": []}', "keys"),
        ('{"keys": [{"kty": "oct", "k": "AAAA"}]}', r"keys\[0\].kty"),
        (json.dumps({"keys": [KEYS["EdDSA"].as_dict(private=True)]}), r"keys\[0\].d"),
        (json.dumps({"keys": [KEYS["EdDSA"].as_dict(private=False)] * 2}), "same kid"),
        (json.dumps({"keys": [ECKey.generate_key("P-384", {"kid": "big"}, True).as_dict(private=False)]}), r"keys\[0\].crv"),
        (json.dumps({"keys": [OKPKey.generate_key("X25519", {"kid": "x"}, True).as_dict(private=False)]}), r"keys\[0\].crv"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_start(tmp_path, content, says):
    (tmp_path / "jwks.json").write_text(content)
    with pytest.raises(SettingsError, match=f"auth_jwks.*{says}"):
        KeyFile(tmp_path / "jwks.json")


def test_keys_need_an_issuer_and_an_audience(keys):
    with pytest.raises(SettingsError, match="auth_issuer and auth_audience"):
        Tokens(None, KeyFile(keys), "issuer", "")


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_is_more_than_unauthenticated(world, text, seed):
    token = signed()
    at = seed % len(token)
    for given_ in (text, token[:at] + text + token[at:], token[:at] + text, ".".join((token.split(".")[0], text, text))):
        if given_ != token:
            with pytest.raises(UnauthenticatedError):
                world[0].check(RANK_METHOD, bearer(given_))

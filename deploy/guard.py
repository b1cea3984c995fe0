"""Who may call what: the one table of methods and permissions, and the bearer tokens that carry permissions.

Two kinds of token are known. A static one (`server_token`) has every permission. A JSON Web Token, signed by a key of `auth_jwks`, has
those of its claims `scope` (texts between spaces) and `permissions` (a list). Without either setting calls are open.
"""

import copy
import hmac
import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.errors import ExpiredTokenError, InvalidKeyIdError, JoseError
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from deploy.settings import SettingsError
from features.ports import Caller, ForbiddenError, UnauthenticatedError

log = logging.getLogger(__name__)

OPEN, RANK, EXPLAIN, PRODUCE, READ_SEQUENCES = "", "rank", "explain", "produce", "read_sequences"
ERASE, REFLECT, ADMIN = "erase", "reflect", "admin"
HTTP_ACTIONS = "POST /v1/actions"
PERMISSIONS: Mapping[str, str] = {
    "/freshrank.v1.Ranking/Rank": RANK,
    "/freshrank.v1.Ranking/Explain": EXPLAIN,
    HTTP_ACTIONS: PRODUCE,
    "/freshrank.v1.SequenceReader/GetSequences": READ_SEQUENCES,
    "/freshrank.v1.SequenceReader/GetPosition": READ_SEQUENCES,
    "/freshrank.v1.SequenceReader/Watch": READ_SEQUENCES,
    "/freshrank.v1.Erasure/Erase": ERASE,
    "/freshrank.v1.Erasure/Status": ERASE,
    "/grpc.health.v1.Health/Check": OPEN,
    "/grpc.health.v1.Health/Watch": OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": REFLECT,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": REFLECT,
}
"""Full name of each gRPC method, and of what the HTTP door does itself, and the permission that it needs; OPEN needs no token. What is not
here is denied to everybody."""

ALGORITHMS = ("RS256", "ES256", "EdDSA", "Ed25519")
CLOCK_SKEW_S = 10
"""How far an issuer's clock may be ahead: for `iat` and `nbf`. `exp` is exact."""
LOOK_EVERY_S = 1.0
_NAME_CHARACTERS_MAX = 200
_EVERYTHING = frozenset(PERMISSIONS.values()) | {RANK, EXPLAIN, PRODUCE, READ_SEQUENCES, ERASE, REFLECT, ADMIN}
_ANYBODY, _NOBODY = Caller("", _EVERYTHING), Caller("", frozenset())


class _Registry(JWSRegistry):
    """joserfc's algorithms, of which "EdDSA" warns that RFC 9864 renamed it: issuers sign with that name still. The key says the curve."""

    algorithms = {**JWSRegistry.algorithms, "EdDSA": copy.copy(JWSRegistry.algorithms["EdDSA"])}  # noqa: RUF012  # as in its base


_Registry.algorithms["EdDSA"].security_warning = None


class KeyFile:
    """Public keys of a JWKS file, read again when the file changes, or when a token names a key that is not there.

    The file is looked at once in LOOK_EVERY_S at most, and once more for unknown keys, however many tokens ask for them. A file that cannot
    be used leaves the keys from before in use.
    """

    def __init__(self, path: Path, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError: the file cannot be used."""
        self._path, self._clock_s = path, clock_s
        self._looked_s = self._missed_s = -math.inf
        self._identity: tuple[int, ...] | None = None
        self.version = 0
        """Counts what was read: tokens that keys of an older version signed are to be checked again."""
        try:
            self._identity = self._look()
            self._keys = _public_keys(path)
        except (OSError, ValueError) as error:
            raise SettingsError(f"auth_jwks: {path}: {error}") from error

    def follow(self) -> None:
        """Reads the file again if it has changed."""
        if (now_s := self._clock_s()) - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            self._read(anyhow=False)

    def find(self, kid: str | None) -> Any:
        """The key of this name; without a name the only one that there is. Raises InvalidKeyIdError."""
        try:
            return self._keys.get_by_kid(kid)
        except InvalidKeyIdError:
            if (now_s := self._clock_s()) - self._missed_s < LOOK_EVERY_S:
                raise
            self._missed_s = now_s
        self._read(anyhow=True)
        return self._keys.get_by_kid(kid)

    def _look(self) -> tuple[int, ...]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self, *, anyhow: bool) -> None:
        try:
            identity = self._look()
            if identity == self._identity and not anyhow:
                return
            keys = _public_keys(self._path)
        except (OSError, ValueError) as error:
            log.error("auth_jwks: %s cannot be used, the keys from before stay in use: %s", self._path, error)  # noqa: TRY400
            return
        self._identity = identity
        if keys.as_dict() != self._keys.as_dict():
            self._keys = keys
            self.version += 1


class Tokens:
    """The `features.ports.Guard` of every service. May be shared between threads.

    Args:
        token: the static token; None: there is none.
        keys: the keys that sign JSON Web Tokens; None: there are none.
        issuer, audience: what `iss` must be and `aud` must include; needed with `keys`.
        admin: whether methods of permission "admin" are on at all.
        permissions: method to permission.
        clock_s: seconds since 1970-01-01 UTC.
        cache_max: verified tokens that are kept, at most until they expire: a signature check takes hundreds of microseconds.
    """

    def __init__(
        self,
        token: str | None = None,
        keys: KeyFile | None = None,
        issuer: str = "",
        audience: str = "",
        *,
        admin: bool = False,
        permissions: Mapping[str, str] = PERMISSIONS,
        clock_s: Callable[[], float] = time.time,
        cache_max: int = 4096,
    ) -> None:
        if keys is not None and not (issuer and audience):
            raise SettingsError("auth_jwks: needs auth_issuer and auth_audience, else tokens for other services would count here")
        self._token = None if token is None else token.encode()
        self._keys, self._admin, self._permissions, self._clock_s = keys, admin, permissions, clock_s
        claims: dict[str, Any] = {"iss": {"essential": True, "value": issuer}, "aud": {"essential": True, "value": audience}}
        claims |= {"exp": {"essential": True}, "sub": {"essential": True}}
        self._claims = jwt.JWTClaimsRegistry(now=lambda: int(clock_s()), leeway=CLOCK_SKEW_S, **claims)
        self._registry = _Registry(algorithms=ALGORITHMS)
        self._verified: OrderedDict[str, tuple[Caller, float]] = OrderedDict()
        self._cache_max, self._version, self._lock = cache_max, 0, threading.Lock()
        self._verified_count = 0

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        """See `features.ports.Guard`."""
        permission = self._permissions.get(method)
        if permission is None:
            raise ForbiddenError(f"{method}: nobody may call this method here")
        if permission == OPEN:
            return _NOBODY
        if permission == ADMIN and not self._admin:
            raise ForbiddenError(f"{method}: admin methods are off here; set admin_methods")
        caller = self._caller(metadata)
        if permission not in caller.permissions:
            raise ForbiddenError(f"{method}: the caller has not the permission {permission!r}")
        return caller

    def statistics(self) -> dict[str, float]:
        """verified: signatures checked and good, since the start; cached: tokens kept now."""
        return {"verified": self._verified_count, "cached": len(self._verified)}

    def _caller(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        if self._token is None and self._keys is None:
            return _ANYBODY
        given = [str(value) for name, value in metadata or () if name == "authorization"]
        if len(given) != 1:
            raise _refusal("this server needs one bearer token")
        kind, _, token = given[0].partition(" ")
        if kind.lower() != "bearer":
            raise _refusal("this server needs a bearer token")
        if self._token is not None and hmac.compare_digest(token.encode("utf-8", "replace"), self._token):
            return _ANYBODY
        if self._keys is None:
            raise _refusal("the token is not valid")
        return self._known(token) or self._verify(token, self._keys)

    def _known(self, token: str) -> Caller | None:
        """The caller whose token was verified before, by keys that still count, and has not expired."""
        assert self._keys is not None
        self._keys.follow()
        with self._lock:
            if self._version != self._keys.version:
                self._version = self._keys.version
                self._verified.clear()
            found = self._verified.get(token)
            if found is None:
                return None
            if self._clock_s() >= found[1]:
                del self._verified[token]
                return None
            self._verified.move_to_end(token)
            return found[0]

    def _verify(self, token: str, keys: KeyFile) -> Caller:
        version = keys.version
        try:
            claims = jwt.decode(token, lambda found: keys.find(found.headers().get("kid")), registry=self._registry).claims
            self._claims.validate(claims)
            expires_s = self._exact(float(claims["exp"]))
            caller = Caller(_name(claims["sub"]), _permissions(claims))
        except ExpiredTokenError:
            raise _refusal("the token has expired") from None
        except (JoseError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            log.debug("a token is not valid: %s", error)
            raise _refusal("the token is not valid") from None
        with self._lock:
            self._verified_count += 1
            # A token whose key was found by reading the file again is kept from its next check on.
            if version == keys.version == self._version:
                self._verified[token] = (caller, expires_s)
                if len(self._verified) > self._cache_max:
                    self._verified.popitem(last=False)
        return caller

    def _exact(self, expires_s: float) -> float:
        if not self._clock_s() < expires_s < math.inf:
            raise ExpiredTokenError("exp")
        return expires_s


def _refusal(reason: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"authorization: {reason}")


def _public_keys(path: Path) -> KeySet:
    """The keys of a JWKS file. Raises ValueError, naming the key: only public keys of the kinds that ALGORITHMS use may be there."""
    found = json.loads(path.read_text("utf-8"))
    listed: Any = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise ValueError('must be a JSON object with a list "keys"')  # noqa: TRY004
    for i, key in enumerate(listed):
        if not isinstance(key, dict) or key.get("kty") not in ("RSA", "EC", "OKP"):
            raise ValueError(f"keys[{i}].kty: must be RSA, EC or OKP; a shared secret cannot tell issuer and server apart")
        if "d" in key:
            raise ValueError(f"keys[{i}].d: this is a private key; put its public part here, and replace it: it may have been read")
    try:
        keys = KeySet.import_key_set({"keys": listed})
        for i, key in enumerate(keys):
            _check_strength(i, key)
    except JoseError as error:
        raise ValueError(f"keys: {error}") from error
    names = [key.kid for key in keys]
    if len(names) != len(set(names)):
        raise ValueError("keys: two have the same kid")
    return keys


def _check_strength(i: int, key: Any) -> None:
    if isinstance(key, RSAKey) and key.public_key.key_size < 2048:
        raise ValueError(f"keys[{i}].n: {key.public_key.key_size} bits; at least 2,048 are needed")
    if isinstance(key, ECKey) and key.curve_name != "P-256":
        raise ValueError(f"keys[{i}].crv: must be P-256, for ES256")
    if isinstance(key, OKPKey) and key.curve_name != "Ed25519":
        raise ValueError(f"keys[{i}].crv: must be Ed25519, for EdDSA")


def _name(subject: Any) -> str:
    if not isinstance(subject, str) or not 0 < len(subject) <= _NAME_CHARACTERS_MAX:
        raise ValueError(f"sub: must be a text of 1 to {_NAME_CHARACTERS_MAX} characters")
    return subject


def _permissions(claims: Mapping[str, Any]) -> frozenset[str]:
    scope, permissions = claims.get("scope", ""), claims.get("permissions", [])
    if not isinstance(scope, str) or not isinstance(permissions, list):
        raise TypeError("scope must be a text, permissions a list")
    return _EVERYTHING & {*scope.split(), *(name for name in permissions if isinstance(name, str))}

"""The Python client of the ranking service."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import grpc
import numpy as np
import numpy.typing as npt

from features.ids import U64, string_ids
from features.ports import Position
from inference.throttle import Throttle
from protos.v1.actions_pb2 import Position as WirePosition
from protos.v1.ranking_pb2 import Explanation, FeatureColumn, RankRequest, RankResponse, SequenceSource, Tier
from protos.v1.ranking_pb2_grpc import RankingStub

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""What a server says that is going or gone: CANCELLED to a call that reached it while it closed."""
GONE_PAUSE_S = 0.01
"""By then the other connections to that server know, too."""
RECONNECT_MS_MIN, RECONNECT_MS_MAX = 50, 2_000
"""gRPC's own wait before it connects again is 1 s to 2 min: longer than a call, than a restart."""
CHANNEL_CLOSED = "Channel closed!"
"""gRPC's details of a call whose client was closed: nothing to try again."""

Column = (
    npt.NDArray[np.floating]
    | Sequence[float]
    | Sequence[str]
    | Sequence[Sequence[str]]
    | Sequence[Sequence[float]]
    | Sequence[Mapping[str, float]]
)
"""Values of one feature: numbers (NaN: missing), category texts ("": missing), or a list of texts for each candidate."""


class RankError(RuntimeError):
    """The service refused or did not answer. `code` is the gRPC status, `message` names the field or what to do.

    retry_after_s: when the server asks to be tried again, seconds; None: it does not say.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code, self.message, self.retry_after_s = code, message, retry_after_s


@dataclass(frozen=True)
class Ranking:
    """One answer. Arrays are in the ranked order, best first.

    ids uint64 [C]; kinds uint8 [C]; scores float32 [C]; head_scores: float32 [C] by head, empty without the model; tier: "model",
    "embedding" or "caller_order"; sequence_age_ms: -1 where no action was used; watermark: of user_id and each further identity;
    sequence_source: "local", "owner", "older" or "none"; state_age_ms: -1 where it is not known; score_formula: that of the scores, empty:
    the weighted sum of heads; experiment: "" where none runs; arm: "" where the user is in none.
    """

    request_id: int
    ids: U64
    kinds: npt.NDArray[np.uint8]
    scores: npt.NDArray[np.float32]
    head_scores: dict[str, npt.NDArray[np.float32]]
    tier: str
    release_id: str
    generations: dict[str, str]
    watermark: tuple[Position, ...]
    sequence_age_ms: int
    sequence_count: int
    after_reached: bool
    cold_start: bool
    sequence_source: str = "local"
    state_age_ms: int = -1
    score_formula: str = ""
    experiment: str = ""
    arm: str = ""


class RequestFields(TypedDict, total=False):
    """The fields of `RankRequest` that a ranking may have. `kinds` is one number for all candidates, or one each."""

    kinds: int | Sequence[int]
    candidate_features: Mapping[str, Column]
    request_features: Mapping[str, float | str | Sequence[str] | Sequence[float] | Mapping[str, float]]
    head_weights: Mapping[str, float]
    score_formula: str
    request_time_ms: int
    after: Sequence[Position]
    identities: Sequence[int]
    request_id: int
    tier: str


def rank_request(ranker: str, user_id: int, candidates: Sequence[int] | U64, **fields: Unpack[RequestFields]) -> RankRequest:
    """A request on the wire."""
    request = RankRequest(
        ranker=ranker,
        user_id=user_id,
        candidate_ids=np.asarray(candidates, "<u8").tobytes(),
        candidate_features={name: feature_column(values) for name, values in fields.get("candidate_features", {}).items()},
        request_features={name: feature_column([value]) for name, value in fields.get("request_features", {}).items()},  # type: ignore[arg-type]
        head_weights=fields.get("head_weights"),
        score_formula=fields.get("score_formula", ""),
        request_time_ms=fields.get("request_time_ms", 0),
        after=[WirePosition(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset) for at in fields.get("after", ())],
        identities=fields.get("identities", ()),
        request_id=fields.get("request_id", 0),
        tier=Tier.Value(f"TIER_{fields['tier'].upper()}") if fields.get("tier") else 0,
    )
    kinds = fields.get("kinds", 0)
    if isinstance(kinds, int | np.integer):
        request.candidate_kind = int(kinds)
    else:
        request.candidate_kinds = bytes(kinds)
    return request


class Attempts:
    """The tries of one call, for either client: what is left of its time, what goes along, and whether a failure is tried again.

    UNAVAILABLE is, once and with time left: then the server has not begun the call, or ranks it twice, which changes nothing. So is
    CANCELLED, which a server that closes says, and a refusal at the server's door that says when to come back, as long as the throttle has
    retries left.
    """

    def __init__(self, timeout_s: float, metadata: Sequence[tuple[str, str]], throttle: Throttle | None) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._metadata, self._throttle = tuple(metadata), throttle
        self._unavailable: RankError | None = None
        self._refused = False
        self.was_shed = False
        """Whether the last try was refused at the server's door."""

    def options(self) -> dict[str, Any]:
        """Arguments of the next try. The second one waits for a connection: a server that restarts is there in a moment."""
        left_s = self._deadline_s - time.monotonic()
        return {"timeout": left_s, "metadata": self._metadata, "wait_for_ready": self._unavailable is not None}

    def failed(self, error: Any) -> float:
        """Takes a failed try (grpc.RpcError); returns how long to wait before the next one, seconds. Raises RankError: there is none."""
        code: grpc.StatusCode = error.code()
        if self._unavailable is not None and code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise self._unavailable from error  # says more: nobody was there
        found = RankError(code, error.details() or "", retry_after_s(error.trailing_metadata()))
        self.was_shed = code == grpc.StatusCode.RESOURCE_EXHAUSTED and found.retry_after_s is not None
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and self._may_come_back(found.retry_after_s):
            self._refused = True
            return found.retry_after_s or 0.0
        again = code in GONE and found.message != CHANNEL_CLOSED and time.monotonic() + GONE_PAUSE_S < self._deadline_s
        if self._unavailable is not None or not again:
            raise found from error
        self._unavailable = found
        return GONE_PAUSE_S

    def _may_come_back(self, wait_s: float | None) -> bool:
        if wait_s is None or self._refused or self._throttle is None or time.monotonic() + wait_s >= self._deadline_s:
            return False
        return self._throttle.may_retry()


class Connections:
    """What the sync and the asyncio client share: addresses, credentials, turns, and the place of a throttle.

    A channel has one connection, and servers that share a port by SO_REUSEPORT take connections, not calls: several channels reach several
    of them. gRPC would give channels with equal arguments one connection, so each has an argument of its own.
    """

    def __init__(
        self, address: str, timeout_s: float, credentials: grpc.ChannelCredentials | None, token: str | None, channels: int, throttled: bool
    ) -> None:
        if channels < 1:
            raise ValueError(f"channels: {channels} is not a number of connections; give 1 or more")
        self._address, self._timeout_s = address, timeout_s
        self._credentials = credentials
        self._token = token
        self._throttle = Throttle() if throttled else None
        self._turns = itertools.cycle(range(channels))
        reconnect = [("grpc.initial_reconnect_backoff_ms", RECONNECT_MS_MIN), ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX)]
        self._options = [[("freshrank.channel", turn), ("grpc.use_local_subchannel_pool", 1), *reconnect] for turn in range(channels)]

    def before_call(self) -> None:
        """Raises RankError(RESOURCE_EXHAUSTED) instead of asking a server that refuses most calls (`inference.throttle`)."""
        if self._throttle is not None and not self._throttle.allows():
            raise RankError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._address} refused most of the last calls: this one was not sent")

    def after_call(self, attempts: Attempts) -> None:
        """Called after each call, also where it was cancelled. A server that is gone, or a limit that is only this caller's, says nothing
        about whether the server has places: only its door's own refusal counts, which comes with a hint.
        """
        if self._throttle is not None and not attempts.was_shed:
            self._throttle.accepted()

    def _attempts(self, timeout_s: float | None, traceparent: str, token: str | None) -> Attempts:
        token = self._token if token is None else token
        metadata = [("authorization", f"Bearer {token}")] if token else []
        metadata += [("traceparent", traceparent)] if traceparent else []
        return Attempts(self._timeout_s if timeout_s is None else timeout_s, metadata, self._throttle)


class RankingClient(Connections):
    """Connections to the ranking servers at one address. Safe to share between threads; close it, or use it in `with`.

    `inference.async_client.AsyncRankingClient` is the same for asyncio.

    Args:
        address: "host:port".
        timeout_s: deadline of a call that states none.
        root_certificate: PEM file of the server's authority; without it the connection is not encrypted.
        certificate: PEM file of the client's own certificate chain, for a server that asks for one; with `key`.
        key: PEM file of its private key.
        token: sent as the bearer token of each call.
        channels: connections, used in turn: as many as servers share the address, or more.
        throttled: whether calls are held back that the server would only refuse, and refused ones tried again within measure.

    Raises:
        ValueError: no channel.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 1.0,
        root_certificate: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        token: str | None = None,
        channels: int = 1,
        throttled: bool = True,
    ) -> None:
        super().__init__(address, timeout_s, channel_credentials(root_certificate, certificate, key), token, channels, throttled)
        if self._credentials is None:
            self._channels = [grpc.insecure_channel(address, options) for options in self._options]
        else:
            self._channels = [grpc.secure_channel(address, self._credentials, options) for options in self._options]
        self._stubs = [RankingStub(channel) for channel in self._channels]

    def rank(
        self,
        ranker: str,
        user_id: int,
        candidates: Sequence[int] | U64,
        *,
        timeout_s: float | None = None,
        traceparent: str = "",
        **fields: Unpack[RequestFields],
    ) -> Ranking:
        """Ranks candidates for a user. `fields` are those of `RankRequest`; `traceparent`: the caller's W3C trace context.

        Raises:
            RankError: INVALID_ARGUMENT names the field; UNAVAILABLE was tried again once, where time was left.
        """
        return typed(self.call(rank_request(ranker, user_id, candidates, **fields), timeout_s=timeout_s, traceparent=traceparent))

    def call(
        self, request: RankRequest, *, timeout_s: float | None = None, traceparent: str = "", token: str | None = None
    ) -> RankResponse:
        """`rank` for a request that is there already. `token` stands in for the client's own. Raises as `rank`."""
        response: RankResponse = self._call("Rank", request, timeout_s, traceparent, token)
        return response

    def explain(self, request: RankRequest, *, timeout_s: float | None = None) -> Explanation:
        """What `call` would answer, and why (protos `Ranking.Explain`). Needs a permission of its own. Raises as `rank`."""
        explanation: Explanation = self._call("Explain", request, timeout_s, "", None)
        return explanation

    def _call(self, method: str, request: RankRequest, timeout_s: float | None, traceparent: str, token: str | None) -> Any:
        attempts = self._attempts(timeout_s, traceparent, token)
        self.before_call()
        try:
            while True:
                try:
                    response = getattr(self._stubs[next(self._turns)], method)(request, **attempts.options())
                except grpc.RpcError as error:
                    time.sleep(attempts.failed(error))
                else:
                    attempts.was_shed = False
                    return response
        finally:
            self.after_call(attempts)

    def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def channel_credentials(root_certificate: Path | None, certificate: Path | None, key: Path | None) -> grpc.ChannelCredentials | None:
    """TLS of a client, from PEM files; None: without. Raises ValueError: a certificate of the client's own needs the other two."""
    own = (certificate, key)
    if own != (None, None) and None in (root_certificate, *own):
        raise ValueError("certificate, key: give both, and root_certificate with them, or none")
    if root_certificate is None:
        return None
    chain, secret = (None if path is None else path.read_bytes() for path in own)
    return grpc.ssl_channel_credentials(root_certificate.read_bytes(), secret, chain)


def retry_after_s(metadata: Any) -> float | None:
    """When to try again, seconds, as the server says it in gRPC's own trailing `grpc-retry-pushback-ms`; None: it does not say."""
    text = dict(metadata or ()).get("grpc-retry-pushback-ms", "")
    return int(text) / 1e3 if str(text).isdecimal() else None


def feature_column(values: Column) -> FeatureColumn:
    """Encodes one column: numbers and vectors (sequences of numbers) as float32, texts and lists of texts as xxh3-64, and
    weighted lists, which are mappings of text to weight."""
    first = next(iter(values), 0.0)
    if isinstance(first, Mapping):
        weighted: Sequence[Mapping[str, float]] = values  # type: ignore[assignment]
        lengths = np.fromiter((len(row) for row in weighted), "<u4", len(weighted))
        weights = np.array([weight for row in weighted for weight in row.values()], "<f4")
        texts = [text for row in weighted for text in row]
        return FeatureColumn(category=_codes(texts), list_length=lengths.tobytes(), number=weights.tobytes())
    if isinstance(first, str):
        return FeatureColumn(category=_codes(values))  # type: ignore[arg-type]
    if isinstance(first, Sequence):
        if not all(isinstance(one, str) for row in values for one in row):  # type: ignore[union-attr]
            return FeatureColumn(number=np.asarray(values, "<f4").tobytes())
        lists: Sequence[Sequence[str]] = values  # type: ignore[assignment]
        lengths = np.fromiter((len(row) for row in lists), "<u4", len(lists))
        return FeatureColumn(category=_codes([text for row in lists for text in row]), list_length=lengths.tobytes())
    return FeatureColumn(number=np.asarray(values, "<f4").tobytes())


def _codes(texts: Sequence[str]) -> bytes:
    codes = string_ids(texts)
    codes[[text == "" for text in texts]] = 0
    return codes.astype("<u8").tobytes()


def typed(response: RankResponse) -> Ranking:
    """A response as arrays."""
    return Ranking(
        request_id=response.request_id,
        ids=np.frombuffer(response.ranked_ids, "<u8"),
        kinds=np.frombuffer(response.ranked_kinds, np.uint8),
        scores=np.frombuffer(response.scores, "<f4"),
        head_scores={name: np.frombuffer(data, "<f4") for name, data in response.head_scores.items()},
        tier=Tier.Name(response.tier).removeprefix("TIER_").lower(),
        release_id=response.release_id,
        generations=dict(response.generations),
        watermark=tuple(Position(at.log_epoch, at.partition, at.offset) for at in response.watermark),
        sequence_age_ms=response.sequence_age_ms,
        sequence_count=response.sequence_count,
        after_reached=response.after_reached,
        cold_start=response.cold_start,
        sequence_source=SequenceSource.Name(response.sequence_source).removeprefix("SEQUENCE_SOURCE_").lower(),
        state_age_ms=response.state_age_ms,
        score_formula=response.score_formula,
        experiment=response.experiment,
        arm=response.arm,
    )

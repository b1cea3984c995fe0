"""The Python client of the ranking service."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
import numpy as np
import numpy.typing as npt

from features.ids import U64, string_ids
from features.ports import Position
from protos.v1.actions_pb2 import Position as WirePosition
from protos.v1.ranking_pb2 import FeatureColumn, RankRequest, RankResponse, SequenceSource, Tier
from protos.v1.ranking_pb2_grpc import RankingStub

Column = npt.NDArray[np.floating] | Sequence[float] | Sequence[str] | Sequence[Sequence[str]]
"""Values of one feature: numbers (NaN: missing), category texts ("": missing), or a list of texts for each candidate."""


class RankError(RuntimeError):
    """The service refused or did not answer. `code` is the gRPC status, the message names the field or what to do."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code


@dataclass(frozen=True)
class Ranking:
    """One answer. Arrays are in the ranked order, best first.

    ids uint64 [C]; kinds uint8 [C]; scores float32 [C]; head_scores: float32 [C] by head, empty without the model; tier: "model",
    "embedding" or "caller_order"; sequence_age_ms: -1 where no action was used; watermark: of user_id and each further identity;
    sequence_source: "local", "owner", "older" or "none"; state_age_ms: -1 where it is not known.
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


class RankingClient:
    """A connection to one ranking server. Safe to share between threads; close it, or use it in `with`.

    Args:
        address: "host:port".
        timeout_s: deadline of a call that states none.
        root_certificate: PEM file of the server's authority; without it the connection is not encrypted.
        token: sent as the bearer token of each call.
    """

    def __init__(self, address: str, *, timeout_s: float = 1.0, root_certificate: Path | None = None, token: str | None = None) -> None:
        if root_certificate is None:
            self._channel = grpc.insecure_channel(address)
        else:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificate.read_bytes()))
        self._stub = RankingStub(self._channel)
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def rank(
        self,
        ranker: str,
        user_id: int,
        candidates: Sequence[int] | U64,
        *,
        kinds: int | Sequence[int] = 0,
        candidate_features: Mapping[str, Column] | None = None,
        request_features: Mapping[str, float | str | Sequence[str]] | None = None,
        head_weights: Mapping[str, float] | None = None,
        request_time_ms: int = 0,
        after: Sequence[Position] = (),
        identities: Sequence[int] = (),
        request_id: int = 0,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Ranks candidates for a user. The arguments are the fields of `RankRequest`; `kinds` is one number for all, or one each.

        Raises:
            RankError: INVALID_ARGUMENT names the field; UNAVAILABLE was tried again once, where time was left.
        """
        request = RankRequest(
            ranker=ranker,
            user_id=user_id,
            identities=identities,
            candidate_ids=np.asarray(candidates, "<u8").tobytes(),
            candidate_features={name: feature_column(values) for name, values in (candidate_features or {}).items()},
            request_features={name: feature_column([value]) for name, value in (request_features or {}).items()},  # type: ignore[arg-type]
            head_weights=head_weights,
            request_time_ms=request_time_ms,
            after=[WirePosition(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset) for at in after],
            request_id=request_id,
        )
        if isinstance(kinds, int | np.integer):
            request.candidate_kind = int(kinds)
        else:
            request.candidate_kinds = bytes(kinds)
        return typed(self.call(request, timeout_s=timeout_s))

    def call(self, request: RankRequest, *, timeout_s: float | None = None) -> RankResponse:
        """`rank` for a request that is there already. Raises as `rank`."""
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        unavailable: RankError | None = None
        while True:
            try:
                # The second try waits for a connection: a server that restarts is there in a moment.
                left_s = deadline_s - time.monotonic()
                return self._stub.Rank(request, timeout=left_s, metadata=self._metadata, wait_for_ready=unavailable is not None)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                if unavailable is not None and code == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise unavailable from error  # says more: nobody was there
                if unavailable is not None or code != grpc.StatusCode.UNAVAILABLE or time.monotonic() >= deadline_s:
                    raise RankError(code, error.details() or "") from error
                unavailable = RankError(code, error.details() or "")

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def feature_column(values: Column) -> FeatureColumn:
    """Encodes one column: numbers as float32, texts and lists of texts as xxh3-64."""
    first = next(iter(values), 0.0)
    if isinstance(first, str):
        return FeatureColumn(category=_codes(values))  # type: ignore[arg-type]
    if isinstance(first, Sequence):
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
    )

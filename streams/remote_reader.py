"""Sequences from a reader service on another machine: `features.ports.SequenceReader` over gRPC, the client of `streams/reader_service.py`.

Reads change nothing, so a call is tried again, with pauses that grow, until its deadline. What arrives is checked like a row of the local
view: it must be whole, of the user asked for, and of this domain file's definition.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from features.domain import Domain
from features.ports import Origin, Position, Reading, SequenceCorruptError, SequenceUnavailableError
from features.request_context import TRACE_HEADERS
from features.sequence import definition, row_fingerprint
from protos.v1.actions_pb2 import Position as WirePosition
from protos.v1.sequence_pb2 import GetPositionRequest, GetSequencesRequest, UserSequence, WatchRequest
from protos.v1.sequence_pb2_grpc import SequenceReaderStub
from streams.reader_service import ANSWER_BYTES_MAX, users_max
from streams.view_reader import check_row

_PAUSE_S_MIN, _PAUSE_S_MAX = 0.01, 0.25
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * ANSWER_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class RemoteReader:
    """A connection to one reader service. Waits for the network, up to its deadline; safe to share between threads.

    Args:
        address: "host:port".
        domain: the domain file that the service was started with.
        timeout_s: deadline of a call to the service, its retries included. More users than one call takes are read by several.
        root_certificate: PEM file of the service's authority; without it the connection is not encrypted.
        certificate: PEM file of the client's own certificate chain, for a service that asks for one; with `key`.
        key: PEM file of its private key.
        token: sent as the bearer token of each call.
    """

    def __init__(
        self,
        address: str,
        domain: Domain,
        *,
        timeout_s: float = 1.0,
        root_certificate: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        token: str | None = None,
    ) -> None:
        if (certificate is None) != (key is None) or (root_certificate is None and key is not None):
            raise ValueError("certificate, key: give both, and root_certificate with them, or none")
        if root_certificate is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            own = (None, None) if key is None or certificate is None else (key.read_bytes(), certificate.read_bytes())
            credentials = grpc.ssl_channel_credentials(root_certificate.read_bytes(), *own)
            self._channel = grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        self._stub = SequenceReaderStub(self._channel)
        self._address, self._timeout_s = address, timeout_s
        self._fingerprints = {name: definition(domain, name).fingerprint for name in domain.sequence}
        self._users_max = {name: users_max(domain, name) for name in domain.sequence}
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(("reads", "users", "rows_missing", "calls", "retries", "unavailable", "corrupt"), 0)

    def read(self, sequence: str, user_ids: Seq[int]) -> list[Reading]:
        """See `features.ports.SequenceReader.read`. Raises KeyError for a sequence that the domain does not define."""
        fingerprint, most = self._fingerprints[sequence], self._users_max[sequence]
        readings: list[Reading] = []
        for start in range(0, len(user_ids), most):
            asked = user_ids[start : start + most]
            request = GetSequencesRequest(sequence=sequence, user_ids=np.array(asked, "<u8").tobytes())
            found = self._call(self._stub.GetSequences, request).sequences
            readings += self._checked(asked, found, fingerprint)
        self._count(reads=1, users=len(user_ids), rows_missing=sum(not reading.row for reading in readings))
        return readings

    def position(self, user_id: int) -> Position:
        """See `features.ports.SequenceReader.position`."""
        return _position(self._call(self._stub.GetPosition, GetPositionRequest(user_id=user_id)))

    def watch(self, sequence: str, user_id: int) -> Iterator[Reading]:
        """The user's reading, and one for each change, until the service stops or the iterator is closed.

        Raises KeyError for a sequence that the domain does not define, SequenceUnavailableError and SequenceCorruptError as `read`.
        """
        fingerprint = self._fingerprints[sequence]
        call = self._stub.Watch(WatchRequest(sequence=sequence, user_id=user_id), metadata=self._metadata)
        try:
            for one in call:
                yield from self._checked([user_id], [one], fingerprint)
        except grpc.RpcError as error:
            code, message = _cause(error)
            kind = SequenceCorruptError if code is grpc.StatusCode.DATA_LOSS else SequenceUnavailableError
            raise kind(f"sequence reader {self._address}: {code.name}: {message}") from error
        finally:
            call.cancel()

    def statistics(self) -> dict[str, float]:
        """Counters since start."""
        with self._lock:
            return dict(self._counters)

    def close(self) -> None:
        """Closes the connection; calls under way end with SequenceUnavailableError."""
        self._channel.close()

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        """One answer, tried again while the service may be back in time."""
        deadline_s = time.monotonic() + self._timeout_s
        pause_s, refusal = _PAUSE_S_MIN, ""
        self._count(calls=1)
        while True:
            try:
                # Again means: wait for a connection. A service that restarts is there in a moment.
                left_s = max(deadline_s - time.monotonic(), 0.001)
                metadata = (*self._metadata, *TRACE_HEADERS.get())
                return method(request, timeout=left_s, metadata=metadata, wait_for_ready=bool(refusal))
            except (grpc.RpcError, ValueError) as error:
                code, message = _cause(error)
                if code is grpc.StatusCode.DATA_LOSS:
                    self._count(corrupt=1)
                    raise SequenceCorruptError(f"sequence reader {self._address}: {message}") from error
                # A refusal from before says more than the deadline that ended the wait behind it.
                refusal = refusal if refusal and code is grpc.StatusCode.DEADLINE_EXCEEDED else f"{code.name}: {message}"
                pause_s = min(pause_s * (1 + random.random()), _PAUSE_S_MAX)
                if code not in _AGAIN or time.monotonic() + pause_s >= deadline_s:
                    self._count(unavailable=1)
                    raise SequenceUnavailableError(f"sequence reader {self._address}: {refusal}") from error
            self._count(retries=1)
            time.sleep(pause_s)

    def _checked(self, asked: Seq[int], found: Seq[UserSequence], fingerprint: int) -> list[Reading]:
        """The answer as readings, each of the user asked for, whole, and of this domain file's definition."""
        try:
            return checked_readings(self._address, asked, found, fingerprint)
        except SequenceCorruptError:
            self._count(corrupt=1)
            raise
        except SequenceUnavailableError:
            self._count(unavailable=1)
            raise

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counters[name] += count


def checked_readings(
    address: str, asked: Seq[int], found: Seq[UserSequence], fingerprint: int, origin: Origin = Origin.LOCAL
) -> list[Reading]:
    """A service's answer as readings, one for each user asked for.

    Raises:
        SequenceCorruptError: a row is damaged or of another user, or there are not as many as were asked for.
        SequenceUnavailableError: rows of another definition than `fingerprint`.
    """
    try:
        for user_id, one in zip(asked, found, strict=True):
            check_row(one.row, user_id)
    except (SequenceCorruptError, ValueError) as error:
        raise SequenceCorruptError(f"sequence reader {address}: the answer cannot be trusted: {error}") from error
    if any(one.row and row_fingerprint(one.row) != fingerprint for one in found):
        raise SequenceUnavailableError(
            f"sequence reader {address}: it keeps other [sequence] definitions than this domain file: start both with one"
        )
    return [_reading(user_id, one, origin) for user_id, one in zip(asked, found, strict=True)]


def _cause(error: grpc.RpcError | ValueError) -> tuple[grpc.StatusCode, str]:
    """Status and message of a failed call; on a closed channel gRPC raises ValueError."""
    if isinstance(error, ValueError):
        return grpc.StatusCode.CANCELLED, str(error)
    return error.code(), error.details() or ""


def _reading(user_id: int, found: UserSequence, origin: Origin) -> Reading:
    age_ms = found.state_age_ms if found.HasField("state_age_ms") else -1
    return Reading(user_id, found.row, _position(found.watermark), found.log_clock_ms, age_ms, origin)


def _position(found: WirePosition) -> Position:
    return Position(found.log_epoch, found.partition, found.offset)

"""The way to one address that workers announce: a channel that stays open, and a circuit breaker before it."""

import asyncio
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from features.ports import Origin, Position, Reading, SequenceCorruptError, SequenceUnavailableError
from protos.v1.actions_pb2 import Position as WirePosition
from protos.v1.sequence_pb2 import GetSequencesRequest
from protos.v1.sequence_pb2_grpc import SequenceReaderStub
from streams.reader_service import UNREADABLE
from streams.remote_reader import CHANNEL_OPTIONS, checked_readings

FAIR_TIMEOUT_S = 0.05
"""A call that was given less time says nothing about the address when it runs out."""
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.1, 5.0
_RECONNECT_S = 0.1


class Breaker:
    """Whether an address is asked. After a failure it is not, but by one call at growing intervals; an answer opens the way again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_s = 0.0
        self._again_s = 0.0
        self._probing = False
        self.trips = 0

    @property
    def tripped(self) -> bool:
        """Whether the last fair call failed."""
        return self._pause_s > 0

    def admits(self) -> bool:
        """Whether to ask now. True: `succeeded`, `failed` or `forgotten` must follow."""
        if not self._pause_s:
            return True
        if self._probing or self._clock() < self._again_s:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """The address answered."""
        self._pause_s, self._probing = 0.0, False

    def failed(self) -> None:
        """It did not, though it had the time. Of calls that were under way together, the first one counts."""
        if self._pause_s and not self._probing:
            return
        self.trips += not self._pause_s
        self._pause_s = min(max(2 * self._pause_s, _PAUSE_S_MIN), _PAUSE_S_MAX)
        self._again_s = self._clock() + self._pause_s * (1 + random.random() / 4)  # not every server at once
        self._probing = False

    def forgotten(self) -> None:
        """The call ended without saying anything about the address: the next one may ask."""
        self._probing = False


class OwnerLink:
    """One announced address. Used in one event loop."""

    def __init__(
        self,
        address: str,
        *,
        root_certificate: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        token: str | None = None,
    ) -> None:
        self.address = address
        if root_certificate is None:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            own = (None, None) if key is None or certificate is None else (key.read_bytes(), certificate.read_bytes())
            credentials = grpc.ssl_channel_credentials(root_certificate.read_bytes(), *own)
            self._channel = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        self._get = SequenceReaderStub(self._channel).GetSequences
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.breaker = Breaker()

    async def read(
        self,
        sequence: str,
        user_ids: Seq[int],
        fingerprint: int,
        *,
        timeout_s: float,
        after: Seq[Position] = (),
        wait_s: float = 0.0,
        origin: Origin = Origin.OWNER,
    ) -> list[Reading]:
        """Readings by one call, which ends with the caller or after `timeout_s`, waits at the owner included.

        Raises:
            SequenceUnavailableError: no answer, a refusal, no such state there, or the breaker keeps from asking.
            SequenceCorruptError: what came cannot be trusted.
        """
        request = GetSequencesRequest(sequence=sequence, user_ids=np.array(user_ids, "<u8").tobytes())
        if after and wait_s > 0:
            request.after.extend(WirePosition(log_epoch=at.log_epoch, partition=at.partition, offset=at.offset) for at in after)
            request.wait_ms = int(wait_s * 1000)
        was_tripped = self.breaker.tripped
        if not self.breaker.admits():
            raise SequenceUnavailableError(f"sequence reader {self.address}: not asked since it failed; it is tried again")
        deadline_s, given_s = time.monotonic() + timeout_s, timeout_s - wait_s
        try:
            try:
                answer = await self._call(request, timeout_s, wait_for_ready=False)
            except grpc.aio.AioRpcError as error:
                # A reader that was started again is connected to in a moment: worth one more try, unless it is known to be gone.
                left_s = min(deadline_s - time.monotonic(), _RECONNECT_S + wait_s)
                if was_tripped or left_s <= 0 or error.code() is not grpc.StatusCode.UNAVAILABLE or _is_of_state(error):
                    raise
                given_s = _RECONNECT_S  # however little it was: nobody was there
                answer = await self._call(request, left_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise self._judged(error, given_s) from error
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            self.breaker.forgotten()
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the caller is gone
            raise SequenceUnavailableError(f"sequence reader {self.address}: no longer announced") from error  # its channel was closed
        except BaseException:
            self.breaker.forgotten()
            raise
        self.breaker.succeeded()
        return checked_readings(self.address, user_ids, answer.sequences, fingerprint, origin)

    async def close(self) -> None:
        """Closes the channel; calls under way end."""
        await self._channel.close()

    async def _call(self, request: GetSequencesRequest, timeout_s: float, *, wait_for_ready: bool) -> Any:
        return await self._get(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait_for_ready)

    def _judged(self, error: grpc.aio.AioRpcError, given_s: float) -> Exception:
        """What a failed call means; tells the breaker."""
        code, said = error.code(), f"sequence reader {self.address}: {error.code().name}: {error.details()}"
        if code is grpc.StatusCode.DATA_LOSS:
            self.breaker.succeeded()
            return SequenceCorruptError(said)
        if _is_of_state(error):
            self.breaker.succeeded()
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED and given_s < FAIR_TIMEOUT_S:
            self.breaker.forgotten()
        else:
            self.breaker.failed()
        return SequenceUnavailableError(said)


def _is_of_state(error: grpc.aio.AioRpcError) -> bool:
    """Whether the service is well, and only has not this state."""
    return any((key, value) == UNREADABLE for key, value in error.trailing_metadata() or ())

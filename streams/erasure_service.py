"""The gRPC service Erasure, which the reader process serves where it is enabled: produces the erasure record, and says what is due."""

import asyncio
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from features.domain import Domain
from features.erasures import Erasure, LedgerError
from features.person import IDENTITIES_MAX
from protos.v1 import erasure_pb2, erasure_pb2_grpc
from protos.v1.actions_pb2 import Position
from streams.erasure_audit import Audit, Entry
from streams.errors import StreamError
from streams.kafka import KafkaConfig, Topics
from streams.producer import ActionProducer

log = logging.getLogger(__name__)

SERVICE = "freshrank.v1.Erasure"
REASON_CHARACTERS_MAX = 1_000
_STATUS = {"done": erasure_pb2.PLACE_STATUS_DONE, "due": erasure_pb2.PLACE_STATUS_DUE, "absent": erasure_pb2.PLACE_STATUS_ABSENT}


@dataclass(frozen=True)
class ErasureServiceConfig:
    """What the service needs. `audit`: the audit's file, which the job writes. Who may call is decided at the reader's door."""

    kafka: KafkaConfig
    topics: Topics
    domain: Domain
    audit: Path
    deadline_ms: int


class ErasureServicer(erasure_pb2_grpc.ErasureServicer):  # type: ignore[misc]
    """See protos/v1/erasure.proto. It connects to Kafka with the first erasure."""

    def __init__(self, config: ErasureServiceConfig) -> None:
        self._config = config
        self._producer: ActionProducer | None = None
        self._connecting = threading.Lock()

    async def Erase(  # noqa: N802
        self, request: erasure_pb2.EraseRequest, context: grpc.aio.ServicerContext
    ) -> erasure_pb2.EraseResponse:
        """Returns once the record is stored; where it fails, the caller sends the same request again."""
        if not request.event_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "event_id: must not be 0; draw one, and send it again with a retry")
        if len(request.reason) > REASON_CHARACTERS_MAX:
            message = f"reason: {len(request.reason)} characters; allowed are {REASON_CHARACTERS_MAX}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        if len(request.identities) > IDENTITIES_MAX:
            message = f"identities: {len(request.identities)} further ids; allowed are {IDENTITIES_MAX}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        try:
            erased, *further = await asyncio.to_thread(self._erase, request)
        except StreamError as error:
            log.warning("an erasure was not stored: %s", error)
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "the log has not stored it yet: send the same request again, with the same event_id"
            )
        return erasure_pb2.EraseResponse(
            position=_position(erased),
            event_id=erased.event_id,
            deadline_ms=max(one.append_time_ms for one in (erased, *further)) + self._config.deadline_ms,
            identity_positions=map(_position, further),
        )

    async def Status(  # noqa: N802
        self, request: erasure_pb2.ErasureStatusRequest, context: grpc.aio.ServicerContext
    ) -> erasure_pb2.ErasureStatusResponse:
        """What the audit says of a user's erasures."""
        try:
            entries = await asyncio.to_thread(lambda: Audit(self._config.audit).of_user(request.user_id))
        except LedgerError as error:
            log.error("the audit cannot be read: %s", error)  # noqa: TRY400  # its message says where
            await context.abort(grpc.StatusCode.DATA_LOSS, "the audit is damaged: the service's log names file and line")
        return erasure_pb2.ErasureStatusResponse(erasures=map(_status, entries))

    def close(self) -> None:
        """Ends the producer; nothing is queued in it, for every call waits for its record."""
        if self._producer is not None:
            self._producer.close()

    def _erase(self, request: erasure_pb2.EraseRequest) -> list[Erasure]:
        """Erases user_id and then each identity; returns once all are stored. Raises StreamError: some may be stored."""
        with self._connecting:
            topics = self._config.topics
            if self._producer is None:
                self._producer = ActionProducer(self._config.kafka, self._config.domain, topics.actions, base=topics.base)
        users = (request.user_id, *request.identities)
        asked = [self._producer.erase_user(user, request.reason, request.event_id) for user in users]
        return [one.result() for one in asked]


def add_erasure(server: grpc.aio.Server, config: ErasureServiceConfig) -> ErasureServicer:
    """Registers the service; close what it returns when the server has stopped."""
    servicer = ErasureServicer(config)
    erasure_pb2_grpc.add_ErasureServicer_to_server(servicer, server)
    return servicer


def _position(erasure: Erasure) -> Position:
    return Position(log_epoch=erasure.log_epoch, partition=erasure.partition, offset=erasure.offset)


def _status(entry: Entry) -> erasure_pb2.ErasureStatus:
    return erasure_pb2.ErasureStatus(
        event_id=entry.last.event_id,
        reason=entry.first.reason,
        position=_position(entry.last),
        asked_ms=entry.asked_ms,
        deadline_ms=entry.deadline_ms,
        places=[
            erasure_pb2.ErasurePlace(name=name, status=_STATUS[place.status], at_ms=place.at_ms, detail=place.detail)
            for name, place in entry.places.items()
        ],
    )

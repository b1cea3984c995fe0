"""Who has the state of which partition: workers announce it, everybody who reads sequences learns it.

The announcements are keyed by partition and worker, so none ever replaces another worker's. The topic has one partition, so all who read
it see them in one order: of two that say OWNER the later one is right, whoever was frozen or slow meanwhile. A worker that gives a
partition up says FORMER: its state stays readable, as it was then.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from protos.v1.owners_pb2 import STATE_ROLE_FORMER, STATE_ROLE_OWNER, STATE_ROLE_STANDBY, StateAnnouncement, StateRole
from streams.kafka import KafkaConfig, new_producer, unavailable

log = logging.getLogger(__name__)

OWNER_KEY = "owner/"
OWNER, STANDBY, FORMER = STATE_ROLE_OWNER, STATE_ROLE_STANDBY, STATE_ROLE_FORMER
_PAUSE_S = 1.0
_FLUSH_S, _CLOSE_S = 15.0, 2.0
_Said = dict[int, tuple[int, int]]
"""(role, log epoch) by partition."""


class Announcer:
    """Tells everybody what a worker has, in a thread of its own: `say` never waits. What the broker does not take is sent again."""

    def __init__(self, kafka: KafkaConfig, topic: str, *, instance: str, address: str) -> None:
        self._kafka, self._topic, self._instance, self._address = kafka, topic, instance, address
        self._pending: _Said = {}
        """What is still to be sent."""
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="announce-owner", daemon=True)
        self._thread.start()

    def say(self, partition: int, role: int, log_epoch: int) -> None:
        """Announces the worker's role for a partition: OWNER, STANDBY or FORMER. May be called from any thread."""
        with self._news:
            self._pending[partition] = role, log_epoch
            self._news.notify()

    def close(self) -> None:
        """Sends what is still to be sent, for two seconds at most."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(2 * _CLOSE_S)

    def _run(self) -> None:
        producer = new_producer(self._kafka, "announce-owner", message_timeout_ms=10_000, linger_ms=0)
        while True:
            with self._news:
                self._news.wait_for(lambda: self._pending or self._closing)
                pending, self._pending, closing = self._pending, {}, self._closing
            failed: _Said = {}
            for partition, said in pending.items():
                self._send(producer, partition, said, failed)
            producer.flush(_CLOSE_S if closing else _FLUSH_S)
            if closing:
                return
            with self._news:
                if failed:
                    self._pending = failed | self._pending  # what was said since is newer
                    self._news.wait_for(lambda: self._closing, _PAUSE_S)

    def _send(self, producer: Any, partition: int, said: tuple[int, int], failed: _Said) -> None:
        def delivered(error: Any, _: object) -> None:
            if error is not None:
                log.warning("partition %d is not announced yet: %s", partition, unavailable(self._kafka, error))
                failed[partition] = said

        role, log_epoch = said
        message = StateAnnouncement(partition=partition, address=self._address, log_epoch=log_epoch, role=StateRole.Name(role))
        message.announced_time_ms = time.time_ns() // 1_000_000
        key = f"{OWNER_KEY}{partition}/{self._instance}"
        producer.produce(self._topic, message.SerializeToString(), key.encode(), on_delivery=delivered)


@dataclass(frozen=True)
class Route:
    """Who has a partition's state, best first. `log_epoch`: of the newest owner's log; addresses of other logs are left out."""

    log_epoch: int = 0
    owner: str = ""
    standbys: tuple[str, ...] = ()
    formers: tuple[str, ...] = ()
    """Of owners before the present one, the newest first: they gave the partition up, or are gone without a word."""


_NOBODY = Route()


class Owners:
    """What has been announced. Announcements come in the order of their topic, in any one thread; all else may be read from any."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._said: dict[int, dict[str, StateAnnouncement]] = {}
        """By partition and key, in the order of the topic: the newest last."""
        self._routes: dict[int, Route] = {}
        self._on_change = on_change
        self.version = 0
        """Raised with each change."""

    def take(self, key: str, value: bytes | None) -> None:
        """Takes one announcement; those of other things are passed over. Raises ValueError: it cannot be read."""
        if not key.startswith(OWNER_KEY):
            return
        try:
            partition = int(key.removeprefix(OWNER_KEY).split("/")[0])
            said = None if value is None else StateAnnouncement.FromString(value)
        except DecodeError as error:
            raise ValueError(f"announcement {key}: not a freshrank.v1.StateAnnouncement") from error
        of_partition = self._said.setdefault(partition, {})
        of_partition.pop(key, None)
        if said is not None and said.partition == partition and said.address:
            of_partition[key] = said
        self._routes = self._routes | {partition: _route(list(of_partition.values()))}
        self.version += 1
        self._on_change()

    def route(self, partition: int) -> Route:
        """Who has it now; a route to nowhere where nobody said so."""
        return self._routes.get(partition, _NOBODY)

    def addresses(self) -> frozenset[str]:
        """Every address that may be asked."""
        routes = list(self._routes.values())
        return frozenset(address for route in routes for address in (route.owner, *route.standbys, *route.formers) if address)


def _route(said: list[StateAnnouncement]) -> Route:
    newest_first = said[::-1]
    owner = next((one for one in newest_first if one.role == OWNER), None)
    log_epoch = (owner or newest_first[0]).log_epoch if newest_first else 0
    known = [one for one in newest_first if one.log_epoch == log_epoch and one is not owner]
    address = owner.address if owner is not None else ""
    standbys = dict.fromkeys(one.address for one in known if one.role == STANDBY and one.address != address)
    formers = dict.fromkeys(one.address for one in known if one.role != STANDBY and one.address not in (address, *standbys))
    return Route(log_epoch, address, tuple(standbys), tuple(formers))

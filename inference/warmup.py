"""Warm-up with requests as they really come: a release is asked some of them before it takes any.

A server keeps a few recent requests of each ranker, in memory and for its next start in a file. A blank request, which `ModelGate.bring_up`
sends, has never met the shapes, the sequence lengths and the rows of tables that real ones have.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from features.actions import EVENT_DTYPE
from features.erasures import LEDGER, LedgerError, erased_users, read_ledger
from features.lineage import Lineage
from features.pack import Tensors
from features.ports import SequenceCorruptError, SequenceSource
from features.request import RequestError, inputs_from_request
from features.samples import WARM, locked, names_any, read_samples, write_samples
from inference.person import NotKeptError, read_person
from inference.served import Served
from inference.telemetry import Telemetry
from inference.triton import ModelTimeoutError, ModelUnavailableError
from protos.v1.ranking_pb2 import RankRequest

log = logging.getLogger(__name__)

SAMPLES_MAX, SAMPLE_BYTES_MAX = 32, 1 << 18
"""Requests of a ranker that are kept, and the largest of them: 8 MB a ranker at most, most often a hundredth of that."""
EVERY_S = 1.0
"""A request is kept at most this often: the samples then span half a minute or more, not one burst of one caller."""
WRITE_EVERY_S = 60.0
REHEARSAL_S_MAX, ANSWER_S_MAX, READ_S_MAX = 5.0, 2.0, 0.2
"""Time for a whole warm-up, for one answer in it, and for one sequence."""


class Samples:
    """Recent requests by ranker. Called on the event loop."""

    def __init__(self, home: Path | None = None, *, every_s: float = EVERY_S) -> None:
        """`home`: folder with the file of samples and the ledger of erasures; None: only in memory."""
        self._home, self._every_s = home, every_s
        self._kept: dict[str, deque[bytes]] = {}
        self._taken_s: dict[str, float] = {}
        self._changed: set[str] = set()

    def offer(self, ranker: str, data: bytes) -> None:
        """Keeps a request that was answered, where it is time for one."""
        now_s = time.monotonic()
        if now_s - self._taken_s.get(ranker, -self._every_s) >= self._every_s and len(data) <= SAMPLE_BYTES_MAX:
            self._taken_s[ranker] = now_s
            self._kept.setdefault(ranker, deque(maxlen=SAMPLES_MAX)).append(data)
            self._changed.add(ranker)

    def of(self, ranker: str) -> list[bytes]:
        """The ranker's samples, newest first."""
        return list(reversed(self._kept.get(ranker, ())))

    async def load(self) -> None:
        """Reads what the last process left."""
        if self._home is None:
            return
        for ranker, requests in (await asyncio.to_thread(_read, self._home)).items():
            self._kept[ranker] = deque([*requests, *self._kept.get(ranker, ())], SAMPLES_MAX)

    async def write(self) -> None:
        """Writes the samples that are new, off the loop, without those of erased users, whom it forgets. A failure costs the next start
        its warm-up, and is logged.
        """
        if self._home is None or not self._changed:
            return
        taken, self._changed = {ranker: list(self._kept[ranker]) for ranker in sorted(self._changed)}, set()
        try:
            forgotten = await asyncio.to_thread(_write, self._home, taken)
        except (OSError, LedgerError) as error:
            log.warning("samples for the next warm-up are not written: %s", error)
            return
        for ranker in taken:
            self._kept[ranker] = deque((data for data in self._kept[ranker] if data not in forgotten), SAMPLES_MAX)

    async def keep_written(self) -> None:
        """`write` now and then, until cancelled."""
        while True:
            await asyncio.sleep(WRITE_EVERY_S)
            await self.write()


def _read(home: Path) -> dict[str, list[bytes]]:
    return {path.stem: [request.SerializeToString() for request in read_samples(path)] for path in sorted((home / WARM).glob("*.pb"))}


def _write(home: Path, taken: Mapping[str, list[bytes]]) -> set[bytes]:
    """Writes the rankers' files; returns the requests of erased users, which are not in them."""
    forgotten = set()
    with locked(home / WARM):
        erased = erased_users(read_ledger(home / LEDGER))
        for ranker, kept in taken.items():
            parsed = [(data, RankRequest.FromString(data)) for data in kept]
            forgotten |= {data for data, request in parsed if names_any(request, erased)}
            write_samples(home / WARM / f"{ranker}.pb", [request for data, request in parsed if data not in forgotten])
    return forgotten


class WarmUp:
    """Asks a release sampled requests: reads, packs and infers as a ranking does, and answers nobody."""

    def __init__(self, samples: Samples, source: SequenceSource, telemetry: Telemetry, clock_ms: Callable[[], int]) -> None:
        self._samples, self._source, self._telemetry, self._clock_ms = samples, source, telemetry, clock_ms

    async def __call__(self, served: Served, infer: bool = True) -> None:
        """Returns when each sample was answered, or the time is over; without samples at once. Other generations under a
        model that answers already are only packed (`infer` False): asking it would cost the traffic, and tell nothing new.

        Raises:
            ModelUnavailableError: the model failed every one of them, though it answered a blank request.
        """
        until_s = time.monotonic() + REHEARSAL_S_MAX
        answered, failure = 0, None
        for data in self._samples.of(served.release.ranker):
            if time.monotonic() > until_s:
                break
            tensors = await self._pack(served, data)
            await asyncio.sleep(0)  # requests go on between two samples
            if tensors is None:
                continue
            self._telemetry.count("warm_requests")
            if not infer:
                continue
            try:
                await served.gate.rehearse(tensors, timeout_s=ANSWER_S_MAX)
                answered += 1
            except ModelTimeoutError:
                self._telemetry.count("warm_failures")
            except ModelUnavailableError as error:
                self._telemetry.count("warm_failures")
                failure = error
        if failure is not None:
            log.warning("release %s failed sampled requests: %s", served.release.release_id, failure)
            if not answered:
                raise failure

    async def _pack(self, served: Served, data: bytes) -> Tensors | None:
        """A sample as this release packs it, with the user's present sequence, or none where that cannot be read; None: not a request of
        this release.
        """
        try:
            request = RankRequest.FromString(data)
            del request.after[:]
            request.request_time_ms = request.request_time_ms or self._clock_ms()
            inputs = inputs_from_request(served.domain, request, np.zeros(0, EVENT_DTYPE))
        except (DecodeError, RequestError):
            return None
        with suppress(NotKeptError, SequenceCorruptError):
            by_s = time.monotonic() + READ_S_MAX
            person = await read_person(self._source, served, request, Lineage(), read_by_s=by_s, wait_until_s=by_s)
            inputs = replace(inputs, events=person.events, erased_before_ms=person.erased_before_ms)
        return served.packer.pack(inputs).tensors

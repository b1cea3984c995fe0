"""Shadows: releases that score a request after its answer, from the same sequence, to be compared and never served.

They are work for idle moments: at most TASKS_MAX at once, none while a ranking waits at the door. What is not scored is counted.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable

from features.faults import internal_error
from features.pack import Packed, RankInputs
from features.person import events_of_rows
from features.ports import SequenceCorruptError
from features.request import RequestError, inputs_from_request
from features.request_context import REQUEST_ID
from features.sequence import row_fingerprint
from inference.admission import Admission
from inference.formulas import Rule
from inference.ladder import Scored, score
from inference.person import Person
from inference.served import Releases, Served
from inference.telemetry import Telemetry
from protos.v1.ranking_pb2 import TIER_MODEL, RankRequest, RankResponse

log = logging.getLogger(__name__)

TASKS_MAX = 8
MODEL_S_MAX = 2.0

RuleOf = Callable[[Served, RankRequest], Rule]
"""How a release scores a request in the end. Raises RequestError."""
LogShadow = Callable[[Served, RankRequest, RankInputs, Packed, Person, Scored, Rule, float], None]
"""Takes what a shadow scored, and when it began (time.monotonic()), into the ranking log."""


class Shadows:
    """The shadows of one service.

    Counts `shadow_logged`, `shadow_dropped` (no place, or rankings waited), `shadow_not_ready` (the release is not loaded),
    `shadow_refused` (it reads other sequences, or does not know what the request brings along) and `shadow_failed`.
    """

    def __init__(self, admission: Admission, releases: Releases, telemetry: Telemetry, rule_of: RuleOf, log_shadow: LogShadow) -> None:
        self._admission, self._releases, self._telemetry = admission, releases, telemetry
        self._rule_of, self._log = rule_of, log_shadow
        self._own = Telemetry()  # the ladder's counts are of rankings
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, request: RankRequest, person: Person, response: RankResponse, release_ids: list[str]) -> None:
        """Scores in the background by each of the releases but the one that answered; returns at once and never raises."""
        for release_id in release_ids:
            if release_id == response.release_id:
                continue
            if len(self._tasks) >= TASKS_MAX or self._admission.waiting:
                self._telemetry.count("shadow_dropped")
                continue
            # A context of its own: the laps and the trace of the call are closed.
            context = contextvars.Context()
            task = asyncio.get_running_loop().create_task(self._shadow(request, person, release_id), name="shadow", context=context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _shadow(self, request: RankRequest, person: Person, release_id: str) -> None:
        REQUEST_ID.set(request.request_id)
        try:
            # Behind the answer: this task's first step would otherwise stand before its way out.
            await asyncio.sleep(0)
            with self._releases.use(request.ranker, release_id) as served:
                self._telemetry.count(await self._scored(served, request, person, release_id))
        except (RequestError, SequenceCorruptError) as error:
            self._telemetry.count("shadow_refused")
            log.debug("%s cannot score this request in the shadow: %s", release_id, error)
        except Exception as error:
            self._telemetry.count("shadow_failed")
            internal_error(log, "a shadow failed", error)

    async def _scored(self, served: Served, request: RankRequest, person: Person, release_id: str) -> str:
        """Scores and logs; the counter of what came of it."""
        if served.release.release_id != release_id:
            return "shadow_not_ready"
        if self._admission.waiting:
            return "shadow_dropped"
        started_s = time.monotonic()
        if {row_fingerprint(row) for row in person.rows if row} - {served.sequence_fingerprint}:
            return "shadow_refused"
        events, erased_before_ms = person.events, person.erased_before_ms
        if person.readings:
            users = [request.user_id, *request.identities]
            events, erased_before_ms = events_of_rows(served.domain, served.ranker.sequence, users, person.rows)
        inputs = inputs_from_request(served.domain, request, events, erased_before_ms=erased_before_ms)
        rule = self._rule_of(served, request)
        packed = served.packer.pack(inputs)
        scored = await score(served, packed, inputs, TIER_MODEL, rule.final(packed.tensors), MODEL_S_MAX, self._own)
        self._log(served, request, inputs, packed, person, scored, rule, started_s)
        return "shadow_logged"

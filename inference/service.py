"""One ranking: read the sequence, join and pack, ask the model, order, answer, log.

Errors that a caller sees have a status from one table, `STATUS`. A model that does not answer is not an error but a lower tier, and a state
that does not answer is an answer without a sequence, which says so.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import xxhash
from google.protobuf.message import DecodeError

from features.actions import EVENT_DTYPE
from features.faults import internal_error
from features.ids import user_key
from features.lineage import Lineage
from features.pack import Packed, RankInputs
from features.person import rows_digest
from features.ports import RankingSink, SequenceCorruptError, SequenceSource
from features.request import RequestError, inputs_from_request
from features.request_context import REQUEST_ID
from inference.admission import Admission, OverloadedError, Stay
from inference.experiments import NOTHING, Choice, Experiments
from inference.explain import Explainer
from inference.formulas import Formulas, Rule
from inference.ladder import Scored, checked_tier, is_below, score
from inference.person import NotKeptError, Person, read_person
from inference.scoring import head_weights
from inference.served import Releases, Served
from inference.shadow import Shadows
from inference.telemetry import Telemetry
from inference.warmup import Samples
from protos.v1.ranking_pb2 import (
    TIER_FEWER,
    TIER_MODEL,
    Explanation,
    RankingRecord,
    RankRequest,
    RankResponse,
    Tier,
)

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
_NO_EVENTS = np.zeros(0, EVENT_DTYPE)


STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotKeptError, grpc.StatusCode.FAILED_PRECONDITION),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SequenceCorruptError, grpc.StatusCode.DATA_LOSS),
)
"""Error to gRPC status; a state that does not answer is none of them (`inference.person`). Anything else is a bug: INTERNAL, which says a
reference, and the log where it was."""
_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What a ranking may take; `deploy` reads it from settings.

    timeout_s is the deadline of calls that state none, and deadline_s_max counts for calls that state a later one. A wait for `after` ends
    after after_wait_s_max at the latest, and before that when only after_reserve_s is left for ranking: a caller who asks for a position
    that never comes must not hold one of the rankings_max places. answer_reserve_s is kept for the answer while waiting for the model.
    inline_share is the share of users (by hash) whose row and tensors are in the ranking log.
    """

    timeout_s: float = 1.0
    deadline_s_max: float = 10.0
    after_wait_s_max: float = 2.0
    after_reserve_s: float = 0.25
    answer_reserve_s: float = 0.02
    model_timeout_s: float = 2.0
    rankings_max: int = 64
    rankings_waiting_max: int = 256
    message_bytes_max: int = 4 << 20
    inline_share: float = 0.01


class RankingService:
    """Answers Rank calls. Everything that it needs is handed in; `clock_ms` only fills request_time_ms where the caller left it 0."""

    def __init__(
        self,
        config: ServiceConfig,
        releases: Releases,
        source: SequenceSource,
        sink: RankingSink,
        clock_ms: Callable[[], int] | None = None,
    ) -> None:
        self._config, self._releases, self._source, self._sink = config, releases, source, sink
        self.clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self.lineage = Lineage()
        """Logs that led to the present one: positions of them are understood in `after`."""
        self._admission = Admission(config.rankings_max, config.rankings_waiting_max)
        self.telemetry = Telemetry()
        """What is counted and timed, for who exposes it."""
        self.formulas = Formulas(self.telemetry.count)
        """Takes announced formulas."""
        self.samples = Samples()
        self.experiments = Experiments()
        self._shadows = Shadows(self._admission, releases, self.telemetry, self._rule, self._log_shadow)
        self._explainer = Explainer(self._admission)

    async def rank(self, data: bytes, context: Any) -> RankResponse:
        """The Rank method: serialized RankRequest in, answer out, errors as a status."""
        return await self._answer(context, lambda left_s: self._admitted(data, left_s), self.telemetry)

    async def explain(self, data: bytes, context: Any) -> Explanation:
        """The Explain method: what `rank` would answer, and why (`inference.explain`). Nothing is logged."""
        unseen = Telemetry()  # stages and counts are of rankings
        return await self._answer(context, lambda left_s: self._explain(data, left_s, unseen), unseen)

    async def close(self) -> None:
        """Ends what goes on in the background."""
        await self._shadows.close()

    def figures(self) -> dict[str, float]:
        """Rankings under way, and the figures of the parts."""
        door = self._admission
        figures: dict[str, float] = {
            "in_flight": door.in_work + door.aside,
            "waiting": door.waiting,
            "limit": door.limit,
            "shed": door.shed,
        }
        for part, of in (("releases", self._releases), ("reader", self._source), ("sink", self._sink)):
            figures |= {f"{part}_{name}": value for name, value in of.statistics().items()}
        return figures

    async def _answer(self, context: Any, answer: Callable[[float], Awaitable[Answer]], telemetry: Telemetry) -> Answer:
        """What `answer` gives within the call's time, which it is told in seconds, or an error as a status, counted in `telemetry`."""
        left_s = context.time_remaining()
        try:
            return await answer(self._config.timeout_s if left_s is None else min(left_s, self._config.deadline_s_max))
        except Exception as error:
            code, message = _status(error)
            # A fault of ours counts, whoever meets it.
            (self.telemetry if code in _FAULTS else telemetry).count(f"status_{code.name.lower()}")
            if isinstance(error, OverloadedError):  # gRPC's own name: clients with a retry policy obey it
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(error.retry_after_ms)),))
        await context.abort(code, message)
        raise AssertionError("unreachable: abort raises")

    async def _admitted(self, data: bytes, left_s: float) -> RankResponse:
        called_s = time.monotonic()
        await self._admission.enter(left_s)
        self.telemetry.time("admission", time.monotonic() - called_s)
        with self._admission.taken() as stay:
            stay.called_s = called_s
            return await self._rank(data, called_s + left_s, stay)

    async def _rank(self, data: bytes, deadline_s: float, stay: Stay) -> RankResponse:
        request = self._request(data)
        choice, inputs, rule = self._plan(request, self.telemetry)
        with self._releases.use(request.ranker, choice.release_id) as served:
            wanted = choice.tier or checked_tier(request.tier)
            person = await self._read(served, request, deadline_s, self.telemetry, stay)
            inputs = replace(inputs, events=person.events, erased_before_ms=person.erased_before_ms)
            lap_s = time.monotonic()
            packed = served.packer.pack(inputs)
            self.telemetry.time("join_pack", time.monotonic() - lap_s)
            timeout_s = min(deadline_s - time.monotonic() - self._config.answer_reserve_s, self._config.model_timeout_s)
            scored = await score(served, packed, inputs, wanted, rule.final(packed.tensors), timeout_s, self.telemetry)
            stay.counts = scored.tier in (TIER_MODEL, TIER_FEWER)
            self._count(inputs, packed, person, scored.tier, wanted)
            self.telemetry.observe_inputs(packed, person.state_age_ms)
            response = _response(served, request, inputs, packed, person, scored, rule, choice)
        total_s, served_time_ms = time.monotonic() - stay.called_s, self.clock_ms()
        self.telemetry.time("total", total_s)

        def afterwards() -> None:
            try:
                self.samples.offer(request.ranker, data)
                self._shadows.offer(request, person, response, self.experiments.shadows(request.ranker, request.request_id))
                self._log(served, request, packed, person, scored, response, total_s, served_time_ms, choice)
            except Exception as error:  # the event loop would log the call's contents
                self.telemetry.count("log_dropped")
                internal_error(log, "a ranking was answered and not logged", error)

        # The loop's next round: gRPC has begun to send the answer by then, and nobody waits for these.
        asyncio.get_running_loop().call_soon(afterwards)
        return response

    def _request(self, data: bytes) -> RankRequest:
        """The request of a ranker that is served, with its id and time set."""
        request = parse_request(data, self._config.message_bytes_max)
        if request.ranker not in self._releases.served:
            names = ", ".join(self._releases.rankers) or "none; publish a release"
            raise RequestError("ranker", f"{request.ranker!r} is not served; served: {names}")
        request.request_id = request.request_id or secrets.randbits(64) or 1
        REQUEST_ID.set(request.request_id)  # for the log lines of this call
        request.request_time_ms = request.request_time_ms or self.clock_ms()
        return request

    def _rule(self, served: Served, request: RankRequest) -> Rule:
        """How this release scores the request in the end. Raises RequestError."""
        return self.formulas.rule(served, request, _weights(served, request))

    def _plan(self, request: RankRequest, telemetry: Telemetry) -> tuple[Choice, RankInputs, Rule]:
        """Who answers, and the request as that release takes it, still without events: checked before anything is waited for or read.

        The experiment's choice is without its release where that is not in use, or cannot answer this request as the served one might.
        `Releases.use` gives the same release as long as nothing is awaited in between. Raises RequestError.
        """
        choice, served = self.experiments.choose(request.ranker, request.user_id), self._releases.served[request.ranker]
        if choice.release_id:
            arm = self._releases.beside.find(request.ranker, choice.release_id)
            if arm is not None and arm.sequence_fingerprint == served.sequence_fingerprint:
                with suppress(RequestError):
                    return choice, inputs_from_request(arm.domain, request, _NO_EVENTS), self._rule(arm, request)
            telemetry.count("arm_fallbacks")
            choice = replace(choice, release_id="")
        return choice, inputs_from_request(served.domain, request, _NO_EVENTS), self._rule(served, request)

    async def _explain(self, data: bytes, left_s: float, telemetry: Telemetry) -> Explanation:
        deadline_s = time.monotonic() + left_s
        with self._explainer.place():
            self.telemetry.count("explained")
            request = self._request(data)
            choice, inputs, rule = self._plan(request, telemetry)
            with self._releases.use(request.ranker, choice.release_id) as served:
                wanted = choice.tier or checked_tier(request.tier)
                person = await self._read(served, request, deadline_s, telemetry)
                inputs = replace(inputs, events=person.events, erased_before_ms=person.erased_before_ms)
                packed = served.packer.pack(inputs)
                end_s, final = deadline_s - self._config.answer_reserve_s, rule.final(packed.tensors)
                scored = await score(served, packed, inputs, wanted, final, self._explainer.model_s(end_s), telemetry)
                response = _response(served, request, inputs, packed, person, scored, rule, choice)
                order = choice.order(scored.scores, request.request_id)
                return await self._explainer.explain(served, inputs, packed, scored, final, response, order, end_s)

    async def _read(
        self, served: Served, request: RankRequest, deadline_s: float, telemetry: Telemetry, stay: Stay | None = None
    ) -> Person:
        """What the person did, or nothing where no state answers; leaves time to rank. `stay`: of one that has a place at the door."""
        started_s = time.monotonic()
        left_s = deadline_s - started_s
        read_by_s = deadline_s - min(self._config.after_reserve_s, left_s / 2)
        wait_until_s = min(read_by_s, started_s + self._config.after_wait_s_max)
        # Who waits for a position does no work: others must not wait for that.
        with self._admission.standing_aside(stay) if stay is not None and request.after else nullcontext():
            person = await read_person(self._source, served, request, self.lineage, read_by_s=read_by_s, wait_until_s=wait_until_s)
        if request.after:
            telemetry.time("wait_after", time.monotonic() - started_s)
            telemetry.count("after_not_reached", not person.after_reached)
        telemetry.time("read", time.monotonic() - started_s)
        telemetry.count(f"sequence_{person.origin.name.lower()}")
        return person

    def _count(self, inputs: RankInputs, packed: Packed, person: Person, tier: int, wanted: int) -> None:
        count = self.telemetry.count
        count("rankings")
        count(Tier.Name(tier).lower())
        count("rankings_degraded", is_below(tier, wanted))
        count("cold_starts", person.is_cold)
        count("candidates", len(inputs.candidate_ids))
        count("missing_candidates", packed.missing_candidates)
        count("missing_sequence_items", packed.missing_sequence_items)
        count("missing_users", packed.missing_user)
        count("taken_down_candidates", packed.taken_down_candidates)

    def _log(
        self,
        served: Served,
        request: RankRequest,
        packed: Packed,
        person: Person,
        scored: Scored,
        response: RankResponse,
        latency_s: float,
        served_time_ms: int,
        choice: Choice = NOTHING,
        *,
        shadow: bool = False,
    ) -> None:
        lap_s = time.monotonic()
        digest, tensor_digests = served.packer.digests(packed.tensors)
        record = RankingRecord(
            request=request,
            release_id=served.release.release_id,
            generations=served.generations,
            watermark=response.watermark,
            tier=response.tier,
            digest=digest,
            tensor_digests=tensor_digests,
            head_scores=_by_head(served, scored.probability),
            scores=scored.scores.tobytes(),
            inline=is_sampled(request.user_id, self._config.inline_share),
            served_time_ms=served_time_ms,
            sequence_fingerprint=served.sequence_fingerprint,
            row_digest=rows_digest(person.rows),
            after_reached=response.after_reached,
            score_formula=response.score_formula,
            sequence_source=response.sequence_source,
            state_age_ms=response.state_age_ms,
            experiment=response.experiment,
            arm=response.arm,
            shadow=shadow,
            latency_us=round(latency_s * 1e6),
            shuffle_bound=choice.shuffle_bound,
        )
        if record.inline:
            record.inline_row, *further = person.rows
            record.inline_identity_rows.extend(further)
            for name, value in packed.tensors.items():
                record.inline_tensors[name] = value.tobytes()
        self.telemetry.count("log_dropped", not self._sink.put(request.user_id, record.SerializeToString()))
        self.telemetry.time("log", time.monotonic() - lap_s)

    def _log_shadow(
        self,
        served: Served,
        request: RankRequest,
        inputs: RankInputs,
        packed: Packed,
        person: Person,
        scored: Scored,
        rule: Rule,
        started_s: float,
    ) -> None:
        response = _response(served, request, inputs, packed, person, scored, rule)
        self._log(served, request, packed, person, scored, response, time.monotonic() - started_s, self.clock_ms(), shadow=True)


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """What the caller is told; what only the operator may know goes to the log."""
    code = next((code for kind, code in STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.INTERNAL:
        return code, internal_error(log, "a ranking failed", error)
    if code is grpc.StatusCode.DATA_LOSS:
        log.error("state is damaged: %s", error)
    return code, str(error)


def parse_request(data: bytes, bytes_max: int) -> RankRequest:
    """Reads a request. Raises RequestError: not a request, or larger than `bytes_max`, naming its largest field."""
    try:
        request = RankRequest.FromString(data)
    except DecodeError as error:
        raise RequestError("request", "these bytes are not a freshrank.v1.RankRequest") from error
    if len(data) > bytes_max:
        sizes, left = {}, request.ByteSize()
        for descriptor, _ in request.ListFields():  # taken out one by one: a copy of a hostile message costs tenths of a second
            request.ClearField(descriptor.name)
            sizes[descriptor.name], left = left - request.ByteSize(), request.ByteSize()
        largest = max(sizes, key=sizes.__getitem__, default="request")
        raise RequestError(largest, f"the request has {len(data)} bytes, most of them here; allowed are {bytes_max}")
    return request


def is_sampled(user_id: int, share: float) -> bool:
    """Whether the ranking log holds this user's inputs themselves: by a hash of the user, so always or never."""
    return xxhash.xxh3_64_intdigest(user_key(user_id)) < share * 2**64


def _weights(served: Served, request: RankRequest) -> npt.NDArray[np.float64]:
    for name, weight in request.head_weights.items():
        if not np.isfinite(weight):
            raise RequestError(f"head_weights[{name!r}]", "must be finite")
    try:
        return head_weights(served.ranker, request.head_weights)
    except KeyError as error:
        raise RequestError(f"head_weights[{error.args[0]!r}]", f"no such head; heads: {', '.join(served.ranker.heads)}") from error


def _by_head(served: Served, probability: npt.NDArray[np.float32] | None) -> dict[str, bytes]:
    return {} if probability is None else {name: probability[:, head].tobytes() for head, name in enumerate(served.ranker.heads)}


def _response(
    served: Served,
    request: RankRequest,
    inputs: RankInputs,
    packed: Packed,
    person: Person,
    scored: Scored,
    rule: Rule,
    choice: Choice = NOTHING,
) -> RankResponse:
    probability, scores = scored.probability, scored.scores
    order = choice.order(scores, request.request_id)
    return RankResponse(
        request_id=request.request_id,
        ranked_ids=inputs.candidate_ids[order].tobytes(),
        ranked_kinds=inputs.candidate_kinds[order].tobytes(),
        scores=scores[order].tobytes(),
        head_scores=_by_head(served, None if probability is None else probability[order]),
        tier=scored.tier,
        release_id=served.release.release_id,
        generations=served.generations,
        watermark=person.watermark(),
        sequence_age_ms=packed.sequence_age_ms,
        sequence_count=packed.sequence_count,
        cold_start=person.is_cold,
        score_formula="" if probability is None else rule.text,
        after_reached=person.after_reached,
        sequence_source=int(person.origin),
        state_age_ms=person.state_age_ms,
        experiment=choice.experiment,
        arm=choice.arm,
    )

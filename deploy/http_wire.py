"""JSON of the HTTP door: what a body may hold, and how it becomes calls of the Python clients. Names are those of the domain file.

Ids are texts: decimal digits are the number itself, anything else is hashed as everywhere (`features.ids.string_id`). A JSON number is
taken up to 2^53, since most JSON parsers round greater ones without a word.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from features.domain import Domain
from features.ids import ID_MAX, string_id
from features.ports import Position
from inference.client import Column, Ranking, RequestFields, typed
from protos.v1.ranking_pb2 import Explanation

EXACT_MAX = 2**53
ACTIONS_MAX = 1_000
FLOAT32_MAX = 3.4028234e38


class FieldError(ValueError):
    """A field of the body that is not allowed; `field` is where it stands."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def _id(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise ValueError("must be a text, or a whole number")  # noqa: TRY004 - pydantic wants ValueError
    if isinstance(given, int):
        if given > EXACT_MAX:
            raise ValueError("a JSON number above 2^53 is not exact everywhere: give the id as a text of decimal digits")
        if given < 0:
            raise ValueError("must not be negative")
        return given
    text = given.strip()
    if not text:
        raise ValueError("must not be empty")
    number = int(text) if text.isdecimal() else None
    return string_id(text) if number is None or number > ID_MAX else number


def _position(given: Any) -> Position:
    try:
        epoch, partition, offset = ("0", *str(given).split(":"))[-3:]
        return Position(int(epoch, 16), int(partition), int(offset))
    except ValueError:
        raise ValueError("must be EPOCH:PARTITION:OFFSET, as POST /v1/actions answers it") from None


def position_text(position: Position) -> str:
    """A position as the door gives and takes it: epoch in hexadecimal, partition, offset."""
    return f"{position.log_epoch:016x}:{position.partition}:{position.offset}"


Id = Annotated[
    int,
    BeforeValidator(_id, json_schema_input_type=str | int),
    Field(description="Text: decimal digits are the number itself, other texts are hashed. A number up to 2^53."),
]
At = Annotated[
    Position, BeforeValidator(_position, json_schema_input_type=str), Field(description="EPOCH:PARTITION:OFFSET, as produce answers it.")
]
Value = float | str | list[str] | list[float] | dict[str, float] | None
T = TypeVar("T")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


class RankBody(_Body):
    """A ranking to make."""

    ranker: str | None = Field(None, description="A [ranker.NAME] of the domain file; the first one where absent.")
    user: Id
    candidates: list[Id] = Field(min_length=1)
    kind: str | None = Field(None, description="Entity kind of all candidates; needed where the domain has several.")
    kinds: list[str] | None = Field(None, description="Entity kind of each candidate, instead of `kind`.")
    candidate_features: dict[str, list[Value]] = Field({}, description="A value for each candidate; null: missing.")
    request_features: dict[str, Value] = {}
    head_weights: dict[str, float] = {}
    score_formula: str = Field("", max_length=500, description="Final score over heads and number features; not with head_weights.")
    after: list[At] = Field([], description="Positions that the ranking must include.")
    identities: list[Id] = Field([], description="Further users that are the same person; their actions count, too.")
    tier: Literal["model", "small", "embedding", "popularity", "caller_order"] = Field(
        "model", description="The best tier that may answer."
    )
    request_id: Id = 0
    request_time_ms: int = Field(0, ge=0, lt=2**62, description="Milliseconds since 1970-01-01 UTC; 0: now.")
    timeout_ms: int = Field(1_000, ge=1, le=60_000)


class Ranked(BaseModel):
    """One candidate. `index`: its place in the request, from 0; `id`: as decimal digits; `heads`: null where no model scored it."""

    index: int
    id: str
    kind: str
    score: float
    heads: dict[str, float | None]


class RankAnswer(BaseModel):
    """Candidates from best to worst, and what they were ranked with. sequence_age_ms: -1 where no action was used."""

    request_id: str
    ranked: list[Ranked]
    tier: str
    release_id: str
    generations: dict[str, str]
    watermark: list[str]
    sequence_age_ms: int
    sequence_count: int
    sequence_source: str = Field(description="local, owner, older or none: whose state the sequence was read from.")
    state_age_ms: int = Field(description="How old that state was; -1: not known.")
    score_formula: str = Field(description='"" where the weights of the heads made the score.')
    after_reached: bool
    cold_start: bool
    experiment: str = Field(description='"" where none runs.')
    arm: str = Field(description='"" where the user is in none.')


class ExplainBody(RankBody):
    """A ranking to explain."""

    timeout_ms: int = Field(10_000, ge=1, le=60_000, description="Actions that there is no time for are not left out.")


class WhyAction(BaseModel):
    """What the user did, newest first. `seen`: it is in the model's input; `left_out`: the rest was scored without it.

    `effect`: final score with it less the one without it, in the order of `ranked`; `kendall_tau`: of both orders.
    """

    action: str
    kind: str
    id: str
    surface: str
    event_time_ms: int
    age_ms: int
    value: float | None
    seen: bool
    left_out: bool
    effect: list[float]
    kendall_tau: float | None


class WhyFeature(BaseModel):
    """A feature as the model got it: one value, of side item and candidate one each in the order of `ranked`.

    `numbers`: null is missing; `codes` of categories and lists: 0 missing, 1 outside of the vocabulary, then the vocabulary or buckets.
    """

    name: str
    side: str
    numbers: list[float | None] = []
    codes: list[list[int]] = []


class ExplainAnswer(BaseModel):
    """What rank would answer, and why. by_model: the model made the scores; without it no action has an effect."""

    ranking: RankAnswer
    by_model: bool
    actions: list[WhyAction]
    features: list[WhyFeature]


class ActionBody(_Body):
    """What a user did. Give the same event_id again when you retry: then both are one event."""

    user: Id
    item: Id
    action: str
    kind: str | None = Field(None, description="Entity kind of the item; needed where the domain has several.")
    surface: str | None = None
    value: float | None = Field(None, ge=-FLOAT32_MAX, le=FLOAT32_MAX, description="Such as dwell time.")
    event_time_ms: int | None = Field(None, gt=0, lt=2**62, description="When the user acted; now where absent.")
    event_id: Id | None = None
    request_id: Id = 0


class ActionsAnswer(BaseModel):
    """Where the log put each action, in their order: give one to `after`, and a ranking includes it."""

    positions: list[str]


class Problem(BaseModel):
    """RFC 9457, application/problem+json. `field`: the part of the body that is wrong; "" where none is."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str = ""
    code: str = Field("", description="The gRPC status behind it.")


def rank_fields(domain: Domain, body: RankBody) -> tuple[str, RequestFields]:
    """(ranker, fields of the request). Raises FieldError."""
    ranker = _named("ranker", body.ranker or next(iter(domain.ranker)), domain.ranker)
    if body.kinds is not None and body.kind is not None:
        raise FieldError("kind", "must be absent where kinds is given")
    kinds: int | list[int]
    if body.kinds is None:
        kinds = kind_number(domain, "kind", body.kind)
    elif len(body.kinds) != len(body.candidates):
        raise FieldError("kinds", f"{len(body.kinds)} kinds for {len(body.candidates)} candidates; one each")
    else:
        kinds = [kind_number(domain, f"kinds[{i}]", kind) for i, kind in enumerate(body.kinds)]
    columns = {name: _column(domain, f"candidate_features.{name}", name, values) for name, values in body.candidate_features.items()}
    single: dict[str, Any] = {
        name: _column(domain, f"request_features.{name}", name, [value])[0] for name, value in body.request_features.items()
    }
    fields = RequestFields(
        kinds=kinds,
        head_weights=body.head_weights,
        score_formula=body.score_formula,
        request_time_ms=body.request_time_ms,
        after=body.after,
        identities=body.identities,
        tier=body.tier,
        request_id=body.request_id,
        candidate_features=columns,
        request_features=single,
    )
    return ranker, fields


def answer_of(domain: Domain, body: RankBody, ranking: Ranking) -> RankAnswer:
    """A ranking as JSON."""
    names = {number: name for name, number in domain.entities.items()}
    asked = [body.kind] * len(body.candidates) if body.kinds is None else body.kinds
    only = next(iter(domain.entities))
    index = {(item, domain.entities[kind or only]): i for i, (item, kind) in enumerate(zip(body.candidates, asked, strict=True))}
    heads = {name: scores.tolist() for name, scores in ranking.head_scores.items()}
    ranked = [
        Ranked(
            index=index[item, kind],
            id=str(item),
            kind=names[kind],
            score=score,
            heads={name: scores[place] for name, scores in heads.items()},
        )
        for place, (item, kind, score) in enumerate(zip(ranking.ids.tolist(), ranking.kinds.tolist(), ranking.scores.tolist(), strict=True))
    ]
    return RankAnswer(
        request_id=str(ranking.request_id),
        ranked=ranked,
        tier=ranking.tier,
        release_id=ranking.release_id,
        generations=ranking.generations,
        watermark=[position_text(at) for at in ranking.watermark],
        sequence_age_ms=ranking.sequence_age_ms,
        sequence_count=ranking.sequence_count,
        sequence_source=ranking.sequence_source,
        state_age_ms=ranking.state_age_ms,
        score_formula=ranking.score_formula,
        after_reached=ranking.after_reached,
        cold_start=ranking.cold_start,
        experiment=ranking.experiment,
        arm=ranking.arm,
    )


def explain_answer(domain: Domain, body: RankBody, found: Explanation) -> ExplainAnswer:
    """An explanation as JSON, where NaN becomes null."""
    return ExplainAnswer(
        ranking=answer_of(domain, body, typed(found.response)),
        by_model=found.by_model,
        actions=[
            WhyAction(
                action=action.action,
                kind=action.kind,
                id=str(action.entity_id),
                surface=action.surface,
                event_time_ms=action.event_time_ms,
                age_ms=action.age_ms,
                value=action.value,
                seen=action.seen,
                left_out=action.left_out,
                effect=np.frombuffer(action.effect, "<f4").tolist(),
                kendall_tau=action.kendall_tau if action.left_out else None,
            )
            for action in found.actions
        ],
        features=[
            WhyFeature(
                name=feature.name,
                side=feature.side,
                numbers=np.frombuffer(feature.number, "<f4").tolist(),
                codes=np.frombuffer(feature.code, "<i4").reshape(-1, feature.width or 1).tolist(),
            )
            for feature in found.features
        ],
    )


def action_fields(domain: Domain, place: str, body: ActionBody, now_ms: int) -> dict[str, Any]:
    """Arguments of `ActionProducer.produce`, which then refuses none of them. `place` stands before a field's name. Raises FieldError."""
    if body.event_time_ms is not None and body.event_time_ms - domain.future_tolerance_ms > now_ms:
        late = f"is more than {domain.future_tolerance_ms} ms ahead of now, {now_ms}"
        raise FieldError(f"{place}event_time_ms", f"{body.event_time_ms} {late}")
    fields: dict[str, Any] = {
        "user_id": body.user,
        "entity_id": body.item,
        "entity_kind": kind_number(domain, f"{place}kind", body.kind),
        "action": _named(f"{place}action", body.action, domain.actions),
        "request_id": body.request_id,
        "event_time_ms": body.event_time_ms,
        "event_id": body.event_id,
    }
    if body.surface is not None:
        fields["surface"] = _named(f"{place}surface", body.surface, domain.surfaces)
    if body.value is not None:
        fields["value"] = body.value
    return fields


def kind_number(domain: Domain, field: str, name: str | None) -> int:
    """Number of an entity kind; None: the domain's only one. Raises FieldError."""
    if name is None and len(domain.entities) == 1:
        return next(iter(domain.entities.values()))
    if name is None:
        raise FieldError(field, f"is needed, since the domain has several; allowed: {', '.join(domain.entities)}")
    return domain.entities[_named(field, name, domain.entities)]


def _named(field: str, name: str, known: Mapping[str, Any]) -> str:
    if name not in known:
        raise FieldError(field, f"{name!r} is not in the domain file; allowed: {', '.join(known) or 'none is defined'}")
    return name


def _column(domain: Domain, field: str, name: str, values: Sequence[Value]) -> Column:
    """One feature's values as the client takes them; null is missing. Raises FieldError."""
    feature = domain.features[_named(field, name, domain.features)]
    if feature.kind == "number":
        return [_one(field, i, value, float, math.nan, "a number") for i, value in enumerate(values)]
    if feature.kind == "category":
        return [_one(field, i, value, str, "", "a text") for i, value in enumerate(values)]
    if feature.kind == "weighted_list":
        return [_one(field, i, value, dict, {}, "an object of text and weight") for i, value in enumerate(values)]
    if feature.kind == "vector":
        missing = [math.nan] * feature.dimension
        vectors = [_one(field, i, value, list, missing, f"a list of {feature.dimension} numbers") for i, value in enumerate(values)]
        for i, vector in enumerate(vectors):
            if len(vector) != feature.dimension or any(isinstance(one, str) for one in vector):
                raise FieldError(f"{field}[{i}]", f"must be a list of {feature.dimension} numbers, or null for a missing one")
        return vectors
    lists = [_one(field, i, value, list, [], "a list of texts") for i, value in enumerate(values)]
    for i, each in enumerate(lists):
        if not all(isinstance(one, str) for one in each):
            raise FieldError(f"{field}[{i}]", "must be a list of texts, or null for a missing one")
    return lists


def _one(field: str, i: int, value: Value, kind: type[T], missing: T, what: str) -> T:
    if value is None:
        return missing
    if not isinstance(value, kind):
        raise FieldError(f"{field}[{i}]", f"must be {what}, or null for a missing one")
    return value

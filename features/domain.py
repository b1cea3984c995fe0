"""The domain file: everything that differs from one product to the next, in one TOML file.

`load_domain` validates it and raises `DomainError`, which names the file, the key and what is allowed. The parts are versioned apart: a
sequence's fingerprint is part of the state, a ranker's tensors are part of a release, the log part is only about one published log.
"""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DAY_MS = 24 * 3600 * 1000
LAW_VERSION = 1
"""Changes when the same records and definition would give another state."""
EVICTION_VERSION = 2
"""The same for sequences that evict. 2: a row whose events are all evicted by the log's clock is read as none (`sequence.as_read`)."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Number8 = Annotated[int, Field(ge=1, le=255)]
Encoding = Literal["json", "schema_registry"]
ENCODINGS: tuple[Encoding, ...] = ("json", "schema_registry")
"""What a record may be encoded in beside plain protobuf, where the domain file says so (`features.encodings`)."""


WEIGHTS_SUFFIX = "__weights"
"""A weighted list's weights stand in the feature tables under its name with this behind it."""


class DomainError(ValueError):
    """A domain file that cannot be used; the message names file, key and what is allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}; allowed: {', '.join(sorted(cls.model_fields))}")
        return value


class Action(_Part):
    """One kind of action. Its id is never renumbered; 0 is padding."""

    id: Number8
    kind: Literal["positive", "negative", "impression"]
    retracts: Name | None = None
    """Action that this one takes back (unlike retracts like): `pack()` leaves out both."""


class Sequence(_Part):
    """What the store keeps of each user."""

    id: Number8
    version: int = 1
    length: Annotated[int, Field(ge=1, le=1000)] = 100
    caps: dict[Name, Annotated[int, Field(ge=1)]] = {}
    """Most events of an action, applied before the cut to `length`."""
    age_days_max: Annotated[float, Field(gt=0)] = 90.0
    """`pack()` hides events older than this at request time."""
    evict: Literal["off", "log_clock"] = "off"
    """log_clock: events older than age_days_max + evict_grace_days by the partition's greatest append time leave the store.
    Off for historic logs."""
    evict_grace_days: Annotated[float, Field(ge=0)] = 1.0

    @property
    def age_ms_max(self) -> int:
        """Maximum age in milliseconds."""
        return int(self.age_days_max * DAY_MS)

    @property
    def evict_age_ms(self) -> int | None:
        """Age by the log's clock at which events leave the store; None: never."""
        return None if self.evict == "off" else int((self.age_days_max + self.evict_grace_days) * DAY_MS)


class Counter(_Part):
    """A number of a candidate that the importer counts from what the log had before the request: the item's actions, or a smoothed rate.

    With `rate_of` the value is (count of action + prior * p) / (count of rate_of + prior), where p is the share of all items together,
    from everything the log had before the request: an item without history has the rate that an item has.
    """

    action: Name
    window_ms: Annotated[int, Field(ge=1)] | None = None
    """Actions appended in [request time - window_ms, request time) count; all before it where absent."""
    rate_of: Name | None = None
    prior: Annotated[float, Field(ge=0)] = 20.0
    """rate_of: how many of its actions the share of all items weighs."""
    age: bool = False
    """Instead of a count: milliseconds since the item's first such action before the request, missing where there is none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.age and (self.window_ms is not None or self.rate_of is not None):
            raise ValueError("age: the time since the first action has neither window_ms nor rate_of")
        return self


class Feature(_Part):
    """One input of the model beside the sequence."""

    side: Literal["user", "item", "request", "candidate"]
    kind: Literal["number", "category", "list", "vector", "weighted_list"]
    """vector: `dimension` numbers, taken as they are; weighted_list: a list whose values each have a weight, 0 or more."""
    column: str | None = None
    """Column of the published file; the feature's name where absent."""
    normalise: Literal["none", "standard", "log"] = "standard"
    """number: standard = (x - mean) / std; log = the same of log1p(max(x, 0)). Fitted on the training part, applied in the model."""
    missing: float = -1.0
    """number: the normalised value that stands for a missing input; not 0."""
    vocabulary: tuple[str, ...] | None = None
    hash_buckets: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    dimension: Annotated[int, Field(ge=1, le=256)] = 8
    """category and lists: width of the learned embedding; vector: how many numbers it has."""
    length_max: Annotated[int, Field(ge=1, le=64)] = 4
    """lists: values beyond are cut."""
    separator: str = ","
    """lists and vectors: between values in a published file."""
    weight_separator: Annotated[str, Field(min_length=1)] = ":"
    """weighted_list: between a value and its weight in a published file."""
    counter: Counter | None = None
    """number of a candidate: the importer counts it, no column has it. In serving the caller brings it along."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.counter is not None and (self.kind != "number" or self.side != "candidate" or self.column is not None):
            raise ValueError("a counter is a number of side candidate without a column")
        if self.kind == "number":
            if self.missing == 0:
                raise ValueError("missing must not be 0: a missing value has to differ from an average one")
            if self.vocabulary is not None or self.hash_buckets is not None:
                raise ValueError("a number has neither vocabulary nor hash_buckets")
        elif self.kind == "vector":
            if self.vocabulary is not None or self.hash_buckets is not None:
                raise ValueError("a vector has neither vocabulary nor hash_buckets")
            if "dimension" not in self.model_fields_set:
                raise ValueError("a vector needs dimension, the number of its values")
        elif (self.vocabulary is None) == (self.hash_buckets is None):
            raise ValueError(f"a {self.kind} needs either vocabulary or hash_buckets")
        _once("vocabulary", self.vocabulary or ())
        return self

    @property
    def cardinality(self) -> int:
        """category and lists: number of codes; 0 is missing, 1 is a value outside of the vocabulary (unused with hashing)."""
        return 2 + (len(self.vocabulary) if self.vocabulary is not None else self.hash_buckets or 0)


class Head(_Part):
    """One output of a ranker: the probability of its label."""

    actions: tuple[Name, ...] = Field(min_length=1)
    """The label is 1 if any of these actions answered the impression."""
    weights: dict[Name, float] = {}
    """Row of the label weight matrix M: an example weighs sum over its actions of weights[action] (1.0 where absent for the label)."""
    base_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of an example without any action, which the paper's formula would never train on."""
    utility: float = 1.0
    """Weight of this head in the final score; negative for heads of negative actions."""


class ModelSettings(_Part):
    """Sizes and form of a ranker's model. As it stands: the TransAct hybrid ranker (KDD 2023, section 3)."""

    action_dimension: Annotated[int, Field(ge=1, le=256)] = 32
    layers: Annotated[int, Field(ge=1, le=12)] = 2
    attention_heads: Annotated[int, Field(ge=1, le=16)] = 1
    feedforward: Annotated[int, Field(ge=1, le=4096)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    first_k: Annotated[int, Field(ge=1, le=100)] = 10
    time_window_hours_max: Annotated[float, Field(ge=0)] = 24.0
    cross_layers: Annotated[int, Field(ge=0, le=8)] = 2
    cross_rank: Annotated[int, Field(ge=0, le=4096)] = 0
    """0: full rank."""
    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=8192)], ...], Field(min_length=1)] = (256, 64)
    encoder: Literal["transformer", "none", "average", "bst", "cnn", "rnn", "lstm"] = "transformer"
    """What reads the sequence (`inference.encoders`); none: nothing does."""
    fusion: Literal["concatenate", "token"] = "concatenate"
    """How the candidate meets the sequence: beside every action, or as one more token."""
    output: Literal["both", "first", "pool"] = "both"
    """What is kept of the encoder's tokens: the `first_k` newest, the maximum over all, or both."""
    action_types: bool = True
    """Whether the model sees which action each one was."""
    user_embedding: bool = True
    """Whether the model uses the batch user embedding, where the ranker has a `user_space`."""
    similarities: bool = False
    """Whether cosines of the candidate's vector with the user's and the sequence's are inputs too (`inference.similarities`)."""
    interaction: Literal["cross", "transformer"] = "cross"
    """cross: DCN v2. transformer: each feature is a token of `token_dimension`, in `cross_layers` layers (`inference.end_to_end`)."""
    token_dimension: Annotated[int, Field(ge=1, le=1024)] = 64
    position_max: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Places of a list that training tells apart, the last one stands for all behind it; 0: the place is no feature."""
    position_served: Annotated[int, Field(ge=0)] = 0
    """The place, from 0, at which every candidate is scored outside of training."""
    calibration: Literal["none", "platt", "isotonic"] = "none"
    """How each head's probabilities are corrected, fitted on the validation part (`inference.calibration`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoder in ("none", "average", "bst") and (self.fusion, self.output) != ("concatenate", "both"):
            raise ValueError(f"encoder {self.encoder!r} has neither fusion nor output: leave both out")
        if self.position_served >= max(1, self.position_max):
            raise ValueError(f"position_served: below position_max, {self.position_max}")
        if self.interaction == "transformer" and (not self.cross_layers or self.token_dimension % self.attention_heads):
            raise ValueError("interaction 'transformer' needs cross_layers of 1 or more and a token_dimension that attention_heads divides")
        return self

    @property
    def left_out(self) -> set[str]:
        """Keys younger than the first releases that stand at their defaults: they are no part of a fingerprint, so older ones hold."""
        return {name for name, key in type(self).model_fields.items() if name not in _FIRST_KEYS and getattr(self, name) == key.default}


_FIRST_KEYS = {"action_dimension", "layers", "attention_heads", "feedforward", "dropout", "first_k", "time_window_hours_max"}
_FIRST_KEYS |= {"cross_layers", "cross_rank", "hidden"}


class Refresh(_Part):
    """How item vectors are kept fresh: made anew every `every_ms` from the positive actions of `window_ms` before, in one lineage."""

    every_ms: Annotated[int, Field(ge=60_000)] = 3_600_000
    window_ms: Annotated[int, Field(ge=60_000)] = 3 * DAY_MS


class Ranker(_Part):
    """One model over the shared state: home, search, related."""

    version: int = 1
    sequence: Name
    sequence_length: Annotated[int, Field(ge=1, le=1000)] = 100
    sequence_actions: tuple[Name, ...] | None = None
    """Actions that the model sees; all known ones where absent."""
    sequence_attributes: tuple[Literal["surface", "value"], ...] = ()
    surfaces: tuple[Name, ...] | None = None
    """Surfaces whose impressions train this ranker; all where absent."""
    heads: dict[Name, Head] = Field(min_length=1)
    features: tuple[Name, ...] = ()
    item_space: Name
    user_space: Name | None = None
    embedding_dimension: Annotated[int, Field(ge=1, le=1024)] = 32
    refresh: Refresh | None = None
    """Items that come and go within days need new vectors all the time (`inference.refreshed`); absent: one training's."""
    candidates_max: Annotated[int, Field(ge=1, le=10_000)] = 1000
    score: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Final score as a formula over heads and number features (`inference.formula`); the sum of utility x head where absent."""
    model: ModelSettings = ModelSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        _once("features", self.features)
        _once("sequence_attributes", self.sequence_attributes)
        if self.model.similarities and self.refresh is None:
            raise ValueError("model.similarities needs refresh: vectors of the whole training part know answers of it")
        return self


class Rule(_Part):
    """Rows of a published log that are an action: all rows, or those whose `column` is one of `equals` or reaches `at_least`."""

    action: Name
    column: str | None = None
    equals: tuple[str, ...] | None = None
    """Texts of the column that mean this action; absent: "1", "1.0", "true" and "True"."""
    at_least: float | None = None
    """Least number of the column that means this action (a rating of 4 or more)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.column is None and (self.equals is not None or self.at_least is not None):
            raise ValueError("equals and at_least need a column; without a column every row is this action")
        if self.equals is not None and self.at_least is not None:
            raise ValueError("either equals or at_least, not both")
        return self


class Source(_Part):
    """A file set with one row for each user or item, keyed by `id`."""

    files: tuple[str, ...] = Field(min_length=1)
    id: str
    ids: Literal["integer", "string"] = "integer"
    format: Literal["csv", "parquet"] | None = None
    """The log's format where absent."""
    separator: str | None = None
    """The log's separator where absent."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of a CSV file without a header line."""


class Negatives(_Part):
    """Requests of a log that has only what was clicked: the item clicked among items drawn from what was clicked shortly before."""

    action: Name
    """Each of these actions becomes a request whose candidates are its item and the drawn ones."""
    uniform: Annotated[int, Field(ge=0, le=1000)] = 0
    """Items drawn with the same chance each, of the distinct ones in the window."""
    popular: Annotated[int, Field(ge=0, le=1000)] = 0
    """Items drawn with the chance of their share of the window's actions."""
    window_ms: Annotated[int, Field(ge=1)] = DAY_MS
    """The window: actions appended in [request time - window_ms, request time)."""
    repeats: bool = False
    """False: an item that the user acted on before is no candidate, neither drawn nor clicked. True: it may be either."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the actions that become requests, chosen by a hash; the others are actions as well, in sequences and counters."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.uniform + self.popular:
            raise ValueError("uniform, popular: at least one negative of either")
        return self


class Log(_Part):
    """How a published log is read. Every row is one event on one item, or one request with a list of candidates."""

    version: int = 1
    files: tuple[str, ...] = Field(min_length=1)
    """Glob patterns inside the data folder; a pattern also finds the same name with .gz."""
    format: Literal["csv", "parquet"] = "csv"
    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    columns: tuple[str, ...] | None = None
    """Names of the columns of a CSV file without a header line."""
    time_unit: Literal["s", "ms", "us", "iso8601"] = "ms"
    user: str
    user_ids: Literal["integer", "string"] = "integer"
    entity: str
    entity_ids: Literal["integer", "string"] = "integer"
    entity_kind: Name
    entity_kind_column: str | None = None
    """Column with the entity kind's name, where one log has several; entity_kind where it is empty."""
    time: str | None = None
    time_parts: Annotated[tuple[str, ...], Field(max_length=6)] = ()
    """Instead of `time`: columns of year, month and day, or of these and hour, minute, second (UTC). Without either the order of the rows
    counts: each is a second after the one before it, and no age or window means anything."""
    append_time: str | None = None
    """Column with the time at which the log got the row; the event time where absent."""
    event_id: str | None = None
    """Column with an identity of the event; derived where absent."""
    event_ids: Literal["integer", "string"] = "integer"
    request: str | None = None
    """Column with the request's id (text or integer: always hashed, with the user); where absent, `request_gap_ms` makes requests."""
    request_gap_ms: Annotated[int, Field(ge=1)] = 30 * 60 * 1000
    """A user's impressions with gaps shorter than this are one request. Without a request column it is also how long after its impression
    an action of another row still answers it."""
    position: str | None = None
    candidates: str | None = None
    """Column with the list of candidates shown, where one row is one request; `entity` is then the item acted on (may be empty)."""
    candidates_separator: str = " "
    surface: str | None = None
    """Column whose text is a surface's name or number, or a text that `surfaces` maps."""
    surfaces: dict[str, Name] = {}
    """Name of the surface by the text of the surface column, where the log calls them otherwise."""
    value: str | None = None
    actions: tuple[Rule, ...] = Field(min_length=1, max_length=64)
    """Which value means which action; one row may be several."""
    negatives: Negatives | None = None
    """For a log without impressions: draws what might have been shown (`streams.negatives`)."""
    items: dict[Name, Source] = {}
    """Item features by entity kind."""
    users: Source | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.time_parts and (self.time is not None or len(self.time_parts) < 3):
            raise ValueError("time_parts: columns of year, month, day and so on, where there is no time")
        if self.candidates is not None and self.position is not None:
            raise ValueError("position: a list of candidates is its own order; leave out position or candidates")
        if self.candidates is not None and self.negatives is not None:
            raise ValueError("negatives: a log with candidates has what was shown; leave out negatives or candidates")
        if self.surfaces and self.surface is None:
            raise ValueError("surfaces: needs surface, the column whose texts they are")
        return self


class Domain(_Part):
    """A product. See docs/domain.md for every key."""

    name: Name
    version: int = 1
    future_tolerance_ms: Annotated[int, Field(ge=0, le=DAY_MS)] = 600_000
    """An event time further ahead of its append time is a dead letter."""
    encodings: tuple[Encoding, ...] = ()
    """What records are read in beside plain protobuf; anything else is a dead letter."""
    entities: dict[Name, Number8] = Field(min_length=1)
    surfaces: dict[Name, Annotated[int, Field(ge=1, le=65535)]] = {}
    actions: dict[Name, Action] = Field(min_length=1)
    sequence: dict[Name, Sequence] = Field(min_length=1)
    features: dict[Name, Feature] = {}
    ranker: dict[Name, Ranker] = Field(min_length=1)
    log: Log | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _once("encodings", self.encodings)
        for table, ids in (
            ("entities", list(self.entities.values())),
            ("surfaces", list(self.surfaces.values())),
            ("actions", [action.id for action in self.actions.values()]),
            ("sequence", [sequence.id for sequence in self.sequence.values()]),
        ):
            twice = {number for number in ids if ids.count(number) > 1}
            if twice:
                raise ValueError(f"{table}: number {min(twice)} is used twice")
        for name, action in self.actions.items():
            if action.retracts is None:
                continue
            self._known(f"actions.{name}.retracts", [action.retracts], self.actions)
            if action.retracts == name or self.actions[action.retracts].retracts:
                raise ValueError(f"actions.{name}.retracts: allowed is another action that retracts nothing itself")
        for name, sequence in self.sequence.items():
            self._known(f"sequence.{name}.caps", sequence.caps, self.actions)
            retracting = [action for action in sequence.caps if self.actions[action].retracts]
            if retracting:  # its cut would bring back what it took back
                raise ValueError(f"sequence.{name}.caps.{retracting[0]}: an action that retracts has no cap")
            if sequence.evict_age_ms is not None and sequence.evict_grace_days * DAY_MS < self.future_tolerance_ms:
                raise ValueError(
                    f"sequence.{name}.evict_grace_days: at least future_tolerance_ms, {self.future_tolerance_ms / DAY_MS:.3f} days"
                )
        for name, ranker in self.ranker.items():
            key = f"ranker.{name}"
            self._known(f"{key}.sequence", [ranker.sequence], self.sequence)
            self._known(f"{key}.features", ranker.features, self.features)
            self._known(f"{key}.sequence_actions", ranker.sequence_actions or (), self.actions)
            self._known(f"{key}.surfaces", ranker.surfaces or (), self.surfaces)
            for head_name, head in ranker.heads.items():
                self._known(f"{key}.heads.{head_name}.actions", head.actions, self.actions)
                self._known(f"{key}.heads.{head_name}.weights", head.weights, self.actions)
            if ranker.sequence_length > self.sequence[ranker.sequence].length:
                raise ValueError(f"{key}.sequence_length: at most the sequence's length {self.sequence[ranker.sequence].length}")
        for name, feature in self.features.items():
            if name.endswith(WEIGHTS_SUFFIX) or (feature.kind == "weighted_list" and len(name) > 40 - len(WEIGHTS_SUFFIX)):
                raise ValueError(
                    f"features.{name}: allowed are names that do not end with {WEIGHTS_SUFFIX}; of a weighted_list up to 31 characters"
                )
            if (counter := feature.counter) is not None:
                self._known(f"features.{name}.counter", [counter.action, *([counter.rate_of] if counter.rate_of else [])], self.actions)
        if self.log is not None:
            self._check_negatives(self.log)
            self._known("log.entity_kind", [self.log.entity_kind], self.entities)
            self._known("log.actions", [rule.action for rule in self.log.actions], self.actions)
            self._known("log.items", self.log.items, self.entities)
            self._known("log.surfaces", self.log.surfaces.values(), self.surfaces)
        return self

    def _check_negatives(self, log: Log) -> None:
        if log.negatives is None:
            return
        self._known("log.negatives.action", [log.negatives.action], self.actions)
        if shown := [rule.action for rule in log.actions if rule.action in self.actions and self.actions[rule.action].kind == "impression"]:
            raise ValueError(f"log.negatives: the log says what was shown ({shown[0]}); leave out negatives or that rule")
        if log.negatives.action not in {rule.action for rule in log.actions}:
            raise ValueError(f"log.negatives.action: no rule of log.actions gives {log.negatives.action!r}")
        for name, feature in self.features.items():
            if feature.side == "candidate" and feature.counter is None:
                raise ValueError(
                    f"features.{name}: a drawn candidate has no column; with log.negatives only counters are of side candidate"
                )

    @staticmethod
    def _known(key: str, names: Any, table: dict[str, Any]) -> None:
        for name in names:
            if name not in table:
                raise ValueError(f"{key}: {name!r} is not defined; allowed: {', '.join(sorted(table))}")

    def sequence_fingerprint(self, name: str) -> int:
        """Identity of what the store keeps (length, caps, eviction, tolerance, encodings): part of the state and of every row. Never 0."""
        sequence = self.sequence[name]
        caps = {self.actions[action].id: cap for action, cap in sorted(sequence.caps.items())}
        parts = {
            "id": sequence.id,
            "length": sequence.length,
            "caps": caps,
            "evict_age_ms": sequence.evict_age_ms,
            "future_tolerance_ms": self.future_tolerance_ms,
            "law": LAW_VERSION,
        }
        if sequence.evict_age_ms is not None:
            parts["eviction"] = EVICTION_VERSION
        if self.encodings:  # the default is left out: states older than this option have it
            parts["encodings"] = sorted(self.encodings)
        return _fingerprint(parts)

    def action_names(self) -> dict[int, str]:
        """Name of each action id."""
        return {action.id: name for name, action in self.actions.items()}

    def seen_actions(self, ranker_name: str) -> dict[str, Action]:
        """The actions that a ranker's model sees, by name."""
        names = self.ranker[ranker_name].sequence_actions
        return self.actions if names is None else {name: self.actions[name] for name in names}

    @property
    def draws_negatives(self) -> bool:
        """Whether an import draws candidates."""
        return self.log is not None and self.log.negatives is not None

    def ranker_name(self, given: str | None) -> str:
        """The ranker that a command means: the one given, or the file's first. Raises ValueError naming the allowed ones."""
        if given is None:
            return next(iter(self.ranker))
        if given not in self.ranker:
            raise ValueError(f"ranker: {given!r} is not defined; allowed: {', '.join(self.ranker)}")
        return given


def _once(key: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{key}: {name!r} is there twice; allowed: each once")
        seen.add(name)


def _fingerprint(value: Any) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(value, sort_keys=True).encode()) or 1


def load_domain(path: str | Path) -> Domain:
    """Reads and validates a domain file.

    Raises:
        DomainError: naming the file, each wrong key and what is allowed there.
    """
    path = Path(path)
    try:
        return parse_domain(path.read_text("utf-8"), source=str(path))
    except OSError as error:
        raise DomainError(f"{path}: cannot be read: {error.strerror}") from error


def parse_domain(text: str, *, source: str) -> Domain:
    """`load_domain` of a text; `source` names it in errors."""
    try:
        return Domain.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise DomainError(f"{source}: not valid TOML: {error}") from error
    except ValidationError as error:
        raise DomainError("\n".join(f"{source}: {_explain(dict(item))}" for item in error.errors())) from error


def _explain(item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"] if part != "[key]") or "domain"
    if item["type"] == "missing":
        return f"{key}: is missing and has no default"
    message = item["msg"].removeprefix("Value error, ")
    found = item["input"]
    return f"{key}: {message}" if isinstance(found, dict | list | tuple) else f"{key}: {message}; found {found!r}"

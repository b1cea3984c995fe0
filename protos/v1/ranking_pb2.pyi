from protos.v1 import actions_pb2 as _actions_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SequenceSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEQUENCE_SOURCE_UNSPECIFIED: _ClassVar[SequenceSource]
    SEQUENCE_SOURCE_LOCAL: _ClassVar[SequenceSource]
    SEQUENCE_SOURCE_OWNER: _ClassVar[SequenceSource]
    SEQUENCE_SOURCE_OLDER: _ClassVar[SequenceSource]
    SEQUENCE_SOURCE_NONE: _ClassVar[SequenceSource]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_MODEL: _ClassVar[Tier]
    TIER_EMBEDDING: _ClassVar[Tier]
    TIER_CALLER_ORDER: _ClassVar[Tier]
    TIER_FEWER: _ClassVar[Tier]
    TIER_SMALL: _ClassVar[Tier]
    TIER_POPULARITY: _ClassVar[Tier]
SEQUENCE_SOURCE_UNSPECIFIED: SequenceSource
SEQUENCE_SOURCE_LOCAL: SequenceSource
SEQUENCE_SOURCE_OWNER: SequenceSource
SEQUENCE_SOURCE_OLDER: SequenceSource
SEQUENCE_SOURCE_NONE: SequenceSource
TIER_UNSPECIFIED: Tier
TIER_MODEL: Tier
TIER_EMBEDDING: Tier
TIER_CALLER_ORDER: Tier
TIER_FEWER: Tier
TIER_SMALL: Tier
TIER_POPULARITY: Tier

class RankRequest(_message.Message):
    __slots__ = ("ranker", "user_id", "identities", "candidate_ids", "candidate_kinds", "candidate_kind", "candidate_features", "request_features", "head_weights", "request_time_ms", "after", "request_id", "tier", "score_formula")
    class CandidateFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: FeatureColumn
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[FeatureColumn, _Mapping]] = ...) -> None: ...
    class RequestFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: FeatureColumn
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[FeatureColumn, _Mapping]] = ...) -> None: ...
    class HeadWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RANKER_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_KINDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_KIND_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FEATURES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FEATURES_FIELD_NUMBER: _ClassVar[int]
    HEAD_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FORMULA_FIELD_NUMBER: _ClassVar[int]
    ranker: str
    user_id: int
    identities: _containers.RepeatedScalarFieldContainer[int]
    candidate_ids: bytes
    candidate_kinds: bytes
    candidate_kind: int
    candidate_features: _containers.MessageMap[str, FeatureColumn]
    request_features: _containers.MessageMap[str, FeatureColumn]
    head_weights: _containers.ScalarMap[str, float]
    request_time_ms: int
    after: _containers.RepeatedCompositeFieldContainer[_actions_pb2.Position]
    request_id: int
    tier: Tier
    score_formula: str
    def __init__(self, ranker: _Optional[str] = ..., user_id: _Optional[int] = ..., identities: _Optional[_Iterable[int]] = ..., candidate_ids: _Optional[bytes] = ..., candidate_kinds: _Optional[bytes] = ..., candidate_kind: _Optional[int] = ..., candidate_features: _Optional[_Mapping[str, FeatureColumn]] = ..., request_features: _Optional[_Mapping[str, FeatureColumn]] = ..., head_weights: _Optional[_Mapping[str, float]] = ..., request_time_ms: _Optional[int] = ..., after: _Optional[_Iterable[_Union[_actions_pb2.Position, _Mapping]]] = ..., request_id: _Optional[int] = ..., tier: _Optional[_Union[Tier, str]] = ..., score_formula: _Optional[str] = ...) -> None: ...

class FeatureColumn(_message.Message):
    __slots__ = ("number", "category", "list_length")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    LIST_LENGTH_FIELD_NUMBER: _ClassVar[int]
    number: bytes
    category: bytes
    list_length: bytes
    def __init__(self, number: _Optional[bytes] = ..., category: _Optional[bytes] = ..., list_length: _Optional[bytes] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("request_id", "ranked_ids", "ranked_kinds", "scores", "head_scores", "tier", "release_id", "generations", "watermark", "sequence_age_ms", "sequence_count", "after_reached", "cold_start", "score_formula", "sequence_source", "state_age_ms", "experiment", "arm")
    class HeadScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class GenerationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RANKED_IDS_FIELD_NUMBER: _ClassVar[int]
    RANKED_KINDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    HEAD_SCORES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    AFTER_REACHED_FIELD_NUMBER: _ClassVar[int]
    COLD_START_FIELD_NUMBER: _ClassVar[int]
    SCORE_FORMULA_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    STATE_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    ranked_ids: bytes
    ranked_kinds: bytes
    scores: bytes
    head_scores: _containers.ScalarMap[str, bytes]
    tier: Tier
    release_id: str
    generations: _containers.ScalarMap[str, str]
    watermark: _containers.RepeatedCompositeFieldContainer[_actions_pb2.Position]
    sequence_age_ms: int
    sequence_count: int
    after_reached: bool
    cold_start: bool
    score_formula: str
    sequence_source: SequenceSource
    state_age_ms: int
    experiment: str
    arm: str
    def __init__(self, request_id: _Optional[int] = ..., ranked_ids: _Optional[bytes] = ..., ranked_kinds: _Optional[bytes] = ..., scores: _Optional[bytes] = ..., head_scores: _Optional[_Mapping[str, bytes]] = ..., tier: _Optional[_Union[Tier, str]] = ..., release_id: _Optional[str] = ..., generations: _Optional[_Mapping[str, str]] = ..., watermark: _Optional[_Iterable[_Union[_actions_pb2.Position, _Mapping]]] = ..., sequence_age_ms: _Optional[int] = ..., sequence_count: _Optional[int] = ..., after_reached: _Optional[bool] = ..., cold_start: _Optional[bool] = ..., score_formula: _Optional[str] = ..., sequence_source: _Optional[_Union[SequenceSource, str]] = ..., state_age_ms: _Optional[int] = ..., experiment: _Optional[str] = ..., arm: _Optional[str] = ...) -> None: ...

class RankingRecord(_message.Message):
    __slots__ = ("request", "release_id", "generations", "watermark", "tier", "digest", "tensor_digests", "head_scores", "scores", "inline_row", "inline_tensors", "inline", "served_time_ms", "sequence_fingerprint", "row_digest", "after_reached", "score_formula", "sequence_source", "state_age_ms", "inline_identity_rows", "experiment", "arm", "shadow", "latency_us", "shuffle_bound")
    class GenerationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class TensorDigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class HeadScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class InlineTensorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENSOR_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SCORES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    INLINE_ROW_FIELD_NUMBER: _ClassVar[int]
    INLINE_TENSORS_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    SERVED_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ROW_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AFTER_REACHED_FIELD_NUMBER: _ClassVar[int]
    SCORE_FORMULA_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    STATE_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    INLINE_IDENTITY_ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_BOUND_FIELD_NUMBER: _ClassVar[int]
    request: RankRequest
    release_id: str
    generations: _containers.ScalarMap[str, str]
    watermark: _containers.RepeatedCompositeFieldContainer[_actions_pb2.Position]
    tier: Tier
    digest: bytes
    tensor_digests: _containers.ScalarMap[str, int]
    head_scores: _containers.ScalarMap[str, bytes]
    scores: bytes
    inline_row: bytes
    inline_tensors: _containers.ScalarMap[str, bytes]
    inline: bool
    served_time_ms: int
    sequence_fingerprint: int
    row_digest: int
    after_reached: bool
    score_formula: str
    sequence_source: SequenceSource
    state_age_ms: int
    inline_identity_rows: _containers.RepeatedScalarFieldContainer[bytes]
    experiment: str
    arm: str
    shadow: bool
    latency_us: int
    shuffle_bound: int
    def __init__(self, request: _Optional[_Union[RankRequest, _Mapping]] = ..., release_id: _Optional[str] = ..., generations: _Optional[_Mapping[str, str]] = ..., watermark: _Optional[_Iterable[_Union[_actions_pb2.Position, _Mapping]]] = ..., tier: _Optional[_Union[Tier, str]] = ..., digest: _Optional[bytes] = ..., tensor_digests: _Optional[_Mapping[str, int]] = ..., head_scores: _Optional[_Mapping[str, bytes]] = ..., scores: _Optional[bytes] = ..., inline_row: _Optional[bytes] = ..., inline_tensors: _Optional[_Mapping[str, bytes]] = ..., inline: _Optional[bool] = ..., served_time_ms: _Optional[int] = ..., sequence_fingerprint: _Optional[int] = ..., row_digest: _Optional[int] = ..., after_reached: _Optional[bool] = ..., score_formula: _Optional[str] = ..., sequence_source: _Optional[_Union[SequenceSource, str]] = ..., state_age_ms: _Optional[int] = ..., inline_identity_rows: _Optional[_Iterable[bytes]] = ..., experiment: _Optional[str] = ..., arm: _Optional[str] = ..., shadow: _Optional[bool] = ..., latency_us: _Optional[int] = ..., shuffle_bound: _Optional[int] = ...) -> None: ...

class ReleaseAnnouncement(_message.Message):
    __slots__ = ("ranker", "release_id", "generations", "announced_time_ms", "previous")
    class GenerationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RANKER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    ranker: str
    release_id: str
    generations: _containers.ScalarMap[str, str]
    announced_time_ms: int
    previous: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ranker: _Optional[str] = ..., release_id: _Optional[str] = ..., generations: _Optional[_Mapping[str, str]] = ..., announced_time_ms: _Optional[int] = ..., previous: _Optional[_Iterable[str]] = ...) -> None: ...

class FormulaAnnouncement(_message.Message):
    __slots__ = ("ranker", "score_formula", "announced_time_ms")
    RANKER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FORMULA_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    ranker: str
    score_formula: str
    announced_time_ms: int
    def __init__(self, ranker: _Optional[str] = ..., score_formula: _Optional[str] = ..., announced_time_ms: _Optional[int] = ...) -> None: ...

class Experiment(_message.Message):
    __slots__ = ("ranker", "name", "arms", "shadows", "announced_time_ms")
    RANKER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    ranker: str
    name: str
    arms: _containers.RepeatedCompositeFieldContainer[Arm]
    shadows: _containers.RepeatedCompositeFieldContainer[Shadow]
    announced_time_ms: int
    def __init__(self, ranker: _Optional[str] = ..., name: _Optional[str] = ..., arms: _Optional[_Iterable[_Union[Arm, _Mapping]]] = ..., shadows: _Optional[_Iterable[_Union[Shadow, _Mapping]]] = ..., announced_time_ms: _Optional[int] = ...) -> None: ...

class Arm(_message.Message):
    __slots__ = ("name", "share", "release_id", "noop", "shuffle")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NOOP_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    share: int
    release_id: str
    noop: bool
    shuffle: int
    def __init__(self, name: _Optional[str] = ..., share: _Optional[int] = ..., release_id: _Optional[str] = ..., noop: _Optional[bool] = ..., shuffle: _Optional[int] = ...) -> None: ...

class Shadow(_message.Message):
    __slots__ = ("release_id", "share")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    share: int
    def __init__(self, release_id: _Optional[str] = ..., share: _Optional[int] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("response", "actions", "features", "by_model")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    BY_MODEL_FIELD_NUMBER: _ClassVar[int]
    response: RankResponse
    actions: _containers.RepeatedCompositeFieldContainer[ExplainedAction]
    features: _containers.RepeatedCompositeFieldContainer[ExplainedFeature]
    by_model: bool
    def __init__(self, response: _Optional[_Union[RankResponse, _Mapping]] = ..., actions: _Optional[_Iterable[_Union[ExplainedAction, _Mapping]]] = ..., features: _Optional[_Iterable[_Union[ExplainedFeature, _Mapping]]] = ..., by_model: _Optional[bool] = ...) -> None: ...

class ExplainedAction(_message.Message):
    __slots__ = ("action", "kind", "surface", "entity_id", "event_time_ms", "age_ms", "value", "seen", "left_out", "effect", "kendall_tau")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    ENTITY_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    KENDALL_TAU_FIELD_NUMBER: _ClassVar[int]
    action: str
    kind: str
    surface: str
    entity_id: int
    event_time_ms: int
    age_ms: int
    value: float
    seen: bool
    left_out: bool
    effect: bytes
    kendall_tau: float
    def __init__(self, action: _Optional[str] = ..., kind: _Optional[str] = ..., surface: _Optional[str] = ..., entity_id: _Optional[int] = ..., event_time_ms: _Optional[int] = ..., age_ms: _Optional[int] = ..., value: _Optional[float] = ..., seen: _Optional[bool] = ..., left_out: _Optional[bool] = ..., effect: _Optional[bytes] = ..., kendall_tau: _Optional[float] = ...) -> None: ...

class ExplainedFeature(_message.Message):
    __slots__ = ("name", "side", "number", "code", "width")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    side: str
    number: bytes
    code: bytes
    width: int
    def __init__(self, name: _Optional[str] = ..., side: _Optional[str] = ..., number: _Optional[bytes] = ..., code: _Optional[bytes] = ..., width: _Optional[int] = ...) -> None: ...

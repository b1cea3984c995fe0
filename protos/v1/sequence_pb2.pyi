from protos.v1 import actions_pb2 as _actions_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("sequence", "user_id")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    user_id: int
    def __init__(self, sequence: _Optional[str] = ..., user_id: _Optional[int] = ...) -> None: ...

class GetPositionRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    def __init__(self, user_id: _Optional[int] = ...) -> None: ...

class GetSequencesRequest(_message.Message):
    __slots__ = ("sequence", "user_ids", "after", "wait_ms")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    USER_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    user_ids: bytes
    after: _containers.RepeatedCompositeFieldContainer[_actions_pb2.Position]
    wait_ms: int
    def __init__(self, sequence: _Optional[str] = ..., user_ids: _Optional[bytes] = ..., after: _Optional[_Iterable[_Union[_actions_pb2.Position, _Mapping]]] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class GetSequencesResponse(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[UserSequence]
    def __init__(self, sequences: _Optional[_Iterable[_Union[UserSequence, _Mapping]]] = ...) -> None: ...

class UserSequence(_message.Message):
    __slots__ = ("user_id", "row", "watermark", "log_clock_ms", "state_age_ms")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    LOG_CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    row: bytes
    watermark: _actions_pb2.Position
    log_clock_ms: int
    state_age_ms: int
    def __init__(self, user_id: _Optional[int] = ..., row: _Optional[bytes] = ..., watermark: _Optional[_Union[_actions_pb2.Position, _Mapping]] = ..., log_clock_ms: _Optional[int] = ..., state_age_ms: _Optional[int] = ...) -> None: ...

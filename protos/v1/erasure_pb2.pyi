from protos.v1 import actions_pb2 as _actions_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PlaceStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLACE_STATUS_UNSPECIFIED: _ClassVar[PlaceStatus]
    PLACE_STATUS_DONE: _ClassVar[PlaceStatus]
    PLACE_STATUS_DUE: _ClassVar[PlaceStatus]
    PLACE_STATUS_ABSENT: _ClassVar[PlaceStatus]
PLACE_STATUS_UNSPECIFIED: PlaceStatus
PLACE_STATUS_DONE: PlaceStatus
PLACE_STATUS_DUE: PlaceStatus
PLACE_STATUS_ABSENT: PlaceStatus

class EraseRequest(_message.Message):
    __slots__ = ("user_id", "reason", "event_id", "identities")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    reason: str
    event_id: int
    identities: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, user_id: _Optional[int] = ..., reason: _Optional[str] = ..., event_id: _Optional[int] = ..., identities: _Optional[_Iterable[int]] = ...) -> None: ...

class EraseResponse(_message.Message):
    __slots__ = ("position", "event_id", "deadline_ms", "identity_positions")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    position: _actions_pb2.Position
    event_id: int
    deadline_ms: int
    identity_positions: _containers.RepeatedCompositeFieldContainer[_actions_pb2.Position]
    def __init__(self, position: _Optional[_Union[_actions_pb2.Position, _Mapping]] = ..., event_id: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., identity_positions: _Optional[_Iterable[_Union[_actions_pb2.Position, _Mapping]]] = ...) -> None: ...

class ErasureStatusRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    def __init__(self, user_id: _Optional[int] = ...) -> None: ...

class ErasureStatusResponse(_message.Message):
    __slots__ = ("erasures",)
    ERASURES_FIELD_NUMBER: _ClassVar[int]
    erasures: _containers.RepeatedCompositeFieldContainer[ErasureStatus]
    def __init__(self, erasures: _Optional[_Iterable[_Union[ErasureStatus, _Mapping]]] = ...) -> None: ...

class ErasureStatus(_message.Message):
    __slots__ = ("event_id", "reason", "position", "asked_ms", "deadline_ms", "places")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ASKED_MS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    event_id: int
    reason: str
    position: _actions_pb2.Position
    asked_ms: int
    deadline_ms: int
    places: _containers.RepeatedCompositeFieldContainer[ErasurePlace]
    def __init__(self, event_id: _Optional[int] = ..., reason: _Optional[str] = ..., position: _Optional[_Union[_actions_pb2.Position, _Mapping]] = ..., asked_ms: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., places: _Optional[_Iterable[_Union[ErasurePlace, _Mapping]]] = ...) -> None: ...

class ErasurePlace(_message.Message):
    __slots__ = ("name", "status", "at_ms", "detail")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    name: str
    status: PlaceStatus
    at_ms: int
    detail: str
    def __init__(self, name: _Optional[str] = ..., status: _Optional[_Union[PlaceStatus, str]] = ..., at_ms: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

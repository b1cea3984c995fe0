from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Action(_message.Message):
    __slots__ = ("user_id", "entity_id", "event_time_ms", "event_id", "request_id", "entity_kind", "action", "surface", "value", "attributes", "erase")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ENTITY_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENTITY_KIND_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    ERASE_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    entity_id: int
    event_time_ms: int
    event_id: int
    request_id: int
    entity_kind: int
    action: int
    surface: int
    value: float
    attributes: _containers.RepeatedCompositeFieldContainer[Attribute]
    erase: Erase
    def __init__(self, user_id: _Optional[int] = ..., entity_id: _Optional[int] = ..., event_time_ms: _Optional[int] = ..., event_id: _Optional[int] = ..., request_id: _Optional[int] = ..., entity_kind: _Optional[int] = ..., action: _Optional[int] = ..., surface: _Optional[int] = ..., value: _Optional[float] = ..., attributes: _Optional[_Iterable[_Union[Attribute, _Mapping]]] = ..., erase: _Optional[_Union[Erase, _Mapping]] = ...) -> None: ...

class Attribute(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Erase(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class DeadLetter(_message.Message):
    __slots__ = ("reason", "source_topic", "source_partition", "source_offset", "key", "value", "append_time_ms", "broker_time_ms", "log_epoch")
    REASON_FIELD_NUMBER: _ClassVar[int]
    SOURCE_TOPIC_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PARTITION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    APPEND_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    BROKER_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    LOG_EPOCH_FIELD_NUMBER: _ClassVar[int]
    reason: str
    source_topic: str
    source_partition: int
    source_offset: int
    key: bytes
    value: bytes
    append_time_ms: int
    broker_time_ms: int
    log_epoch: int
    def __init__(self, reason: _Optional[str] = ..., source_topic: _Optional[str] = ..., source_partition: _Optional[int] = ..., source_offset: _Optional[int] = ..., key: _Optional[bytes] = ..., value: _Optional[bytes] = ..., append_time_ms: _Optional[int] = ..., broker_time_ms: _Optional[int] = ..., log_epoch: _Optional[int] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("log_epoch", "partition", "offset")
    LOG_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    log_epoch: int
    partition: int
    offset: int
    def __init__(self, log_epoch: _Optional[int] = ..., partition: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

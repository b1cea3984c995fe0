from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StateRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_ROLE_UNSPECIFIED: _ClassVar[StateRole]
    STATE_ROLE_OWNER: _ClassVar[StateRole]
    STATE_ROLE_STANDBY: _ClassVar[StateRole]
    STATE_ROLE_FORMER: _ClassVar[StateRole]
STATE_ROLE_UNSPECIFIED: StateRole
STATE_ROLE_OWNER: StateRole
STATE_ROLE_STANDBY: StateRole
STATE_ROLE_FORMER: StateRole

class StateAnnouncement(_message.Message):
    __slots__ = ("partition", "address", "log_epoch", "role", "announced_time_ms")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LOG_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    partition: int
    address: str
    log_epoch: int
    role: StateRole
    announced_time_ms: int
    def __init__(self, partition: _Optional[int] = ..., address: _Optional[str] = ..., log_epoch: _Optional[int] = ..., role: _Optional[_Union[StateRole, str]] = ..., announced_time_ms: _Optional[int] = ...) -> None: ...

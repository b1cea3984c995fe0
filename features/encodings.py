"""The encodings of an action's record: what each looks like, and how it is read.

Plain protobuf is always read. The domain file's `encodings` adds JSON (protobuf's own mapping of freshrank.v1.Action) and the framing of
Confluent's Schema Registry: a 0, four bytes of schema id, the message's indexes, then protobuf. The first byte tells them apart: no
protobuf message begins with 0, and no Action with "{". What a record means depends on its bytes and these options alone.
"""

import json
from collections.abc import Collection

from google.protobuf.json_format import Parse, ParseError
from google.protobuf.message import DecodeError

from features.domain import ENCODINGS, Encoding
from protos.v1.actions_pb2 import Action

FRAME = 0
"""First byte of a framed record."""
FRAME_BYTES = 6
"""Length of the frame of a file's first message: its indexes are the single byte 0."""
_JSON, _SCHEMA_ID_BYTES = ord("{"), 4
_BRACKETS_MAX = 200
"""Most opening brackets in JSON. How deep a parser can go depends on the machine, and a verdict must not."""
_INDEXES_MAX = 16
_VARINT_BYTES_MAX = 5
_WHY_MAX = 200


def read_action(value: bytes, encodings: Collection[Encoding] = ENCODINGS) -> Action | str:
    """The message of a record in plain protobuf or one of `encodings`; or why it is none."""
    first = value[0] if value else None
    if first == _JSON and "json" in encodings:
        return _from_json(value)
    hint = ""
    if first == FRAME:
        if "schema_registry" in encodings:
            payload = _unframed(value)
            return payload if isinstance(payload, str) else _from_protobuf(payload, " behind the Schema Registry's frame")
        hint = '; if it is framed for a Schema Registry, add "schema_registry" to encodings in the domain file'
    elif first == _JSON:
        hint = '; if it is JSON, add "json" to encodings in the domain file'
    return _from_protobuf(value, hint)


def _from_protobuf(value: bytes, more: str) -> Action | str:
    try:
        return Action.FromString(value)
    except DecodeError:
        return f"value: not a freshrank.v1.Action{more}"


def _from_json(value: bytes) -> Action | str:
    if value.count(b"{") + value.count(b"[") > _BRACKETS_MAX:
        return f"value: JSON with more than {_BRACKETS_MAX} opening brackets"
    try:
        message = Parse(value, Action(), ignore_unknown_fields=True)
        if message.HasField("erase") and not isinstance(json.loads(value)["erase"], dict):
            return "value: erase must be an object in JSON"  # protobuf's parser takes a text or a list for an empty one
    except (ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:  # all that its parser raises on odd texts
        why = " ".join(str(error).split()).encode("ascii", "backslashreplace").decode()
        return f"value: not the JSON of a freshrank.v1.Action: {why[:_WHY_MAX]}"
    return message


def _unframed(value: bytes) -> bytes | str:
    """The protobuf bytes of a framed record, whatever its schema id and indexes are: registries may have Action anywhere in a file."""
    count, at = _index(value, 1 + _SCHEMA_ID_BYTES)
    for _ in range(min(count, _INDEXES_MAX)):
        found, at = _index(value, at)
        if found < 0:
            count = found
            break
    if not 0 <= count <= _INDEXES_MAX:
        return f"value: not a Schema Registry frame: 0, {_SCHEMA_ID_BYTES} bytes of schema id, then the count of message indexes and each"
    return value[at:]


def _index(value: bytes, at: int) -> tuple[int, int]:
    """(zigzag varint at `at`, where it ends); -1 where there is none."""
    number = 0
    for n, octet in enumerate(value[at : at + _VARINT_BYTES_MAX]):
        number |= (octet & 0x7F) << 7 * n
        if octet < 0x80:
            return (number >> 1) ^ -(number & 1), at + n + 1
    return -1, at

"""Requests that no honest client sends: valid ones, mutated by field, on the wire and as plain bytes.

A seed and a number give one request.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from serving_world import EPOCH, ITEMS, NOW_MS, PRODUCT, VIDEO

from features.ids import partition_of, string_id, user_key
from protos.v1.ranking_pb2 import RankRequest

TOKEN = "the-token-of-the-fuzzed-server"
KINDS = ("valid", "fields", "wire", "bytes", "token")
_WEIGHTS = (1, 4, 3, 2, 0.3)
_INTEGERS = (0, 1, 2, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "home", "related", "price", "hour", "click", "hide", "\0", "../..", "x" * 5_000, "ü€😀", "'; drop", "%s%n{0}", " home")
_WIRE_SIZES = {1: 8, 5: 4}


@dataclass(frozen=True)
class Fuzzed:
    """One call: what was done to it, its bytes, and its bearer token."""

    kind: str
    data: bytes
    token: str


def fuzzed(seed: int, number: int) -> Fuzzed:
    """The request of this number in the run of this seed."""
    draw = random.Random(f"{seed}/{number}")
    (kind,) = draw.choices(KINDS, _WEIGHTS)
    request = valid(draw)
    if kind == "fields":
        for _ in range(draw.randint(1, 4)):
            mutate_field(draw, request)
    data = request.SerializeToString(deterministic=True)
    if kind == "wire":
        data = mutate_wire(draw, data)
    elif kind == "bytes":
        data = mutate_bytes(draw, data, valid(draw).SerializeToString(deterministic=True))
    token = TOKEN if kind != "token" else mutate_text(draw, TOKEN)
    return Fuzzed(kind, data, token)


def valid(draw: random.Random) -> RankRequest:
    """A request that the server must rank."""
    count = draw.choice((1, 2, 3, 10, 30, 300))
    user = draw.choice((7, draw.randint(1, 60), draw.getrandbits(64)))
    items = draw.sample(range(1, ITEMS + 100), count)
    request = RankRequest(ranker="home", user_id=user, candidate_ids=np.array(items, "<u8").tobytes(), request_time_ms=NOW_MS)
    if draw.random() < 0.5:
        request.candidate_kind = draw.choice((VIDEO, PRODUCT))
    else:
        request.candidate_kinds = bytes(draw.choices((VIDEO, PRODUCT), k=count))
    if draw.random() < 0.5:
        request.candidate_features["price"].number = np.array([draw.uniform(0, 100) for _ in range(count)], "<f4").tobytes()
    if draw.random() < 0.5:
        request.request_features["hour"].category = np.array([string_id(draw.choice(("day", "night", "dusk")))], "<u8").tobytes()
    if draw.random() < 0.3:
        request.head_weights["click"] = draw.uniform(-2, 2)
    if draw.random() < 0.3:
        request.after.add(log_epoch=draw.choice((0, EPOCH)), partition=partition_of(user_key(user), 4), offset=draw.randint(0, 10))
    if draw.random() < 0.3:
        request.request_id = draw.getrandbits(64)
    return request


def mutate_field(draw: random.Random, message: Message) -> None:
    """Puts a value of the right type and the wrong kind somewhere into the message, or takes one out."""
    field = draw.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if draw.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        name = draw.choice((*_TEXTS, *value))
        of = field.message_type.fields_by_name["value"]
        if of.message_type is None:
            value[name] = _scalar(draw, of, 0.0)
        else:
            mutate_field(draw, value[name])
        for i in range(draw.choice((0, 0, 0, 50))):
            value.get_or_create(f"more{i}") if of.message_type else value.update({f"more{i}": 1.0})
    elif field.is_repeated:
        for _ in range(draw.choice((1, 2, 70))):
            if field.message_type is None:
                value.append(_scalar(draw, field, 0))
            else:
                mutate_field(draw, value.add())
    else:
        setattr(message, field.name, _scalar(draw, field, value))


def _scalar(draw: random.Random, field: FieldDescriptor, old: Any) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return mutate_bytes(draw, old, old) if field.type == FieldDescriptor.TYPE_BYTES else draw.choice(_TEXTS)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return draw.choice(_FLOATS)
    small = (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_ENUM)
    bits = 32 if field.cpp_type in small else 64
    value = draw.choice((*_INTEGERS, NOW_MS - 86_400_001, draw.getrandbits(64))) % 2**bits
    signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_ENUM)
    return value - 2**bits if signed and value >= 2 ** (bits - 1) else value


def mutate_wire(draw: random.Random, data: bytes) -> bytes:
    """Takes, doubles, moves, nests and mislabels whole fields: what a parser meets and a generated class never writes."""
    parts = [(one.field_number, one.wire_type, one.data) for one in UnknownFieldSet(Empty.FromString(data))]
    for _ in range(draw.randint(1, 4)):
        i = draw.randrange(len(parts) + 1)
        number, wire_type, value = parts[i - 1] if parts else (1, 0, 0)
        change = draw.randrange(7)
        if change == 0 and parts:
            del parts[i - 1]
        elif change == 1:
            parts[i:i] = [(number, wire_type, value)] * draw.choice((1, 3, 100))
        elif change == 2:
            draw.shuffle(parts)
        elif change == 3:
            parts.insert(i, (draw.choice((number, *range(1, 20), 2**29 - 1)), 0, draw.choice(_INTEGERS)))
        elif change == 4:
            parts.insert(i, (number, 2, mutate_bytes(draw, value if isinstance(value, bytes) else b"", data)))
        elif change == 5:
            deep = b""
            for _ in range(draw.choice((2, 50, 300))):
                deep = _field(draw.choice((number, 7, 15)), 2, deep)
            parts.insert(i, (number, 2, deep))
        else:
            parts.insert(i, (number, draw.choice((1, 3, 4, 5, 6, 7)), value))
    return b"".join(_field(*part) for part in parts)


def mutate_bytes(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Flips, cuts, doubles, inserts and splices bytes."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
        change = draw.randrange(7)
        if change == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif change == 1:
            data = data[:at]
        elif change == 2:
            data = data[:at] + data[end:]
        elif change == 3:
            data = data[:end] + data[at:]
        elif change == 4:
            data = data[:at] + draw.randbytes(draw.choice((1, 2, 8, 100))) + data[at:]
        elif change == 5:
            data = data[:at] + other[draw.randrange(len(other) + 1) :]
        else:
            data = data[:at] + draw.choice((b"\xff", b"\0", b"\x80")) * draw.choice((1, 10, 1_000)) + data[end:]
    return data


def mutate_text(draw: random.Random, text: str) -> str:
    """Another text than the one given, of characters that metadata may hold."""
    at = draw.randrange(len(text) + 1)
    more = "".join(map(chr, draw.choices(range(0x20, 0x7F), k=draw.choice((1, 2, 30, 1_000)))))
    changed = draw.choice((text[:at] + more + text[at:], text[:at] + more, more, "", f"{more}.{more}.{more}"))
    return changed if changed.strip() != text else more + text


def _field(number: int, wire_type: int, value: Any) -> bytes:
    tag = _varint(number << 3 | wire_type)
    if wire_type == 0:
        return tag + _varint(value if isinstance(value, int) else len(value))
    if wire_type in _WIRE_SIZES:
        size = _WIRE_SIZES[wire_type]
        return tag + (value % 2 ** (8 * size) if isinstance(value, int) else len(value)).to_bytes(size, "little")
    data = value if isinstance(value, bytes) else b""
    return tag + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))

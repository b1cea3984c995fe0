"""How a person reads and types what the system holds: times with their age, names of the domain file, bytes that could not be decoded."""

import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import typer
from rich.table import Table

from features.domain import Domain
from streams.snapshots import Manifest

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_WIRE_NAMES = {
    1: "user_id",
    2: "entity_id",
    3: "event_time_ms",
    4: "event_id",
    5: "request_id",
    6: "entity_kind",
    7: "action",
    8: "surface",
}
_WIRE_NAMES |= {9: "value", 14: "attribute", 15: "erase"}
_HEX_SHOWN_MAX = 512


def now_ms() -> int:
    """The time, milliseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000_000


def iso(time_ms: int) -> str:
    """A time in UTC to the millisecond; "-" where there is none (0 or below)."""
    if time_ms <= 0:
        return "-"
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{time_ms} ms"


def duration(seconds: float) -> str:
    """A span in its two largest units: 3 d 4 h, 17 m 5 s, 1.2 s, 40 ms."""
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", seconds)
    if seconds < 1:
        return f"{sign}{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{sign}{seconds:.1f} s"
    for large, small, size_s, part_s in (("d", "h", 86_400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size_s:
            return f"{sign}{int(seconds // size_s)} {large} {int(seconds % size_s // part_s)} {small}"
    raise AssertionError(seconds)


def bytes_text(size: float) -> str:
    """A size in its largest unit of 1,024."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def time_text(time_ms: int, now: int) -> str:
    """A time and how long ago it was."""
    if time_ms <= 0:
        return "-"
    age_s = (now - time_ms) / 1000
    return f"{iso(time_ms)} ({duration(age_s)} ago)" if age_s >= 0 else f"{iso(time_ms)} (in {duration(-age_s)})"


def parse_time(text: str, now: int, option: str) -> int:
    """A time as a person types it: ISO 8601 (UTC where it names no zone), milliseconds, or an age such as 90s, 15m, 2h, 3d.

    Raises:
        typer.BadParameter: it is none of them.
    """
    text = text.strip()
    if _AGE.fullmatch(text):
        return now - parse_duration(text, option)
    if text.isdecimal() and len(text) >= 12:
        return int(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time: give 2026-07-01T12:00:00Z, or an age such as 15m, 2h, 3d", param_hint=option
        ) from None
    return int(found.replace(tzinfo=found.tzinfo or UTC).timestamp() * 1000)


def parse_duration(text: str, option: str) -> int:
    """Milliseconds of a number with its unit, as a person types it. Raises typer.BadParameter for `option`."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a number with a unit: 90s, 15m, 2h or 7d", param_hint=option)
    return int(float(found[1]) * _UNITS_S[found[2]] * 1000)


def name_of(known: Mapping[str, int], number: int) -> str:
    """The name of a number of the domain file, with the number behind it; the number alone where the file does not know it."""
    return next((f"{name} ({number})" for name, own in known.items() if own == number), f"unknown ({number})" if number else "-")


def action_names(domain: Domain) -> dict[str, int]:
    """Action ids by name."""
    return {name: action.id for name, action in domain.actions.items()}


def event_fields(domain: Domain, event: npt.NDArray[np.void] | np.void, now: int) -> dict[str, str]:
    """One event (a row of EVENT_DTYPE) in words, by column."""
    value = float(event["value"])
    return {
        "time": time_text(int(event["event_time_ms"]), now),
        "action": name_of(action_names(domain), int(event["action"])),
        "entity": f"{name_of(domain.entities, int(event['entity_kind']))} {int(event['entity_id'])}",
        "surface": name_of(domain.surfaces, int(event["surface"])),
        "value": "-" if np.isnan(value) else f"{value:g}",
        "request": str(int(event["request_id"]) or "-"),
        "event id": f"{int(event['event_id']):016x}",
    }


def value_lines(domain: Domain, value: bytes | None, now: int) -> list[tuple[str, str]]:
    """The value of a record of the actions topic as (what, text), as far as it can be read; what cannot is shown in hexadecimal."""
    if value is None:
        return [("value", "none (a tombstone)")]
    if value.lstrip()[:1] == b"{":
        return [("value (text)", value.decode(errors="replace"))]
    lines: list[tuple[str, str]] = []
    at = 0
    for number, content, end in _wire_fields(value):
        if number not in _WIRE_NAMES:
            break
        lines.append((_WIRE_NAMES[number], _field_text(domain, _WIRE_NAMES[number], content, now)))
        at = end
    if at < len(value):
        rest = value[at:]
        cut = f" ... ({len(rest)} bytes)" if len(rest) > _HEX_SHOWN_MAX else ""
        lines.append(("not readable" if at else "value (hex)", rest[:_HEX_SHOWN_MAX].hex() + cut))
    return lines or [("value", "empty")]


def _field_text(domain: Domain, name: str, content: int | bytes, now: int) -> str:
    if isinstance(content, bytes):
        return content.decode(errors="backslashreplace") if content.isascii() else content.hex()
    if name == "event_time_ms":
        return time_text(content, now)
    known = {"entity_kind": domain.entities, "action": action_names(domain), "surface": domain.surfaces}
    if name in known:
        return name_of(known[name], content)
    if name == "value":
        return f"{np.uint32(content & 0xFFFFFFFF).view(np.float32):g}"
    return f"{content:016x}" if name == "event_id" else str(content)


def _wire_fields(data: bytes) -> Iterator[tuple[int, int | bytes, int]]:
    """(field number, content, end) of each whole field of protobuf's wire format; stops where the bytes stop making sense.

    The generated class reads all or nothing; a person wants to see how far a damaged record was sound.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        content: int | bytes | None = None
        if kind == 0:
            content, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            content, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif kind == 2:
            size, at = _varint(data, at)
            content, at = data[at : at + size], at + size
        if content is None or at > len(data) or tag < 8:
            return
        yield tag >> 3, content, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, offset behind it); the offset is behind the data where it does not end there."""
    number = 0
    for place in range(10):
        if at + place >= len(data):
            break
        octet = data[at + place]
        number |= (octet & 0x7F) << (7 * place)
        if octet < 0x80:
            return number, at + place + 1
    return 0, len(data) + 1


def as_json(value: Any) -> Any:
    """What the JSON encoder does not know, in words: bytes as hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def manifest_table(manifest: Manifest) -> Table:
    """A manifest for a person: where the state stood, when, and what the files are."""
    place = f"{manifest.log_epoch:016x}:{manifest.partition}:{manifest.applied_offset}"
    clock = _time(manifest.log_clock_ms) if manifest.log_clock_ms else "no record yet"
    title = f"snapshot at {place}, taken {_time(manifest.created_ms)}, log clock {clock}"
    if manifest.start_offset:
        title += f", records before offset {manifest.start_offset} missed"
    sequences = ", ".join(f"{number}: {fingerprint:016x}" for number, fingerprint in manifest.fingerprints)
    table = Table("file", "bytes", "object", title=title, caption=f"{manifest.size} bytes; sequences by id and definition: {sequences}")
    for file in manifest.files:
        table.add_row(file.name, str(file.size), file.hash)
    return table


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def metrics_table(metrics: dict[str, Any], title: str) -> Table:
    """Metrics of each head."""
    heads = metrics["heads"]
    names = list(next(iter(heads.values())))
    table = Table("head", *names, title=title)
    for head, figures in heads.items():
        table.add_row(head, *("-" if figures[name] is None else f"{figures[name]:.4f}" for name in names))
    return table

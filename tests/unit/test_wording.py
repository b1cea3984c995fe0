"""What a person reads: times, ages, sizes, and records that are damaged."""

import pytest
import typer
from streams_world import DOMAIN

from deploy.wording import bytes_text, duration, iso, name_of, parse_time, time_text, value_lines
from features.actions import encode_action, encode_erase

NOW = 1_780_000_000_000


def test_times_have_their_age():
    assert iso(NOW) == "2026-05-28T20:26:40.000Z"
    assert iso(0) == iso(-1) == "-"
    assert iso(2**62) == f"{2**62} ms"
    assert time_text(NOW - 90_500, NOW) == "2026-05-28T20:25:09.500Z (1 m 30 s ago)"
    assert time_text(NOW + 250, NOW) == "2026-05-28T20:26:40.250Z (in 250 ms)"
    assert [duration(s) for s in (0, 0.04, 1.24, 59.9, 61, 3 * 3600 + 61, 86_400 * 3 + 3600 * 4)] == [
        "0 ms",
        "40 ms",
        "1.2 s",
        "59.9 s",
        "1 m 1 s",
        "3 h 1 m",
        "3 d 4 h",
    ]
    assert [bytes_text(size) for size in (12, 2048, 5 << 20, 3 << 30, 2 << 40)] == ["12 B", "2.0 KB", "5.0 MB", "3.0 GB", "2.0 TB"]


def test_times_are_read_as_ages_or_iso():
    assert parse_time("90s", NOW, "--since") == NOW - 90_000
    assert parse_time("1.5h", NOW, "--since") == NOW - 5_400_000
    assert parse_time(iso(NOW), NOW, "--since") == NOW
    assert parse_time("2026-05-28T22:26:40+02:00", NOW, "--since") == NOW
    assert parse_time("2026-05-28 20:26:40", NOW, "--since") == NOW
    assert parse_time(str(NOW), NOW, "--since") == NOW
    for wrong in ("yesterday", "", "5"):
        with pytest.raises(typer.BadParameter, match="is no time"):
            parse_time(wrong, NOW, "--since")


def test_a_sound_action_is_read_with_its_names():
    value = encode_action(user_id=42, entity_kind=1, entity_id=7, action=2, event_time_ms=NOW, event_id=255, surface=3, value=1.5)
    assert value_lines(DOMAIN, value, NOW + 1000) == [
        ("user_id", "42"),
        ("entity_id", "7"),
        ("event_time_ms", "2026-05-28T20:26:40.000Z (1.0 s ago)"),
        ("event_id", "00000000000000ff"),
        ("request_id", "0"),
        ("entity_kind", "item (1)"),
        ("action", "click (2)"),
        ("surface", "home (3)"),
        ("value", "1.5"),
    ]
    assert ("erase", "0a09636f6d706c61696e74") not in value_lines(DOMAIN, encode_erase(user_id=42, event_id=1, reason="x"), NOW)
    assert name_of(DOMAIN.entities, 9) == "unknown (9)"


def test_a_damaged_value_is_read_up_to_the_damage():
    value = encode_action(user_id=42, entity_kind=1, entity_id=7, action=2, event_time_ms=NOW, event_id=1)
    for cut in range(1, len(value)):
        lines = value_lines(DOMAIN, value[:cut], NOW)
        assert ("user_id", "42") in lines or cut < 9
        rest = [bytes.fromhex(text) for name, text in lines if name in ("not readable", "value (hex)")]
        assert not rest or value[:cut].endswith(rest[0])
    assert value_lines(DOMAIN, b"garbage", NOW) == [("value (hex)", b"garbage".hex())]
    assert value_lines(DOMAIN, b"\xff" * 20, NOW) == [("value (hex)", "ff" * 20)]
    assert value_lines(DOMAIN, b'{"user_id": 1}', NOW) == [("value (text)", '{"user_id": 1}')]
    assert value_lines(DOMAIN, None, NOW) == [("value", "none (a tombstone)")]
    assert value_lines(DOMAIN, b"", NOW) == [("value", "empty")]
    assert value_lines(DOMAIN, b"\xff" * 2000, NOW)[0][1].endswith("... (2000 bytes)")

"""Parity where the log holds actions in JSON and behind Schema Registry framing."""

from google.protobuf.json_format import MessageToJson
from test_replay import DOMAIN, made, make_world, world  # noqa: F401 - fixtures

from protos.v1.actions_pb2 import Action


def test_records_in_every_encoding_are_replayed_byte_for_byte(world, tmp_path):  # noqa: F811
    """The release's domain file says what records may be in, as it did to the worker."""
    plain = world.replay(tmp_path)
    others = {
        partition: [(at_ms, key, other_encoding(value, i % 3)) for i, (at_ms, key, value) in enumerate(records)]
        for partition, records in world.actions.records.items()
    }
    assert sum(value[:1] in (b"{", b"\0") for records in others.values() for *_, value in records) > 500
    root = tmp_path / "encoded"
    encoded = make_world(root, f'encodings = ["json", "schema_registry"]\n{DOMAIN}', others)
    report = encoded.replay(root)
    assert report.ok, report.to_text()
    assert (report.rows_different, report.bytes_different) == (0, 0)
    assert (report.rankings_replayed, report.events_rejected) == (plain.rankings_replayed, plain.events_rejected)
    assert [record.digest for record in encoded.records()] == [record.digest for record in world.records()], "the same was served"


def other_encoding(value, which):
    if which == 0 or value == b"garbage":
        return value
    return MessageToJson(Action.FromString(value)).encode() if which == 1 else b"\0\0\0\0\5\0" + value

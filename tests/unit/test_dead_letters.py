"""Which letters are meant, and what a re-drive would do with them."""

from collections import Counter
from dataclasses import replace

from confluent_kafka import Message
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from streams_world import DOMAIN, DOMAIN_TOML

from deploy.commands_dead import counts_table, letters_table
from features.actions import encode_action, encode_erase
from features.domain import parse_domain
from features.ids import user_key
from protos.v1.actions_pb2 import Action
from streams import dead_letters
from streams.dead_letters import Letter, Redrive, Selection, judge, kind_of
from streams.kafka import KafkaConfig, LogIdentity, Topics

NOW = 1_780_000_000_000
GOOD = encode_action(user_id=42, entity_kind=1, entity_id=7, action=2, event_time_ms=NOW, event_id=1)


def letter(reason="partition: murmur2 of the key says another one", **other) -> Letter:
    fields = {"key": user_key(42), "value": GOOD, "append_time_ms": NOW, "broker_time_ms": NOW, "buried_ms": NOW + 5, "partition": 1}
    return Letter(**{"topic": "actions", "log_epoch": 7, "offset": 9, "reason": reason, **fields, **other})


def test_a_selection_holds_all_its_conditions():
    assert letter() in Selection()
    assert letter() in Selection(kinds=("partition",), since_ms=NOW, until_ms=NOW + 1, user_id=42, partition=1, places=((1, 9),))
    for wrong in (
        Selection(kinds=("key",)),
        Selection(since_ms=NOW + 1),
        Selection(until_ms=NOW),
        Selection(user_id=43),
        Selection(partition=0),
        Selection(places=((1, 8),)),
    ):
        assert letter() not in wrong
    assert kind_of("header freshrank-append-time-ms: not a time") == "header freshrank-append-time-ms"


def test_the_user_is_the_values_or_else_the_keys():
    assert letter(key=b"x").user_id == 42
    assert letter(value=b"garbage").user_id == 42
    assert letter(value=None, key=None).user_id is None
    assert letter(value=b"garbage", key=b"not hexadecimal!").user_id is None


def test_a_redrive_keeps_the_append_time_and_falls_back_to_the_brokers():
    assert judge(letter(), DOMAIN, 3, rekey=False).time_ms == NOW
    assert judge(letter(append_time_ms=-1, broker_time_ms=NOW + 3), DOMAIN, 3, rekey=False).time_ms == NOW + 3
    assert judge(letter(append_time_ms=0, broker_time_ms=0), DOMAIN, 3, rekey=False).refused.startswith("append time")


def test_what_would_be_rejected_again_is_left_alone():
    assert judge(letter(), DOMAIN, 3, rekey=False).refused == ""
    assert judge(letter(value=b"garbage"), DOMAIN, 3, rekey=True).refused.startswith("value:")
    assert judge(letter(value=None), DOMAIN, 3, rekey=True).refused.startswith("value:")
    early = letter(append_time_ms=NOW - DOMAIN.future_tolerance_ms - 1)
    assert judge(early, DOMAIN, 3, rekey=True).refused.startswith("event_time_ms:")
    unknown_user = letter(key=b"42")
    assert judge(unknown_user, DOMAIN, 3, rekey=False).refused.endswith("(correct it with --rekey)")
    corrected = judge(unknown_user, DOMAIN, 3, rekey=True)
    assert (corrected.refused, corrected.key) == ("", user_key(42))


def test_a_letter_in_an_encoding_that_was_not_allowed_is_redriven_where_it_is_now():
    value = MessageToJson(Action.FromString(GOOD)).encode()
    found = letter(value=value, key=b"42")
    assert found.user_id == 42
    assert 'add "json" to encodings' in judge(found, DOMAIN, 3, rekey=True).refused
    allowed = parse_domain(f'encodings = ["json"]\n{DOMAIN_TOML}', source="test")
    corrected = judge(found, allowed, 3, rekey=True)
    assert (corrected.refused, corrected.key) == ("", user_key(42))


def test_a_letter_that_was_redriven_is_passed_over_unless_asked_for():
    done = letter(redriven="redriven: partition as 0000000000000007:0:3")
    assert kind_of(judge(done, DOMAIN, 3, rekey=False).refused) == "redriven"
    assert judge(done, DOMAIN, 3, rekey=False, again=True).refused == ""
    assert judge(letter(value=encode_erase(user_id=42, event_id=1, reason="x")), DOMAIN, 3, rekey=False).is_erasure


def test_tables_show_reasons_and_places():
    console = Console(width=160)
    with console.capture() as captured:
        console.print(counts_table(Counter(partition=3), Counter(value=1)))
        console.print(letters_table([letter(), replace(letter("value: " + "x" * 90), redriven="redriven: ")], NOW + 60_000))
    text = captured.get()
    for expected in ("partition", "3", "1:9", "42", "1 m 0 s ago", "xxx...", "yes"):
        assert expected in text, expected


def test_a_letter_whose_new_place_the_broker_does_not_say_is_sent_and_marked(monkeypatch):
    produced = []

    class Acknowledging:
        """Takes every record, and knows of none where it is: each was a retry."""

        def produce(self, topic, value, key, *, on_delivery, **_):
            produced.append((topic, key, value))
            on_delivery(None, Message(topic=topic, partition=2, offset=-1001))

        def poll(self, _):
            return 0

        flush = poll

    monkeypatch.setattr(dead_letters, "log_identity", lambda *_, **__: LogIdentity("actions", 7, 3))
    monkeypatch.setattr(dead_letters, "new_producer", lambda *_: Acknowledging())
    kafka = KafkaConfig("127.0.0.1:1", {})
    done = Redrive(kafka, Topics("actions", "dead", "rankings", "told", "rates"), DOMAIN).run([letter()], limit=1)
    assert done.sent == [(letter(), None)]
    assert [(topic, key) for topic, key, _ in produced] == [("actions", user_key(42)), ("dead", b"actions:1:9")]

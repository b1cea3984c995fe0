"""Log lines: one JSON object each, with the request's id within a call, and no user in them."""

import io
import json
import logging
import sys

import pytest

from deploy.logs import JsonLines, TextLines, set_up_logging
from deploy.settings import load_settings
from features.request_context import REQUEST_ID
from protos.v1.actions_pb2 import DeadLetter
from streams.worker import DeadLetters


@pytest.fixture
def request_id():
    token = REQUEST_ID.set(2**63 + 5)
    yield str(2**63 + 5)
    REQUEST_ID.reset(token)


def record(message="it %s", *arguments, **extra):
    return logging.getLogger("streams.core").makeRecord("streams.core", logging.INFO, "x.py", 1, message, arguments, None, extra=extra)


def test_a_line_is_one_object(request_id):
    line = JsonLines().format(record("two\nlines of %s", "text", fields={"ms": 3, "level": "mine"}))
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    expected = {"level": "INFO", "logger": "streams.core", "message": "two\nlines of text", "request_id": request_id, "ms": 3}
    assert found == expected  # a field does not take the place of one of the line's own


def test_outside_of_a_call_there_is_no_request():
    assert "request_id" not in json.loads(JsonLines().format(record("it")))
    assert TextLines("%(message)s").format(record("it")) == "it"


def test_text_names_the_request_too(request_id):
    assert TextLines("%(message)s").format(record("it %s", "is")) == f"it is [request {request_id}]"


def test_an_error_has_its_traceback_in_the_line():
    try:
        int("wrong")
    except ValueError:
        failed = record("failed")
        failed.exc_info = sys.exc_info()
    found = json.loads(JsonLines().format(failed))
    assert found["error"].startswith("Traceback")
    assert "ValueError: invalid literal" in found["error"]


def test_the_process_has_one_handler_whatever_is_called_later(monkeypatch):
    root, stream = logging.getLogger(), io.StringIO()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        root.handlers = []
        set_up_logging(load_settings(log_format="json"))
        logging.basicConfig(level="DEBUG", format="%(message)s")
        logging.getLogger("a").info("said")
        logging.getLogger("a").debug("not said")
    finally:
        root.handlers = before
        root.setLevel(level)
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["said"]


def test_a_dead_letters_line_does_not_name_the_user(caplog):
    letters = DeadLetters()
    reason = "key: not the user id as 16 hexadecimal digits, 00000000000004d2"
    letters.add(DeadLetter(reason=reason, source_topic="t", source_partition=1, source_offset=7).SerializeToString())
    assert "t:1:7: key" in caplog.text
    assert "4d2" not in caplog.text
    assert letters.counts == {"key": 1}

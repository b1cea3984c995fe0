"""Log lines of freshrank's processes: text for people, or JSON for what collects them (setting log_format).

A JSON line has time (ISO 8601, UTC), level, logger, message; request_id where a call is being answered; error with the traceback; and the
fields that the caller gave as `extra={"fields": {...}}`. Ids of users stand in no line at INFO or above.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from deploy.settings import Settings
from features.request_context import REQUEST_ID

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter; a line break in a message is escaped, so that a record is always one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = str(request_id)  # as text: a JSON number above 2^53 is not exact everywhere
        if isinstance(fields := getattr(record, "fields", None), dict):
            line |= {name: value for name, value in fields.items() if name not in line}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """As ever, with the request's id at the end of a line that belongs to one."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        text = super().format(record)
        return f"{text} [request {request_id}]" if (request_id := REQUEST_ID.get()) else text


def set_up_logging(settings: Settings, level: str = "INFO") -> None:
    """Gives the root logger its one handler, to standard error. What calls logging.basicConfig later changes nothing any more."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines(_TEXT))
    logging.basicConfig(level=level, handlers=[handler], force=True)

"""What is said of a failure that nobody expected: to the caller a reference, to the log where it happened, to neither what it was about."""

import logging
import secrets
import traceback


def internal_error(log: logging.Logger, what: str, error: BaseException) -> str:
    """Logs a bug with a fresh reference, and returns the message for the caller, who gets the reference alone.

    The log has the types and places of the error and its causes. Their messages may hold anything, user ids and tokens too, so they are
    logged at DEBUG only.
    """
    reference = secrets.token_hex(8)
    log.error("%s, reference %s: this is a bug: %s", what, reference, trace(error))
    log.debug("reference %s", reference, exc_info=error)
    return f"internal error: the server's log says more under reference {reference}"


def trace(error: BaseException) -> str:
    """Types of an error and its causes, innermost first, each with the places that it passed, without any message."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 8:
        places = traceback.extract_tb(current.__traceback__)[-12:]
        parts.append(f"{type(current).__name__} at " + " < ".join(f"{at.filename}:{at.lineno} {at.name}" for at in reversed(places)))
        current = current.__cause__ or current.__context__
    return "; after ".join(parts)

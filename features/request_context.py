"""What belongs to the call that is being answered and has no place in its arguments: its id for the log, its trace for the calls it makes.

Context variables: a task, a thread started by asyncio.to_thread and everything awaited see those of their call; 0 and () outside of one.
"""

from contextvars import ContextVar

REQUEST_ID: ContextVar[int] = ContextVar("request_id", default=0)
"""Identity of the request (RankRequest.request_id), for log lines; 0: none, or not known yet."""

TRACE_HEADERS: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("trace_headers", default=())
"""W3C trace context (traceparent, tracestate) that goes along with every call to Triton or to a sequence reader; (): nothing is traced."""

"""A small OTLP/HTTP receiver: a real HTTP server that reads the spans posted to it, protobuf (ours) or JSON (Triton's)."""

import base64
import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse


class Received:
    """Spans in the order of their arrival, with the service that sent each."""

    def __init__(self) -> None:
        self.url = ""
        self._changed = threading.Condition()
        self._spans: list[tuple[str, object]] = []

    def add(self, request: ExportTraceServiceRequest) -> None:
        with self._changed:
            for resource in request.resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [(names.get("service.name", ""), span) for span in scope.spans]
            self._changed.notify_all()

    def of_trace(self, trace_id: str) -> list[tuple[str, object]]:
        with self._changed:
            return [(service, span) for service, span in self._spans if span.trace_id.hex() == trace_id]

    def trace_ids(self) -> set[str]:
        with self._changed:
            return {span.trace_id.hex() for _, span in self._spans}

    def wait(self, condition, timeout_s: float = 30.0) -> None:
        """Returns once `condition(self)` is true."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout_s), [(s, span.name) for s, span in self._spans]


def _from_json(body: bytes) -> ExportTraceServiceRequest:
    """OTLP's JSON, which Triton sends: ids are hexadecimal there, where protobuf's own JSON has base64."""
    request = json_format.Parse(body, ExportTraceServiceRequest(), ignore_unknown_fields=True)
    for span in (span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans):
        for name in ("trace_id", "span_id", "parent_span_id"):
            setattr(span, name, bytes.fromhex(base64.b64encode(getattr(span, name)).decode()))
    return request


@contextmanager
def otlp_receiver() -> Iterator[Received]:
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            is_json = self.headers["content-type"].startswith("application/json")
            received.add(_from_json(body) if is_json else ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    received.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    try:
        yield received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

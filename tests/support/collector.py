"""A collector of traces, as OpenTelemetry's exporters meet one: OTLP over HTTP, on a port of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NamedTuple, Self

from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

HOST: Final = "127.0.0.1"


class Kept(NamedTuple):
    """One span as it arrived."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str  # empty: none
    facts: dict[str, Any]


class Collector:
    """Keeps all that is exported to it. `with Collector() as collector:` listens."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """What turns a process' traces on, so that they come here, and soon."""
        url = f"http://{HOST}:{self._server.server_port}"
        return {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "NO_PROXY": HOST,
        }

    def spans(self) -> list[Kept]:
        """All that came."""
        return list(self._spans())

    def _spans(self) -> Iterator[Kept]:
        for body in list(self.bodies):
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = _facts(part.resource.attributes)["service.name"]
                for scope in part.scope_spans:
                    for span in scope.spans:
                        ids = [each.hex() for each in (span.trace_id, span.span_id, span.parent_span_id)]
                        yield Kept(service, span.name, ids[0], ids[1], ids[2], _facts(span.attributes))

    def texts(self) -> str:
        """Every text in what came. Ids are bytes, which might look like anything; here they are base64."""
        return "\n".join(MessageToJson(ExportTraceServiceRequest.FromString(body)) for body in list(self.bodies))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(60)
        self._server.server_close()


def _facts(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}

"""Exports the spans of a worker or an API process: OpenTelemetry's SDK, set up by its own variables."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Final

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.util.re import parse_env_headers

from producer.tracing.spans import Traces

logger = logging.getLogger(__name__)

_LOG_EVERY: Final = 60.0  # seconds between two warnings that spans are lost
# Their log lines may quote what a caller sent or a collector's key, or repeat with every batch what we log once.
_SILENT: Final = ("opentelemetry.trace", "opentelemetry.exporter", "opentelemetry.util")
_HEADERS: Final = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")


def set_up(kind: str, service: str) -> Traces:
    """Export from a thread by `kind`, `otlp` or `console`. Raises `ValueError` for settings that it cannot use."""
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_Reporting(_exporter(kind))))
    return Traces(provider, provider.shutdown)


def _exporter(kind: str) -> SpanExporter:
    if kind == "console":
        return ConsoleSpanExporter()
    # The library would quote a malformed header in the log and go on without it; it often holds a key.
    for name in _HEADERS:
        for header in os.environ.get(name, "").split(","):
            if header.strip() and not parse_env_headers(header, liberal=True):
                raise ValueError(f"{name} must be a comma-separated list of name=value")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - brings requests

    return OTLPSpanExporter()


class _Reporting(SpanExporter):
    """Logs failed exports, once a minute. Their spans are lost; nothing waits for them."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lost = 0
        self._log_at = 0.0  # monotonic

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export, and log a failure."""
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001 - not logged: its text may quote a span
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            if time.monotonic() >= self._log_at:
                logger.warning("traces cannot be exported; spans are lost", extra={"count": self._lost})
                self._log_at, self._lost = time.monotonic() + _LOG_EVERY, 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

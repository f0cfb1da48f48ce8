"""Structured logging that masks every email address, whichever library wrote the line."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from producer.masking import mask_text

# The extra fields of our own lines. Other libraries' extras stay out: Celery's hold arguments and results.
_EXTRAS = (
    *("bucket", "count", "email", "error", "key", "kind", "more", "next_try_in", "peer", "protocol", "reason"),
    *("relay", "reply", "request_id", "seconds", "size", "why"),
)


def _mask_event(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: mask_text(value) if isinstance(value, str) else value for key, value in event.items()}


class _MaskingFormatter(structlog.stdlib.ProcessorFormatter):
    """Masks the finished line, including tracebacks and the `repr` of any object in it."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


def configure(level: int | str = logging.INFO) -> None:
    """Log to stderr for the whole process, other libraries included: coloured on a terminal, else as JSON lines."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.ExtraAdder(_EXTRAS),
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[structlog.typing.Processor]
    if sys.stderr.isatty():
        final = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]  # no locals
    else:
        # Not as ASCII: an address in \\u escapes would escape the mask.
        json_lines = structlog.processors.JSONRenderer(ensure_ascii=False)
        final = [structlog.processors.format_exc_info, _mask_event, json_lines]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _MaskingFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )

"""The spans of a request, by OpenTelemetry's API. Imported only where tracing is on.

Names and attributes follow its semantic conventions; ours begin with `verify.`. A span never holds an address, a code,
a Redis key, or text of a mail, a relay or an exception: it says what happened, not to whom.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from producer.contract import ErrorCode
from producer.masking import mask_text
from producer.setting_types import MASK

Headers = Iterable[tuple[str | bytes, str | bytes]]
Attributes = Mapping[str, str | int]
Step = tuple[str, int, int, Attributes, str]  # name, began and ended (Unix ns), attributes, error type or ""

ERROR: Final = "verify.error"
ERROR_TYPE: Final = "error.type"
TRACE_HEADERS: Final = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/
_LONGEST: Final = 512  # characters of one of the two headers; a traceparent has 55
# A member of tracestate, without surrounding spaces (W3C Trace Context, 3.3.1.3); a key with an @ may be an address.
_MEMBER: Final = re.compile(
    r"[a-z][a-z0-9_*/-]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_MEMBERS: Final = 32  # at most
_W3C: Final = TraceContextTextMapPropagator()


class Traces:
    """Makes the spans of one process."""

    def __init__(self, provider: trace.TracerProvider, shutdown: Callable[[], None] = lambda: None) -> None:
        self.tracer: Final = provider.get_tracer("verifyserver")
        self._shutdown = shutdown

    @contextmanager
    def serving(self, name: str, headers: Headers, attributes: Attributes) -> Iterator[Span]:
        """A span around the serving of one request, whose headers may name the caller's span."""
        found = {header: _only(headers, header) for header in TRACE_HEADERS}
        span = self.tracer.start_span(name, caller_of(found), SpanKind.SERVER, attributes)
        # An exception's text may quote the request.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield span
            except BaseException as exc:
                fail(span, type(exc).__name__)
                raise

    @staticmethod
    def answered(error: ErrorCode) -> None:
        """Note the answer in the span of the request that is being served."""
        note(trace.get_current_span(), error)

    def sending(self, queue: str, request_id: str) -> Sending:
        """Start the span of a message for `queue`; its parent is the current span of the caller's task."""
        return Sending(
            self.tracer.start_span(
                f"send {queue}", None, SpanKind.PRODUCER, messaging("send", "send", queue, request_id)
            )
        )

    def processed(
        self,
        queue: str,
        request_id: str,
        headers: Mapping[str, object],
        times: tuple[int, int],
        settled: str,
        error: ErrorCode | None,
        steps: Iterable[Step],
    ) -> None:
        """Make the span of a message that a worker has processed, with one child for each of `steps`.

        `headers`: the message's, which may name the sender's span. `times`: when it began and ended, in Unix ns.
        """
        message = messaging("process", "process", queue, request_id)
        parent, (began, ended) = caller_of(headers), times
        span = self.tracer.start_span(f"process {queue}", parent, SpanKind.CONSUMER, message, start_time=began)
        if not span.is_recording():
            return
        span.set_attribute("verify.settled", settled)
        if error is not None:
            note(span, error)
        within = trace.set_span_in_context(span, Context())
        for name, step_began, step_ended, attributes, error_type in steps:
            facts = {**message, **attributes} if name == "settle" else attributes
            child = self.tracer.start_span(name, within, SpanKind.CLIENT, facts, start_time=step_began)
            if error_type:
                fail(child, error_type)
            child.end(step_ended)
        span.end(ended)

    def close(self) -> threading.Thread:
        """Begin to export what is left. Join the returned thread to wait for it; it does not keep the process alive."""
        thread = threading.Thread(target=self._shutdown, name="last-spans", daemon=True)
        thread.start()
        return thread


class Sending:
    """The span of one message until Redis has it."""

    def __init__(self, span: Span) -> None:
        self._span: Span | None = span
        self.headers: dict[str, str] = {}  # the trace context that the message carries
        _W3C.inject(self.headers, trace.set_span_in_context(span, Context()))
        if not _is_fit(self.headers.get("tracestate", "")):
            del self.headers["tracestate"]

    def end(self, error: Exception | None = None) -> None:
        """Redis has the message, or `error` says why not. A second call does nothing."""
        span, self._span = self._span, None
        if span is not None:
            if error is not None:
                fail(span, type(error).__name__)
            span.end()


def caller_of(headers: Mapping[str, object]) -> Context:
    """The span that these headers name, as a parent. Malformed headers name none."""
    parent, state = (headers.get(name) for name in TRACE_HEADERS)
    if not isinstance(parent, str) or not _is_fit(parent):
        return Context()
    carrier = {"traceparent": parent}
    if isinstance(state, str) and _is_state(state):
        carrier["tracestate"] = state
    return _W3C.extract(carrier, Context())


def messaging(operation: str, kind: str, queue: str, request_id: str) -> dict[str, str | int]:
    """The attributes that every span of a message has."""
    return {
        "messaging.system": "redis",
        "messaging.destination.name": queue,
        # The caller chose the id; it may be an address.
        "messaging.message.id": MASK if "@" in request_id else request_id,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
    }


def note(span: Span, error: ErrorCode) -> None:
    """Set the answer of a request, and its status if that is a failure."""
    span.set_attribute(ERROR, int(error))
    if error.failure:
        fail(span, error.title)


def fail(span: Span, kind: str) -> None:
    """Mark a span as failed; `kind` says how, in a word."""
    span.set_attribute(ERROR_TYPE, kind)
    span.set_status(Status(StatusCode.ERROR))


def _is_fit(header: str) -> bool:
    # tracestate is exported with each span, and a caller may write anything into it.
    return len(header) <= _LONGEST and mask_text(header) == header


def _is_state(header: str) -> bool:
    # The library would quote a malformed one in the log.
    if not _is_fit(header):
        return False
    members = [member.strip(" \t") for member in header.split(",")]
    return len(members) <= _MEMBERS and all(not each or _MEMBER.fullmatch(each) for each in members)


def _only(headers: Headers, name: str) -> str | None:
    """The header's value, unless it occurs several times."""
    found = [value for key, value in headers if (key.decode("latin-1") if isinstance(key, bytes) else key) == name]
    if len(found) != 1:
        return None
    return found[0].decode("latin-1") if isinstance(found[0], bytes) else found[0]

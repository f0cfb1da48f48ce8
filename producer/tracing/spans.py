"""How a request is traced, in the terms of OpenTelemetry's API. Loaded only where something is traced.

Names and attributes are those of its semantic conventions; ours begin with `verify.`. No address, code or Redis key, no
text of a mail, a relay or an exception is ever in a span: whatever gets in here says what happened, not to whom.
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
from producer.logs import mask_text
from producer.setting_types import MASK

Headers = Iterable[tuple[str | bytes, str | bytes]]
Attributes = Mapping[str, str | int]
Step = tuple[str, int, int, Attributes, str]  # name, began and ended (Unix ns), attributes, error type or ""

ERROR: Final = "verify.error"
ERROR_TYPE: Final = "error.type"
TRACE_HEADERS: Final = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/
# Answers that are a fault of ours. Of the others somebody is told no, as it should be.
FAULTS: Final = frozenset({ErrorCode.REDIS_ERR, ErrorCode.EXCEPTION, ErrorCode.TIMEOUT})
_LONGEST: Final = 512  # characters of one of the two headers; a trace context has 55 of them, and no need to grow
# A member of the second, without surrounding spaces (W3C Trace Context, 3.3.1.3); a key with an @ may be an address.
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
        """A door's span around what it does for one request, whose headers may name the caller's span."""
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
        """The request that is being served has its answer."""
        note(trace.get_current_span(), error)

    def sending(self, queue: str, request_id: str) -> Sending:
        """A message for `queue` is about to be written; its parent is the span that is current in the caller's task."""
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
        """Begin to export what is left, and end. Wait for the thread, as long as one likes: it keeps no process up."""
        thread = threading.Thread(target=self._shutdown, name="last-spans", daemon=True)
        thread.start()
        return thread


class Sending:
    """The span of one message, until Redis has it."""

    def __init__(self, span: Span) -> None:
        self._span: Span | None = span
        self.headers: dict[str, str] = {}  # what the message says of it
        _W3C.inject(self.headers, trace.set_span_in_context(span, Context()))
        if not _is_fit(self.headers.get("tracestate", "")):
            del self.headers["tracestate"]

    def end(self, error: Exception | None = None) -> None:
        """Redis has it, or will not. What comes later changes nothing."""
        span, self._span = self._span, None
        if span is not None:
            if error is not None:
                fail(span, type(error).__name__)
            span.end()


def caller_of(headers: Mapping[str, object]) -> Context:
    """The span that these headers name, as a parent; what is no such header names none, whatever it is."""
    parent, state = (headers.get(name) for name in TRACE_HEADERS)
    if not isinstance(parent, str) or not _is_fit(parent):
        return Context()
    carrier = {"traceparent": parent}
    if isinstance(state, str) and _is_state(state):
        carrier["tracestate"] = state
    return _W3C.extract(carrier, Context())


def messaging(operation: str, kind: str, queue: str, request_id: str) -> dict[str, str | int]:
    """What every span of a message says of it."""
    return {
        "messaging.system": "redis",
        "messaging.destination.name": queue,
        # An id is the caller's choice, and may be an address.
        "messaging.message.id": MASK if "@" in request_id else request_id,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
    }


def note(span: Span, error: ErrorCode) -> None:
    """What a request was answered."""
    span.set_attribute(ERROR, int(error))
    if error in FAULTS:
        fail(span, error.title)


def fail(span: Span, kind: str) -> None:
    """It failed, and how, in a word."""
    span.set_attribute(ERROR_TYPE, kind)
    span.set_status(Status(StatusCode.ERROR))


def _is_fit(header: str) -> bool:
    # A vendor's state is exported with each span, and who calls a door may write into it what he likes.
    return len(header) <= _LONGEST and mask_text(header) == header


def _is_state(header: str) -> bool:
    # The library would quote in the log what is none.
    if not _is_fit(header):
        return False
    members = [member.strip(" \t") for member in header.split(",")]
    return len(members) <= _MEMBERS and all(not each or _MEMBER.fullmatch(each) for each in members)


def _only(headers: Headers, name: str) -> str | None:
    """The header's value, unless there are several."""
    found = [value for key, value in headers if (key.decode("latin-1") if isinstance(key, bytes) else key) == name]
    if len(found) != 1:
        return None
    return found[0].decode("latin-1") if isinstance(found[0], bytes) else found[0]

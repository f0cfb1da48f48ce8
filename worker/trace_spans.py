"""The spans of requests that have left a worker: made at once, when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, set_span_in_context

from producer.tracing.spans import Traces, caller_of, fail, messaging, note
from worker.tracing import ISSUE, SETTLE, Trace

if TYPE_CHECKING:
    from producer.contract import ErrorCode
    from worker.job import Finished, Job

logger = logging.getLogger(__name__)

_ISSUE_FACTS: Final = {"db.system.name": "redis", "db.operation.name": ISSUE}


class Recorder:
    """Gives jobs their traces, and makes spans of them. Belongs to the service's loop."""

    def __init__(self, traces: Traces, queue: str) -> None:
        self._tracer = traces.tracer
        self._queue = queue

    @staticmethod
    def begin(headers: Mapping[str, object]) -> Trace:
        """The trace of a request whose message has these headers."""
        return Trace(caller_of(headers))

    def finish(self, finished: Finished) -> None:
        """These requests are off this worker's hands."""
        now = asyncio.get_running_loop().time()
        zero = time.time_ns() - int(now * 1e9)

        def at(moment: float) -> int:
            return zero + int(moment * 1e9)

        for job, error in finished:
            if job.trace is not None:
                try:
                    self._finish(job, job.trace, error, at, now)
                except Exception as exc:  # noqa: BLE001 - no request fails for want of a span
                    logger.error("unforeseen error in tracing", extra={"kind": type(exc).__name__})

    def _finish(self, job: Job, trace: Trace, error: ErrorCode | None, at: Callable[[float], int], now: float) -> None:
        message = messaging("process", "process", self._queue, job.request_id)
        name = f"process {self._queue}"
        span = self._tracer.start_span(name, trace.parent, SpanKind.CONSUMER, message, start_time=at(job.began))
        if not span.is_recording():
            return
        how = "bury" if job.dead_lettered else "park" if error is None else "ack"
        trace.left(how, now)
        span.set_attribute("verify.settled", how)
        if error is not None:
            note(span, error)
        within = set_span_in_context(span, Context())
        for step in trace.steps:
            facts = step.facts
            if step.name == SETTLE:
                facts = {**message, "messaging.operation.type": "settle", **facts}
            elif step.name == ISSUE:
                facts = {**_ISSUE_FACTS, **facts}
            child = self._tracer.start_span(step.name, within, SpanKind.CLIENT, facts, start_time=at(step.began))
            if step.failed:
                fail(child, step.failed)
            child.end(at(step.ended))
        span.end(at(now))

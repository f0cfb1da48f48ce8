"""What happens to one request in a worker, and when. Its spans are made once it is settled and nobody waits for them.

No address, code or text of a reply gets in here. OpenTelemetry is loaded by whoever makes the `Traces` that are used.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from producer.store.codes import Answered, Conflict, Send, UnknownVersion, Wait
from worker.mail.errors import MailError

if TYPE_CHECKING:
    from producer.contract import ErrorCode
    from producer.setting_types import RelayURL
    from producer.store.codes import Issue
    from producer.tracing.spans import Attributes, Traces
    from worker.job import Finished, Job

logger = logging.getLogger(__name__)

_ISSUED: Final = {
    Send: "send",
    Answered: "answered",
    Wait: "wait",
    Conflict: "conflict",
    UnknownVersion: "unknown_version",
}


class Trace:
    """What was done for one request so far."""

    __slots__ = ("_retry", "_settling_since", "_trying", "events", "headers")

    def __init__(self, headers: Mapping[str, object]) -> None:
        """`headers`: the message's; they may name the caller's span."""
        self.headers = headers
        # Name, began and ended in loop time, attributes, error type or "".
        self.events: list[tuple[str, float, float, Attributes, str]] = []
        self._retry = 0
        self._trying: tuple[RelayURL, float] | None = None
        self._settling_since: float | None = None

    def issued(self, began: float, ended: float, issue: Issue | None) -> None:
        """The code store was asked. `issue`: its answer; None: it could not be asked, or refused."""
        if isinstance(issue, Send):
            self._retry = issue.tries
        outcome = "unavailable" if issue is None else _ISSUED[type(issue)]
        attributes = {"db.system.name": "redis", "db.operation.name": "issue", "verify.issue": outcome}
        self.events.append(("issue", began, ended, attributes, outcome if issue is None else ""))

    def trying(self, relay: RelayURL) -> None:
        """The mail goes to `relay` now."""
        self._trying = relay, _now()

    def tried(self, outcome: str, error: Exception | None) -> None:
        """The send has ended. `outcome`: one word; the text of `error` may quote the address, so it is not used."""
        if self._trying is None:
            return
        (relay, began), self._trying = self._trying, None
        attributes: dict[str, str | int] = {
            "server.address": relay.host,
            "server.port": relay.port,
            "network.protocol.name": "smtp",
            "verify.outcome": outcome,
            "verify.retry": self._retry,
        }
        if isinstance(error, MailError) and error.code is not None:
            attributes["verify.smtp_code"] = error.code
        self.events.append(("smtp send", began, _now(), attributes, "" if error is None else outcome))

    def settling(self) -> None:
        """The request has its outcome, which is yet to be settled."""
        self._settling_since = _now()

    def settled(self, how: str, now: float) -> None:
        """The outcome is settled. `how`: ack, delay or dead_letter."""
        attributes = {"messaging.operation.name": how, "messaging.operation.type": "settle"}
        self.events.append(("settle", self._settling_since or now, now, attributes, ""))


class Recorder:
    """Makes the spans of settled requests. Belongs to the service's loop."""

    def __init__(self, traces: Traces, queue: str) -> None:
        self._traces = traces
        self._queue = queue

    def finish(self, finished: Finished) -> None:
        """Make the spans of these requests."""
        now = _now()
        zero = time.time_ns() - int(now * 1e9)  # Unix time of the loop's zero
        for job, error in finished:
            if job.trace is not None:
                try:
                    self._finish(job, job.trace, error, zero, now)
                except Exception as exc:  # noqa: BLE001 - a request must not fail because of its span
                    logger.error("unexpected error in tracing", extra={"kind": type(exc).__name__})

    def _finish(self, job: Job, trace: Trace, error: ErrorCode | None, zero: int, now: float) -> None:
        how = "dead_letter" if job.dead_lettered else "delay" if error is None else "ack"
        trace.settled(how, now)
        times = zero + int(job.began * 1e9), zero + int(now * 1e9)
        steps = (
            (name, zero + int(began * 1e9), zero + int(ended * 1e9), attributes, error_type)
            for name, began, ended, attributes, error_type in trace.events
        )
        self._traces.processed(self._queue, job.request_id, trace.headers, times, how, error, steps)


def _now() -> float:
    return asyncio.get_running_loop().time()

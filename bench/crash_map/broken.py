"""Ways to break a worker on purpose: the map must show each of them.

Each is a mistake that a programmer could make, and that no test without a fault would notice.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final


def _ack_first() -> None:
    """The message is acknowledged as soon as the outcome is known: before mark and reply."""
    from worker.settler import Settler  # noqa: PLC0415 - in the worker only

    add = Settler._add

    def acked(self: Settler, item: Any) -> None:
        if item.ack:
            self._databases.broker.connection.post(
                [self._queue.ack([item.job.tag])], database=self._databases.broker.number
            )
        add(self, item)

    Settler._add = acked  # type: ignore[method-assign]


def _take_unrecorded() -> None:
    """A message that was taken is nowhere in Redis any more, as with BRPOP."""
    from worker.fetcher import Fetcher  # noqa: PLC0415

    read = Fetcher._read

    def unrecorded(self: Fetcher, taken: Any) -> Any:
        if taken:
            tags = [reserved.tag for reserved in taken]
            self._broker.connection.post([self.queue.ack(tags)], database=self._broker.number)
        return read(self, taken)

    Fetcher._read = unrecorded  # type: ignore[method-assign]


def _send_without_lease() -> None:
    """A mail leaves whether this worker still has the lease or not, and Redis is not told."""
    from worker import service  # noqa: PLC0415
    from worker.mail.message import Mail  # noqa: PLC0415

    def careless(envelope: Any, deadline: float, _ask: Any, _has_lease: Any, *rest: Any) -> Any:
        return Mail(envelope, deadline, lambda go: go(True), lambda: True, *rest)

    service.Mail = careless  # type: ignore[assignment,attr-defined]


def _new_code() -> None:
    """A request that is sent once more gets a new code."""
    from producer.redis import scripts  # noqa: PLC0415
    from producer.store import redis_codes  # noqa: PLC0415

    text = redis_codes._ISSUE.text
    script = scripts.Script()
    script.text = text.replace("if doubts == 0 and (not mark or life < min_life) then", "if true then")
    script.text = script.text.replace("(doubts > 1 or not mark or mark ~= record.mark)", "doubts > 1")
    assert script.text.count("if true then") == 1
    script.sha = hashlib.sha1(script.text.encode(), usedforsecurity=False).hexdigest()
    scripts._BY_SHA[script.sha] = script
    redis_codes._ISSUE = script


def _success_when_unknown() -> None:
    """A mail whose acceptance is unknown counts as accepted."""
    from worker.mail.errors import AcceptanceUnknown  # noqa: PLC0415
    from worker.service import Service  # noqa: PLC0415

    sent = Service._sent

    def hopeful(self: Service, job: Any, send: Any, error: Exception | None) -> None:
        sent(self, job, send, None if isinstance(error, AcceptanceUnknown) else error)

    Service._sent = hopeful  # type: ignore[method-assign]


WAYS: Final = {
    "ack first": _ack_first,
    "take unrecorded": _take_unrecorded,
    "send without a lease": _send_without_lease,
    "a new code": _new_code,
    "success when unknown": _success_when_unknown,
}

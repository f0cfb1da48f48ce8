"""What happens to one request in a worker's hands, and when: written down here, and made into spans by `spans.py`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from producer.store.codes import Answered, Conflict, Send, Wait
from worker.mail.errors import MailError

if TYPE_CHECKING:
    from producer.setting_types import RelayURL
    from producer.store.codes import Issue

ISSUE: Final = "issue"
TRY: Final = "smtp send"
SETTLE: Final = "settle"
_ISSUED: Final = {Send: "send", Answered: "answered", Wait: "wait", Conflict: "conflict"}


class Step(NamedTuple):
    """Something that was done. Times are the loop's."""

    name: str
    began: float
    ended: float
    facts: dict[str, str | int]
    failed: str = ""  # how, in a word


class Trace:
    """One request's steps. Nothing of the request itself gets in here."""

    __slots__ = ("_leaving", "_retry", "_trying", "parent", "steps")

    def __init__(self, parent: Any) -> None:
        """`parent`: the caller's span."""
        self.parent = parent
        self.steps: list[Step] = []
        self._retry = 0
        self._trying: tuple[RelayURL, float] | None = None
        self._leaving: float | None = None

    def issued(self, began: float, ended: float, issue: Issue | None) -> None:
        """The store was asked, together with others; None: it could not be, or refused."""
        if isinstance(issue, Send):
            self._retry = issue.tries
        word = "unavailable" if issue is None else _ISSUED[type(issue)]
        self.steps.append(Step(ISSUE, began, ended, {"verify.issue": word}, word if issue is None else ""))

    def trying(self, relay: RelayURL) -> None:
        """A relay is about to be asked."""
        self._trying = relay, _now()

    def tried(self, outcome: str, error: Exception | None) -> None:
        """What it said, in a word. Its text may echo the address."""
        if self._trying is None:
            return
        (relay, began), self._trying = self._trying, None
        facts: dict[str, str | int] = {
            "server.address": relay.host,
            "server.port": relay.port,
            "network.protocol.name": "smtp",
            "verify.outcome": outcome,
            "verify.retry": self._retry,
        }
        if isinstance(error, MailError) and error.code is not None:
            facts["verify.smtp_code"] = error.code
        self.steps.append(Step(TRY, began, _now(), facts, outcome if error is not None else ""))

    def leaving(self) -> None:
        """The request has its outcome, which is not settled yet."""
        self._leaving = _now()

    def left(self, how: str, now: float) -> None:
        """It is: by `ack`, `park` or `bury`."""
        self.steps.append(Step(SETTLE, self._leaving or now, now, {"messaging.operation.name": how}))


def _now() -> float:
    return asyncio.get_running_loop().time()

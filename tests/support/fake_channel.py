"""A mail channel in memory, for tests of what sends through channels."""

from __future__ import annotations

import asyncio

from producer.setting_types import RelayURL
from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    RecipientRejected,
    RelayUnavailable,
    SendAborted,
    SendCancelled,
)
from worker.mail.message import Envelope, Mail

ERRORS: dict[str, type[MailError]] = {
    "reject": RecipientRejected,
    "defer": MessageDeferred,
    "unreachable": RelayUnavailable,
    "lost": AcceptanceUnknown,
}


class FakeChannel:
    """Does with each mail what `behaviour` says: accept, a key of `ERRORS`, or silent (the mail's deadline passes)."""

    capacity = 4
    open_connections = 0

    def __init__(self) -> None:
        self.url = RelayURL("fake", "fake.test", 1, None, None)
        self.behaviour = "accept"
        self.accepted: list[Envelope] = []
        self._closed = False
        self._pending: dict[Mail, asyncio.TimerHandle] = {}

    def send(self, mail: Mail) -> None:
        """See `RelayChannel`."""
        mail.envelope.check()
        loop = asyncio.get_running_loop()
        if self.behaviour == "silent" and not self._closed:
            deadline = min(mail.deadline, loop.time() + 3600)
            self._pending[mail] = loop.call_at(deadline, self._finish, mail, SendCancelled())
        else:
            self._pending[mail] = loop.call_later(0, self._attempt, mail)

    async def check(self) -> None:
        """See `RelayChannel`."""
        if self.behaviour == "unreachable":
            raise RelayUnavailable

    async def close(self) -> None:
        """See `RelayChannel`."""
        self._closed = True
        for mail, timer in list(self._pending.items()):
            timer.cancel()
            self._finish(mail, SendCancelled())

    def _attempt(self, mail: Mail) -> None:
        if self._closed:
            self._finish(mail, SendCancelled())
        elif self.behaviour in {"accept", "lost"}:
            try:
                mail.before_data(lambda wanted: self._take(mail, wanted=wanted))
            except Exception as exc:  # noqa: BLE001 - the caller's own error goes back to the caller
                self._finish(mail, exc)
        else:
            self._finish(mail, ERRORS[self.behaviour]())

    def _take(self, mail: Mail, *, wanted: bool) -> None:
        if mail not in self._pending:
            return
        if not (wanted and mail.still_permitted()):
            self._finish(mail, SendAborted())
        elif self.behaviour == "lost":
            self._finish(mail, AcceptanceUnknown())
        else:
            self.accepted.append(mail.envelope)
            self._finish(mail, None)

    def _finish(self, mail: Mail, error: Exception | None) -> None:
        del self._pending[mail]
        mail.finish(error)

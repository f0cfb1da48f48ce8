"""The mail that goes through failover and channel, and its envelope."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from producer.setting_types import RelayURL
    from worker.mail.errors import MailError
    from worker.mail.failover import Relay

_NOT_IN_PATH: Final = re.compile(r"[\x00-\x20<>\x7f\ud800-\udfff]")


class Envelope(NamedTuple):
    """Sender, recipient and the finished content."""

    sender: str
    recipient: str
    needs_smtputf8: bool
    content: bytes  # CRLF lines, dot-stuffed, the last one ended, without the final dot

    def check(self) -> None:
        """Raise `ValueError` if an address or the content could inject SMTP commands."""
        if _NOT_IN_PATH.search(self.sender) or _NOT_IN_PATH.search(self.recipient):
            raise ValueError("an address with a control character, a space, an angle bracket or a lone surrogate")
        if not self.needs_smtputf8 and not (self.sender.isascii() and self.recipient.isascii()):
            raise ValueError("a non-ASCII address in an envelope without SMTPUTF8")
        if not self.content.endswith(b"\r\n"):
            raise ValueError("content whose last line has no CRLF")


class AttemptObserver(Protocol):
    """Is told of each attempt to send a mail: one relay, one outcome."""

    def trying(self, relay: RelayURL) -> None:
        """An attempt through this relay begins."""

    def tried(self, outcome: str, error: Exception | None) -> None:
        """The attempt has ended: `outcome` in a word; `error` None: the relay accepted the mail."""


class Mail:
    """One mail on its way: the same object goes through failover, channel and connection, which keep their state here.

    A `RelayChannel` calls `finish` exactly once for each `send`.
    """

    __slots__ = (
        "attempt_deadline",
        "attempt_done",
        "before_data",
        "connection_deadline",
        "deadline",
        "done",
        "envelope",
        "failures",
        "is_probe",
        "observer",
        "relay",
        "untried",
        "was_busy",
    )

    # Set by failover
    attempt_done: Callable[[Mail, Exception | None], None] | None  # None: without failover, an attempt is all
    untried: Iterator[Relay]
    relay: Relay  # of the current attempt
    is_probe: bool  # whether the current attempt probes an unhealthy relay
    failures: tuple[MailError, ...]  # of earlier attempts
    # Set by a channel, for the current attempt; loop times
    attempt_deadline: float
    connection_deadline: float  # until when it may wait for a connection
    was_busy: bool  # whether it was refused a connection (421) once

    def __init__(
        self,
        envelope: Envelope,
        deadline: float,
        before_data: Callable[[Callable[[bool], None]], None],
        done: Callable[[Exception | None], None],
        observer: AttemptObserver | None = None,
    ) -> None:
        """`deadline`: loop time by which `done` is called.

        `before_data` is called when everything but the content has been sent, with a function that takes whether the
        content may follow; it is to be called once and soon, so that the answers for many mails can be batched. `done`
        is called once with the outcome: None (accepted), a `MailError`, or what `before_data` raised.
        """
        self.envelope = envelope
        self.deadline = deadline
        self.before_data = before_data
        self.done = done
        self.observer = observer
        self.attempt_done = None

    def finish(self, error: Exception | None) -> None:
        """Report the outcome of one attempt."""
        if self.attempt_done is None:
            self.done(error)
        else:
            self.attempt_done(self, error)

"""The mail that goes through failover and channel, and its envelope."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
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
        addresses = self.sender + self.recipient
        if _NOT_IN_PATH.search(addresses):
            raise ValueError("an address with a control character, a space, an angle bracket or a lone surrogate")
        if not self.needs_smtputf8 and not addresses.isascii():
            raise ValueError("a non-ASCII address in an envelope without SMTPUTF8")
        if not self.content.endswith(b"\r\n"):
            raise ValueError("content whose last line has no CRLF")


class AttemptObserver(Protocol):
    """Observes each attempt to send a mail: one relay, one outcome."""

    def trying(self, relay: RelayURL) -> None:
        """An attempt through this relay begins."""

    def tried(self, outcome: str, error: Exception | None) -> None:
        """The attempt has ended: `outcome` in a word; `error` None: the relay accepted the mail."""


@dataclass(slots=True, eq=False)
class Mail:
    """One mail on its way: the same object goes through failover, channel and connection, which keep their state here.

    A `RelayChannel` calls `finish` exactly once for each `send`.
    """

    envelope: Envelope
    deadline: float  # loop time by which `done` is called
    # Called when the last command before the content leaves, with a function to call once and soon with whether the
    # content may follow. So the answers for many mails can be batched, and come while the relay answers. Called again
    # for each further attempt; an answer to an earlier one is ignored.
    before_data: Callable[[Callable[[bool], None]], None]
    # Asked right before the content is written, after a positive answer: whether that still holds.
    still_permitted: Callable[[], bool]
    # Called once with the outcome: None (accepted), a `MailError`, or what `before_data` raised
    done: Callable[[Exception | None], None]
    observer: AttemptObserver | None = None

    # Failover's state
    attempt_done: Callable[[Mail, Exception | None], None] | None = field(default=None, init=False)
    untried: Iterator[Relay] = field(init=False)
    relay: Relay = field(init=False)  # of the current attempt
    is_probe: bool = field(init=False)  # whether the current attempt probes an unhealthy relay
    failures: tuple[MailError, ...] = field(init=False)  # of earlier attempts
    # The channel's state, for the current attempt; loop times
    attempt_deadline: float = field(init=False)
    connection_deadline: float = field(init=False)  # until when it may wait for a connection
    was_busy: bool = field(init=False)  # whether it was refused a connection (421) once

    def finish(self, error: Exception | None) -> None:
        """Report the outcome of one attempt."""
        if self.attempt_done is None:  # sent without failover
            self.done(error)
        else:
            self.attempt_done(self, error)

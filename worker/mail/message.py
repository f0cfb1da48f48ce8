"""What is to be sent, and who is asked and told on the way."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from producer.setting_types import RelayURL

_NO_PATH: Final = re.compile(r"[\x00-\x20<>\x7f\ud800-\udfff]")


class Envelope(NamedTuple):
    """One mail, ready to go."""

    sender: str
    recipient: str
    needs_smtputf8: bool
    content: bytes  # CRLF lines, dot-stuffed, the last one ended, without the final dot

    def check(self) -> None:
        """Raise `ValueError` if an address could say more than an address, or the final dot would not stand alone."""
        if _NO_PATH.search(self.sender) or _NO_PATH.search(self.recipient):
            raise ValueError("an address with a control character, a space, an angle bracket or half a character")
        if not self.needs_smtputf8 and not (self.sender.isascii() and self.recipient.isascii()):
            raise ValueError("an address that is not ASCII and claims to need no SMTPUTF8")
        if not self.content.endswith(b"\r\n"):
            raise ValueError("content whose last line is not ended")


class Tries(Protocol):
    """Writes down which relays were asked for one mail, one after the other."""

    def trying(self, relay: RelayURL) -> None:
        """This one is asked now."""

    def tried(self, outcome: str, error: Exception | None) -> None:
        """What became of it, in a word; None: it accepted the mail."""


class Mail(NamedTuple):
    """One mail for one transaction."""

    envelope: Envelope
    deadline: float  # loop time
    # Called right before the content is to be written, with what is then called with whether it may be, once and soon:
    # many connections' questions are answered together.
    before_data: Callable[[Callable[[bool], None]], None]
    # Called once with the outcome: None: accepted; a `MailError`; what `before_dot` raised.
    done: Callable[[Exception | None], None]
    tries: Tries | None = None  # None: nobody wants to know

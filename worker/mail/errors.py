"""Why a mail did not go out: one root error, few kinds, and `classify`, which knows the kind of every reply."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from producer.errors import VerifyError


class Step(StrEnum):
    """What a relay's reply answers."""

    BANNER = "banner"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    AUTH = "auth"
    RSET = "rset"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    DOT = "dot"


class MailError(VerifyError):
    """The mail was not sent."""

    def __init__(self, code: int | None = None, enhanced: str | None = None) -> None:
        """`code`, `enhanced`: the relay's reply, if there was one. Its text is not kept: relays echo addresses."""
        said = " ".join(str(part) for part in (code, enhanced) if part)
        what = (type(self).__doc__ or "").strip()
        super().__init__(f"{what} ({said})" if said else what)
        self.code = code
        self.enhanced = enhanced

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.enhanced)


class RecipientRejected(MailError):
    """The mailbox is refused for good."""


class MessageRejected(MailError):
    """The message is refused for good."""


class MessageDeferred(MailError):
    """The mail could not be sent for now."""


class RelayUnavailable(MailError, ConnectionError):
    """The relay could not be reached or does not work."""


class RelayBusy(MailError, ConnectionError):
    """The relay wants fewer connections."""


class AcceptanceUnknown(MailError, ConnectionError):
    """The relay did not say whether it accepted the mail."""


class Smtputf8Unsupported(MailError):
    """The address needs SMTPUTF8, which the relay lacks."""


class SendCancelled(MailError):
    """The request's deadline came, or the worker stops."""


class SendWithheld(MailError):
    """The send was called off before the mail's content left."""


_CLOSING: Final = 421
# RFC 4954, 6: authentication required, too weak, failed, encryption required.
_AUTH_CODES: Final = frozenset({530, 534, 535, 538})
# RFC 5321, 4.2.2: mailbox unavailable, user not local, mailbox name not allowed.
_MAILBOX_CODES: Final = frozenset({550, 551, 553})
_BEFORE_RCPT: Final = frozenset({Step.BANNER, Step.EHLO, Step.STARTTLS, Step.AUTH, Step.RSET, Step.MAIL})


def classify(step: Step, code: int | None, enhanced: str | None) -> MailError:
    """The kind of a reply that is not what `step` needs to go on.

    `code` None: no usable reply came (connection lost, timeout, malformed). `enhanced`: as in RFC 3463, "5.1.1".
    """
    said = (code, enhanced)
    match 0 if code is None else code // 100:
        case 4 if code == _CLOSING and step in _BEFORE_RCPT:
            return RelayBusy(*said)
        case 4 | 5 if step is Step.STARTTLS:
            return RelayUnavailable(*said)
        case 4:
            return MessageDeferred(*said)
        case 5 if step is Step.AUTH or code in _AUTH_CODES:
            return RelayUnavailable(*said)
        case 5:
            bare = step is Step.RCPT and enhanced is None and code in _MAILBOX_CODES
            mailbox = bare or (enhanced is not None and enhanced.startswith("5.1."))
            return RecipientRejected(*said) if mailbox else MessageRejected(*said)
    # Nothing, or a positive reply in the wrong place: client and relay no longer talk about the same thing.
    return AcceptanceUnknown(*said) if step is Step.DOT else RelayUnavailable(*said)

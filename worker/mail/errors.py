"""Why a mail was not sent. The kinds belong to every mail channel; `classify` gives the kind of an SMTP reply."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from producer.errors import VerifyError


class Step(StrEnum):
    """The part of the SMTP dialogue in which a mail failed, as logs name it."""

    CONNECT = "connect"
    BANNER = "banner"
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    RSET = "RSET"
    MAIL = "MAIL FROM"
    RCPT = "RCPT TO"
    DATA = "DATA"
    CONTENT = "content"  # and the final dot


# RFC 4954, 6: authentication required, too weak, failed, encryption required.
_AUTH_CODES: Final = frozenset({530, 534, 535, 538})
# RFC 3463, 3.2, and RFC 7505: no such mailbox, bad syntax, has moved, null MX.
_MAILBOX_STATUSES: Final = frozenset({"5.1.1", "5.1.3", "5.1.6", "5.1.10"})
# RFC 5321, 4.2.2: mailbox unavailable, user not local, mailbox name not allowed.
_MAILBOX_CODES: Final = frozenset({550, 551, 553})
# RFC 3463, 3.2: bad sender's mailbox address syntax, bad sender's system address.
_SENDER_STATUSES: Final = frozenset({"5.1.7", "5.1.8"})


class MailError(VerifyError):
    """The mail was not sent."""

    relay: str | None = None  # masked URL of the relay that failed; failover sets it
    credible_refusal = False  # the relay refused the mailbox, and accepts others; failover sets it

    def __init__(self, code: int | None = None, enhanced: str | None = None, step: Step | None = None) -> None:
        """`code`, `enhanced`: the relay's reply, if any, to `step`. Its text is dropped: relays echo addresses."""
        self.code = code
        self.enhanced = enhanced
        self.step = step
        super().__init__()

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.reply})" if self.reply else self.args[0]

    @property
    def reply(self) -> str:
        """The reply and what it answers, such as "553 5.1.8 at MAIL FROM"; empty if there was none."""
        said = " ".join(str(part) for part in (self.code, self.enhanced) if part)
        return f"{said} at {self.step}" if said and self.step else said

    @property
    def sender_refused(self) -> bool:
        """Whether the relay refused the envelope sender for good: `VERIFY_MAIL_FROM` is to be checked."""
        rejected = self.code is not None and self.code >= 500 and self.code not in _AUTH_CODES
        return rejected and (self.step is Step.MAIL or self.enhanced in _SENDER_STATUSES)

    @property
    def mailbox_refused(self) -> bool:
        """Whether the reply speaks of the mailbox alone, and for good: not of the sender, the content or our host."""
        if self.step is not Step.RCPT or self.code is None or self.code < 500:
            return False
        return self.code in _MAILBOX_CODES if self.enhanced is None else self.enhanced in _MAILBOX_STATUSES

    @property
    def login_refused(self) -> bool:
        """Whether the relay refused our user and password, or asks for some: `VERIFY_RELAYS` is to be checked."""
        return self.code is not None and (self.code in _AUTH_CODES or (self.step is Step.AUTH and self.code >= 500))


class RecipientRejected(MailError):
    """The relay refused the mailbox for good."""


class MessageRejected(MailError):
    """The relay refused the message for good."""


class MessageDeferred(MailError):
    """The mail cannot be sent for now."""


class RelayUnavailable(MailError):
    """The relay cannot be reached or does not work."""


class RelayBusy(MailError):
    """The relay accepts no more connections."""


class AcceptanceUnknown(MailError):
    """The relay may have accepted the mail: the connection ended before it said so."""


class Smtputf8Unsupported(MailError):
    """The address needs SMTPUTF8, which the relay does not offer."""


class SendCancelled(MailError):
    """The request's deadline has passed, or the worker is stopping."""


class SendAborted(MailError):
    """The caller aborted the send before the content was written."""


_CLOSING: Final = 421
_BEFORE_RCPT: Final = frozenset({Step.BANNER, Step.EHLO, Step.STARTTLS, Step.AUTH, Step.RSET, Step.MAIL})


def classify(step: Step, code: int | None, enhanced: str | None) -> MailError:
    """The error for a reply with which `step` cannot go on.

    `code` None: no usable reply came (connection lost, timeout, malformed). `enhanced`: as in RFC 3463, "5.1.1".
    """
    return _kind(step, code, enhanced)(code, enhanced, step)


def _kind(step: Step, code: int | None, enhanced: str | None) -> type[MailError]:
    match 0 if code is None else code // 100:
        case 4 if code == _CLOSING and step in _BEFORE_RCPT:
            return RelayBusy
        case 4 | 5 if step is Step.STARTTLS:
            return RelayUnavailable
        case 4:
            return MessageDeferred
        case 5 if step is Step.AUTH or code in _AUTH_CODES:
            return RelayUnavailable
        case 5:
            return RecipientRejected if _recipient_rejected(step, code, enhanced) else MessageRejected
    # No reply, or a positive one in the wrong place: client and relay are out of step.
    return AcceptanceUnknown if step is Step.CONTENT else RelayUnavailable


def _recipient_rejected(step: Step, code: int | None, enhanced: str | None) -> bool:
    """Whether a 5yz reply refuses the recipient: before RCPT, the sender's is the only address a relay has seen."""
    if step in _BEFORE_RCPT or enhanced in _SENDER_STATUSES:
        return False
    if enhanced is None:
        return step is Step.RCPT and code in _MAILBOX_CODES
    return enhanced.startswith("5.1.")

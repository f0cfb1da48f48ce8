"""`classify` gives the kind of every reply at every step, and an error says which setting to check."""

from __future__ import annotations

import pickle

import pytest

from producer.errors import VerifyError
from worker.mail import errors
from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RecipientRejected,
    RelayBusy,
    RelayUnavailable,
    Step,
    classify,
)

EARLY = [Step.BANNER, Step.EHLO, Step.STARTTLS, Step.AUTH, Step.RSET, Step.MAIL]
LATE = [Step.RCPT, Step.DATA, Step.CONTENT]
TRANSACTION = [Step.RSET, Step.MAIL, Step.RCPT, Step.DATA, Step.CONTENT]
Case = tuple[Step, int | None, str | None, type[MailError]]

CASES: list[Case] = [
    *((step, 421, None, RelayBusy) for step in EARLY),
    *((step, 421, "4.7.0", MessageDeferred) for step in LATE),
    *((step, code, None, MessageDeferred) for step in TRANSACTION for code in (450, 451, 452, 454, 471)),
    *((step, 451, "4.3.0", MessageDeferred) for step in (Step.BANNER, Step.EHLO, Step.AUTH)),
    *((Step.STARTTLS, code, None, RelayUnavailable) for code in (454, 500, 501, 502, 554)),
    *((Step.AUTH, code, None, RelayUnavailable) for code in (500, 501, 503, 504, 530, 534, 535, 538, 550, 554)),
    (Step.AUTH, 535, "5.7.8", RelayUnavailable),
    (Step.AUTH, 454, "4.7.0", MessageDeferred),
    *((step, code, None, RelayUnavailable) for step in TRANSACTION for code in (530, 534, 535, 538)),
    *((step, code, "5.1.1", RecipientRejected) for step in LATE for code in (550, 553, 554)),
    *((step, 550, enhanced, MessageRejected) for step in (Step.RSET, Step.MAIL) for enhanced in ("5.1.1", "5.1.7")),
    *((step, 550, enhanced, MessageRejected) for step in LATE for enhanced in ("5.1.7", "5.1.8")),
    *((Step.RCPT, 550, enhanced, RecipientRejected) for enhanced in ("5.1.0", "5.1.2", "5.1.10", None)),
    *((Step.RCPT, code, None, RecipientRejected) for code in (550, 551, 553)),
    *((Step.RCPT, code, None, MessageRejected) for code in (500, 501, 502, 503, 521, 552, 554, 556)),
    *((Step.RCPT, 550, enhanced, MessageRejected) for enhanced in ("5.7.1", "5.2.1", "5.2.2", "5.10.1", "4.1.1")),
    *((step, code, None, MessageRejected) for step in (Step.MAIL, Step.DATA, Step.CONTENT) for code in (550, 551, 553)),
    *((step, 554, None, MessageRejected) for step in (Step.BANNER, Step.EHLO, *TRANSACTION)),
    (Step.RCPT, 450, "5.1.1", MessageDeferred),
    *((step, None, None, RelayUnavailable) for step in Step if step is not Step.CONTENT),
    (Step.CONTENT, None, None, AcceptanceUnknown),
    *((step, code, None, RelayUnavailable) for step in (*EARLY, Step.RCPT) for code in (334, 354)),
    *((Step.DATA, code, None, RelayUnavailable) for code in (220, 250)),
    (Step.CONTENT, 354, None, AcceptanceUnknown),
]


@pytest.mark.parametrize(("step", "code", "enhanced", "kind"), CASES)
def test_every_reply_has_one_kind(step: Step, code: int | None, enhanced: str | None, kind: type[MailError]) -> None:
    error = classify(step, code, enhanced)
    assert type(error) is kind
    assert (error.code, error.enhanced, error.step) == (code, enhanced, step)


@pytest.mark.parametrize(
    ("step", "code", "enhanced", "refused"),
    [
        *((Step.RCPT, 550, enhanced, True) for enhanced in ("5.1.1", "5.1.3", "5.1.6", "5.1.10")),
        *((Step.RCPT, code, None, True) for code in (550, 551, 553)),
        (Step.RCPT, 554, "5.1.1", True),
        *((Step.RCPT, 550, enhanced, False) for enhanced in ("5.1.0", "5.1.2", "5.1.7", "5.1.8", "5.7.1", "5.2.2")),
        *((Step.RCPT, code, None, False) for code in (500, 501, 552, 554)),
        (Step.RCPT, 450, "5.1.1", False),
        (Step.RCPT, None, None, False),
        *((step, 550, enhanced, False) for step in Step if step is not Step.RCPT for enhanced in ("5.1.1", None)),
    ],
)
def test_only_a_reply_to_rcpt_that_speaks_of_the_mailbox_refuses_it(
    step: Step, code: int | None, enhanced: str | None, refused: bool
) -> None:
    assert classify(step, code, enhanced).mailbox_refused == refused


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MailError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_its_kind_and_reply_and_survives_pickling(kind: type[MailError]) -> None:
    error = kind(550, "5.1.1", Step.RCPT)
    assert isinstance(error, VerifyError)
    assert error.reply == "550 5.1.1 at RCPT TO"
    assert str(error) == f"{kind.__doc__} (550 5.1.1 at RCPT TO)"
    assert str(kind()) == kind.__doc__
    error.relay = "smtp://***@host:25"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 our own bytes
    assert (type(again), again.reply, str(again), again.relay) == (kind, error.reply, str(error), error.relay)


@pytest.mark.parametrize(
    ("step", "code", "enhanced", "sender", "login"),
    [
        (Step.MAIL, 553, None, True, False),
        (Step.MAIL, 550, "5.7.1", True, False),
        (Step.RCPT, 550, "5.1.8", True, False),
        (Step.CONTENT, 554, "5.1.7", True, False),
        (Step.RCPT, 550, "5.1.1", False, False),
        (Step.MAIL, 451, "4.1.8", False, False),
        (Step.MAIL, 530, "5.7.0", False, True),
        (Step.AUTH, 535, "5.7.8", False, True),
        (Step.AUTH, 554, None, False, True),
        (Step.AUTH, 454, "4.7.0", False, False),
        (Step.MAIL, None, None, False, False),
        (Step.AUTH, None, None, False, False),
    ],
)
def test_a_refused_sender_and_a_refused_login_are_told_apart(
    step: Step, code: int | None, enhanced: str | None, sender: bool, login: bool
) -> None:
    error = classify(step, code, enhanced)
    assert (error.sender_refused, error.login_refused) == (sender, login)

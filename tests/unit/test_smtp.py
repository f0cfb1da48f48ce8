"""No address, content or command can inject SMTP commands."""

from __future__ import annotations

import asyncio

import pytest

from worker.mail.errors import Step
from worker.mail.message import Envelope
from worker.mail.smtp import SmtpConnection

CONTENT = b"Subject: x\r\n\r\nhello\r\n"
INJECTIONS = [
    "a@b.cc>\r\nRCPT TO:<victim@b.cc",
    "a@b.cc\r\nDATA",
    "a@b.cc\n",
    "a@b.cc\r",
    "a\0@b.cc",
    "a@b.cc> NOTIFY=NEVER",
    "<a@b.cc",
    "a b@b.cc",
    "a\t@b.cc",
    "a\x7f@b.cc",
    "\udc80a@b.cc",
]


@pytest.mark.parametrize("utf8", [False, True])
@pytest.mark.parametrize("address", INJECTIONS)
def test_an_address_that_could_inject_a_command_is_rejected(address: str, utf8: bool) -> None:
    for sender, recipient in (("ok@b.cc", address), (address, "ok@b.cc")):
        with pytest.raises(ValueError, match="an address") as caught:
            Envelope(sender, recipient, utf8, CONTENT).check()
        assert "b.cc" not in str(caught.value)


def test_a_non_ascii_address_needs_smtputf8() -> None:
    with pytest.raises(ValueError, match="non-ASCII"):
        Envelope("ok@b.cc", "用户@b.cc", False, CONTENT).check()
    Envelope("ok@b.cc", "用户@b.cc", True, CONTENT).check()


@pytest.mark.parametrize("content", [b"", b"hello", b"hello\n", b"hello\r"])
def test_content_must_end_its_last_line(content: bytes) -> None:
    with pytest.raises(ValueError, match="last line"):
        Envelope("ok@b.cc", "a@b.cc", False, content).check()


@pytest.mark.parametrize("line", [b"EHLO a\r\nQUIT", b"NOOP\n", b"NOOP\r", b"NO\0OP"])
def test_a_command_is_one_line(line: bytes) -> None:
    async def say() -> None:
        await SmtpConnection(lambda *_: None, lambda _: None, lambda _: None).command(Step.EHLO, line)

    with pytest.raises(ValueError, match="CR, LF or NUL"):
        asyncio.run(say())

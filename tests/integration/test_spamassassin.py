"""SpamAssassin's local tests on the mail as a receiving server sees it. Needs Debian's `spamassassin`."""

from __future__ import annotations

import os
import re
import subprocess
from email.utils import formatdate
from pathlib import Path

import pytest

from producer.setting_types import Sender
from worker.mail.render import Renderer, locales

pytestmark = pytest.mark.tools

LIMIT = 0.2  # points
# How the relay hands it on: itself named in the DNS or not. A real address: documentation ranges count as forged.
HANDOVERS = {
    "named": "from mail.example.com (mail.example.com [93.184.216.34])",
    "nameless": "from mail.example.com (unknown [93.184.216.34])",
}
SENDERS = [Sender("", "no-reply@example.com"), Sender("聊天", "no-reply@example.com")]


def received(raw: bytes, handover: str) -> bytes:
    """`raw` as it lies in the mailbox: dots unstuffed, LF lines, with the receiving server's headers."""
    trace = (
        "Return-Path: <no-reply@example.com>\n"
        f"Received: {handover}\n\tby mx.example.net (Postfix) with ESMTPS id 4XyZ\n"
        f"\tfor <a@example.net>; {formatdate()}\n"
    )
    return trace.encode() + re.sub(rb"(?m)^\.", b"", raw).replace(b"\r\n", b"\n")


@pytest.mark.parametrize("sender", SENDERS, ids=["bare", "named in Chinese"])
@pytest.mark.parametrize("handover", HANDOVERS)
@pytest.mark.parametrize("locale", locales())
def test_score(locale: str, handover: str, sender: Sender, tmp_path: Path) -> None:
    raw = Renderer(sender, default_locale="zh-CN").render(
        recipient="a@example.net", code="482913", life=600, request_id="r-1", locale=locale
    )
    judged = subprocess.run(
        ["spamassassin", "-L", "-t"],
        input=received(raw, HANDOVERS[handover]),
        # Nobody's preferences or learnt words.
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    report = judged.partition("Content analysis details:")[2]
    points = {rule: float(score) for score, rule in re.findall(r"^ *(-?\d+\.\d) ([A-Z]\w+)", report, re.MULTILINE)}
    assert "HTML_MESSAGE" in points, judged
    # That the relay's address has no name is the relay's fault; what the mail adds to it would be ours.
    points.pop("RDNS_NONE", None)
    assert sum(points.values()) <= LIMIT, points

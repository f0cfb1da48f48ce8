"""What a worker's log says about a Redis that refuses, and what operators read about it."""

from __future__ import annotations

import re

from support.process import ROOT

from producer.redis.protocol import LOGIN_REFUSED
from worker.contact import MEANINGS


def test_the_docs_explain_each_refusal_that_the_log_explains_and_no_other() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    _, _, section = page.partition("\n## Redis refuses\n")
    words = [line.split("|")[1] for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert {word for cell in words for word in re.findall(r"`(\w+)`", cell)} == MEANINGS.keys() | LOGIN_REFUSED

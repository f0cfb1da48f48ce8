"""The demo page explains every error code of the contract, in both of its languages."""

from __future__ import annotations

import re
from pathlib import Path

from producer.contract import ErrorCode

WORDS = Path(__file__).parents[2] / "producer" / "api" / "demo" / "page" / "words.js"


def test_every_error_code_has_a_text_in_both_languages() -> None:
    blocks = re.findall(r"\n    errors: \{\n(.*?)\n    \},", WORDS.read_text(encoding="utf-8"), re.DOTALL)
    codes = {int(error) for error in ErrorCode if error}
    explained = [{int(code) for code in re.findall(r"^ +(\d+): \"", block, re.MULTILINE)} for block in blocks]
    assert [codes - each for each in explained] == [set(), set()]

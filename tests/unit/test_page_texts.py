"""The demo page explains every error code of the contract, in its own words or in the table's."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from producer.contract import ErrorCode

WORDS = (Path(__file__).parents[2] / "producer" / "api" / "demo" / "page" / "words.js").read_text("utf-8")
TRANSLATED = {1, 2, 3, 4, 5, 6, 1001, 1003, 1004}


def test_the_known_error_codes_keep_their_texts_in_both_languages() -> None:
    blocks = re.findall(r"\n    errors: \{\n(.*?)\n    \},", WORDS, re.DOTALL)
    explained = [{int(code) for code in re.findall(r"^ +(\d+): \"", block, re.MULTILINE)} for block in blocks]
    assert [TRANSLATED - each for each in explained] == [set(), set()]


@pytest.mark.tools
def test_an_error_code_without_a_text_shows_what_the_table_says() -> None:
    facts = {"errors": {int(code): {"meaning": code.meaning, "advice": code.advice} for code in ErrorCode}}
    facts["errors"][7] = {"meaning": "It is new.", "advice": "Wait."}
    calls = "words[tag], facts, 7), explain(words[tag], facts, 3), explain(words[tag], null, 7"
    script = f"""
const facts = {json.dumps(facts)};
console.log(JSON.stringify(["en", "zh"].map((tag) => [explain({calls})])));
"""
    command = ["node", "--input-type=module"]
    done = subprocess.run(command, input=WORDS + script, capture_output=True, text=True, timeout=60, check=True)
    for new, known, unknown in json.loads(done.stdout):
        assert new == "It is new. Wait."
        assert known not in {ErrorCode.INVALID_ADDRESS.meaning, unknown}
        assert unknown  # before the page has the table

"""The README in both languages says the same: headings, blocks, commands, tables, links."""

from __future__ import annotations

import re

import doc_pages as pages
import pytest

ENGLISH = "README.md"
CHINESE = "README.zh-CN.md"
SETTINGS = r"(?m)^\| (`VERIFY_\w+`) \| (?:(`.+?`)|.*?) \|"  # a default in words is each language's own
ERRORS = r"(?m)^\| (\d+) \| (\w+) \|"
METRICS = r"(?m)^\| (`(?:worker|queue)_[^|]*) \|([^|]*)\|"  # names and labels


def code_of(block: pages.Block) -> list[str]:
    """A block without comments, which are in words, and without indentation."""
    lines = re.sub(r"(?m)\s+# .*$", "", block.text).splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_headings_are_alike_in_number_and_level() -> None:
    levels = [[level for level, _ in pages.headings(page)] for page in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    assert len(levels[0]) > 10


def test_blocks_are_the_same_but_for_comments_and_diagrams() -> None:
    english, chinese = ([b for b in pages.blocks(page) if b.language] for page in (ENGLISH, CHINESE))
    assert [b.language for b in english] == [b.language for b in chinese]
    assert [code_of(b) for b in english] == [code_of(b) for b in chinese]
    assert [len(pages.blocks(page)) for page in (ENGLISH, CHINESE)] == [len(english) + 1] * 2


def test_commands_in_sentences_are_the_same() -> None:
    english, chinese = (sorted(pages.typed_in_sentences(page)) for page in (ENGLISH, CHINESE))
    assert english == chinese


@pytest.mark.parametrize("row", [SETTINGS, ERRORS, METRICS], ids=["settings", "errors", "metrics"])
def test_tables_have_the_same_rows(row: str) -> None:
    english, chinese = (re.findall(row, pages.read(page)) for page in (ENGLISH, CHINESE))
    assert english == chinese
    assert len(english) > 5


def test_links_lead_to_the_same_places() -> None:
    """Sentences are ordered differently, so the order of links is each language's own."""
    english, chinese = (set(pages.links(page)) for page in (ENGLISH, CHINESE))
    assert english - {CHINESE} == chinese - {ENGLISH}
    assert CHINESE in english
    assert ENGLISH in chinese


def test_what_is_code_in_one_is_code_in_the_other() -> None:
    """Names, keys, values and options: what is forgotten in a translation shows here."""
    english, chinese = (set(re.findall(r"`([^`\n]+)`", pages.prose(page))) for page in (ENGLISH, CHINESE))
    assert english ^ chinese == set()

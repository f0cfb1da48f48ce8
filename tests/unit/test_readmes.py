"""A page in both languages says the same in both: headings, blocks, commands, tables, links."""

from __future__ import annotations

import re

import pytest
from support import doc_pages as pages

ZH = ".zh-CN.md"
PAIRS = [(page.replace(ZH, ".md"), page) for page in pages.PAGES if page.endswith(ZH)]
both = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
SETTINGS = r"(?m)^\| (`VERIFY_\w+`) \| (?:(`.+?`)|.*?) \|"  # a default in words is each language's own
ERRORS = r"(?m)^\| (\d+) \| (\w+) \|"
METRICS = r"(?m)^\| (`(?:worker|queue)_[^|]*) \|([^|]*)\|"  # names and labels


def code_of(block: pages.Block) -> list[str]:
    """A block without comments, which are in words, and without indentation."""
    lines = re.sub(r"(?m)\s+# .*$", "", block.text).splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_both_pages_are_there() -> None:
    assert PAIRS == [("README.md", "README.zh-CN.md"), ("docs/callers.md", "docs/callers.zh-CN.md")]


@both
def test_headings_are_alike_in_number_and_level(pair: tuple[str, str]) -> None:
    english, chinese = ([level for level, _ in pages.headings(page)] for page in pair)
    assert english == chinese
    assert len(english) > 8


@both
def test_blocks_are_the_same_but_for_comments_and_diagrams(pair: tuple[str, str]) -> None:
    english, chinese = (pages.blocks(page) for page in pair)
    assert [b.language for b in english] == [b.language for b in chinese]
    assert [code_of(b) for b in english if b.language] == [code_of(b) for b in chinese if b.language]


@both
def test_commands_in_sentences_are_the_same(pair: tuple[str, str]) -> None:
    english, chinese = (sorted(pages.typed_in_sentences(page)) for page in pair)
    assert english == chinese


@both
@pytest.mark.parametrize("row", [SETTINGS, ERRORS, METRICS], ids=["settings", "errors", "metrics"])
def test_tables_have_the_same_rows(pair: tuple[str, str], row: str) -> None:
    english, chinese = (re.findall(row, pages.read(page)) for page in pair)
    assert english == chinese
    assert len(english) > 5 or (pair[0] != "README.md" and row != ERRORS)


@both
def test_links_lead_to_the_same_places(pair: tuple[str, str]) -> None:
    """Sentences are ordered differently, so the order of links is each language's own; anchors are its headings."""
    english, chinese = ({target.partition("#")[0].replace(ZH, ".md") for target in pages.links(page)} for page in pair)
    itself = {pair[0].rpartition("/")[2]}
    assert english | itself == chinese | itself


@both
def test_each_names_the_other_at_its_top(pair: tuple[str, str]) -> None:
    for page, other in (pair, pair[::-1]):
        assert f"]({other.rpartition('/')[2]})" in "".join(pages.read(page).splitlines()[:4])


@both
def test_what_is_code_in_one_is_code_in_the_other(pair: tuple[str, str]) -> None:
    """Names, keys, values and options: what is forgotten in a translation shows here."""
    english, chinese = (set(re.findall(r"`([^`\n]+)`", pages.prose(page))) for page in pair)
    assert english ^ chinese == set()

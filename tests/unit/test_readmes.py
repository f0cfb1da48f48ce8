"""A page in two languages says the same in both; the docs' tables are up to date, and their settings exist."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support import doc_pages as pages

from producer.contract import ErrorCode
from producer.settings import NAMES

ZH = ".zh-CN.md"
PAIRS = [(page.replace(ZH, ".md"), page) for page in pages.PAGES if page.endswith(ZH)]
both = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
SETTINGS = r"(?m)^\| (`VERIFY_\w+`) \| (?:(`.+?`)|.*?) \|"  # a default in words differs by language
ERRORS = r"(?m)^\| (\d+) \| (\w+) \|"


def code_of(block: pages.Block) -> list[str]:
    """The lines of a block without comments and indentation."""
    lines = re.sub(r"(?m)\s+# .*$", "", block.text).splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_both_pages_are_there() -> None:
    assert PAIRS == [("README.md", "README.zh-CN.md"), ("docs/callers.md", "docs/callers.zh-CN.md")]


@pytest.mark.parametrize("page", [page for pair in PAIRS for page in pair])
def test_every_error_code_has_its_row(page: str) -> None:
    expected = [(str(int(code)), code.title) for code in ErrorCode]
    assert re.findall(ERRORS, pages.read(page)) == expected


def test_the_tables_of_error_codes_and_settings_are_up_to_date() -> None:
    """`make docs` writes them from producer/contract.py and .env.example."""
    command = [sys.executable, str(pages.ROOT / "docs" / "tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_every_setting_that_a_page_names_exists() -> None:
    named = {(page, name) for page in pages.PAGES for name in re.findall(r"\bVERIFY_[A-Z][A-Z_]*", pages.read(page))}
    assert len(named) > 50
    known = {*NAMES, *(f"{name}_FILE" for name in NAMES)}
    assert [(page, name) for page, name in sorted(named) if name not in known] == []


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_is_short(page: str) -> None:
    rows = re.findall(ERRORS, pages.read(page))
    assert len(pages.read(page).splitlines()) - len(rows) <= 140


@both
def test_headings_have_the_same_levels(pair: tuple[str, str]) -> None:
    english, chinese = ([level for level, _ in pages.headings(page)] for page in pair)
    assert english == chinese
    assert len(english) > 8


@both
def test_blocks_are_the_same_except_for_comments_and_diagrams(pair: tuple[str, str]) -> None:
    english, chinese = (pages.blocks(page) for page in pair)
    assert [b.language for b in english] == [b.language for b in chinese]
    assert [code_of(b) for b in english if b.language] == [code_of(b) for b in chinese if b.language]


@both
def test_commands_in_sentences_are_the_same(pair: tuple[str, str]) -> None:
    english, chinese = (sorted(pages.typed_in_sentences(page)) for page in pair)
    assert english == chinese


def test_the_readmes_list_the_same_ten_settings() -> None:
    english, chinese = (re.findall(SETTINGS, pages.read(page)) for page in PAIRS[0])
    assert english == chinese
    assert len(english) == 10


@both
def test_links_lead_to_the_same_places(pair: tuple[str, str]) -> None:
    """Word order and anchors differ by language."""
    english, chinese = ({target.partition("#")[0].replace(ZH, ".md") for target in pages.links(page)} for page in pair)
    itself = {pair[0].rpartition("/")[2]}
    assert english | itself == chinese | itself


@both
def test_each_links_the_other_at_its_top(pair: tuple[str, str]) -> None:
    for page, other in (pair, pair[::-1]):
        assert f"]({other.rpartition('/')[2]})" in "".join(pages.read(page).splitlines()[:4])


@both
def test_what_is_code_in_one_is_code_in_the_other(pair: tuple[str, str]) -> None:
    """Names, keys, values and options."""
    english, chinese = (set(re.findall(r"`([^`\n]+)`", pages.prose(page))) for page in pair)
    assert english ^ chinese == set()

"""The docs as data: fenced blocks, commands in blocks and in sentences, headings, links, tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
# The pages whose commands are tested. CHANGELOG.md and bench/results are records without commands.
_GLOBS: Final = ("*.md", "docs/**/*.md", "examples/**/*.md", "bench/README.md", "deploy/**/*.md", "tests/contract/*.md")
PAGES: Final = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in _GLOBS
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md" and "node_modules" not in path.parts
)
LINKED: Final = sorted([*PAGES, "CHANGELOG.md", "bench/results/report.md"])  # the pages whose links are tested

_FENCE: Final = re.compile(r"(?ms)^( *)```(\w*)\n(.*?)^\1```$")
_PROGRAMS: Final = (
    r"(?:make|\.venv/bin/\w+|python3?|celery|docker|docker-compose|kubectl|helm|curl|npm|uv|redis-cli|export)"
)
# What a reader would type: a program, perhaps with variables before it, and at least one word after it.
_TYPED: Final = re.compile(rf"(?:[A-Z_]+=\S* )*{_PROGRAMS} \S.*")
_COMMENT: Final = re.compile(r"(?:^|\s+)#(?: .*)?$")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str  # relative to the checkout
    heading: str  # the nearest above it
    line: int  # of the page, 1 for the first
    language: str
    text: str

    @property
    def commands(self) -> tuple[str, ...]:
        """The lines to type, with continued lines joined and without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = (" ".join(_COMMENT.sub("", line).split()) for line in joined.splitlines())
        return tuple(line for line in lines if line)


def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text("utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = read(page)
    found = []
    for fence in _FENCE.finditer(text):
        before = _FENCE.sub("", text[: fence.start()])
        above = re.findall(r"(?m)^#+ (.+)$", before)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, above[-1] if above else "", line, fence[2], textwrap.dedent(fence[3])))
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def typed_in_sentences(page: str) -> list[str]:
    """The commands that stand as code in a sentence."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))
    return [" ".join(span.split()) for span in spans if _TYPED.fullmatch(span)]


def looks_typed(line: str) -> bool:
    """Whether a line of a block without a language is a command."""
    return bool(_TYPED.fullmatch(line.strip().removeprefix("$ ")))


def headings(page: str) -> list[tuple[int, str]]:
    """Level and text of each heading."""
    return [(len(marks), text.strip()) for marks, text in re.findall(r"(?m)^(#+) (.+)$", prose(page))]


def anchors(page: str) -> set[str]:
    """GitHub's anchors of the headings: lower case, no punctuation, dashes for spaces, numbered if repeated."""
    found: dict[str, int] = {}
    for _, text in headings(page):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        times = found.get(slug, 0)
        found[slug] = times + 1
        if times:
            found[f"{slug}-{times}"] = 1
    return set(found)


def links(page: str) -> Iterator[str]:
    """The targets of a page's links and pictures."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of each row of the tables below a heading, without the head rows."""
    text = prose(page)
    start = re.search(rf"(?m)^#+ {re.escape(heading)}$", text)
    assert start, heading
    section = re.split(r"(?m)^#+ ", text[start.end() :])[0]
    lines = re.findall(r"(?m)^ *\|(.+)\|$", section)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    heads = {i for i, row in enumerate(cells[1:]) if all(set(cell) <= set("-:") for cell in row)}
    return [row for i, row in enumerate(cells) if i not in heads and i - 1 not in heads]

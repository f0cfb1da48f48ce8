"""Every link within the project leads somewhere, and both READMEs link every page."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import unquote

import pytest
from support import doc_pages as pages

ZH = ".zh-CN.md"  # each README links the pages in its own language where there are such


def inside(page: str) -> list[tuple[str, str]]:
    """File and anchor of each of a page's links within the project."""
    found = []
    for target in pages.links(page):
        if not target.startswith(("https://", "http://", "mailto:")):
            file, _, anchor = unquote(target).partition("#")
            found.append((file, anchor))
    return found


def resolved(page: str, file: str) -> str:
    """The linked file, relative to the checkout."""
    if not file:
        return page
    return (pages.ROOT / page).parent.joinpath(file).resolve().relative_to(pages.ROOT.resolve()).as_posix()


@pytest.mark.parametrize("page", pages.LINKED)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    broken = []
    for file, anchor in inside(page):
        assert not PurePosixPath(file).is_absolute(), file
        target = resolved(page, file)
        if not (pages.ROOT / target).exists() or (anchor and anchor not in pages.anchors(target)):
            broken.append(f"{file}#{anchor}")
    assert broken == []


def test_the_links_are_found() -> None:
    assert ("ARCHITECTURE.md", "") in inside("README.md")
    assert sum(len(inside(page)) for page in pages.LINKED) > 50


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_page_is_linked_from_both_readmes(readme: str) -> None:
    linked = {resolved(readme, file).replace(ZH, ".md") for file, _ in inside(readme)}
    expected = {page.replace(ZH, ".md") for page in pages.PAGES if page.startswith("docs/")} | {
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    }
    assert expected - linked == set()

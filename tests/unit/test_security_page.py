"""docs/security.md names tests that exist."""

from __future__ import annotations

import ast
import re
from typing import Final

from support import doc_pages as pages

PAGE: Final = "docs/security.md"
COLUMNS: Final = 5


def all_tests() -> set[str]:
    """The names of all test functions."""
    trees = (ast.parse(path.read_bytes()) for path in (pages.ROOT / "tests").rglob("test_*.py"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", pages.read(PAGE)))
    assert named
    assert named - all_tests() == set()


def test_every_threat_is_held_by_a_test() -> None:
    for row in pages.rows(PAGE, "Threat model"):
        assert len(row) == COLUMNS, row
        assert not row[1] or re.search(r"`test_\w+`", row[-1]), row

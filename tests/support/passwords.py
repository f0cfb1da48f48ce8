"""Redis passwords that a URL, a shell, Redis' configuration or Compose would read as something else."""

from __future__ import annotations

from typing import Final

# Every such character at once.
ALL: Final = """/ # ? @ : & ; , + = ~ " ' \\ % %41 $x ${x} $$ `x` !x [é] 密码"""
PASSWORDS: Final = (
    "a/b",
    "a#b",
    "a?b",
    "a@b",
    "a:b",
    " a b ",
    'a"b',
    "a'b",
    "a\\b",
    "100%",
    "a%41b",
    "a$x",
    "密码é",
    ALL,
)

"""Lua scripts as commands: a file becomes an EVALSHA that any Redis client can send."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

Arg = str | bytes | int | float
Command = tuple[Arg, ...]


_COMMENTS = re.compile(r"^ *--(?:\[\[.*?\]\]|[^\n]*)\n", re.DOTALL | re.MULTILINE)
EACH = Path(__file__).parent / "each.lua"  # the first file of a script that serves many requests in one call


class Script:
    """One Lua script, from one file or several in a row. A call with keys and arguments returns the command to send.

    Its text goes without the comments: Redis closes a connection whose login it refused when a word of more than 16 kB
    comes behind it, and a wrong password would look like an outage.
    """

    def __init__(self, *paths: Path) -> None:
        self.text = _COMMENTS.sub("", "".join(path.read_text(encoding="utf-8") for path in paths))
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        _BY_SHA[self.sha] = self

    def __call__(self, keys: Sequence[str], args: Sequence[Arg]) -> Command:
        return ("EVALSHA", self.sha, len(keys), *keys, *args)


_BY_SHA: dict[str, Script] = {}


def load_all() -> list[Command]:
    """The commands that load every script of this process into a server."""
    return [("SCRIPT", "LOAD", script.text) for script in _BY_SHA.values()]


def in_full(command: Command) -> Command:
    """An EVALSHA with the script's text in place of its hash, for a server that answered NOSCRIPT."""
    return ("EVAL", _BY_SHA[str(command[1])].text, *command[2:])

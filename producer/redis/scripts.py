"""Lua scripts as commands: a file becomes an EVALSHA that any Redis client can send."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

Arg = str | bytes | int | float
Command = tuple[Arg, ...]


EACH = Path(__file__).parent / "each.lua"  # what a script that serves many requests in one call begins with


class Script:
    """One Lua script, of one file or several in a row. Calling it with keys and arguments gives the command to send."""

    def __init__(self, *paths: Path) -> None:
        self.text = "".join(path.read_text(encoding="utf-8") for path in paths)
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        _BY_SHA[self.sha] = self

    def __call__(self, keys: Sequence[str], args: Sequence[Arg]) -> Command:
        return ("EVALSHA", self.sha, len(keys), *keys, *args)


_BY_SHA: dict[str, Script] = {}


def load_all() -> list[Command]:
    """What makes a server know every script of this process."""
    return [("SCRIPT", "LOAD", script.text) for script in _BY_SHA.values()]


def in_full(command: Command) -> Command:
    """The same EVALSHA with the script's text, for a server that answered NOSCRIPT: it loads what it runs."""
    return ("EVAL", _BY_SHA[str(command[1])].text, *command[2:])

"""New verification codes."""

from __future__ import annotations

import secrets


def new_code(length: int) -> str:
    """So many decimal digits, each equally likely, from the operating system's random source."""
    return f"{secrets.randbelow(10**length):0{length}d}"

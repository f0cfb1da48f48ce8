"""Names that look like a setting and are none: whoever gave them expects that they count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Final

# As a share of matching letters: RELAY is as near to RELAYS as 0.91, and HTTP_DOOR to HTTP_BIND as 0.67.
NEAR: Final = 0.85


def misspelt(names: Iterable[str], known: Iterable[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Each of `names` that has the prefix and is not `known`, with the known one that it is near to."""
    allowed = {name.removeprefix(prefix) for name in known}
    for name in sorted(set(names)):
        rest = name.removeprefix(prefix)
        if rest != name and rest not in allowed and (near := get_close_matches(rest, allowed, 1, NEAR)):
            yield name, prefix + near[0]

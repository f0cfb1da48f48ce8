"""The Lua scripts as they are sent."""

from __future__ import annotations

from typing import Final

import worker.bootstrap  # noqa: F401 - what is imported registers its scripts
from producer.redis.scripts import load_all

UNAUTHENTICATED: Final = 16384  # bytes: the longest word that Redis reads from a client that has not logged in


def test_a_script_behind_a_refused_login_does_not_end_the_connection() -> None:
    sizes = [len(str(command[-1]).encode()) for command in load_all()]
    assert max(sizes) < UNAUTHENTICATED - 1024

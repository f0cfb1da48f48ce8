"""The time of a Redis server, known without asking it for each use.

A request's age counts by Redis' clock alone, so nobody's own wall clock may decide about it.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

import hiredis

from producer.redis.scripts import Command

ASK: Final[Command] = ("TIME",)
STALE_AFTER: Final = 60.0  # seconds: Redis' clock may have been set since, or this machine suspended


class RedisClock:
    """Redis' time: its last answer to TIME, counted on by this process' monotonic clock."""

    def __init__(self) -> None:
        self._zero: float | None = None  # Redis' time when the monotonic clock stood at 0
        self._read_at = -math.inf  # monotonic

    def now(self) -> float | None:
        """Unix seconds; None: Redis has not said them, or this user may not ask."""
        return None if self._zero is None else self._zero + time.monotonic()

    @property
    def stale(self) -> bool:
        """Whether it is time to ask again, along with other commands. Never after a refusal."""
        return self._zero is not None and time.monotonic() - self._read_at > STALE_AFTER

    def read(self, answer: Any, asked: float) -> float:
        """Take the answer to `ASK`, which was sent when the monotonic clock stood at `asked`, and came just now.

        Returns by how many seconds Redis' clock was set forward since the answer before; 0 if nobody knows.
        """
        self._read_at = time.monotonic()
        before = self._zero
        if isinstance(answer, hiredis.ReplyError):
            self._zero = None
            return 0.0
        seconds, microseconds = answer
        # Redis read its clock in the middle of the trip, as far as anyone can tell.
        self._zero = int(seconds) + int(microseconds) / 1e6 - (asked + self._read_at) / 2
        return 0.0 if before is None else self._zero - before

"""While a worker is busy, it waits a moment before each trip to Redis, so that the trip serves more requests.

A trip costs the worker and Redis some 100 µs, whatever it carries. A worker that has time goes at once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

PAUSE: Final = 0.001  # seconds
BUSY: Final = 0.4  # share of a core that the loop computes, from which on it gathers
_PERIOD: Final = 0.2  # seconds over which that share is measured, at least


class Gathering:
    """Measures how busy the running loop is; for that loop's thread only."""

    def __init__(self) -> None:
        self._busy = False
        self._began = 0.0  # loop time, of what is measured
        self._computed = 0.0  # CPU time of the thread until then, seconds

    async def pause(self) -> None:
        """Let more come, if the loop is busy."""
        now = asyncio.get_running_loop().time()
        if now - self._began >= _PERIOD:
            computed = time.thread_time()
            self._busy = computed - self._computed > BUSY * (now - self._began)
            self._began, self._computed = now, computed
        if self._busy:
            await asyncio.sleep(PAUSE)

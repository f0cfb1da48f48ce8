"""How long futures wait: one timer for all of them, since a timer for each would cost as much as reading its reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import takewhile
from typing import Any


class Deadlines:
    """The same patience with many futures of one event loop."""

    def __init__(self, seconds: float, end: Callable[[asyncio.Future[Any]], None]) -> None:
        """`end` is called with each future that is watched for `seconds` and not done; it gives it its outcome."""
        self._seconds = seconds
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._due: dict[asyncio.Future[Any], float] = {}  # loop time; who came first is first
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, future: asyncio.Future[Any]) -> None:
        """Its time begins now."""
        due = self._due[future] = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)

    def forget(self, future: asyncio.Future[Any]) -> None:
        """It has its outcome, or nobody waits for it any more."""
        self._due.pop(future, None)

    def __contains__(self, future: asyncio.Future[Any]) -> bool:
        return future in self._due

    def close(self) -> None:
        """Watch none any more."""
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        # The timer was set for one that may be gone by now: who was forgotten costs no cancelled timer.
        now = self._loop.time()
        late = [future for future, _ in takewhile(lambda each: each[1] <= now, self._due.items())]
        for future in late:
            del self._due[future]
            if not future.done():
                self._end(future)
        first = next(iter(self._due.values()), None)
        self._timer = None if first is None else self._loop.call_at(first, self._look)

"""Timeouts for many futures with one timer: a timer for each would cost as much as reading its reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import takewhile
from typing import Any


class Deadlines:
    """One timeout, the same for many futures of one event loop."""

    def __init__(self, seconds: float, expire: Callable[[asyncio.Future[Any]], None]) -> None:
        """`expire` is called with each future that is not done `seconds` after `watch`; it sets the outcome."""
        self._seconds = seconds
        self._expire = expire
        self._loop = asyncio.get_running_loop()
        self._due: dict[asyncio.Future[Any], float] = {}  # loop time; the timeout is the same for all, so in order
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, future: asyncio.Future[Any]) -> None:
        """Start the future's timeout."""
        due = self._due[future] = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._expire_due)

    def forget(self, future: asyncio.Future[Any]) -> None:
        """Cancel the future's timeout, if it has one."""
        self._due.pop(future, None)

    def __contains__(self, future: asyncio.Future[Any]) -> bool:
        return future in self._due

    def close(self) -> None:
        """Cancel all timeouts."""
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire_due(self) -> None:
        # The future that set the timer may be forgotten by now: cheaper than to cancel and set a timer each time.
        now = self._loop.time()
        expired = [future for future, _ in takewhile(lambda each: each[1] <= now, self._due.items())]
        for future in expired:
            del self._due[future]
            if not future.done():
                self._expire(future)
        first = next(iter(self._due.values()), None)
        self._timer = None if first is None else self._loop.call_at(first, self._expire_due)

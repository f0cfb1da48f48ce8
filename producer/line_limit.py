"""A limit on log lines, so that an attack or a crowd does not fill the disk. Loads no logging library."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

Kind = TypeVar("Kind")


class LineLimit(Generic[Kind]):
    """Admits a number of lines in each period. At its end it hands over how many of each kind it did not admit."""

    def __init__(self, lines: int, period: float, sum_up: Callable[[Counter[Kind]], None]) -> None:
        """`period`: seconds, from its first line on, on the running loop. `sum_up`: called if lines were left out."""
        self._lines = lines
        self._period = period
        self._sum_up = sum_up
        self._admitted = 0  # so far in this period
        self._left_out: Counter[Kind] = Counter()
        self._end: asyncio.TimerHandle | None = None

    def admits(self, kind: Kind) -> bool:
        if self._end is None:
            self._end = asyncio.get_running_loop().call_later(self._period, self.flush)
        if self._admitted < self._lines:
            self._admitted += 1
            return True
        self._left_out[kind] += 1
        return False

    def flush(self) -> None:
        """End the period now."""
        if self._end is not None:
            self._end.cancel()
            self._end = None
        self._admitted = 0
        if self._left_out:
            left_out, self._left_out = self._left_out, Counter()
            self._sum_up(left_out)

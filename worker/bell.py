"""Waiting for a message: one blocking command on a connection of its own, kept from one wait to the next."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from producer.link import Link, raise_errors
from worker.queue import RequestQueue

BLOCK: Final = 1.0  # seconds of one wait for a message; below the link's time for an answer
LOOK: Final = 0.02  # seconds until an empty queue is looked at again, for what requests that were done may have woken


class Bell:
    """Rings once the queue has a message; which stays there."""

    def __init__(self, link: Link, queue: RequestQueue) -> None:
        """`link`: a connection that may block."""
        self._link = link
        self._queue = queue
        self._waiting: asyncio.Future[list[Any]] | None = None

    async def wait(self, room: asyncio.Event) -> None:
        """Until the queue has a message, BLOCK seconds passed, or `room` tells that something else is worth a look.

        Raises `RedisUnavailable`.
        """
        if self._waiting is None:
            self._waiting = asyncio.ensure_future(self._link.run([self._queue.await_message(BLOCK)]))
        news = asyncio.ensure_future(room.wait())
        both: list[asyncio.Future[Any]] = [self._waiting, news]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not self._waiting.done():
                # The queue is empty: no place that is free again need look at once, trip for trip.
                await asyncio.wait([self._waiting], timeout=LOOK)
        finally:
            news.cancel()
        if self._waiting.done():
            waited, self._waiting = self._waiting, None
            raise_errors(waited.result())

    async def close(self) -> None:
        """Wait no more."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.wait([self._waiting])

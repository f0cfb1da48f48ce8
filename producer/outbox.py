"""The way out: what arrives while a push is under way leaves together with the next, each request its own message.

There is no timer, so a lone request never waits, and a crowd shares the cost.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

from producer import depth
from producer.errors import QueueFull, RedisUnavailable, VerifyError
from producer.link import Link, raise_errors
from producer.server import REDIS_PATIENCE, TOO_LATE, check_version

MOST_IN_A_PUSH = 500  # messages of some 800 bytes: a crowd's first reply need not wait for its last push


class Outbox:
    """Messages on their way to the queue, on one event loop."""

    def __init__(self, url: str, queue: str, *, limit: int | None = None) -> None:
        """`limit`: with more requests waiting in the queue than this, nothing is added to it."""
        self._queue = queue
        self._limit = limit
        self._link = Link(url, on_open=check_version)
        self._waiting: dict[asyncio.Future[None], bytes] = {}
        self._pusher: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def push(self, message: bytes) -> None:
        """Wait until Redis has the message. Once the caller is gone, it leaves with no later push.

        Raises `RedisUnavailable`; Redis may have the message even so. It may also have it twice. Raises `QueueFull`.
        """
        if self._closed:
            raise RedisUnavailable("the client was closed")
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[sent] = message
        if self._pusher is None:
            self._pusher = asyncio.create_task(self._push_all())
        try:
            await sent
        finally:
            self._waiting.pop(sent, None)

    async def close(self) -> None:
        """Drop the connection; what is on its way fails."""
        self._closed = True
        if self._pusher is not None:
            self._pusher.cancel()
        for sent in self._waiting:
            if not sent.done():
                sent.set_exception(RedisUnavailable("the client was closed"))
        await self._link.close()

    async def _push_all(self) -> None:
        try:
            while batch := dict(islice(self._waiting.items(), MOST_IN_A_PUSH)):
                failure: VerifyError | None = None
                refused: list[asyncio.Future[None]] = []
                try:
                    refused = await self._push_batch(batch)
                except VerifyError as exc:
                    failure = exc
                for sent in refused:
                    if not sent.done():
                        sent.set_exception(QueueFull())
                for sent in batch:
                    self._waiting.pop(sent, None)
                    if not sent.done():
                        # An exception object collects the traceback of each that raises it: one for each.
                        sent.set_exception(type(failure)(str(failure))) if failure else sent.set_result(None)
        finally:
            self._pusher = None

    async def _push_batch(self, batch: dict[asyncio.Future[None], bytes]) -> list[asyncio.Future[None]]:
        """Push what is still wanted. Returns those for which the queue has no room."""
        wanted = [sent for sent in batch if not sent.done()]
        try:
            async with asyncio.timeout(REDIS_PATIENCE):
                try:
                    replies = await self._push(wanted, batch)
                except RedisUnavailable:
                    # Perhaps only this connection was lost. A message that arrived twice has the same id twice, so it
                    # is still one request.
                    wanted = [sent for sent in wanted if not sent.done()]
                    if not wanted:
                        return []
                    replies = await self._push(wanted, batch)
        except TimeoutError:
            raise RedisUnavailable(TOO_LATE) from None
        [pushed] = raise_errors(replies)
        return [] if self._limit is None else wanted[pushed:]

    async def _push(self, wanted: list[asyncio.Future[None]], batch: dict[asyncio.Future[None], bytes]) -> list[Any]:
        return await self._link.run([depth.push(self._queue, [batch[sent] for sent in wanted], limit=self._limit)])

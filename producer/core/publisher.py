"""Pushes requests onto the queue. While one push is under way, further requests gather and leave with the next.

There is no timer, so a lone request never waits, and a crowd shares the cost. Each request stays its own message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from producer.contract import stamp
from producer.core.deadlines import Deadlines
from producer.errors import QueueFull, RedisUnavailable, VerifyError
from producer.redis.clock import ASK, RedisClock
from producer.redis.connection import (
    REDIS_TIMEOUT,
    RedisConnection,
    RedisConnections,
    raise_errors,
    require_version,
)
from producer.redis.protocol import TOO_LATE
from producer.store import backlog

MAX_PUSH = 500  # messages of about 800 bytes: the first reply of a crowd need not wait for the crowd's last message

Outcome = asyncio.Future[Any]  # what becomes of one message
Message = tuple[bytes, Callable[[], None]]  # and what to call once Redis has it


class Publisher:
    """Messages on their way to the queue, on one event loop."""

    def __init__(self, redis: RedisConnections, url: str, queue: str, *, limit: int | None = None) -> None:
        """`limit`: while more requests than this wait in the queue, nothing is added to it."""
        self._queue = queue
        self._limit = limit
        self._connection = redis.connection(url, on_open=self._greet)
        self._clock = RedisClock()
        self._waiting: dict[Outcome, Message] = {}
        self._deadlines = Deadlines(REDIS_TIMEOUT, lambda outcome: outcome.set_exception(RedisUnavailable(TOO_LATE)))
        self._pusher: asyncio.Task[None] | None = None
        self._closed = False

    def expect(self, outcome: Outcome) -> None:
        """A message will be posted: from now on it has `REDIS_TIMEOUT` seconds to reach Redis."""
        self._deadlines.watch(outcome)

    def post(self, message: bytes, outcome: Outcome, on_confirmed: Callable[[], None]) -> None:
        """Send the message with the next push, stamped with Redis' time, unless `outcome` is done by then.

        Calls `on_confirmed` once Redis has the message, unless `outcome` is done before. If Redis does not confirm,
        `outcome` fails with `RedisUnavailable` (Redis may have the message even so, once or twice), `QueueFull` or
        `ServerTooOld`.
        """
        if outcome.done():
            return
        if self._closed:
            outcome.set_exception(RedisUnavailable("the client was closed"))
            return
        self._waiting[outcome] = message, on_confirmed
        if self._pusher is None or self._pusher.done():
            self._pusher = asyncio.create_task(self._push_all())

    def forget(self, outcome: Outcome) -> None:
        """Nobody waits for the outcome any more: do not send the message if it is not sent yet."""
        self._waiting.pop(outcome, None)
        self._deadlines.forget(outcome)

    def unconfirmed(self, outcome: Outcome) -> bool:
        """Whether Redis has not confirmed the message yet."""
        return outcome in self._deadlines

    async def publish(self, message: bytes) -> None:
        """Send the message and wait until Redis has it. Raises what `post` sets on its outcome."""
        sent = asyncio.get_running_loop().create_future()
        self.expect(sent)
        self.post(message, sent, lambda: sent.set_result(None))
        try:
            await sent
        finally:
            self.forget(sent)

    async def close(self) -> None:
        """Close the connection. What is not confirmed fails."""
        self._closed = True
        if self._pusher is not None:
            self._pusher.cancel()
        for outcome in self._waiting:
            if not outcome.done():
                outcome.set_exception(RedisUnavailable("the client was closed"))
        self._deadlines.close()
        await self._connection.close()

    async def _push_all(self) -> None:
        while batch := dict(islice(self._waiting.items(), MAX_PUSH)):
            failure: VerifyError | None = None
            refused: list[Outcome] = []
            try:
                refused = await self._push(batch)
            except VerifyError as exc:
                failure = exc
            for outcome in refused:
                if not outcome.done():
                    outcome.set_exception(QueueFull())
            for outcome, (_, on_confirmed) in batch.items():
                self.forget(outcome)
                if outcome.done():
                    continue
                if failure is None:
                    on_confirmed()
                else:
                    # A copy for each: an exception object collects the traceback of everyone who raises it.
                    outcome.set_exception(type(failure)(str(failure)))

    async def _push(self, batch: dict[Outcome, Message], *, again: bool = True) -> list[Outcome]:
        """Push what is still wanted. Returns the outcomes of messages for which the queue has no room."""
        wanted = [outcome for outcome in batch if not outcome.done()]
        if not wanted:
            return []
        messages = [batch[outcome][0] for outcome in wanted]
        try:
            await self._connection.open()
            asked, question = time.monotonic(), [ASK] if self._clock.stale else []
            if (now := self._clock.now()) is not None:
                messages = stamp(messages, now)
            push = backlog.push(self._queue, messages, limit=self._limit)
            pushed, *time_said = await self._connection.run([push, *question])
        except RedisUnavailable:
            if not again:
                raise
            # Perhaps only this connection was lost. A message that arrives twice has the same id, so it stays one
            # request.
            return await self._push(batch, again=False)
        if time_said:
            self._clock.read(time_said[0], asked)
        raise_errors([pushed])
        return [] if self._limit is None else wanted[pushed:]

    async def _greet(self, connection: RedisConnection) -> None:
        asked = time.monotonic()
        info, now = await connection.run([("INFO", "server"), ASK])
        require_version(info)
        self._clock.read(now, asked)

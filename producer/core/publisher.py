"""The way out: what arrives while a push is under way leaves together with the next, each request its own message.

There is no timer, so a lone request never waits, and a crowd shares the cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Any

from producer.core.deadlines import Deadlines
from producer.errors import QueueFull, RedisUnavailable, VerifyError
from producer.redis.connection import REDIS_TIMEOUT, TOO_LATE, RedisConnection, check_version, raise_errors
from producer.store import backlog

MOST_IN_A_PUSH = 500  # messages of some 800 bytes: a crowd's first reply need not wait for its last push

Outcome = asyncio.Future[Any]  # what becomes of a message, for whoever sends it


class Publisher:
    """Messages on their way to the queue, on one event loop."""

    def __init__(self, url: str, queue: str, *, limit: int | None = None) -> None:
        """`limit`: with more requests waiting in the queue than this, nothing is added to it."""
        self._queue = queue
        self._limit = limit
        self._link = RedisConnection(url, on_open=check_version)
        self._waiting: dict[Outcome, bytes] = {}
        self._on_confirmed: dict[Outcome, Callable[[], None]] = {}  # called once Redis has the message
        self._deadlines = Deadlines(REDIS_TIMEOUT, lambda outcome: outcome.set_exception(RedisUnavailable(TOO_LATE)))
        self._pusher: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, outcome: Outcome) -> None:
        """A message will be posted: from now on it has `REDIS_PATIENCE` seconds to arrive."""
        self._deadlines.watch(outcome)

    def post(self, message: bytes, outcome: Outcome, on_confirmed: Callable[[], None] | None = None) -> None:
        """Send it with the next push, unless `outcome` is known by then.

        If Redis does not confirm it, `outcome` fails: with `RedisUnavailable`, and Redis may have the message even so;
        with `QueueFull`; or with `ServerTooOld`. Redis may also have it twice. `herald` is called once Redis confirms
        it, unless `outcome` is known before.
        """
        if outcome.done():
            return
        if self._closed:
            outcome.set_exception(RedisUnavailable("the client was closed"))
            return
        if on_confirmed is not None:
            self._on_confirmed[outcome] = on_confirmed
        self._waiting[outcome] = message
        if self._pusher is None:
            self._pusher = asyncio.create_task(self._push_all())

    def forget(self, outcome: Outcome) -> None:
        """Nobody waits for it any more; a message that did not leave yet never will."""
        self._waiting.pop(outcome, None)
        self._on_confirmed.pop(outcome, None)
        self._deadlines.forget(outcome)

    def owes(self, outcome: Outcome) -> bool:
        """Whether Redis has not confirmed the message."""
        return outcome in self._deadlines

    async def push(self, message: bytes) -> None:
        """Wait until Redis has the message; fails as `post` does."""
        sent = asyncio.get_running_loop().create_future()
        self.expect(sent)
        self.post(message, sent, lambda: sent.set_result(None))
        try:
            await sent
        finally:
            self.forget(sent)

    async def close(self) -> None:
        """Drop the connection; what is on its way fails."""
        self._closed = True
        if self._pusher is not None:
            self._pusher.cancel()
        for outcome in self._waiting:
            if not outcome.done():
                outcome.set_exception(RedisUnavailable("the client was closed"))
        self._deadlines.close()
        await self._link.close()

    async def _push_all(self) -> None:
        try:
            while batch := dict(islice(self._waiting.items(), MOST_IN_A_PUSH)):
                failure: VerifyError | None = None
                refused: list[Outcome] = []
                try:
                    refused = await self._push_batch(batch)
                except VerifyError as exc:
                    failure = exc
                for outcome in refused:
                    if not outcome.done():
                        outcome.set_exception(QueueFull())
                for outcome in batch:
                    on_confirmed = self._on_confirmed.get(outcome)
                    self.forget(outcome)
                    if outcome.done():
                        continue
                    if failure is not None:
                        # An exception object collects the traceback of each that raises it: one for each.
                        outcome.set_exception(type(failure)(str(failure)))
                    elif on_confirmed is not None:
                        on_confirmed()
        finally:
            self._pusher = None

    async def _push_batch(self, batch: dict[Outcome, bytes]) -> list[Outcome]:
        """Push what is still wanted. Returns those for which the queue has no room."""
        wanted = [outcome for outcome in batch if not outcome.done()]
        try:
            replies = await self._push(wanted, batch)
        except RedisUnavailable:
            # Perhaps only this connection was lost. A message that arrived twice has the same id twice, so it is still
            # one request.
            wanted = [outcome for outcome in wanted if not outcome.done()]
            if not wanted:
                return []
            replies = await self._push(wanted, batch)
        [pushed] = raise_errors(replies)
        return [] if self._limit is None else wanted[pushed:]

    async def _push(self, wanted: list[Outcome], batch: dict[Outcome, bytes]) -> list[Any]:
        messages = [batch[outcome] for outcome in wanted]
        return await self._link.run([backlog.push(self._queue, messages, limit=self._limit)])

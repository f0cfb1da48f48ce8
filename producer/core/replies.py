"""The way back: one subscription hears the replies to all ids that share its beginning; futures by id."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

from producer.contract import REPLY_KEY_PREFIX, ErrorCode, new_uuid, read_reply, reply_key
from producer.errors import RedisUnavailable, VerifyError
from producer.redis.connection import RedisConnection, judge_version, raise_errors

logger = logging.getLogger(__name__)

PING_EVERY = 0.5  # seconds; how old the connection's last sign of life may be while someone waits
_PREFIX = len(REPLY_KEY_PREFIX)
_SHARED = len("xxxxxxxx-xxxx-4xxx-")  # 60 random bits of a UUID that all ids of one inbox share; 62 are the request's


class RequestIds:
    """Request ids: UUIDs (version 4) with one random beginning, so that one pattern hears the replies to them all."""

    def __init__(self) -> None:
        self._shared = new_uuid()[:_SHARED]
        self.pattern = reply_key(self._shared) + "*"

    def new(self) -> str:
        """An id that was never used."""
        return self._shared + new_uuid()[_SHARED:]


class Inbox:
    """Replies that are waited for, on one event loop."""

    def __init__(self, url: str) -> None:
        self.ids = RequestIds()
        self._loop = asyncio.get_running_loop()
        self._link = RedisConnection(url, on_push=self._hear, on_open=self._subscribe)
        # A subscribed connection takes no other commands, so what was missed is read over one of its own.
        self._missed = RedisConnection(url)
        self._waiting: dict[str, asyncio.Future[ErrorCode]] = {}
        self._heard = -math.inf  # loop time of the connection's last sign of life
        self._ping: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def listening(self) -> bool:
        """Whether it is subscribed, on a connection that gave a sign of life just now."""
        return self._link.connected and self._loop.time() - self._heard < PING_EVERY

    async def listen(self, reply: asyncio.Future[ErrorCode]) -> None:
        """Be listening, unless `reply` is known before. If that is not possible, `reply` fails."""
        ping = self._be_sure()
        either: list[asyncio.Future[Any]] = [ping, reply]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done() and (failure := ping.exception()) is not None:
            # An exception object collects the traceback of each that raises it: one for each.
            reply.set_exception(type(failure)(*failure.args))

    def expect(self, request_id: str) -> asyncio.Future[ErrorCode]:
        """The future reply to a request that is pushed after this."""
        reply = self._waiting[request_id] = self._loop.create_future()
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep_listening())
        return reply

    def forget(self, request_id: str) -> None:
        """Nobody waits for its reply any more."""
        self._waiting.pop(request_id, None)

    async def close(self) -> None:
        """Drop the connections; the outcome of what is waited for is unknown."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_result(ErrorCode.TIMEOUT)
        await self._link.close()
        await self._missed.close()

    def _be_sure(self) -> asyncio.Task[None]:
        """Ends when it is listening, or fails. One for all: who waits for it does not cancel it."""
        if self._ping is None:
            self._ping = asyncio.create_task(self._ping_once())
            self._ping.add_done_callback(_seen)
        return self._ping

    async def _ping_once(self) -> None:
        try:
            if self._closed:
                raise RedisUnavailable("the client was closed")
            # Commands are answered in order, and a new connection's first one subscribes: the answer means both.
            try:
                await self._link.run([("PING",)])
            except RedisUnavailable:
                await self._link.run([("PING",)])  # perhaps only that connection was lost
            self._heard = self._loop.time()
        finally:
            self._ping = None

    async def _keep_listening(self) -> None:
        """While someone waits, notice a lost or half-open connection and replace it."""
        try:
            while self._waiting:
                await asyncio.sleep(PING_EVERY)
                if not self.listening:
                    try:
                        await asyncio.shield(self._be_sure())
                    except VerifyError as exc:
                        logger.warning("replies cannot be heard: %s", exc)
        finally:
            self._keeper = None

    async def _subscribe(self, link: RedisConnection) -> None:
        info, subscribed = await link.run([("INFO", "server"), ("PSUBSCRIBE", self.ids.pattern)])
        judge_version(info)
        raise_errors([subscribed])
        # What was published while nobody listened is stored; what is published from now on is heard. Before the first
        # subscription nothing was asked.
        ids = list(self._waiting) if math.isfinite(self._heard) else []
        if ids:
            try:
                [stored] = raise_errors(await self._missed.run([("MGET", *map(reply_key, ids))]))
            finally:
                await self._missed.close()
            for request_id, payload in zip(ids, stored, strict=True):
                if payload is not None:
                    self._resolve(request_id, payload)

    def _hear(self, push: list[bytes]) -> None:
        self._heard = self._loop.time()
        channel, payload = push[-2:]
        self._resolve(channel[_PREFIX:].decode(errors="replace"), payload)

    def _resolve(self, request_id: str, payload: bytes) -> None:
        reply = self._waiting.get(request_id)
        if reply is None or reply.done():
            return
        try:
            reply.set_result(read_reply(payload).error)
        except (ValueError, RecursionError):
            # Anyone may publish on the channel; the true reply may still come.
            logger.warning("what was published as the reply to request %s is none", request_id)


def _seen(task: asyncio.Task[None]) -> None:
    """A failure was told to those who waited; if all of them went, to nobody."""
    if not task.cancelled():
        task.exception()

"""Receives replies: all request ids of a client share a prefix, so one subscription receives every reply."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

from producer.contract import REPLY_KEY_PREFIX, ErrorCode, new_uuid, read_error, reply_key
from producer.errors import RedisUnavailable, VerifyError
from producer.redis.connection import (
    RedisConnection,
    RedisConnections,
    raise_errors,
    require_version,
    retrieve_exception,
)

logger = logging.getLogger(__name__)

PING_EVERY = 0.5  # seconds; while someone waits, the connection's last sign of life may be this old
_PREFIX = len(REPLY_KEY_PREFIX)
_SHARED = len("xxxxxxxx-xxxx-4xxx-")  # 60 random bits of the UUID are the client's; the other 62 are the request's


class Replies:
    """Replies that someone waits for, on one event loop."""

    def __init__(self, redis: RedisConnections, url: str) -> None:
        self._shared = new_uuid()[:_SHARED]
        self.pattern = reply_key(self._shared) + "*"  # matches the replies to this client's requests, and no others
        self._loop = asyncio.get_running_loop()
        self._connection = redis.connection(url, on_push=self._receive, on_open=self._subscribe)
        # A subscribed connection takes no other commands, so missed replies are read over a second one.
        self._missed = redis.connection(url)
        self._waiting: dict[str, asyncio.Future[ErrorCode]] = {}
        self._heard = -math.inf  # loop time of the connection's last sign of life
        self._ping: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    def new_id(self) -> str:
        """A request id that was never used: a UUID (version 4)."""
        return self._shared + new_uuid()[_SHARED:]

    @property
    def listening(self) -> bool:
        """Whether it is subscribed, on a connection that gave a sign of life just now."""
        return self._connection.connected and self._loop.time() - self._heard < PING_EVERY

    async def listen(self, reply: asyncio.Future[ErrorCode]) -> None:
        """Wait until it is listening or `reply` is done. If it cannot listen, `reply` fails."""
        ping = self._shared_ping()
        either: list[asyncio.Future[Any]] = [ping, reply]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done() and (failure := ping.exception()) is not None:
            # A copy for each: an exception object collects the traceback of everyone who raises it.
            reply.set_exception(type(failure)(*failure.args))

    def expect(self, request_id: str) -> asyncio.Future[ErrorCode]:
        """The future reply to a request that is about to be pushed."""
        reply = self._waiting[request_id] = self._loop.create_future()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep_listening())
        return reply

    def forget(self, request_id: str) -> None:
        """Nobody waits for this reply any more."""
        self._waiting.pop(request_id, None)

    async def close(self) -> None:
        """Close the connections. Replies that are still missing become `TIMEOUT`."""
        self._closed = True
        for task in (self._keeper, self._ping):
            if task is not None:
                task.cancel()
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_result(ErrorCode.TIMEOUT)
        await self._connection.close()
        await self._missed.close()

    def _shared_ping(self) -> asyncio.Task[None]:
        """A task that ends once it is listening, or fails. All callers share it, and none cancels it."""
        if self._ping is None or self._ping.done():
            self._ping = asyncio.create_task(self._ping_once())
            self._ping.add_done_callback(retrieve_exception)
        return self._ping

    async def _ping_once(self) -> None:
        if self._closed:
            raise RedisUnavailable("the client was closed")
        # A new connection subscribes before it takes this command, so the answer proves the subscription too.
        try:
            await self._connection.run([("PING",)])
        except RedisUnavailable:
            await self._connection.run([("PING",)])  # perhaps only that connection was lost
        self._heard = self._loop.time()

    async def _keep_listening(self) -> None:
        """While someone waits, notice a lost or half-open connection and replace it."""
        while self._waiting:
            await asyncio.sleep(PING_EVERY)
            if not self.listening:
                try:
                    await asyncio.shield(self._shared_ping())
                except VerifyError as exc:
                    logger.warning("cannot listen for replies: %s", exc)

    async def _subscribe(self, connection: RedisConnection) -> None:
        info, subscribed = await connection.run([("INFO", "server"), ("PSUBSCRIBE", self.pattern)])
        require_version(info)
        raise_errors([subscribed])
        # What was published while the connection was away is stored. Before the first subscription, nothing was asked.
        ids = list(self._waiting) if math.isfinite(self._heard) else []
        if ids:
            try:
                [stored] = raise_errors(await self._missed.run([("MGET", *map(reply_key, ids))]))
            finally:
                await self._missed.close()
            for request_id, payload in zip(ids, stored, strict=True):
                if payload is not None:
                    self._resolve(request_id, payload)

    def _receive(self, push: list[bytes]) -> None:
        self._heard = self._loop.time()
        channel, payload = push[-2:]
        self._resolve(channel[_PREFIX:].decode(errors="replace"), payload)

    def _resolve(self, request_id: str, payload: bytes) -> None:
        reply = self._waiting.get(request_id)
        if reply is None or reply.done():
            return
        try:
            reply.set_result(read_error(payload))
        except (ValueError, RecursionError):
            # Anyone may publish on the channel; the real reply may still come.
            logger.warning("ignored an invalid reply to request %s", request_id)

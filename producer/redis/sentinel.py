"""Where a service's primary is: asked of its sentinels.

Whoever connects asks them in turn, the one that proved right last time first. What one names counts only once it says
itself that it is a primary. Each failover has an epoch: who knows of an older one than we do has not heard yet.

A primary that was replaced while it was well, or that comes back afterwards, goes on taking writes until a sentinel
turns it into a replica, seconds later, and all of these are lost. So while a connection is open, used or not, all
sentinels are asked once a second whether they know of a later one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import hiredis

from producer.errors import RedisUnavailable
from producer.redis.protocol import Protocol, auth, packed, refused
from producer.redis.scripts import Command
from producer.setting_types import SentinelURL

logger = logging.getLogger(__name__)

FIND_TIMEOUT: Final = 0.75  # seconds for all sentinels together: of the second that a connection may take to open
ASK_TIMEOUT: Final = 0.2  # seconds for one of them at least, its connection included
LOOK_EVERY: Final = 1.0  # seconds
LOOK_TIMEOUT: Final = 1.0  # seconds for one sentinel, when nobody waits for its word

Address = tuple[str, int]
Dial = Callable[[Address], Awaitable[Protocol]]


class _Word(NamedTuple):
    """What a sentinel says."""

    address: Address
    epoch: int  # of the failover that made it the primary; 0 if the sentinel may not tell


class PrimaryFinder:
    """Finds the primary of one service, for one connection after the other."""

    def __init__(self, service: SentinelURL, dial: Dial) -> None:
        """`dial`: connects to a sentinel."""
        self._service = service
        self._dial = dial
        self._sentinels = list(service.sentinels)
        self._current: _Word | None = None
        self._watching: asyncio.Task[None] | None = None

    async def find(self, connect: Dial) -> Protocol:
        """What `connect` makes of the primary's address. Raises `RedisUnavailable`; has no time limit of its own."""
        failure = RedisUnavailable("no sentinel answers")
        tried: set[Address] = set()
        late: list[tuple[Address, _Word]] = []
        share = max(ASK_TIMEOUT, FIND_TIMEOUT / len(self._sentinels))
        for sentinel in list(self._sentinels):
            try:
                word = await self._ask(sentinel, share)
            except (OSError, UnicodeError) as exc:
                failure = exc if isinstance(exc, RedisUnavailable) else failure
                # Or those after a few silent ones would never be asked: the time of a connection is over before.
                self._ask_last(sentinel)
                continue
            if self._current is not None and word.epoch < self._current.epoch:
                late.append((sentinel, word))
            elif word.address not in tried:
                tried.add(word.address)
                try:
                    return await self._try(sentinel, word, connect)
                except RedisUnavailable as exc:
                    failure = exc
        # All that answer know less than we do: they may have been set up anew.
        for sentinel, word in sorted(late, key=lambda each: -each[1].epoch):
            if word.address not in tried:
                return await self._try(sentinel, word, connect)
        raise failure

    async def _try(self, sentinel: Address, word: _Word, connect: Dial) -> Protocol:
        # Unless what it says proves right, it is asked last; also if our time ends meanwhile.
        self._ask_last(sentinel)
        try:
            protocol = await connect(word.address)
        except RedisUnavailable:
            raise
        except (OSError, UnicodeError) as exc:
            name = type(exc).__name__
            raise RedisUnavailable(f"the primary of {self._service.service!r} could not be reached ({name})") from None
        self._sentinels.insert(0, self._sentinels.pop())
        self._is_now(word)
        await self.close()  # the former connection is gone
        self._watching = asyncio.create_task(self._watch(protocol))
        return protocol

    def _ask_last(self, sentinel: Address) -> None:
        self._sentinels.remove(sentinel)
        self._sentinels.append(sentinel)

    async def _watch(self, protocol: Protocol) -> None:
        """See that the connection leads to the primary, and drop it if not."""
        while protocol.open:
            await asyncio.sleep(LOOK_EVERY)
            async with asyncio.TaskGroup() as all_at_once:
                for sentinel in self._sentinels:
                    all_at_once.create_task(self._compare(sentinel, protocol))

    async def _compare(self, sentinel: Address, protocol: Protocol) -> None:
        try:
            word = await self._ask(sentinel, LOOK_TIMEOUT)
        except (OSError, UnicodeError):
            return
        current = self._current
        if current is not None and word.epoch > current.epoch and word.address != current.address:
            self._is_now(word)
            protocol.transport.abort()

    def _is_now(self, word: _Word) -> None:
        if self._current is not None and self._current.address != word.address:
            logger.info("the primary of %s is now %s port %d", self._service.service, *word.address)
        self._current = word

    async def close(self) -> None:
        """Watch no more."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None

    async def _ask(self, sentinel: Address, seconds: float) -> _Word:
        async with asyncio.timeout(seconds):
            protocol = await self._dial(sentinel)
            try:
                name = self._service.service
                greeting = auth(self._service.sentinel_user, self._service.sentinel_password)
                questions: list[Command] = [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name), ("SENTINEL", "MASTER", name)]
                *_, address, state = await protocol.ask(*packed([*greeting, *questions]))
            finally:
                protocol.transport.abort()
        if isinstance(address, hiredis.ReplyError):
            raise refused(address, "a sentinel", "sentinel_username and sentinel_password")
        if address is None:
            raise RedisUnavailable(f"the sentinels watch no {self._service.service!r}")
        try:
            return _Word(_address(address), _epoch(state))
        except (ValueError, TypeError, IndexError, AttributeError):
            raise RedisUnavailable("a sentinel answered something else") from None


def _address(address: Any) -> Address:
    host, port = address[0].decode(), int(address[1])
    # What no socket takes is raised as other errors than those of a server that is away.
    if not host.isprintable() or not 0 < port < 65536:
        raise ValueError
    return host, port


def _epoch(state: Any) -> int:
    if not isinstance(state, list):
        return 0
    fields = dict(zip(state[::2], state[1::2], strict=True))
    return int(fields.get(b"config-epoch", 0))

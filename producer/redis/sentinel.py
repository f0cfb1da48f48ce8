"""Where a service's primary is: known from its sentinels, for all connections of a process to that service.

Each sentinel has one connection, which is kept. On it the sentinel announces a failover (`+switch-master`), and is
asked for the primary after each announcement, and every POLL_EVERY seconds in case an announcement was lost. Every
failover has an epoch: a sentinel that names an older one has not heard of the latest yet. What a sentinel names counts
only once that server says itself that it is a primary.

A primary that was replaced while it was healthy, or that comes back afterwards, goes on taking writes until a sentinel
turns it into a replica, seconds later, and all these writes are lost. So connections to it are dropped as soon as a
sentinel names another primary with a later epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import hiredis

from producer.errors import RedisUnavailable
from producer.redis.protocol import OnPush, Protocol, auth, pack, refused
from producer.setting_types import SentinelURL

logger = logging.getLogger(__name__)

POLL_EVERY: Final = 10.0  # seconds between two questions to a sentinel that announces failovers
LOOK_EVERY: Final = 1.0  # seconds, where there are no announcements, and before a lost connection is opened again
RETRY_FIRST: Final = 0.25  # seconds before a sentinel that did not answer is asked again, doubled up to POLL_EVERY
ASK_TIMEOUT: Final = 1.0  # seconds for one answer, a new connection included
FIND_TIMEOUT: Final = 0.75  # seconds that a connection waits for answers, of the second that it may take to open
SWITCHED: Final = "+switch-master"

Address = tuple[str, int]
Dial = Callable[[Address, OnPush], Awaitable[Protocol]]
Connect = Callable[[Address], Awaitable[Protocol]]


class _Answer(NamedTuple):
    """What a sentinel says."""

    primary: Address
    epoch: int  # of the failover that made it the primary; 0 if the sentinel's user may not ask


class PrimaryFinder:
    """Finds the primary of one service, and drops the connections to one that was replaced. For one event loop."""

    def __init__(self, service: SentinelURL, dial: Dial) -> None:
        """`dial`: connects to a sentinel."""
        self._name = service.service
        self._sentinels = [_Sentinel(each, service, dial, self._heard) for each in service.sentinels]
        self._current: _Answer | None = None
        self._unproved: set[_Answer] = set()  # named a server that could not be reached or was no primary
        self._open: dict[Protocol, Address] = {}
        self._changed = asyncio.Event()  # a sentinel answered, or did not
        self._watching: list[asyncio.Task[None]] = []

    async def find(self, connect: Connect) -> Protocol:
        """What `connect` makes of the primary's address. Raises `RedisUnavailable`; the caller limits the time."""
        if not self._watching:
            self._watching = [asyncio.create_task(each.watch()) for each in self._sentinels]
        tried: set[Address] = set()
        failure: RedisUnavailable | None = None
        for ask in (False, True):
            if ask:
                await self._ask_all(tried)
            while (answer := self._best(tried)) is not None:
                tried.add(answer.primary)
                try:
                    return await self._try(answer, connect)
                except RedisUnavailable as exc:
                    failure = exc
                except (OSError, UnicodeError) as exc:
                    kind = type(exc).__name__
                    failure = RedisUnavailable(f"the primary of {self._name!r} could not be reached ({kind})")
        said = [each.failure for each in self._sentinels if each.failure is not None]
        raise failure or (type(said[0])(str(said[0])) if said else RedisUnavailable("no sentinel answers"))

    def _best(self, tried: set[Address]) -> _Answer | None:
        """The answer to try next: one that is not outdated, then one that did not fail before, then the latest."""
        known = 0 if self._current is None else self._current.epoch
        answers = [each.answer for each in self._sentinels if each.answer and each.answer.primary not in tried]
        return min(answers, key=lambda each: (each.epoch < known, each in self._unproved, -each.epoch), default=None)

    async def _ask_all(self, tried: set[Address]) -> None:
        """Wait until a sentinel names a server that was not tried yet, or all have answered."""
        self._wake_all()
        with suppress(TimeoutError):
            async with asyncio.timeout(FIND_TIMEOUT):
                while self._best(tried) is None and any(each.asking for each in self._sentinels):
                    self._changed.clear()
                    await self._changed.wait()

    async def _try(self, answer: _Answer, connect: Connect) -> Protocol:
        before = self._current
        self._unproved.add(answer)  # until it proves right; it stays if this is cancelled
        try:
            protocol = await connect(answer.primary)
        except BaseException:
            self._wake_all()  # what they said last may be out of date
            raise
        now = self._current
        if now is not None and now is not before and now.epoch > answer.epoch and now.primary != answer.primary:
            protocol.transport.abort()
            raise RedisUnavailable(f"the primary of {self._name!r} was replaced")
        self._unproved = {each.answer for each in self._sentinels if each.answer} & self._unproved - {answer}
        self._set_current(answer)
        self._open[protocol] = answer.primary
        protocol.closed.add_done_callback(lambda _: self._open.pop(protocol, None))
        if any(each.answer and each.answer.epoch > answer.epoch for each in self._sentinels):
            protocol.loop.call_later(LOOK_EVERY, self._wake_all)  # the later primary may not be ready yet
        return protocol

    def _heard(self, answer: _Answer | None) -> None:
        self._changed.set()
        current = self._current
        if answer is not None and current is not None and answer.epoch > current.epoch:
            self._set_current(answer)
            for protocol, address in self._open.items():
                if address != answer.primary:
                    protocol.transport.abort()

    def _set_current(self, answer: _Answer) -> None:
        if self._current is not None and self._current.primary != answer.primary:
            logger.info("the primary of %s is now %s port %d", self._name, *answer.primary)
        self._current = answer

    def _wake_all(self) -> None:
        for each in self._sentinels:
            each.wake()

    async def close(self) -> None:
        """Close the connections to the sentinels."""
        watching, self._watching = self._watching, []
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


@dataclass(eq=False)
class _Sentinel:
    """One sentinel: its connection, and what it said last."""

    address: Address
    service: SentinelURL
    dial: Dial
    heard: Callable[[_Answer | None], None]  # called after each question, with None if it was not answered
    answer: _Answer | None = None
    failure: RedisUnavailable | None = None  # why it gave no answer, if it said so
    asking: bool = True
    protocol: Protocol | None = None
    announces: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Ask it now."""
        self.asking = True
        self.woken.set()

    async def watch(self) -> None:
        """Keep asking it, until cancelled."""
        retry = RETRY_FIRST
        try:
            while True:
                self.woken.clear()
                try:
                    async with asyncio.timeout(ASK_TIMEOUT):
                        self.answer, self.failure = await self._ask(), None
                    pause, retry = POLL_EVERY if self.announces else LOOK_EVERY, RETRY_FIRST
                except (OSError, UnicodeError) as exc:
                    self.answer, self.failure = None, exc if isinstance(exc, RedisUnavailable) else None
                    self._drop()
                    pause, retry = retry, min(2 * retry, POLL_EVERY)
                self.asking = self.woken.is_set()
                self.heard(self.answer)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self.woken.wait()
                self.asking = True
        finally:
            self._drop()

    def _drop(self) -> None:
        if self.protocol is not None:
            self.protocol.transport.abort()

    async def _ask(self) -> _Answer:
        if self.protocol is None or not self.protocol.open:
            self.protocol = await self.dial(self.address, lambda _: self.wake())
            await self._subscribe(self.protocol)
        name = self.service.service
        questions = [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name), ("SENTINEL", "MASTER", name)]
        address, state = await self.protocol.ask(pack(questions))
        if isinstance(address, hiredis.ReplyError):
            raise refused(address, "a sentinel", "sentinel_username and sentinel_password in VERIFY_REDIS_URL")
        if address is None:
            raise RedisUnavailable(f"the sentinels watch no {name!r}")
        try:
            return _read(address, state)
        except (ValueError, TypeError, IndexError, AttributeError):
            raise RedisUnavailable("a sentinel gave an invalid answer") from None

    async def _subscribe(self, protocol: Protocol) -> None:
        # Version 3 of the protocol lets a connection that is subscribed take other commands as well.
        login = auth(self.service.sentinel_user, self.service.sentinel_password)
        *_, hello = await protocol.ask(pack([*login, ("HELLO", 3)]))
        self.announces = False
        if not isinstance(hello, hiredis.ReplyError):
            [subscribed] = await protocol.ask(pack([("SUBSCRIBE", SWITCHED)]))
            self.announces = not isinstance(subscribed, hiredis.ReplyError)
        protocol.closed.add_done_callback(self._lost)

    def _lost(self, closed: asyncio.Future[None]) -> None:
        if self.answer is not None:  # otherwise `watch` tries again by itself
            closed.get_loop().call_later(LOOK_EVERY, self.wake)


def _read(address: Any, state: Any) -> _Answer:
    host, port = address[0].decode(), int(address[1])
    # What no socket takes would raise other errors than an unreachable server.
    if not host.isprintable() or not 0 < port < 65536:
        raise ValueError
    if isinstance(state, list):  # in version 2 of the protocol a map is a flat list
        state = dict(zip(state[::2], state[1::2], strict=True))
    return _Answer((host, port), int(state.get(b"config-epoch", 0)) if isinstance(state, dict) else 0)

"""The Redis protocol on one connection: commands out, replies back in order, and one timer that sees that they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import hiredis

from producer.errors import RedisLoginRefused, RedisUnavailable
from producer.redis.scripts import Command

BUFFER = 65536  # bytes
ANSWER_TIMEOUT = 1.5  # seconds a write waits for its replies before the connection counts as dead
LOGIN_REFUSED = {"WRONGPASS", "NOAUTH"}  # first words of error replies
LOGIN_SETTINGS = "the user and password in VERIFY_REDIS_URL, and VERIFY_REDIS_PASSWORD"
TOO_LATE = "Redis did not answer in time"
_PUSHED = ([b"message"], [b"pmessage"])

OnPush = Callable[[Any], None]
Then = Callable[[list[Any]], None]


@dataclass(slots=True)
class _Sent:
    """A write that waits for its replies."""

    size: int  # replies
    due: float  # loop time; if not all replies are here by then, the connection counts as dead
    waiter: asyncio.Future[list[Any]] | None
    then: Then | None  # called with the replies if there is no waiter
    replies: list[Any] = field(default_factory=list)


class Protocol(asyncio.BufferedProtocol):
    """Matches replies with the writes that they answer."""

    def __init__(self, on_push: OnPush | None) -> None:
        self.reader = hiredis.Reader()
        # One buffer for all reads: asyncio would make a new one of 256 kB for each, which takes 20 us.
        self.buffer = memoryview(bytearray(BUFFER))
        self.waiting: deque[_Sent] = deque()
        self.loop = asyncio.get_running_loop()
        self.closed = self.loop.create_future()
        self.why_lost = "the connection to Redis was lost"
        self.on_push = on_push
        self.timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    @property
    def open(self) -> bool:
        """Whether a batch may be written: not after the transport was aborted, even before it reports that."""
        return not self.closed.done() and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports behave like it without being one

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.reader.feed(bytes(self.buffer[:nbytes]))
        try:
            while (reply := self.reader.gets()) is not False:
                self._take(reply)
        except hiredis.ProtocolError:
            self.transport.abort()

    def _take(self, reply: Any) -> None:
        if self.on_push is not None and isinstance(reply, list) and reply[:1] in _PUSHED:
            self.on_push(reply)
            return
        if not self.waiting:
            return
        sent = self.waiting[0]
        sent.replies.append(reply)
        if len(sent.replies) == sent.size:
            self.waiting.popleft()
            if sent.then is not None:
                sent.then(sent.replies)
            elif sent.waiter is not None and not sent.waiter.done():
                sent.waiter.set_result(sent.replies)

    def connection_lost(self, _exc: Exception | None) -> None:
        for sent in self.waiting:
            if sent.waiter is not None and not sent.waiter.done():
                sent.waiter.set_exception(RedisUnavailable(self.why_lost))
        self.waiting.clear()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if not self.closed.done():
            self.closed.set_result(None)

    def ask(self, packed: Sequence[bytes]) -> asyncio.Future[list[Any]]:
        """Write these commands; the future gets their replies."""
        waiter: asyncio.Future[list[Any]] = self.loop.create_future()
        self.tell(packed, None, waiter)
        return waiter

    def tell(self, packed: Sequence[bytes], then: Then | None, waiter: asyncio.Future[list[Any]] | None = None) -> None:
        """Write these commands; `then` is called with their replies if they come."""
        due = self.loop.time() + ANSWER_TIMEOUT
        self.waiting.append(_Sent(len(packed), due, waiter, then))
        if self.timer is None:
            self.timer = self.loop.call_at(due, self._look)
        self.transport.write(b"".join(packed))

    def _look(self) -> None:
        """One timer for all writes: replies come in order, so the oldest write shows whether the server answers."""
        self.timer = None
        if not self.waiting:
            return
        due = self.waiting[0].due
        if due > self.loop.time():
            self.timer = self.loop.call_at(due, self._look)
            return
        # A reply is missing, so later ones could not be matched with their writes.
        self.why_lost = TOO_LATE
        self.transport.abort()


def pack(commands: Sequence[Command]) -> list[bytes]:
    """Each command as bytes."""
    return list(map(hiredis.pack_command, commands))  # type: ignore[arg-type]  # its stub says a tuple of one


def auth(user: str | None, password: str | None) -> list[Command]:
    """The login, if there is a password."""
    if not password:
        return []
    return [("AUTH", user, password) if user else ("AUTH", password)]


def kind_of(error: Exception) -> str:
    """The first word of an error reply: the rest may quote keys."""
    return str(error).partition(" ")[0]


def refused(error: Exception, who: str = "Redis", settings: str = LOGIN_SETTINGS) -> RedisUnavailable:
    """The exception for an error reply: `RedisLoginRefused` if the server does not accept this user.

    `who` refused, and `settings` are to be checked then.
    """
    kind = kind_of(error)
    exc: RedisUnavailable
    if kind in LOGIN_REFUSED:
        exc = RedisLoginRefused(f"{who} refused the login ({kind}): check {settings}")
    elif kind == "NOPERM":
        exc = RedisLoginRefused(f"{who} denied a command to its user ({kind}): check that user's ACL")
    else:
        exc = RedisUnavailable(f"{who} answered an error ({kind})")
    exc.kind = kind
    return exc

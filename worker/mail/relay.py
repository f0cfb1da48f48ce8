"""One relay: a pool of persistent SMTP connections on one asyncio loop."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import TYPE_CHECKING, Final

from worker.mail.errors import MailError, MessageDeferred, RelayBusy
from worker.mail.opening import establish
from worker.mail.smtp import Connection, Envelope, Stale

if TYPE_CHECKING:
    from collections.abc import Callable

    from producer.values import RelayURL

__all__ = ["Envelope", "Relay"]

_RAISE_SECONDS: Final = 10.0  # after a 421, the limit rises by one connection this often
_CLOSE_SECONDS: Final = 1.0


class Relay:
    """Sends mails over connections that are opened as needed, reused (the last used first) and closed when idle.

    Belongs to the loop of its first `send`.
    """

    def __init__(
        self,
        url: RelayURL,
        *,
        connections: int,
        connect_timeout: float,
        send_timeout: float,
        idle_timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """At most `connections` at once; timeouts in seconds.

        `connect_timeout`: TCP, TLS, banner, EHLO and AUTH; `send_timeout`: one whole send, up to half of it waiting
        for a connection; `idle_timeout`: stays below what relays, and firewalls on the way, grant. `tls`, unless given,
        checks certificate and host name.
        """
        self.url: Final = url
        self._connections = connections
        self._connect_timeout = connect_timeout
        self._send_timeout = send_timeout
        self._idle_timeout = idle_timeout
        self._tls = tls or (None if url.scheme == "smtp" else ssl.create_default_context())
        self._limit = connections
        self._raise_at = 0.0  # loop time
        self._size = 0  # places taken: idle, sending, being opened
        self._idle: list[Connection] = []
        self._live: set[Connection] = set()
        # One that waits is handed a connection, or None: a place to open one in.
        self._waiters: deque[asyncio.Future[Connection | None]] = deque()
        self._closing = False
        self._gone: asyncio.Future[None] | None = None

    @property
    def capacity(self) -> int:
        """How many sends can be under way at once: the configured connections, fewer after a 421."""
        return self._limit

    @property
    def free(self) -> int:
        """How many sends could start now without waiting for a connection."""
        return max(0, len(self._idle) + self._limit - self._size - len(self._waiters))

    @property
    def open_connections(self) -> int:
        """Connections open or being opened."""
        return len(self._live)

    async def send(self, envelope: Envelope, before_dot: Callable[[], bool]) -> None:
        """Return when the relay has accepted the mail; else raise `MailError`.

        `before_dot` is called at most once, right before the content is written; False raises `SendWithheld`.
        Raises `ValueError` for an envelope that would break the SMTP dialogue.
        """
        envelope.check()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._send_timeout
        was_busy = False
        while True:
            connection: Connection | None = None
            try:
                connection = self._idle.pop() if self._idle else await self._obtain(deadline)
                await connection.send(envelope, before_dot, deadline)
            except Stale:
                # Each round takes one such connection out of the pool, until a new one is opened.
                self._drop(connection)
            except RelayBusy as exc:
                if connection:
                    self._leave(connection)
                self._lower_limit(exc, loop.time())
                if was_busy:
                    raise
                was_busy = True
            except MailError:
                if connection:
                    self._release(connection)
                raise
            except BaseException:
                self._drop(connection)
                raise
            else:
                self._release(connection)
                return

    async def close(self) -> None:
        """End all connections: the idle ones politely, the others, and the sends on them, at once; within a second."""
        self._closing = True
        self._fail_waiters(MessageDeferred())
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.quit()
        for connection in self._live.difference(idle):
            if connection.opening and not connection.opening.expired():
                connection.opening.reschedule(connection.loop.time())
            connection.abort()
        if self._live:
            self._gone = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._gone], timeout=_CLOSE_SECONDS)

    async def _obtain(self, deadline: float) -> Connection:
        """An idle connection, a new one, or the next that becomes free."""
        if self._closing:
            raise MessageDeferred
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._limit < self._connections and now >= self._raise_at:
            self._limit += 1
            self._raise_at = now + _RAISE_SECONDS
        if self._size >= self._limit:
            # Half the time is kept for the send itself, or a crowd would make a slow relay look like a dead one.
            connection = await self._wait(deadline - self._send_timeout / 2)
            if connection:
                return connection
        else:
            self._size += 1
        return await self._open(min(deadline, loop.time() + self._connect_timeout))

    async def _open(self, deadline: float) -> Connection:
        """Open a connection in a place already taken, which is given back on failure."""
        connection = Connection(self._on_lost)
        self._live.add(connection)
        try:
            await establish(connection, self.url, self._tls, deadline)
        except BaseException as exc:
            self._leave(connection)
            # asyncio tells no one of a connection that ends in its TLS handshake.
            self._on_lost(connection)
            if not isinstance(exc, MailError):
                self._offer_place()
            elif not self._size and not isinstance(exc, RelayBusy):
                # With connections left, those that wait go on waiting; without, a dead relay is not tried by each.
                self._fail_waiters(exc)
            raise
        return connection

    async def _wait(self, deadline: float) -> Connection | None:
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                return await waiter
        except BaseException as exc:
            if not waiter.done() or waiter.cancelled():
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            elif waiter.exception() is None:
                # It was served in the moment it gave up: the next one may have it.
                connection = waiter.result()
                if connection:
                    self._release(connection)
                else:
                    self._size -= 1
                    self._offer_place()
            if isinstance(exc, TimeoutError):
                raise MessageDeferred from None
            raise

    def _release(self, connection: Connection) -> None:
        """A transaction has ended: the connection goes to the next that waits, or idles."""
        if connection.closed or self._closing:
            self._drop(connection)
            return
        waiter = self._next_waiter()
        if waiter:
            waiter.set_result(connection)
        else:
            connection.arm(connection.loop.time() + self._idle_timeout)
            self._idle.append(connection)

    def _drop(self, connection: Connection | None) -> None:
        """End a connection that was taken; its place goes to the next that waits."""
        if connection:
            self._leave(connection)
            self._offer_place()

    def _leave(self, connection: Connection) -> None:
        connection.abort()
        self._size -= 1

    def _offer_place(self) -> None:
        if self._size < self._limit and (waiter := self._next_waiter()):
            self._size += 1
            waiter.set_result(None)

    def _next_waiter(self) -> asyncio.Future[Connection | None] | None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                return waiter
        return None

    def _fail_waiters(self, error: MailError) -> None:
        while waiter := self._next_waiter():
            waiter.set_exception(type(error)(error.code, error.enhanced))

    def _lower_limit(self, busy: RelayBusy, now: float) -> None:
        """The relay takes no more connections than the others there are; if there is none, it takes no mail now."""
        if not self._size:
            deferred = MessageDeferred(busy.code, busy.enhanced)
            self._fail_waiters(deferred)
            raise deferred
        self._limit = self._size
        self._raise_at = now + _RAISE_SECONDS

    def _on_lost(self, connection: Connection) -> None:
        self._live.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
            self._size -= 1
        if self._gone and not self._live and not self._gone.done():
            self._gone.set_result(None)

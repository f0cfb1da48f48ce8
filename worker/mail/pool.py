"""One relay: a pool of persistent SMTP connections on one asyncio loop."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import TYPE_CHECKING, Final

from worker.mail.errors import MailError, MessageDeferred, RelayBusy, RelayUnavailable, SendCancelled
from worker.mail.handshake import establish
from worker.mail.message import Mail
from worker.mail.smtp import Connection, Stale

if TYPE_CHECKING:
    from producer.setting_types import RelayURL

_RAISE_SECONDS: Final = 10.0  # after a 421, the limit rises by one connection this often
_CLOSE_SECONDS: Final = 1.0


class _Send:
    """One mail on its way through a relay."""

    __slots__ = ("_connection", "_relay", "deadline", "mail", "patience", "was_busy")

    def __init__(self, relay: Relay, mail: Mail, deadline: float, patience: float) -> None:
        """`deadline`, `patience`: loop times by which it is done, and until which it waits for a connection."""
        self._relay = relay
        self.mail = mail
        self.deadline = deadline
        self.patience = patience
        self.was_busy = False

    def begin(self, connection: Connection) -> None:
        """Have `connection` send it."""
        self._connection = connection
        connection.send(Mail(self.mail.envelope, self.deadline, self.mail.before_data, self._ended))

    def _ended(self, error: Exception | None) -> None:
        self._relay._ended(self, self._connection, error)  # noqa: SLF001 - which nobody else may call


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
        self._openings: set[asyncio.Task[None]] = set()
        self._waiting: deque[_Send] = deque()
        self._patience: asyncio.TimerHandle | None = None  # one for all that wait
        self._closing = False
        self._gone: asyncio.Future[None] | None = None

    @property
    def capacity(self) -> int:
        """How many sends can be under way at once: the configured connections, fewer after a 421."""
        return self._limit

    @property
    def free(self) -> int:
        """How many sends could start now without waiting for a connection."""
        return max(0, len(self._idle) + self._limit - self._size - len(self._waiting))

    @property
    def open_connections(self) -> int:
        """Connections open or being opened."""
        return len(self._live)

    def send(self, mail: Mail) -> None:
        """Send a mail. `mail.done` is called by its deadline, or when this relay had time enough.

        Its error is `CalledOff` if the mail's own deadline came or the relay was closed. Raises `ValueError` for an
        envelope that would break the SMTP dialogue.
        """
        mail.envelope.check()
        now = asyncio.get_running_loop().time()
        deadline = min(mail.deadline, now + self._send_timeout)
        # Half the time is kept for the send itself, or a crowd would make a slow relay look like a dead one.
        patience = min(mail.deadline, now + self._send_timeout / 2)
        self._start(_Send(self, mail, deadline, patience), now)

    async def close(self) -> None:
        """End all connections: the idle ones politely, the others, and the sends on them, at once; within a second."""
        self._closing = True
        if self._patience:
            self._patience.cancel()
        self._fail_waiting(SendCancelled())
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.quit()
        openings = list(self._openings)
        for task in openings:
            task.cancel()
        for connection in self._live.difference(idle):
            connection.abort()
        if openings:
            await asyncio.wait(openings)
        if self._live:
            self._gone = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._gone], timeout=_CLOSE_SECONDS)

    def _start(self, send: _Send, now: float) -> None:
        """Use an idle connection, a new one, or wait for the next that becomes free."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                send.begin(connection)
                return
            self._size -= 1
        if self._closing:
            send.mail.done(SendCancelled())
            return
        if self._limit < self._connections and now >= self._raise_at:
            self._limit += 1
            self._raise_at = now + _RAISE_SECONDS
        if self._size < self._limit:
            self._size += 1
            self._open(send)
        else:
            self._waiting.append(send)
            self._be_patient(send.patience)

    def _open(self, send: _Send) -> None:
        """Open a connection in a place already taken, which is given back on failure."""
        task = asyncio.create_task(self._establish(send))
        self._openings.add(task)
        task.add_done_callback(lambda task: self._opened(task, send))

    def _opened(self, task: asyncio.Task[None], send: _Send) -> None:
        self._openings.discard(task)
        if task.cancelled():  # before it began; later on it tells by itself
            self._size -= 1
            send.mail.done(SendCancelled())

    async def _establish(self, send: _Send) -> None:
        connection = Connection(self._on_lost)
        self._live.add(connection)
        try:
            await establish(
                connection, self.url, self._tls, min(send.deadline, connection.loop.time() + self._connect_timeout)
            )
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the mail is told, and its place given back
            self._leave(connection)
            # asyncio tells no one of a connection that ends in its TLS handshake.
            self._on_lost(connection)
            if isinstance(exc, RelayBusy):
                self._lower_limit(send, exc)
            elif isinstance(exc, MailError):
                if exc.code is None and connection.loop.time() >= send.mail.deadline:
                    self._offer_place()
                elif not self._size:
                    # With connections left, those that wait go on waiting; without, a dead relay is not tried by each.
                    self._fail_waiting(exc)
                self._fail(send, exc)
            else:
                self._offer_place()
                send.mail.done(exc if isinstance(exc, Exception) else SendCancelled())
        else:
            send.begin(connection)

    def _ended(self, send: _Send, connection: Connection, error: Exception | None) -> None:
        """The transaction of `send` has ended."""
        if error is None:
            self._release(connection)
            send.mail.done(None)
        elif isinstance(error, Stale):
            # Each round takes one such connection out of the pool, until a new one is opened.
            self._drop(connection)
            self._start(send, connection.loop.time())
        elif isinstance(error, RelayBusy):
            self._leave(connection)
            self._lower_limit(send, error)
        elif isinstance(error, MailError):
            self._release(connection)
            self._fail(send, error)
        else:
            self._drop(connection)
            send.mail.done(error)

    def _fail(self, send: _Send, error: MailError) -> None:
        """Tell of a failure; one for which the relay cannot be blamed is `CalledOff`."""
        if isinstance(error, RelayUnavailable | MessageDeferred) and error.code is None:
            now = asyncio.get_running_loop().time()
            if self._closing or now >= send.mail.deadline:
                error = SendCancelled()
        send.mail.done(error)

    def _be_patient(self, until: float) -> None:
        timer = self._patience
        if timer is None or timer.when() > until:
            if timer:
                timer.cancel()
            self._patience = asyncio.get_running_loop().call_at(until, self._lose_patience)

    def _lose_patience(self) -> None:
        """Those that have waited too long for a connection are deferred."""
        self._patience = None
        now = asyncio.get_running_loop().time()
        waiting, self._waiting = self._waiting, deque()
        for send in waiting:
            if send.patience <= now:
                self._fail(send, MessageDeferred())
            else:
                self._waiting.append(send)
        if self._waiting:
            self._be_patient(min(send.patience for send in self._waiting))

    def _release(self, connection: Connection) -> None:
        """A transaction has ended: the connection goes to the next that waits, or idles."""
        if connection.closed or self._closing:
            self._drop(connection)
        elif self._waiting:
            self._waiting.popleft().begin(connection)
        else:
            connection.arm(connection.loop.time() + self._idle_timeout)
            self._idle.append(connection)

    def _drop(self, connection: Connection) -> None:
        """End a connection that was taken; its place goes to the next that waits."""
        self._leave(connection)
        self._offer_place()

    def _leave(self, connection: Connection) -> None:
        connection.abort()
        self._size -= 1

    def _offer_place(self) -> None:
        if self._size < self._limit and self._waiting:
            self._size += 1
            self._open(self._waiting.popleft())

    def _fail_waiting(self, error: MailError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for send in waiting:
            self._fail(send, type(error)(error.code, error.enhanced))

    def _lower_limit(self, send: _Send, busy: RelayBusy) -> None:
        """The relay takes no more connections than the others there are; if there is none, it takes no mail now."""
        if not self._size:
            self._fail_waiting(MessageDeferred(busy.code, busy.enhanced))
            self._fail(send, MessageDeferred(busy.code, busy.enhanced))
            return
        now = asyncio.get_running_loop().time()
        self._limit = self._size
        self._raise_at = now + _RAISE_SECONDS
        if send.was_busy:
            self._fail(send, busy)
        else:
            send.was_busy = True
            self._start(send, now)

    def _on_lost(self, connection: Connection) -> None:
        self._live.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
            self._size -= 1
        if self._gone and not self._live and not self._gone.done():
            self._gone.set_result(None)

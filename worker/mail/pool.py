"""The SMTP channel: a pool of persistent connections to one relay, on one asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Final

from worker.mail.errors import MailError, MessageDeferred, RelayBusy, RelayUnavailable, SendCancelled
from worker.mail.handshake import establish
from worker.mail.smtp import SmtpConnection, StaleConnection

if TYPE_CHECKING:
    from producer.setting_types import RelayURL
    from producer.settings import Settings
    from worker.mail.message import Mail

_START: Final = 32  # connections that a pool may open without having waited for one
# While mails wait, the limit grows by one part in so many, this often (seconds): from 32 to 256 in about a second.
_GROWTH_SHARE: Final = 4
_GROWTH_SECONDS: Final = 0.1
# A loop that is busy for more than this share of the time is the bottleneck itself; connections would not help.
_BUSY_SHARE: Final = 0.8
# Seconds for which a refused connection is remembered, doubled for each refusal after that time up to the longest.
_RAISE_SECONDS: Final = 10.0
_LONGEST_RAISE_SECONDS: Final = 320.0
# Seconds. A relay that accepted a mail so lately works: if it refuses a connection, it has granted what it grants.
_WORKED_LATELY: Final = 1.0
_CLOSE_SECONDS: Final = 1.0
# Seconds. A mail sent ahead that has not had its turn by then is sent over another connection.
_AHEAD_SECONDS: Final = 0.05
_TRANSIENT: Final = 4  # first digit of a reply (RFC 5321, 4.2.1)
_AHEAD_PAUSE: Final = 10.0  # seconds without mails sent ahead once one had to be sent over another connection


logger = logging.getLogger(__name__)


class SmtpPool:
    """A `RelayChannel`. Connections are opened as needed, reused (the last used first) and closed when idle.

    Their limit grows while mails wait, up to what is set or what the relay grants, and falls as idle ones are closed.
    """

    def __init__(
        self,
        url: RelayURL,
        settings: Settings,
        *,
        idle_timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`idle_timeout` in seconds: below what relays, and firewalls on the way, allow.

        `tls`: by default, one that checks certificate and host name.
        """
        self.url: Final = url
        self._most = settings.relay_connections
        self._connect_timeout = settings.connect_timeout  # TCP, TLS, banner, EHLO and AUTH
        self._send_timeout = settings.send_timeout  # one whole send, up to half of it waiting for a connection
        self._idle_timeout = idle_timeout
        self._tls = tls or (None if url.scheme == "smtp" else ssl.create_default_context())
        self._limit = min(_START, self._most)
        self._granted = self._most  # what the limit may grow to: fewer once the relay has refused a connection
        self._raise_at = 0.0  # loop time from which one more may be tried
        self._raise_by = 1  # doubled for each time that is not refused
        self._remember = 0.0  # seconds; 0: no refusal is remembered
        self._growth_timer: asyncio.TimerHandle | None = None  # while mails wait
        self._growth_began = (0.0, 0.0)  # loop time and the thread's CPU time when it was set
        self._worked_at = -math.inf  # loop time of the last accepted mail
        self._size = 0  # connections that count against the limit: idle, sending, being opened
        self._idle: list[SmtpConnection] = []
        self._live: set[SmtpConnection] = set()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._waiting: deque[Mail] = deque()
        self._waiting_timer: asyncio.TimerHandle | None = None  # for the first of `_waiting` to run out of time
        self._ahead_from = 0.0  # loop time from which mails may be sent ahead
        self._ahead_timer: asyncio.TimerHandle | None = None  # while mails are sent ahead
        self._closing = False
        self._all_lost: asyncio.Future[None] | None = None

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        # Kept: asyncio checks the process id at each question, which is a system call.
        return asyncio.get_running_loop()

    @property
    def capacity(self) -> int:
        """See `RelayChannel`: a few more than the limit if it may grow, or no mail would wait and make it grow."""
        return min(self._limit + self._growth, self._granted)

    @property
    def _growth(self) -> int:
        return max(self._limit // _GROWTH_SHARE, 1)

    @property
    def open_connections(self) -> int:
        return len(self._live)

    def send(self, mail: Mail) -> None:
        """See `RelayChannel`. The error is `SendCancelled` if the mail's own deadline passed or the pool was closed."""
        mail.envelope.check()
        now = self._loop.time()
        mail.attempt_deadline = min(mail.deadline, now + self._send_timeout)
        # Half the time is for the send itself, so that under load a slow relay does not seem dead.
        mail.connection_deadline = min(mail.deadline, now + self._send_timeout / 2)
        mail.was_busy = False
        self._start(mail, now)

    async def check(self) -> None:
        (await self._connect(math.inf)).quit()

    async def close(self) -> None:
        """See `RelayChannel`. Idle connections say QUIT, the others and their sends end at once."""
        self._closing = True
        if self._waiting_timer:
            self._waiting_timer.cancel()
        for timer in (self._ahead_timer, self._growth_timer):
            if timer:
                timer.cancel()
        self._fail_waiting(SendCancelled())
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.quit()
        handshakes = list(self._handshakes)
        for task in handshakes:
            task.cancel()
        for connection in self._live.difference(idle):
            connection.abort()
        if handshakes:
            await asyncio.wait(handshakes)
        if self._live:
            self._all_lost = self._loop.create_future()
            await asyncio.wait([self._all_lost], timeout=_CLOSE_SECONDS)

    def _start(self, mail: Mail, now: float) -> None:
        """Use an idle connection, open one, or wait for one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                connection.send(mail)
                return
            self._size -= 1
        if self._closing:
            mail.finish(SendCancelled())
            return
        if self._granted < self._most and now >= self._raise_at:
            if self._limit == self._granted:
                self._limit = min(self._limit + self._raise_by, self._most)
            self._granted = min(self._granted + self._raise_by, self._most)
            self._raise_by *= 2
            self._raise_at = now + _RAISE_SECONDS
            if self._granted == self._most:
                self._remember = 0.0
        if self._size < self._limit:
            self._size += 1
            self._open(mail)
        else:
            self._waiting.append(mail)
            self._arm_waiting_timer(mail.connection_deadline)
            if self._growth_timer is None and self._limit < self._granted:
                self._arm_growth_timer()

    # The limit

    def _arm_growth_timer(self) -> None:
        self._growth_began = self._loop.time(), time.thread_time()
        self._growth_timer = self._loop.call_later(_GROWTH_SECONDS, self._grow)

    def _grow(self) -> None:
        """Raise the limit if mails wait for the relay, and not for this process or for connections being opened."""
        self._growth_timer = None
        if not self._waiting or self._limit >= self._granted:
            return
        began, cpu_began = self._growth_began
        busy = time.thread_time() - cpu_began > _BUSY_SHARE * (self._loop.time() - began)
        if not busy and not self._handshakes:
            self._limit = min(self._limit + self._growth, self._granted)
            for _ in range(len(self._waiting)):
                self._use_free_slot()
        self._arm_growth_timer()

    # New connections

    def _open(self, mail: Mail) -> None:
        """Open a connection, already counted in `_size`, and send `mail` over it."""
        task = asyncio.create_task(self._open_and_send(mail))
        self._handshakes.add(task)
        task.add_done_callback(lambda task: self._handshake_done(task, mail))

    def _handshake_done(self, task: asyncio.Task[None], mail: Mail) -> None:
        self._handshakes.discard(task)
        if task.cancelled():
            self._size -= 1
            mail.finish(SendCancelled())

    async def _open_and_send(self, mail: Mail) -> None:
        began = self._loop.time()
        try:
            connection = await self._connect(mail.attempt_deadline)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is the outcome of the mail
            self._size -= 1
            if isinstance(exc, RelayBusy):
                self._lower_limit(mail, exc)
                return
            now = self._loop.time()
            out_of_time = now >= mail.deadline
            if not isinstance(exc, MailError) or (exc.code is None and out_of_time):
                self._use_free_slot()
            elif (exc.code is None or exc.code // 100 == _TRANSIENT) and (
                self._worked_at >= min(began, now - _WORKED_LATELY)
            ):
                self._lower_limit(mail, RelayBusy(exc.code, exc.enhanced, exc.step))
                return
            elif not self._size:
                # Without any connection, the waiting mails fail at once instead of trying a dead relay one by one.
                self._fail_waiting(exc)
            self._fail(mail, exc)
        else:
            connection.send(mail)

    async def _connect(self, deadline: float) -> SmtpConnection:
        """Open a connection by `deadline` (loop time) or the end of the connect timeout."""
        connection = SmtpConnection(self._on_done, self._on_lost, self._next_ahead)
        self._live.add(connection)
        try:
            deadline = min(deadline, connection.loop.time() + self._connect_timeout)
            await establish(connection, self.url, self._tls, deadline)
        except BaseException:
            # asyncio does not report the loss of a connection that ends in its TLS handshake.
            self._on_lost(connection)
            raise
        return connection

    # Outcomes

    def _on_done(self, connection: SmtpConnection, mail: Mail, error: Exception | None) -> None:
        if connection.busy:  # with a mail sent ahead, whose end decides about the connection
            if isinstance(error, StaleConnection):
                self._start_again(mail, connection)
            elif error is None:
                self._worked_at = connection.loop.time()
                mail.finish(None)
            else:
                self._fail(mail, error)
        elif error is None:
            self._worked_at = connection.loop.time()
            self._release(connection)
            mail.finish(None)
        elif isinstance(error, StaleConnection):
            self._discard(connection)
            self._use_free_slot()
            self._start_again(mail, connection)
        elif isinstance(error, RelayBusy):
            self._discard(connection)
            self._lower_limit(mail, error)
        else:
            self._release(connection)
            self._fail(mail, error)

    def _start_again(self, mail: Mail, connection: SmtpConnection) -> None:
        """Send a mail for which the connection was stale. Each repetition removes one, so it ends with a new one."""
        now = connection.loop.time()
        if connection.busy or connection.sent_ahead:
            self._ahead_from = now + _AHEAD_PAUSE
        self._start(mail, now)

    def _fail(self, mail: Mail, error: Exception) -> None:
        """Report a failure; `SendCancelled` if it is not the relay's fault."""
        if isinstance(error, RelayUnavailable | MessageDeferred) and error.code is None:
            now = self._loop.time()
            if self._closing or now >= mail.deadline:
                error = SendCancelled(step=error.step)
        mail.finish(error)

    def _fail_waiting(self, error: MailError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for mail in waiting:
            copy = type(error)(error.code, error.enhanced, error.step)
            copy.__cause__ = error.__cause__
            self._fail(mail, copy)

    def _lower_limit(self, mail: Mail, busy: RelayBusy) -> None:
        """Halve the limit, at a further refusal keep to the connections there are; either way, remember it for a while.

        Without any connection, the relay accepts no mail now.
        """
        if not self._size:
            deferred = MessageDeferred(busy.code, busy.enhanced, busy.step)
            self._fail_waiting(deferred)
            self._fail(mail, deferred)
            return
        now = self._loop.time()
        if not self._remember:
            self._limit = max(self._limit // 2, 1)
            self._remember = _RAISE_SECONDS
            logger.info("the relay refuses further connections", extra={"relay": self.url.masked()})
        elif self._raise_by > 1:  # after a raise: not of the same moment as the last refusal
            self._remember = min(2 * self._remember, _LONGEST_RAISE_SECONDS)
        self._limit = self._granted = min(self._limit, self._size)
        self._raise_at = now + self._remember
        self._raise_by = 1
        if mail.was_busy:
            self._fail(mail, busy)
        else:
            mail.was_busy = True
            self._start(mail, now)

    # Waiting mails

    def _arm_waiting_timer(self, deadline: float) -> None:
        timer = self._waiting_timer
        if timer is None or timer.when() > deadline:
            if timer:
                timer.cancel()
            self._waiting_timer = self._loop.call_at(deadline, self._defer_expired)

    def _defer_expired(self) -> None:
        self._waiting_timer = None
        now = self._loop.time()
        waiting, self._waiting = self._waiting, deque()
        for mail in waiting:
            if mail.connection_deadline <= now:
                self._fail(mail, MessageDeferred())
            else:
                self._waiting.append(mail)
        if self._waiting:
            self._arm_waiting_timer(min(mail.connection_deadline for mail in self._waiting))

    # Mails sent ahead

    def _next_ahead(self, connection: SmtpConnection) -> Mail | None:
        """The next waiting mail, if it may leave together with the content of the present one."""
        if not self._waiting or self._closing or connection.loop.time() < self._ahead_from:
            return None
        if self._waiting[0].envelope.needs_smtputf8 and b"SMTPUTF8" not in connection.extensions:
            return None
        if self._ahead_timer is None:
            self._ahead_timer = connection.loop.call_later(_AHEAD_SECONDS, self._end_late_ahead)
        return self._waiting.popleft()

    def _end_late_ahead(self) -> None:
        """Send mails over another connection that wait behind a slow answer."""
        self._ahead_timer = None
        sent_before = self._loop.time() - _AHEAD_SECONDS
        if sum(connection.end_late_ahead(sent_before) for connection in self._live):
            self._ahead_timer = self._loop.call_later(_AHEAD_SECONDS, self._end_late_ahead)

    # Connections after a transaction

    def _release(self, connection: SmtpConnection) -> None:
        """The connection sends the next waiting mail, or idles."""
        if connection.closed or self._closing:
            self._discard(connection)
            self._use_free_slot()
        elif self._waiting:
            connection.send(self._waiting.popleft())
        else:
            connection.arm(connection.loop.time() + self._idle_timeout)
            self._idle.append(connection)

    def _discard(self, connection: SmtpConnection) -> None:
        connection.abort()
        self._size -= 1

    def _use_free_slot(self) -> None:
        """Open a connection for the next waiting mail if the limit allows."""
        if self._size < self._limit and self._waiting:
            self._size += 1
            self._open(self._waiting.popleft())

    def _on_lost(self, connection: SmtpConnection) -> None:
        self._live.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
            self._size -= 1
            if self._limit > _START:  # what was grown and is not needed any more is given back
                self._limit -= 1
        if self._all_lost and not self._live and not self._all_lost.done():
            self._all_lost.set_result(None)

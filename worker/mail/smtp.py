"""One SMTP connection: one transaction after the other, each in as few round trips as the relay allows."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from worker.mail.errors import RelayUnavailable, SendAborted, Smtputf8Unsupported, Step, classify
from worker.mail.responses import Response, ResponseReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.mail.message import Envelope, Mail

_QUIT_SECONDS: Final = 0.5
_CLOSING: Final = 421
_NOT_IN_COMMAND: Final = re.compile(rb"[\r\n\0]")
_NEXT: Final = {Step.RSET: Step.MAIL, Step.MAIL: Step.RCPT, Step.RCPT: Step.DATA}
# Seconds. A connection whose last content was answered within this takes the next mail along.
_PROMPT: Final = 0.02
# Input is parsed as soon as it arrives, so one buffer serves all connections.
_BUFFER: Final = memoryview(bytearray(65536))


class StaleConnection(RelayUnavailable):
    """The connection ended before the content was written, without fault of the mail: it may be sent over another."""


class SmtpConnection(asyncio.BufferedProtocol):
    """A connection from its handshake (`worker.mail.handshake`) to its end.

    A transaction is a state machine that arriving data drives and that ends in a call of `on_done`: coroutines and
    futures are slower.
    """

    def __init__(
        self,
        on_done: Callable[[SmtpConnection, Mail, Exception | None], None],
        on_lost: Callable[[SmtpConnection], None],
        next_ahead: Callable[[SmtpConnection], Mail | None],
    ) -> None:
        """`on_done`: a transaction has ended, with this error or None; unless `busy`, another may begin in that call.

        `next_ahead`: the mail, if any, whose commands may leave together with the content of the present one.
        """
        self.loop: Final = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.extensions: dict[bytes, set[bytes]] = {}  # EHLO keywords and their parameters
        self.handshake_step = Step.CONNECT
        self._on_done = on_done
        self._on_lost = on_lost
        self._next_ahead = next_ahead
        self._reader = ResponseReader()
        self._discarding = False
        self._used = False
        # The handshake's next reply, at first the banner; None: the connection ended without one.
        self._response: asyncio.Future[Response | None] = self.loop.create_future()
        # The transaction
        self._mail: Mail | None = None
        self._done: list[tuple[Mail, Exception | None]] = []  # reported once all input is processed
        self._step: Step | None = None  # whose reply is awaited; None: 354 has come, the content is next
        self._commands: list[bytes] = []  # not yet written
        self._refusal: Exception | None = None  # of the first refused command
        self._lone_dot = False  # RCPT was refused after DATA had been pipelined: if need be, end DATA with a lone dot
        self._needs_reset = False
        self._permitted = False  # `before_data` has been answered: the content may follow
        # The mail sent ahead: its commands have left with the content of the one before, and await that one's reply
        self._ahead: Mail | None = None
        self._ahead_permitted = False
        self.sent_ahead = False  # the present mail, or the last
        self._ends_after_reply = False  # the mail sent ahead was taken back, so nobody writes the content it announced
        self._content_written = 0.0  # loop time
        self._prompt = False  # the last content was answered promptly
        # One timer for all deadlines: it is checked against `_deadline` when it fires, so no send resets it.
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # Handshake

    async def command(self, step: Step, line: bytes) -> Response:
        """Write one command (empty: none, for the banner) and wait for its reply.

        Raises `RelayUnavailable` if the connection ends first, `ValueError` on CR, LF or NUL in `line`.
        """
        if _NOT_IN_COMMAND.search(line):
            raise ValueError("a command with CR, LF or NUL")
        self.handshake_step = step
        if line:
            self._response = self.loop.create_future()
            if self.closed:
                raise RelayUnavailable(step=step)
            self._write(line + b"\r\n")
        response = await self._response
        if response is None:
            raise RelayUnavailable(step=step)
        return response

    def discard_further_input(self) -> None:
        """Discard what arrives after the next reply, until `continue_over`: before TLS, anybody could inject it."""
        self._discarding = True

    def continue_over(self, transport: asyncio.Transport) -> None:
        """Switch to `transport`, which uses TLS, and forget what was said before (RFC 3207, 4.2)."""
        self.transport = transport
        self.extensions = {}
        self._reader.reset()
        self._discarding = False

    # Transactions

    def send(self, mail: Mail) -> None:
        """Begin a transaction that ends by `mail.attempt_deadline`. `on_done` is not called before this returns."""
        envelope = mail.envelope
        if self.closed or (envelope.needs_smtputf8 and b"SMTPUTF8" not in self.extensions):
            error = StaleConnection(step=Step.MAIL) if self.closed else Smtputf8Unsupported(step=Step.MAIL)
            self.loop.call_soon(self._on_done, self, mail, error)
            return
        self._mail, self._refusal, self._lone_dot, self._permitted = mail, None, False, False
        self.sent_ahead = False
        commands = self._commands_for(envelope)
        self._step = Step.MAIL
        if self._needs_reset:
            self._step = Step.RSET
            commands.insert(0, b"RSET\r\n")
        self.arm(mail.attempt_deadline)
        if b"PIPELINING" in self.extensions:
            self._commands = []
            self._write(b"".join(commands))
            self._ask_before_data(mail)
        else:
            self._commands = commands
            self._write(commands.pop(0))

    @property
    def busy(self) -> bool:
        """Whether a transaction is under way, or its end is still to be reported."""
        return self._mail is not None or bool(self._done)

    def end_late_ahead(self, moment: float) -> bool:
        """End a mail sent ahead before `moment` (loop time) to which the relay has not come; whether one still waits.

        Its outcome is `StaleConnection`. The connection ends with the reply to the content before it.
        """
        if self._ahead is not None:
            if self._content_written > moment:
                return True
            self._end_ahead(StaleConnection(step=Step.MAIL))
        elif self._mail is not None and self.sent_ahead and self._step is Step.MAIL:
            # Some relays forget the commands that arrive with a content.
            if self._content_written > moment:
                return True
            self._end(StaleConnection(step=Step.MAIL), drop=True)
        return False

    def _end_ahead(self, error: Exception) -> None:
        """End the mail sent ahead before its turn; the one before it goes on."""
        if self._ahead is not None:
            self._done.append((self._ahead, error))
            self._ahead = None
            # DATA has left, so the relay would take whatever comes next for the content.
            self._ends_after_reply = True
            self.loop.call_soon(self._report)

    def _commands_for(self, envelope: Envelope) -> list[bytes]:
        parameters = b" SMTPUTF8" if envelope.needs_smtputf8 else b""
        if b"8BITMIME" in self.extensions and not envelope.content.isascii():
            parameters += b" BODY=8BITMIME"
        begin = b"MAIL FROM:<%b>%b\r\n" % (envelope.sender.encode(), parameters)
        return [begin, b"RCPT TO:<%b>\r\n" % envelope.recipient.encode(), b"DATA\r\n"]

    def _on_response(self, response: Response) -> None:
        step, first_digit = self._step, response.code // 100
        if step is None:  # unasked: whether it or the next one answers the content would be a guess
            self._fail()
        elif step is Step.CONTENT:
            if self._lone_dot:
                self._end(self._refusal)
            elif first_digit == 3:
                self._fail()
            else:
                error = None if first_digit == 2 else classify(step, response.code, response.enhanced)
                self._prompt = self.loop.time() - self._content_written < _PROMPT
                self._end(error, drop=response.code == _CLOSING)
        elif step is Step.DATA:
            self._on_data_response(response)
        else:
            if first_digit != 2 and self._refusal is None:
                self._refuse(step, response)
            self._step = _NEXT[step]
            if self._mail is not None and self._commands:
                if self._refusal:
                    self._end(self._refusal)
                else:
                    self._write(self._commands.pop(0))
                    if not self._commands:
                        self._ask_before_data(self._mail)

    def _on_data_response(self, response: Response) -> None:
        first_digit = response.code // 100
        if first_digit != 3:
            if self._refusal is None:
                self._refuse(Step.DATA, response)
            if self._mail is not None:
                self._end(self._refusal, drop=first_digit == 2 or response.code == _CLOSING)
        elif self._refusal is None:
            self._step = None
        elif self._lone_dot:
            # RFC 2920, 3.1: DATA was accepted without a recipient, so a lone dot sends no mail.
            self._step = Step.CONTENT
            self._write(b".\r\n")
        else:
            self._end(self._refusal, drop=True)

    def _refuse(self, step: Step, response: Response) -> None:
        """Keep the error of the first refused command until the pipelined commands after it are answered, too."""
        error: Exception = classify(step, response.code, response.enhanced)
        closing = response.code == _CLOSING
        if step is Step.RSET or (self._used and step is Step.MAIL and (closing or self.sent_ahead)):
            self._end(StaleConnection(response.code, response.enhanced, step), drop=True)
        elif isinstance(error, RelayUnavailable) or closing:
            self._end(error, drop=True)
        else:
            self._refusal = error
            self._lone_dot = step is Step.RCPT

    def _ask_before_data(self, mail: Mail) -> None:
        """Ask while the last command before the content is on its way: the relay and the caller answer meanwhile."""
        try:
            mail.before_data(partial(self._on_permission, mail))
        except Exception as exc:  # noqa: BLE001 the caller's own error goes back to the caller
            if mail is self._ahead:
                self._end_ahead(exc)
            else:
                self._end(exc, drop=True)

    def _on_permission(self, mail: Mail, permitted: bool) -> None:
        """Take the answer to `before_data`, unless the transaction that asked has ended meanwhile."""
        if mail is self._ahead:
            if permitted:
                self._ahead_permitted = True
            else:
                self._end_ahead(SendAborted(step=Step.DATA))
            return
        if mail is not self._mail:
            return
        if not permitted:
            self._end_unsent()
        else:
            self._permitted = True
            if self._step is None:
                self._write_content(mail)

    def _write_content(self, mail: Mail) -> None:
        """Write the content and the final dot: 354 and the permission have come."""
        if mail.still_permitted():
            self._step = Step.CONTENT
            self._content_written = self.loop.time()
            ahead = self._next_ahead(self) if self._prompt and b"PIPELINING" in self.extensions else None
            if ahead is None:
                self._write(mail.envelope.content + b".\r\n")
                return
            # RFC 2920, 3.1: the content may be the first of a group of commands.
            self._ahead, self._ahead_permitted = ahead, False
            self._write(b"".join([mail.envelope.content, b".\r\n", *self._commands_for(ahead.envelope)]))
            self._ask_before_data(ahead)
        else:
            self._end_unsent()

    def _end_unsent(self) -> None:
        """End the transaction without its content, which takes the connection with it; reported once that is lost."""
        self._end(self._refusal or SendAborted(step=self._step or Step.CONTENT), drop=True)

    def _end(self, error: Exception | None, *, drop: bool = False) -> None:
        """End the transaction, and with `drop` the connection."""
        mail, self._mail = self._mail, None
        self._used, self._needs_reset = True, error is not None
        if mail is not None:
            if self.sent_ahead and self._step is not Step.CONTENT and type(error) is RelayUnavailable:
                # The relay may be confused by the order of the commands alone, and the content has not left.
                error = StaleConnection(error.code, error.enhanced, error.step)
            self._done.append((mail, error))
        ahead, self._ahead = self._ahead, None
        if drop or self._ends_after_reply:
            if ahead is not None:
                self.sent_ahead = True
                self._done.append((ahead, StaleConnection(step=Step.MAIL)))
            self.abort()
        elif ahead is not None:
            self._mail, self._refusal, self._lone_dot, self.sent_ahead = ahead, None, False, True
            self._permitted, self._step = self._ahead_permitted, Step.MAIL
            self.arm(ahead.attempt_deadline)

    def _report(self) -> None:
        while self._done:
            mail, error = self._done.pop(0)
            self._on_done(self, mail, error)

    def _fail(self) -> None:
        """Give up: the connection is lost or out of time, or the relay is out of step."""
        if not self._response.done():
            self._response.set_result(None)
        if self._mail is not None:
            self._end(self._refusal or classify(self._step or Step.DATA, None, None), drop=True)
        self.abort()

    # Deadline

    def arm(self, deadline: float) -> None:
        """Set the deadline (loop time): a transaction fails then, an idle connection quits."""
        self._deadline = deadline
        if self._timer is None or self._timer.when() > deadline:
            if self._timer:
                self._timer.cancel()
            self._timer = self.loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.loop.time() < self._deadline:
            self.arm(self._deadline)
        elif self._mail is not None or self.closed:
            if self._mail is not None and self._step is None:
                self._end_unsent()  # it is not the relay that has not answered
            self._fail()
            self._report()
        else:
            self.quit()

    # End

    def quit(self) -> None:
        """Say QUIT, and drop the connection if the relay does not close it soon."""
        if not self.closed:
            self.closed = True
            self._write(b"QUIT\r\n")
            self.arm(self.loop.time() + _QUIT_SECONDS)

    def abort(self) -> None:
        """Drop the connection at once; a pending transaction or command fails."""
        self.closed = True
        if self._mail is not None:
            self._fail()
        if self.transport:
            self.transport.abort()

    def _write(self, data: bytes) -> None:
        if self.transport:
            self.transport.write(data)

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 asyncio's signature
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        for response in self._reader.feed(bytes(_BUFFER[:nbytes])):
            if self._mail is not None:
                self._on_response(response)
            elif not self._response.done():
                self._response.set_result(response)
            elif not self._discarding:
                # Unasked: the relay says goodbye, or is out of step.
                self.abort()
        if self._discarding and self._response.done():
            self._reader.reset()
        if self._reader.broken:
            self._fail()
        elif self._mail is not None and self._step is None:
            if self._reader.pending:
                self._fail()
            elif self._permitted:
                self._write_content(self._mail)
        self._report()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        self.closed = True
        if self._timer:
            self._timer.cancel()
        if self._mail is not None and self._used and self._step in {Step.RSET, Step.MAIL}:
            self._end(StaleConnection(step=self._step), drop=True)
        self._fail()
        self._report()
        self._on_lost(self)

"""One SMTP connection: one transaction after the other, each with as few round trips as the relay allows."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final, cast

from worker.mail.errors import RelayUnavailable, SendWithheld, Smtputf8Unsupported, Step, classify
from worker.mail.responses import Reply, ResponseReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.mail.message import Mail

_QUIT_SECONDS: Final = 0.5
_CLOSING: Final = 421
_NO_COMMAND: Final = re.compile(rb"[\r\n\0]")


_BUFFER: Final = memoryview(bytearray(65536))


class Stale(RelayUnavailable):
    """The relay closed a kept connection before the transaction began."""


class Connection(asyncio.BufferedProtocol):
    """A connection, from its opening (`worker.mail.handshake`) to its end.

    The transaction is a state machine driven by arriving data and ends in a call: no coroutine, nor a future that wakes
    one, is as quick.
    """

    def __init__(self, on_lost: Callable[[Connection], None]) -> None:
        self.loop: Final = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.offers: dict[bytes, set[bytes]] = {}  # EHLO keywords and their parameters
        self.opening: asyncio.Timeout | None = None
        self._on_lost = on_lost
        self._reader = ResponseReader()
        self._deaf = False
        self._used = False
        self._answer: asyncio.Future[Reply | None] = self.loop.create_future()  # the banner; None: there is none
        # The transaction
        self._mail: Mail | None = None
        self._ended: tuple[Mail, Exception | None] | None = None  # to be told once what has arrived is read
        self._step: Step | None = None  # whose reply is awaited; None: 354 has come, the content is to go
        self._commands: list[bytes] = []  # those not yet written
        self._verdict: Exception | None = None  # of the first refused command
        self._emptying = False  # DATA went ahead of a refusal; only its dot is to be answered
        self._needs_reset = False
        self._asked = False  # whether the content may go
        # One timer for all: it looks at the deadline when it fires, so that a send need not set and cancel one.
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # Opening

    async def command(self, line: bytes) -> Reply:
        """Write one command (empty: none, the banner) and wait for its reply.

        Raises `RelayUnavailable` when the connection ends first, `ValueError` on CR, LF or NUL in `line`.
        """
        if _NO_COMMAND.search(line):
            raise ValueError("a command with CR, LF or NUL")
        if line:
            self._answer = self.loop.create_future()
            if self.closed:
                raise RelayUnavailable
            self._write(line + b"\r\n")
        reply = await self._answer
        if reply is None:
            raise RelayUnavailable
        return reply

    def listen(self, transport: asyncio.Transport) -> None:
        """Go on over `transport`, which is TLS now; nothing that was said before counts (RFC 3207, 4.2)."""
        self.transport = transport
        self.offers = {}
        self._reader.reset()
        self._deaf = False

    def deafen(self) -> None:
        """Ignore what arrives after the next reply, until `listen`: bytes sent ahead of TLS may be anybody's."""
        self._deaf = True

    # Transactions

    def send(self, mail: Mail) -> None:
        """Begin a transaction. `mail.done` is called when it has ended, never before this returns."""
        envelope = mail.envelope
        if self.closed or (envelope.needs_smtputf8 and b"SMTPUTF8" not in self.offers):
            self.loop.call_soon(mail.done, Stale() if self.closed else Smtputf8Unsupported())
            return
        self._mail, self._verdict, self._emptying, self._asked = mail, None, False, False
        parameters = b" SMTPUTF8" if envelope.needs_smtputf8 else b""
        if b"8BITMIME" in self.offers and not envelope.content.isascii():
            parameters += b" BODY=8BITMIME"
        begin = b"MAIL FROM:<%b>%b\r\n" % (envelope.sender.encode(), parameters)
        commands = [begin, b"RCPT TO:<%b>\r\n" % envelope.recipient.encode(), b"DATA\r\n"]
        self._step = Step.MAIL
        if self._needs_reset:
            self._step = Step.RSET
            commands.insert(0, b"RSET\r\n")
        self.arm(mail.deadline)
        if b"PIPELINING" in self.offers:
            self._commands = []
            self._write(b"".join(commands))
        else:
            self._commands = commands
            self._write(commands.pop(0))

    def _on_reply(self, reply: Reply) -> None:
        step, positive = self._step, reply.code // 100
        if step is None:  # a reply to nothing: which one answers the dot would be a guess
            self._break()
        elif step is Step.DOT:
            if self._emptying:
                self._finish(self._verdict)
            elif positive == 3:
                self._break()
            else:
                error = None if positive == 2 else classify(step, reply.code, reply.enhanced)
                self._finish(error, drop=reply.code == _CLOSING)
        elif step is Step.DATA:
            self._on_data_reply(reply)
        else:
            if positive != 2 and self._verdict is None:
                self._refuse(step, reply)
            self._step = _NEXT[step]
            if self._mail is not None and self._commands:
                if self._verdict:
                    self._finish(self._verdict)
                else:
                    self._write(self._commands.pop(0))

    def _on_data_reply(self, reply: Reply) -> None:
        positive = reply.code // 100
        if positive != 3:
            if self._verdict is None:
                self._refuse(Step.DATA, reply)
            if self._mail is not None:
                self._finish(self._verdict, drop=positive == 2 or reply.code == _CLOSING)
        elif self._verdict is None:
            self._step = None
        elif self._emptying:
            # RFC 2920, 3.1: DATA was taken although no recipient was; a lone dot leaves nobody a mail.
            self._step = Step.DOT
            self._write(b".\r\n")
        else:
            self._finish(self._verdict, drop=True)

    def _refuse(self, step: Step, reply: Reply) -> None:
        """Keep the verdict of the first refused command; those that went out with it are answered, too."""
        verdict: Exception = classify(step, reply.code, reply.enhanced)
        if step is Step.RSET or (self._used and step is Step.MAIL and reply.code == _CLOSING):
            self._finish(Stale(reply.code, reply.enhanced), drop=True)
        elif isinstance(verdict, RelayUnavailable) or reply.code == _CLOSING:
            self._finish(verdict, drop=True)
        else:
            self._verdict = verdict
            self._emptying = step is Step.RCPT

    def _hand_over(self) -> None:
        """Ask whether content and final dot may be written, unless that has become pointless."""
        mail = self._mail
        if self._reader.pending or mail is None or self._asked:
            self._break()
            return
        self._asked = True
        try:
            mail.before_data(self._write_content)
        except Exception as exc:  # noqa: BLE001 the caller's own error goes back to the caller
            self._finish(exc, drop=True)

    def _write_content(self, wanted: bool) -> None:
        """Write content and final dot, if they are wanted and the transaction has not ended meanwhile."""
        mail = self._mail
        if mail is None or self._step is not None or not self._asked:
            return
        self._asked = False
        if wanted:
            self._step = Step.DOT
            self._write(mail.envelope.content + b".\r\n")
        else:
            self._finish(SendWithheld(), drop=True)
            self._tell()

    def _finish(self, error: Exception | None, *, drop: bool = False) -> None:
        """End the transaction, and with `drop` the connection."""
        mail, self._mail = self._mail, None
        self._used, self._needs_reset = True, error is not None
        if mail is not None:
            self._ended = mail, error
        if drop:
            self.abort()

    def _tell(self) -> None:
        """Say how the transaction ended; another one may begin in that call."""
        ended, self._ended = self._ended, None
        if ended is not None:
            mail, error = ended
            mail.done(error)

    def _break(self) -> None:
        """The connection is lost, out of time or talks nonsense."""
        if not self._answer.done():
            self._answer.set_result(None)
        if self._mail is not None:
            self._finish(self._verdict or classify(self._step or Step.DATA, None, None))
        self.abort()

    # Time

    def arm(self, deadline: float) -> None:
        """Be done by `deadline` (loop time): a transaction is broken off then, an idle connection quits."""
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
            self._break()
            self._tell()
        else:
            self.quit()

    # The end

    def quit(self) -> None:
        """Say QUIT and be gone shortly after."""
        if not self.closed:
            self.closed = True
            self._write(b"QUIT\r\n")
            self.arm(self.loop.time() + _QUIT_SECONDS)

    def abort(self) -> None:
        """Drop the connection at once; what still waits for it ends with an error."""
        self.closed = True
        if self._mail is not None:
            self._break()
        if self.transport:
            self.transport.abort()

    def _write(self, data: bytes) -> None:
        if self.transport:
            self.transport.write(data)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 asyncio's signature
        """See `asyncio.BufferedProtocol`: what arrives is read at once, so one buffer serves all connections."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        for reply in self._reader.feed(bytes(_BUFFER[:nbytes])):
            if self._mail is not None:
                self._on_reply(reply)
            elif not self._answer.done():
                self._answer.set_result(reply)
            elif not self._deaf:
                # Nothing was asked: the relay takes its leave, or the two are out of step.
                self.abort()
        if self._deaf and self._answer.done():
            self._reader.reset()
        if self._reader.broken:
            self._break()
        elif self._mail is not None and self._step is None:
            self._hand_over()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        """See `asyncio.Protocol`."""
        self.closed = True
        if self._timer:
            self._timer.cancel()
        if self._mail is not None and self._used and self._step in {Step.RSET, Step.MAIL}:
            self._finish(Stale())
        self._break()
        self._tell()
        self._on_lost(self)


_NEXT: Final = {Step.RSET: Step.MAIL, Step.MAIL: Step.RCPT, Step.RCPT: Step.DATA}

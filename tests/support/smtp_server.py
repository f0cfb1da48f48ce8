"""An SMTP server that follows a script: any reply at any step, drops, silence, one byte at a time.

In the test's loop: `async with ScriptedServer({"rcpt": "550 5.1.1 gone"}) as server:`.
In a thread of its own: `with running(ScriptedServer()) as server:`.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, Self

from producer.setting_types import RelayURL

HOST: Final = "127.0.0.1"
PLAIN_OFFERS: Final = ("PIPELINING", "8BITMIME", "SMTPUTF8")
# "content": its first line has arrived; "dot": the final dot has.
STEPS: Final = ("banner", "ehlo", "starttls", "auth", "rset", "mail", "rcpt", "data", "content", "dot", "quit")


class Last(NamedTuple):
    """A reply after which the server hangs up."""

    text: str


class Slowly(NamedTuple):
    """A reply of which a byte arrives every `seconds`."""

    text: str
    seconds: float


class Later(NamedTuple):
    """A reply that comes after `seconds`."""

    text: str
    seconds: float

    async def pause(self) -> None:
        """Wait for that long."""
        await asyncio.sleep(self.seconds)


class Held:
    """A reply that comes when the test sets `release`; `reached` is set when the dialogue has come to it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.reached = threading.Event()
        self.release = threading.Event()

    async def pause(self) -> None:
        """Set `reached` and wait for `release`."""
        self.reached.set()
        while not self.release.is_set():  # noqa: ASYNC110 - the test is in another thread
            await asyncio.sleep(0.005)


class Drop(NamedTuple):
    """The server hangs up."""


class Silence(NamedTuple):
    """No reply from here on; what the client says is read and ignored."""


# str: a reply without its CRLF; bytes: written as they are.
Act = str | bytes | Last | Slowly | Later | Held | Drop | Silence


class Mail(NamedTuple):
    """A mail as it arrived: still dot-stuffed, without the final dot."""

    sender: str
    recipient: str
    content: bytes


class _HangUpError(Exception):
    """The server ends this connection."""


class ScriptedServer:
    """Listens on a free port.

    `script` maps a step to an act, or to a list of acts, each used once before the usual reply. `scripts` has scripts
    for single recipients, from RCPT on.
    """

    def __init__(
        self,
        script: Mapping[str, Act | list[Act]] | None = None,
        *,
        offers: Sequence[str] = PLAIN_OFFERS,
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        most: int | None = None,
    ) -> None:
        """`tls`: for STARTTLS, or for the whole connection with `implicit_tls`. Beyond `most` connections: 421."""
        unknown = set(script or {}) - set(STEPS)
        if unknown:
            raise ValueError(f"no such steps: {unknown}")
        self.script = dict(script or {})
        self.scripts: dict[str, dict[str, Act | list[Act]]] = {}
        self.offers = offers
        self.tls, self.implicit_tls, self.most = tls, implicit_tls, most
        self.port = 0
        self.mails: list[Mail] = []
        self.dotted: list[Mail] = []  # every mail whose final dot has arrived, accepted or not
        self.commands: list[str] = []
        self.connections = 0  # since the start
        self.peak = 0  # most at one time
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def open(self) -> int:
        """Open connections."""
        return len(self._writers)

    def url(self, scheme: str = "smtp", user: str | None = None, password: str | None = None) -> RelayURL:
        """The relay URL of this server."""
        return RelayURL(scheme, HOST, self.port, user, password)

    def drop_all(self) -> None:
        """Close all connections."""
        for writer in self._writers:
            writer.close()

    def say_to_all(self, text: str) -> None:
        """Write to all connections, unasked."""
        for writer in self._writers:
            writer.write(f"{text}\r\n".encode())

    async def start(self, port: int = 0) -> None:
        """Listen."""
        implicit = self.tls if self.implicit_tls else None
        self._server = await asyncio.start_server(self._serve, HOST, port, ssl=implicit, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close all connections and listen no more."""
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.peak = max(self.peak, len(self._writers))
        try:
            await _Session(self, reader, writer).talk()
        except (_HangUpError, OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            try:
                await writer.drain()
            except (OSError, RuntimeError):
                # Takes the error of a lost connection: otherwise asyncio reports it, and anyio fails the test for it.
                with suppress(OSError, RuntimeError):
                    await writer.wait_closed()
            writer.close()


class _Session:
    """One connection."""

    def __init__(self, server: ScriptedServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server, self._reader, self._writer = server, reader, writer
        self._sender = self._recipient = ""

    async def talk(self) -> None:
        """From the banner to the end."""
        if self._server.most is not None and self._server.open > self._server.most:
            await self._perform(Last("421 4.7.0 too many connections"))
        await self._act("banner", "220 scripted ESMTP")
        while True:
            line = (await self._reader.readuntil(b"\r\n")).decode("utf-8", "surrogateescape").rstrip("\r\n")
            self._server.commands.append(line)
            verb = getattr(self, f"_{line.split(' ')[0].lower()}", None)
            if verb is None:
                await self._perform("500 5.5.2 what?")
            else:
                await verb(line)

    async def _ehlo(self, _line: str) -> None:
        *first, last = ["scripted", *self._server.offers]
        await self._act("ehlo", "".join(f"250-{offer}\r\n" for offer in first) + f"250 {last}")

    async def _starttls(self, _line: str) -> None:
        await self._act("starttls", "220 2.0.0 go ahead")
        if self._server.tls is not None:
            await self._writer.start_tls(self._server.tls)

    async def _auth(self, line: str) -> None:
        if line.upper() == "AUTH LOGIN":
            for prompt in ("VXNlcm5hbWU6", "UGFzc3dvcmQ6"):
                await self._perform(f"334 {prompt}")
                self._server.commands.append((await self._reader.readuntil(b"\r\n")).decode().strip())
        await self._act("auth", "235 2.7.0 welcome")

    async def _mail(self, line: str) -> None:
        self._recipient = ""
        if self._sender:
            await self._perform("503 5.5.1 nested MAIL")
        elif (await self._act("mail", "250 2.1.0 ok")).startswith("2"):
            self._sender = _path(line)

    async def _rcpt(self, line: str) -> None:
        usual = "250 2.1.5 ok" if self._sender else "503 5.5.1 no MAIL"
        if (await self._act("rcpt", usual, _path(line))).startswith("2"):
            self._recipient = _path(line)

    async def _data(self, _line: str) -> None:
        refusal = "554 5.5.1 no recipients"
        usual = "354 go ahead" if self._recipient else refusal
        if not (await self._act("data", usual, self._recipient)).startswith("354"):
            return
        content = await self._content()
        mail = Mail(self._sender, self._recipient, content)
        self._sender = self._recipient = ""
        self._server.dotted.append(mail)
        act = self._choose("dot", "250 2.0.0 ok" if mail.recipient else refusal, mail.recipient)
        if isinstance(act, Later | Held):
            await act.pause()
            act = act.text
        # Before the reply: whoever acts on it finds the mail.
        if isinstance(act, str) and act.startswith("2") and mail.recipient:
            self._server.mails.append(mail)
        await self._perform(act)

    async def _content(self) -> bytes:
        lines: list[bytes] = []
        while (line := await self._reader.readuntil(b"\r\n")) != b".\r\n":
            if not lines:
                await self._act("content", b"", self._recipient)
            lines.append(line)
        return b"".join(lines)

    async def _rset(self, _line: str) -> None:
        self._sender = self._recipient = ""
        await self._act("rset", "250 2.0.0 ok")

    async def _quit(self, _line: str) -> None:
        await self._act("quit", "221 2.0.0 bye")
        raise _HangUpError

    async def _act(self, step: str, usual: Act, recipient: str = "") -> str:
        """Do what the script has for `step`; returns the reply."""
        return await self._perform(self._choose(step, usual, recipient))

    def _choose(self, step: str, usual: Act, recipient: str) -> Act:
        act = self._server.scripts.get(recipient, self._server.script).get(step, usual)
        if isinstance(act, list):
            act = act.pop(0) if act else usual
        return act

    async def _perform(self, act: Act) -> str:
        match act:
            case Last():
                self._writer.write(f"{act.text}\r\n".encode())
                raise _HangUpError
            case Drop():
                raise _HangUpError
            case Silence():
                while await self._reader.read(65536):
                    pass
                raise _HangUpError
            case Slowly():
                for byte in f"{act.text}\r\n".encode():
                    self._writer.write(bytes([byte]))
                    await asyncio.sleep(act.seconds)
            case Later() | Held():
                await act.pause()
                self._writer.write(f"{act.text}\r\n".encode())
            case bytes():
                self._writer.write(act)
                return act.decode("latin-1")
            case str():
                self._writer.write(f"{act}\r\n".encode())
                return act
        return act.text


def _path(line: str) -> str:
    return line.partition("<")[2].partition(">")[0]


@contextmanager
def running(server: ScriptedServer, port: int = 0) -> Iterator[ScriptedServer]:
    """Run `server` in a thread with a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(port), loop).result(60)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()

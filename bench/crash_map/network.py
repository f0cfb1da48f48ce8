"""All connections of one process, through proxies that count whole commands and replies and can stop at any of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from support.process import HOST

from bench.crash_map.grammar import WAIT, Grammar, HttpGrammar, Part, RedisGrammar, SmtpGrammar

RELAY, CALLER = "relay", "caller"  # links; all others lead to Redis
SENT, RECEIVED = "→", "←"  # by the process
# What happens again and again, whether there is a request or not. Connections of Celery's own have no steps either.
_IDLE: Final = {"maintain", "renew", "BLMOVE", "BLPOP", WAIT, "turn", "backlog", ""}
_CONSUMED: Final = 0.3  # seconds in which the other side surely has read what reached it, and has hung up
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER


class Step(NamedTuple):
    """A frame, as it is found again in another run: the `nth` with this name, since the request was made."""

    link: str
    way: str
    name: str
    nth: int


@dataclass(slots=True)
class Frame:
    """A whole command or reply on its way; `step` is None if it belongs to no request."""

    link: str
    way: str
    name: str
    detail: str
    data: bytes
    connection: _Connection
    step: Step | None = None
    at: float = 0.0  # loop time
    forwarded: bool = False


@dataclass(slots=True, eq=False)
class _Connection:
    """One, with both its ends."""

    accepted: asyncio.StreamWriter
    opened: asyncio.StreamWriter
    opened_reader: asyncio.StreamReader
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def reset(self) -> None:
        """End it for both sides at once, whatever is on its way."""
        for writer in (self.accepted, self.opened):
            transport: asyncio.Transport = writer.transport  # type: ignore[assignment]  # a TCP one
            with contextlib.suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()

    async def hang_up(self) -> None:
        """End it as the kernel does for a process that was killed: what the server has got, it executes."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.accepted.transport.abort()
        with contextlib.suppress(OSError, TimeoutError):
            self.opened.write_eof()
            async with asyncio.timeout(_CONSUMED):
                while await self.opened_reader.read(65536):
                    pass
        self.opened.close()


Strike = Callable[[Frame, Callable[[], None]], Coroutine[Any, Any, None]]  # gets a frame, and what forwards it


class Network:
    """The links of one process.

    `held` names links whose traffic stands still, in both directions; what is on its way arrives later. `trap` is the
    step at which `strike` is called in place of forwarding the frame.
    """

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.trace: list[Frame] = []  # of the request so far
        self.idle: set[str] = set()  # further names of what happens without a request
        self.watchers: list[Callable[[Frame], None]] = []  # told of every frame, just before it is forwarded
        self._counting = False
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._trap: Step | None = None
        self._strike: Strike | None = None
        self._striking: asyncio.Task[None] | None = None
        self._held: set[str] = set()
        self._moving = asyncio.Condition()
        self._woken: asyncio.Event | None = None  # until it is set, a reservation that waits is held
        self._waiting = asyncio.Event()  # one is held
        self._connections: set[_Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._scripts: dict[bytes, str] = {}

    async def open(self, link: str, target: int) -> None:
        """Listen for connections to this port of this host."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.CancelledError):  # asyncio would log it
                await self._serve(link, target, reader, writer)

        server = await asyncio.start_server(serve, HOST, 0, limit=2**20)
        self._servers.append(server)
        self.ports[link] = server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End all."""
        for server in self._servers:
            server.close()
        await self.drop()

    def begin(self, trap: Step | None = None, strike: Strike | None = None) -> None:
        """The request is about to be made: count from now on."""
        self.trace, self._counts, self._counting = [], Counter(), True
        self._trap, self._strike = trap, strike

    def end(self) -> None:
        """Count no more."""
        self._counting = False
        self._trap = self._strike = self._woken = None

    def hold(self, links: Collection[str]) -> None:
        """Let nothing pass on these links."""
        self._held |= set(links)

    async def release(self, links: Collection[str]) -> None:
        """Let pass what was held back, and what comes."""
        self._held -= set(links)
        async with self._moving:
            self._moving.notify_all()

    async def moving(self, link: str) -> None:
        """Return once this link is not held."""
        if link in self._held:
            async with self._moving:
                await self._moving.wait_for(lambda: link not in self._held)

    async def hold_wait(self) -> None:
        """Hold back the reservation with which the worker waits; returns when only the command before it has passed.

        So that what is between the wake of a worker and its reservation is a step of its own.
        """
        self._woken = asyncio.Event()
        self._waiting.clear()
        await self._waiting.wait()

    def wake(self) -> None:
        """Let it pass, as the first step of the request."""
        assert self._woken is not None
        self._woken.set()
        self._woken = None

    @property
    def redis(self) -> list[str]:
        """The links to Redis."""
        return [link for link in self.ports if link not in {RELAY, CALLER}]

    async def drop(self) -> None:
        """The process is gone: end its connections, and forward nothing that it was still to get or to send."""
        connections, self._connections = self._connections, set()
        await asyncio.gather(*(each.hang_up() for each in connections))
        await self.release(list(self._held))

    async def _serve(self, link: str, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            opened_reader, opened = await asyncio.open_connection(HOST, target, limit=2**20)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, opened, opened_reader)
        grammar = self._grammar(link)
        # The process under test has opened the connection, except that the caller opens one to it.
        there, back = (grammar.received, grammar.sent) if link == CALLER else (grammar.sent, grammar.received)
        ways = (RECEIVED, SENT) if link == CALLER else (SENT, RECEIVED)
        connection.tasks = [
            asyncio.create_task(self._pump(link, ways[0], there, reader, opened, connection)),
            asyncio.create_task(self._pump(link, ways[1], back, opened_reader, writer, connection)),
        ]
        self._connections.add(connection)
        try:
            await asyncio.wait(connection.tasks, return_when=asyncio.FIRST_COMPLETED)
            # What one side wrote before it hung up arrives; the rest is nobody's.
            for each in (writer, opened):
                each.close()
        finally:
            for task in connection.tasks:
                task.cancel()
            self._connections.discard(connection)

    def _grammar(self, link: str) -> Grammar:
        if link == RELAY:
            return SmtpGrammar()
        return HttpGrammar() if link == CALLER else RedisGrammar(self._scripts)

    async def _pump(
        self,
        link: str,
        way: str,
        split: Callable[[bytes], list[Part]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: _Connection,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                for name, part, detail in split(data):
                    await self._forward(Frame(link, way, name, detail, part, connection), writer)

    async def _forward(self, frame: Frame, writer: asyncio.StreamWriter) -> None:
        if frame.name == WAIT and self._woken is not None:
            self._waiting.set()
            await self._woken.wait()
            frame.name = "reserve"
        await self.moving(frame.link)
        frame.at = asyncio.get_running_loop().time()
        for watcher in self.watchers:
            watcher(frame)
        if self._counting and frame.name not in _IDLE | self.idle:
            self._counts[key := (frame.link, frame.way, frame.name)] += 1
            frame.step = Step(*key, self._counts[key])
            self.trace.append(frame)
            if frame.step == self._trap and self._strike is not None:
                strike, self._strike = self._strike, None
                # Of its own: the connection may end meanwhile, and this with it.
                self._striking = asyncio.create_task(strike(frame, lambda: _deliver(frame, writer)))
                await asyncio.wait([self._striking])
                return
        _deliver(frame, writer)


def _deliver(frame: Frame, writer: asyncio.StreamWriter) -> None:
    frame.forwarded = True
    writer.write(frame.data)


def label(frame: Frame) -> str:
    """A step for people to read: `issue →`, `DATA 354 ←`."""
    code = frame.detail if frame.detail and frame.link in {CALLER, RELAY} else ""
    nth = f" {frame.step.nth}" if frame.step is not None and frame.step.nth > 1 else ""
    return " ".join(part for part in (frame.name + nth, code, frame.way) if part)

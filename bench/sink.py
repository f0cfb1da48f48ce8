"""A relay that takes every mail, as late as it is told to, and counts."""

from __future__ import annotations

import asyncio
import time
from typing import Final, Self, cast

HOST: Final = "127.0.0.1"
_LINES: Final = (  # what a line begins with, and the answer; all others are 250
    (b"EHLO", b"250-sink\r\n250-PIPELINING\r\n250 8BITMIME\r\n"),
    (b"DATA", b"354 go on\r\n"),
    (b"QUIT", b"221 bye\r\n"),
)
_END: Final = b"\r\n.\r\n"


class Sink:
    """`async with Sink(latency) as sink:`; latency is the seconds from a mail's end to its 250."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.mails = 0
        self.connections = 0
        self.most_connections = 0
        self.url = ""
        self._wanted: list[tuple[int, asyncio.Future[float]]] = []
        self._server: asyncio.Server

    def taken(self, mails: int) -> asyncio.Future[float]:
        """Resolves to the time at which the sink has taken so many mails."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._wanted = sorted([*self._wanted, (mails, future)], key=lambda pair: pair[0])
        return future

    def count(self) -> None:
        """One mail more."""
        self.mails += 1
        while self._wanted and self.mails >= self._wanted[0][0]:
            self._wanted.pop(0)[1].set_result(time.perf_counter())

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Session(self), HOST, 0)
        self.url = f"smtp://{HOST}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


class _Session(asyncio.Protocol):
    """One connection."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._unread = b""
        self._in_mail = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is like it, and none
        self._sink.connections += 1
        self._sink.most_connections = max(self._sink.most_connections, self._sink.connections)
        self._transport.write(b"220 sink\r\n")

    def connection_lost(self, _exc: Exception | None) -> None:
        self._sink.connections -= 1

    def data_received(self, data: bytes) -> None:
        self._unread += data
        answers = []
        while True:
            part, found, rest = self._unread.partition(_END if self._in_mail else b"\r\n")
            if not found:
                break
            self._unread = rest
            if self._in_mail:
                self._in_mail = False
                if self._sink.latency:
                    asyncio.get_running_loop().call_later(self._sink.latency, self._accept)
                else:
                    self._accept()
                continue
            verb = part[:4].upper()
            self._in_mail = verb == b"DATA"
            answers.append(next((answer for start, answer in _LINES if verb == start), b"250 ok\r\n"))
        if answers:
            self._transport.write(b"".join(answers))

    def _accept(self) -> None:
        self._sink.count()
        self._transport.write(b"250 taken\r\n")

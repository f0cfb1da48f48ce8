"""A TCP proxy in front of a server, with the faults of a network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, Self

import hiredis

from support.process import HOST, WAIT_TIMEOUT

PASS, STALL, HOLE, MUTE, ERROR_REPLY = "pass", "stall", "hole", "mute", "error_reply"
TRICKLE, TRICKLE_ANSWERS = "trickle", "trickle_answers"
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class TcpProxy:
    """Forwards to a port of this host. Its mode concerns the connections that are open, and later ones.

    `mode`: STALL holds data back until the mode changes; HOLE drops it, as a half-open connection does; MUTE drops only
    what the server sends; TRICKLE forwards a byte every `seconds_a_byte`, TRICKLE_ANSWERS does so with what the server
    sends; ERROR_REPLY forwards nothing from the client, and answers each of its Redis commands with an error XYZ.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.mode = PASS
        self.seconds_a_byte = 0.05
        self.accepted = 0  # connections so far
        self._target = target
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._writers: set[asyncio.StreamWriter] = set()  # to clients and to the server
        self._muted: set[asyncio.StreamWriter] = set()  # clients that get no answer any more
        self._cut_at: bytes | None = None
        self._cut_after = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def url(self, database: int | None = None) -> str:
        """The Redis URL of the server as seen through the proxy."""
        return f"redis://{HOST}:{self.port}" + ("" if database is None else f"/{database}")

    def reset(self) -> None:
        """End every open connection with an RST."""
        self._call(self._reset())

    def refuse(self, *, reset: bool = True) -> None:
        """Listen no more; with `reset`, end every open connection too."""
        self._call(self._refuse(reset))

    def admit(self) -> None:
        """Listen again, on the same port."""
        self._call(self._listen(self.port))

    def mute_open(self) -> None:
        """From now on, the connections that are open get no answer; later ones do."""
        self._call(self._mute_open())

    def cut_after(self, command: bytes, seconds: float = 0.05) -> None:
        """Forward the next data that contains `command`, and cut that connection, unanswered, `seconds` later."""
        self._cut_at, self._cut_after = command, seconds

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen(0))
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_TIMEOUT)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_TIMEOUT)

    async def _listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, port, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self, reset: bool) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if reset:
            await self._reset()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            transport: asyncio.Transport = writer.transport  # type: ignore[assignment]  # a TCP one
            with contextlib.suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()

    async def _mute_open(self) -> None:
        self._muted |= self._clients

    async def _end(self) -> None:
        await self._refuse(True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        try:
            from_server, to_server = await asyncio.open_connection(HOST, self._target, limit=2**20)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, to_server}
        self._writers |= both
        self._clients.add(writer)
        pumps = [
            asyncio.create_task(self._pump(reader, to_server, {HOLE}, {TRICKLE}, writer)),
            asyncio.create_task(self._pump(from_server, writer, {HOLE, MUTE}, {TRICKLE, TRICKLE_ANSWERS})),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._writers -= both
            self._clients.discard(writer)
            self._muted.discard(writer)
            for each in both:
                each.close()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        dropped_in: set[str],
        trickles_in: set[str],
        client: asyncio.StreamWriter | None = None,
    ) -> None:
        """Forward what `reader` gets; `client`: the one that sends it, if it is no answer."""
        commands = hiredis.Reader()
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.mode == ERROR_REPLY and client is not None:
                    commands.feed(data)
                    while commands.gets() is not False:
                        client.write(b"-XYZ never heard of\r\n")
                    continue
                while self.mode == STALL:  # noqa: ASYNC110 - another thread decides
                    await asyncio.sleep(0.01)
                if self.mode in dropped_in or writer in self._muted:
                    continue
                if client is not None and self._cut_at is not None and self._cut_at in data:
                    self._cut_at = None
                    self._muted.add(client)
                    writer.write(data)
                    await asyncio.sleep(self._cut_after)
                    return
                if self.mode not in trickles_in:
                    writer.write(data)
                    await writer.drain()
                    continue
                for byte in data:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    if self.mode in trickles_in:
                        await asyncio.sleep(self.seconds_a_byte)


def in_mode(proxy: TcpProxy, mode: str) -> Callable[[], None]:
    """A function that puts the proxy into a mode."""

    def put() -> None:
        proxy.mode = mode

    return put

"""A TCP proxy between two parts, with the faults of a network in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, Self

HOST: Final = "127.0.0.1"
PASS, STALL, HOLE, MUTE, TRICKLE = "pass", "stall", "hole", "mute", "trickle"
_LINGER_NOT: Final = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards to a port of this host. Its faults concern the connections that are open, and those to come.

    `mode`: PASS; STALL holds back what is said, to be heard later; HOLE swallows it, as a half-open connection does;
    MUTE swallows only what the target says;
    TRICKLE lets a byte pass every `seconds_a_byte`.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.mode = PASS
        self.seconds_a_byte = 0.05
        self.accepted = 0
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def reset(self) -> None:
        """End every open connection with an RST."""
        self._call(self._reset())

    def refuse(self) -> None:
        """Listen no more, and end every open connection."""
        self._call(self._refuse())

    def admit(self) -> None:
        """Listen again, on the same port."""
        self._call(self._listen(self.port))

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen(0))
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, port, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            transport: asyncio.Transport = writer.transport  # type: ignore[assignment]  # a TCP one
            peer = transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            transport.abort()

    async def _end(self) -> None:
        await self._refuse()
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
            there, back = await asyncio.open_connection(HOST, self._target, limit=2**20)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, back}
        self._writers |= both
        pumps = [
            asyncio.create_task(self._pump(reader, back, {HOLE})),
            asyncio.create_task(self._pump(there, writer, {HOLE, MUTE})),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._writers -= both
            for each in both:
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: set[str]) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                while self.mode == STALL:  # noqa: ASYNC110 - another thread decides
                    await asyncio.sleep(0.01)
                if self.mode in lost:
                    continue
                if self.mode != TRICKLE:
                    writer.write(data)
                    await writer.drain()
                    continue
                for byte in data:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    if self.mode == TRICKLE:
                        await asyncio.sleep(self.seconds_a_byte)


def in_mode(proxy: Proxy, mode: str) -> Callable[[], None]:
    """A call that puts the proxy into a mode."""

    def put() -> None:
        proxy.mode = mode

    return put

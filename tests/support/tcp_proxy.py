"""A TCP proxy in front of a server, with the faults of a network."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

Forward = Callable[[bytes, socket.socket, socket.socket], None]


class TcpProxy:
    """Forwards to a port of this host. The faults concern what the server says."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stalled: set[socket.socket] = set()
        self._cut_at: bytes | None = None
        self._cut_in = 0.0
        self._refusing = False
        self.seconds_a_byte = 0.0
        self.port: int = self._listener.getsockname()[1]

    def url(self, database: int) -> str:
        """The Redis URL of the server as seen through the proxy."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def stall(self) -> None:
        """From now on, the connections that are open say nothing more; later ones work."""
        self._stalled.update(self._sockets)

    def refuse(self) -> None:
        """From now on, no new connection comes about."""
        self._refusing = True

    def cut_after(self, command: bytes, seconds: float = 0.05) -> None:
        """The next time a client sends `command`, the server gets it, and the connection is lost before the answer."""
        self._cut_at, self._cut_in = command, seconds

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        _hang_up(self._listener)
        for each in self._sockets:
            _hang_up(each)
        for thread in self._threads:
            thread.join(5)
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._refusing:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                self._start(self._pump, self._ask, client, server)
                self._start(self._pump, self._answer, server, client)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _pump(self, forward: Forward, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                forward(data, source, sink)
        for each in (source, sink):
            _hang_up(each)

    def _ask(self, data: bytes, client: socket.socket, server: socket.socket) -> None:
        if self._cut_at is not None and self._cut_at in data:
            self._cut_at = None
            self._stalled.add(server)  # nothing that it answers comes through
            server.sendall(data)
            time.sleep(self._cut_in)
            _hang_up(client)
            return
        server.sendall(data)

    def _answer(self, data: bytes, server: socket.socket, client: socket.socket) -> None:
        if server in self._stalled:
            return
        if not self.seconds_a_byte:
            client.sendall(data)
            return
        for i in range(len(data)):
            time.sleep(self.seconds_a_byte)
            client.sendall(data[i : i + 1])


def _hang_up(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)

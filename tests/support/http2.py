"""Bare HTTP/2 for what no gRPC client does: connections that send any frames and keep no rule."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final, NamedTuple, Self

from producer.api.frames import PREFACE, Flag, FrameType, Setting, field, frame, settings_frame
from support.process import eventually

SETTINGS: Final = settings_frame({})
OPENING: Final = PREFACE + SETTINGS  # what a client sends first
NO_WINDOW: Final = PREFACE + settings_frame({Setting.INITIAL_WINDOW_SIZE: 0})  # from one that takes no answer

HEAD: Final = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/",
    ":authority": "api",
    "te": "trailers",
    "content-type": "application/grpc",
}


class Frame(NamedTuple):
    """A frame that came."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def error(self) -> int:
        """The error that RST_STREAM or GOAWAY says."""
        return int.from_bytes(self.payload[:4] if self.kind == FrameType.RST_STREAM else self.payload[4:8], "big")


def header(name: str | bytes, value: str | bytes, *, indexed: bool = False) -> bytes:
    """A header field written out; `indexed`: to be kept in the dynamic table."""
    text = field(*(each if isinstance(each, bytes) else each.encode() for each in (name, value)))
    return b"\x40" + text[1:] if indexed else text


def head(path: str | bytes, *more: bytes, **changed: str) -> bytes:
    """The header fields of a gRPC call; `changed`: those that are another, by name: `_method`, `te`."""
    values = {name: changed.get(name.replace(":", "_").replace("-", "_"), value) for name, value in HEAD.items()}
    return b"".join([*(header(name, path if name == ":path" else value) for name, value in values.items()), *more])


def begin(stream: int, path: str | bytes, *more: bytes, **changed: str) -> bytes:
    """The frame that begins a call."""
    return frame(FrameType.HEADERS, stream, head(path, *more, **changed), Flag.END_HEADERS)


def message(content: bytes, *, claimed: int | None = None) -> bytes:
    """A message of gRPC; `claimed`: the length that it pretends to have."""
    return b"\x00" + (len(content) if claimed is None else claimed).to_bytes(4, "big") + content


def call(stream: int, path: str | bytes, content: bytes, *more: bytes, **changed: str) -> bytes:
    """A whole call with one message."""
    return begin(stream, path, *more, **changed) + frame(FrameType.DATA, stream, message(content), Flag.END_STREAM)


def streams(count: int) -> range:
    """The numbers of so many streams."""
    return range(1, 2 * count, 2)


def frames(data: bytes) -> Iterator[Frame]:
    """Each whole frame."""
    while len(data) >= 9:
        length = int.from_bytes(data[:3], "big")
        if len(data) < 9 + length:
            return
        yield Frame(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + length])
        data = data[9 + length :]


class Crowd:
    """Many connections to one port, on which anything may be sent."""

    def __init__(self, port: int, count: int, first: bytes = OPENING) -> None:
        """`first`: what each connection sends at once."""
        self._stack = ExitStack()
        self.connections = []
        for _ in range(count):
            connection = self._stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
            connection.setblocking(False)
            self.connections.append(connection)
        self.send(first)

    def send(self, data: bytes) -> int:
        """Send on every connection what it takes now; the number that took all of it."""
        return sum(_sent(connection, data) == len(data) for connection in self.connections)

    def read(self) -> list[bytes]:
        """What came in on each connection; one that was closed is closed here too, and left out from now on."""
        found = []
        for connection in list(self.connections):
            data = b""
            try:
                while more := connection.recv(1 << 20):
                    data += more
                self.connections.remove(connection)
                connection.close()
            except BlockingIOError:
                pass
            except OSError:
                self.connections.remove(connection)
                connection.close()
            found.append(data)
        return found

    def wait_for(self, text: bytes) -> None:
        """Wait until this has come on the first connection."""
        data = b""

        def came() -> bool:
            nonlocal data
            data += self.read()[0]
            return text in data

        eventually(came)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sent(connection: socket.socket, data: bytes) -> int:
    sent = 0
    with contextlib.suppress(OSError):
        while sent < len(data):
            sent += connection.send(data[sent:])
    return sent

"""Bare HTTP/2 for what no gRPC client does: frames made by hand, on connections that keep no rule."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE: Final = 4  # a setting's number


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """`settings(_4=0)`: a window of no bytes."""
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", int(key[1:]), value) for key, value in values.items()))


def header(name: str, value: str, *, indexed: bool = False) -> bytes:
    """A header as HPACK writes it out, in plain letters; `indexed`: to be kept in the dynamic table."""
    return (b"\x40" if indexed else b"\x00") + _text(name) + _text(value)


def head(path: str, *more: bytes) -> bytes:
    """The headers of a gRPC call."""
    names = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "api", "te": "trailers"}
    lines = [header(name, value) for name, value in {**names, "content-type": "application/grpc"}.items()]
    return b"".join([*lines, *more])


def begin(stream: int, path: str, *more: bytes) -> bytes:
    """The frame that begins a call."""
    return frame(HEADERS, stream, head(path, *more), END_HEADERS)


def message(content: bytes, *, claimed: int | None = None) -> bytes:
    """A message of gRPC; `claimed`: the length that it pretends to have."""
    return b"\x00" + struct.pack(">I", len(content) if claimed is None else claimed) + content


def call(stream: int, path: str, content: bytes) -> bytes:
    """A whole call with one message."""
    return begin(stream, path) + frame(DATA, stream, message(content), END_STREAM)


def streams(count: int) -> range:
    """The numbers of so many streams."""
    return range(1, 2 * count, 2)


class Crowd:
    """Many connections to one port, on which anything may be sent."""

    def __init__(self, port: int, count: int, first: bytes = PREFACE + settings()) -> None:
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

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def frames(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each whole frame."""
    while len(data) >= 9:
        length = int.from_bytes(data[:3], "big")
        if len(data) < 9 + length:
            return
        yield data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + length]
        data = data[9 + length :]


def _sent(connection: socket.socket, data: bytes) -> int:
    sent = 0
    with contextlib.suppress(OSError):
        while sent < len(data):
            sent += connection.send(data[sent:])
    return sent


def _text(text: str) -> bytes:
    raw = text.encode()
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    rest, length = len(raw) - 127, b"\x7f"
    while rest > 127:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return length + bytes([rest]) + raw

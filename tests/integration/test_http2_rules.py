"""What the gRPC API's HTTP/2 makes of frames: RFC 9113, RFC 7541 and gRPC's PROTOCOL-HTTP2, over a bare connection."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Final

import pytest
import trustme
from hpack import Decoder
from support.http2 import HEAD, NO_WINDOW, OPENING, SETTINGS, Frame, begin, call, frames, head, header, message, streams

from producer.api.binding import listen
from producer.api.frames import (
    DEFAULT_WINDOW,
    EMPTY_TABLE,
    MAX_FRAME,
    MAX_STREAM,
    MAX_WINDOW,
    PREFACE,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    goaway_frame,
    message_text,
    reset_frame,
    settings_frame,
    window_frame,
)
from producer.api.http2 import (
    CROWDED_SHARE,
    MAX_CALLS,
    MESSAGE_LIMIT,
    RECEIVED_LIMIT,
    SHARE,
    Call,
    Connection,
    Http2Server,
    Refused,
    Status,
)
from producer.setting_types import Bind

GET: Final = "/echo"
DATA: Final = frame(FrameType.DATA, 1, message(b"hello"))
END: Final = frame(FrameType.DATA, 1, b"", Flag.END_STREAM)


class Service:
    """Methods that behave as they are called."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.cancelled = 0
        self.methods = {
            "/echo": self.echo, "/stream": self.stream, "/slow": self.slow, "/fails": self.fails,
            "/cancelled": self.cuts_itself_off, "/large": self.large, "/refused": self.refused,
        }  # fmt: skip

    async def echo(self, call: Call) -> bytes | None:
        return await call.message()

    async def stream(self, call: Call) -> None:
        while (message := await call.message()) is not None:
            call.send(b"%d" % len(message))

    async def slow(self, call: Call) -> bytes | None:
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await call.message()

    async def fails(self, call: Call) -> None:
        raise ValueError(call.path)

    async def cuts_itself_off(self, _call: Call) -> None:
        raise asyncio.CancelledError

    async def large(self, _call: Call) -> bytes:
        return b"x" * 15_000

    async def refused(self, _call: Call) -> None:
        raise Refused(Status.INVALID_ARGUMENT, "100 % ü\n" + "x" * 300)


class Client:
    """A bare connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._data = b""
        self._decoder = Decoder()
        self.received: list[Frame] = []

    def send(self, *data: bytes) -> None:
        self._writer.write(b"".join(data))

    async def next(self) -> Frame | None:
        """The next frame; None once the connection is closed."""
        while not (whole := next(frames(self._data), None)):
            try:
                more = await asyncio.wait_for(self._reader.read(65536), 30)
            except ConnectionError:
                more = b""
            if not more:
                return None
            self._data += more
        self._data = self._data[9 + len(whole.payload) :]
        self.received.append(whole)
        return whole

    async def until(self, kind: FrameType, stream: int | None = None, *, ends: bool = False) -> Frame | None:
        """The next frame of this kind; None if the connection is closed before."""
        while (each := await self.next()) is not None:
            fits = each.kind == kind and stream in {None, each.stream}
            if fits and (not ends or each.flags & Flag.END_STREAM):
                return each
        return None

    async def trailers(self, stream: int) -> dict[str, str]:
        """The header fields that end a call; empty if it is cut off."""
        while (each := await self.next()) is not None:
            if each.stream == stream and each.kind == FrameType.RST_STREAM:
                return {}
            if each.kind == FrameType.HEADERS:
                fields = dict(self._decoder.decode(each.payload))
                if each.stream == stream and each.flags & Flag.END_STREAM:
                    return {str(name): str(value) for name, value in fields.items()}
        return {}

    async def answered(self, stream: int, path: str = GET) -> bool:
        """Whether a call is answered."""
        self.send(call(stream, path, b"hello"))
        return (await self.trailers(stream)).get("grpc-status") == "0"

    def close(self) -> None:
        self._writer.close()


class Rig:
    """A server, and connections to it."""

    def __init__(self, server: Http2Server, service: Service, port: int) -> None:
        self.server = server
        self.service = service
        self._port = port
        self._clients: list[Client] = []

    async def connect(self, first: bytes = OPENING) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self._port))
        self._clients.append(client)
        client.send(first)
        return client

    async def close(self) -> None:
        for each in self._clients:
            each.close()
        await self.server.stop(0)


@pytest.fixture
def tls_pair() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server and of a client that trusts it."""
    authority, pair = trustme.CA(), (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context())
    authority.issue_cert("localhost").configure_cert(pair[0])
    authority.configure_trust(pair[1])
    return pair


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    service = Service()
    server = Http2Server(service.methods, _admit, frozenset({"x-kept"}))
    sockets = listen(Bind("127.0.0.1", 0), "a test")
    await server.start(sockets, None, 10)
    rig = Rig(server, service, sockets[0].getsockname()[1])
    yield rig
    await rig.close()
    assert (server.serving, server.awaiting_message) == (0, 0)


def _admit(call: Call) -> None:
    if call.path not in {"/echo", "/stream", "/slow", "/fails", "/cancelled", "/large", "/refused"}:
        raise Refused(Status.UNIMPLEMENTED, "there is no such method")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.005)


def fields(*pairs: tuple[str | bytes, str | bytes]) -> bytes:
    return frame(FrameType.HEADERS, 1, b"".join(header(*each) for each in pairs), Flag.END_HEADERS | Flag.END_STREAM)


def without(name: str) -> bytes:
    return fields(*((each, value) for each, value in HEAD.items() if each != name))


def with_headers(payload: bytes, flags: int = Flag.END_HEADERS) -> bytes:
    return frame(FrameType.HEADERS, 1, payload, flags)


CLOSED: Final = call(1, GET, b"")
BROKEN: Final = {
    # what a client sends, and the error with which the connection ends
    "no preface": (b"GET / HTTP/1.1\r\nHost: api\r\n\r\n", ErrorCode.PROTOCOL_ERROR),
    "no settings": (PREFACE + begin(1, GET), ErrorCode.PROTOCOL_ERROR),
    "settings are acknowledged first": (
        PREFACE + frame(FrameType.SETTINGS, 0, b"", Flag.ACK), ErrorCode.PROTOCOL_ERROR),
    "frame too large": (OPENING + frame(FrameType.DATA, 1, b"x" * (MAX_FRAME + 1))[:9], ErrorCode.FRAME_SIZE_ERROR),
    "data on stream 0": (OPENING + frame(FrameType.DATA, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data on an idle stream": (OPENING + DATA, ErrorCode.PROTOCOL_ERROR),
    "data on a server's stream": (OPENING + begin(3, GET) + frame(FrameType.DATA, 2, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data that is only padding": (
        OPENING + begin(1, GET) + frame(FrameType.DATA, 1, b"\x05abc", Flag.PADDED), ErrorCode.PROTOCOL_ERROR),
    "padded data without a length": (
        OPENING + begin(1, GET) + frame(FrameType.DATA, 1, b"", Flag.PADDED), ErrorCode.FRAME_SIZE_ERROR),
    "headers on stream 0": (OPENING + begin(0, GET), ErrorCode.PROTOCOL_ERROR),
    "headers on an even stream": (OPENING + begin(2, GET), ErrorCode.PROTOCOL_ERROR),
    "headers on a closed stream": (OPENING + CLOSED + reset_frame(1, ErrorCode.CANCEL) + begin(1, GET),
                                   ErrorCode.STREAM_CLOSED),
    "headers on a lower stream": (OPENING + begin(5, GET) + begin(3, GET), ErrorCode.STREAM_CLOSED),
    "headers too short for a priority": (
        OPENING + with_headers(b"abc", Flag.PRIORITY | Flag.END_HEADERS), ErrorCode.FRAME_SIZE_ERROR),
    "headers interrupted by another frame": (
        OPENING + with_headers(head(GET), 0) + SETTINGS, ErrorCode.PROTOCOL_ERROR),
    "headers continued on another stream": (
        OPENING + with_headers(head(GET), 0) + frame(FrameType.CONTINUATION, 3, b"", Flag.END_HEADERS),
        ErrorCode.PROTOCOL_ERROR),
    "a continuation of nothing": (
        OPENING + begin(1, GET) + frame(FrameType.CONTINUATION, 1, b"", Flag.END_HEADERS), ErrorCode.PROTOCOL_ERROR),
    "headers that are not HPACK": (OPENING + with_headers(b"\xff\xff\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
    "an index beyond the table": (OPENING + with_headers(b"\xfe"), ErrorCode.COMPRESSION_ERROR),
    "a table that is larger than allowed": (
        OPENING + with_headers(b"\x3f\xe2\x1f" + head(GET)), ErrorCode.COMPRESSION_ERROR),
    "a table that changes after a header": (
        OPENING + with_headers(head(GET) + EMPTY_TABLE), ErrorCode.COMPRESSION_ERROR),
    "headers of 9 kB": (
        OPENING + with_headers(head(GET, header("x", "v" * 9000))), ErrorCode.ENHANCE_YOUR_CALM),
    "headers that unpack to more": (
        OPENING + with_headers(head(GET, header("x", "v" * 3000, indexed=True)) + b"\xbe" * 3),
        ErrorCode.ENHANCE_YOUR_CALM),
    "priority on stream 0": (OPENING + frame(FrameType.PRIORITY, 0, b"\0\0\0\0\0"), ErrorCode.PROTOCOL_ERROR),
    "a priority of another size": (OPENING + frame(FrameType.PRIORITY, 1, b"\0"), ErrorCode.FRAME_SIZE_ERROR),
    "a reset of stream 0": (OPENING + reset_frame(0, ErrorCode.CANCEL), ErrorCode.PROTOCOL_ERROR),
    "a reset of an idle stream": (OPENING + reset_frame(1, ErrorCode.CANCEL), ErrorCode.PROTOCOL_ERROR),
    "a reset of another size": (
        OPENING + begin(1, GET) + frame(FrameType.RST_STREAM, 1, b"\0"), ErrorCode.FRAME_SIZE_ERROR),
    "settings of a stream": (OPENING + frame(FrameType.SETTINGS, 1), ErrorCode.PROTOCOL_ERROR),
    "settings of another size": (OPENING + frame(FrameType.SETTINGS, 0, b"\0\0\0"), ErrorCode.FRAME_SIZE_ERROR),
    "settings in an acknowledgement": (
        OPENING + frame(FrameType.SETTINGS, 0, b"\0" * 6, Flag.ACK), ErrorCode.FRAME_SIZE_ERROR),
    "push neither on nor off": (OPENING + settings_frame({Setting.ENABLE_PUSH: 2}), ErrorCode.PROTOCOL_ERROR),
    "frames too small": (OPENING + settings_frame({Setting.MAX_FRAME_SIZE: 16_383}), ErrorCode.PROTOCOL_ERROR),
    "frames too large": (OPENING + settings_frame({Setting.MAX_FRAME_SIZE: 2**24}), ErrorCode.PROTOCOL_ERROR),
    "a window of 2 GiB": (
        OPENING + settings_frame({Setting.INITIAL_WINDOW_SIZE: 2**31}), ErrorCode.FLOW_CONTROL_ERROR),
    "a window that a setting makes too large": (
        OPENING + begin(1, GET) + window_frame(1, MAX_WINDOW - DEFAULT_WINDOW)
        + settings_frame({Setting.INITIAL_WINDOW_SIZE: DEFAULT_WINDOW + 1}), ErrorCode.FLOW_CONTROL_ERROR),
    "a push": (OPENING + frame(FrameType.PUSH_PROMISE, 1, b"\0\0\0\2", Flag.END_HEADERS), ErrorCode.PROTOCOL_ERROR),
    "a ping of a stream": (OPENING + frame(FrameType.PING, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
    "a ping of another size": (OPENING + frame(FrameType.PING, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    "a goaway of a stream": (OPENING + frame(FrameType.GOAWAY, 1, b"\0" * 8), ErrorCode.PROTOCOL_ERROR),
    "a window by nothing": (OPENING + window_frame(0, 0), ErrorCode.PROTOCOL_ERROR),
    "a window beyond 2 GiB": (OPENING + window_frame(0, MAX_WINDOW), ErrorCode.FLOW_CONTROL_ERROR),
    "a window of an idle stream": (OPENING + window_frame(1, 1), ErrorCode.PROTOCOL_ERROR),
    "a window of another size": (OPENING + frame(FrameType.WINDOW_UPDATE, 0, b"\0"), ErrorCode.FRAME_SIZE_ERROR),
}  # fmt: skip

MALFORMED: Final = {
    # what a client sends, and the error with which the call ends
    "a capital in a name": (fields(*HEAD.items(), ("X-Kept", "a")), ErrorCode.PROTOCOL_ERROR),
    "a space in a name": (fields(*HEAD.items(), ("x kept", "a")), ErrorCode.PROTOCOL_ERROR),
    "an empty name": (fields(*HEAD.items(), ("", "a")), ErrorCode.PROTOCOL_ERROR),
    "a line feed in a value": (fields(*HEAD.items(), ("x-kept", "a\nb")), ErrorCode.PROTOCOL_ERROR),
    "a value that is no text": (fields(*HEAD.items(), ("x-kept", b"\xff")), ErrorCode.PROTOCOL_ERROR),
    "an unknown pseudo-header": (fields((":proto", "x"), *HEAD.items()), ErrorCode.PROTOCOL_ERROR),
    "a response's pseudo-header": (fields((":status", "200"), *HEAD.items()), ErrorCode.PROTOCOL_ERROR),
    "a pseudo-header twice": (fields((":path", "/"), *HEAD.items()), ErrorCode.PROTOCOL_ERROR),
    "a pseudo-header at the end": (
        fields(*sorted(HEAD.items(), reverse=True)), ErrorCode.PROTOCOL_ERROR),
    "no method": (without(":method"), ErrorCode.PROTOCOL_ERROR),
    "no scheme": (without(":scheme"), ErrorCode.PROTOCOL_ERROR),
    "no path": (without(":path"), ErrorCode.PROTOCOL_ERROR),
    "an empty path": (begin(1, ""), ErrorCode.PROTOCOL_ERROR),
    "connection": (fields(*HEAD.items(), ("connection", "close")), ErrorCode.PROTOCOL_ERROR),
    "transfer-encoding": (fields(*HEAD.items(), ("transfer-encoding", "chunked")), ErrorCode.PROTOCOL_ERROR),
    "te with anything but trailers": (begin(1, GET, te="gzip"), ErrorCode.PROTOCOL_ERROR),
    "a length that is no number": (begin(1, GET, header("content-length", "x")), ErrorCode.PROTOCOL_ERROR),
    "a length that is too small": (begin(1, GET, header("content-length", "9")) + DATA, ErrorCode.PROTOCOL_ERROR),
    "a length that is too large": (begin(1, GET, header("content-length", "11")) + DATA + END,
                                   ErrorCode.PROTOCOL_ERROR),
    "trailers that do not end the call": (begin(1, GET) + with_headers(header("x", "y")), ErrorCode.PROTOCOL_ERROR),
    "a pseudo-header in the trailers": (
        begin(1, GET) + with_headers(header(":path", "y"), Flag.END_HEADERS | Flag.END_STREAM),
        ErrorCode.PROTOCOL_ERROR),
    "data after the end": (call(1, "/slow", b"") + frame(FrameType.DATA, 1, b"x"), ErrorCode.STREAM_CLOSED),
    "trailers after the end": (
        call(1, "/slow", b"") + with_headers(header("x", "y"), Flag.END_HEADERS | Flag.END_STREAM),
        ErrorCode.STREAM_CLOSED),
    "data after a reset": (
        begin(1, GET) + reset_frame(1, ErrorCode.CANCEL) + frame(FrameType.DATA, 1, b"x"), ErrorCode.STREAM_CLOSED),
    "a window by nothing": (begin(1, GET) + window_frame(1, 0), ErrorCode.PROTOCOL_ERROR),
    "a window beyond 2 GiB": (begin(1, GET) + window_frame(1, MAX_WINDOW), ErrorCode.FLOW_CONTROL_ERROR),
    "more than its window": (
        begin(1, "/slow") + frame(FrameType.DATA, 1, bytes(5) + message(b"x", claimed=16_000))
        + frame(FrameType.DATA, 1, bytes([255]) + bytes(255), Flag.PADDED) * 256, ErrorCode.FLOW_CONTROL_ERROR),
}  # fmt: skip

FINE: Final = {
    # what begins a call on stream 1 that is answered
    "padding and priority": with_headers(
        b"\x02" + b"\x80\0\0\0\x10" + head(GET) + b"\0\0", Flag.END_HEADERS | Flag.PADDED | Flag.PRIORITY
    ) + frame(FrameType.DATA, 1, b"\x03" + message(b"") + b"\0\0\0", Flag.PADDED | Flag.END_STREAM),
    "headers in three frames": with_headers(head(GET)[:5], 0)
    + frame(FrameType.CONTINUATION, 1, b"")
    + frame(FrameType.CONTINUATION, 1, head(GET)[5:], Flag.END_HEADERS)
    + DATA + END,
    "a message in small pieces": begin(1, GET)
    + b"".join(frame(FrameType.DATA, 1, message(b"hello")[i : i + 1]) for i in range(10)) + END,
    "trailers": begin(1, GET) + DATA + with_headers(header("x", "y"), Flag.END_HEADERS | Flag.END_STREAM),
    "a content-length": begin(1, GET, header("content-length", "10")) + DATA + END,
    "application/grpc+proto": call(1, GET, b"", content_type="application/grpc+proto"),
    "a parameter of the content type": call(1, GET, b"", content_type="application/grpc; charset=utf-8"),
    "binary and unknown metadata": call(1, GET, b"", header("x-bin", b"AP8"), header("y", b"\xff")),
    "a deadline, and no te": call(1, GET, b"", header("grpc-timeout", "5S")),
    "a smaller table": with_headers(EMPTY_TABLE + head(GET)) + DATA + END,
    "frames of unknown types, flags and settings": frame(99, 0, b"x", 255)
    + frame(FrameType.SETTINGS, 0, b"\0\x63\0\0\0\1") + call(1, GET, b""),
    "the largest message": begin(1, GET)
    + frame(FrameType.DATA, 1, message(b"x" * MESSAGE_LIMIT)[:MAX_FRAME])
    + frame(FrameType.DATA, 1, message(b"x" * MESSAGE_LIMIT)[MAX_FRAME:], Flag.END_STREAM),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_what_breaks_a_rule_of_the_connection_ends_it(rig: Rig, name: str) -> None:
    data, error = BROKEN[name]
    client = await rig.connect(data)
    goaway = await client.until(FrameType.GOAWAY)
    assert goaway
    assert goaway.error == error
    assert await client.next() is None


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_call_ends_alone(rig: Rig, name: str) -> None:
    data, error = MALFORMED[name]
    client = await rig.connect(OPENING + data)
    reset = await client.until(FrameType.RST_STREAM, 1)
    assert reset
    assert reset.error == error
    assert await client.answered(3)


@pytest.mark.parametrize("name", FINE)
async def test_what_keeps_the_rules_is_answered(rig: Rig, name: str) -> None:
    client = await rig.connect(OPENING + FINE[name])
    assert (await client.trailers(1)).get("grpc-status") == "0"
    assert await client.answered(3)


async def test_the_same_bytes_mean_another_head_once_the_table_has_changed(rig: Rig) -> None:
    """Of a head, its path is the newest field in the client's table."""
    fixed = b"".join(header(name, value) for name, value in HEAD.items() if name.startswith(":") and name != ":path")
    rest = b"".join(header(name, value) for name, value in HEAD.items() if not name.startswith(":"))

    def ask(stream: int, path: bytes) -> bytes:
        data = frame(FrameType.DATA, stream, message(b""), Flag.END_STREAM)
        return frame(FrameType.HEADERS, stream, fixed + path + rest, Flag.END_HEADERS) + data

    newest = b"\xbe"
    client = await rig.connect(OPENING + ask(1, header(":path", GET, indexed=True)))
    client.send(*(ask(stream, newest) for stream in (3, 5, 7)))
    client.send(ask(9, header(":path", "/refused", indexed=True)), ask(11, newest), ask(13, newest))
    assert [(await client.trailers(stream))["grpc-status"] for stream in (5, 7, 11, 13)] == ["0", "0", "3", "3"]
    client.send(frame(FrameType.HEADERS, 15, EMPTY_TABLE + head(GET), Flag.END_HEADERS), ask(17, newest))
    goaway = await client.until(FrameType.GOAWAY)
    assert goaway
    assert goaway.error == ErrorCode.COMPRESSION_ERROR


async def test_a_call_comes_byte_by_byte(rig: Rig) -> None:
    client = await rig.connect(b"")
    for byte in OPENING + call(1, GET, b"hello"):
        client.send(bytes((byte,)))
        await asyncio.sleep(0)
    assert (await client.trailers(1))["grpc-status"] == "0"


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"_method": "GET"}, "405"),
        ({"content_type": "application/json"}, "415"),
        ({"content_type": "application/grpc-web"}, "415"),
        ({"content_type": "application/grpc+json"}, "415"),
    ],
)
async def test_what_is_no_grpc_gets_an_http_status(rig: Rig, changed: dict[str, str], status: str) -> None:
    client = await rig.connect(OPENING + call(1, GET, b"", **changed))
    assert await client.trailers(1) == {":status": status}
    assert await client.answered(3)


class TestAnswers:
    async def test_they_say_what_went_wrong_in_grpcs_own_way(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + call(1, "/refused", b""))
        trailers = await client.trailers(1)
        assert trailers["grpc-status"] == "3"
        assert trailers["grpc-message"] == "100 %25 %C3%BC%0A" + "x" * 300

    @pytest.mark.parametrize("length", [0, 126, 127, 254, 255, 256, 16_511])
    def test_a_header_field_of_any_length_is_written_right(self, length: int) -> None:
        [(_, value)] = Decoder(100_000).decode(header("x", "v" * length))
        assert str(value) == "v" * length

    def test_printable_ascii_stays(self) -> None:
        text = "".join(map(chr, range(32, 127))).replace("%", "")
        assert message_text(text) == text.encode()

    @pytest.mark.parametrize(("path", "status"), [("/fails", "2"), ("/cancelled", "14"), ("/nothing", "12")])
    async def test_each_call_gets_one(self, rig: Rig, caplog: pytest.LogCaptureFixture, path: str, status: str) -> None:
        client = await rig.connect(OPENING + call(1, path, b""))
        assert (await client.trailers(1))["grpc-status"] == status
        assert "never retrieved" not in caplog.text

    async def test_a_compressed_message_is_unimplemented(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + begin(1, GET) + frame(FrameType.DATA, 1, b"\x01\0\0\0\x01x"))
        assert (await client.trailers(1))["grpc-status"] == "12"

    async def test_they_wait_for_the_window_of_the_call(self, rig: Rig) -> None:
        client = await rig.connect(NO_WINDOW + call(1, GET, b"hello"))
        assert await client.until(FrameType.HEADERS, 1)
        for _ in range(10):
            client.send(window_frame(1, 1))
            data = await client.until(FrameType.DATA, 1)
            assert data
            assert len(data.payload) == 1
        assert (await client.trailers(1))["grpc-status"] == "0"

    async def test_they_wait_for_the_window_of_the_connection(self, rig: Rig) -> None:
        """Calls that all fit in their own windows, and not in the one that they share."""
        client = await rig.connect(OPENING + b"".join(call(i, "/large", b"") for i in (1, 3, 5, 7, 9)))
        got = 0
        while got < DEFAULT_WINDOW:
            data = await client.until(FrameType.DATA)
            assert data
            got += len(data.payload)
        assert got == DEFAULT_WINDOW
        client.send(window_frame(0, 10_000))
        assert (await client.trailers(9))["grpc-status"] == "0"

    async def test_a_setting_opens_the_windows_of_calls_that_wait(self, rig: Rig) -> None:
        client = await rig.connect(NO_WINDOW + call(1, GET, b"hello"))
        assert await client.until(FrameType.HEADERS, 1)
        client.send(settings_frame({Setting.INITIAL_WINDOW_SIZE: 100}))
        assert (await client.trailers(1))["grpc-status"] == "0"

    async def test_a_client_with_a_smaller_table_is_told_first(self, rig: Rig) -> None:
        """RFC 7541, 4.2: strict decoders end the connection otherwise."""
        client = await rig.connect(PREFACE + settings_frame({Setting.HEADER_TABLE_SIZE: 0}) + call(1, GET, b""))
        first = await client.until(FrameType.HEADERS, 1)
        assert first
        assert first.payload.startswith(EMPTY_TABLE)
        assert await client.answered(3)

    async def test_a_client_that_sends_on_is_told_to_stop(self, rig: Rig) -> None:
        """And what it sent before it knew is ignored."""
        client = await rig.connect(OPENING + begin(1, GET) + DATA)
        reset = await client.until(FrameType.RST_STREAM, 1)
        assert reset
        assert reset.error == ErrorCode.NO_ERROR
        client.send(DATA, END, with_headers(header("x", "y"), Flag.END_HEADERS | Flag.END_STREAM))
        assert await client.answered(3)
        assert not [each for each in client.received if each.kind == FrameType.GOAWAY]


class TestReceiving:
    async def test_a_stream_may_send_more_than_its_first_window(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + begin(1, "/stream"))
        data = message(b"x" * 10_000)
        for sent in range(20):
            while self.window_of(client) < (sent + 1) * len(data):
                assert await client.until(FrameType.WINDOW_UPDATE, 1)
            client.send(frame(FrameType.DATA, 1, data))
            assert await client.until(FrameType.DATA, 1)
        client.send(END)
        assert (await client.trailers(1))["grpc-status"] == "0"

    def window_of(self, client: Client) -> int:
        """Bytes that it may send on stream 1 in all."""
        updates = [each for each in client.received if each[:3:2] == (FrameType.WINDOW_UPDATE, 1)]
        return DEFAULT_WINDOW + sum(int.from_bytes(each.payload, "big") for each in updates)

    async def test_the_connections_window_grows_again_with_what_ended_calls_send(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + begin(1, "/nothing"))
        assert await client.until(FrameType.RST_STREAM, 1)
        client.send(frame(FrameType.DATA, 1, b"x" * 16_000) * 2)
        update = await client.until(FrameType.WINDOW_UPDATE, 0)
        assert update
        assert int.from_bytes(update.payload, "big") == 32_000

    @pytest.mark.parametrize("content", [b"", b"x" * 4000], ids=["empty", "long"])
    async def test_messages_that_nobody_reads_are_bounded(self, rig: Rig, content: bytes) -> None:
        """A method that takes one message gets more, in calls that are each within their window."""
        client = await rig.connect()
        some = message(content) * (4005 // len(message(content)))
        for i in range(1, 80, 2):
            client.send(begin(i, "/slow"), frame(FrameType.DATA, i, some) * 3)
            await asyncio.sleep(0.001)
            [connection] = rig.server.connections or [None]
            assert connection is None or connection.buffered <= RECEIVED_LIMIT + MAX_FRAME * 14
            if connection is None:
                break
        trailers = await client.trailers(1)
        assert trailers.get("grpc-status") in {"8", None}

    async def test_a_ping_is_answered(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + frame(FrameType.PING, 0, b"12345678"))
        assert await client.until(FrameType.PING) == (FrameType.PING, Flag.ACK, 0, b"12345678")

    async def test_a_client_that_goes_away_gets_what_it_asked_for(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + call(1, "/slow", b"") + goaway_frame(0, ErrorCode.NO_ERROR))
        await until(lambda: rig.server.serving == 1)
        rig.service.go_on.set()
        assert (await client.trailers(1))["grpc-status"] == "0"


class TestShares:
    """With smaller bounds than the real ones, so that they are reached at once."""

    async def test_a_connection_has_a_hundred_calls(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + b"".join(call(i, "/slow", b"") for i in streams(MAX_CALLS + 1)))
        reset = await client.until(FrameType.RST_STREAM)
        assert reset
        assert (reset.stream, reset.error) == (2 * MAX_CALLS + 1, ErrorCode.REFUSED_STREAM)
        await until(lambda: rig.server.serving == MAX_CALLS)
        rig.service.go_on.set()
        assert await client.answered(2 * MAX_CALLS + 3)

    async def test_many_calls_beyond_a_hundred_end_the_connection(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + b"".join(begin(i, GET) for i in streams(MAX_CALLS + 20)))
        goaway = await client.until(FrameType.GOAWAY)
        assert goaway
        assert goaway.error == ErrorCode.ENHANCE_YOUR_CALM

    async def test_few_calls_of_a_connection_await_their_message_once_many_do(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("producer.api.http2.CROWDED", 20)
        heads = b"".join(begin(i, GET) for i in streams(20))
        await rig.connect(OPENING + heads)
        await until(lambda: rig.server.awaiting_message == 20)
        client = await rig.connect(OPENING + b"".join(begin(i, GET) for i in streams(CROWDED_SHARE + 1)))
        reset = await client.until(FrameType.RST_STREAM)
        assert reset
        assert (reset.stream, reset.error) == (2 * CROWDED_SHARE + 1, ErrorCode.REFUSED_STREAM)
        assert rig.server.awaiting_message == 20 + CROWDED_SHARE
        client.send(DATA, END)  # a call that is served makes room
        assert await client.trailers(1)
        assert await client.answered(2 * CROWDED_SHARE + 3)

    async def test_a_busy_server_serves_few_calls_of_a_connection_and_all_in_turn(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("producer.api.http2.BUSY", 10)
        greedy = await rig.connect(OPENING + b"".join(call(i, "/slow", b"") for i in streams(60)))
        await until(lambda: rig.server.serving == 10)
        modest = await rig.connect(OPENING + b"".join(call(i, "/slow", b"") for i in streams(60)))
        await until(lambda: rig.server.serving == 10 + SHARE)
        assert await (await rig.connect()).answered(1)  # a third is served at once
        rig.service.go_on.set()
        for each in (greedy, modest):
            assert (await each.trailers(119))["grpc-status"] == "0"

    async def test_long_messages_count_more(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("producer.api.http2.BUSY", 30)
        await rig.connect(OPENING + b"".join(call(i, "/slow", b"x" * 10_000) for i in streams(20)))
        await until(lambda: rig.server.serving == 30)
        await asyncio.sleep(0.05)
        assert rig.server.serving == 30

    async def test_silent_connections_are_asked_and_then_closed(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"KEEPALIVE_AFTER": 0.5, "KEEPALIVE_TIMEOUT": 0.5}.items():
            monkeypatch.setattr(f"producer.api.http2.{name}", value)
        dead, alive = await rig.connect(), await rig.connect()
        for _ in range(2):
            ping = await alive.until(FrameType.PING)
            assert ping
            alive.send(frame(FrameType.PING, 0, ping.payload, Flag.ACK))
        assert await dead.until(FrameType.PING)
        assert await dead.next() is None
        assert await alive.answered(1)

    async def test_a_flood_of_pings_leaves_others_their_turn(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("producer.api.http2.ROUND", 0.0)  # each connection's turn is one frame
        served: list[int] = []  # pings, in each turn
        take_turn = Connection._serve_frames

        def counted(connection: Connection, data: bytes) -> int:
            taken = take_turn(connection, data)
            served.append(data[:taken].count(b"12345678"))
            return taken

        monkeypatch.setattr(Connection, "_serve_frames", counted)
        flood = await rig.connect()
        flood.send(frame(FrameType.PING, 0, b"12345678") * 400)
        await until(lambda: sum(served) == 400)
        assert max(served) == 1


class TestCancelling:
    async def test_it_reaches_the_method(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + call(1, "/slow", b""))
        await until(lambda: rig.server.serving == 1)
        await asyncio.sleep(0)
        client.send(reset_frame(1, ErrorCode.CANCEL))
        await until(lambda: rig.service.cancelled == 1 and rig.server.serving == 0)
        assert await client.answered(3)

    async def test_a_call_that_is_cancelled_before_it_is_served_takes_no_room(self, rig: Rig) -> None:
        """All in one segment: its task never runs."""
        cancelled = (call(i, "/slow", b"") + reset_frame(i, ErrorCode.CANCEL) for i in range(1, 60, 2))
        client = await rig.connect(OPENING + b"".join(cancelled))
        assert await client.answered(61)
        assert rig.server.serving == 0

    async def test_a_connection_that_is_lost_cancels_its_calls(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = await rig.connect(OPENING + b"".join(call(i, "/slow", b"") for i in (1, 3, 5)))
        await until(lambda: rig.server.serving == 3)
        client.close()
        await until(lambda: rig.service.cancelled == 3 and rig.server.serving == 0 and not rig.server.connections)
        assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


class TestShutdown:
    async def test_calls_that_are_under_way_are_served_and_later_ones_refused(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + call(1, "/slow", b""))
        await until(lambda: rig.server.serving == 1)
        stopping = asyncio.create_task(rig.server.stop(30))
        first = await client.until(FrameType.GOAWAY)
        assert first
        assert first.payload == MAX_STREAM.to_bytes(4, "big") + bytes(4)
        ping = await client.until(FrameType.PING)
        assert ping
        # The client had begun a call before it read that; then it acknowledges.
        client.send(call(3, "/slow", b""), frame(FrameType.PING, 0, ping.payload, Flag.ACK))
        last = await client.until(FrameType.GOAWAY)
        assert last
        assert last.payload == (3).to_bytes(4, "big") + bytes(4)
        client.send(call(5, GET, b""))
        reset = await client.until(FrameType.RST_STREAM, 5)
        assert reset
        assert reset.error == ErrorCode.REFUSED_STREAM
        assert not stopping.done()
        rig.service.go_on.set()
        assert {(await client.trailers(i))["grpc-status"] for i in (1, 3)} == {"0"}
        assert await client.next() is None
        await stopping

    async def test_a_call_whose_message_is_on_its_way_is_served(self, rig: Rig) -> None:
        client = await rig.connect(OPENING + begin(1, GET))
        await until(lambda: rig.server.awaiting_message == 1)
        stopping = asyncio.create_task(rig.server.stop(30))
        ping = await client.until(FrameType.PING)
        assert ping
        client.send(frame(FrameType.PING, 0, ping.payload, Flag.ACK))
        await client.until(FrameType.GOAWAY)
        await asyncio.sleep(0.1)  # longer than it looks for calls that are served
        client.send(DATA + END)
        assert (await client.trailers(1))["grpc-status"] == "0"
        await stopping

    async def test_a_client_that_connects_at_that_moment_is_told(self, rig: Rig) -> None:
        """It waited to be accepted, and the server accepts it to tell it."""
        rig.server.stopping = True
        client = await rig.connect()
        frames = [await client.next() for _ in range(3)]
        assert [each and each.kind for each in frames] == [FrameType.SETTINGS, FrameType.GOAWAY, FrameType.PING]

    async def test_a_client_in_its_handshake_is_told_once_that_has_ended(
        self, tls_pair: tuple[ssl.SSLContext, ssl.SSLContext]
    ) -> None:
        here, there = tls_pair
        service = Service()
        server = Http2Server(service.methods, _admit, frozenset())
        [listener] = listen(Bind("127.0.0.1", 0), "a test")
        await server.start([listener], here, 10)
        with socket.create_connection(listener.getsockname()) as connected:
            await until(lambda: len(server.connections) == 1)
            stopping = asyncio.create_task(server.stop(30))
            await until(lambda: server.stopping)
            client = Client(*await asyncio.open_connection(sock=connected, ssl=there, server_hostname="localhost"))
            client.send(OPENING)
            told = await client.until(FrameType.GOAWAY)
            assert told
            assert told.payload == MAX_STREAM.to_bytes(4, "big") + bytes(4)
            client.send(call(1, GET, b"hello"))
            assert (await client.trailers(1))["grpc-status"] == "0"
            await stopping
            client.close()

    async def test_a_client_that_says_nothing_holds_nobody_up(self, rig: Rig) -> None:
        silent = await rig.connect()
        stream = await rig.connect(OPENING + begin(1, "/stream") + DATA)
        await stream.until(FrameType.DATA)
        [_, connection] = rig.server.connections
        connection.calls[1].stays_open()
        async with asyncio.timeout(5):
            await rig.server.stop(30)
        assert await silent.until(FrameType.SETTINGS)
        assert not rig.server.connections

"""A server for gRPC over HTTP/2. It bounds all that a client can make it keep, and no client holds up another.

grpc.aio bounds neither the memory of headers and unsent answers nor the calls that wait: 600 connections made it grow
by 350 MB, and a call takes it twice as long. Here a connection is read no further than it can be served, so that TCP
itself slows its client down. `frames` says what the bytes mean; section numbers are RFC 9113's.

Left out of the protocol: compressed messages (answered UNIMPLEMENTED), push, priorities, and `grpc-timeout`: a client
itself ends a call at its deadline, and no call takes long here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from enum import IntEnum
from time import perf_counter
from typing import ClassVar, Final

from producer.api.binding import CONNECTIONS_LIMIT
from producer.api.frames import (
    DEFAULT_WINDOW,
    EMPTY_TABLE,
    FRAME_HEADER,
    HEAD_OF_FRAME,
    MAX_FRAME,
    MAX_STREAM,
    MAX_WINDOW,
    PREFACE,
    CallHead,
    ConnectionFailed,
    ErrorCode,
    Fields,
    Flag,
    FrameType,
    HeaderReader,
    Setting,
    StreamFailed,
    field,
    frame,
    goaway_frame,
    message_text,
    parsed_settings,
    require_trailers,
    reset_frame,
    settings_frame,
    unpadded,
    window_frame,
)
from producer.api.tls_connection import TlsConnection

logger = logging.getLogger(__name__)

# The bounds. Sizes are in bytes, times in seconds.

# Of the server, beside CONNECTIONS_LIMIT:
# While BUSY calls are served at once, of which a long message counts as several, a connection that has SHARE of them is
# not read until one ends.
BUSY: Final = 1000
SHARE: Final = 4
# While the messages of CROWDED calls have not come, a connection may have CROWDED_SHARE of them, and more are refused.
CROWDED: Final = 5000
CROWDED_SHARE: Final = 8
# Of a connection:
MAX_CALLS: Final = 100  # 6.5.2 recommends no less. Clients keep further calls back
HEAD_LIMIT: Final = 8 * 1024  # a call's headers, packed or not
MESSAGE_LIMIT: Final = 16 * 1024  # one message
RECEIVED_LIMIT: Final = 40 * 1024  # messages that have come in part, or that no call has read yet
UNSENT_LIMIT: Final = 17 * 1024  # answers that the client has no window for, or does not read
PREFACE_TIMEOUT: Final = 10.0
MESSAGE_TIMEOUT: Final = 5.0  # from a call's head to its message
SEND_TIMEOUT: Final = 10.0
KEEPALIVE_AFTER: Final = 30.0  # of silence; then a ping is sent
KEEPALIVE_TIMEOUT: Final = 10.0
# A connection has credit for frames that bring no call. It is closed when it has none left.
CREDIT: Final = 1000  # at first, and at most
CREDIT_EARNED: Final = 20  # by each call that is answered, and in each second
FRAME_COST: Final = 1  # of a frame that carries no call
RESET_COST: Final = 5  # of a call that is cancelled within a second, or malformed. A client may cancel all that it has
EXCESS_COST: Final = 100  # of a call beyond a bound: a client that keeps the rules makes none
# A connection's turn ends after a time, so that all others have theirs.
ROUND: Final = 0.05  # seconds in which every connection should have had its turn
TRUSTED_TURN: Final = 0.005  # seconds of a turn of one that got answers and has spent little credit

_READ: Final = 8 * 1024  # bytes at once. With a frame that has come in part, a connection keeps three times as much
_CHECK_EVERY: Final = 1.0  # seconds between two looks at the timeouts
_GATHERED: Final = UNSENT_LIMIT // 2  # bytes of answers that wait for the end of a turn of the loop
_LAST_CALLS: Final = 1.0  # seconds that clients have to learn of a shutdown, while calls that they begin are served
_GRANT: Final = DEFAULT_WINDOW // 4  # bytes after which the client may send as many again
_MESSAGE_COST: Final = 64  # bytes that a received message takes beyond its own
_KEEPALIVE_PING: Final = b"are you?"
_SHUTDOWN_PING: Final = b"shutdown"


class Status(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


# How the server begins, and the blocks of header fields that it sends.
_OUR_SETTINGS: Final = settings_frame(
    {Setting.MAX_CONCURRENT_STREAMS: MAX_CALLS, Setting.MAX_HEADER_LIST_SIZE: HEAD_LIMIT}
)
_STATUS_200: Final = b"\x88"  # RFC 7541, appendix A
_ANSWER_HEAD: Final = _STATUS_200 + field(b"content-type", b"application/grpc")
_TRAILERS_OK: Final = field(b"grpc-status", b"0")
# The frames of an answer with one message: stream, length of the frame, stream, length of the message, message, stream.
_WHOLE_ANSWER: Final = b"".join(
    (
        frame(FrameType.HEADERS, 0, _ANSWER_HEAD, Flag.END_HEADERS)[:5] + b"%b" + _ANSWER_HEAD,
        b"%b" + frame(FrameType.DATA, 0)[3:5] + b"%b" + b"\0%b%b",
        frame(FrameType.HEADERS, 0, _TRAILERS_OK, Flag.END_HEADERS | Flag.END_STREAM)[:5] + b"%b" + _TRAILERS_OK,
    )
)


class Refused(Exception):
    """A call ends with another status than OK."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Call:
    """One call, which is one stream of its connection: its headers, its messages, its answer."""

    __slots__ = (
        "_message_arrived",
        "_messages",
        "_partial",
        "_to_grant",
        "began",
        "buffered",
        "connection",
        "content_left",
        "half_closed",
        "head_sent",
        "headers",
        "key",
        "number",
        "path",
        "receive_window",
        "send_window",
        "task",
        "trailers",
        "unsent",
        "weight",
    )

    def __init__(self, connection: Connection, number: int, head: CallHead, send_window: int) -> None:
        self.connection = connection
        self.number = number  # of the stream
        self.path = head.path
        self.headers = head.headers
        self.key = ""  # the name of the key that the call was made with
        self.began = connection.server.now()
        self.task: asyncio.Task[None] | None = None  # what serves it, once its message has come
        self.weight = 0  # of the call in what is served at once
        # What comes in:
        self.half_closed = False  # the client sends nothing more
        self.receive_window = DEFAULT_WINDOW  # bytes that the client may send
        self.content_left = head.content_length  # bytes that it said it would send
        self.buffered = 0  # bytes of messages that have come in part, or that nobody has read
        self._to_grant = 0  # bytes that are read, and that the client may send again once we say so
        self._partial = b""
        self._messages: deque[bytes] = deque()
        self._message_arrived: asyncio.Future[None] | None = None
        # What goes out:
        self.send_window = send_window  # bytes that the client takes
        self.head_sent = False
        self.unsent = b""  # content of DATA frames, which waits for a window
        self.trailers: bytes | None = None  # once they are known

    def values(self, name: str) -> list[str]:
        """The values of a header."""
        return [value for each, value in self.headers if each == name]

    async def message(self) -> bytes | None:
        """The next message; None once the client sends nothing more."""
        while not self._messages:
            if self.half_closed:
                return None
            self._message_arrived = asyncio.get_running_loop().create_future()
            await self._message_arrived
        message = self._messages.popleft()
        self._buffer(-_MESSAGE_COST - len(message))
        if not self.half_closed and not self._messages and self._to_grant >= _GRANT:
            self.connection.grant(self, self._to_grant)
            self._to_grant = 0
        return message

    def send(self, message: bytes) -> None:
        """Send a message of a stream."""
        self.connection.send(self, message)

    def stays_open(self) -> None:
        """Note that the call only waits from now on: it does not count among those that are served at once."""
        self.connection.release(self)

    def receive(self, data: bytes, flow_controlled: int, *, ends: bool) -> bool:
        """Take `data`, which came in. Returns whether a whole message is there. Raises `Refused` and `StreamFailed`.

        `flow_controlled`: its bytes with the padding, as flow control counts them.
        """
        self.receive_window -= flow_controlled
        self._to_grant += flow_controlled
        if self.receive_window < 0:
            raise StreamFailed(ErrorCode.FLOW_CONTROL_ERROR)
        if self.content_left is not None:  # 8.1.1
            self.content_left -= len(data)
            if self.content_left < 0 or (ends and self.content_left):
                raise StreamFailed(ErrorCode.PROTOCOL_ERROR)
        before = len(self._partial)
        self._partial = self._split(self._partial + data if self._partial else data)
        self._buffer(len(self._partial) - before)
        self.half_closed = ends
        waiter = self._message_arrived
        if waiter is not None and (self._messages or ends):
            if not waiter.done():
                waiter.set_result(None)
            self._message_arrived = None
        return bool(self._messages)

    def _split(self, data: bytes) -> bytes:
        """Take out the whole messages (gRPC's Length-Prefixed-Message). Returns what is left."""
        at = 0
        while len(data) - at >= 5:
            length = int.from_bytes(data[at + 1 : at + 5], "big")
            if length > MESSAGE_LIMIT:
                raise Refused(Status.RESOURCE_EXHAUSTED, f"a message has at most {MESSAGE_LIMIT} bytes")
            if data[at]:
                raise Refused(Status.UNIMPLEMENTED, "messages are not compressed")
            end = at + 5 + length
            if len(data) < end:
                break
            self._messages.append(data[at + 5 : end])
            self._buffer(_MESSAGE_COST + length)
            at = end
        return data[at:]

    def forget_messages(self) -> None:
        """Drop what has come: nobody will read it."""
        self._buffer(-self.buffered)
        self._messages.clear()
        self._partial = b""

    def _buffer(self, more: int) -> None:
        self.buffered += more
        self.connection.buffered += more


Method = Callable[[Call], Awaitable[bytes | None]]


class Http2Server:
    """Listens, and bounds all connections together."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        admit: Callable[[Call], None],
        headers: frozenset[str],
        *,
        limit: int = CONNECTIONS_LIMIT,
        on_evicted: Callable[[], None] = lambda: None,
    ) -> None:
        """`methods`: what serves a call, by path; what it returns is the answer, unless it has sent messages itself.

        `admit` sees each call before its message, and may raise `Refused`; `headers` are those that a call keeps.
        """
        self.methods = methods
        self.admit = admit
        self.headers = frozenset(name.encode() for name in headers)
        self._limit = limit
        self._on_evicted = on_evicted
        self.serving = 0  # the weight of all calls that are being served
        self.awaiting_message = 0  # calls whose message has not come
        self.buffer = memoryview(bytearray(_READ))  # of every connection in turn: what is read is copied at once
        self.connections: dict[Connection, None] = {}  # the oldest first
        self._without_call: dict[Connection, None] = {}  # those that never sent a whole call, the oldest first
        self._waiting_for_room: dict[Connection, None] = {}
        self._servers: list[asyncio.Server] = []
        self._check_timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self.call_soon = self._loop.call_soon
        self.create_task = self._loop.create_task
        self.stopping = False

    async def start(self, sockets: list[socket.socket], tls: ssl.SSLContext | None, backlog: int) -> None:
        """Serve on these listening sockets."""

        def new() -> asyncio.BufferedProtocol:
            connection = Connection(self)
            if tls is None:
                return connection
            return TlsConnection(connection, tls, connection.accepted, connection.forget_all)

        for each in sockets:
            self._servers.append(await self._loop.create_server(new, sock=each, backlog=backlog))
        self._check_timer = self._loop.call_later(_CHECK_EVERY, self._check_timeouts)

    def stop_listening(self) -> None:
        """Accept no new connection."""
        for server in self._servers:
            server.close()

    async def stop(self, grace: float) -> None:
        """Accept no new connection, serve the calls that have come for at most `grace` seconds, and close (6.8).

        A connection that is in its handshake is told once that has ended. Calls that stay open are cut off. Called
        again, it can shorten the time.
        """
        deadline = self.now() + grace
        self.stopping = True
        self.stop_listening()
        for connection in list(self.connections):
            connection.announce_shutdown()
        last_calls = min(deadline, self.now() + _LAST_CALLS)
        await self._wait_until(lambda: all(each.leaving for each in self.connections), last_calls)
        for connection in list(self.connections):
            connection.refuse_new_calls()
        await self._wait_until(lambda: not self.serving and not self.awaiting_message, deadline)
        for connection in list(self.connections):
            connection.close()
        await self._wait_until(lambda: not self.connections, min(deadline, self.now() + _CHECK_EVERY))
        for connection in list(self.connections):
            connection.abort()
        if self._check_timer is not None:
            self._check_timer.cancel()

    async def _wait_until(self, condition: Callable[[], bool], deadline: float) -> None:
        while not condition() and self.now() < deadline:  # noqa: ASYNC110 - an event would cost every connection
            await asyncio.sleep(min(0.02, max(0.0, deadline - self.now())))

    def opened(self, connection: Connection) -> bool:
        """Whether there is room for it. The oldest that never sent a whole call makes room."""
        if len(self.connections) >= self._limit:
            self._on_evicted()
            if not self._without_call:
                return False
            next(iter(self._without_call)).abort()
        self.connections[connection] = self._without_call[connection] = None
        return True

    def sent_whole_call(self, connection: Connection) -> None:
        """Note that it sent a whole call: it is no longer closed to make room for others."""
        self._without_call.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        for each in (self.connections, self._without_call, self._waiting_for_room):
            each.pop(connection, None)

    def has_room(self, connection: Connection) -> bool:
        """Whether the connection may begin another call now. If not, its `resume` is called when it may."""
        if self.serving < BUSY or connection.serving < SHARE:
            return True
        self._waiting_for_room[connection] = None
        return False

    def ended(self, connection: Connection, weight: int) -> None:
        """Note that a call is no longer served. That may make room for a connection that waits."""
        self.serving -= weight
        if connection in self._waiting_for_room and connection.serving < SHARE:
            self._resume(connection)
        elif self._waiting_for_room and self.serving < BUSY:
            self._resume(next(iter(self._waiting_for_room)))

    def _resume(self, connection: Connection) -> None:
        del self._waiting_for_room[connection]
        self.call_soon(connection.resume)

    def _check_timeouts(self) -> None:
        now = self.now()
        for connection in list(self.connections):
            connection.check_timeouts(now)
        self._check_timer = self._loop.call_later(_CHECK_EVERY, self._check_timeouts)


class Connection(asyncio.BufferedProtocol):
    """One connection."""

    __slots__ = (
        "_answered",
        "_answers",
        "_awaiting_message",
        "_block",
        "_block_flags",
        "_block_stream",
        "_blocked",
        "_blocked_since",
        "_credit",
        "_ended_early",
        "_established",
        "_header_reader",
        "_incomplete",
        "_last_stream",
        "_paused",
        "_pinged",
        "_preface_received",
        "_received_at",
        "_send_window",
        "_settings_received",
        "_stream_send_window",
        "_table_must_shrink",
        "_to_grant",
        "_transport",
        "_write_blocked",
        "buffered",
        "calls",
        "leaving",
        "peer",
        "server",
        "serving",
    )

    def __init__(self, server: Http2Server) -> None:
        self.server = server
        self.peer: str | None = None  # the other end's IP address
        self.calls: dict[int, Call] = {}  # by the number of their stream
        self.serving = 0  # the weight of the calls that are being served
        self.buffered = 0  # of all calls
        self.leaving = False  # calls that begin from now on are refused
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # until it is accepted
        self._established = False  # a TLS handshake, if there is one, has ended
        self._credit = float(CREDIT)
        self._answered = False  # one of its calls was
        self._paused = False  # not read, because it must wait for room or for its turn
        self._received_at = server.now()
        self._pinged = False
        # What comes in:
        self._preface_received = self._settings_received = False
        self._incomplete = b""  # a frame that has come in part, or what waits while the connection is paused
        self._header_reader: HeaderReader | None = None
        self._block = b""  # header fields that go on in a CONTINUATION
        self._block_stream = 0  # its stream; 0: there is none
        self._block_flags = 0
        self._last_stream = 0  # the highest that the client began
        self._ended_early: deque[int] | None = None  # streams that we ended while the client may have sent more
        self._awaiting_message: dict[int, Call] = {}
        self._to_grant = 0  # bytes that have come, and that the client may send again once we say so
        # What goes out:
        self._answers = b""  # the ends of calls, which are written together once all that is due now is done
        self._send_window = DEFAULT_WINDOW  # bytes that the client takes
        self._stream_send_window = DEFAULT_WINDOW  # of a new stream
        self._table_must_shrink = False
        self._blocked: dict[int, Call] = {}  # calls whose answer waits for a window
        self._blocked_since: float | None = None  # the client takes nothing
        self._write_blocked = False  # it does not read

    # asyncio's protocol

    def accepted(self, transport: asyncio.Transport) -> None:
        """Count it, or hang up where there is no room. A TLS handshake comes later, on this transport."""
        self._transport = transport
        if not self.server.opened(self):
            transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it listens on TCP
        if self._transport is None:
            self.accepted(transport)
        self._transport = transport
        if transport.is_closing():
            return
        self._established, self._received_at = True, self.server.now()
        self.peer = (transport.get_extra_info("peername") or (None,))[0]
        transport.set_write_buffer_limits(UNSENT_LIMIT // 2)
        transport.write(_OUR_SETTINGS)
        if self.server.stopping:
            self.announce_shutdown()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.forget_all()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self.server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._received_at, self._pinged = self.server.now(), False
        self._receive(bytes(self.server.buffer[:nbytes]))

    def eof_received(self) -> bool:
        return False  # close

    def pause_writing(self) -> None:
        """The client does not read our answers, so we read nothing more of it."""
        self._write_blocked = True
        self._blocked_since = self.server.now()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._write_blocked, self._blocked_since = False, None
        if not self._paused:
            self._transport.resume_reading()

    # what the server does with its connections

    def resume(self) -> None:
        """Read on: the connection may begin calls again."""
        self._paused = False
        if not self._transport.is_closing():
            if not self._write_blocked:
                self._transport.resume_reading()
            self._receive(b"")

    def announce_shutdown(self) -> None:
        """Tell the client to begin no more calls. Those that are under way to us are served (6.8)."""
        if self._established and not self._transport.is_closing() and not self.leaving:
            self._write(goaway_frame(MAX_STREAM, ErrorCode.NO_ERROR) + frame(FrameType.PING, 0, _SHUTDOWN_PING))

    def refuse_new_calls(self) -> None:
        """Serve the calls that have begun, and then close."""
        if self.leaving or self._transport.is_closing():
            return
        if not self._established:
            self.abort()
            return
        self.leaving = True
        self._write(goaway_frame(self._last_stream, ErrorCode.NO_ERROR))
        self._close_when_done()

    def close(self) -> None:
        """Close once all that was written has gone."""
        self._write(b"")
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self.forget_all()
        self._transport.abort()

    def check_timeouts(self, now: float) -> None:
        """End what takes too long. Called once a second."""
        if self._transport.is_closing():
            if not self.server.stopping:
                self.abort()  # the client does not read what it was told last
            return
        self._earn()
        for call in [each for each in self._awaiting_message.values() if now - each.began > MESSAGE_TIMEOUT]:
            self.refuse(call, Refused(Status.DEADLINE_EXCEEDED, f"no message within {MESSAGE_TIMEOUT:g} s"))
        silent = now - self._received_at
        if not self._preface_received:
            if silent > PREFACE_TIMEOUT:
                self.abort()
        elif self._blocked_since is not None and now - self._blocked_since > SEND_TIMEOUT:
            self.abort()
        elif self._paused:
            self._received_at = now  # something may have come that is not read yet
        elif self._pinged and silent > KEEPALIVE_AFTER + KEEPALIVE_TIMEOUT:
            self.abort()
        elif not self._pinged and silent > KEEPALIVE_AFTER:
            self._pinged = True
            self._write(frame(FrameType.PING, 0, _KEEPALIVE_PING))

    # credit

    def _spend(self, cost: int) -> None:
        self._credit -= cost
        if self._credit < 0:
            raise ConnectionFailed(ErrorCode.ENHANCE_YOUR_CALM)

    def _charge_excess(self) -> None:
        """Charge for a call beyond a bound. If no credit is left, the next `_spend` ends the connection."""
        self._credit -= EXCESS_COST

    def _earn(self) -> None:
        self._credit = min(self._credit + CREDIT_EARNED, CREDIT)

    # what comes in

    def _receive(self, data: bytes) -> None:
        """Serve the whole frames and keep the rest: less than a frame or, while paused, than a frame and a read.

        So each read copies at most 24 kB, however small the pieces are in which a frame comes.
        """
        if self._transport.is_closing():
            return
        if self._incomplete:
            data = self._incomplete + data
            self._incomplete = b""
        try:
            self._incomplete = data[self._serve_frames(data) :]
        except ConnectionFailed as exc:
            self._write(goaway_frame(self._last_stream, exc.error))
            self._transport.close()

    def _serve_frames(self, data: bytes) -> int:
        """Serve the whole frames until the connection must wait; the number of bytes that they have."""
        begins = at = 0 if self._preface_received else self._take_preface(data)
        turn_ends = self._turn_ends()
        while self._preface_received and len(data) - at >= FRAME_HEADER:
            length_and_kind, flags, stream = HEAD_OF_FRAME.unpack_from(data, at)
            length, kind = length_and_kind >> 8, length_and_kind & 0xFF
            if length > MAX_FRAME:
                raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
            end = at + FRAME_HEADER + length
            if end > len(data):
                break
            if kind == FrameType.HEADERS and not self.server.has_room(self):
                self._pause()  # nothing behind the call is read, not even a ping
                break
            if at > begins and perf_counter() > turn_ends:
                self._pause()
                self.server.call_soon(self.resume)
                break
            self._serve_frame(kind, flags, stream & MAX_STREAM, data[at + FRAME_HEADER : end])
            at = end
            if self._transport.is_closing():
                return len(data)
        return at

    def _take_preface(self, data: bytes) -> int:
        """3.4. Returns how many bytes it has; 0 if some are missing."""
        if data[: len(PREFACE)] != PREFACE[: len(data)]:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
        self._preface_received = len(data) >= len(PREFACE)
        return len(PREFACE) if self._preface_received else 0

    def _turn_ends(self) -> float:
        trusted = self._answered and self._credit > CREDIT - EXCESS_COST
        # Not the loop's clock: uvloop's stands still until all that has come is served.
        return perf_counter() + (TRUSTED_TURN if trusted else ROUND / len(self.server.connections))

    def _pause(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def _serve_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block_stream and (kind != FrameType.CONTINUATION or stream != self._block_stream):
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)  # 4.3
        if not self._settings_received:
            if kind != FrameType.SETTINGS or flags & Flag.ACK:
                raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)  # 3.4
            self._settings_received = True
        serve = self._SERVE.get(kind)
        if serve is None:  # 5.5: of a type that we do not know
            self._spend(FRAME_COST)
            return
        try:
            serve(self, flags, stream, payload)
        except StreamFailed as exc:
            self._spend(RESET_COST)
            self._reset(stream, exc.error)

    def _on_data(self, flags: int, stream: int, payload: bytes) -> None:
        """6.1."""
        self._require_begun(stream)
        ends = bool(flags & Flag.END_STREAM)
        if not ends:
            self._spend(FRAME_COST)
        size = len(payload)
        if flags & Flag.PADDED:
            payload = unpadded(payload)
        # All is read at once, so that the client's window for the connection is never exceeded.
        self._to_grant += size
        if self._to_grant >= _GRANT:
            self._write(window_frame(0, self._to_grant))
            self._to_grant = 0
        call = self._open_call(stream)
        if call is not None:
            self._take_content(call, payload, size, ends=ends)

    def _on_headers(self, flags: int, stream: int, payload: bytes) -> None:
        """6.2."""
        if not stream % 2:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)  # 5.1.1
        if flags & Flag.PADDED:
            payload = unpadded(payload)
        if flags & Flag.PRIORITY:
            if len(payload) < 5:
                raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
            payload = payload[5:]
        self._take_block(flags, stream, payload)

    def _on_continuation(self, flags: int, stream: int, payload: bytes) -> None:
        """6.10."""
        if not self._block_stream:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
        self._spend(FRAME_COST)
        self._take_block(self._block_flags | flags & Flag.END_HEADERS, stream, payload)

    def _on_priority(self, _flags: int, stream: int, payload: bytes) -> None:
        """6.3."""
        self._spend(FRAME_COST)
        if not stream:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
        if len(payload) != 5:
            raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)

    def _on_rst_stream(self, _flags: int, stream: int, payload: bytes) -> None:
        """6.4."""
        if len(payload) != 4:
            raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
        self._require_begun(stream)
        call = self.calls.get(stream)
        is_young = call is not None and self.server.now() - call.began <= 1
        self._spend(RESET_COST if is_young else FRAME_COST)
        if call is not None:
            self._forget(call)

    def _on_settings(self, flags: int, stream: int, payload: bytes) -> None:
        """6.5."""
        self._spend(FRAME_COST)
        if stream:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
        if flags & Flag.ACK:
            if payload:
                raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
            return
        values = parsed_settings(payload)
        if Setting.HEADER_TABLE_SIZE in values:
            self._table_must_shrink = True
        window = values.get(Setting.INITIAL_WINDOW_SIZE)
        if window is not None:  # 6.9.2
            change, self._stream_send_window = window - self._stream_send_window, window
            for call in self.calls.values():
                call.send_window += change
                if call.send_window > MAX_WINDOW:
                    raise ConnectionFailed(ErrorCode.FLOW_CONTROL_ERROR)
        self._write(frame(FrameType.SETTINGS, 0, flags=Flag.ACK))
        self._send_blocked()

    def _on_push_promise(self, _flags: int, _stream: int, _payload: bytes) -> None:
        """6.6: a client pushes nothing."""
        raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)

    def _on_ping(self, flags: int, stream: int, payload: bytes) -> None:
        """6.7."""
        self._spend(FRAME_COST)
        if stream:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
        if len(payload) != 8:
            raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
        if not flags & Flag.ACK:
            self._write(frame(FrameType.PING, 0, payload, Flag.ACK))
        elif payload == _SHUTDOWN_PING and self.server.stopping:
            self.refuse_new_calls()  # all that it sent before it knew has come

    def _on_goaway(self, _flags: int, stream: int, _payload: bytes) -> None:
        """6.8: the client will close."""
        self._spend(FRAME_COST)
        if stream:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)

    def _on_window_update(self, _flags: int, stream: int, payload: bytes) -> None:
        """6.9."""
        self._spend(FRAME_COST)
        if len(payload) != 4:
            raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
        more = int.from_bytes(payload, "big") & MAX_WINDOW
        if not stream:
            self._send_window += more
            if not more:
                raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
            if self._send_window > MAX_WINDOW:
                raise ConnectionFailed(ErrorCode.FLOW_CONTROL_ERROR)
        else:
            self._require_begun(stream)
            call = self.calls.get(stream)
            if call is None:
                return  # it has ended, which the client could not know yet
            call.send_window += more
            if not more:
                raise StreamFailed(ErrorCode.PROTOCOL_ERROR)
            if call.send_window > MAX_WINDOW:
                raise StreamFailed(ErrorCode.FLOW_CONTROL_ERROR)
        if self._blocked:
            self._send_blocked()

    _SERVE: ClassVar[dict[int, Callable[[Connection, int, int, bytes], None]]] = {
        FrameType.DATA: _on_data,
        FrameType.HEADERS: _on_headers,
        FrameType.PRIORITY: _on_priority,
        FrameType.RST_STREAM: _on_rst_stream,
        FrameType.SETTINGS: _on_settings,
        FrameType.PUSH_PROMISE: _on_push_promise,
        FrameType.PING: _on_ping,
        FrameType.GOAWAY: _on_goaway,
        FrameType.WINDOW_UPDATE: _on_window_update,
        FrameType.CONTINUATION: _on_continuation,
    }

    def _require_begun(self, stream: int) -> None:
        """Raises `ConnectionFailed` for a stream that was never begun (5.1, idle)."""
        if not stream % 2 or stream > self._last_stream:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)

    def _open_call(self, stream: int) -> Call | None:
        """The open call of a stream; None if we ended it early. Raises `StreamFailed` if it is closed (5.1)."""
        call = self.calls.get(stream)
        if call is None and self._is_ended_early(stream):
            return None
        if call is None or call.half_closed:
            raise StreamFailed(ErrorCode.STREAM_CLOSED)
        return call

    def _take_block(self, flags: int, stream: int, payload: bytes) -> None:
        """Collect the header fields of a call, or its trailers (4.3)."""
        block = self._block + payload if self._block else payload
        if len(block) > HEAD_LIMIT:
            raise ConnectionFailed(ErrorCode.ENHANCE_YOUR_CALM)
        if not flags & Flag.END_HEADERS:
            self._block, self._block_stream, self._block_flags = block, stream, flags
            return
        self._block, self._block_stream = b"", 0
        if self._header_reader is None:
            self._header_reader = HeaderReader(HEAD_LIMIT)
        reader = self._header_reader
        if stream <= self._last_stream:
            self._take_trailers(flags, stream, reader.fields(block))
            return
        head = reader.known_head(block)
        fields = reader.fields(block) if head is None else ()  # also of what is refused: it may change the table
        self._spend(0)
        self._last_stream = stream
        if self._is_refused(stream):
            return
        if head is None:
            head = reader.head(block, fields, self.server.headers)
        self._begin(stream, head, ends=bool(flags & Flag.END_STREAM))

    def _take_trailers(self, flags: int, stream: int, fields: Fields) -> None:
        """8.1."""
        if stream not in self.calls and not self._is_ended_early(stream):
            raise ConnectionFailed(ErrorCode.STREAM_CLOSED)
        call = self._open_call(stream)
        if call is None:
            return
        require_trailers(fields)
        if not flags & Flag.END_STREAM:
            raise StreamFailed(ErrorCode.PROTOCOL_ERROR)
        self._take_content(call, b"", 0, ends=True)

    def _is_refused(self, stream: int) -> bool:
        """Refuse a call that begins where there is no room for it."""
        crowded = self.server.awaiting_message >= CROWDED and len(self._awaiting_message) >= CROWDED_SHARE
        if not crowded and not self.leaving and len(self.calls) < MAX_CALLS:
            return False
        if not self.leaving:
            self._spend(EXCESS_COST)
        self._reset(stream, ErrorCode.REFUSED_STREAM)
        return True

    def _begin(self, stream: int, head: CallHead, *, ends: bool) -> None:
        """A call begins."""
        server = self.server
        call = Call(self, stream, head, self._stream_send_window)
        self.calls[stream] = self._awaiting_message[stream] = call
        server.awaiting_message += 1
        if head.method != b"POST":
            self._end(call, _http_status(405))
            return
        if not _is_grpc(head.content_type):
            self._end(call, _http_status(415))
            return
        try:
            server.admit(call)
        except Refused as exc:
            self.refuse(call, exc)
            return
        if ends:
            self._take_content(call, b"", 0, ends=True)

    def _take_content(self, call: Call, data: bytes, flow_controlled: int, *, ends: bool) -> None:
        """Content of a call came; with its first whole message the call is served."""
        try:
            has_message = call.receive(data, flow_controlled, ends=ends)
        except Refused as exc:
            self.refuse(call, exc)
            return
        if call.task is None and has_message:
            self._start(call)
        elif call.task is None and ends:
            self.refuse(call, Refused(Status.INVALID_ARGUMENT, "no message"))
        elif self.buffered > RECEIVED_LIMIT:
            self._charge_excess()
            self.refuse(call, Refused(Status.RESOURCE_EXHAUSTED, "too many messages at once"))

    def _start(self, call: Call) -> None:
        self._message_came(call)
        self.server.sent_whole_call(self)
        call.weight = 1 + call.buffered // 1024
        self.server.serving += call.weight
        self.serving += call.weight
        call.task = self.server.create_task(self._serve(call))

    async def _serve(self, call: Call) -> None:
        try:
            answer = await self.server.methods[call.path](call)
            self._answered = True
            self._earn()
            if answer is None or not self._send_whole(call, answer):
                call.unsent += b"" if answer is None else _length_prefixed(answer)
                self._end(call, _TRAILERS_OK)
        except Refused as exc:
            if exc.status == Status.RESOURCE_EXHAUSTED:
                self._charge_excess()
            self.refuse(call, exc)
        except asyncio.CancelledError:
            # If the client cancelled it, nobody hears this.
            self.refuse(call, Refused(Status.UNAVAILABLE, "the call was cut off"))
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller gets an answer
            logger.error("unexpected error in a call", extra={"kind": type(exc).__name__})
            self.refuse(call, Refused(Status.UNKNOWN, "unexpected error"))
        finally:
            self.release(call)

    def release(self, call: Call) -> None:
        """Count the call no longer among those that are served at once."""
        weight, call.weight = call.weight, 0
        if weight:
            self.serving -= weight
            self.server.ended(self, weight)

    def _message_came(self, call: Call) -> None:
        """The call no longer waits for its message: it came, or it will not come."""
        if self._awaiting_message.pop(call.number, None) is not None:
            self.server.awaiting_message -= 1

    # what goes out

    def grant(self, call: Call, size: int) -> None:
        """Let the client send `size` more bytes of this call."""
        if call.number in self.calls:
            call.receive_window += size
            self._write(window_frame(call.number, size))

    def send(self, call: Call, message: bytes) -> None:
        """Send a message of the answer, or keep it until the client takes it."""
        if call.number in self.calls:
            call.unsent += _length_prefixed(message)
            self._send(call)

    def refuse(self, call: Call, why: Refused) -> None:
        """End the call with this status."""
        call.unsent = b""
        status, text = field(b"grpc-status", b"%d" % why.status), field(b"grpc-message", message_text(why.text))
        self._end(call, status + text)
        if call.task is not None and call.task is not asyncio.current_task():
            call.task.cancel()

    def _end(self, call: Call, trailers: bytes) -> None:
        """Send what is left, then these header fields. Unless `:status` is among them, it is 200."""
        if call.number in self.calls:
            if not call.head_sent and not call.unsent:  # gRPC's Trailers-Only
                call.head_sent = True
                trailers = trailers if trailers.startswith(_HTTP_ERROR) else _ANSWER_HEAD + trailers
            call.trailers = trailers
            self._send(call)

    def _send_whole(self, call: Call, answer: bytes) -> bool:
        """Send the only message of an answer, with all that belongs to it, if nothing is in its way."""
        size = len(answer) + 5
        windows = size <= call.send_window and size <= self._send_window and size <= MAX_FRAME
        begun = call.head_sent or call.unsent or not call.half_closed
        if not windows or begun or self._table_must_shrink or call.number not in self.calls:
            return False
        self._send_window -= size
        call.trailers = _TRAILERS_OK
        self._forget(call)
        number = call.number.to_bytes(4, "big")
        prefix = size.to_bytes(3, "big"), number, (size - 5).to_bytes(4, "big")
        self._write_answer(_WHOLE_ANSWER % (number, *prefix, answer, number))
        self._close_when_done()
        return True

    def _send(self, call: Call) -> None:
        """Send what the client's windows allow."""
        out = b""
        if not call.head_sent:
            call.head_sent = True
            out = self._header_frame(call, _ANSWER_HEAD, Flag.END_HEADERS)
        while call.unsent and (room := min(call.send_window, self._send_window, MAX_FRAME)) > 0:
            part, call.unsent = call.unsent[:room], call.unsent[room:]
            call.send_window -= len(part)
            self._send_window -= len(part)
            out += frame(FrameType.DATA, call.number, part)
        if call.unsent:
            if not self._blocked:
                self._blocked_since = self.server.now()
            self._blocked[call.number] = call
            if sum(len(each.unsent) for each in self._blocked.values()) > UNSENT_LIMIT:
                self._write(out)
                self._charge_excess()
                self._reset(call.number, ErrorCode.ENHANCE_YOUR_CALM)
                return
        elif call.trailers is not None:
            out += self._header_frame(call, call.trailers, Flag.END_HEADERS | Flag.END_STREAM)
            if not call.half_closed:  # 8.1: the client need not send the rest
                out += reset_frame(call.number, ErrorCode.NO_ERROR)
                self._note_ended_early(call.number)
            self._forget(call)
        if call.number in self.calls:
            self._write(out)
        else:
            self._write_answer(out)
        self._close_when_done()

    def _write_answer(self, out: bytes) -> None:
        """Write the end of a call: at once if no other is open, else with all that end in this turn of the loop."""
        if not self.calls or len(self._answers) > _GATHERED:
            self._write(out)
            return
        if not self._answers:
            self.server.call_soon(self._write, b"")
        self._answers += out

    def _write(self, out: bytes) -> None:
        """Write now, and before it the answers that have gathered."""
        if self._answers:
            out, self._answers = self._answers + out, b""
        if out:
            self._transport.write(out)

    def _header_frame(self, call: Call, block: bytes, flags: int) -> bytes:
        if self._table_must_shrink:  # RFC 7541, 4.2: the first block after the client's setting says so
            self._table_must_shrink = False
            block = EMPTY_TABLE + block
        return frame(FrameType.HEADERS, call.number, block, flags)

    def _send_blocked(self) -> None:
        for call in list(self._blocked.values()):
            del self._blocked[call.number]
            self._send(call)
        if not self._blocked and not self._write_blocked:
            self._blocked_since = None

    def _close_when_done(self) -> None:
        if self.leaving and not self.calls:
            self.close()

    def _reset(self, stream: int, error: ErrorCode) -> None:
        call = self.calls.get(stream)
        if call is not None:
            self._forget(call)
        self._note_ended_early(stream)
        self._write(reset_frame(stream, error))

    def _note_ended_early(self, stream: int) -> None:
        """Remember that we ended the call early: what the client sends before it knows that is ignored (5.1)."""
        if self._ended_early is None:
            self._ended_early = deque(maxlen=MAX_CALLS)
        self._ended_early.append(stream)

    def _is_ended_early(self, stream: int) -> bool:
        return self._ended_early is not None and stream in self._ended_early

    def forget_all(self) -> None:
        """Drop the connection's calls, and the connection: it is lost."""
        self.server.closed(self)
        self.leaving = True
        self._answers = b""
        for call in list(self.calls.values()):
            self._forget(call)

    def _forget(self, call: Call) -> None:
        """Drop the call, which the client or we have ended."""
        del self.calls[call.number]
        self._blocked.pop(call.number, None)
        self._message_came(call)
        if call.trailers is None and call.task is not None:
            call.task.cancel()  # which may be before it began: then it does not even run to its end
        call.forget_messages()
        self.release(call)


_HTTP_ERROR: Final = field(b":status", b"")[:-1]  # how a block begins whose status is not 200


def _http_status(number: int) -> bytes:
    """The header field that answers a request which is not gRPC."""
    return field(b":status", b"%d" % number)


def _is_grpc(content_type: bytes) -> bool:
    """Whether this is the content type of gRPC with protobuf messages (gRPC's PROTOCOL-HTTP2)."""
    if content_type == b"application/grpc":
        return True
    name = content_type.partition(b";")[0].strip().lower()
    return name in {b"application/grpc", b"application/grpc+proto"}


def _length_prefixed(message: bytes) -> bytes:
    """gRPC's Length-Prefixed-Message, uncompressed."""
    return b"\x00" + len(message).to_bytes(4, "big") + message

"""HTTP/2 as far as gRPC needs it. Nothing that a client does is kept without a bound, and no client holds up another.

grpc.aio bounds neither what headers and unsent answers take nor the calls that wait: 600 connections made it grow by
350 MB, and it takes twice the time for a call. Here a connection reads no further than it can serve, so that TCP itself
slows its client down. HPACK is the package hpack's.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import ClassVar, Final

from hpack import Decoder
from hpack.exceptions import HPACKError

logger = logging.getLogger(__name__)
logging.getLogger("hpack").setLevel(logging.WARNING)  # its DEBUG shows headers, and keys are among them

# Bounds, of a connection unless noted. Sizes are in bytes, times in seconds.
MAX_CONNECTIONS: Final = 10_000  # of the server; beyond it the oldest goes that never sent a whole call
MAX_CALLS: Final = 100  # RFC 9113, 6.5.2: no less; clients queue what is more
MANY_WAITING: Final = 5000  # calls of the server whose message has not come; from then on
WAITING_SHARE: Final = 8  # are what a connection may have. A client may send a hundred heads before their messages.
BUSY: Final = 1000  # calls that the server serves at once, long messages counting more; from then on
SHARE: Final = 4  # are what a connection may have, and it is read no further
HEAD_LIMIT: Final = 8 * 1024  # a call's headers, packed or not
MESSAGE_LIMIT: Final = 16 * 1024  # one message; all that have come in part may take twice that
UNSENT_LIMIT: Final = 17 * 1024  # answers that the client leaves no window for, or does not read
HANDSHAKE_TIMEOUT: Final = 10.0  # TLS, and then the preface
MESSAGE_TIMEOUT: Final = 5.0
SEND_TIMEOUT: Final = 10.0
KEEPALIVE_AFTER: Final = 30.0  # of silence a ping is sent
KEEPALIVE_TIMEOUT: Final = 10.0
# Frames that carry no call. A call that is answered earns some, and so does time.
MAX_IDLE_FRAMES: Final = 1000
_EARNED: Final = 20  # by an answered call, and in a second
_RESET_COST: Final = 5  # of a call within a second after it began; a client may cancel all that it has
_REFUSAL_COST: Final = 100  # of a call beyond what a connection may have: a client that keeps the rules makes none
ROUND: Final = 0.05  # seconds in which every connection should have had its turn to begin calls
TURN: Final = 0.005  # seconds for one that got answers and went beyond no bound lately

_READ: Final = 8 * 1024
_TICK: Final = 1.0
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _HAS_PRIORITY = 1, 1, 4, 8, 32
_MAX_FRAME: Final = 16_384
_WINDOW: Final = 65_535  # bytes, of a stream and of a connection, until a setting says otherwise
_MAX_WINDOW: Final = 2**31 - 1
_NO_ERROR, _PROTOCOL_ERROR, _FLOW_CONTROL_ERROR, _FRAME_SIZE_ERROR, _REFUSED_STREAM, _CANCEL, _COMPRESSION_ERROR = (
    *(0, 1, 3, 6),
    *(7, 8, 9),
)
_ENHANCE_YOUR_CALM: Final = 11
# Settings by number.
_INITIAL_WINDOW_SIZE: Final = 4


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _header(name: bytes, value: bytes) -> bytes:
    """A header for a client that keeps no table of ours. RFC 7541, 6.2.2; names and values below 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


_GREETING: Final = _frame(
    _SETTINGS,
    0,
    0,
    b"".join(
        number.to_bytes(2, "big") + value.to_bytes(4, "big") for number, value in ((3, MAX_CALLS), (6, HEAD_LIMIT))
    ),
)
_STATUS_200: Final = b"\x88"
_CONTENT_TYPE: Final = _header(b"content-type", b"application/grpc")
_ANSWER_HEAD: Final = _STATUS_200 + _CONTENT_TYPE
_OK: Final = _header(b"grpc-status", b"0")

Headers = list[tuple[str, str]]


# gRPC's status codes, as far as they are said here.
UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 2, 3, 4, 8, 12


class Refused(Exception):
    """A call ends with another status than OK."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Call:
    """One call: its headers, its messages, its answer."""

    __slots__ = (
        *("_arrived", "_partial", "_waiter", "began", "connection", "end", "ended", "headers", "key"),
        *("number", "path", "started", "task", "unsent", "weight", "window"),
    )

    def __init__(self, connection: Connection, number: int, path: str, headers: Headers, window: int) -> None:
        self.connection = connection
        self.number = number
        self.path = path
        self.headers = headers
        self.key = ""  # the name of the key that it was made with
        self.began = connection.server.now()
        self.window = window  # bytes that the client takes
        self.unsent = b""  # frames' content that waits for that
        self.end: bytes | None = None  # the trailers, once they are known
        self.started = False  # the head of the answer is sent
        self.ended = False  # the client sends nothing more
        self.weight = 0  # in what is served at once
        self.task: asyncio.Task[None] | None = None
        self._partial = b""  # of a message
        self._arrived: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def partial(self) -> int:
        """Bytes of messages that have come in part, or that nobody has read."""
        return len(self._partial) + sum(map(len, self._arrived))

    def values(self, name: str) -> list[str]:
        """The values of a header."""
        return [value for each, value in self.headers if each == name]

    async def message(self) -> bytes | None:
        """The next message; None once the client sends nothing more."""
        while not self._arrived:
            if self.ended:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._arrived.pop(0)

    def send(self, message: bytes) -> None:
        """Send a message of a stream."""
        self.connection.send(self, message)

    def received(self, data: bytes, *, ended: bool) -> bool:
        """Take what came in; whether there is a whole message now. Raises `Refused`."""
        data = self._partial + data if self._partial else data
        while len(data) >= 5:
            length = int.from_bytes(data[1:5], "big")
            if length > MESSAGE_LIMIT:
                raise Refused(RESOURCE_EXHAUSTED, f"a message has at most {MESSAGE_LIMIT} bytes")
            if data[0]:
                raise Refused(UNIMPLEMENTED, "messages are not compressed")
            if len(data) < 5 + length:
                break
            self._arrived.append(data[5 : 5 + length])
            data = data[5 + length :]
        self._partial = data
        self.ended = ended
        if self._waiter is not None and (self._arrived or ended):
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None
        return bool(self._arrived)


Method = Callable[[Call], Awaitable[bytes | None]]


class Http2Server:
    """Listens, and bounds all connections together. `methods`: what serves a call, by path; bytes are its answer."""

    def __init__(self, methods: Mapping[str, Method], admit: Callable[[Call], None], headers: frozenset[str]) -> None:
        """`admit` sees each call before its message, and may raise `Refused`; `headers` are those that are kept."""
        self.methods = methods
        self.admit = admit
        self.serving = 0  # calls
        self.waiting = 0  # calls without a whole message
        self.headers = headers
        self.buffer = memoryview(bytearray(_READ))  # of every connection in turn: what is read is taken at once
        self.connections: dict[Connection, None] = {}  # in the order in which they came
        self._fresh: dict[Connection, None] = {}  # those that never sent a whole call
        self._held: dict[Connection, None] = {}
        self._servers: list[asyncio.Server] = []
        self._tick: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self.stopping = False

    async def start(self, sockets: list[socket.socket], tls: ssl.SSLContext | None, backlog: int) -> None:
        timeout = HANDSHAKE_TIMEOUT if tls else None
        for each in sockets:
            server = await self._loop.create_server(
                lambda: Connection(self), sock=each, ssl=tls, backlog=backlog, ssl_handshake_timeout=timeout
            )
            self._servers.append(server)
        self._tick = self._loop.call_later(_TICK, self._look_after)

    async def stop(self, grace: float) -> None:
        """Accept nothing new, and give calls under way `grace` seconds."""
        self.stopping = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.go_away()
        deadline = self.now() + grace
        while self.connections and self.now() < deadline:  # noqa: ASYNC110 - an event would cost every connection
            await asyncio.sleep(min(0.02, max(0.0, deadline - self.now())))
        for connection in list(self.connections):
            connection.abort()
        if self._tick is not None:
            self._tick.cancel()

    def opened(self, connection: Connection) -> bool:
        """Whether there is room for it; the oldest that never sent a whole call makes room."""
        if len(self.connections) >= MAX_CONNECTIONS:
            if not self._fresh:
                return False
            next(iter(self._fresh)).abort()
        self.connections[connection] = self._fresh[connection] = None
        return True

    def proved(self, connection: Connection) -> None:
        """It sent a whole call."""
        self._fresh.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        for each in (self.connections, self._fresh, self._held):
            each.pop(connection, None)

    def has_room(self, connection: Connection) -> bool:
        """Whether the connection may begin another call now; if not, it is told when it may."""
        if self.serving < BUSY or connection.serving < SHARE:
            return True
        self._held[connection] = None
        return False

    def ended(self, connection: Connection, weight: int) -> None:
        """A call was served."""
        self.serving -= weight
        if connection in self._held and connection.serving < SHARE:
            self._resume(connection)
        elif self._held and self.serving < BUSY:
            self._resume(next(iter(self._held)))

    def _resume(self, connection: Connection) -> None:
        del self._held[connection]
        self._loop.call_soon(connection.resume)

    def _look_after(self) -> None:
        now = self.now()
        for connection in list(self.connections):
            connection.look_after(now)
        self._tick = self._loop.call_later(_TICK, self._look_after)


class _Broken(Exception):
    """The client broke a rule, or a bound: the connection ends."""

    def __init__(self, error: int) -> None:
        self.error = error


class Connection(asyncio.BufferedProtocol):
    """One connection."""

    __slots__ = (
        *(
            "_answered",
            "_block",
            "_block_of",
            "_deaf",
            "_decoder",
            "_earned",
            "_greeted",
            "_heard",
            "_held",
            "_last",
            "_leaving",
        ),
        *("_pinged", "_rest", "_stream_window", "_stuck", "_transport", "_unfinished", "_unread", "_unsent"),
        *("_waiting", "_window", "calls", "peer", "server", "serving"),
    )

    def __init__(self, server: Http2Server) -> None:
        self.server = server
        self.calls: dict[int, Call] = {}
        self.serving = 0  # calls
        self.peer: str | None = None  # the other end's IP address
        self._transport: asyncio.Transport
        self._decoder: Decoder | None = None
        self._rest = b""  # of a frame
        self._greeted = False
        self._block = b""  # headers that go on in the next frame
        self._block_of: tuple[int, int] | None = None  # their stream and flags
        self._last = 0  # the last stream that the client began
        self._waiting: dict[int, Call] = {}  # calls without a whole message
        self._window = _WINDOW  # bytes that the client takes
        self._stream_window = _WINDOW  # of a new stream
        self._unfinished = 0  # bytes of messages
        self._unread = 0  # bytes that the client may send again once we say so
        self._unsent: dict[int, Call] = {}  # calls whose answer waits for a window
        self._stuck: float | None = None  # since when the client takes nothing
        self._heard = server.now()
        self._pinged = False
        self._earned = float(MAX_IDLE_FRAMES)
        self._held = self._deaf = False  # not read from: it has its share of calls; it reads no answers
        self._leaving = False
        self._answered = False  # one of its calls was

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it listens on TCP
        self._transport = transport
        if not self.server.opened(self):
            transport.abort()
            return
        self.peer = (transport.get_extra_info("peername") or (None,))[0]
        transport.set_write_buffer_limits(UNSENT_LIMIT // 2)
        transport.write(_GREETING)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.server.closed(self)
        for call in list(self.calls.values()):
            self._forget(call)
        self._leaving = True

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self.server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._heard, self._pinged = self.server.now(), False
        self._take(bytes(self.server.buffer[:nbytes]))

    def eof_received(self) -> bool:
        return False  # close

    def pause_writing(self) -> None:
        """The client does not read: it gets nothing more to answer."""
        self._deaf = True
        self._stuck = self.server.now()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._deaf, self._stuck = False, None
        if not self._held:
            self._transport.resume_reading()

    def resume(self) -> None:
        """There is room for another call."""
        self._held = False
        if not self._transport.is_closing():
            if not self._deaf:
                self._transport.resume_reading()
            self._take(b"")

    def abort(self) -> None:
        self.server.closed(self)
        self._transport.abort()

    def go_away(self) -> None:
        """Serve the calls that have begun, and then close."""
        if self._transport.is_closing():
            return
        self._leaving = True
        self._transport.write(_frame(_GOAWAY, 0, 0, self._last.to_bytes(4, "big") + _NO_ERROR.to_bytes(4, "big")))
        if not self.calls:
            self._transport.close()

    def look_after(self, now: float) -> None:
        """Once a second: end what takes too long."""
        if self._transport.is_closing():
            if not self.server.stopping:
                self.abort()  # it does not read what it was told last
            return
        self._earned = min(self._earned + _EARNED, MAX_IDLE_FRAMES)
        late = [call for call in self._waiting.values() if now - call.began > MESSAGE_TIMEOUT]
        for call in late:
            self.refuse(call, Refused(DEADLINE_EXCEEDED, f"no message within {MESSAGE_TIMEOUT:g} s"))
        if not self._greeted:
            if now - self._heard > HANDSHAKE_TIMEOUT:
                self.abort()
        elif self._stuck is not None and now - self._stuck > SEND_TIMEOUT:
            self.abort()
        elif self._held:
            self._heard = now  # it may have sent what we have not read
        elif now - self._heard > KEEPALIVE_AFTER + KEEPALIVE_TIMEOUT and self._pinged:
            self.abort()
        elif now - self._heard > KEEPALIVE_AFTER and not self._pinged:
            self._pinged = True
            self._transport.write(_frame(_PING, 0, 0, b"are you?"))

    # what comes in

    def _take(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        try:
            self._rest = data[self._frames(data) :]
        except _Broken as exc:
            payload = self._last.to_bytes(4, "big") + exc.error.to_bytes(4, "big")
            self._transport.write(_frame(_GOAWAY, 0, 0, payload))
            self._transport.close()

    def _frames(self, data: bytes) -> int:
        """Serve the whole frames; the number of bytes that they are."""
        at = 0
        if not self._greeted:
            if data[: len(_PREFACE)] != _PREFACE[: len(data)]:
                raise _Broken(_PROTOCOL_ERROR)
            if len(data) < len(_PREFACE):
                return 0
            self._greeted = True
            at = len(_PREFACE)
        size = len(data)
        trusted = self._answered and self._earned > MAX_IDLE_FRAMES - _REFUSAL_COST
        # uvloop's own clock stands still meanwhile.
        turn = perf_counter() + (TURN if trusted else ROUND / len(self.server.connections))
        while size - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if length > _MAX_FRAME:
                raise _Broken(_FRAME_SIZE_ERROR)
            end = at + 9 + length
            if end > size:
                break
            kind = data[at + 3]
            if kind == _HEADERS and not self.server.has_room(self):
                self._held = True
                self._transport.pause_reading()
                break
            if self._transport.is_closing():
                return size
            if kind == _HEADERS and perf_counter() > turn:
                self._held = True
                self._transport.pause_reading()
                asyncio.get_running_loop().call_soon(self.resume)
                break
            self._frame(
                kind, data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big") & _MAX_WINDOW, data[at + 9 : end]
            )
            at = end
        return at

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block_of is not None and (kind != _CONTINUATION or stream != self._block_of[0]):
            raise _Broken(_PROTOCOL_ERROR)
        take = self._TAKE.get(kind)
        if take is None:
            self._spend(1)  # PRIORITY, GOAWAY, and what may come
        else:
            take(self, flags, stream, payload)

    def _ping(self, flags: int, stream: int, payload: bytes) -> None:
        self._spend(1)
        if len(payload) != 8 or stream:
            raise _Broken(_FRAME_SIZE_ERROR)
        if not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))

    def _cancelled(self, _flags: int, stream: int, payload: bytes) -> None:
        if len(payload) != 4 or not stream or stream > self._last:
            raise _Broken(_PROTOCOL_ERROR)
        call = self.calls.get(stream)
        self._spend(1 if call is None or self.server.now() - call.began > 1 else _RESET_COST)
        if call is not None:
            self._forget(call)

    def _push(self, _flags: int, _stream: int, _payload: bytes) -> None:
        raise _Broken(_PROTOCOL_ERROR)

    def _spend(self, cost: int) -> None:
        self._earned -= cost
        if self._earned < 0:
            raise _Broken(_ENHANCE_YOUR_CALM)

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        self._spend(1)
        if stream or len(payload) % 6 or (flags & _ACK and payload):
            raise _Broken(_FRAME_SIZE_ERROR)
        if flags & _ACK:
            return
        for at in range(0, len(payload), 6):
            number, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if number == _INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise _Broken(_FLOW_CONTROL_ERROR)
                change = value - self._stream_window
                self._stream_window = value
                for call in self.calls.values():
                    call.window += change
        self._transport.write(_frame(_SETTINGS, _ACK, 0))
        self._flush()

    def _widen(self, _flags: int, stream: int, payload: bytes) -> None:
        self._spend(1)
        if len(payload) != 4:
            raise _Broken(_FRAME_SIZE_ERROR)
        more = int.from_bytes(payload, "big") & _MAX_WINDOW
        if not stream:
            self._window += more
            if not more or self._window > _MAX_WINDOW:
                raise _Broken(_FLOW_CONTROL_ERROR)
        elif (call := self.calls.get(stream)) is not None:
            call.window += more
            if not more or call.window > _MAX_WINDOW:
                self._reset(call, _FLOW_CONTROL_ERROR)
        if self._unsent:
            self._flush()

    def _begin_headers(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & _PADDED:
            payload = _unpadded(payload)
        if flags & _HAS_PRIORITY:
            payload = payload[5:]
        self._more_headers(flags, stream, payload)

    def _continue_headers(self, flags: int, stream: int, payload: bytes) -> None:
        if self._block_of is None:
            raise _Broken(_PROTOCOL_ERROR)
        self._spend(1)
        self._more_headers(self._block_of[1] | flags & _END_HEADERS, stream, payload)

    def _more_headers(self, flags: int, stream: int, payload: bytes) -> None:
        block = self._block + payload if self._block else payload
        if len(block) > HEAD_LIMIT:
            raise _Broken(_ENHANCE_YOUR_CALM)
        if not flags & _END_HEADERS:
            self._block, self._block_of = block, (stream, flags)
            return
        self._block, self._block_of = b"", None
        if self._decoder is None:
            self._decoder = Decoder(HEAD_LIMIT)
        try:
            headers: Headers = self._decoder.decode(block)  # type: ignore[assignment]  # text unless asked for bytes
        except HPACKError:
            raise _Broken(_COMPRESSION_ERROR) from None
        if (call := self.calls.get(stream)) is not None:  # trailers
            if not flags & _END_STREAM:
                raise _Broken(_PROTOCOL_ERROR)
            self._received(call, b"", ended=True)
            return
        if not stream % 2 or stream <= self._last:
            raise _Broken(_PROTOCOL_ERROR)
        self._spend(0)
        self._last = stream
        self._begin(flags, stream, headers)

    def _begin(self, flags: int, stream: int, headers: Headers) -> None:
        known = dict(headers)
        crowded = self.server.waiting >= MANY_WAITING and len(self._waiting) >= WAITING_SHARE
        if self._leaving or crowded or len(self.calls) >= MAX_CALLS:
            self._spend(_REFUSAL_COST)
            self._transport.write(_frame(_RST_STREAM, 0, stream, _REFUSED_STREAM.to_bytes(4, "big")))
            return
        kept = [header for header in headers if header[0] in self.server.headers]
        call = Call(self, stream, known.get(":path", ""), kept, self._stream_window)
        self.calls[stream] = self._waiting[stream] = call
        self.server.waiting += 1
        if known.get(":method") != "POST" or not known.get("content-type", "").startswith("application/grpc"):
            status = b"405" if known.get(":method") != "POST" else b"415"
            self._end(call, _header(b":status", status))
            return
        try:
            self.server.admit(call)
        except Refused as exc:
            self.refuse(call, exc)
            return
        if flags & _END_STREAM:
            self._received(call, b"", ended=True)

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        if not stream or stream > self._last:
            raise _Broken(_PROTOCOL_ERROR)
        if flags & _PADDED:
            payload = _unpadded(payload)
        if not flags & _END_STREAM:
            self._spend(1)
        self._unread += size
        if self._unread >= _WINDOW // 4:
            self._transport.write(_frame(_WINDOW_UPDATE, 0, 0, self._unread.to_bytes(4, "big")))
            self._unread = 0
        call = self.calls.get(stream)
        if call is not None and not call.ended:
            self._received(call, payload, ended=bool(flags & _END_STREAM))

    def _received(self, call: Call, data: bytes, *, ended: bool) -> None:
        before = call.partial
        try:
            whole = call.received(data, ended=ended)
        except Refused as exc:
            self.refuse(call, exc)
            return
        if call.task is None:
            self._unfinished += call.partial - before
        if whole and call.task is None:
            self._waits_no_more(call)
            self.server.proved(self)
            call.weight = 1 + call.partial // 1024
            self.server.serving += call.weight
            self.serving += call.weight
            call.task = asyncio.get_running_loop().create_task(self._serve(call))
        elif call.task is None and ended:
            self.refuse(call, Refused(INVALID_ARGUMENT, "no message"))
        elif self._unfinished > 2 * MESSAGE_LIMIT or call.partial > 4 * MESSAGE_LIMIT:
            self._earned -= _REFUSAL_COST
            self.refuse(call, Refused(RESOURCE_EXHAUSTED, "too many messages at once"))

    def is_idle(self, call: Call) -> None:
        """This call asks for nothing more: it takes none of the connection's share."""
        self._served(call)

    async def _serve(self, call: Call) -> None:
        try:
            answer = await self.server.methods[call.path](call)
            self._answered = True
            self._earned = min(self._earned + _EARNED, MAX_IDLE_FRAMES)
            if answer is not None:
                self.send(call, answer)
            self._end(call, _OK)
        except Refused as exc:
            if exc.status == RESOURCE_EXHAUSTED:
                self._earned -= _REFUSAL_COST
            self.refuse(call, exc)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller gets an answer
            logger.error("unexpected error in a call", extra={"kind": type(exc).__name__})
            self.refuse(call, Refused(UNKNOWN, "unexpected error"))
        finally:
            self._served(call)

    def _served(self, call: Call) -> None:
        weight, call.weight = call.weight, 0
        self.serving -= weight
        self.server.ended(self, weight)

    # what goes out

    def send(self, call: Call, message: bytes) -> None:
        """Send a message of the answer, or keep it until the client takes it."""
        if call.number in self.calls:
            call.unsent += b"\x00" + len(message).to_bytes(4, "big") + message
            self._send(call)

    def refuse(self, call: Call, why: Refused) -> None:
        """End the call with this status."""
        trailers = _header(b"grpc-status", b"%d" % why.status) + _header(b"grpc-message", why.text.encode())
        call.unsent = b""
        self._end(call, trailers)
        if call.task is not None and call.task is not asyncio.current_task():
            call.task.cancel()

    def _end(self, call: Call, trailers: bytes) -> None:
        if call.number in self.calls:
            if not call.started and not call.unsent:
                trailers = trailers if trailers.startswith(b"\x00\x07:status") else _ANSWER_HEAD + trailers
                call.started = True
            call.end = trailers
            self._send(call)

    def _send(self, call: Call) -> None:
        out = b""
        if not call.started:
            call.started = True
            out = _frame(_HEADERS, _END_HEADERS, call.number, _ANSWER_HEAD)
        while call.unsent and (room := min(call.window, self._window, _MAX_FRAME)) > 0:
            part, call.unsent = call.unsent[:room], call.unsent[room:]
            call.window -= len(part)
            self._window -= len(part)
            out += _frame(_DATA, 0, call.number, part)
        if call.unsent:
            if not self._unsent:
                self._stuck = self.server.now()
            self._unsent[call.number] = call
            if sum(len(each.unsent) for each in self._unsent.values()) > UNSENT_LIMIT:
                self._transport.write(out)
                self._earned -= _REFUSAL_COST
                self._reset(call, _ENHANCE_YOUR_CALM)
                return
        elif call.end is not None:
            out += _frame(_HEADERS, _END_HEADERS | _END_STREAM, call.number, call.end)
            if not call.ended:
                out += _frame(_RST_STREAM, 0, call.number, _NO_ERROR.to_bytes(4, "big"))
            self._forget(call)
        self._transport.write(out)
        if self._leaving and not self.calls:
            self._transport.close()

    def _flush(self) -> None:
        for call in list(self._unsent.values()):
            del self._unsent[call.number]
            self._send(call)
        if not self._unsent and not self._deaf:
            self._stuck = None

    def _reset(self, call: Call, error: int) -> None:
        self._forget(call)
        self._transport.write(_frame(_RST_STREAM, 0, call.number, error.to_bytes(4, "big")))

    def _forget(self, call: Call) -> None:
        self._waits_no_more(call)
        for calls in (self.calls, self._unsent):
            calls.pop(call.number, None)
        if call.end is None and call.task is not None:
            call.task.cancel()

    def _waits_no_more(self, call: Call) -> None:
        if self._waiting.pop(call.number, None) is not None:
            self.server.waiting -= 1
            self._unfinished -= call.partial

    _TAKE: ClassVar = {
        _DATA: _data,
        _HEADERS: _begin_headers,
        _RST_STREAM: _cancelled,
        _SETTINGS: _settings,
        _PUSH_PROMISE: _push,
        _PING: _ping,
        _WINDOW_UPDATE: _widen,
        _CONTINUATION: _continue_headers,
    }


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _Broken(_PROTOCOL_ERROR)
    return payload[1 : len(payload) - payload[0]]

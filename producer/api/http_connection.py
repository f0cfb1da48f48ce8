"""uvicorn's HTTP connections with limits on time, size and number.

uvicorn itself waits for a request's head and body as long as the client likes, keeps a head, trailers and pipelined
requests of any length, waits for ever for a client that reads no answers, and takes as many connections as come.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from producer.api.binding import CONNECTIONS_LIMIT
from producer.api.tls_connection import TlsConnection
from producer.contract import ErrorCode

HEAD_TIMEOUT: Final = 10.0  # seconds for a request's head, and for the first byte on a new connection
BODY_TIMEOUT: Final = 5.0  # seconds for a request's body; then the answer is 408
READ_TIMEOUT: Final = 10.0  # seconds in which a client must make room for more of its answer
# Seconds that clients have to use a connection once more when the API shuts down: the answer says that it was the last.
LAST_REQUESTS: Final = 1.0
LINGER: Final = 2.0  # seconds of reading on after an early answer: if we closed at once the client might never see it
HEAD_LIMIT: Final = 32 * 1024  # bytes
HEADERS_LIMIT: Final = 100  # in one head, empty lines before it included; each costs some 200 bytes beside its own
BODY_LIMIT: Final = 16 * 1024  # bytes of one request; the longest address has 254
LINES_LIMIT: Final = 250  # of a chunked body: sizes, data and trailers
# Bytes of body that are read and dropped after an early answer: many clients read it only once they have sent all.
SURPLUS_LIMIT: Final = 16 * 1024 * 1024
_REFUSED_LIMIT: Final = 256 * 1024  # the same, after what is no request of ours
_READ_SIZE: Final = 16 * 1024  # bytes that one connection reads at a time, and so the most that it keeps unparsed
_WRITE_BUFFER: Final = 4 * 1024  # bytes of answers that may wait for their client before the next part is held back
_PIPELINES: Final = 8  # pipelined requests that are begun in one turn of the event loop
_HEAD_END: Final = b"\r\n\r\n"
_UPGRADING: Final = frozenset({b"upgrade", b"connection", b"http2-settings"})


class HttpConnections:
    """All connections of one HTTP server: a bounded number of them."""

    def __init__(
        self,
        limit: int = CONNECTIONS_LIMIT,
        tls: ssl.SSLContext | None = None,
        on_evicted: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit = limit
        self._tls = tls
        self._on_evicted = on_evicted
        self._open: set[HttpConnection] = set()
        # Those that never sent a whole request, the oldest first; those that wait for another, the longest idle first.
        self._unfinished: dict[HttpConnection, None] = {}
        self._idle: dict[HttpConnection, None] = {}
        self._pipelined: deque[HttpConnection] = deque()  # those whose next request is here already
        self._buffer = memoryview(bytearray(_READ_SIZE))  # for all: what is read is taken out at once
        self.closing = False  # the next answer on each connection is its last

    def __len__(self) -> int:
        return len(self._open)

    def new(self, **options: Any) -> asyncio.BufferedProtocol:
        """A protocol for a connection that was just accepted; uvicorn calls this."""
        connection = HttpConnection(self, **options)
        reads = _SmallReads(connection, self._buffer)
        if self._tls is None:
            return reads
        return TlsConnection(reads, self._tls, connection.accepted, lambda: self.closed(connection))

    def opened(self, connection: HttpConnection) -> None:
        """Take it in, and hang up on another where there are too many."""
        if len(self._open) >= self._limit:
            evicted = next(iter(self._unfinished or self._idle or (connection,)))
            self.closed(evicted)
            evicted.hang_up()
            self._on_evicted()
            if evicted is connection:  # all others are being answered
                return
        self._open.add(connection)
        self._unfinished[connection] = None

    def requested(self, connection: HttpConnection) -> None:
        """Note that it has sent a whole request."""
        self._unfinished.pop(connection, None)
        self._idle.pop(connection, None)

    def answered(self, connection: HttpConnection) -> None:
        """Note that none of its requests waits for an answer."""
        if connection in self._open and connection not in self._unfinished:
            self._idle[connection] = None

    def pipelined(self, connection: HttpConnection) -> None:
        """Have its next request served, in turn: a crowd of pipelines would hold up whoever sends one request."""
        if not self._pipelined:
            connection.loop.call_soon(self._serve_pipelined)
        self._pipelined.append(connection)

    def _serve_pipelined(self) -> None:
        for _ in range(min(_PIPELINES, len(self._pipelined))):
            connection = self._pipelined.popleft()
            connection.serve_next()
        if self._pipelined:
            connection.loop.call_soon(self._serve_pipelined)

    def closed(self, connection: HttpConnection) -> None:
        """Forget it."""
        self._open.discard(connection)
        self.requested(connection)

    async def take_last_requests(self) -> None:
        """From now on each connection gets one more answer, which says so. Wait until none waits for its request.

        To close an idle connection at once would lose the request that its client sends at that moment. One that is
        still idle after `LAST_REQUESTS` is seldom used.
        """
        self.closing = True
        for connection in self._open:
            connection.answer_last()
        deadline = time.monotonic() + LAST_REQUESTS
        while True:
            await asyncio.sleep(0.02)  # at first for a connection that was accepted in this turn of the event loop
            if not (self._unfinished or self._idle) or time.monotonic() > deadline:
                return


class _SmallReads(asyncio.BufferedProtocol):
    """Reads a little at a time: uvloop would read 256 kB, and of pipelined requests all but the first must be kept."""

    def __init__(self, connection: HttpConnection, buffer: memoryview) -> None:
        self._connection = connection
        self._buffer = buffer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as below
        self._connection.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._connection.data_received(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:
        return self._connection.eof_received()

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()


class _TooMuch(Exception):
    """What a client sends is above a limit: the status and the reason to refuse it with."""


class HttpConnection(HttpToolsProtocol):
    """One connection, on which a slow, half-open or endless client holds nothing up.

    The parser gets one request at a time: those that were sent behind it wait as they came, and nothing more is read.
    """

    def __init__(self, connections: HttpConnections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections
        self._socket: asyncio.Transport | None = None  # below TLS, where there is TLS
        self._reading: str | None = None  # the part of a request that has begun and not ended: head or body
        self._due: str | None = None  # the part that the timer runs for
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None  # runs while the client reads too little
        self._framing = 0  # bytes of a head, or of a body's chunks beside what is in them
        self._lines = 0  # of the same
        self._surplus = 0  # bytes that came after an early answer
        self._left: int | None = 0  # bytes of body still to come; None: chunked
        self._tail = b""  # the end of the head so far, for a line's end that comes in two parts
        self._waiting = b""  # what came behind the request that is being answered
        self._ended = False  # the client sends nothing more
        self._dropping = False  # this connection's last answer is on its way, and nothing more is parsed
        self._upgrade = False  # the head asks for another protocol; it is parsed again without that

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        super().connection_made(transport)
        transport.set_write_buffer_limits(_WRITE_BUFFER)
        self._watch()
        if self._socket is None:
            self.accepted(transport)

    def accepted(self, socket: asyncio.Transport) -> None:
        """Count it; a TLS handshake comes later."""
        self._socket = socket
        self._connections.opened(self)

    def answer_last(self) -> None:
        """Close it after the answer to the request that is being served, if there is one."""
        if not self._answered:
            self.cycle.keep_alive = False

    def hang_up(self) -> None:
        """Close it, whatever it is doing."""
        if self._socket is not None:
            self._socket.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.resume_writing()
        self._connections.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse it, unless a request is being answered."""
        if self._dropping:
            self._drop(len(data))
        elif self._waiting:  # the application asked for more
            self._waiting += data
            self.flow.pause_reading()
            if len(self._waiting) > HEAD_LIMIT + BODY_LIMIT:
                self.transport.abort()
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        """Parse up to the end of a request, and start the timer for what is due next."""
        self._unset_keepalive_if_required()
        start = 0
        try:
            while start < len(data) and not self.transport.is_closing():
                if self._reading is None and not self._answered:
                    self._waiting = data[start:]
                    self.flow.pause_reading()
                    break
                end = self._part(data, start)
                self._parse(data[start:end])
                start = end
        except httptools.HttpParserError:
            self.send_400_response("not HTTP")
        except _TooMuch as exc:
            self._refuse(*exc.args)
        self._watch()

    def _part(self, data: bytes, start: int) -> int:
        """Where the part of a request that begins at `start` ends: a head, a body, or a line of a chunked body.

        So no part reaches into the next request. Raises `_TooMuch` with the answer.
        """
        if self._reading != "body":
            end = _after_head(self._tail, data, start)
            if not end:
                end = len(data)
                self._tail = (self._tail + data[max(start, end - 3) :])[-3:]
            self._framing += end - start
            self._lines += data.count(b"\n", start, end)
            if self._framing > HEAD_LIMIT:
                raise _TooMuch(431, f"a head has at most {HEAD_LIMIT} bytes")
            if self._lines > HEADERS_LIMIT + 2:  # the request line, and the empty one
                raise _TooMuch(431, f"a head has at most {HEADERS_LIMIT} headers")
            return end
        if self._left is None:
            end = data.find(b"\n", start) + 1
            self._lines += end > 0
            if self._lines > LINES_LIMIT or self._framing > HEAD_LIMIT:
                raise _TooMuch(413, f"a body has at most {LINES_LIMIT} lines of chunks, and {HEAD_LIMIT} bytes of them")
            end = end or len(data)
            self._framing += end - start
        else:
            end = min(start + self._left, len(data))
            self._left -= end - start
        if self._answered:
            self._drop(end - start)
        return end

    def _drop(self, size: int) -> None:
        self._surplus += size
        if self._surplus > (_REFUSED_LIMIT if self._dropping else SURPLUS_LIMIT):
            self.transport.abort()
        else:  # others come first: without a pause, half a megabyte would be read at once
            self.flow.pause_reading()
            self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            # The parser stops here. Java's HTTP client asks every server for h2c and then sends its body as usual.
            if self.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserError from None
            self._upgrade = False
            lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
            lines += [name + b": " + value for name, value in self.headers if name not in _UPGRADING]
            self.parser = httptools.HttpRequestParser(self)
            self._parse(b"\r\n".join(lines) + b"\r\n\r\n" + data[exc.args[0] :])

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own signature
        """The client sends nothing more, as with `nc -N`; it still gets the answer to its request."""
        self._ended = True
        return not self._dropping and (bool(self._waiting) or self._close_after_answer())

    def _close_after_answer(self) -> bool:
        """Whether there is an answer to wait for."""
        if self._answered or self._reading is not None:
            return False
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading = "head"

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._upgrade = True
            return
        super().on_headers_complete()
        if self._connections.closing:
            self.answer_last()
        headers, self.headers = self.headers, []  # trailers are no headers
        self._reading, self._framing, self._surplus, self._lines, self._left, self._tail = "body", 0, 0, 0, 0, b""
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
            elif name == b"transfer-encoding":
                self._left = None

    def on_body(self, body: bytes) -> None:
        """Keep no more than it takes to see that it is too much."""
        self._framing -= len(body)
        super().on_body(body[: BODY_LIMIT + 1 - len(self.cycle.body)])

    def on_message_complete(self) -> None:
        """The request is complete, unless only its head was parsed so far."""
        if not self._upgrade:
            super().on_message_complete()
            self._reading, self._framing, self._lines = None, 0, 0
            self._connections.requested(self)
            if self._answered:  # before all of it was there
                self._connections.answered(self)

    def on_response_complete(self) -> None:
        """Go on with what came behind the request."""
        super().on_response_complete()
        if self._waiting:
            self._connections.pipelined(self)
        elif self._answered:
            self._connections.answered(self)

    def serve_next(self) -> None:
        """Parse what came behind the request that is answered now."""
        if not self.transport.is_closing():
            data, self._waiting = self._waiting, b""
            self._take(data)
            if self._ended and not self._waiting and not self._close_after_answer():
                self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read its answers: it has a while to begin."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(READ_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        """Answer in JSON what is not HTTP, too."""
        self._refuse(400, msg)

    @property
    def _answered(self) -> bool:
        """Whether no request waits for our answer."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _watch(self) -> None:
        if self._dropping or self.transport.is_closing():
            return
        due = self._reading or ("head" if self._answered else None)
        if due == self._due:
            return
        self._stop_timer()
        self._due = due
        if due is not None:
            timeout = HEAD_TIMEOUT if due == "head" else BODY_TIMEOUT + LINGER
            self._timer = self.loop.call_later(timeout, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._due = None

    def _too_late(self) -> None:
        due = self._due
        self._stop_timer()
        if due != "body" and not self._answered:
            self._watch()  # the next request is slow; the one before it still gets its answer
        else:
            self.transport.close()

    def _refuse(self, status: int, why: str) -> None:
        """Answer what is being read, unless it was answered early, and close once the client has seen it."""
        if self._reading != "body" or not self._answered:
            if self._reading == "body":
                self.cycle.disconnected = True  # the application answers nothing more
                self.cycle.message_event.set()
            body = refusal(why)
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._dropping, self._surplus = True, 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._stop_timer()
        self._timer = self.loop.call_later(LINGER, self.transport.abort)


def _after_head(tail: bytes, data: bytes, start: int) -> int:
    """Where the body follows a head that goes on at `start` of `data`, after `tail`; 0 if the head goes on after it."""
    found = (tail + data[start : start + 3]).find(_HEAD_END) if tail else -1
    if found >= 0:
        return start + found + len(_HEAD_END) - len(tail)
    found = data.find(_HEAD_END, start)
    return found + len(_HEAD_END) if found >= 0 else 0


def refusal(why: Any, error: int = ErrorCode.ERROR_JSON) -> bytes:
    """The body of an answer other than 200. Old callers read `error` alone, and take a missing one for 0, Success."""
    return json.dumps({"error": error, "detail": why}).encode()

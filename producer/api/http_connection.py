"""uvicorn's HTTP connection with limits on time and size.

uvicorn itself waits for a request's head and body as long as the client likes, and keeps a head of any length.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from producer.contract import ErrorCode

HEAD_TIMEOUT: Final = 10.0  # seconds for a request's head, and for the first byte on a new connection
BODY_TIMEOUT: Final = 5.0  # seconds for a request's body; then the answer is 408
LINGER: Final = 2.0  # seconds of reading on after an early answer: if we closed at once the client might never see it
HEAD_LIMIT: Final = 32 * 1024  # bytes
# Bytes of body that are read and dropped after an early answer: many clients read it only once they have sent all.
SURPLUS_LIMIT: Final = 16 * 1024 * 1024
_UPGRADING: Final = frozenset({b"upgrade", b"connection", b"http2-settings"})


class HttpConnection(HttpToolsProtocol):
    """One connection, on which a slow, half-open or endless client holds nothing up."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        super().connection_made(transport)
        self._reading: str | None = None  # the part of a request that has begun and not ended: head or body
        self._due: str | None = None  # the part that the timer runs for
        self._timer: asyncio.TimerHandle | None = None
        self._head = self._surplus = 0  # bytes
        self._upgrade = False  # the head asks for another protocol; it is parsed again without that
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes, parse them, and start the timer for what is due next."""
        if self._reading == "body":
            if self._answered:
                self._surplus += len(data)
                if self._surplus > SURPLUS_LIMIT:
                    self.transport.abort()
                    return
        else:
            self._head += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("not HTTP")
            return
        if self._reading != "body" and self._head > HEAD_LIMIT:
            self._refuse(431, "head too large")
            return
        self._watch()

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
        self._reading, self._head, self._surplus = "body", 0, 0

    def on_message_complete(self) -> None:
        """The request is complete, unless only its head was parsed so far."""
        if not self._upgrade:
            super().on_message_complete()
            self._reading = None

    def send_400_response(self, msg: str) -> None:
        """Answer in JSON what is not HTTP, too."""
        self._refuse(400, msg)

    @property
    def _answered(self) -> bool:
        """Whether no request waits for our answer."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _watch(self) -> None:
        due = self._reading or ("head" if self._answered else None)
        if due == self._due or self.transport.is_closing():
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
        body = refusal(why)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def refusal(why: Any, error: int = ErrorCode.ERROR_JSON) -> bytes:
    """The body of an answer other than 200. Old callers read `error` alone, and take a missing one for 0, Success."""
    return json.dumps({"error": error, "detail": why}).encode()

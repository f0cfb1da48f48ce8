"""One HTTP connection: uvicorn's, with bounds on what a slow, half-open or endless client can hold.

uvicorn itself waits for a request's head and body as long as the client likes, and remembers any head.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_TIMEOUT: Final = 10.0  # seconds for a request's head, and for a new connection to say anything
BODY_TIMEOUT: Final = 5.0  # seconds for its body; then it is answered 408
LINGER: Final = 2.0  # seconds to go on reading after an early answer: closed at once, the client might never see it
HEAD_LIMIT: Final = 32 * 1024  # bytes
# Bytes of body that are read and dropped after an early answer: many clients look for it only once they have sent all.
SURPLUS_LIMIT: Final = 16 * 1024 * 1024
_UPGRADING: Final = frozenset({b"upgrade", b"connection", b"http2-settings"})


class Connection(HttpToolsProtocol):
    """See the module."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        """Its first request is due."""
        super().connection_made(transport)
        self._reading: str | None = None  # the part of a request that has begun and not ended: head, body
        self._due: str | None = None  # the part that the clock runs for
        self._clock: asyncio.TimerHandle | None = None
        self._head = self._surplus = 0  # bytes
        self._upgrade = False  # the head asks for another protocol, and is read again without that
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count, parse, and see what is due next."""
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
            # The parser ends here; Java's HTTP client asks each server for h2c, and then sends its body as ever.
            if self.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserError from None
            self._upgrade = False
            lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
            lines += [name + b": " + value for name, value in self.headers if name not in _UPGRADING]
            self.parser = httptools.HttpRequestParser(self)
            self._parse(b"\r\n".join(lines) + b"\r\n\r\n" + data[exc.args[0] :])

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own signature
        """The client says nothing more, as `nc -N` does; it still gets the answer to what it asked."""
        if self._answered or self._reading is not None:
            return False
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        """A head has begun."""
        super().on_message_begin()
        self._reading = "head"

    def on_headers_complete(self) -> None:
        """A body may follow."""
        if self.parser.should_upgrade():
            self._upgrade = True
            return
        super().on_headers_complete()
        self._reading, self._head, self._surplus = "body", 0, 0

    def on_message_complete(self) -> None:
        """The request is whole, unless only its head was read so far."""
        if not self._upgrade:
            super().on_message_complete()
            self._reading = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in JSON as well."""
        self._refuse(400, msg)

    @property
    def _answered(self) -> bool:
        """Whether nothing waits for an answer of ours."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _watch(self) -> None:
        due = self._reading or ("head" if self._answered else None)
        if due == self._due or self.transport.is_closing():
            return
        self._stop_clock()
        self._due = due
        if due is not None:
            patience = HEAD_TIMEOUT if due == "head" else BODY_TIMEOUT + LINGER
            self._clock = self.loop.call_later(patience, self._too_late)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self._due = None

    def _too_late(self) -> None:
        due = self._due
        self._stop_clock()
        if due != "body" and not self._answered:
            self._watch()  # the next request is slow; the one before it gets its answer
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


def refusal(why: Any, error: int = 1001) -> bytes:
    """The body of any answer but 200. Old callers look at `error` alone, and take a missing one for 0, Success."""
    return json.dumps({"error": error, "detail": why}).encode()

"""What a stranger may send to the HTTP API in order to fill its memory."""

from __future__ import annotations

from typing import Final

from support.attacks import Attack

_HOST: Final = b"Host: 127.0.0.1\r\n"
_ASK: Final = b"POST /get_varifycode HTTP/1.1\r\n" + _HOST
_CHUNKED: Final = _ASK + b"Transfer-Encoding: chunked\r\n\r\n"
_LONG: Final = b"Content-Length: 1000000000\r\n\r\n"
_BODY: Final = b'{"email": "a@example.com"}'
_GET: Final = b"GET /healthz HTTP/1.1\r\n" + _HOST
_HEADERS: Final = b"".join(b"x%02d: y\r\n" % i for i in range(90))  # as many as a head may have


def _get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\n" + _HOST + b"\r\n"


ATTACKS: Final = {
    "trailers": Attack(_CHUNKED + b"0\r\n", b"a:\r\n"),
    "an endless trailer": Attack(_CHUNKED + b"0\r\na: ", b"x" * 1024),
    "pipelined GETs": Attack(b"", _GET + b"\r\n"),
    "pipelined requests for codes": Attack(b"", _ASK + _HEADERS + b"Content-Length: 26\r\n\r\n" + _BODY),
    "pipelined upgrades": Attack(b"", _GET + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"),
    "unread answers": Attack(b"", _get(b"/openapi.json"), reads=False),
    "unread metrics": Attack(b"", _get(b"/metrics"), reads=False),
    "unfinished heads of tiny headers": Attack(b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 7900),
    "unfinished heads of long headers": Attack(b"GET / HTTP/1.1\r\na: " + b"x" * 31_000),
    "endless tiny headers": Attack(b"GET / HTTP/1.1\r\n", b"a:\r\n"),
    "an endless header": Attack(b"GET / HTTP/1.1\r\na: ", b"x" * 1024),
    "an endless path": Attack(b"GET /", b"x" * 1024),
    "many header names": Attack(b"", _GET + b"".join(b"x%05d: y\r\n" % i for i in range(2500)) + b"\r\n"),
    "empty lines": Attack(b"", b"\r\n"),
    "slow bodies": Attack(_ASK + b"Content-Length: 16384\r\n\r\n" + b" " * 16_000),
    "large bodies": Attack(_ASK + _LONG, b"x" * 1024),
    "bodies that nobody asked for": Attack(b"POST /healthz HTTP/1.1\r\n" + _HOST + _LONG, b"x" * 1024),
    "endless chunks": Attack(_CHUNKED, b"4000\r\n" + b"x" * 0x4000 + b"\r\n"),
    "tiny chunks": Attack(_CHUNKED, b"1\r\nx\r\n"),
    "chunk extensions": Attack(_CHUNKED + b"1;", b"a" * 1024),
    "silent connections": Attack(b""),
}

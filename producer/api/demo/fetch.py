"""Fetches a small JSON document from a host that is not trusted: bounded in size and in time."""

from __future__ import annotations

import asyncio
import json
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from typing import Any, Final
from urllib.parse import urlsplit

from producer.errors import VerifyError

TIMEOUT: Final = 2.0  # seconds from connecting to the last byte
LIMIT: Final = 1024 * 1024  # bytes of an answer, its head included
_CHUNK: Final = 64 * 1024


class CannotFetch(VerifyError):
    """There was no answer, or not a JSON document."""


class _Received:
    """What `HTTPResponse` takes for a socket.

    A blocking client in a thread would not do: its time limits count from byte to byte, and nothing could stop it.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> BytesIO:
        return BytesIO(self._data)


async def fetch_json(url: str) -> Any:
    """The parsed document at `url` (http or https). Raises `CannotFetch`. Does not follow redirects."""
    try:
        async with asyncio.timeout(TIMEOUT):
            received = _Received(await _get(url))
    except TimeoutError:
        raise CannotFetch(f"it did not answer within {TIMEOUT:g} s") from None
    except (OSError, UnicodeError) as exc:
        raise CannotFetch(f"it cannot be reached ({type(exc).__name__})") from None
    try:
        response = HTTPResponse(received)  # type: ignore[arg-type]  # all that it uses
        response.begin()
        if response.status != 200:
            raise CannotFetch(f"it answered {response.status}")
        return json.loads(response.read())
    except (ValueError, RecursionError, HTTPException):
        raise CannotFetch("it answered something else") from None


async def _get(url: str) -> bytes:
    parts = urlsplit(url)
    assert parts.hostname  # noqa: S101 - the setting has one
    tls = parts.scheme == "https"
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if tls else 80), ssl=tls or None)
    try:
        head = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
        writer.write(head.encode("ascii"))
        answer = bytearray()
        while data := await reader.read(_CHUNK):
            answer += data
            if len(answer) > LIMIT:
                raise CannotFetch(f"its answer has more than {LIMIT} bytes")
        return bytes(answer)
    finally:
        writer.transport.abort()

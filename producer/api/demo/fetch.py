"""Fetches a small JSON document from a host that is not trusted: bounded in size and in time."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from producer.errors import VerifyError

TIMEOUT: Final = 2.0  # seconds from connecting to the last byte
LIMIT: Final = 1024 * 1024  # bytes of an answer, its head included
_CHUNK: Final = 64 * 1024


class CannotFetch(VerifyError):
    """There was no answer, or not a JSON document."""


class _Answer:
    """Collects what httptools' parser finds."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


async def fetch_json(url: str) -> Any:
    """The parsed document at `url` (http or https). Raises `CannotFetch`. Does not follow redirects."""
    try:
        async with asyncio.timeout(TIMEOUT):
            status, body = await _get(url)
        if status not in {0, 200}:  # 0: the connection ended before the status
            raise CannotFetch(f"it answered {status}")
        return json.loads(body)
    except TimeoutError:
        raise CannotFetch(f"it did not answer within {TIMEOUT:g} s") from None
    except (OSError, UnicodeError) as exc:
        raise CannotFetch(f"it cannot be reached ({type(exc).__name__})") from None
    except (ValueError, RecursionError, httptools.HttpParserError, httptools.HttpParserUpgrade):
        raise CannotFetch("it answered something else") from None


async def _get(url: str) -> tuple[int, bytes]:
    parts = urlsplit(url)
    assert parts.hostname  # noqa: S101 - the setting has one
    tls = parts.scheme == "https"
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if tls else 80), ssl=tls or None)
    try:
        head = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
        writer.write(head.encode("ascii"))
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        size = 0
        while not answer.complete and (data := await reader.read(_CHUNK)):
            size += len(data)
            if size > LIMIT:
                raise CannotFetch(f"its answer has more than {LIMIT} bytes")
            parser.feed_data(data)
        # Without a length the body ends with the connection, which httptools does not report.
        return parser.get_status_code(), bytes(answer.body)
    finally:
        writer.transport.abort()

"""What a POST brings: a JSON object, within its bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from producer.api.connection import BODY_TIMEOUT
from producer.api.context import BODY_LIMIT
from producer.contract import DEFAULT_PURPOSE, is_purpose


class NotOurs(Exception):
    """The body is no JSON object, or lacks what must be in it."""


async def read(request: Request) -> dict[str, Any]:
    """The JSON object in the body, whatever the content type says. Raises `NotOurs`, or `HTTPException`."""
    body = await _body(request)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise NotOurs from None
    if not isinstance(given, dict):
        raise NotOurs
    return given


async def _body(request: Request) -> bytes:
    """The whole body. Raises `HTTPException`, without reading on, if it is too large or too slow."""
    said = request.headers.get("content-length", "0")
    if not said.isascii() or not said.isdecimal() or int(said[:20]) > BODY_LIMIT:
        raise HTTPException(413, f"a body has at most {BODY_LIMIT} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_LIMIT:
                    raise HTTPException(413, f"a body has at most {BODY_LIMIT} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_TIMEOUT:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended early") from None
    return bytes(body)


def text_in(given: dict[str, Any], name: str) -> str:
    """The text under `name`. Raises `NotOurs`."""
    value = given.get(name)
    if not isinstance(value, str):
        raise NotOurs
    return value


def purpose_in(given: dict[str, Any]) -> str:
    """The purpose, or the usual one. Raises `NotOurs`."""
    purpose = given.get("purpose", DEFAULT_PURPOSE)
    if not is_purpose(purpose):
        raise NotOurs
    return str(purpose)

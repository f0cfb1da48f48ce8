"""Reads the body of a POST: a JSON object, bounded in size and time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from producer.api.http_connection import BODY_LIMIT, BODY_TIMEOUT


class JsonRoute(APIRoute):
    """A route that takes its body, if it has one, as JSON, whatever the content type says: the old server did."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI's "Custom Request and APIRoute class"."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    @cached_property
    def headers(self) -> Headers:
        """The headers without a content type: FastAPI then parses JSON, as the application is not strict about it."""
        return Headers(raw=[header for header in self.scope["headers"] if header[0] != b"content-type"])

    async def body(self) -> bytes:
        """The whole body. Raises `HTTPException`, without reading on, if it is too large or too slow."""
        length = self.headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal() or int(length[:20]) > BODY_LIMIT:
            raise HTTPException(413, f"a body has at most {BODY_LIMIT} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for chunk in self.stream():
                    body += chunk
                    if len(body) > BODY_LIMIT:
                        raise HTTPException(413, f"a body has at most {BODY_LIMIT} bytes")
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_TIMEOUT:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body ended early") from None
        self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        """The value in the body. Raises `JSONDecodeError`, also for bad UTF-8 and for too deep nesting."""
        try:
            return json.loads(self._body)
        except (ValueError, RecursionError):
            raise json.JSONDecodeError("not JSON", "", 0) from None


def malformed_fields(exc: RequestValidationError) -> str:
    """What is wrong with a body, by field: `email is missing`. Values are never repeated."""
    found = []
    for error in exc.errors():
        field = error["loc"][1] if len(error["loc"]) > 1 else None
        if not isinstance(field, str):
            return "the body is not a JSON object"
        message = "is missing" if error["type"] == "missing" else error["msg"].removeprefix("Value error, ")
        found.append(f"{field} {message}")
    return "; ".join(found)

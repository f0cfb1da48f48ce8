"""The HTTP door."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producer.api import demo
from producer.api import docs as pages
from producer.api.body import NotOurs, purpose_in, read, text_in
from producer.api.connection import refusal
from producer.api.context import Api
from producer.contract import ErrorCode
from producer.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from producer.tracing.spans import Traces

JSON: Final = "application/json"
OPEN: Final = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})  # no key: probes have none; nothing secret


# FastAPI's own spans and logs would go wherever the process exports to, with paths and errors as callers made them.
_NO_TELEMETRY: Final[Any] = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
TRACED: Final = frozenset({"/get_varifycode", "/check_varifycode"})


def make_app(api: Api) -> ASGIApp:
    """The door as an ASGI application."""
    app = FastAPI(
        title="VerifyServer",
        summary="Sends email verification codes and checks them.",
        description=pages.DESCRIPTION,
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
        exception_handlers={HTTPException: _refuse, Exception: _unforeseen},
    )

    @app.post("/get_varifycode", summary="Send a code", **pages.describe(pages.REQUEST, pages.REQUEST_ANSWER))
    async def get_varifycode(request: Request) -> Response:
        """Send a code to `email`, and wait for the outcome."""
        try:
            given = await read(request)
            email, purpose = text_in(given, "email"), purpose_in(given)
        except NotOurs:
            return _not_ours(api)
        error = await api.request("http", email, purpose=purpose, locale=given.get("locale"))
        return _answer({"error": int(error), "email": email})

    @app.post("/check_varifycode", summary="Check a code", **pages.describe(pages.CHECK, pages.CHECK_ANSWER))
    async def check_varifycode(request: Request) -> Response:
        """Check a code; the right one is consumed. Each check is an attempt."""
        try:
            given = await read(request)
            email, code, purpose = text_in(given, "email"), text_in(given, "varifycode"), purpose_in(given)
        except NotOurs:
            return _not_ours(api)
        error = await api.check("http", email, code, purpose=purpose)
        return _answer({"error": int(error), "email": email})

    _add_looks(app, api)
    # Within the guard: who has no key leaves no trace.
    guarded: ASGIApp = app if api.traces is None else _Traced(app, api.traces)
    free = OPEN
    if api.settings.demo:
        free |= demo.add(app, api)
    if api.settings.api_keys:
        app.openapi_schema = pages.with_keys(app.openapi(), OPEN)
        guarded = _Guard(guarded, api.settings.api_keys, free)
    return _Counted(guarded, api)


def _add_looks(app: FastAPI, api: Api) -> None:
    """What is looked at and changes nothing."""

    async def healthz() -> Response:
        """The process is up."""
        return _answer({"status": "ok"})

    async def readyz() -> Response:
        """Broker, results and codes can be reached, and a worker gave a sign of life within 5 s; else 503."""
        found = await api.readiness.find()
        parts = {"broker": found.broker, "results": found.results, "codes": found.codes, "workers": found.workers}
        ready = found.ready and not api.leaving
        return _answer({"ready": ready, **parts, "leaving": api.leaving}, 200 if ready else 503)

    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(api.metrics.render((await api.readiness.find()).backlog), media_type=CONTENT_TYPE)

    async def docs(request: Request) -> Response:
        """This description, for people; it needs nothing from elsewhere."""
        return HTMLResponse(pages.page(app.openapi(), request.headers.get("host", "")))

    for path, shown, endpoint in (
        ("/healthz", pages.HEALTH, healthz),
        ("/readyz", pages.READY, readyz),
        ("/metrics", pages.METRICS, metrics),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], summary=endpoint.__doc__, **shown)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)


class _Guard:
    """Asks for a key before anything else is looked at."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], free: frozenset[str]) -> None:
        """`free`: paths that need none; one that ends in `/`, but for the first, stands for all below it."""
        self._app = app
        self._free = free
        self._free_below = tuple(path for path in free if path.endswith("/") and path != "/")
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_free(scope["path"]) and not self._may(scope):
            answer = Response(refusal("a key is needed: Authorization: Bearer KEY"), 401, media_type=JSON)
            answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_free(self, path: str) -> bool:
        return path in self._free or path.startswith(self._free_below)

    def _may(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        # Digests have one length, and all are compared: the time taken tells nothing about any key.
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class _Counted:
    """Counts answers that are not 200."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 200:
                self._api.metrics.refusals[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counting)


class _Traced:
    """A span around each request for a code and each check."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in TRACED:
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        attributes = {
            "http.request.method": "POST",
            "http.route": path,
            "url.path": path,
            "url.scheme": scope["scheme"],
        }
        with self._traces.serving(f"POST {path}", scope["headers"], attributes) as span:

            async def noting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self._app(scope, receive, noting)


def _not_ours(api: Api) -> Response:
    if api.traces is not None:
        api.traces.answered(ErrorCode.ERROR_JSON)
    return _answer({"error": int(ErrorCode.ERROR_JSON)})


def _answer(content: dict[str, Any], status: int = 200) -> Response:
    try:
        body = json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        body = json.dumps(content).encode()  # half of a surrogate pair, which only an escape can say
    return Response(body, status, media_type=JSON)


async def _refuse(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)  # noqa: S101 - tells the type checker
    headers = dict(exc.headers or {})
    if exc.status_code == 408:
        headers["Connection"] = "close"
    return Response(refusal(exc.detail), exc.status_code, headers, media_type=JSON)


async def _unforeseen(_request: Request, _exc: Exception) -> Response:
    return Response(refusal("unforeseen error", int(ErrorCode.EXCEPTION)), 500, media_type=JSON)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""The HTTP API."""

from __future__ import annotations

import asyncio
import json
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producer.api import demo
from producer.api.binding import is_loopback
from producer.api.body import JsonRoute, malformed_fields
from producer.api.http_connection import refusal
from producer.api.keys import KeyCheck, key_name, refusal_of_key
from producer.api.models import (
    CheckAnswer,
    CodeCheck,
    CodeRequest,
    Health,
    Malformed,
    ReadinessAnswer,
    Refusal,
    RequestAnswer,
    client_in,
    error_table,
)
from producer.api.origin import OriginCheck
from producer.api.state import Api
from producer.audit import Audit
from producer.contract import CLIENT_HEADER, ErrorCode
from producer.metrics import CONTENT_TYPE
from producer.settings import Settings

if TYPE_CHECKING:
    from producer.tracing.spans import Traces

JSON: Final = "application/json"
_BETWEEN_METRICS: Final = 0.05  # seconds between two renderings
_DOCS: Final = ("/docs", "/static-offline-docs/")
# Paths that need no key: probes have none, and the rest holds nothing secret. One that ends in / stands for all below.
OPEN: Final = frozenset({"/healthz", "/readyz", "/openapi.json", *_DOCS})
TRACED: Final = frozenset({"/get_varifycode", "/get_verifycode", "/check_varifycode", "/check_verifycode"})

# FastAPI's own spans and logs would go wherever the process exports to, with paths and errors as callers made them.
_NO_TELEMETRY: Final[Any] = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
_DESCRIPTION: Final = f"""\
Every answered request is HTTP 200 with a number in `error`. A body is JSON whatever its content type, of at most 16 kB.

{error_table()}
"""
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {
        "model": Refusal,
        "description": "400 the body ended early, or there is not one Host; 401 the key is missing or wrong; 403 a"
        " foreign Host or Origin, without keys; 408 the body did not arrive within 5 s; 413 the body has more"
        " than 16 kB; 431 the head has more than 100 headers or 32 kB",
    }
}
# The page that FastAPI makes has an inline script; everything that it loads comes from here.
_DOCS_POLICY: Final = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    b" connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DOCS_HEADERS: Final = (
    (b"content-security-policy", _DOCS_POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def make_app(api: Api, url: str = "http://127.0.0.1:8081") -> ASGIApp:
    """The API as an ASGI application. `url`: where its examples ask."""
    settings = api.settings
    app = FastAPIOffline(
        redoc_url=None,
        title="VerifyServer",
        summary="Sends email verification codes and checks them.",
        description=_DESCRIPTION,
        version="1",
        redirect_slashes=False,
        strict_content_type=False,
        telemetry=_NO_TELEMETRY,
        swagger_ui_parameters={"defaultModelsExpandDepth": -1, "tryItOutEnabled": True},
        exception_handlers={HTTPException: _refuse, Exception: _unexpected},
    )

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, exc: RequestValidationError) -> Response:
        if api.traces is not None:
            api.traces.answered(ErrorCode.ERROR_JSON)
        return _json({"error": int(ErrorCode.ERROR_JSON), "detail": malformed_fields(exc)})

    with_key = [Security(HTTPBearer(auto_error=False, scheme_name="key"))] if settings.api_keys else []
    app.router.route_class = JsonRoute  # a router of their own would be searched twice for each request
    _add_verbs(app, api, url, with_key)
    _add_operations(app, api, with_key)
    free = OPEN | demo.add(app, api) if settings.demo else OPEN
    # Inside the key check: a caller without a key leaves no trace.
    guarded: ASGIApp = app if api.traces is None else _Traced(app, api.traces)
    if settings.api_keys:
        guarded = _Locked(guarded, KeyCheck(settings.api_keys), free, api.audit)
    checked = OriginCheck(guarded, keys=bool(settings.api_keys), any_host=_any_host(settings), local=demo.DATA)
    return _Outermost(checked, api)


def _any_host(settings: Settings) -> bool:
    return settings.allow_plaintext or not is_loopback(settings.http_bind, "VERIFY_HTTP_BIND")


def _add_verbs(app: FastAPI, api: Api, url: str, with_key: list[Any]) -> None:
    tags: list[str | Enum] = ["codes"]

    @app.post("/get_verifycode", include_in_schema=False, dependencies=with_key)
    @app.post(
        "/get_varifycode",
        summary="Send a code",
        description=_described(
            "Sends a code to `email` and waits for the outcome. The header `X-Verify-Client` stands for `client`.",
            url,
            "get",
            CodeRequest,
        ),
        response_model=RequestAnswer | Malformed,
        responses=_REFUSALS,
        tags=tags,
        dependencies=with_key,
    )
    async def get_varifycode(asked: CodeRequest, request: Request) -> Response:
        client, wait = _client(asked, request), api.relays.wait()
        reply = api.client.request(
            asked.email, purpose=asked.purpose, locale=asked.locale, client=client, observer=wait
        )
        error = await api.answer("http", "request", wait.reply(reply))
        return _json({"error": int(error), "email": asked.email})

    @app.post("/check_verifycode", include_in_schema=False, dependencies=with_key)
    @app.post(
        "/check_varifycode",
        summary="Check a code",
        description=_described(
            "Checks a code and consumes the right one. Each check is an attempt.", url, "check", CodeCheck
        ),
        response_model=CheckAnswer | Malformed,
        responses=_REFUSALS,
        tags=tags,
        dependencies=with_key,
    )
    async def check_varifycode(given: CodeCheck) -> Response:
        result = api.client.check(given.email, given.varifycode, purpose=given.purpose)
        return _json({"error": int(await api.answer("http", "check", result)), "email": given.email})


def _client(asked: CodeRequest, request: Request) -> str | None:
    """The field, or else the header. Raises `RequestValidationError`."""
    if asked.client is not None:
        return asked.client
    try:
        return client_in(request.headers.getlist(CLIENT_HEADER))
    except ValueError as exc:
        error = {"loc": ("header", CLIENT_HEADER), "type": "value_error", "msg": str(exc)}
        raise RequestValidationError([error]) from None


def _described(text: str, url: str, verb: str, body: type[CodeRequest | CodeCheck]) -> str:
    schema: Any = body.model_config["json_schema_extra"]
    example = json.dumps(schema["example"])
    alias = f"`/{verb}_verifycode` is the same."
    return f"{text} {alias}\n\n```sh\ncurl {url}/{verb}_varifycode -d '{example}'\n```"


def _add_operations(app: FastAPI, api: Api, with_key: list[Any]) -> None:
    tags: list[str | Enum] = ["operations"]
    page = _MetricsPage(api)

    @app.head("/metrics", include_in_schema=False)
    @app.get(
        "/metrics", summary="Prometheus metrics", response_class=PlainTextResponse, tags=tags, dependencies=with_key
    )
    async def metrics() -> Response:
        return Response(await page.next(), media_type=CONTENT_TYPE)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="The process is up", response_model=Health, tags=tags)
    async def healthz() -> Response:
        return _json({"status": "ok"})

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        summary="Redis can be reached and a worker is alive",
        description="Broker, results and codes can be reached, and a worker gave a sign of life within 5 s; else 503.",
        response_model=ReadinessAnswer,
        responses={503: {"model": ReadinessAnswer, "description": "Not ready"}},
        tags=tags,
    )
    async def readyz() -> Response:
        found = await api.readiness.find()
        ready = found.ready and not api.leaving
        databases = {name: name not in found.errors for name in ("broker", "results", "codes")}
        problem = {"problem": found.problem} if found.problem else {}
        answer = {"ready": ready, **databases, "workers": found.workers, "leaving": api.leaving, **problem}
        return _json(answer, 200 if ready else 503)


class _MetricsPage:
    """Renders /metrics for all who ask while it waits: a page takes 3 ms, in which nobody else is served."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._next: asyncio.Task[bytes] | None = None
        self._rendered_at = 0.0  # loop time

    async def next(self) -> bytes:
        """A page that is rendered from now on."""
        if self._next is None:
            self._next = asyncio.create_task(self._render())
        return await asyncio.shield(self._next)

    async def _render(self) -> bytes:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._rendered_at + _BETWEEN_METRICS - loop.time()))
        try:
            found = await self._api.readiness.find()
        finally:
            self._next = None
        self._rendered_at = loop.time()
        return self._api.metrics.render(found.backlog)


class _Locked:
    """Asks for a key before anything else is looked at."""

    def __init__(self, app: ASGIApp, keys: KeyCheck, free: frozenset[str], audit: Audit) -> None:
        self._app = app
        self._keys = keys
        self._audit = audit
        self._free = free
        self._free_below = tuple(path for path in free if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_free(scope["path"]):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            name = self._keys.name_of(given)
            if name is None:
                if given:
                    self._audit.wrong_key("http", (scope["client"] or (None,))[0])
                answer = Response(refusal(refusal_of_key(given)), 401, media_type=JSON)
                answer.headers["WWW-Authenticate"] = "Bearer"
                await answer(scope, receive, send)
                return
            key_name.set(name)
        await self._app(scope, receive, send)

    def _is_free(self, path: str) -> bool:
        return path in self._free or path.startswith(self._free_below)


class _Outermost:
    """Counts answers other than 200, and adds the headers that protect the page at /docs."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self._app = app
        self._refusals = api.metrics.refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] != 200:
                    self._refusals[message["status"]] += 1
                if scope["path"].startswith(_DOCS):
                    message["headers"] = [*message["headers"], *_DOCS_HEADERS]
            await send(message)

        await self._app(scope, receive, sending)


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
        url = {"url.path": path, "url.scheme": scope["scheme"]}
        attributes = {"http.request.method": "POST", "http.route": path, **url}
        with self._traces.serving(f"POST {path}", scope["headers"], attributes) as span:

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self._app(scope, receive, sending)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    # Not FastAPI's own rendering: old callers get the same bytes as ever, spaces included.
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
    detail = "use POST with a JSON body" if headers.get("Allow") == "POST" else exc.detail
    return Response(refusal(detail), exc.status_code, headers, media_type=JSON)


async def _unexpected(_request: Request, _exc: Exception) -> Response:
    return Response(refusal("unexpected error", int(ErrorCode.EXCEPTION)), 500, media_type=JSON)

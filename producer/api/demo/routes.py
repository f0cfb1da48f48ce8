"""The routes of the demo page: the page itself, a request with its progress, and the inbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from producer.api.body import JsonRoute
from producer.api.demo.fetch import CannotFetch
from producer.api.demo.inbox import Inbox
from producer.api.demo.progress import Answer, RequestProgress
from producer.api.demo.task_events import TaskEvents
from producer.api.http_connection import refusal
from producer.api.models import CodeRequest
from producer.api.state import Api
from producer.contract import ErrorCode, code_key
from producer.errors import VerifyError
from producer.redis.connection import ServerError

_PAGE: Final = Path(__file__).parent / "page"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FREE: Final = frozenset({"/", "/page/"})  # paths that need no key: the page holds nothing secret, and asks for a key
DATA: Final = ("/demo/", "/page/mail/")  # where paths with mails begin, with the codes in them
# The page loads its own scripts, styles and images, and a frame for the mail; nothing inline, nothing from elsewhere.
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; frame-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A mail brings its own styles; nothing in it runs, loads, posts or leads anywhere.
_MAIL_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'self'; sandbox"
)
_COMMON: Final = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def add(app: FastAPI, api: Api) -> frozenset[str]:
    """Add the routes to the API. Returns the paths that need no key."""
    settings = api.settings
    data = APIRouter(route_class=JsonRoute, strict_content_type=False)
    _add_page(app)
    _add_request(data, api)
    _add_inbox(data, Inbox(settings.demo_inbox) if settings.demo_inbox else None)
    app.include_router(data, include_in_schema=False)
    app.add_exception_handler(CannotFetch, _unreachable)
    return FREE


def _add_page(app: FastAPI) -> None:
    headers = {**_COMMON, "Content-Security-Policy": _PAGE_POLICY}
    # Read once: a path can name only what is here.
    files = {each.name: (each.read_bytes(), _TYPES[each.suffix]) for each in _PAGE.iterdir() if each.suffix in _TYPES}

    async def part(name: str = "index.html") -> Response:
        if name not in files:
            raise HTTPException(404)
        content, kind = files[name]
        return Response(content, headers=headers, media_type=kind)

    async def page() -> Response:
        return await part()

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/page/{name}", part, methods=["GET", "HEAD"], include_in_schema=False)


def _add_request(app: APIRouter, api: Api) -> None:
    settings = api.settings
    task_events, codes = TaskEvents(settings, api.redis), api.redis.connection(settings.codes_url)
    api.on_close.append(task_events.close)

    async def life(email: str, purpose: str) -> float | None:
        """The seconds that the live code has left, as a resend does not extend them; None if Redis does not say."""
        try:
            [left] = await codes.run([("PTTL", code_key(email, purpose))])
        except VerifyError:
            return None
        return None if isinstance(left, ServerError) or left < 0 else left / 1000

    @app.get("/demo/facts")
    async def facts() -> Response:
        """What the page must know; times are seconds."""
        return _json(
            {
                "ttl": settings.code_ttl,
                "cooldown": settings.resend_cooldown,
                "length": settings.code_length,
                "give_up": settings.give_up_after,
                "inbox": bool(settings.demo_inbox),
                "flower": settings.demo_flower or None,
                "keys": bool(settings.api_keys),
                "errors": {int(code): {"meaning": code.meaning, "advice": code.advice} for code in ErrorCode},
            }
        )

    @app.post("/demo/request")
    async def request(asked: CodeRequest) -> Response:
        """As /get_varifycode, with the request's progress as JSON lines; the last line has the error."""
        progress = RequestProgress(task_events, api.readiness)

        async def ask() -> Answer:
            wait = api.relays.wait(progress)
            reply = api.client.request(asked.email, purpose=asked.purpose, locale=asked.locale, observer=wait)
            error = await api.answer("http", "request", wait.reply(reply))
            progress.answered()
            left = await life(asked.email, asked.purpose) if error is ErrorCode.SUCCESS else None
            return {"error": int(error), **({} if left is None else {"life": left})}

        # nginx would collect the whole answer before it passes it on, but for the last header.
        return StreamingResponse(
            (json.dumps(line).encode() + b"\n" async for line in progress.lines(ask)),
            headers={**_COMMON, "X-Accel-Buffering": "no"},
            media_type="application/x-ndjson",
        )


def _add_inbox(app: APIRouter, inbox: Inbox | None) -> None:
    def require_inbox() -> Inbox:
        if inbox is None:
            raise HTTPException(404, "there is no inbox to look at: VERIFY_DEMO_INBOX is not set")
        return inbox

    @app.get("/demo/inbox")
    async def mails() -> Response:
        return _json({"mails": await require_inbox().mails()})

    @app.get("/demo/inbox/{mail_id}")
    async def mail(mail_id: str) -> Response:
        return _json(await require_inbox().mail(mail_id))

    @app.get("/page/mail/{name}")
    async def view(name: str) -> Response:
        """A mail's HTML, for a frame. It needs no key, which a frame could not send: nobody can guess its name."""
        html = require_inbox().view(name)
        if html is None:
            raise HTTPException(404)
        return Response(
            html.encode(errors="replace"),
            headers={**_COMMON, "Content-Security-Policy": _MAIL_POLICY},
            media_type="text/html",
        )


def _json(content: dict[str, Any]) -> Response:
    return Response(json.dumps(content), headers=_COMMON, media_type="application/json")


async def _unreachable(_request: Request, why: Exception) -> Response:
    body = refusal(f"the inbox: {why}", int(ErrorCode.EXCEPTION))
    return Response(body, 502, headers=_COMMON, media_type="application/json")

"""Where the demo page and what it asks for are found at the HTTP door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from producer.api.body import NotOurs, purpose_in, read, text_in
from producer.api.connection import refusal
from producer.api.context import Api
from producer.api.demo.code_life import CodeLife
from producer.api.demo.fetch import CannotFetch
from producer.api.demo.host_check import require_local
from producer.api.demo.mailpit import Inbox
from producer.api.demo.progress import Answer, RequestProgress
from producer.api.demo.task_events import TaskEvents
from producer.contract import ErrorCode

_PAGE: Final = Path(__file__).parent / "page"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FREE: Final = frozenset({"/", "/page/"})  # no key: the page itself holds nothing, and asks for a key
# Scripts, styles and pictures of the page's own, and a frame for the mail; nothing inline, nothing from elsewhere.
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
# A reverse proxy that gathers an answer before it passes it on would spoil this one: nginx looks at the last header.
_STREAM: Final[dict[str, Any]] = {
    "headers": {**_COMMON, "X-Accel-Buffering": "no"},
    "media_type": "application/x-ndjson",
}


def add(app: FastAPI, api: Api) -> frozenset[str]:
    """Add the page and its parts to the door; the paths that need no key."""
    settings = api.settings
    inbox = Inbox(settings.demo_inbox) if settings.demo_inbox else None
    data = APIRouter(dependencies=[] if settings.api_keys else [Depends(require_local)])
    _add_page(app)
    _add_asking(data, api)
    _add_inbox(data, inbox)
    app.include_router(data)
    return FREE


def _add_page(app: FastAPI) -> None:
    headers = {**_COMMON, "Content-Security-Policy": _PAGE_POLICY}
    # Read once: what is served is what is here, whatever a path looks like.
    files = {each.name: (each.read_bytes(), _TYPES[each.suffix]) for each in _PAGE.iterdir() if each.suffix in _TYPES}

    async def page() -> Response:
        return _file("index.html")

    async def part(name: str) -> Response:
        return _file(name)

    def _file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        content, kind = files[name]
        return Response(content, headers=headers, media_type=kind)

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/page/{name}", part, methods=["GET", "HEAD"], include_in_schema=False)


def _add_asking(app: APIRouter, api: Api) -> None:
    settings = api.settings
    task_events, code_life = TaskEvents(settings, api.redis), CodeLife(settings, api.redis)
    api.closing += [task_events.close, code_life.close]

    @app.get("/demo/facts", include_in_schema=False)
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
            }
        )

    @app.post("/demo/request", include_in_schema=False)
    async def request(request: Request) -> Response:
        """As /get_varifycode, with the way of the request as JSON lines; the last one has the error."""
        progress = RequestProgress(task_events, api.readiness)
        try:
            given = await read(request)
            email, purpose = text_in(given, "email"), purpose_in(given)
        except NotOurs:
            return Response(_line({"station": "reply", "at": 0.0, "error": int(ErrorCode.ERROR_JSON)}), **_STREAM)

        async def ask(observer: RequestProgress) -> Answer:
            error = await api.request("http", email, purpose=purpose, locale=given.get("locale"), observer=observer)
            observer.answered()
            life = await code_life.left(email, purpose) if error is ErrorCode.SUCCESS else None
            return {"error": int(error), **({} if life is None else {"life": life})}

        return StreamingResponse((_line(each) async for each in progress.lines(ask)), **_STREAM)


def _add_inbox(app: APIRouter, inbox: Inbox | None) -> None:
    def there() -> Inbox:
        if inbox is None:
            raise HTTPException(404, "there is no inbox to look at: VERIFY_DEMO_INBOX is not set")
        return inbox

    @app.get("/demo/inbox", include_in_schema=False)
    async def mails() -> Response:
        """The newest mails."""
        try:
            return _json({"mails": await there().mails()})
        except CannotFetch as exc:
            return _away(exc)

    @app.get("/demo/inbox/{mail_id}", include_in_schema=False)
    async def mail(mail_id: str) -> Response:
        """One mail."""
        try:
            return _json(await there().mail(mail_id))
        except CannotFetch as exc:
            return _away(exc)

    @app.get("/page/mail/{name}", include_in_schema=False)
    async def view(name: str) -> Response:
        """A mail's HTML, for a frame. It needs no key, which a frame could not bring: its name is one."""
        html = there().view(name)
        if html is None:
            raise HTTPException(404)
        return Response(
            html.encode(errors="replace"),
            headers={**_COMMON, "Content-Security-Policy": _MAIL_POLICY},
            media_type="text/html",
        )


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _json(content: dict[str, Any]) -> Response:
    return Response(json.dumps(content), headers=_COMMON, media_type="application/json")


def _away(why: CannotFetch) -> Response:
    return Response(
        refusal(f"the inbox: {why}", int(ErrorCode.EXCEPTION)), 502, headers=_COMMON, media_type="application/json"
    )

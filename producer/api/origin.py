"""Keeps web pages elsewhere away from an API that asks for no key."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from producer.api.http_connection import refusal

_LONGEST_HOST: Final = 262  # a name of 253 characters, and ports
_OURS: Final = frozenset({b"same-origin", b"none"})  # none: typed in, or opened from a bookmark

_HOST_ONCE: Final = "a request names its Host once"
_FOREIGN_HOST: Final = (
    "without keys, the Host must be localhost or an IP address: ask for 127.0.0.1, or set VERIFY_API_KEYS,"
    " or VERIFY_ALLOW_PLAINTEXT=1 behind a proxy or in a container"
)
_FOREIGN_ORIGIN: Final = "without keys, no page of another origin may ask: ask from your server, or set VERIFY_API_KEYS"


class OriginCheck:
    """Refuses a request without a Host, or with several; and, where there are no keys, what a foreign page sends.

    A page elsewhere can post to 127.0.0.1 from the browser of whoever visits it; the browser says so in Sec-Fetch-Site
    and Origin. A site can also point a name of its own at 127.0.0.1 and read all that is answered; that name is Host.
    """

    def __init__(self, app: ASGIApp, *, keys: bool, any_host: bool, local: tuple[str, ...]) -> None:
        """`any_host`: Host may be any name, except for paths that begin with one of `local`."""
        self._app = app
        self._keys = keys
        self._any_host = any_host
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(scope) if scope["type"] == "http" else None
        if refused is None:
            await self._app(scope, receive, send)
        else:
            status, why = refused
            await Response(refusal(why), status, media_type="application/json")(scope, receive, send)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the reason if the request is refused; else None."""
        host = origin = site = None
        for name, value in scope["headers"]:
            if name == b"host":
                if host is not None:
                    return 400, _HOST_ONCE
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        # Old health checks speak HTTP/1.0, which need not name one; browsers do not.
        if host is None and scope["http_version"] != "1.0":
            return 400, _HOST_ONCE
        if self._keys:
            return None
        if host is not None and not _is_local(host) and (not self._any_host or scope["path"].startswith(self._local)):
            return 403, _FOREIGN_HOST
        if (origin is not None or site is not None) and _is_foreign(origin, site, host) and not _is_link(scope):
            return 403, _FOREIGN_ORIGIN
        return None


def _is_local(host: bytes) -> bool:
    return len(host) <= _LONGEST_HOST and _names_this_host(host)


@lru_cache(256)
def _names_this_host(host: bytes) -> bool:
    try:
        name = (urlsplit(f"//{host.decode('ascii')}").hostname or "").removesuffix(".")
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_foreign(origin: bytes | None, site: bytes | None, host: bytes | None) -> bool:
    if site is not None:  # a page cannot set it, and it holds behind a proxy that changes Host
        return site not in _OURS
    return origin is not None and (host is None or origin.lower().partition(b"://")[2] != host.lower())


def _is_link(scope: Scope) -> bool:
    """Whether somebody follows a link to us: no GET changes anything, and the page with the link reads no answer."""
    headers = dict(scope["headers"])
    asked = headers.get(b"sec-fetch-mode"), headers.get(b"sec-fetch-dest")
    return scope["method"] == "GET" and asked == (b"navigate", b"document")

"""By which names the demo page's data may be asked for, where no key guards them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request
from starlette.exceptions import HTTPException


async def require_local(request: Request) -> None:
    """Raises `HTTPException` unless the request was made to `localhost` or to an address.

    A page of any site may let its own name lead to this door, 127.0.0.1 say, and then read, in the browser of whoever
    looks at it, all that the door answers: mails, with the codes in them.
    """
    if not is_local(request.headers.get("host", "")):
        raise HTTPException(403, "ask for 127.0.0.1 or localhost, or set VERIFY_API_KEYS")


def is_local(host: str) -> bool:
    """Whether a `Host` header has an address, or a name that leads nowhere else."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""How a connection to a relay begins: TCP, TLS, banner, EHLO, STARTTLS, AUTH."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING, Final

from worker.mail.errors import MailError, RelayUnavailable, Step, classify

if TYPE_CHECKING:
    import ssl

    from producer.setting_types import RelayURL
    from worker.mail.responses import Reply
    from worker.mail.smtp import Connection

_DONE: Final = 2  # first digits of the replies that let a dialogue go on
_MORE: Final = 3


async def establish(connection: Connection, url: RelayURL, tls: ssl.SSLContext | None, deadline: float) -> None:
    """Make `connection` ready for transactions by `deadline` (loop time), or drop it.

    `tls` is used unless the scheme is smtp. Raises `MailError`: mostly `RelayUnavailable`, `RelayBusy` on a 421.
    """
    try:
        async with asyncio.timeout_at(deadline) as connection.opening:
            await _establish(connection, url, tls)
            if connection.closed:  # it took its leave together with its last reply
                raise RelayUnavailable  # noqa: TRY301 - as what `_establish` raises
    except BaseException as exc:
        connection.abort()
        # A MailError may be an OSError, too.
        if isinstance(exc, OSError | UnicodeError) and not isinstance(exc, MailError):
            raise RelayUnavailable from exc
        raise
    finally:
        connection.opening = None


async def _establish(connection: Connection, url: RelayURL, tls: ssl.SSLContext | None) -> None:
    implicit = tls if url.scheme == "smtps" else None
    # asyncio itself sets TCP_NODELAY.
    await connection.loop.create_connection(lambda: connection, url.host, url.port, ssl=implicit)
    await _say(connection, Step.BANNER, b"")
    await _ehlo(connection)
    if url.scheme == "smtp+starttls":
        if b"STARTTLS" not in connection.offers or tls is None or connection.transport is None:
            raise RelayUnavailable
        connection.deafen()
        await _say(connection, Step.STARTTLS, b"STARTTLS")
        transport = await connection.loop.start_tls(connection.transport, connection, tls, server_hostname=url.host)
        if transport is None:
            raise RelayUnavailable
        connection.listen(transport)
        await _ehlo(connection)
    if url.user is not None and url.password is not None:
        await _authenticate(connection, url.user, url.password)


async def _say(connection: Connection, step: Step, line: bytes, first_digit: int = _DONE) -> Reply:
    reply = await connection.command(line)
    if reply.code // 100 != first_digit:
        raise classify(step, reply.code, reply.enhanced)
    return reply


async def _ehlo(connection: Connection) -> None:
    # An address literal is always a valid name (RFC 5321, 4.1.4), and finding it asks no DNS.
    host = connection.transport.get_extra_info("sockname")[0] if connection.transport else "127.0.0.1"
    host, _, _ = host.partition("%")
    name = f"[IPv6:{host}]" if ":" in host else f"[{host}]"
    reply = await _say(connection, Step.EHLO, b"EHLO " + name.encode())
    for line in reply.lines[1:]:
        # Some relays still say "AUTH=LOGIN".
        keyword, *parameters = line.upper().replace(b"=", b" ").split() or [b""]
        connection.offers.setdefault(keyword, set()).update(parameters)


async def _authenticate(connection: Connection, user: str, password: str) -> None:
    mechanisms = connection.offers.get(b"AUTH", set())
    if b"PLAIN" in mechanisms:
        await _say(connection, Step.AUTH, b"AUTH PLAIN " + b64encode(f"\0{user}\0{password}".encode()))
    elif b"LOGIN" in mechanisms:
        await _say(connection, Step.AUTH, b"AUTH LOGIN", _MORE)
        await _say(connection, Step.AUTH, b64encode(user.encode()), _MORE)
        await _say(connection, Step.AUTH, b64encode(password.encode()))
    else:
        raise RelayUnavailable

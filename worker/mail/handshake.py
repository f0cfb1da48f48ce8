"""Makes a new SMTP connection ready for mails: TCP, TLS, banner, EHLO, STARTTLS, AUTH."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING, Final

from worker.mail.errors import RelayUnavailable, Step, classify

if TYPE_CHECKING:
    import ssl

    from producer.setting_types import RelayURL
    from worker.mail.responses import Response
    from worker.mail.smtp import SmtpConnection

_INTERMEDIATE: Final = 3  # first digit of a reply that asks for more (RFC 5321, 4.2.1)


async def establish(connection: SmtpConnection, url: RelayURL, tls: ssl.SSLContext | None, deadline: float) -> None:
    """Connect and log in by `deadline` (loop time). On failure the connection is dropped.

    `tls` is used unless the scheme is smtp. Raises `MailError`, mostly `RelayUnavailable`; `RelayBusy` on a 421.
    """
    try:
        async with asyncio.timeout_at(deadline):
            implicit = tls if url.scheme == "smtps" else None
            # asyncio sets TCP_NODELAY.
            await connection.loop.create_connection(lambda: connection, url.host, url.port, ssl=implicit)
            await _command(connection, Step.BANNER, b"")
            await _ehlo(connection)
            if url.scheme == "smtp+starttls":
                await _starttls(connection, url.host, tls)
                await _ehlo(connection)
            if url.user is not None and url.password is not None:
                await _authenticate(connection, url.user, url.password)
            if connection.closed:  # the last reply came with a goodbye
                raise RelayUnavailable(step=Step.AUTH)  # noqa: TRY301 - handled as what the others raise
    except BaseException as exc:
        connection.abort()
        if isinstance(exc, OSError | UnicodeError):
            raise RelayUnavailable(step=connection.handshake_step) from exc
        raise


async def _command(connection: SmtpConnection, step: Step, line: bytes, first_digit: int = 2) -> Response:
    response = await connection.command(step, line)
    if response.code // 100 != first_digit:
        raise classify(step, response.code, response.enhanced)
    return response


async def _ehlo(connection: SmtpConnection) -> None:
    # An address literal is always a valid name (RFC 5321, 4.1.4) and needs no DNS lookup.
    host = connection.transport.get_extra_info("sockname")[0] if connection.transport else "127.0.0.1"
    host, _, _ = host.partition("%")
    name = f"[IPv6:{host}]" if ":" in host else f"[{host}]"
    response = await _command(connection, Step.EHLO, b"EHLO " + name.encode())
    for line in response.lines[1:]:
        # Some relays still say "AUTH=LOGIN".
        keyword, *parameters = line.upper().replace(b"=", b" ").split() or [b""]
        connection.extensions.setdefault(keyword, set()).update(parameters)


async def _starttls(connection: SmtpConnection, host: str, tls: ssl.SSLContext | None) -> None:
    if b"STARTTLS" not in connection.extensions or tls is None or connection.transport is None:
        raise RelayUnavailable(step=Step.STARTTLS)
    connection.discard_further_input()
    await _command(connection, Step.STARTTLS, b"STARTTLS")
    transport = await connection.loop.start_tls(connection.transport, connection, tls, server_hostname=host)
    if transport is None:
        raise RelayUnavailable(step=Step.STARTTLS)
    connection.continue_over(transport)


async def _authenticate(connection: SmtpConnection, user: str, password: str) -> None:
    mechanisms = connection.extensions.get(b"AUTH", set())
    if b"PLAIN" in mechanisms:
        await _command(connection, Step.AUTH, b"AUTH PLAIN " + b64encode(f"\0{user}\0{password}".encode()))
    elif b"LOGIN" in mechanisms:
        await _command(connection, Step.AUTH, b"AUTH LOGIN", _INTERMEDIATE)
        await _command(connection, Step.AUTH, b64encode(user.encode()), _INTERMEDIATE)
        await _command(connection, Step.AUTH, b64encode(password.encode()))
    else:
        raise RelayUnavailable(step=Step.AUTH)

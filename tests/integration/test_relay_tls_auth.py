"""TLS, STARTTLS, AUTH and SMTPUTF8, mostly against aiosmtpd."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme
from aiosmtpd.smtp import SMTP, AuthResult
from support.relays import ENVELOPE, UTF8_ENVELOPE, outcome, pool_of, rig
from support.smtp_server import HOST, Act, ScriptedServer, Silence

from producer.setting_types import RelayURL
from worker.mail.errors import MailError, MessageDeferred, RelayUnavailable, Smtputf8Unsupported
from worker.mail.message import Envelope

USER, PASSWORD = "用户@example.com", "pä:ss /wörd"
CA = trustme.CA()


def context(*names: str, expired: bool = False) -> ssl.SSLContext:
    """A server's TLS context with a certificate for `names`."""
    long_ago = datetime.now(UTC) - timedelta(days=9)
    until = long_ago + timedelta(days=1 if expired else 99)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(*names, not_before=long_ago, not_after=until).configure_cert(server)
    return server


def trusting() -> ssl.SSLContext:
    client = ssl.create_default_context()
    CA.configure_trust(client)
    return client


class Inbox:
    """An aiosmtpd handler that keeps all mails."""

    def __init__(self) -> None:
        self.envelopes: list[Any] = []
        self.tls: list[bool] = []

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 aiosmtpd's name
        self.envelopes.append(envelope)
        self.tls.append(session.ssl is not None)
        return "250 2.0.0 ok"


def authenticator(_server: Any, _session: Any, _envelope: Any, mechanism: str, data: Any) -> AuthResult:
    known = (data.login, data.password) == (USER.encode(), PASSWORD.encode())
    return AuthResult(success=known, handled=False, auth_data=mechanism)


@asynccontextmanager
async def aiosmtpd(
    inbox: Inbox, scheme: str, tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[RelayURL]:
    def factory() -> SMTP:
        starttls = tls if scheme == "smtp+starttls" else None
        return SMTP(inbox, tls_context=starttls, require_starttls=starttls is not None, hostname="test", **options)

    implicit = tls if scheme == "smtps" else None
    server = await asyncio.get_running_loop().create_server(factory, HOST, 0, ssl=implicit)
    try:
        yield RelayURL(scheme, HOST, server.sockets[0].getsockname()[1], None, None)
    finally:
        server.close()


async def send_to(url: RelayURL, tls: ssl.SSLContext | None = None, envelope: Envelope = ENVELOPE) -> MailError | None:
    """Send once with a pool of its own; the outcome."""
    pool = pool_of(url, tls=tls)
    try:
        return await outcome(pool, envelope)
    finally:
        await pool.close()
        assert pool.open_connections == 0


@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
async def test_a_mail_goes_over_tls(scheme: str) -> None:
    inbox = Inbox()
    async with aiosmtpd(inbox, scheme, context(HOST)) as url:
        assert await send_to(url, trusting()) is None
    assert inbox.envelopes[0].content == ENVELOPE.content.replace(b"\r\n..", b"\r\n.")
    # aiosmtpd reports STARTTLS only; with implicit TLS it accepts nothing else.
    assert inbox.tls == [scheme == "smtp+starttls"]


@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
@pytest.mark.parametrize("bad", ["name", "expired", "unknown authority"])
async def test_nothing_is_sent_to_a_bad_certificate(scheme: str, bad: str) -> None:
    inbox = Inbox()
    server = context("mail.example.com" if bad == "name" else HOST, expired=bad == "expired")
    async with aiosmtpd(inbox, scheme, server) as url:
        error = await send_to(url, None if bad == "unknown authority" else trusting())
    assert type(error) is RelayUnavailable
    assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
    assert not inbox.envelopes


REFUSALS: list[dict[str, Act | list[Act]] | None] = [
    None,  # not offered
    {"starttls": "454 4.7.0 not now"},
    {"starttls": "502 5.5.1 no"},
    {"starttls": "220 go"},  # and then no TLS
    {"starttls": Silence()},
]


@pytest.mark.parametrize("script", REFUSALS, ids=str)
async def test_starttls_never_falls_back_to_plain(script: dict[str, Act | list[Act]] | None) -> None:
    offers = ("PIPELINING", "AUTH PLAIN") if script is None else ("STARTTLS", "AUTH PLAIN")
    options: dict[str, Any] = {"scheme": "smtp+starttls", "login": ("u", "p"), "connect_timeout": 0.3}
    async with rig(script, offers=offers, **options) as (server, pool):
        assert type(await outcome(pool)) is RelayUnavailable
        assert not [line for line in server.commands if line.startswith(("AUTH", "MAIL"))]


async def test_a_silent_tls_handshake_times_out() -> None:
    async with rig({"banner": Silence()}, scheme="smtps", connect_timeout=0.2) as (_, pool):
        assert type(await outcome(pool)) is RelayUnavailable


async def test_replies_before_tls_do_not_count() -> None:
    injected = b"220 go\r\n250-evil\r\n250 AUTH PLAIN\r\n235 in\r\n250 ok\r\n250 ok\r\nnonsense"
    async with ScriptedServer({"starttls": injected}, offers=("STARTTLS", "EVIL"), tls=context(HOST)) as server:
        assert await send_to(server.url("smtp+starttls"), trusting()) is None
        assert [mail.content for mail in server.mails] == [ENVELOPE.content]
        assert [line.split()[0] for line in server.commands].count("EHLO") == 2


async def test_extensions_are_those_offered_after_tls() -> None:
    script: dict[str, Act | list[Act]] = {"ehlo": ["250-x\r\n250-STARTTLS\r\n250 SMTPUTF8", "250-x\r\n250 HELP"]}
    async with ScriptedServer(script, tls=context(HOST)) as server:
        assert type(await send_to(server.url("smtp+starttls"), trusting(), UTF8_ENVELOPE)) is Smtputf8Unsupported


@pytest.mark.parametrize("excluded", [[], ["PLAIN"], ["LOGIN"]], ids=["both", "LOGIN", "PLAIN"])
async def test_auth_uses_what_the_relay_offers(excluded: list[str]) -> None:
    inbox = Inbox()
    options = {"authenticator": authenticator, "auth_required": True, "auth_exclude_mechanism": excluded}
    async with aiosmtpd(inbox, "smtp+starttls", context(HOST), **options) as url:
        assert await send_to(url._replace(user=USER, password=PASSWORD), trusting()) is None
        assert len(inbox.envelopes) == 1
        wrong = await send_to(url._replace(user=USER, password="wrong"), trusting())
        assert (type(wrong), wrong and wrong.code) == (RelayUnavailable, 535)
        missing = await send_to(url, trusting())
        assert (type(missing), missing and missing.code) == (RelayUnavailable, 530)
        assert len(inbox.envelopes) == 1


@pytest.mark.parametrize("offer", ["AUTH CRAM-MD5", "AUTH", "HELP"])
async def test_without_a_known_mechanism_nothing_is_sent(offer: str) -> None:
    async with rig(offers=(offer,), login=("u", "p")) as (server, pool):
        assert type(await outcome(pool)) is RelayUnavailable
        assert not server.mails


async def test_the_old_form_of_offering_auth_is_understood() -> None:
    async with rig(offers=("AUTH=LOGIN",), login=("u", "p")) as (server, pool):
        assert await outcome(pool) is None
        said = server.commands[server.commands.index("AUTH LOGIN") + 1 :][:2]
        assert [base64.b64decode(line) for line in said] == [b"u", b"p"]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        *((f"{code} no", RelayUnavailable) for code in (334, 500, 504, 530, 534, 535, 538, 554)),
        ("454 4.7.0 later", MessageDeferred),
        ("421 4.7.0 too many", MessageDeferred),
    ],
)
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
async def test_every_reply_to_auth(mechanism: str, reply: str, kind: type[MailError]) -> None:
    async with rig({"auth": reply}, offers=(f"AUTH {mechanism}",), login=("user@example.com", "secret")) as (_, pool):
        error = await outcome(pool)
        assert type(error) is kind
        assert not any(word in str(error) for word in ("user", "secret"))


async def test_smtputf8_is_used_when_needed_and_offered() -> None:
    content = "Subject: x\r\nTo: 用户@example.com\r\n\r\nhello\r\n".encode()
    wants = Envelope("no-reply@example.com", "用户@example.com", True, content)
    inbox = Inbox()
    async with aiosmtpd(inbox, "smtp", enable_SMTPUTF8=True) as url:
        assert await send_to(url, None, wants) is None
        assert inbox.envelopes[0].rcpt_tos == ["用户@example.com"]
        assert set(inbox.envelopes[0].mail_options) == {"SMTPUTF8", "BODY=8BITMIME"}
        assert await send_to(url) is None
        assert inbox.envelopes[1].mail_options == []
    async with aiosmtpd(inbox, "smtp", enable_SMTPUTF8=False) as url:
        assert type(await send_to(url, None, wants)) is Smtputf8Unsupported
    assert len(inbox.envelopes) == 2


async def test_a_closed_port_is_an_unavailable_relay() -> None:
    async with ScriptedServer() as server:
        url = server.url()
    error = await send_to(url)
    assert type(error) is RelayUnavailable
    assert isinstance(error.__cause__, ConnectionRefusedError)
    assert type(await send_to(url._replace(host="x" * 64 + ".invalid"))) is RelayUnavailable

"""Every reply class at every step, with and without PIPELINING, against a scripted server on a real socket."""

from __future__ import annotations

import asyncio

import pytest
from support.relays import asyncio_test, outcome
from support.smtp_server import Act, Drop, Last, ScriptedServer, Silence, Slowly

from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RecipientRejected,
    RelayUnavailable,
    SendAborted,
)
from worker.mail.message import Envelope
from worker.mail.pool import SmtpPool

ENVELOPE = Envelope("no-reply@example.com", "alice@example.com", False, b"Subject: code\r\n\r\n..stuffed\r\n")
CONTENT_SEEN = ("content", "dot")  # steps that come when the content is on its way
PIPELINING = pytest.mark.parametrize("offers", [("PIPELINING", "8BITMIME"), ("8BITMIME",)], ids=["pipelined", "plain"])


def make(server: ScriptedServer, **options: float) -> SmtpPool:
    options = {"connections": 4, "connect_timeout": 2, "send_timeout": 2, **options}
    return SmtpPool(server.url(), **options)  # type: ignore[arg-type]


async def attempt(relay: SmtpPool, calls: list[str] | None = None, *, wanted: bool = True) -> MailError | None:
    """Send once; the outcome."""

    def before_data() -> bool:
        if calls is not None:
            calls.append("before_dot")
        return wanted

    return await outcome(relay, ENVELOPE, wanted=before_data)


OUTCOMES: list[tuple[str, Act, type[MailError]]] = [
    *(
        (step, "554 5.7.1 alice@example.com: no", MessageRejected)
        for step in ("banner", "ehlo", "mail", "rcpt", "data")
    ),
    ("dot", "554 5.7.1 no", MessageRejected),
    *((step, "550 alice@example.com unknown", MessageRejected) for step in ("mail", "data", "dot")),
    *((step, "550 5.1.1 alice@example.com unknown", RecipientRejected) for step in ("mail", "rcpt", "data", "dot")),
    *(("rcpt", f"{code} alice@example.com unknown", RecipientRejected) for code in (550, 551, 553)),
    ("rcpt", "552 full", MessageRejected),
    ("rcpt", "550-5.7.1 no\r\n550 5.7.1 never", MessageRejected),
    *((step, "451 4.3.0 later", MessageDeferred) for step in ("banner", "ehlo", "mail", "rcpt", "data", "dot")),
    *((step, "421 4.3.2 closing", MessageDeferred) for step in ("banner", "ehlo", "mail", "rcpt", "data", "dot")),
    *((step, Last("421 closing"), MessageDeferred) for step in ("banner", "ehlo", "mail", "rcpt", "data", "dot")),
    *((step, "530 5.7.0 authenticate", RelayUnavailable) for step in ("mail", "rcpt", "data", "dot")),
    *((step, Drop(), RelayUnavailable) for step in ("banner", "ehlo", "mail", "rcpt", "data")),
    *((step, b"hello\r\n", RelayUnavailable) for step in ("banner", "ehlo", "mail", "rcpt", "data")),
    *((step, "250 " + "x" * 3000, RelayUnavailable) for step in ("banner", "ehlo", "mail", "rcpt", "data")),
    *((step, "250-a\r\n251 b", RelayUnavailable) for step in ("banner", "ehlo", "mail", "rcpt", "data")),
    *((step, "354 go", RelayUnavailable) for step in ("banner", "ehlo", "mail", "rcpt")),
    ("data", "250 ok", RelayUnavailable),
    ("data", "354 go\r\n250 2.0.0 already accepted", RelayUnavailable),
    ("data", b"354 go\r\n25", RelayUnavailable),
    ("content", Drop(), AcceptanceUnknown),
    ("dot", Drop(), AcceptanceUnknown),
    ("dot", b"hello\r\n", AcceptanceUnknown),
    ("dot", b"25", AcceptanceUnknown),
    ("dot", "354 go on", AcceptanceUnknown),
    ("dot", "250 " + "x" * 3000, AcceptanceUnknown),
]


def _name(value: object) -> str | None:
    return (value if isinstance(value, str) else repr(value))[:24] if isinstance(value, str | bytes | tuple) else None


@PIPELINING
@pytest.mark.parametrize(("step", "act", "kind"), OUTCOMES, ids=_name)
@asyncio_test
async def test_every_reply_class_at_every_step(
    step: str, act: Act, kind: type[MailError], offers: tuple[str, ...]
) -> None:
    calls: list[str] = []
    async with ScriptedServer({step: [act]}, offers=offers) as server:
        relay = make(server, send_timeout=0.3 if act == b"25" else 2)
        error = await attempt(relay, calls)
        assert type(error) is kind
        assert "alice" not in str(error)
        before = len(server.mails)
        assert not before or kind is AcceptanceUnknown
        assert calls == (["before_dot"] if step in CONTENT_SEEN else [])
        # Whatever happened, the next mail goes out, over this connection or a new one, and only once.
        assert await attempt(relay) is None
        assert [mail.content for mail in server.mails[before:]] == [ENVELOPE.content]
        await relay.close()
        assert relay.open_connections == 0


@PIPELINING
@pytest.mark.parametrize("step", ["banner", "ehlo", "mail", "rcpt", "data", "dot"])
@pytest.mark.parametrize("act", [Silence(), Slowly("250 " + "slow" * 30, 0.02)], ids=["silence", "slow"])
@asyncio_test
async def test_the_whole_has_one_deadline(act: Act, step: str, offers: tuple[str, ...]) -> None:
    async with ScriptedServer({step: [act]}, offers=offers) as server:
        relay = make(server, connect_timeout=0.2, send_timeout=0.2)
        started = asyncio.get_running_loop().time()
        error = await attempt(relay)
        assert asyncio.get_running_loop().time() - started < 2
        assert type(error) is (AcceptanceUnknown if step == "dot" else RelayUnavailable)
        assert await attempt(relay) is None
        await relay.close()


@pytest.mark.parametrize("step", ["mail", "rcpt", "data"])
@PIPELINING
@asyncio_test
async def test_a_refusal_keeps_the_connection(step: str, offers: tuple[str, ...]) -> None:
    async with ScriptedServer({step: ["452 4.2.2 full"]}, offers=offers) as server:
        relay = make(server)
        assert type(await attempt(relay)) is MessageDeferred
        assert await attempt(relay) is None
        assert server.connections == 1
        assert "RSET" in server.commands
        await relay.close()


@asyncio_test
async def test_data_taken_after_a_refused_recipient_is_answered_with_a_lone_dot() -> None:
    calls: list[str] = []
    script: dict[str, Act | list[Act]] = {"rcpt": ["550 5.1.1 gone"], "data": ["354 go"]}
    async with ScriptedServer(script) as server:
        relay = make(server)
        assert type(await attempt(relay, calls)) is RecipientRejected
        assert calls == []
        assert await attempt(relay) is None
        assert [mail.content for mail in server.mails] == [ENVELOPE.content]
        assert server.connections == 1
        await relay.close()


@asyncio_test
async def test_data_taken_after_a_refused_sender_ends_the_connection() -> None:
    calls: list[str] = []
    script: dict[str, Act | list[Act]] = {"mail": ["550 5.7.1 no"], "rcpt": ["250 ok"], "data": ["354 go"]}
    async with ScriptedServer(script) as server:
        relay = make(server)
        assert type(await attempt(relay, calls)) is MessageRejected
        assert calls == []
        assert await attempt(relay) is None
        assert len(server.mails) == 1
        assert server.connections == 2
        await relay.close()


@pytest.mark.parametrize("second", [Drop(), Silence(), Last("421 bye")], ids=["drop", "silence", "421"])
@asyncio_test
async def test_the_first_refusal_counts_whatever_follows(second: Act) -> None:
    async with ScriptedServer({"rcpt": ["550 5.1.1 gone"], "data": [second]}) as server:
        relay = make(server, send_timeout=0.3)
        assert type(await attempt(relay)) is RecipientRejected
        await relay.close()


@PIPELINING
@asyncio_test
async def test_an_accepted_mail_stays_accepted_whatever_follows(offers: tuple[str, ...]) -> None:
    async with ScriptedServer({"dot": ["250 2.0.0 ok\r\nnonsense", "250 ok\r\n250 ok"]}, offers=offers) as server:
        relay = make(server)
        for _ in range(3):
            assert await attempt(relay) is None
        assert server.connections == 3
        await relay.close()


@PIPELINING
@asyncio_test
async def test_a_withheld_send_writes_no_content_and_leaves_the_connection(offers: tuple[str, ...]) -> None:
    async with ScriptedServer(offers=offers) as server:
        relay = make(server)
        assert type(await attempt(relay, wanted=False)) is SendAborted
        assert await attempt(relay) is None
        assert len(server.mails) == 1
        assert server.connections == 2
        await relay.close()


@asyncio_test
async def test_the_callers_own_error_comes_back_and_nothing_is_sent() -> None:
    def before_data() -> bool:
        raise LookupError("lease")

    async with ScriptedServer() as server:
        relay = make(server)
        with pytest.raises(LookupError, match="lease"):
            await outcome(relay, ENVELOPE, wanted=before_data)
        assert await attempt(relay) is None
        assert len(server.mails) == 1
        await relay.close()


@asyncio_test
async def test_pipelined_commands_leave_in_one_write() -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hi\r\n")
        for reply in (b"250-hi\r\n250 PIPELINING\r\n", b"250 ok\r\n250 ok\r\n354 go\r\n", b"250 ok\r\n"):
            seen.append(await reader.read(65536))
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    scripted = ScriptedServer()
    scripted.port = server.sockets[0].getsockname()[1]
    relay = make(scripted)
    assert await attempt(relay) is None
    assert seen[1] == b"MAIL FROM:<no-reply@example.com>\r\nRCPT TO:<alice@example.com>\r\nDATA\r\n"
    assert seen[2] == ENVELOPE.content + b".\r\n"
    await relay.close()
    server.close()

"""Every kind of reply at every step, with and without PIPELINING, from a scripted server on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from support.relays import ENVELOPE, FOREVER, outcome, pool_of, rig, send, until
from support.smtp_server import Act, Drop, Held, Last, ScriptedServer, Silence, Slowly

from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RecipientRejected,
    RelayUnavailable,
    SendAborted,
)

Script = dict[str, Act | list[Act]]
PIPELINING = pytest.mark.parametrize("offers", [("PIPELINING", "8BITMIME"), ("8BITMIME",)], ids=["pipelined", "plain"])
HANDSHAKE = ("banner", "ehlo")
COMMANDS = ("mail", "rcpt", "data")
BEFORE_CONTENT = (*HANDSHAKE, *COMMANDS)
STEPS = (*BEFORE_CONTENT, "dot")

OUTCOMES: list[tuple[str, Act, type[MailError]]] = [
    *((step, "554 5.7.1 alice@example.com: no", MessageRejected) for step in STEPS),
    *((step, "550 alice@example.com unknown", MessageRejected) for step in ("mail", "data", "dot")),
    *((step, "550 5.1.1 alice@example.com unknown", RecipientRejected) for step in ("rcpt", "data", "dot")),
    ("mail", "550 5.1.1 alice@example.com unknown", MessageRejected),
    *((step, "553 5.1.8 alice@example.com: no such domain", MessageRejected) for step in ("mail", "rcpt")),
    *(("rcpt", f"{code} alice@example.com unknown", RecipientRejected) for code in (550, 551, 553)),
    ("rcpt", "552 full", MessageRejected),
    ("rcpt", "550-5.7.1 no\r\n550 5.7.1 never", MessageRejected),
    *((step, "451 4.3.0 later", MessageDeferred) for step in STEPS),
    *((step, "421 4.3.2 closing", MessageDeferred) for step in STEPS),
    *((step, Last("421 closing"), MessageDeferred) for step in STEPS),
    *((step, "530 5.7.0 authenticate", RelayUnavailable) for step in (*COMMANDS, "dot")),
    *((step, Drop(), RelayUnavailable) for step in BEFORE_CONTENT),
    *((step, b"hello\r\n", RelayUnavailable) for step in BEFORE_CONTENT),
    *((step, "250 " + "x" * 3000, RelayUnavailable) for step in BEFORE_CONTENT),
    *((step, "250-a\r\n251 b", RelayUnavailable) for step in BEFORE_CONTENT),
    *((step, "354 go", RelayUnavailable) for step in ("banner", "ehlo", "mail", "rcpt")),
    ("data", "250 ok", RelayUnavailable),
    ("data", "354 go\r\n250 2.0.0 already accepted", RelayUnavailable),
    ("data", b"354 go\r\n25", RelayUnavailable),
    ("content", Drop(), AcceptanceUnknown),
    ("dot", Drop(), AcceptanceUnknown),
    ("dot", b"hello\r\n", AcceptanceUnknown),
    ("dot", "354 go on", AcceptanceUnknown),
    ("dot", "250 " + "x" * 3000, AcceptanceUnknown),
]


def _name(value: object) -> str | None:
    return (value if isinstance(value, str) else repr(value))[:24] if isinstance(value, str | bytes | tuple) else None


@PIPELINING
@pytest.mark.parametrize(("step", "act", "kind"), OUTCOMES, ids=_name)
async def test_every_kind_of_reply_at_every_step(
    step: str, act: Act, kind: type[MailError], offers: tuple[str, ...]
) -> None:
    async with rig({step: [act]}, offers=offers) as (server, pool):
        answers = [True]
        error = await outcome(pool, still=answers.pop)
        assert type(error) is kind
        assert "alice" not in str(error)
        before = len(server.mails)
        assert not before or kind is AcceptanceUnknown
        assert bool(answers) == (step not in {"content", "dot"})
        # In any case the next mail is sent, over this connection or a new one, and only once.
        assert await send(pool) is None
        assert [mail.content for mail in server.mails[before:]] == [ENVELOPE.content]


@PIPELINING
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("act", [Silence(), Slowly("250 " + "slow" * 6, 0.02), b"25"], ids=["silent", "slow", "half"])
async def test_one_deadline_covers_the_whole_send(act: Act, step: str, offers: tuple[str, ...]) -> None:
    async with rig({step: [act]}, offers=offers, connect_timeout=0.2, send_timeout=0.2) as (_, pool):
        answers = [True]
        assert type(await outcome(pool, still=answers.pop)) is (RelayUnavailable if answers else AcceptanceUnknown)
        pool._connect_timeout = pool._send_timeout = FOREVER
        assert await send(pool) is None


@pytest.mark.parametrize("step", COMMANDS)
@PIPELINING
async def test_a_refused_mail_keeps_the_connection(step: str, offers: tuple[str, ...]) -> None:
    async with rig({step: ["452 4.2.2 full"]}, offers=offers) as (server, pool):
        assert type(await send(pool)) is MessageDeferred
        assert await send(pool) is None
        assert server.connections == 1
        assert "RSET" in server.commands


@pytest.mark.parametrize(
    ("script", "kind", "connections"),
    [
        # Answered with a lone dot
        ({"rcpt": ["550 5.1.1 gone"], "data": ["354 go"]}, RecipientRejected, 1),
        ({"mail": ["550 5.7.1 no"], "rcpt": ["250 ok"], "data": ["354 go"]}, MessageRejected, 2),
    ],
)
async def test_data_accepted_after_a_refusal_sends_nothing(
    script: Script, kind: type[MailError], connections: int
) -> None:
    async with rig(script) as (server, pool):
        answers = [True]
        assert type(await outcome(pool, still=answers.pop)) is kind
        assert answers
        assert await send(pool) is None
        assert [mail.content for mail in server.mails] == [ENVELOPE.content]
        assert server.connections == connections


@pytest.mark.parametrize("second", [Drop(), Last("421 bye"), "554 5.5.1 no"], ids=["drop", "421", "554"])
async def test_the_first_refusal_counts_whatever_follows(second: Act) -> None:
    async with rig({"rcpt": ["550 5.1.1 gone"], "data": [second]}) as (_, pool):
        assert type(await send(pool)) is RecipientRejected


async def test_the_first_refusal_counts_even_if_the_rest_is_silence() -> None:
    async with rig({"rcpt": ["550 5.1.1 gone"], "data": [Silence()]}, send_timeout=0.3) as (server, pool):
        error = await send(pool)
        assert type(error) is (RecipientRejected if "DATA" in server.commands else RelayUnavailable)


@PIPELINING
async def test_an_accepted_mail_stays_accepted_whatever_follows(offers: tuple[str, ...]) -> None:
    async with rig({"dot": ["250 2.0.0 ok\r\nnonsense", "250 ok\r\n250 ok"]}, offers=offers) as (server, pool):
        for _ in range(3):
            assert await send(pool) is None
        assert server.connections == 3


@PIPELINING
async def test_an_aborted_send_writes_no_content_and_drops_the_connection(offers: tuple[str, ...]) -> None:
    async with rig(offers=offers) as (server, pool):
        assert type(await send(pool, wanted=lambda: False)) is SendAborted
        assert await send(pool) is None
        assert len(server.mails) == 1
        assert server.connections == 2


@PIPELINING
async def test_the_caller_is_asked_while_the_relay_answers_data(offers: tuple[str, ...]) -> None:
    held = Held("354 go ahead")
    asked: list[Callable[[bool], None]] = []
    async with rig({"data": [held]}, offers=offers) as (server, pool):
        sending = asyncio.create_task(outcome(pool, before_data=asked.append))
        await until(held.reached.is_set)
        assert len(asked) == 1
        asked[0](True)
        await asyncio.sleep(0.05)
        assert not sending.done()
        held.release.set()
        assert await sending is None
        assert len(server.mails) == 1


@PIPELINING
async def test_the_content_waits_for_the_callers_answer(offers: tuple[str, ...]) -> None:
    asked: list[Callable[[bool], None]] = []
    async with rig(offers=offers) as (server, pool):
        sending = asyncio.create_task(outcome(pool, before_data=asked.append))
        await until(lambda: "DATA" in server.commands)
        await asyncio.sleep(0.1)
        assert (server.dotted, sending.done()) == ([], False)
        asked[0](True)
        assert await sending is None


@PIPELINING
async def test_a_caller_that_does_not_answer_costs_the_mail_and_not_the_relay(offers: tuple[str, ...]) -> None:
    async with rig(offers=offers, send_timeout=0.3) as (server, pool):
        assert type(await outcome(pool, before_data=lambda _: None)) is SendAborted
        assert not server.dotted
        pool._send_timeout = FOREVER
        assert await send(pool) is None


async def test_a_refusal_counts_even_if_the_caller_then_says_no() -> None:
    held = Held("554 5.5.1 no recipients")
    asked: list[Callable[[bool], None]] = []
    async with rig({"rcpt": ["550 5.1.1 gone"], "data": [held]}) as (_, pool):
        sending = asyncio.create_task(outcome(pool, before_data=asked.append))
        await until(held.reached.is_set)
        await asyncio.sleep(0.1)
        asked[0](False)
        assert type(await sending) is RecipientRejected
        held.release.set()


async def test_a_mail_that_met_a_stale_connection_asks_again() -> None:
    asked: list[Callable[[bool], None]] = []
    async with rig() as (server, pool):
        assert await send(pool) is None
        server.script = {"mail": [Drop()]}
        sending = asyncio.create_task(outcome(pool, before_data=asked.append))
        await until(lambda: len(asked) == 2 and server.commands[-1] == "DATA")
        asked[0](True)
        await asyncio.sleep(0.05)
        assert len(server.dotted) == 1
        asked[1](True)
        assert await sending is None
        assert len(server.mails) == 2


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
    pool = pool_of(scripted)
    assert await send(pool) is None
    assert seen[1] == b"MAIL FROM:<no-reply@example.com>\r\nRCPT TO:<alice@example.com>\r\nDATA\r\n"
    assert seen[2] == ENVELOPE.content + b".\r\n"
    await pool.close()
    server.close()

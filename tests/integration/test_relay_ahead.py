"""A waiting mail's commands leave with the content of the mail before it, and each mail has an outcome of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.relays import FOREVER, UTF8_ENVELOPE, outcome, rig, send, until
from support.smtp_server import Act, Drop, Held, Last, ScriptedServer, Silence

from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RecipientRejected,
    SendAborted,
    SendCancelled,
    Smtputf8Unsupported,
)
from worker.mail.pool import SmtpPool

Go = Callable[[bool], None]


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is late, except where a test says so."""
    monkeypatch.setattr("worker.mail.smtp._PROMPT", FOREVER)
    monkeypatch.setattr("worker.mail.pool._AHEAD_SECONDS", FOREVER)


async def send_two(pool: SmtpPool, **second: Any) -> tuple[asyncio.Task[MailError | None], ...]:
    """Begin two sends on the one connection, which has answered before; `second`: how to send bob's."""
    assert await send(pool, "first") is None
    return asyncio.create_task(send(pool)), asyncio.create_task(send(pool, "bob", **second))


def contents(server: ScriptedServer, name: str) -> int:
    """How often a content for `name` arrived with its final dot."""
    return [mail.recipient for mail in server.dotted].count(f"{name}@example.com")


async def test_the_next_mail_is_announced_while_a_content_is_on_its_way() -> None:
    held, asked = Held("250 ok"), list[Go]()
    async with rig({"dot": ["250 ok", held]}, connections=1) as (server, pool):
        first, second = await send_two(pool, before_data=asked.append)
        await until(lambda: bool(asked) and held.reached.is_set())
        assert not first.done()
        held.release.set()
        assert await first is None
        assert (contents(server, "bob"), second.done()) == (0, False)
        asked[0](True)
        assert await second is None
        assert (len(asked), server.connections, contents(server, "bob")) == (1, 1, 1)


async def test_many_mails_leave_one_behind_the_other() -> None:
    async with rig(connections=2) as (server, pool):
        assert await asyncio.gather(*(send(pool, f"user{number}") for number in range(100))) == [None] * 100
        assert sorted(mail.recipient for mail in server.dotted) == sorted(f"user{n}@example.com" for n in range(100))
        assert server.connections == 2


@pytest.mark.parametrize(("reply", "kind"), [("451 4.3.0 later", MessageDeferred), ("554 5.7.1 spam", MessageRejected)])
async def test_a_refused_content_does_not_concern_the_next_mail(reply: str, kind: type[MailError]) -> None:
    async with rig({"dot": ["250 ok", reply]}, connections=1) as (server, pool):
        first, second = await send_two(pool)
        assert (type(await first), await second) == (kind, None)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("act", "kind"), [("421 4.3.2 closing", MessageDeferred), (Drop(), AcceptanceUnknown)], ids=["421", "drop"]
)
async def test_a_connection_that_ends_at_a_content_takes_no_other_mail_along(act: Act, kind: type[MailError]) -> None:
    async with rig({"dot": ["250 ok", act]}, connections=1) as (server, pool):
        first, second = await send_two(pool)
        assert (type(await first), await second) == (kind, None)
        assert (server.connections, contents(server, "alice"), contents(server, "bob")) == (2, 1, 1)


@pytest.mark.parametrize("data", ["354 go ahead", "503 5.5.1 no recipient"])
async def test_a_recipient_refused_ahead_is_that_mails_outcome(data: str) -> None:
    async with rig(connections=1) as (server, pool):
        server.scripts["bob@example.com"] = {"rcpt": "550 5.1.1 unknown"}
        server.scripts[""] = {"data": data}
        first, second = await send_two(pool)
        assert (await first, type(await second)) == (None, RecipientRejected)
        assert await send(pool, "carol") is None
        assert [mail.recipient for mail in server.mails] == [f"{n}@example.com" for n in ("first", "alice", "carol")]
        assert server.connections == 1


@pytest.mark.parametrize("act", ["503 5.5.1 one at a time", "421 4.3.2 bye", "354 what?", Drop(), Silence()], ids=str)
async def test_a_relay_that_does_not_begin_the_next_mail_gets_it_again(
    act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(act, Silence):
        monkeypatch.setattr("worker.mail.pool._AHEAD_SECONDS", 0.05)
    async with rig({"mail": ["250 ok", "250 ok", act]}, connections=1) as (server, pool):
        first, second = await send_two(pool)
        assert [await first, await second] == [None, None]
        assert (server.connections, contents(server, "alice"), contents(server, "bob")) == (2, 1, 1)
        # From now on, each mail waits for the answer to the one before.
        held, asked = Held("250 ok"), list[Go]()
        server.script["dot"] = [held]
        third = asyncio.create_task(send(pool))
        fourth = asyncio.create_task(send(pool, before_data=asked.append))
        await until(held.reached.is_set)
        assert not asked
        held.release.set()
        await until(lambda: bool(asked))
        asked[0](True)
        assert [await third, await fourth] == [None, None]


@pytest.mark.parametrize("extra", ["250 ok", "354 go", "550 no"])
async def test_an_answer_out_of_step_writes_no_content(extra: str) -> None:
    async with rig({"dot": ["250 ok", f"250 ok\r\n{extra}".encode() + b"\r\n"]}, connections=1) as (server, pool):
        first, second = await send_two(pool)
        assert [await first, await second] == [None, None]
        assert (server.connections, contents(server, "alice"), contents(server, "bob")) == (2, 1, 1)


async def test_a_relay_that_leaves_before_the_next_content_gets_that_mail_again() -> None:
    asked = list[Go]()
    data: list[Act] = ["354 go", "354 go", Last("354 go")]
    async with rig({"data": data}, connections=1) as (server, pool):
        first, second = await send_two(pool, before_data=asked.append)
        assert await first is None
        await until(lambda: len(asked) == 2)
        asked[0](True)  # of the connection that has ended
        assert (second.done(), contents(server, "bob")) == (False, 0)
        asked[1](True)
        assert await second is None
        assert (server.connections, contents(server, "alice"), contents(server, "bob")) == (2, 1, 1)


async def test_a_mail_behind_a_slow_answer_is_sent_over_another_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, other = Held("250 ok"), Held("250 ok")
    async with rig(connections=2) as (server, pool):
        server.scripts["alice@example.com"] = {"dot": slow}
        server.scripts["carol@example.com"] = {"rcpt": other}
        assert await send(pool, "first") is None
        first, third = asyncio.create_task(send(pool)), asyncio.create_task(send(pool, "carol"))
        second = asyncio.create_task(send(pool, "bob"))
        await until(lambda: slow.reached.is_set() and other.reached.is_set())
        assert not pool._waiting
        monkeypatch.setattr("worker.mail.pool._AHEAD_SECONDS", 0.0)
        pool._end_late_ahead()
        other.release.set()
        assert [await second, await third] == [None, None]
        assert not first.done()
        slow.release.set()
        assert await first is None
        assert [contents(server, name) for name in ("alice", "bob", "carol")] == [1, 1, 1]


async def test_a_mail_that_may_not_leave_ends_alone() -> None:
    held = Held("250 ok")
    async with rig({"dot": ["250 ok", held]}, connections=1) as (server, pool):
        first, second = await send_two(pool, wanted=lambda: False)
        assert type(await second) is SendAborted
        assert not first.done()
        held.release.set()
        assert await first is None
        assert await send(pool, "carol") is None
        assert (server.connections, contents(server, "alice"), contents(server, "bob")) == (2, 1, 0)


async def test_an_error_of_before_data_is_that_mails_alone() -> None:
    def fail(_: Go) -> None:
        raise LookupError

    async with rig(connections=1) as (server, pool):
        first, second = await send_two(pool, before_data=fail)
        with pytest.raises(LookupError):
            await second
        assert await first is None
        assert contents(server, "bob") == 0


async def test_a_lease_is_checked_when_the_content_is_due() -> None:
    held, answers = Held("250 ok"), list[bool]()

    def still() -> bool:
        answers.append(held.release.is_set())
        return False

    async with rig({"dot": ["250 ok", held]}, connections=1) as (server, pool):
        first, second = await send_two(pool, still=still)
        await until(held.reached.is_set)
        held.release.set()
        assert (await first, type(await second)) == (None, SendAborted)
        assert (answers, contents(server, "bob")) == ([True], 0)


@pytest.mark.parametrize("prompt", [True, False])
async def test_each_mail_waits_where_going_ahead_is_not_known_to_pay(
    prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, asked = Held("250 ok"), list[Go]()
    if not prompt:
        monkeypatch.setattr("worker.mail.smtp._PROMPT", 0.0)
    offers = ("8BITMIME",) if prompt else ("PIPELINING",)
    async with rig({"dot": ["250 ok", held]}, offers=offers, connections=1) as (_, pool):
        first, second = await send_two(pool, before_data=asked.append)
        await until(held.reached.is_set)
        assert not asked
        held.release.set()
        assert await first is None
        await until(lambda: bool(asked))
        asked[0](True)
        assert await second is None


async def test_an_address_that_the_relay_cannot_take_is_not_sent_ahead() -> None:
    async with rig(offers=("PIPELINING",), connections=1) as (server, pool):
        assert await send(pool, "first") is None
        first = asyncio.create_task(send(pool))
        second = asyncio.create_task(outcome(pool, UTF8_ENVELOPE))
        assert (await first, type(await second)) == (None, Smtputf8Unsupported)
        assert server.connections == 1


async def test_close_cancels_the_mail_that_was_sent_ahead() -> None:
    asked = list[Go]()
    async with rig({"dot": ["250 ok", Silence()]}, connections=1) as (_, pool):
        first, second = await send_two(pool, before_data=asked.append)
        await until(lambda: bool(asked))
        await pool.close()
        assert (type(await first), type(await second)) == (AcceptanceUnknown, SendCancelled)

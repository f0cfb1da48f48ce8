"""The pool: connections are opened as needed, reused, replaced and limited, and nothing is leaked."""

from __future__ import annotations

import asyncio
import math
import socket
from collections import Counter

import pytest
from support.relays import ENVELOPE, FOREVER, free, outcome, rig, send, send_many, until
from support.smtp_server import Act, Drop, Held, Last, Later, Silence

from worker.mail.errors import (
    AcceptanceUnknown,
    MessageDeferred,
    RelayBusy,
    RelayUnavailable,
    SendCancelled,
)
from worker.mail.message import Mail


@pytest.fixture(autouse=True)
def no_answer_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, too, no connection is replaced because a mail sent ahead over it has waited too long."""
    monkeypatch.setattr("worker.mail.pool._AHEAD_SECONDS", FOREVER)


# Connections


async def test_one_connection_serves_one_mail_after_the_other() -> None:
    async with rig() as (server, pool):
        for number in range(10):
            assert await send(pool, f"user{number}") is None
        assert [mail.recipient for mail in server.mails] == [f"user{n}@example.com" for n in range(10)]
        assert server.connections == pool.open_connections == 1
        assert "RSET" not in server.commands
    assert server.commands[-1] == "QUIT"


async def test_200_sends_at_once_stay_within_the_limit() -> None:
    async with rig(connections=8) as (server, pool):
        assert await send_many(pool, 200) == [None] * 200
        assert Counter(mail.recipient for mail in server.mails) == {f"user{n}@example.com": 1 for n in range(200)}
        assert server.peak <= 8
        assert server.connections <= 8
        assert free(pool) == 8


async def test_nodelay_is_set() -> None:
    async with rig() as (_, pool):
        await send(pool)
        transport = next(iter(pool._live)).transport
        assert transport
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_connections_that_the_server_closed_are_replaced() -> None:
    async with rig() as (server, pool):
        await send_many(pool, 4)
        server.drop_all()
        # At once, before the loop has seen the end of the old ones, and once more when it has.
        assert await send(pool) is None
        server.drop_all()
        await until(lambda: pool.open_connections == 0)
        assert free(pool) == 4
        assert await send(pool) is None
        assert len(server.mails) == 6


async def test_a_goodbye_to_an_idle_connection_is_no_failure() -> None:
    async with rig() as (server, pool):
        await send_many(pool, 4)
        server.say_to_all("421 4.4.2 idle for too long")
        assert await send(pool) is None
        await until(lambda: pool.open_connections <= 1)
        assert await send(pool) is None
        assert free(pool) == 4


@pytest.mark.parametrize("act", [Drop(), Last("421 4.4.2 timeout"), "421 too many mails"], ids=["drop", "last", "421"])
@pytest.mark.parametrize("offers", [("PIPELINING",), ("HELP",)], ids=["pipelined", "plain"])
async def test_a_kept_connection_that_ends_at_mail_is_replaced(act: Act, offers: tuple[str, ...]) -> None:
    async with rig({"mail": ["250 ok", act, "250 ok", act]}, offers=offers) as (server, pool):
        for _ in range(3):
            assert await send(pool) is None
        assert len(server.mails) == 3
        assert server.connections == 3
        assert free(pool) == 4


async def test_a_relay_that_accepts_one_mail_a_connection_accepts_all() -> None:
    mail: list[Act] = [act for _ in range(10) for act in ("250 ok", Drop())]
    async with rig({"rset": Drop(), "mail": mail}, connections=1) as (server, pool):
        for _ in range(10):
            assert await send(pool) is None
        assert len(server.mails) == 10


async def test_what_may_have_been_accepted_is_not_sent_again() -> None:
    async with rig({"dot": ["250 ok", Drop()]}) as (server, pool):
        assert await send(pool) is None
        assert type(await send(pool)) is AcceptanceUnknown
        assert server.commands.count("DATA") == 2


async def test_idle_connections_quit() -> None:
    async with rig(idle_timeout=0.1) as (server, pool):
        await send_many(pool, 3)
        await until(lambda: pool.open_connections == 0)
        assert server.commands.count("QUIT") == 3
        assert free(pool) == 4
        assert await send(pool) is None


async def test_the_last_used_connection_is_used_first() -> None:
    async with rig() as (_, pool):
        await send_many(pool, 4)
        idle = list(pool._idle)
        deadlines = [connection._deadline for connection in idle]
        for _ in range(3):
            assert await send(pool) is None
        assert pool._idle == idle
        # So the connections of a busy time become idle and quit.
        assert [connection._deadline for connection in idle[:3]] == deadlines[:3]
        assert idle[3]._deadline > deadlines[3]


async def test_a_goodbye_with_the_last_handshake_reply_is_not_retried() -> None:
    async with rig({"ehlo": "250 hi\r\n421 4.3.2 bye"}) as (server, pool):
        assert type(await send(pool)) is RelayUnavailable
        assert server.connections == 1


# Deadlines


@pytest.mark.parametrize("step", ["banner", "ehlo", "mail", "rcpt", "data", "dot"])
async def test_a_send_whose_deadline_passes_frees_its_connection(step: str) -> None:
    async with rig({step: [Silence()]}, connections=1) as (server, pool):
        soon = asyncio.get_running_loop().time() + 0.2
        answers = [True]
        late = asyncio.create_task(outcome(pool, deadline=soon, still=answers.pop))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(send(pool, "bob"))
        assert type(await late) is (SendCancelled if answers else AcceptanceUnknown)
        assert await waiting is None
        assert [mail.recipient for mail in server.mails] == ["bob@example.com"]
        assert free(pool) == 1


async def test_deadlines_at_any_moment_leak_no_connection() -> None:
    loop = asyncio.get_running_loop()
    async with rig(connections=3) as (server, pool):
        for turn in range(60):
            deadlines = [loop.time() + turn / 5000 if number % 2 else math.inf for number in range(8)]
            errors = await asyncio.gather(*(outcome(pool, deadline=each) for each in deadlines))
            assert errors[::2] == [None] * 4
            assert {type(error) for error in errors[1::2]} <= {type(None), SendCancelled, AcceptanceUnknown}
            assert free(pool) == 3
        assert await send(pool) is None
        assert server.peak <= 3 + 3  # the server sees the end of a dropped connection a moment later


async def test_a_send_that_waits_too_long_for_a_connection_is_deferred() -> None:
    async with rig({"dot": Silence()}, connections=1, send_timeout=0.3) as (_, pool):
        first, second = await send_many(pool, 2)
        assert first
        assert type(second) is MessageDeferred
        assert free(pool) == 1


async def test_under_load_a_slow_relay_does_not_seem_dead() -> None:
    async with rig({"dot": Later("250 ok", 0.5)}, connections=2, send_timeout=6.0) as (server, pool):
        errors = await send_many(pool, 20)
        assert {type(error) for error in errors} == {type(None), MessageDeferred}
        assert errors.count(None) == len(server.mails)


async def test_a_dead_relay_fails_the_waiting_sends_at_once() -> None:
    async with rig({"banner": Silence()}, connections=2, connect_timeout=0.2) as (server, pool):
        assert {type(error) for error in await send_many(pool, 50)} == {RelayUnavailable}
        assert server.connections <= 4
        assert free(pool) == 2


# Too many connections


async def test_421_lowers_the_limit_and_fails_no_mail() -> None:
    async with rig(most=3, connections=16) as (server, pool):
        assert await send_many(pool, 100) == [None] * 100
        assert len(server.mails) == 100
        assert free(pool) == 3
        refused = server.connections
        await send_many(pool, 50)
        assert server.connections == refused


async def test_the_limit_rises_again_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(most=1, connections=3) as (server, pool):
        await send_many(pool, 10)
        assert free(pool) == 1
        server.most = None
        monkeypatch.setattr("worker.mail.pool._RAISE_SECONDS", 0.0)
        pool._raise_at = 0.0
        for _ in range(3):
            assert await send_many(pool, 10) == [None] * 10
        assert free(pool) == 3


async def test_421_at_mail_lowers_the_limit_too() -> None:
    held = Held("250 ok")
    async with rig({"dot": held}) as (server, pool):
        first = asyncio.create_task(send(pool))
        await until(held.reached.is_set)
        server.script["mail"] = ["421 4.7.0 too many"]
        second = asyncio.create_task(send(pool, "bob"))
        await until(lambda: len(pool._waiting) == 1)
        held.release.set()
        assert [await first, await second] == [None, None]
        assert free(pool) == 1


async def test_a_send_that_is_refused_a_connection_twice_leaves_the_relay() -> None:
    held = [Held("421 4.3.2 closing"), Held("250 ok")]
    async with rig({"dot": list(held)}) as (server, pool):
        holders = [asyncio.create_task(send(pool)) for _ in held]
        await until(lambda: all(each.reached.is_set() for each in held))
        server.script["mail"] = "421 4.7.0 too many"
        third = asyncio.create_task(send(pool))
        await until(lambda: len(pool._waiting) == 1)
        held[0].release.set()
        assert type(await third) is RelayBusy
        held[1].release.set()
        assert {type(error) for error in await asyncio.gather(*holders)} == {MessageDeferred, type(None)}


async def test_421_without_any_connection_defers_the_mails() -> None:
    async with rig(most=0) as (_, pool):
        assert {type(error) for error in await send_many(pool, 20)} == {MessageDeferred}
        assert await send(pool)


# Close


async def test_close_ends_what_is_on_its_way() -> None:
    script: dict[str, Act | list[Act]] = {"dot": ["250 ok", Silence()], "banner": ["220 hi", "220 hi", Silence()]}
    async with rig(script, connections=3) as (server, pool):
        await send(pool)
        sending = asyncio.create_task(send(pool))
        await until(lambda: server.commands.count("DATA") == 2)
        tasks = [asyncio.create_task(send(pool)) for _ in range(4)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(FOREVER / 2):
            await pool.close()
        assert type(await sending) is AcceptanceUnknown
        assert {type(error) for error in await asyncio.gather(*tasks) if error} <= {SendCancelled}
        assert type(await send(pool)) is SendCancelled


async def test_close_cancels_a_send_whose_handshake_has_not_begun() -> None:
    async with rig() as (_, pool):
        errors: list[Exception | None] = []
        pool.send(Mail(ENVELOPE, math.inf, lambda go: go(True), lambda: True, errors.append))
        await pool.close()
        await asyncio.sleep(0)
        assert [type(error) for error in errors] == [SendCancelled]
        assert free(pool) == 4


async def test_close_does_not_wait_for_the_reply_to_quit() -> None:
    async with rig({"quit": Silence()}) as (_, pool):
        await send(pool)
        async with asyncio.timeout(FOREVER / 2):
            await pool.close()
        assert pool.open_connections == 0

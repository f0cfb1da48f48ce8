"""The pool opens as many connections as its mails need and the relay grants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.relays import FOREVER, rig, send, send_many, until
from support.smtp_server import Act, Drop, Held, Last, ScriptedServer, Silence

from worker.mail.errors import RelayUnavailable
from worker.mail.pool import SmtpPool


@pytest.fixture(autouse=True)
def held_answers_change_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Server and pool share a process, so its CPU says nothing about the pool's; no mail is sent ahead."""
    monkeypatch.setattr("worker.mail.pool._BUSY_SHARE", FOREVER)
    monkeypatch.setattr("worker.mail.smtp._PROMPT", 0.0)


@contextmanager
def held(server: ScriptedServer) -> Iterator[None]:
    """While it lasts, no content is answered."""
    answer = server.script["dot"] = Held("250 ok")
    try:
        yield
    finally:
        del server.script["dot"]
        answer.release.set()


async def grown(server: ScriptedServer, pool: SmtpPool, mails: int, connections: int) -> None:
    """Send so many mails, no content answered before so many connections are open."""
    with held(server):
        sends = asyncio.create_task(send_many(pool, mails))
        await until(lambda: server.open == connections == pool.open_connections)
    assert await sends == [None] * mails


async def test_a_lone_caller_uses_one_connection() -> None:
    async with rig(connections=256) as (server, pool):
        for _ in range(20):
            assert await send(pool) is None
        assert server.connections == 1


async def test_the_limit_starts_at_32_and_grows_while_mails_wait() -> None:
    async with rig(connections=50) as (server, pool):
        assert 32 < pool.capacity < 50
        await grown(server, pool, 80, 50)
        assert (server.peak, pool.capacity) == (50, 50)


async def test_a_short_burst_opens_no_more_than_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.mail.pool._GROWTH_SECONDS", FOREVER)
    async with rig(connections=256) as (server, pool):
        assert await send_many(pool, 200) == [None] * 200
        assert server.connections == 32


async def test_a_busy_process_opens_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.mail.pool._BUSY_SHARE", 0.0)
    async with rig(connections=256) as (server, pool):
        with held(server):
            sends = asyncio.create_task(send_many(pool, 60))
            await until(lambda: server.open == 32)
            await asyncio.sleep(0.5)
            assert server.connections == 32
        assert await sends == [None] * 60


async def test_what_has_grown_is_given_back() -> None:
    async with rig(connections=50, idle_timeout=0.3) as (server, pool):
        await grown(server, pool, 80, 50)
        await until(lambda: pool.open_connections == 0)
        assert pool.capacity == 40
        assert server.commands.count("QUIT") == 50
        assert await send(pool) is None


async def test_a_refusal_halves_the_limit_and_is_remembered() -> None:
    async with rig(connections=256) as (server, pool):
        await grown(server, pool, 30, 30)
        server.most = 30
        with held(server):
            sends = [asyncio.create_task(send(pool, f"user{number}")) for number in range(60)]
            await until(lambda: server.connections > 30)
            await until(lambda: pool._remember > 0)
            tried = server.connections
            assert pool.capacity == 16
            await asyncio.sleep(0.5)
            assert server.connections == tried <= 32
        assert await asyncio.gather(*sends) == [None] * 60
        assert pool.open_connections == 30


@pytest.mark.parametrize(
    "act",
    [Last("421 4.7.0 too many"), Last("450 4.7.0 too many"), Last("454 4.7.0 later"), Drop(), Silence()],
    ids=["421", "450", "454", "drop", "silence"],
)
async def test_no_mail_fails_where_the_relay_grants_only_a_few(act: Act) -> None:
    async with rig(connections=256, connect_timeout=1.0) as (server, pool):
        await grown(server, pool, 10, 10)
        server.script["banner"] = act
        for _ in range(3):
            assert await send_many(pool, 100) == [None] * 100
        assert pool.open_connections == 10
        assert 10 < server.connections <= 32


async def test_no_mail_fails_where_further_connections_are_not_accepted() -> None:
    async with rig(connections=256) as (server, pool):
        await grown(server, pool, 10, 10)
        assert server._server is not None
        server._server.close()
        assert await send_many(pool, 100) == [None] * 100
        assert pool.open_connections == 10


async def test_a_relay_that_is_gone_is_not_taken_for_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.mail.pool._WORKED_LATELY", 0.0)
    async with rig({"banner": ["220 hi", Drop(), Drop()]}, connections=4) as (server, pool):
        assert await send(pool) is None
        with held(server):
            first = asyncio.create_task(send(pool))
            await until(lambda: len(server.dotted) == 2)
            assert type(await send(pool, "bob")) is RelayUnavailable
        assert await first is None


async def test_a_refused_relay_is_asked_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(most=1, connections=8) as (server, pool):
        await send_many(pool, 10)
        pauses = [pool._remember]
        for _ in range(3):
            pool._raise_at = 0.0
            tried = server.connections
            assert await send_many(pool, 10) == [None] * 10
            assert server.connections == tried + 1
            pauses.append(pool._remember)
        assert pauses == [10, 20, 40, 80]
        server.most = None
        monkeypatch.setattr("worker.mail.pool._RAISE_SECONDS", 0.0)
        pool._raise_at = 0.0
        await grown(server, pool, 30, 8)
        assert pool._remember == 0

"""The pool: connections are opened as needed, reused, bounded and replaced."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest
from support.relays import CONTENT, assert_nothing_left, asyncio_test, make, outcome, send, until
from support.smtp_server import Drop, Last, Later, ScriptedServer

from worker.mail.errors import AcceptanceUnknown, RelayUnavailable
from worker.mail.message import Envelope


@asyncio_test
async def test_one_connection_serves_one_mail_after_the_other() -> None:
    async with ScriptedServer() as server:
        relay = make(server)
        for number in range(10):
            assert await send(relay, f"user{number}") is None
        assert [mail.recipient for mail in server.mails] == [f"user{n}@example.com" for n in range(10)]
        assert server.connections == relay.open_connections == 1
        assert "RSET" not in server.commands
        await assert_nothing_left(relay, server)
        assert server.commands[-1] == "QUIT"


@asyncio_test
async def test_200_sends_at_once_stay_within_the_limit() -> None:
    async with ScriptedServer() as server:
        relay = make(server, 8)
        outcomes = await asyncio.gather(*(send(relay, f"user{n}") for n in range(200)))
        assert outcomes == [None] * 200
        assert Counter(mail.recipient for mail in server.mails) == {f"user{n}@example.com": 1 for n in range(200)}
        assert server.peak <= 8
        assert server.connections <= 8
        assert relay.free == 8
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_free_counts_what_need_not_wait() -> None:
    async with ScriptedServer({"dot": Later("250 ok", 0.2)}) as server:
        relay = make(server, 3)
        assert relay.free == 3
        sends = [asyncio.create_task(send(relay)) for _ in range(2)]
        await asyncio.sleep(0)
        assert relay.free == 1
        sends += [asyncio.create_task(send(relay)) for _ in range(3)]
        await asyncio.sleep(0)
        assert relay.free == 0
        assert await asyncio.gather(*sends) == [None] * 5
        assert relay.free == 3
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_nodelay_is_set() -> None:
    async with ScriptedServer() as server:
        relay = make(server)
        await send(relay)
        transport = next(iter(relay._live)).transport
        assert transport
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await relay.close()


@asyncio_test
async def test_connections_that_the_server_closed_are_replaced() -> None:
    async with ScriptedServer() as server:
        relay = make(server)
        await asyncio.gather(*(send(relay) for _ in range(4)))
        server.drop_all()
        # At once, before the loop has seen the end of the old ones, and once more when it has.
        assert await send(relay) is None
        server.drop_all()
        await until(lambda: relay.open_connections == 0)
        assert relay.free == 4
        assert await send(relay) is None
        assert len(server.mails) == 6
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_a_farewell_to_an_idle_connection_is_no_failure() -> None:
    async with ScriptedServer() as server:
        relay = make(server)
        await asyncio.gather(*(send(relay) for _ in range(4)))
        server.say_to_all("421 4.4.2 idle for too long")
        assert await send(relay) is None
        await until(lambda: relay.open_connections <= 1)
        assert await send(relay) is None
        assert relay.free == 4
        await assert_nothing_left(relay, server)


@pytest.mark.parametrize("act", [Drop(), Last("421 4.4.2 timeout"), "421 too many mails"], ids=["drop", "last", "421"])
@pytest.mark.parametrize("offers", [("PIPELINING",), ("HELP",)], ids=["pipelined", "plain"])
@asyncio_test
async def test_a_kept_connection_that_ends_at_mail_is_replaced(act: Drop | Last | str, offers: tuple[str, ...]) -> None:
    async with ScriptedServer({"mail": ["250 ok", act, "250 ok", act]}, offers=offers) as server:
        relay = make(server)
        for _ in range(3):
            assert await send(relay) is None
        assert len(server.mails) == 3
        assert server.connections == 3
        assert relay.free == 4
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_a_new_connection_that_ends_at_mail_is_a_failure() -> None:
    async with ScriptedServer({"mail": Drop()}) as server:
        relay = make(server)
        assert type(await send(relay)) is RelayUnavailable
        assert server.connections == 1
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_a_relay_that_takes_one_mail_a_connection_still_takes_all() -> None:
    async with ScriptedServer({"rset": Drop(), "mail": [x for _ in range(10) for x in ("250 ok", Drop())]}) as server:
        relay = make(server, 1)
        for _ in range(10):
            assert await send(relay) is None
        assert len(server.mails) == 10
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_what_was_sent_is_never_sent_again() -> None:
    async with ScriptedServer({"dot": ["250 ok", Drop()]}) as server:
        relay = make(server)
        assert await send(relay) is None
        assert type(await send(relay)) is AcceptanceUnknown
        assert server.commands.count("DATA") == 2
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_idle_connections_are_closed_politely() -> None:
    async with ScriptedServer() as server:
        relay = make(server, idle_timeout=0.1)
        await asyncio.gather(*(send(relay) for _ in range(3)))
        await until(lambda: relay.open_connections == 0)
        assert server.commands.count("QUIT") == 3
        assert relay.free == 4
        assert await send(relay) is None
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_the_last_used_connection_is_used_first() -> None:
    async with ScriptedServer() as server:
        relay = make(server)
        await asyncio.gather(*(send(relay) for _ in range(4)))
        idle = list(relay._idle)
        deadlines = [connection._deadline for connection in idle]
        for _ in range(3):
            assert await send(relay) is None
        assert relay._idle == idle
        # So a crowd's connections become idle and go.
        assert [connection._deadline for connection in idle[:3]] == deadlines[:3]
        assert idle[3]._deadline > deadlines[3]
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_an_envelope_that_would_break_the_dialogue_costs_no_connection() -> None:
    async with ScriptedServer() as server:
        relay = make(server)
        evil = Envelope("no-reply@example.com", "a@b.cc>\r\nRCPT TO:<v@b.cc", False, CONTENT)
        with pytest.raises(ValueError, match="an address"):
            await outcome(relay, evil)
        assert server.connections == 0
        await relay.close()

"""The pool under pressure: sends called off, dead relays, too many connections, the end. Nothing is ever leaked."""

from __future__ import annotations

import asyncio
import math

import pytest
from support.relays import ENVELOPE, assert_nothing_left, asyncio_test, make, outcome, send, until
from support.smtp_server import Later, ScriptedServer, Silence

from worker.mail.errors import (
    AcceptanceUnknown,
    MessageDeferred,
    MessageRejected,
    RelayBusy,
    RelayUnavailable,
    SendCancelled,
)
from worker.mail.message import Mail


@pytest.mark.parametrize("step", ["banner", "ehlo", "mail", "rcpt", "data", "dot"])
@asyncio_test
async def test_a_send_whose_own_deadline_comes_leaves_nothing_behind(step: str) -> None:
    async with ScriptedServer({step: [Silence()]}) as server:
        relay = make(server, 1)
        soon = asyncio.get_running_loop().time() + 0.2
        late = asyncio.create_task(outcome(relay, ENVELOPE, deadline=soon))
        waiting = asyncio.create_task(send(relay, "bob"))
        assert type(await late) is (AcceptanceUnknown if step == "dot" else SendCancelled)
        assert await waiting is None
        assert [mail.recipient for mail in server.mails] == ["bob@example.com"]
        assert relay.free == 1
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_a_deadline_at_any_moment_keeps_the_count() -> None:
    loop = asyncio.get_running_loop()
    async with ScriptedServer() as server:
        relay = make(server, 3)
        for turn in range(60):
            deadlines = [loop.time() + turn / 5000 if number % 2 else math.inf for number in range(8)]
            outcomes = await asyncio.gather(*(outcome(relay, ENVELOPE, deadline=each) for each in deadlines))
            assert outcomes[::2] == [None] * 4
            assert {type(error) for error in outcomes[1::2]} <= {type(None), SendCancelled, AcceptanceUnknown}
            assert relay.free == 3
        assert await send(relay) is None
        assert server.peak <= 3 + 3  # the server sees the end of a dropped connection a moment later
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_a_send_that_waits_too_long_for_a_connection_is_deferred() -> None:
    async with ScriptedServer({"dot": Silence()}) as server:
        relay = make(server, 1, send_timeout=0.3)
        outcomes = await asyncio.gather(*(send(relay) for _ in range(2)))
        assert [type(outcome) for outcome in outcomes] == [AcceptanceUnknown, MessageDeferred]
        assert relay.free == 1
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_a_crowd_does_not_make_a_slow_relay_look_dead() -> None:
    async with ScriptedServer({"dot": Later("250 ok", 0.2)}) as server:
        relay = make(server, 2, send_timeout=1.2)
        outcomes = await asyncio.gather(*(send(relay) for _ in range(20)))
        assert {type(outcome) for outcome in outcomes} == {type(None), MessageDeferred}
        assert outcomes.count(None) == len(server.mails)
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_a_dead_relay_fails_those_that_wait_at_once() -> None:
    async with ScriptedServer({"banner": Silence()}) as server:
        relay = make(server, 2, connect_timeout=0.2, send_timeout=30)
        async with asyncio.timeout(3):
            outcomes = await asyncio.gather(*(send(relay) for _ in range(50)))
        assert {type(outcome) for outcome in outcomes} == {RelayUnavailable}
        assert server.connections <= 4
        assert relay.free == 2
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_too_many_connections_means_fewer_not_failure() -> None:
    async with ScriptedServer(most=3) as server:
        relay = make(server, 16)
        outcomes = await asyncio.gather(*(send(relay, f"user{n}") for n in range(100)))
        assert outcomes == [None] * 100
        assert len(server.mails) == 100
        assert relay.free == 3
        refused = server.connections
        await asyncio.gather(*(send(relay) for _ in range(50)))
        assert server.connections == refused
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_the_limit_rises_again_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedServer(most=1) as server:
        relay = make(server, 3)
        await asyncio.gather(*(send(relay) for _ in range(10)))
        assert relay.free == 1
        server.most = None
        monkeypatch.setattr("worker.mail.pool._RAISE_SECONDS", 0.0)
        relay._raise_at = 0.0
        for _ in range(3):
            assert await asyncio.gather(*(send(relay) for _ in range(10))) == [None] * 10
        assert relay.free == 3
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_421_at_mail_lowers_the_limit_too() -> None:
    async with ScriptedServer({"dot": Later("250 ok", 0.6)}) as server:
        relay = make(server, 4)
        first = asyncio.create_task(send(relay))
        await until(lambda: "DATA" in server.commands)
        server.script["mail"] = ["421 4.7.0 too many"]
        assert await send(relay, "bob") is None
        assert await first is None
        assert relay.free == 1
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_told_to_go_twice_a_send_leaves_the_relay() -> None:
    async with ScriptedServer({"dot": Silence()}) as server:
        relay = make(server, 4)
        now = asyncio.get_running_loop().time()
        holders = [asyncio.create_task(outcome(relay, ENVELOPE, deadline=now + each)) for each in (0.3, 1.0)]
        await until(lambda: server.commands.count("DATA") == 2)
        server.script["mail"] = "421 4.7.0 too many"
        third = asyncio.create_task(send(relay))
        await until(lambda: relay.free == 0 and len(relay._waiting) == 1)
        assert type(await third) is RelayBusy
        assert {type(error) for error in await asyncio.gather(*holders)} == {AcceptanceUnknown}
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_421_without_any_connection_is_try_later() -> None:
    async with ScriptedServer(most=0) as server:
        relay = make(server, 4)
        outcomes = await asyncio.gather(*(send(relay) for _ in range(20)))
        assert {type(outcome) for outcome in outcomes} == {MessageDeferred}
        assert await send(relay)
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_refusals_do_not_cost_connections() -> None:
    async with ScriptedServer({"rcpt": "554 5.7.1 no"}) as server:
        relay = make(server, 4)
        outcomes = await asyncio.gather(*(send(relay) for _ in range(40)))
        assert {type(outcome) for outcome in outcomes} == {MessageRejected}
        assert server.connections == 4
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_close_ends_what_is_under_way() -> None:
    async with ScriptedServer({"dot": ["250 ok", Silence()], "banner": ["220 hi", "220 hi", Silence()]}) as server:
        relay = make(server, 3)
        await send(relay)
        sending = asyncio.create_task(send(relay))
        await until(lambda: server.commands.count("DATA") == 2)
        tasks = [asyncio.create_task(send(relay)) for _ in range(4)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(3):
            await relay.close()
        assert type(await sending) is AcceptanceUnknown
        outcomes = await asyncio.gather(*tasks)
        assert {type(outcome) for outcome in outcomes if outcome} <= {SendCancelled}
        assert type(await send(relay)) is SendCancelled
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_close_tells_a_send_whose_connection_has_not_begun_to_open() -> None:
    async with ScriptedServer() as server:
        relay = make(server)
        outcomes: list[Exception | None] = []
        relay.send(Mail(ENVELOPE, math.inf, lambda go: go(True), outcomes.append))
        await relay.close()
        await asyncio.sleep(0)
        assert [type(error) for error in outcomes] == [SendCancelled]
        assert relay.free == 4


@asyncio_test
async def test_a_relay_that_takes_its_leave_with_its_last_opening_reply_is_not_asked_again_and_again() -> None:
    async with ScriptedServer({"ehlo": "250 hi\r\n421 4.3.2 bye"}) as server:
        relay = make(server)
        assert type(await send(relay)) is RelayUnavailable
        assert server.connections == 1
        await assert_nothing_left(relay, server)


@asyncio_test
async def test_close_does_not_wait_for_a_relay_that_answers_no_quit() -> None:
    async with ScriptedServer({"quit": Silence()}) as server:
        relay = make(server)
        await send(relay)
        async with asyncio.timeout(3):
            await relay.close()
        assert relay.open_connections == 0

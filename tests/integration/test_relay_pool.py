"""The pool: connections are opened as needed, reused, bounded, replaced and never leaked."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections import Counter
from collections.abc import Callable

import pytest
from smtp_server import Drop, Last, Later, ScriptedServer, Silence

from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RelayBusy,
    RelayUnavailable,
)
from worker.mail.relay import Envelope, Relay

CONTENT = b"Subject: code\r\n\r\nhello\r\n"


def make(server: ScriptedServer, connections: int = 4, **options: float) -> Relay:
    timeouts = {"connect_timeout": 2.0, "send_timeout": 5.0, **options}
    return Relay(server.url(), connections=connections, **timeouts)  # type: ignore[arg-type]  # floats only


async def send(relay: Relay, name: str = "alice") -> MailError | None:
    """Send once; the outcome."""
    try:
        await relay.send(Envelope("no-reply@example.com", f"{name}@example.com", False, CONTENT), lambda: True)
    except MailError as exc:
        return exc
    return None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def assert_nothing_left(relay: Relay, server: ScriptedServer) -> None:
    await relay.close()
    assert relay.open_connections == 0
    await until(lambda: server.open == 0)
    gc.collect()
    server_tasks = {task for task in asyncio.all_tasks() if "ScriptedServer" in repr(task)}
    assert asyncio.all_tasks() - server_tasks == {asyncio.current_task()}


def test_one_connection_serves_one_mail_after_the_other() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server)
            for number in range(10):
                assert await send(relay, f"user{number}") is None
            assert [mail.recipient for mail in server.mails] == [f"user{n}@example.com" for n in range(10)]
            assert server.connections == relay.open_connections == 1
            assert "RSET" not in server.commands
            await assert_nothing_left(relay, server)
            assert server.commands[-1] == "QUIT"

    asyncio.run(main())


def test_200_sends_at_once_stay_within_the_limit() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server, 8)
            outcomes = await asyncio.gather(*(send(relay, f"user{n}") for n in range(200)))
            assert outcomes == [None] * 200
            assert Counter(mail.recipient for mail in server.mails) == {f"user{n}@example.com": 1 for n in range(200)}
            assert server.peak <= 8
            assert server.connections <= 8
            assert relay.free == 8
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_free_counts_what_need_not_wait() -> None:
    async def main() -> None:
        async with ScriptedServer({"dot": Later("250 ok", 0.2)}) as server:
            relay = make(server, 3)
            assert relay.free == 3
            sends = [asyncio.create_task(send(relay)) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert relay.free == 1
            sends += [asyncio.create_task(send(relay)) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert relay.free == 0
            assert await asyncio.gather(*sends) == [None] * 5
            assert relay.free == 3
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_nodelay_is_set() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server)
            await send(relay)
            transport = next(iter(relay._live)).transport
            assert transport
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            await relay.close()

    asyncio.run(main())


def test_connections_that_the_server_closed_are_replaced() -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_a_farewell_to_an_idle_connection_is_no_failure() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server)
            await asyncio.gather(*(send(relay) for _ in range(4)))
            server.say_to_all("421 4.4.2 idle for too long")
            assert await send(relay) is None
            await until(lambda: relay.open_connections <= 1)
            assert await send(relay) is None
            assert relay.free == 4
            await assert_nothing_left(relay, server)

    asyncio.run(main())


@pytest.mark.parametrize("act", [Drop(), Last("421 4.4.2 timeout"), "421 too many mails"], ids=["drop", "last", "421"])
@pytest.mark.parametrize("offers", [("PIPELINING",), ("HELP",)], ids=["pipelined", "plain"])
def test_a_kept_connection_that_ends_at_mail_is_replaced(act: Drop | Last | str, offers: tuple[str, ...]) -> None:
    async def main() -> None:
        async with ScriptedServer({"mail": ["250 ok", act, "250 ok", act]}, offers=offers) as server:
            relay = make(server)
            for _ in range(3):
                assert await send(relay) is None
            assert len(server.mails) == 3
            assert server.connections == 3
            assert relay.free == 4
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_a_new_connection_that_ends_at_mail_is_a_failure() -> None:
    async def main() -> None:
        async with ScriptedServer({"mail": Drop()}) as server:
            relay = make(server)
            assert type(await send(relay)) is RelayUnavailable
            assert server.connections == 1
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_a_relay_that_takes_one_mail_a_connection_still_takes_all() -> None:
    async def main() -> None:
        async with ScriptedServer(
            {"rset": Drop(), "mail": [x for _ in range(10) for x in ("250 ok", Drop())]}
        ) as server:
            relay = make(server, 1)
            for _ in range(10):
                assert await send(relay) is None
            assert len(server.mails) == 10
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_what_was_sent_is_never_sent_again() -> None:
    async def main() -> None:
        async with ScriptedServer({"dot": ["250 ok", Drop()]}) as server:
            relay = make(server)
            assert await send(relay) is None
            assert type(await send(relay)) is AcceptanceUnknown
            assert server.commands.count("DATA") == 2
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_idle_connections_are_closed_politely() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server, idle_timeout=0.1)
            await asyncio.gather(*(send(relay) for _ in range(3)))
            await until(lambda: relay.open_connections == 0)
            assert server.commands.count("QUIT") == 3
            assert relay.free == 4
            assert await send(relay) is None
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_the_last_used_connection_is_used_first() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server, idle_timeout=0.3)
            await asyncio.gather(*(send(relay) for _ in range(4)))
            for _ in range(12):
                assert await send(relay) is None
                await asyncio.sleep(0.05)
            # A crowd's connections go, the one that is in use stays.
            assert relay.open_connections == 1
            assert server.connections == 4
            await assert_nothing_left(relay, server)

    asyncio.run(main())


@pytest.mark.parametrize("step", ["banner", "ehlo", "mail", "rcpt", "data", "dot"])
def test_a_cancelled_send_leaves_nothing_behind(step: str) -> None:
    async def main() -> None:
        async with ScriptedServer({step: [Silence()]}) as server:
            relay = make(server, 1)
            task = asyncio.create_task(send(relay))
            waiting = asyncio.create_task(send(relay, "bob"))
            await asyncio.sleep(0.05)
            task.cancel()
            assert await waiting is None
            assert task.cancelled()
            assert [mail.recipient for mail in server.mails] == ["bob@example.com"]
            assert relay.free == 1
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_cancelling_at_any_moment_keeps_the_count() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server, 3)
            for turn in range(60):
                tasks = [asyncio.create_task(send(relay)) for _ in range(8)]
                for _ in range(turn % 20):
                    await asyncio.sleep(0)
                for task in tasks[turn % 3 :: 2]:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert relay.free == 3
            assert await send(relay) is None
            assert server.peak <= 3 + 3  # the server sees the end of a dropped connection a moment later
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_a_send_that_waits_too_long_for_a_connection_is_deferred() -> None:
    async def main() -> None:
        async with ScriptedServer({"dot": Silence()}) as server:
            relay = make(server, 1, send_timeout=0.3)
            outcomes = await asyncio.gather(*(send(relay) for _ in range(2)))
            assert [type(outcome) for outcome in outcomes] == [AcceptanceUnknown, MessageDeferred]
            assert relay.free == 1
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_a_dead_relay_fails_those_that_wait_at_once() -> None:
    async def main() -> None:
        async with ScriptedServer({"banner": Silence()}) as server:
            relay = make(server, 2, connect_timeout=0.2, send_timeout=30)
            async with asyncio.timeout(3):
                outcomes = await asyncio.gather(*(send(relay) for _ in range(50)))
            assert {type(outcome) for outcome in outcomes} == {RelayUnavailable}
            assert server.connections <= 4
            assert relay.free == 2
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_too_many_connections_means_fewer_not_failure() -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_the_limit_rises_again_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with ScriptedServer(most=1) as server:
            relay = make(server, 3)
            await asyncio.gather(*(send(relay) for _ in range(10)))
            assert relay.free == 1
            server.most = None
            monkeypatch.setattr("worker.mail.relay._RAISE_SECONDS", 0.0)
            relay._raise_at = 0.0
            for _ in range(3):
                assert await asyncio.gather(*(send(relay) for _ in range(10))) == [None] * 10
            assert relay.free == 3
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_421_at_mail_lowers_the_limit_too_and_only_once_is_waited() -> None:
    async def main() -> None:
        async with ScriptedServer({"dot": Later("250 ok", 0.2)}) as server:
            relay = make(server, 4)
            first = asyncio.create_task(send(relay))
            await until(lambda: "DATA" in server.commands)
            server.script["mail"] = ["421 4.7.0 too many"]
            assert await send(relay, "bob") is None
            assert await first is None
            assert relay.free == 1
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_told_to_go_twice_a_send_leaves_the_relay() -> None:
    async def main() -> None:
        async with ScriptedServer({"dot": Silence()}) as server:
            relay = make(server, 4)
            holders = [asyncio.create_task(send(relay)) for _ in range(2)]
            await until(lambda: server.commands.count("DATA") == 2)
            server.script["mail"] = "421 4.7.0 too many"
            third = asyncio.create_task(send(relay))
            await until(lambda: relay.free == 0 and len(relay._waiters) == 1)
            holders[0].cancel()
            assert type(await third) is RelayBusy
            holders[1].cancel()
            await asyncio.gather(*holders, return_exceptions=True)
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_421_without_any_connection_is_try_later() -> None:
    async def main() -> None:
        async with ScriptedServer(most=0) as server:
            relay = make(server, 4)
            outcomes = await asyncio.gather(*(send(relay) for _ in range(20)))
            assert {type(outcome) for outcome in outcomes} == {MessageDeferred}
            assert await send(relay)
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_refusals_do_not_cost_connections() -> None:
    async def main() -> None:
        async with ScriptedServer({"rcpt": "554 5.7.1 no"}) as server:
            relay = make(server, 4)
            outcomes = await asyncio.gather(*(send(relay) for _ in range(40)))
            assert {type(outcome) for outcome in outcomes} == {MessageRejected}
            assert server.connections == 4
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_close_ends_what_is_under_way() -> None:
    async def main() -> None:
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
            assert {type(outcome) for outcome in outcomes if outcome} <= {RelayUnavailable, MessageDeferred}
            assert type(await send(relay)) is MessageDeferred
            await assert_nothing_left(relay, server)

    asyncio.run(main())


def test_close_does_not_wait_for_a_relay_that_answers_no_quit() -> None:
    async def main() -> None:
        async with ScriptedServer({"quit": Silence()}) as server:
            relay = make(server)
            await send(relay)
            async with asyncio.timeout(3):
                await relay.close()
            assert relay.open_connections == 0

    asyncio.run(main())


def test_an_envelope_that_would_break_the_dialogue_costs_no_connection() -> None:
    async def main() -> None:
        async with ScriptedServer() as server:
            relay = make(server)
            evil = Envelope("no-reply@example.com", "a@b.cc>\r\nRCPT TO:<v@b.cc", False, CONTENT)
            with pytest.raises(ValueError, match="an address"):
                await relay.send(evil, lambda: True)
            assert server.connections == 0
            await relay.close()

    asyncio.run(main())

"""Several relays: their order, how unhealthy ones are skipped and probed, and what their failures mean together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from support.relays import FOREVER, UTF8_ENVELOPE, outcome, pool_of, send, send_many, until
from support.smtp_server import Act, Drop, Last, ScriptedServer, Silence

from producer import masking
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
from worker.mail.failover import Failover


class Clock:
    """Time that stands still until a test moves it. `tick` lets the background prober run once."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ticks: asyncio.Queue[None] = asyncio.Queue()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, _seconds: float) -> None:
        await self._ticks.get()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self._ticks.put_nowait(None)

    def is_idle(self) -> bool:
        return self._ticks.empty()


Script = dict[str, Act | list[Act]]


@asynccontextmanager
async def failover_of(
    *relays: Script | ScriptedServer, clock: Clock | None = None, **first: Any
) -> AsyncIterator[tuple[Failover, list[ScriptedServer]]]:
    """Failover over pools of two connections, and the servers; `first`: options of the first pool."""
    clock = clock or Clock()
    async with AsyncExitStack() as stack:
        servers = [relay if isinstance(relay, ScriptedServer) else ScriptedServer(relay) for relay in relays]
        for server in servers:
            await stack.enter_async_context(server)
        options = [first] + [{}] * (len(servers) - 1)
        pools = [pool_of(server, **({"connections": 2} | each)) for server, each in zip(servers, options, strict=True)]
        failover = Failover(pools, clock=clock, sleep=clock.sleep)
        yield failover, servers
        await failover.close()


REJECTED, DEFERRED, BUSY, DEAD = "554 5.7.1 no", "451 4.3.0 later", "421 4.7.0 too many", Drop()

# Each relay's reply to RCPT (None: it accepts the mail), the outcome, and how many relays were tried.
MIXED: list[tuple[tuple[Act | None, ...], type[MailError] | None, int]] = [
    ((None, None), None, 1),
    ((DEFERRED, None), None, 2),
    ((REJECTED, None), None, 2),
    ((BUSY, None), None, 2),
    ((DEAD, None), None, 2),
    ((DEAD, REJECTED, DEFERRED, None), None, 4),
    (("550 5.1.1 gone", None), RecipientRejected, 1),
    ((DEAD, "550 gone", None), RecipientRejected, 2),
    ((REJECTED, REJECTED), MessageRejected, 2),
    ((REJECTED, DEFERRED), MessageDeferred, 2),
    ((REJECTED, DEAD), MessageDeferred, 2),
    ((DEAD, REJECTED), MessageDeferred, 2),
    ((BUSY, REJECTED), MessageDeferred, 2),
    ((DEFERRED, DEFERRED), MessageDeferred, 2),
    ((DEAD, DEAD), MessageDeferred, 2),
]


@pytest.mark.parametrize(("replies", "kind", "tried"), MIXED, ids=str)
async def test_relays_are_tried_in_order_until_one_decides(
    replies: tuple[Act | None, ...], kind: type[MailError] | None, tried: int
) -> None:
    scripts: list[Script] = [{} if act is None else {"rcpt": act} for act in replies]
    async with failover_of(*scripts) as (failover, servers):
        error = await outcome(failover)
        assert (None if error is None else type(error)) is kind
        assert [server.connections for server in servers] == [1] * tried + [0] * (len(replies) - tried)
        assert sum(len(server.mails) for server in servers) == (kind is None)


@pytest.mark.parametrize("act", [Drop(), Last("nonsense")], ids=["drop", "garbage"])
async def test_a_mail_that_may_have_been_accepted_goes_to_no_other_relay(act: Act) -> None:
    async with failover_of({"dot": act}, {}) as (failover, [_, second]):
        answers = [True]
        error = await outcome(failover, still=answers.pop)
        assert type(error) is AcceptanceUnknown
        assert second.connections == 0
        assert not answers


async def test_an_aborted_send_goes_to_no_other_relay() -> None:
    async with failover_of({}, {}) as (failover, [first, second]):
        assert type(await outcome(failover, wanted=lambda: False)) is SendAborted
        assert second.connections == 0
        assert not first.mails


async def test_a_relay_with_smtputf8_is_looked_for() -> None:
    unable = [ScriptedServer(offers=("PIPELINING",)) for _ in range(2)]
    dead, refusing = ScriptedServer({"banner": Drop()}), ScriptedServer({"rcpt": REJECTED})
    for servers, kind in (
        (unable, Smtputf8Unsupported),
        ((unable[0], dead), MessageDeferred),
        ((dead, unable[0]), MessageDeferred),
        ((unable[0], refusing), MessageRejected),
    ):
        async with failover_of(*servers) as (failover, _):
            assert type(await outcome(failover, UTF8_ENVELOPE)) is kind
    async with failover_of(unable[0], {}) as (failover, [first, able]):
        assert await outcome(failover, UTF8_ENVELOPE) is None
        # A relay without the extension is healthy.
        assert await outcome(failover) is None
        assert len(first.mails) == len(able.mails) == 1


async def test_an_error_names_relay_step_and_reply() -> None:
    for step, said, reply in (
        ("mail", "553 5.1.8 no", "553 5.1.8 at MAIL FROM"),
        ("rcpt", DEFERRED, "451 4.3.0 at RCPT TO"),
    ):
        async with failover_of({step: said}) as (failover, [server]):
            error = await outcome(failover)
            assert error
            assert (error.relay, error.reply) == (server.url().masked(), reply)
            assert error.sender_refused == (step == "mail")


GONE = "550 5.1.1 gone"


async def refuses(failover: Failover, server: ScriptedServer, name: str, reply: str = GONE, step: str = "rcpt") -> bool:
    """Whether a refusal of this mailbox counts as the mailbox's own."""
    recipient = f"{name}@example.com"
    server.scripts[recipient] = {step: reply}
    error = await send(failover, name)
    del server.scripts[recipient]
    assert error
    return error.credible_refusal


async def test_a_refusal_counts_only_from_a_relay_that_accepted_another_address_lately() -> None:
    clock = Clock()
    async with failover_of({}, clock=clock) as (failover, [server]):
        assert not await refuses(failover, server, "anna")
        assert await send(failover, "anna") is None
        assert not await refuses(failover, server, "anna")
        assert not await refuses(failover, server, "ANNA")
        assert await refuses(failover, server, "bob")
        assert await send(failover, "Anna") is None  # the same mailbox as far as we know
        assert not await refuses(failover, server, "anna")
        assert await send(failover, "carl") is None
        assert await refuses(failover, server, "anna")
        assert await refuses(failover, server, "anna", "550 no such user")
        clock.now += 600
        assert await refuses(failover, server, "anna")
        clock.now += 1
        assert not await refuses(failover, server, "anna")


async def test_what_another_relay_accepted_says_nothing_about_one_that_refuses_all() -> None:
    async with failover_of({"rcpt": ["451 4.3.0 later", GONE]}, {}) as (failover, [refusing, accepting]):
        assert await send(failover, "anna") is None
        assert (len(refusing.mails), len(accepting.mails)) == (0, 1)
        error = await send(failover, "bob")
        assert type(error) is RecipientRejected
        assert not error.credible_refusal


@pytest.mark.parametrize(
    ("step", "reply"),
    [
        ("mail", "550 5.1.1 no"),
        ("mail", "553 no"),
        ("rcpt", "550 5.1.8 sender's domain does not exist"),
        ("rcpt", "553 5.1.7 sender's address is malformed"),
        ("rcpt", "550 5.7.1 no"),
        ("rcpt", "552 5.2.2 full"),
        ("data", GONE),
        ("dot", GONE),
        ("dot", "550 no"),
    ],
)
async def test_a_refusal_of_sender_or_content_says_nothing_about_the_mailbox(step: str, reply: str) -> None:
    async with failover_of({}) as (failover, [server]):
        assert await send(failover, "anna") is None
        server.script[step] = [reply]
        error = await send(failover, "bob")
        assert error
        assert not error.credible_refusal


async def test_a_relay_that_refuses_the_sender_is_followed_by_the_next() -> None:
    async with failover_of({"mail": "553 5.1.8 no"}, {}) as (failover, [_, second]):
        assert await send(failover) is None
        assert len(second.mails) == 1


async def test_an_unhealthy_relay_is_skipped_probed_and_used_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    options: dict[str, Any] = {"login": ("user", "secret"), "connections": 3}
    async with failover_of({"banner": Drop()}, {}, clock=clock, **options) as (failover, [first, second]):
        assert (failover.healthy, failover.capacity) == (True, 3)
        for _ in range(5):
            assert await outcome(failover) is None
        assert (first.connections, len(second.mails)) == (1, 5)
        assert (failover.healthy, failover.capacity) == (True, 2)
        clock.now += 1.0  # the longest first pause
        for _ in range(5):
            assert await outcome(failover) is None
        assert first.connections == 2
        clock.now += 0.99  # the pause has doubled: at least 1 s
        assert await outcome(failover) is None
        assert first.connections == 2
        clock.now += 1.01
        first.script["banner"] = "220 hi"
        first.offers = ("PIPELINING", "AUTH PLAIN")
        for _ in range(3):
            assert await outcome(failover) is None
        assert len(first.mails) == 3
        assert failover.capacity == 3
    own = [record for record in caplog.records if record.name == "worker.mail.failover"]
    assert [(record.levelname, record.getMessage()) for record in own] == [
        ("WARNING", "the relay is unhealthy: no usable reply at banner"),
        ("INFO", "the relay is healthy again"),
    ]
    assert [record.__dict__["relay"] for record in own] == [f"smtp://***@127.0.0.1:{first.port}"] * 2


@pytest.mark.parametrize(
    ("scheme", "host", "script", "why"),
    [
        ("smtp", "127.0.0.1", None, "connection refused"),
        ("smtp", "x" * 64, {}, "host name not found"),
        ("smtps", "127.0.0.1", {}, "TLS failed; is it smtps:// on a plain port?"),
        ("smtp", "127.0.0.1", {"banner": Silence()}, "timed out at banner"),
    ],
)
async def test_a_relay_that_cannot_be_reached_is_logged_with_the_cause_and_the_setting(
    scheme: str, host: str, script: Script | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedServer(script or {}) as server:
        url = server.url(scheme)._replace(host=host)
        if script is None:
            url = url._replace(port=1)
        timeout = 0.2 if script else FOREVER
        failover = Failover([pool_of(url, connections=1, connect_timeout=timeout)], sleep=Clock().sleep)
        # The second mail waits for the connection of the first, and fails before it.
        assert {type(error) for error in await send_many(failover, 2)} == {MessageDeferred}
        await failover.close()
    [record] = [record for record in caplog.records if record.name == "worker.mail.failover"]
    assert record.getMessage() == f"the relay cannot be reached ({why}): check VERIFY_RELAYS"
    assert record.__dict__["relay"] == url.masked()


@pytest.mark.parametrize(
    ("step", "reply", "message"),
    [
        ("auth", "535 5.7.8 no", "the relay refused the login (535): check VERIFY_RELAYS"),
        ("mail", "530 5.7.0 authenticate", "the relay wants a login (530): check VERIFY_RELAYS"),
    ],
)
async def test_a_refused_login_names_the_setting_and_makes_the_relay_unhealthy(
    step: str, reply: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = ScriptedServer({step: reply}, offers=("AUTH PLAIN",))
    async with failover_of(server, {}, login=("user", "secret")) as (failover, [first, second]):
        for _ in range(3):
            assert await outcome(failover) is None
        assert (first.connections, len(second.mails)) == (1, 3)
    [record] = [record for record in caplog.records if record.name == "worker.mail.failover"]
    assert (record.levelname, record.getMessage()) == ("WARNING", message)
    assert (
        record.__dict__["relay"] == masking.mask_text(record.__dict__["relay"]) == f"smtp://***@127.0.0.1:{first.port}"
    )


async def test_without_a_healthy_relay_sends_fail_fast_but_for_one_probe_each() -> None:
    clock = Clock()
    async with failover_of({"banner": Drop()}, {"banner": Drop()}, clock=clock) as (failover, [first, second]):
        for _ in range(10):
            assert type(await outcome(failover)) is MessageDeferred
        assert (first.connections, second.connections) == (1, 1)
        assert (failover.healthy, failover.capacity) == (False, 2)
        clock.now += 1
        errors = await asyncio.gather(*(outcome(failover) for _ in range(50)))
        assert {type(error) for error in errors} == {MessageDeferred}
        assert (first.connections, second.connections) == (2, 2)
        second.script.clear()
        clock.now += 2
        assert await outcome(failover) is None
        assert len(second.mails) == 1
        assert failover.healthy


async def test_beside_a_healthy_relay_the_pause_grows_to_a_minute_and_starts_over() -> None:
    clock = Clock()
    async with failover_of({"banner": Drop()}, {}, clock=clock) as (failover, [server, _]):
        for _ in range(11):
            assert await outcome(failover) is None
            clock.now += 60
        assert server.connections == 11
        clock.now -= 30.1
        await outcome(failover)
        assert server.connections == 11
        server.script.clear()
        clock.now += 30.1
        assert await outcome(failover) is None
        assert len(server.mails) == 1
        server.script["mail"] = server.script["banner"] = Drop()
        await outcome(failover)
        before = server.connections
        clock.now += 1
        await outcome(failover)
        assert server.connections == before + 1


async def test_without_a_healthy_relay_each_is_probed_every_five_seconds_without_mails() -> None:
    clock = Clock()
    async with failover_of({"banner": Drop()}, {"banner": Drop()}, clock=clock) as (failover, [first, second]):
        assert type(await outcome(failover)) is MessageDeferred
        for probes in range(1, 9):
            clock.tick(4)
            await until(lambda: first.connections == second.connections == 1 + probes)  # noqa: B023 - called at once
        second.script.clear()
        while not failover.healthy:
            clock.tick(1)
            await asyncio.sleep(0.01)
        assert not second.mails
        assert [status.unhealthy for status in failover.statuses()] == [True, False]
        assert await outcome(failover) is None
        assert len(second.mails) == 1


async def test_a_relay_that_fails_after_the_connection_is_probed_by_mails_alone() -> None:
    clock = Clock()
    async with failover_of({"mail": ["530 5.7.0 authenticate"]}, clock=clock) as (failover, [server]):
        assert type(await outcome(failover)) is MessageDeferred
        clock.tick(4)
        await until(clock.is_idle)
        assert (server.connections, failover.healthy) == (1, False)
        assert await outcome(failover) is None
        assert failover.healthy


@pytest.mark.parametrize("act", ["554 5.7.1 no", "550 5.1.1 gone", "451 later"])
async def test_a_relay_that_answers_is_healthy(act: str) -> None:
    clock = Clock()
    async with failover_of({"banner": [Drop()], "rcpt": [act]}, clock=clock) as (failover, _):
        assert type(await outcome(failover)) is MessageDeferred
        clock.now += 1
        assert await outcome(failover) is not None
        assert failover.healthy
        assert await outcome(failover) is None


async def test_a_send_that_was_aborted_before_the_relay_answered_says_nothing_of_it() -> None:
    clock = Clock()
    async with failover_of({"banner": [Drop()], "mail": [Silence()]}, clock=clock) as (failover, _):
        assert type(await outcome(failover)) is MessageDeferred
        clock.now += 1
        assert type(await outcome(failover, wanted=lambda: False)) is SendAborted
        assert not failover.healthy


async def test_a_probe_that_is_cancelled_lets_the_next_one_try() -> None:
    clock = Clock()
    banners: list[Act] = [Drop(), Silence()]
    async with failover_of({"banner": banners}, clock=clock) as (failover, _):
        await outcome(failover)
        clock.now += 1
        soon = asyncio.get_running_loop().time() + 0.2
        probe = asyncio.create_task(outcome(failover, deadline=soon))
        await until(lambda: not banners or probe.done())
        assert type(await outcome(failover)) is MessageDeferred
        assert type(await probe) is SendCancelled
        clock.now += 1
        assert await outcome(failover) is None

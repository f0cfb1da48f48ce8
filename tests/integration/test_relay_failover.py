"""Several relays: in order, the sick ones skipped and probed, and what their failures mean together."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

import pytest
from support.relays import outcome
from support.smtp_server import Act, Drop, Last, ScriptedServer, Silence

from producer.setting_types import RelayURL
from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RecipientRejected,
    SendCancelled,
    SendWithheld,
    Smtputf8Unsupported,
)
from worker.mail.failover import Failover
from worker.mail.message import Envelope
from worker.mail.pool import Relay

ENVELOPE = Envelope("no-reply@example.com", "alice@example.com", False, b"Subject: code\r\n\r\nhello\r\n")
WANTS_UTF8 = ENVELOPE._replace(recipient="用户@example.com", needs_smtputf8=True)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(*servers: ScriptedServer | RelayURL, clock: Clock | None = None) -> Failover:
    relays = [
        Relay(
            server if isinstance(server, RelayURL) else server.url(), connections=2, connect_timeout=1, send_timeout=1
        )
        for server in servers
    ]
    return Failover(relays, clock=clock or Clock())


async def attempt(
    failover: Failover, envelope: Envelope = ENVELOPE, *, wanted: bool = True, calls: list[int] | None = None
) -> MailError | None:
    """Send once; the outcome."""

    def before_data() -> bool:
        if calls is not None:
            calls.append(1)
        return wanted

    return await outcome(failover, envelope, wanted=before_data)


REJECTED, DEFERRED, BUSY, DEAD = "554 5.7.1 no", "451 4.3.0 later", "421 4.7.0 too many", Drop()

# What each relay says to RCPT (None: it takes the mail), the outcome, and how many relays were asked.
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


@pytest.mark.parametrize(("says", "kind", "asked"), MIXED, ids=str)
def test_relays_are_asked_in_order_until_one_decides(
    says: tuple[Act | None, ...], kind: type[MailError] | None, asked: int
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(ScriptedServer({} if act is None else {"rcpt": act})) for act in says
            ]
            failover = make(*servers)
            error = await attempt(failover)
            assert (None if error is None else type(error)) is kind
            assert [server.connections for server in servers] == [1] * asked + [0] * (len(says) - asked)
            assert sum(len(server.mails) for server in servers) == (kind is None)
            await failover.close()

    asyncio.run(main())


@pytest.mark.parametrize("act", [Drop(), Last("nonsense"), Silence()], ids=["drop", "garbage", "silence"])
def test_a_mail_that_may_have_been_accepted_goes_to_no_other_relay(act: Act) -> None:
    async def main() -> None:
        async with ScriptedServer({"dot": act}) as first, ScriptedServer() as second:
            failover = make(first, second)
            calls: list[int] = []
            assert type(await attempt(failover, calls=calls)) is AcceptanceUnknown
            assert second.connections == 0
            assert len(calls) == 1
            await failover.close()

    asyncio.run(main())


def test_a_withheld_send_goes_to_no_other_relay() -> None:
    async def main() -> None:
        async with ScriptedServer() as first, ScriptedServer() as second:
            failover = make(first, second)
            assert type(await attempt(failover, wanted=False)) is SendWithheld
            assert second.connections == 0
            assert not first.mails
            await failover.close()

    asyncio.run(main())


def test_smtputf8_is_looked_for_everywhere() -> None:
    async def main() -> None:
        async with (
            ScriptedServer(offers=("PIPELINING",)) as first,
            ScriptedServer(offers=("PIPELINING",)) as second,
            ScriptedServer() as able,
            ScriptedServer({"rcpt": REJECTED}) as refusing,
            ScriptedServer({"banner": Drop()}) as dead,
        ):
            for servers, kind in (
                ((first, second), Smtputf8Unsupported),
                ((first, dead), MessageDeferred),
                ((dead, first), MessageDeferred),
                ((first, refusing), MessageRejected),
            ):
                failover = make(*servers)
                assert type(await attempt(failover, WANTS_UTF8)) is kind
                await failover.close()
            failover = make(first, able)
            assert await attempt(failover, WANTS_UTF8) is None
            # Lacking an extension is no sickness.
            assert await attempt(failover) is None
            assert len(first.mails) == len(able.mails) == 1
            await failover.close()

    asyncio.run(main())


def test_a_sick_relay_is_skipped_probed_and_used_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        clock = Clock()
        async with ScriptedServer({"banner": Drop()}) as first, ScriptedServer() as second:
            failover = make(first.url("smtp", "user", "secret"), second, clock=clock)
            for _ in range(5):
                assert await attempt(failover) is None
            assert (first.connections, len(second.mails)) == (1, 5)
            assert failover.capacity == 2
            clock.now += 1.0  # the longest the first pause can be
            for _ in range(5):
                assert await attempt(failover) is None
            assert first.connections == 2
            clock.now += 0.99  # the pause has doubled: at least 1 s
            assert await attempt(failover) is None
            assert first.connections == 2
            clock.now += 1.01
            first.script["banner"] = "220 hi"
            first.offers = ("PIPELINING", "AUTH PLAIN")
            for _ in range(3):
                assert await attempt(failover) is None
            assert len(first.mails) == 3
            assert failover.capacity == 2
            await failover.close()

    asyncio.run(main())
    own = [record for record in caplog.records if record.name == "worker.mail.failover"]
    assert [record.levelname for record in own] == ["WARNING", "INFO"]
    assert "RelayUnavailable" in own[0].getMessage()
    assert not any(word in caplog.text for word in ("secret", "alice"))


def test_with_all_relays_sick_sends_fail_fast_but_for_one_probe() -> None:
    async def main() -> None:
        clock = Clock()
        async with ScriptedServer({"banner": Drop()}) as first, ScriptedServer({"banner": Drop()}) as second:
            failover = make(first, second, clock=clock)
            for _ in range(10):
                assert type(await attempt(failover)) is MessageDeferred
            assert (first.connections, second.connections) == (1, 1)
            assert failover.capacity == 2
            clock.now += 1
            outcomes = await asyncio.gather(*(attempt(failover) for _ in range(50)))
            assert {type(outcome) for outcome in outcomes} == {MessageDeferred}
            assert (first.connections, second.connections) == (2, 2)
            second.script.clear()
            clock.now += 2
            assert await attempt(failover) is None
            assert len(second.mails) == 1
            await failover.close()

    asyncio.run(main())


def test_the_pause_grows_to_a_minute_and_starts_over() -> None:
    async def main() -> None:
        clock = Clock()
        async with ScriptedServer({"banner": Drop()}) as server:
            failover = make(server, clock=clock)
            await attempt(failover)
            for _ in range(10):
                clock.now += 60
                await attempt(failover)
            assert server.connections == 11
            clock.now += 29.9
            await attempt(failover)
            assert server.connections == 11
            server.script.clear()
            clock.now += 30.1
            assert await attempt(failover) is None
            server.script["mail"] = server.script["banner"] = Drop()
            assert type(await attempt(failover)) is MessageDeferred
            before = server.connections
            clock.now += 1
            await attempt(failover)
            assert server.connections == before + 1
            await failover.close()

    asyncio.run(main())


@pytest.mark.parametrize("act", ["554 5.7.1 no", "550 5.1.1 gone", "451 later"])
def test_a_relay_that_answers_is_not_sick(act: str) -> None:
    async def main() -> None:
        clock = Clock()
        async with ScriptedServer({"banner": [Drop()], "rcpt": [act]}) as server:
            failover = make(server, clock=clock)
            assert type(await attempt(failover)) is MessageDeferred
            clock.now += 1
            assert await attempt(failover) is not None
            assert await attempt(failover) is None
            await failover.close()

    asyncio.run(main())


def test_a_probe_whose_own_deadline_comes_lets_the_next_one_try() -> None:
    async def main() -> None:
        clock = Clock()
        async with ScriptedServer({"banner": [Drop(), Silence()]}) as server:
            failover = make(server, clock=clock)
            await attempt(failover)
            clock.now += 1
            soon = asyncio.get_running_loop().time() + 0.2
            probe = asyncio.create_task(outcome(failover, ENVELOPE, deadline=soon))
            while server.script["banner"]:  # noqa: ASYNC110 what is waited for is the server's
                await asyncio.sleep(0.01)
            assert type(await attempt(failover)) is MessageDeferred
            assert type(await probe) is SendCancelled
            clock.now += 1
            assert await attempt(failover) is None
            await failover.close()

    asyncio.run(main())


def test_wrong_credentials_make_a_relay_sick() -> None:
    async def main() -> None:
        async with (
            ScriptedServer({"auth": "535 5.7.8 no"}, offers=("AUTH PLAIN",)) as first,
            ScriptedServer() as second,
        ):
            failover = make(first.url("smtp", "u", "p"), second)
            for _ in range(3):
                assert await attempt(failover) is None
            assert (first.connections, len(second.mails)) == (1, 3)
            await failover.close()

    asyncio.run(main())

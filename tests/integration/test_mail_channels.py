"""What every mail channel promises to failover. Another channel is another harness in `HARNESSES`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import pytest
from support.fake_channel import ERRORS, FakeChannel
from support.relays import ENVELOPE, outcome, pool_of, until
from support.smtp_server import Act, Drop, ScriptedServer, Silence

from producer.setting_types import RELAY_PORTS
from worker.bootstrap import CHANNELS
from worker.mail.channel import RelayChannel
from worker.mail.errors import MailError, RecipientRejected, RelayUnavailable, SendAborted, SendCancelled

SCRIPTS: dict[str, dict[str, Act | list[Act]]] = {
    "accept": {},
    "reject": {"rcpt": "550 5.1.1 gone"},
    "defer": {"rcpt": "451 4.3.0 later"},
    "unreachable": {"banner": Drop(), "mail": Drop()},
    "lost": {"dot": Drop()},
    "silent": {"mail": Silence()},
}


class Harness(NamedTuple):
    """A channel and the relay behind it."""

    channel: RelayChannel
    behave: Callable[[str], None]  # as a key of `SCRIPTS` says
    accepted: Callable[[], list[tuple[str, bytes]]]  # recipient and content of each mail


@asynccontextmanager
async def smtp() -> AsyncIterator[Harness]:
    async with ScriptedServer() as server:
        channel = pool_of(server)
        yield Harness(
            channel,
            lambda how: setattr(server, "script", SCRIPTS[how]),
            lambda: [(mail.recipient, mail.content) for mail in server.mails],
        )
        await channel.close()


@asynccontextmanager
async def fake() -> AsyncIterator[Harness]:
    channel = FakeChannel()
    yield Harness(
        channel,
        lambda how: setattr(channel, "behaviour", how),
        lambda: [(envelope.recipient, envelope.content) for envelope in channel.accepted],
    )


Opened = Callable[[], AbstractAsyncContextManager[Harness]]
HARNESSES: list[Opened] = [smtp, fake]
every_channel = pytest.mark.parametrize("opened", HARNESSES)


@every_channel
async def test_an_accepted_mail_reaches_the_relay_once(opened: Opened) -> None:
    async with opened() as harness:
        assert await outcome(harness.channel, ENVELOPE) is None
        assert harness.accepted() == [(ENVELOPE.recipient, ENVELOPE.content)]


@every_channel
@pytest.mark.parametrize(("behaviour", "kind"), ERRORS.items())
async def test_each_failure_has_its_kind_and_the_channel_recovers(
    behaviour: str, kind: type[MailError], opened: Opened
) -> None:
    async with opened() as harness:
        for _ in range(2):
            harness.behave(behaviour)
            assert type(await outcome(harness.channel, ENVELOPE)) is kind
            assert not harness.accepted()
        harness.behave("accept")
        assert await outcome(harness.channel, ENVELOPE) is None


@every_channel
async def test_the_content_leaves_only_if_it_is_wanted(opened: Opened) -> None:
    async with opened() as harness:
        answers = [False]
        assert type(await outcome(harness.channel, ENVELOPE, wanted=answers.pop)) is SendAborted
        assert not answers
        with pytest.raises(IndexError):
            await outcome(harness.channel, ENVELOPE, wanted=answers.pop)
        assert not harness.accepted()
        assert await outcome(harness.channel, ENVELOPE) is None


@every_channel
async def test_the_content_leaves_only_if_that_is_still_permitted(opened: Opened) -> None:
    async with opened() as harness:
        assert type(await outcome(harness.channel, ENVELOPE, still=lambda: False)) is SendAborted
        assert not harness.accepted()
        assert await outcome(harness.channel, ENVELOPE) is None


@every_channel
@pytest.mark.parametrize("answer", [True, False])
async def test_an_answer_that_comes_after_the_mail_was_refused_changes_nothing(opened: Opened, answer: bool) -> None:
    async with opened() as harness:
        asked: list[Callable[[bool], None]] = []
        harness.behave("reject")
        assert type(await outcome(harness.channel, ENVELOPE, before_data=asked.append)) is RecipientRejected
        harness.behave("accept")
        sending = asyncio.create_task(outcome(harness.channel, ENVELOPE, before_data=asked.append))
        refused = len(asked)
        await until(lambda: len(asked) > refused)
        for go in asked[:refused]:
            go(answer)
        await asyncio.sleep(0.05)
        assert not sending.done()
        assert not harness.accepted()
        asked[-1](True)
        assert await sending is None


@every_channel
async def test_an_envelope_that_cannot_be_sent_is_a_value_error(opened: Opened) -> None:
    async with opened() as harness:
        with pytest.raises(ValueError, match="an address"):
            await outcome(harness.channel, ENVELOPE._replace(recipient="a@b.cc>\r\nRCPT TO:<v@b.cc"))
        assert harness.channel.open_connections == 0


@every_channel
async def test_many_mails_at_once_all_arrive(opened: Opened) -> None:
    async with opened() as harness:
        recipients = [f"user{number}@example.com" for number in range(50)]
        sends = (outcome(harness.channel, ENVELOPE._replace(recipient=recipient)) for recipient in recipients)
        assert await asyncio.gather(*sends) == [None] * 50
        assert sorted(recipient for recipient, _ in harness.accepted()) == sorted(recipients)


@every_channel
async def test_a_mail_whose_deadline_passes_is_cancelled(opened: Opened) -> None:
    async with opened() as harness:
        harness.behave("silent")
        soon = asyncio.get_running_loop().time() + 0.05
        assert type(await outcome(harness.channel, ENVELOPE, deadline=soon)) is SendCancelled


@every_channel
async def test_close_cancels_what_is_on_its_way_and_what_comes_later(opened: Opened) -> None:
    async with opened() as harness:
        harness.behave("silent")
        sends = [asyncio.create_task(outcome(harness.channel, ENVELOPE)) for _ in range(9)]
        await asyncio.sleep(0.05)
        await harness.channel.close()
        assert {type(error) for error in await asyncio.gather(*sends)} == {SendCancelled}
        assert type(await outcome(harness.channel, ENVELOPE)) is SendCancelled
        assert harness.channel.open_connections == 0


@every_channel
async def test_check_says_whether_the_relay_can_be_reached_and_sends_nothing(opened: Opened) -> None:
    async with opened() as harness:
        await harness.channel.check()
        harness.behave("unreachable")
        with pytest.raises(RelayUnavailable):
            await harness.channel.check()
        assert not harness.accepted()
        await until(lambda: harness.channel.open_connections == 0)


def test_every_url_scheme_has_a_channel() -> None:
    assert CHANNELS.keys() == RELAY_PORTS.keys()

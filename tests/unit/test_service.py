"""The use case with a store in memory and a mail channel that a test answers for: no Redis, no SMTP."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, cast

import pytest
from support.memory_store import MemoryCodeStore
from support.store_driver import POLICY, claim_of

from producer.contract import ErrorCode, VerifyRequest
from producer.errors import StoreUnavailable
from producer.setting_types import Sender
from producer.store.codes import COOLDOWN_HIT, REFUSED, RESPELLED, Claim, Outcome, StoreError
from worker.gathering import Gathering
from worker.job import Job
from worker.mail.errors import AcceptanceUnknown, MailError, MessageDeferred, Smtputf8Unsupported, Step, classify
from worker.mail.message import Mail
from worker.mail.render import Renderer
from worker.metrics import Counters
from worker.service import RETRY_BASE, RETRY_CAP, Service, retry_delay

Call = tuple[Any, ...]


class Harness:
    """A service, the mails that its channel got, and what it told its settler."""

    def __init__(self) -> None:
        self.store = MemoryCodeStore(POLICY)
        self.counters = Counters()
        self.mails: list[Mail] = []
        self.settled: list[Call] = []
        sender = Sender("", "no-reply@example.com")
        renderer = Renderer(sender, default_locale="en")
        us = cast(Any, self)  # as the channel, and as the settler
        self.service = Service(
            self.store, us, renderer, us, self.counters, Gathering(), sender=sender.mailbox, code_digits=12
        )

    async def serve(self, *names: str) -> list[Mail]:
        """Serve a request for each name. Their mails."""
        return await self.serve_all(
            *(Job(name, f"tag-{name}", VerifyRequest(f"{name}@example.com"), None, None) for name in names)
        )

    async def serve_all(self, *jobs: Job) -> list[Mail]:
        """Serve requests. Their mails."""
        before = len(self.mails)
        await self.service.serve(list(jobs))
        return self.mails[before:]

    # As the mail channel.

    def send(self, mail: Mail) -> None:
        self.mails.append(mail)

    async def close(self) -> None:
        for mail in self.mails:
            mail.done(MessageDeferred())

    # As the settler.

    def answer(self, job: Job, error: ErrorCode, *, mark: bool, refusal: str = "") -> None:
        self.settled.append((job.request_id, error, mark, *filter(None, [refusal])))

    def retry(self, job: Job, delay: float, *, unknown: bool) -> None:
        assert 0 <= delay <= RETRY_CAP
        self.settled.append((job.request_id, "retry", unknown))

    def wait(self, job: Job, delay: float) -> None:
        assert delay > 0
        self.settled.append((job.request_id, "wait"))

    def store_unavailable(self, job: Job) -> None:
        self.settled.append((job.request_id, "unavailable"))


@pytest.fixture
def harness() -> Harness:
    return Harness()


def test_retries_back_off_exponentially_up_to_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    delays = [retry_delay(tries, 1000.0) for tries in (0, 1, 5, 6, 7, 10_000)]
    assert delays == [RETRY_BASE, 2.0, 32.0, RETRY_CAP, RETRY_CAP, RETRY_CAP]
    assert retry_delay(7, 3.0) == 3.0  # never past the deadline


def test_retries_are_jittered() -> None:
    delays = {retry_delay(5, 1000.0) for _ in range(50)}
    assert len(delays) > 40
    assert all(0 <= delay <= 32 for delay in delays)


@pytest.mark.parametrize(
    ("error", "settled"),
    [
        (None, (ErrorCode.SUCCESS, True)),
        (classify(Step.RCPT, 550, None), (ErrorCode.MAIL_REJECTED, True)),
        (classify(Step.CONTENT, 554, None), (ErrorCode.MAIL_REJECTED, True)),
        (Smtputf8Unsupported(), (ErrorCode.INVALID_ADDRESS, True)),
        (MessageDeferred(450), ("retry", False)),
        (AcceptanceUnknown(), ("retry", True)),
        (LookupError("anna@example.com"), (ErrorCode.EXCEPTION, True)),
    ],
)
async def test_each_outcome_of_a_send_is_settled(
    harness: Harness, error: Exception | None, settled: Call, caplog: pytest.LogCaptureFixture
) -> None:
    [mail] = await harness.serve("anna")
    mail.done(error)
    assert harness.settled == [("anna", *settled)]
    assert "anna@" not in caplog.text


@pytest.mark.parametrize(
    ("error", "level", "message"),
    [
        (classify(Step.MAIL, 553, "5.1.8"), logging.WARNING, "the relay refused the sender: check VERIFY_MAIL_FROM"),
        (classify(Step.RCPT, 550, "5.1.1"), logging.INFO, "mail rejected"),
    ],
)
async def test_a_refused_sender_is_told_apart_from_a_refused_mailbox(
    harness: Harness, error: MailError, level: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    error.relay = "smtp://***@relay.example.com"
    [mail] = await harness.serve("anna")
    mail.done(error)
    assert harness.settled == [("anna", ErrorCode.MAIL_REJECTED, True)]
    [line] = caplog.records
    assert (line.levelno, line.getMessage()) == (level, message)
    expected = {"request_id": "anna", "relay": error.relay, "reply": error.reply}
    assert vars(line).items() >= expected.items()


@pytest.mark.parametrize("invalid", [True, False])
async def test_only_a_mailbox_that_is_invalid_is_suppressed(harness: Harness, invalid: bool) -> None:
    error = classify(Step.RCPT, 550, "5.1.1")
    error.credible_refusal = invalid
    [mail] = await harness.serve("anna")
    mail.done(error)
    suppressed = [REFUSED] if invalid else []
    assert harness.settled == [("anna", ErrorCode.MAIL_REJECTED, True, *suppressed)]


async def test_a_refusal_of_another_spelling_is_told_apart(harness: Harness) -> None:
    error = classify(Step.RCPT, 550, "5.1.1")
    error.credible_refusal = True
    [mail] = await harness.serve("Anna")
    mail.done(error)
    assert harness.settled == [("Anna", ErrorCode.MAIL_REJECTED, True, RESPELLED)]


RELAY = "smtp://***@relay.example.com"


@pytest.mark.parametrize(
    ("error", "relay", "fields"),
    [
        (MessageDeferred(450, "4.2.1", Step.RCPT), RELAY, {"relay": RELAY, "reply": "450 4.2.1 at RCPT TO"}),
        (MessageDeferred(step=Step.CONNECT), RELAY, {"why": "no healthy relay"}),
        (MessageDeferred(), None, {"why": "no healthy relay"}),
        (MessageDeferred(), RELAY, {"relay": RELAY, "why": "no free connection in time"}),
    ],
)
async def test_a_deferred_mail_is_logged_with_the_reply_or_the_reason(
    harness: Harness, error: MailError, relay: str | None, fields: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    error.relay = relay
    [mail] = await harness.serve("anna")
    mail.done(error)
    [line] = caplog.records
    assert line.getMessage() == "mail deferred"
    assert {name: value for name, value in vars(line).items() if name in {"relay", "reply", "why"}} == fields


async def test_a_request_that_needs_no_mail_is_settled_at_once(harness: Harness) -> None:
    [mail] = await harness.serve("anna")
    anna = VerifyRequest("anna@example.com")
    assert await harness.serve_all(Job("two", "b", anna, None, None)) == []
    mail.done(None)
    await harness.store.settle([Outcome(claim_of("anna", token="tag-anna"), ErrorCode.SUCCESS)])
    invalid = Job("four", "d", VerifyRequest("no address"), None, None)
    assert await harness.serve_all(Job("three", "c", anna, None, None), invalid) == []
    assert harness.settled == [
        ("two", "wait"),
        ("anna", ErrorCode.SUCCESS, True),
        ("three", ErrorCode.SUCCESS, False),
        ("four", ErrorCode.INVALID_ADDRESS, False),
    ]
    assert (harness.counters.joins, harness.counters.hits[COOLDOWN_HIT]) == (1, 1)


async def test_an_unavailable_store_and_a_failing_template_each_settle_every_request(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(harness.store, "issue", _unavailable)
        assert await harness.serve("anna", "bob") == []
    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "render", _unavailable)
        assert await harness.serve("carl") == []
    assert harness.settled == [
        ("anna", "unavailable"),
        ("bob", "unavailable"),
        ("carl", ErrorCode.EXCEPTION, True),
    ]


async def test_a_store_that_refuses_or_is_lost_is_reported_once_until_it_can_be_used(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(requests: list[object]) -> list[StoreError]:
        return [StoreError("OOM") for _ in requests]

    for _ in range(2):
        for issue in (refuse, _unavailable):
            with monkeypatch.context() as patch:
                patch.setattr(harness.store, "issue", issue)
                await harness.serve("anna", "bob")
                await harness.serve("carl")
        [mail] = await harness.serve("dora")
        with monkeypatch.context() as patch:
            patch.setattr(harness.store, "announce_data", _unavailable)
            for _ in range(2):
                mail.before_data(lambda _: None)
                await asyncio.sleep(0.01)
        await harness.serve("emil")
    said = [line.getMessage().split(":")[0] for line in caplog.records if line.name == "worker.service"]
    assert said == 2 * ["the code store refuses requests", *2 * ["the code store cannot be used"]]


def _unavailable(*_: object, **__: object) -> Any:
    raise StoreUnavailable


async def test_content_is_written_only_once_the_store_has_confirmed_the_lease(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    mails = await harness.serve("anna", "bob", "carl")
    allowed: list[bool] = []
    announced: list[list[str]] = []
    answer = asyncio.get_running_loop().create_future()

    async def announce_data(claims: list[Claim]) -> list[bool | StoreError]:
        announced.append([claim.request_id for claim in claims])
        return await answer  # type: ignore[no-any-return]  # a future of what this returns

    monkeypatch.setattr(harness.store, "announce_data", announce_data)
    for mail in mails:
        mail.before_data(allowed.append)
    await asyncio.sleep(0.01)
    assert (announced, allowed) == ([["anna", "bob", "carl"]], [])
    answer.set_result([True, False, StoreError("OOM")])
    await asyncio.sleep(0.01)
    assert (len(announced), allowed) == (1, [True, False, False])


@pytest.mark.parametrize("error", [StoreUnavailable, LookupError])
async def test_no_content_is_written_if_its_announcement_fails(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    [mail] = await harness.serve("anna")
    allowed: list[bool] = []

    async def fail(_claims: list[Claim]) -> list[bool]:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(harness.store, "announce_data", fail)
        mail.before_data(allowed.append)
        await asyncio.sleep(0.01)
    assert allowed == [False]
    mail.before_data(allowed.append)
    await asyncio.sleep(0.01)
    assert allowed == [False, True]


async def test_content_is_written_only_while_the_lease_has_not_expired(harness: Harness) -> None:
    [mail] = await harness.serve("anna")
    assert mail.still_permitted()
    harness.service._leased["tag-anna"].lease_until = 0.0
    assert not mail.still_permitted()


async def test_a_renewed_lease_is_extended_and_a_lost_one_is_not(harness: Harness) -> None:
    await harness.serve("anna", "bob")
    leased = harness.service._leased
    for job in leased.values():
        job.lease_until = 1.0
    harness.store.state.records["bob"].token = "another worker's"
    await harness.service.renew_leases()
    assert leased["tag-anna"].lease_until > 1.0
    assert leased["tag-bob"].lease_until == 1.0


async def test_a_stopping_worker_cancels_what_does_not_finish_and_retries_it_at_once(harness: Harness) -> None:
    await harness.serve("anna")
    await harness.service.drain(0.01)
    assert harness.settled == [("anna", "retry", False)]

"""When a request is answered without waiting for a reply: only if every living worker says that no relay is healthy."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from producer.api import relay_watch
from producer.api.readiness import Finding, Readiness
from producer.api.relay_watch import RelayWatch
from producer.contract import ErrorCode, Reply
from producer.store.backlog import Backlog

EMAIL = "a@example.com"


class FakeReadiness:
    """Finds this many workers, of which so many have no healthy relay; None: the broker does not answer."""

    def __init__(self, workers: int | None, unhealthy: int = 0) -> None:
        self.looks = 0
        self._backlog = None if workers is None else Backlog(0, 0, 0, 0, workers, None, unhealthy)

    async def find(self) -> Finding:
        self.looks += 1
        return Finding({}, self._backlog)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_AFTER", "LOOK_EVERY", "ANSWER_AFTER"):
        monkeypatch.setattr(relay_watch, name, 0.01)


def answered(readiness: FakeReadiness, *, seconds: float, queued: bool = True) -> ErrorCode:
    """The error of a request whose reply comes after `seconds`."""

    async def ask() -> ErrorCode:
        watch = RelayWatch(cast(Readiness, readiness))
        wait = watch.wait()

        async def request() -> Reply:
            wait.on_publish("id")
            if queued:
                wait.on_confirmed()
            await asyncio.sleep(seconds)
            return Reply(EMAIL, ErrorCode.SUCCESS)

        try:
            return (await wait.reply(request())).error
        finally:
            await watch.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("workers", [1, 3])
def test_no_healthy_relay_anywhere_is_a_timeout_at_once(workers: int) -> None:
    assert answered(FakeReadiness(workers, workers), seconds=3600) is ErrorCode.TIMEOUT


@pytest.mark.parametrize(("workers", "unhealthy"), [(None, 0), (0, 0), (1, 0), (2, 1)])
def test_otherwise_the_reply_is_awaited(workers: int | None, unhealthy: int) -> None:
    readiness = FakeReadiness(workers, unhealthy)
    assert answered(readiness, seconds=0.3) is ErrorCode.SUCCESS
    assert readiness.looks


def test_a_request_that_is_not_queued_yet_waits_on() -> None:
    assert answered(FakeReadiness(1, 1), seconds=0.3, queued=False) is ErrorCode.SUCCESS


def test_a_request_that_is_answered_soon_costs_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_watch, "LOOK_AFTER", 3600)
    readiness = FakeReadiness(1, 1)
    assert answered(readiness, seconds=0) is ErrorCode.SUCCESS
    assert readiness.looks == 0


@pytest.mark.parametrize("cancel", [False, True], ids=["the client's own timeout", "a caller that cancels"])
def test_other_ends_are_not_answered(*, cancel: bool) -> None:
    async def ask() -> None:
        async def request() -> Reply:
            if cancel:
                await asyncio.sleep(3600)
            raise TimeoutError

        task = asyncio.create_task(RelayWatch(cast(Readiness, FakeReadiness(1))).wait().reply(request()))
        await asyncio.sleep(0)
        if cancel:
            task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError if cancel else TimeoutError):
        asyncio.run(ask())

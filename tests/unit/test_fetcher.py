"""When the fetcher takes messages, and how many. Redis, the service, the settler and Celery are fakes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any, cast
from unittest.mock import Mock

import pytest
from support.caller import message

from producer.contract import ErrorCode
from worker import fetcher
from worker.fetcher import CelerySide, Fetcher, Prefetch
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import MAX_MOVES, RequestQueue

AT_ONCE, AHEAD = 4, 8
ETA = {"eta": "2100-01-01T00:00:00"}
GROUP = {"group": "g"}  # needs Celery at once
ACK = ("ack",)


@pytest.fixture(autouse=True)
def no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty queue is asked again only when a test says so, however slow the machine is."""
    monkeypatch.setattr(fetcher, "RECHECK_TIME", 3600.0)


class FakeChannel:
    """A mail channel with a fixed capacity."""

    def __init__(self, capacity: int = AT_ONCE) -> None:
        self.capacity = capacity


class Harness:
    """A fetcher between fakes: this object is the broker, the service and the settler."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []  # the queue in Redis
        self.asked: list[int] = []  # how many messages each `reserve` wanted
        self.celery = Mock(CelerySide, **{"is_revoked.return_value": False})
        self.under_way = 0  # outcomes that are not settled yet
        self.counters = Counters()
        self.prefetch = Prefetch(FakeChannel(), self.counters)
        self.set_ahead(AHEAD)
        self.pushed = asyncio.Event()
        self._tags = itertools.count()
        queue = RequestQueue("verification", visibility_timeout=30)
        us, waiter = cast(Any, self), cast(Any, FakeWaiter(self.pushed))
        self.fetcher = Fetcher(us, waiter, queue, us, us, self.celery, self.counters, self.prefetch)

    def set_ahead(self, count: int) -> None:
        """Let the prefetch hold so many messages beyond what can be sent at once."""
        self.prefetch._rate, self.prefetch._fetch = count / fetcher.MAX_AHEAD, 1.0

    def push(self, count: int, **options: Any) -> None:
        """Put `count` messages on the queue."""
        self.waiting += [json.dumps(message({"email": "a@example.com"}, **options)).encode() for _ in range(count)]
        self.pushed.set()

    async def run(self, commands: list[Any]) -> list[Any]:
        """Answer as the broker does."""
        [command] = commands
        await asyncio.sleep(0)
        if command == ACK:
            return [0]
        wanted = len(RequestQueue.tags_of(command))
        self.asked.append(wanted)
        taken, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        pairs = [(b"tag%d" % next(self._tags), each) for each in taken]
        return [[0, 0, *(part for pair in pairs for part in pair)]]

    async def serve(self, jobs: list[Job]) -> None:
        """Start to serve, as the service does: the sends do not end by themselves."""

    @property
    def events(self) -> list[Finished]:
        """The settled requests that Celery's side was told of, one entry a call."""
        return [call.args[0] for call in self.celery.done.call_args_list]

    @property
    def celery_tags(self) -> list[str]:
        """The delivery tags of the messages that went to Celery."""
        return [call.args[0]["properties"]["delivery_tag"] for call in self.celery.to_celery.call_args_list]

    def finish(self, count: int) -> None:
        """Settle so many of those held."""
        self.fetcher.done([(job, ErrorCode.SUCCESS) for job in list(self.fetcher.held.values())[:count]])


class FakeWaiter:
    """The connection that blocks until a message comes."""

    def __init__(self, pushed: asyncio.Event) -> None:
        self._pushed = pushed

    async def run(self, _commands: object) -> list[Any]:
        await self._pushed.wait()
        self._pushed.clear()
        return [b""]


async def turns() -> None:
    """Let everything happen that can happen now."""
    for _ in range(50):
        await asyncio.sleep(0)


def run(scenario: Callable[[Harness], Awaitable[None]]) -> Harness:
    async def main() -> Harness:
        harness = Harness()
        fetching = asyncio.create_task(harness.fetcher._fetch_all())
        harness.fetcher.consume(on=True)
        await turns()
        await scenario(harness)
        fetching.cancel()
        await asyncio.wait([fetching])
        return harness

    return asyncio.run(main())


def test_an_idle_worker_takes_what_comes_at_once_and_asks_once() -> None:
    async def scenario(harness: Harness) -> None:
        assert harness.asked == [AT_ONCE + AHEAD]
        harness.push(1)
        await turns()
        assert len(harness.fetcher.held) == 1
        harness.push(2)
        await turns()
        assert len(harness.fetcher.held) == 3
        assert harness.asked[1:] == [AT_ONCE + AHEAD, AT_ONCE + AHEAD - 1]

    run(scenario)


def test_no_more_is_held_than_can_be_sent_soon() -> None:
    async def scenario(harness: Harness) -> None:
        harness.push(100)
        await turns()
        for _ in range(20):
            assert len(harness.fetcher.held) == AT_ONCE + AHEAD
            harness.finish(AHEAD // 4)
            await turns()
        assert len(harness.waiting) == 100 - AT_ONCE - AHEAD - 20 * AHEAD // 4

    run(scenario)


def test_what_is_held_ahead_is_refilled_a_share_at_a_time() -> None:
    async def scenario(harness: Harness) -> None:
        harness.push(100)
        await turns()
        asked = len(harness.asked)
        harness.finish(AHEAD // 4 - 1)
        await turns()
        assert len(harness.asked) == asked
        harness.finish(1)
        await turns()
        assert harness.asked[asked:] == [AHEAD // 4]

    run(scenario)


def test_a_connection_with_nothing_to_send_gets_work_at_once() -> None:
    async def scenario(harness: Harness) -> None:
        harness.set_ahead(0)
        harness.push(100)
        await turns()
        harness.finish(len(harness.fetcher.held) - AT_ONCE)
        await turns()
        for _ in range(5):
            asked = len(harness.asked)
            harness.finish(1)
            await turns()
            assert harness.asked[asked:] == [1]
            assert len(harness.fetcher.held) == AT_ONCE

    run(scenario)


def test_a_mail_that_has_left_its_connection_makes_room_before_it_is_settled() -> None:
    async def scenario(harness: Harness) -> None:
        harness.set_ahead(0)
        harness.push(100)
        await turns()
        harness.finish(len(harness.fetcher.held) - AT_ONCE)
        await turns()
        assert len(harness.fetcher.held) == AT_ONCE
        harness.under_way = 2
        harness.fetcher.outcome()
        await turns()
        assert len(harness.fetcher.held) == AT_ONCE + 2
        harness.under_way = 100  # outcomes that cannot be settled do not pile up
        assert harness.fetcher._wanted() == 2 * AT_ONCE - len(harness.fetcher.held)

    run(scenario)


def test_how_much_is_held_ahead_depends_on_how_long_a_fetch_takes() -> None:
    counters = Counters()
    prefetch = Prefetch(FakeChannel(), counters)
    for tick in range(20):
        counters.mails += 1000
        prefetch.tick(float(tick))
    for seconds, ahead in ((0.001, 2), (0.004, 8), (10.0, 30)):
        for _ in range(100):
            prefetch.fetched(seconds)
        assert prefetch.wanted(0, settling=0) == AT_ONCE + ahead


def test_an_empty_queue_is_not_asked_again_for_each_settled_request() -> None:
    async def scenario(harness: Harness) -> None:
        harness.push(3)
        await turns()
        asked = len(harness.asked)
        for _ in range(3):
            harness.finish(1)
            await turns()
        assert len(harness.asked) == asked
        harness.push(1)
        await turns()
        assert len(harness.fetcher.held) == 1

    run(scenario)


def test_an_empty_queue_is_asked_again_for_what_a_settled_request_woke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "RECHECK_TIME", 0.0)

    async def scenario(harness: Harness) -> None:
        harness.push(1)
        await turns()
        asked = len(harness.asked)
        harness.finish(1)
        await turns()
        assert len(harness.asked) == asked + 1

    run(scenario)


def test_what_celery_has_to_run_counts_as_held_unless_it_waits_for_its_eta() -> None:
    async def scenario(harness: Harness) -> None:
        harness.push(5, headers=ETA)
        harness.push(3, headers=GROUP)
        await turns()
        tags = harness.celery_tags
        assert len(tags) == 8
        assert harness.fetcher._wanted() == AT_ONCE + AHEAD - 3
        assert harness.fetcher.load == 8
        serving = [asyncio.create_task(harness.fetcher.serve_for_celery(tag)) for tag in (tags[0], tags[-1])]
        await turns()
        assert harness.fetcher._wanted() == AT_ONCE + AHEAD - 4  # the ETA of one has come
        harness.finish(2)
        assert [(await each) is not None for each in serving] == [True, True]
        for tag in tags:
            await harness.fetcher.leave_celery(tag, lambda _: [ACK])
        assert harness.fetcher._wanted() == AT_ONCE + AHEAD
        assert harness.fetcher.load == 0

    # Celery itself sends the events of its tasks.
    assert [finished for finished in run(scenario).events if finished] == []


def test_messages_are_taken_again_once_celery_is_done_with_its_own() -> None:
    async def scenario(harness: Harness) -> None:
        harness.set_ahead(0)
        harness.push(AT_ONCE, headers=GROUP)
        await turns()
        harness.push(3)
        await turns()
        assert harness.fetcher.held == {}
        for tag in harness.celery_tags:
            await harness.fetcher.leave_celery(tag, lambda _: [ACK])
        await turns()
        assert len(harness.fetcher.held) == 3

    run(scenario)


def test_one_reservation_never_asks_for_more_than_a_script_can_carry() -> None:
    assert Prefetch(FakeChannel(10_000), Counters()).wanted(0, settling=0) == MAX_MOVES


def test_celery_is_told_once_of_all_that_a_round_trip_settled() -> None:
    async def scenario(harness: Harness) -> None:
        harness.push(3)
        harness.push(1, headers=GROUP)
        await turns()
        task = asyncio.create_task(harness.fetcher.serve_for_celery(harness.celery_tags[0]))
        await turns()
        jobs = list(harness.fetcher.held.values())
        harness.fetcher.done([(job, ErrorCode.SUCCESS) for job in jobs[:2]] + [(job, None) for job in jobs[2:]])
        assert await task is None
        assert harness.fetcher.held == {}

    [told] = run(scenario).events
    # A delayed request's event is ours to send, even if a task of Celery waited for it.
    assert [error for _, error in told] == [ErrorCode.SUCCESS, ErrorCode.SUCCESS, None, None]

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
from worker.gathering import Gathering
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import MAX_MOVES, RequestQueue, Waiter

AT_ONCE, AHEAD = 4, 8
ETA = {"eta": "2100-01-01T00:00:00"}
SCHEDULE = RequestQueue("verification", visibility_timeout=30).schedule([])
GROUP = {"group": "g"}  # needs Celery at once
ACK = ("ack",)


@pytest.fixture(autouse=True)
def no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that wants few messages asks for them only when a test says so, however slow the machine is."""
    monkeypatch.setattr(fetcher, "RECHECK_TIME", 3600.0)


class Harness:
    """A fetcher between fakes: this object is the broker, the service and the settler."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []  # the queue in Redis
        self.asked: list[int] = []  # how many messages each `reserve` wanted
        self.celery = Mock(CelerySide, **{"is_revoked.return_value": False})
        self.delays = 1  # what is answered for each message with an ETA; 0: it is due
        self.under_way = 0  # outcomes that are not settled yet
        self.counters = Counters()
        self.prefetch = Prefetch(lambda: AT_ONCE, self.counters)
        self.set_ahead(AHEAD)
        self.pushed = asyncio.Event()
        self._tags = itertools.count()
        queue = RequestQueue("verification", visibility_timeout=30)
        us, waiter = cast(Any, self), cast(Any, Mock(run_muted=self.wait))
        self.fetcher = Fetcher(us, waiter, queue, us, us, self.celery, self.counters, self.prefetch, Gathering())

    def set_ahead(self, count: int) -> None:
        """Let the prefetch hold so many messages beyond what can be sent at once."""
        self.prefetch._rate, self.prefetch._fetch = count / fetcher.MAX_AHEAD, 1.0

    async def push(self, count: int, **options: Any) -> None:
        """Put `count` messages on the queue, and let the fetcher take them."""
        self.waiting += [json.dumps(message({"email": "a@example.com"}, **options)).encode() for _ in range(count)]
        self.pushed.set()
        await turns()

    async def wait(self, _command: object, then: object) -> list[Any]:
        """Block until a message comes, and reserve, as the waiting connection does."""
        await self.pushed.wait()
        [answer] = await self.run([then])
        return cast("list[Any]", answer)

    async def run(self, commands: list[Any]) -> list[Any]:
        """Answer as the broker does."""
        [command] = commands
        await asyncio.sleep(0)
        if command == ACK:
            return [0]
        if command[:2] == SCHEDULE[:2]:
            return [[self.delays] * ((len(command) - len(SCHEDULE)) // 2)]
        wanted = len(RequestQueue.tags_of(command))
        self.asked.append(wanted)
        taken, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        pairs = [(b"tag%d" % next(self._tags), each) for each in taken]
        if not self.waiting:
            self.pushed.clear()
        waits = Waiter.SELF if wanted - len(taken) >= command[-1] else Waiter.NONE
        return [[0, 0, waits, *(part for pair in pairs for part in pair)]]

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

    async def finish(self, count: int) -> None:
        """Settle so many of those held, and let the fetcher take others."""
        self.fetcher.done([(job, ErrorCode.SUCCESS) for job in list(self.fetcher.held.values())[:count]])
        await turns()


async def turns() -> None:
    """Let everything happen that can happen now."""
    for _ in range(50):
        await asyncio.sleep(0)


def scenario(test: Callable[[Harness], Awaitable[None]]) -> Callable[[], None]:
    """Runs a test on the loop of a fetcher that takes messages."""

    async def main() -> None:
        harness = Harness()
        fetching = asyncio.create_task(harness.fetcher._fetch_all())
        harness.fetcher.consume(on=True)
        await turns()
        await test(harness)
        fetching.cancel()
        await asyncio.wait([fetching])

    return lambda: asyncio.run(main())


@scenario
async def test_an_idle_worker_takes_what_comes_at_once_and_asks_once(harness: Harness) -> None:
    assert harness.asked == [AT_ONCE + AHEAD]
    await harness.push(1)
    assert len(harness.fetcher.held) == 1
    await harness.push(2)
    assert len(harness.fetcher.held) == 3
    assert harness.asked[1:] == [AT_ONCE + AHEAD, AT_ONCE + AHEAD - 1]


@scenario
async def test_no_more_is_held_than_can_be_sent_soon(harness: Harness) -> None:
    await harness.push(100)
    for _ in range(20):
        assert len(harness.fetcher.held) == AT_ONCE + AHEAD
        await harness.finish(AHEAD // 4)
    assert len(harness.waiting) == 100 - AT_ONCE - AHEAD - 20 * AHEAD // 4


@scenario
async def test_what_is_held_ahead_is_refilled_a_share_at_a_time(harness: Harness) -> None:
    await harness.push(100)
    asked = len(harness.asked)
    await harness.finish(AHEAD // 4 - 1)
    assert len(harness.asked) == asked
    await harness.finish(1)
    assert harness.asked[asked:] == [AHEAD // 4]


@scenario
async def test_a_connection_with_nothing_to_send_gets_work_at_once(harness: Harness) -> None:
    harness.set_ahead(0)
    await harness.push(100)
    await harness.finish(len(harness.fetcher.held) - AT_ONCE)
    for _ in range(5):
        asked = len(harness.asked)
        await harness.finish(1)
        assert harness.asked[asked:] == [1]
        assert len(harness.fetcher.held) == AT_ONCE


@scenario
async def test_a_mail_that_has_left_its_connection_makes_room_before_it_is_settled(harness: Harness) -> None:
    harness.set_ahead(0)
    await harness.push(100)
    await harness.finish(len(harness.fetcher.held) - AT_ONCE)
    assert len(harness.fetcher.held) == AT_ONCE
    harness.under_way = 2
    harness.fetcher.outcome()
    await turns()
    assert len(harness.fetcher.held) == AT_ONCE + 2
    harness.under_way = 100  # outcomes that cannot be settled do not pile up
    assert harness.fetcher._wanted() == 2 * AT_ONCE - len(harness.fetcher.held)


def test_how_much_is_held_ahead_depends_on_how_long_a_fetch_takes() -> None:
    counters = Counters()
    prefetch = Prefetch(lambda: AT_ONCE, counters)
    for tick in range(20):
        counters.mails += 1000
        prefetch.tick(float(tick))
    for seconds, ahead in ((0.001, 10), (0.004, 10), (0.008, 16), (10.0, 30)):
        for _ in range(100):
            prefetch.fetched(seconds)
        assert prefetch.wanted(0, settling=0) == AT_ONCE + ahead


@scenario
async def test_an_empty_queue_is_not_asked_again_for_each_settled_request(harness: Harness) -> None:
    await harness.push(3)
    asked = len(harness.asked)
    for _ in range(3):
        await harness.finish(1)
    assert len(harness.asked) == asked
    await harness.push(1)
    assert len(harness.fetcher.held) == 1


@scenario
async def test_a_worker_that_wants_few_messages_asks_for_them_after_a_moment(harness: Harness) -> None:
    await harness.push(AT_ONCE + AHEAD - 2)
    asked = len(harness.asked)
    await harness.push(2)
    assert len(harness.asked) == asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetcher, "RECHECK_TIME", 0.0)
        harness.fetcher.consume(on=True)
        await turns()
    assert harness.asked[asked] == 2
    assert len(harness.fetcher.held) == AT_ONCE + AHEAD


@scenario
async def test_what_celery_has_to_run_counts_as_held(harness: Harness) -> None:
    await harness.push(3, headers=GROUP)
    tags = harness.celery_tags
    assert harness.fetcher._wanted() == AT_ONCE + AHEAD - 3
    assert harness.fetcher.tags() == tags
    serving = asyncio.create_task(harness.fetcher.serve_for_celery(tags[0]))
    await turns()
    assert harness.fetcher._wanted() == AT_ONCE + AHEAD - 3
    await harness.finish(1)
    assert await serving is not None
    for tag in tags:
        await harness.fetcher.leave_celery(tag, ACK)
    assert harness.fetcher._wanted() == AT_ONCE + AHEAD
    assert harness.fetcher.tags() == []
    # Celery itself sends the events of its tasks.
    assert [finished for finished in harness.events if finished] == []


@scenario
async def test_what_waits_for_its_eta_is_not_held(harness: Harness) -> None:
    await harness.push(5, headers=ETA)
    assert harness.fetcher.tags() == []
    assert harness.counters.taken == 0
    harness.delays = 0
    await harness.push(2, headers=ETA)
    await harness.push(1, headers=ETA | GROUP)
    assert len(harness.fetcher.held) == 2
    assert len(harness.celery_tags) == 1
    assert harness.counters.taken == 3


@scenario
async def test_messages_are_taken_again_once_celery_is_done_with_its_own(harness: Harness) -> None:
    harness.set_ahead(0)
    await harness.push(AT_ONCE, headers=GROUP)
    await harness.push(3)
    assert harness.fetcher.held == {}
    for tag in harness.celery_tags:
        await harness.fetcher.leave_celery(tag, ACK)
    await turns()
    assert len(harness.fetcher.held) == 3


def test_one_reservation_never_asks_for_more_than_a_script_can_carry() -> None:
    assert Prefetch(lambda: 10_000, Counters()).wanted(0, settling=0) == MAX_MOVES


@scenario
async def test_celery_is_told_once_of_all_that_a_round_trip_settled(harness: Harness) -> None:
    await harness.push(3)
    await harness.push(1, headers=GROUP)
    task = asyncio.create_task(harness.fetcher.serve_for_celery(harness.celery_tags[0]))
    await turns()
    jobs = list(harness.fetcher.held.values())
    harness.fetcher.done([(job, ErrorCode.SUCCESS) for job in jobs[:2]] + [(job, None) for job in jobs[2:]])
    assert await task is None
    assert harness.fetcher.held == {}
    [told] = harness.events
    # A delayed request's event is ours to send, even if a task of Celery waited for it.
    assert [error for _, error in told] == [ErrorCode.SUCCESS, ErrorCode.SUCCESS, None, None]

"""When the intake takes messages, and how many: with Redis, the service and Celery played by the test."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

from support.caller import message

from producer.contract import ErrorCode
from worker.fetcher import LOOK, CelerySide, Fetcher, Prefetch
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import MAX_MOVES, RequestQueue

AT_ONCE, AHEAD = 4, 8
ETA = {"eta": "2100-01-01T00:00:00"}
ACK = ("ack",)


class _Channel:
    def __init__(self, capacity: int = AT_ONCE) -> None:
        self.capacity = capacity


class Play:
    """An intake, and all that is around it."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []  # the queue in Redis
        self.asked: list[int] = []  # how many messages each `reserve` wanted
        self.served: list[list[Job]] = []
        self.told: list[Finished] = []
        self.to_celery: list[dict[str, Any]] = []
        self.under_way = 0  # outcomes that are not settled yet
        self.counters = Counters()
        self.prefetch = Prefetch(_Channel(), self.counters)
        self.prefetch._rate, self.prefetch._fetch = AHEAD / 0.03, 1.0
        self.came = asyncio.Event()
        self._tags = itertools.count()
        queue = RequestQueue("verification", visibility_timeout=30)
        us, waiter = cast(Any, self), cast(Any, _Waiter(self))  # of each part, the intake uses what is here
        self.fetcher = Fetcher(us, waiter, queue, us, us, _World(self), self.counters, self.prefetch, lambda: True)

    def push(self, count: int, **options: Any) -> None:
        """So many messages more."""
        self.waiting += [json.dumps(message({"email": "a@example.com"}, **options)).encode() for _ in range(count)]
        self.came.set()

    async def run(self, commands: list[Any]) -> list[Any]:
        """As the broker."""
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
        """As the service."""
        self.served.append(jobs)

    def finish(self, count: int) -> None:
        """As the settler: so many of those held are done."""
        self.fetcher.done([(job, ErrorCode.SUCCESS) for job in list(self.fetcher.held.values())[:count]])


class _World(CelerySide):
    def __init__(self, play: Play) -> None:
        self._play = play

    def done(self, finished: Finished) -> None:
        self._play.told.append(finished)

    def to_celery(self, message: dict[str, Any]) -> None:
        self._play.to_celery.append(message)


class _Waiter:
    """As the connection that blocks until a message comes."""

    def __init__(self, play: Play) -> None:
        self._play = play

    async def run(self, _commands: object) -> list[Any]:
        await self._play.came.wait()
        self._play.came.clear()
        return [b""]


async def turns() -> None:
    """Let all happen that can happen now."""
    for _ in range(50):
        await asyncio.sleep(0)


def play(scene: Callable[[Play], Awaitable[None]]) -> Play:
    async def main() -> Play:
        play = Play()
        taking = asyncio.create_task(play.fetcher._take())
        play.fetcher.consume(on=True)
        await turns()
        await scene(play)
        taking.cancel()
        await asyncio.wait([taking])
        return play

    return asyncio.run(main())


def test_an_idle_worker_takes_what_comes_at_once_and_asks_once() -> None:
    async def scene(play: Play) -> None:
        assert play.asked == [AT_ONCE + AHEAD]
        play.push(1)
        await turns()
        assert len(play.fetcher.held) == 1
        play.push(2)
        await turns()
        assert len(play.fetcher.held) == 3
        assert play.asked[1:] == [AT_ONCE + AHEAD, AT_ONCE + AHEAD - 1]

    play(scene)


def test_no_more_is_held_than_can_be_sent_soon() -> None:
    async def scene(play: Play) -> None:
        play.push(100)
        await turns()
        for _ in range(20):
            assert len(play.fetcher.held) == AT_ONCE + AHEAD
            play.finish(AHEAD // 4)
            await turns()
        assert len(play.waiting) == 100 - AT_ONCE - AHEAD - 20 * AHEAD // 4

    play(scene)


def test_what_is_held_ahead_is_filled_up_a_share_at_a_time() -> None:
    async def scene(play: Play) -> None:
        play.push(100)
        await turns()
        asked = len(play.asked)
        play.finish(AHEAD // 4 - 1)
        await turns()
        assert len(play.asked) == asked
        play.finish(1)
        await turns()
        assert play.asked[asked:] == [AHEAD // 4]

    play(scene)


def test_a_connection_that_has_nothing_to_send_gets_work_at_once() -> None:
    async def scene(play: Play) -> None:
        play.prefetch._rate = 0.0  # nothing ahead
        play.push(100)
        await turns()
        play.finish(len(play.fetcher.held) - AT_ONCE)
        await turns()
        for _ in range(5):
            asked = len(play.asked)
            play.finish(1)
            await turns()
            assert play.asked[asked:] == [1]
            assert len(play.fetcher.held) == AT_ONCE

    play(scene)


def test_a_mail_that_has_left_its_connection_makes_room_for_the_next_before_it_is_settled() -> None:
    async def scene(play: Play) -> None:
        play.prefetch._rate = 0.0
        play.push(100)
        await turns()
        play.finish(len(play.fetcher.held) - AT_ONCE)
        await turns()
        assert len(play.fetcher.held) == AT_ONCE
        play.under_way = 2
        play.fetcher.outcome()
        await turns()
        assert len(play.fetcher.held) == AT_ONCE + 2
        play.under_way = 100  # outcomes that cannot be settled do not pile up
        assert play.fetcher._wanted() == 2 * AT_ONCE - len(play.fetcher.held)

    play(scene)


def test_how_much_is_held_ahead_goes_by_how_long_a_fetch_takes() -> None:
    counters = Counters()
    prefetch = Prefetch(_Channel(), counters)
    for tick in range(20):
        counters.mails += 1000
        prefetch.tick(float(tick))
    for seconds, ahead in ((0.001, 2), (0.004, 8), (10.0, 30)):
        for _ in range(100):
            prefetch.fetched(seconds)
        assert prefetch.wanted(0, settling=0) == AT_ONCE + ahead


def test_an_empty_queue_is_not_asked_again_for_each_request_that_is_done() -> None:
    async def scene(play: Play) -> None:
        play.push(3)
        await turns()
        asked = len(play.asked)
        for _ in range(3):
            play.finish(1)
            await turns()
        assert len(play.asked) == asked
        # But for what may have been woken by them.
        await asyncio.sleep(2 * LOOK)
        assert len(play.asked) == asked + 1
        play.push(1)
        await turns()
        assert len(play.fetcher.held) == 1

    play(scene)


def test_what_celery_has_still_to_run_counts_and_what_waits_there_for_its_eta_does_not() -> None:
    async def scene(play: Play) -> None:
        play.push(5, headers=ETA)
        play.push(3, headers={"group": "g"})
        await turns()
        assert len(play.to_celery) == 8
        assert play.fetcher._wanted() == AT_ONCE + AHEAD - 3
        assert play.fetcher.load == 8
        tags = [each["properties"]["delivery_tag"] for each in play.to_celery]
        serving = [asyncio.create_task(play.fetcher.serve_for_celery(tag)) for tag in (tags[0], tags[-1])]
        await turns()
        assert play.fetcher._wanted() == AT_ONCE + AHEAD - 4  # the one whose time has come now does
        play.finish(2)
        assert [(await each) is not None for each in serving] == [True, True]
        for tag in tags:
            await play.fetcher.leave_celery(tag, lambda _: [ACK])
        assert play.fetcher._wanted() == AT_ONCE + AHEAD
        assert play.fetcher.load == 0

    played = play(scene)
    # Celery tells the world of its tasks itself.
    assert [finished for finished in played.told if finished] == []


def test_messages_are_taken_on_when_celery_is_done_with_what_filled_the_hands() -> None:
    async def scene(play: Play) -> None:
        play.prefetch._rate = 0.0
        play.push(AT_ONCE, headers={"group": "g"})
        await turns()
        play.push(3)
        await turns()
        assert play.fetcher.held == {}
        for each in play.to_celery:
            await play.fetcher.leave_celery(each["properties"]["delivery_tag"], lambda _: [ACK])
        await turns()
        assert len(play.fetcher.held) == 3

    play(scene)


def test_one_call_never_asks_for_more_than_a_script_can_carry() -> None:
    assert Prefetch(_Channel(10_000), Counters()).wanted(0, settling=0) == MAX_MOVES


def test_the_world_is_told_of_a_whole_trip_at_once() -> None:
    async def scene(play: Play) -> None:
        play.push(3)
        play.push(1, headers={"group": "g"})
        await turns()
        celery = asyncio.create_task(play.fetcher.serve_for_celery(play.to_celery[0]["properties"]["delivery_tag"]))
        await turns()
        jobs = list(play.fetcher.held.values())
        play.fetcher.done([(job, ErrorCode.SUCCESS) for job in jobs[:2]] + [(job, None) for job in jobs[2:]])
        assert await celery is None
        assert play.fetcher.held == {}

    [told] = play(scene).told
    # Of what was parked, Celery knows nothing.
    assert [error for _, error in told] == [ErrorCode.SUCCESS, ErrorCode.SUCCESS, None, None]

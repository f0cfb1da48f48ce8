"""One timer, many futures."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

from producer.core.deadlines import Deadlines

SECONDS = 0.05


def late(future: asyncio.Future[Any]) -> None:
    future.set_result("late")


def test_who_is_not_done_in_time_gets_its_end() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        patience = Deadlines(SECONDS, late)
        began = loop.time()
        first, done, second = (loop.create_future() for _ in range(3))
        patience.watch(first)
        patience.watch(done)
        done.set_result("in time")
        await asyncio.sleep(SECONDS / 2)
        patience.watch(second)
        assert await first == "late"
        assert SECONDS <= loop.time() - began < 2 * SECONDS
        assert not second.done()
        assert await second == "late"
        assert 1.5 * SECONDS <= loop.time() - began < 3 * SECONDS
        assert await done == "in time"
        assert not any(each in patience for each in (first, done, second))

    asyncio.run(work())


def test_who_is_forgotten_is_left_alone_and_not_kept() -> None:
    async def work() -> None:
        patience = Deadlines(SECONDS, late)
        future = asyncio.get_running_loop().create_future()
        patience.watch(future)
        assert future in patience
        patience.forget(future)
        patience.forget(future)
        assert future not in patience
        there = weakref.ref(future)
        await asyncio.sleep(2 * SECONDS)
        assert not future.done()
        del future
        gc.collect()
        assert there() is None

    asyncio.run(work())


def test_it_goes_on_after_it_had_nobody() -> None:
    async def work() -> None:
        patience = Deadlines(SECONDS, late)
        for _ in range(2):
            future = asyncio.get_running_loop().create_future()
            patience.watch(future)
            assert await future == "late"
            await asyncio.sleep(2 * SECONDS)

    asyncio.run(work())


def test_a_crowd_has_one_timer() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        patience = Deadlines(SECONDS, late)
        crowd = [loop.create_future() for _ in range(10_000)]
        for each in crowd:
            patience.watch(each)
        assert len(loop._scheduled) == 1  # type: ignore[attr-defined]  # asyncio's own heap
        assert set(await asyncio.gather(*crowd)) == {"late"}

    asyncio.run(work())


def test_closed_it_watches_none() -> None:
    async def work() -> None:
        patience = Deadlines(SECONDS, late)
        future = asyncio.get_running_loop().create_future()
        patience.watch(future)
        patience.close()
        await asyncio.sleep(2 * SECONDS)
        assert not future.done()

    asyncio.run(work())

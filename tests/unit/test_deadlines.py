"""One timer for many futures, on a loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import gc
import selectors
import weakref
from typing import Any

import pytest

from producer.core.deadlines import Deadlines


class _JumpingSelector(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0
        return super().select(0)


def _jumping_loop() -> asyncio.AbstractEventLoop:
    selector = _JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    return loop


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": _jumping_loop}


def started() -> tuple[Deadlines, asyncio.AbstractEventLoop]:
    """Deadlines of one second, which set "late", and the loop."""
    return Deadlines(1, lambda future: future.set_result("late")), asyncio.get_running_loop()


async def test_futures_that_are_not_done_in_time_expire() -> None:
    deadlines, loop = started()
    first, done, second = (loop.create_future() for _ in range(3))
    deadlines.watch(first)
    deadlines.watch(done)
    done.set_result("in time")
    await asyncio.sleep(0.5)
    deadlines.watch(second)
    assert await first == "late"
    assert round(loop.time(), 3) == 1
    assert not second.done()
    assert await second == "late"
    assert round(loop.time(), 3) == 1.5
    assert await done == "in time"
    assert not any(each in deadlines for each in (first, done, second))
    later = loop.create_future()
    deadlines.watch(later)  # after a time without futures
    assert await later == "late"


async def test_a_forgotten_future_does_not_expire_and_is_not_kept() -> None:
    deadlines, loop = started()
    future = loop.create_future()
    deadlines.watch(future)
    assert future in deadlines
    deadlines.forget(future)
    deadlines.forget(future)
    assert future not in deadlines
    alive = weakref.ref(future)
    await asyncio.sleep(2)
    assert not future.done()
    del future
    gc.collect()
    assert alive() is None


async def test_ten_thousand_futures_share_one_timer() -> None:
    deadlines, loop = started()
    crowd = [loop.create_future() for _ in range(10_000)]
    for each in crowd:
        deadlines.watch(each)
    timers = loop._scheduled  # type: ignore[attr-defined]  # asyncio's own heap
    assert len(timers) == 1
    assert set(await asyncio.gather(*crowd)) == {"late"}


async def test_after_close_nothing_expires() -> None:
    deadlines, loop = started()
    future = loop.create_future()
    deadlines.watch(future)
    deadlines.close()
    await asyncio.sleep(2)
    assert not future.done()

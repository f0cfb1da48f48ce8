"""One timer for many futures, on a loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import gc
import selectors
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

from producer.core.deadlines import Deadlines

Futures = Callable[[int], list[asyncio.Future[str]]]


class _JumpingSelector(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0
        return super().select(0)


def run(use: Callable[[Deadlines, Futures], Coroutine[Any, Any, None]]) -> None:
    """Call `use` with deadlines of one second, which set "late", and a maker of futures."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(1, lambda future: future.set_result("late"))
        await use(deadlines, lambda count: [loop.create_future() for _ in range(count)])

    selector = _JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def test_futures_that_are_not_done_in_time_expire() -> None:
    async def use(deadlines: Deadlines, futures: Futures) -> None:
        loop = asyncio.get_running_loop()
        first, done, second = futures(3)
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
        [later] = futures(1)
        deadlines.watch(later)  # after a time without futures
        assert await later == "late"

    run(use)


def test_a_forgotten_future_does_not_expire_and_is_not_kept() -> None:
    async def use(deadlines: Deadlines, futures: Futures) -> None:
        [future] = futures(1)
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

    run(use)


def test_ten_thousand_futures_share_one_timer() -> None:
    async def use(deadlines: Deadlines, futures: Futures) -> None:
        crowd = futures(10_000)
        for each in crowd:
            deadlines.watch(each)
        timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]  # asyncio's own heap
        assert len(timers) == 1
        assert set(await asyncio.gather(*crowd)) == {"late"}

    run(use)


def test_after_close_nothing_expires() -> None:
    async def use(deadlines: Deadlines, futures: Futures) -> None:
        [future] = futures(1)
        deadlines.watch(future)
        deadlines.close()
        await asyncio.sleep(2)
        assert not future.done()

    run(use)

"""A busy worker lets requests gather before a trip; one that has time does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import count, repeat

import pytest

from worker import gathering
from worker.gathering import PAUSE, Gathering


def pauses(monkeypatch: pytest.MonkeyPatch, computed: Iterator[float]) -> float:
    """Seconds that a pause takes; `computed`: the CPU time of the loop's thread, each time it is asked for."""
    monkeypatch.setattr(gathering, "_PERIOD", 0.0)
    monkeypatch.setattr(time, "thread_time", lambda: next(computed))

    async def main() -> float:
        each = Gathering()
        before = asyncio.get_running_loop().time()
        turn = asyncio.create_task(asyncio.sleep(0))
        await each.pause()
        return asyncio.get_running_loop().time() - before if turn.done() else 0.0

    return asyncio.run(main())


def test_a_busy_worker_lets_requests_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pauses(monkeypatch, count(1e9, 1e9)) >= PAUSE / 2


def test_a_worker_that_has_time_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pauses(monkeypatch, repeat(0.0)) == 0.0

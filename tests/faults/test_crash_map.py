"""The crash map: a process is killed, frozen or cut off at a step of a request, and the promises hold. See
docs/crash-map.md; the whole of it is slow, and a part of it is tried each time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.process import eventually

from bench.crash_map.broken import WAYS
from bench.crash_map.cells import Result, cells_of, find_steps, lanes, try_all
from bench.crash_map.network import RECEIVED, RELAY, SENT, Step
from bench.crash_map.scenarios import Actor, Cell, Fault, Place, Servers, places

ALONE = Place(Servers.ONE, Actor.WORKER, "alone")
REDIS = "redis"


def results_of(cells: Iterable[Cell], *, count: int, broken: str = "") -> list[Result]:
    """Try these cells, `count` at a time."""
    results: list[Result] = []

    async def try_them() -> None:
        async with lanes(count, broken=broken) as on:
            await try_all(on, cells, results.append)

    asyncio.run(try_them())
    return results


def failed(results: Iterable[Result]) -> list[str]:
    """The results that show a broken promise, with what happened."""
    return ["\n".join([str(result), *result.story]) for result in results if result.breaches]


def test_the_decisive_steps_of_a_request_can_fail() -> None:
    results = results_of(
        [
            # Between the wake of a worker and its reservation, and between that and the answer.
            Cell(ALONE, Step(REDIS, SENT, "reserve", 1), Fault.KILLED_BEFORE),
            Cell(ALONE, Step(REDIS, SENT, "reserve", 1), Fault.FROZEN),
            Cell(ALONE, Step(REDIS, SENT, "reserve", 1), Fault.CUT_LONG),
            Cell(ALONE, Step(REDIS, RECEIVED, "reserve", 1), Fault.KILLED_BEFORE),
            Cell(ALONE, Step(REDIS, RECEIVED, "issue", 1), Fault.LOST),
            Cell(ALONE, Step(REDIS, RECEIVED, "announce_data", 1), Fault.FROZEN),
            Cell(ALONE, Step(RELAY, SENT, "content", 1), Fault.KILLED_AFTER),
            Cell(ALONE, Step(RELAY, RECEIVED, "content", 1), Fault.LOST),
            Cell(ALONE, Step(REDIS, SENT, "settle", 1), Fault.CUT_LONG),
            Cell(ALONE, Step(REDIS, SENT, "answer", 1), Fault.KILLED_BEFORE),
            Cell(ALONE, Step(REDIS, SENT, "answer", 1), Fault.CUT_SHORT),
        ],
        count=6,
    )
    assert failed(results) == []
    assert [str(result) for result in results if result.silent] == []
    once = {Fault.FROZEN, Fault.KILLED_BEFORE, Fault.CUT_SHORT}
    assert {result.mails for result in results if result.cell.fault in once} == {1}


@pytest.mark.slow
def test_an_interrupted_map_ends_and_its_processes_with_it() -> None:
    pids: list[int] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def drill() -> None:
        async with lanes(1) as on:
            await on[0].configure(ALONE)
            pids.append((await on[0].helper()).child.pid)
            asyncio.get_running_loop().call_soon(interrupt)
            await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(drill())
    eventually(lambda: not Path(f"/proc/{pids[0]}").exists())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_worker_that_is_broken_on_purpose_shows(way: str) -> None:
    cells = [
        Cell(ALONE, Step(REDIS, SENT, "settle", 1), Fault.KILLED_BEFORE),
        Cell(ALONE, Step(REDIS, SENT, "issue", 1), Fault.KILLED_BEFORE),
        Cell(ALONE, Step(RELAY, RECEIVED, "DATA", 1), Fault.FROZEN),
        Cell(ALONE, Step(RELAY, SENT, "content", 1), Fault.LOST),
        Cell(Place(Servers.ONE, Actor.WORKER, "used"), Step(RELAY, RECEIVED, "content", 1), Fault.KILLED_BEFORE),
    ]
    assert failed(results_of(cells, count=len(cells), broken=way)), "no cell is red"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_step_of_a_request_can_fail_in_every_way() -> None:
    results: list[Result] = []

    async def try_them() -> None:
        async with lanes(10) as on:
            steps = await find_steps(on, places(), results.append)
            await try_all(on, cells_of(steps), results.append)

    asyncio.run(try_them())
    assert failed(results) == []
    silent = [str(result) for result in results if result.silent]
    assert len(silent) < len(results) / 20, silent

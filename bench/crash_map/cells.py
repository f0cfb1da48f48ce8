"""Finds the steps of a place, tries every fault at every step, and judges what is left."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from bench.crash_map.forks import Forks
from bench.crash_map.lane import Lane
from bench.crash_map.network import RECEIVED, SENT, Frame, Step, label
from bench.crash_map.promises import breaches
from bench.crash_map.scenarios import Actor, Cell, Place, faults_at
from bench.crash_map.trial import run

# Runs of a cell in which the machine was too busy, or the step did not occur, before that is the result.
TRIES: Final = 4
_LAST: Final = {  # what ends a request, for each process: steps after it do not count
    Actor.WORKER: [(RECEIVED, "answer"), (RECEIVED, "ack")],
    Actor.CLIENT: [(RECEIVED, "message")],
    Actor.API: [(SENT, "POST")],
}


@dataclass(slots=True)
class Result:
    """What a cell showed."""

    cell: Cell
    mails: int = 0
    errors: list[int | None] = field(default_factory=list)  # the replies
    breaches: list[str] = field(default_factory=list)
    silent: str = ""  # why it shows nothing
    story: list[str] = field(default_factory=list)  # of a breach: what passed, for people to read

    def __str__(self) -> str:
        servers, actor, scenario = self.cell.place
        step, fault = self.cell.step, self.cell.fault
        at = "" if step is None else f" at {step.link} {step.name} {step.nth} {step.way}"
        how = "no fault" if fault is None else fault.value
        said = "; ".join(self.breaches) or self.silent or "kept"
        found = f"{self.mails} mails, replies {self.errors}"
        return f"{servers.value}, {actor.value}, {scenario}, {how}{at}: {said} ({found})"


T = TypeVar("T")
Told = Callable[[Result], None]
Steps = dict[Place, list[tuple[Step, str]]]


@asynccontextmanager
async def lanes(count: int, *, broken: str = "") -> AsyncIterator[list[Lane]]:
    """So many lanes. `broken`: how workers are broken on purpose."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-map-")))
        forks = await stack.enter_async_context(Forks())
        yield [
            await stack.enter_async_context(Lane(forks, folder / f"{number}", broken=broken)) for number in range(count)
        ]


async def find_steps(on: Sequence[Lane], wanted: Iterable[Place], told: Told) -> Steps:
    """The steps of each place, with their labels.

    A place of which a run without a fault breaks a promise has none, and the result of that run is `told`.
    """
    wanted = list(wanted)
    steps: Steps = {place: [] for place in wanted}  # in this order

    async def find(lane: Lane, place: Place) -> None:
        steps[place] = await _steps(lane, place, told)

    await _share(on, find, wanted)
    return steps


def cells_of(steps: Steps) -> list[Cell]:
    """Every way to fail at every step."""
    return [
        Cell(place, step, fault)
        for place, found in steps.items()
        for step, _ in found
        for fault in faults_at(place, step)
    ]


async def try_all(on: Sequence[Lane], cells: Iterable[Cell], told: Told) -> None:
    """Try these cells; `told` gets each result as it comes."""

    async def attempt(lane: Lane, cell: Cell) -> None:
        told(await _result(lane, cell))

    await _share(on, attempt, cells)


async def _share(
    lanes: Sequence[Lane], work: Callable[[Lane, T], Coroutine[Any, Any, None]], items: Iterable[T]
) -> None:
    """Have each lane take the next item when it is done with one."""
    waiting = iter(items)

    async def take(lane: Lane) -> None:
        for item in waiting:
            await work(lane, item)

    async with asyncio.TaskGroup() as group:
        for lane in lanes:
            group.create_task(take(lane))


async def _steps(lane: Lane, place: Place, told: Told) -> list[tuple[Step, str]]:
    """The steps that occur in each of two runs without a fault, in the order of the first."""
    runs: list[list[Frame]] = []
    while len(runs) < 2:
        outcome = await run(lane, Cell(place))
        if not outcome.stalled:
            if found := breaches(Cell(place), outcome):
                told(Result(Cell(place), breaches=found, story=outcome.story))
                return []
            runs.append(outcome.trace)
    first, second = runs
    ends = [at for at, frame in enumerate(first) if (frame.way, frame.name) in _LAST[place.actor]]
    in_both = {frame.step for frame in second}
    return [
        (frame.step, label(frame))
        for frame in first[: ends[-1] + 1]
        if frame.step is not None and frame.step in in_both
    ]


async def _result(lane: Lane, cell: Cell) -> Result:
    """Try it until a run says something. A busy machine is no excuse for a promise that holds even so."""
    for _ in range(TRIES):
        outcome = await run(lane, cell)
        found = breaches(cell, outcome)
        silent = outcome.stalled if found or not outcome.trace else ""
        if not found and cell.step is not None and outcome.struck_at is None:
            silent = silent or "the step did not occur"
        if not silent:
            errors = [each.error for each in outcome.asked]
            return Result(cell, len(outcome.mails), errors, found, story=outcome.story if found else [])
    return Result(cell, silent=silent)

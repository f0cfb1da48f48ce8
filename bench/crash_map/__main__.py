"""`make crash-map`: break one process at each step of a request, in each way, and draw what becomes of the request."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from bench.crash_map.broken import WAYS
from bench.crash_map.cells import Result, Steps, cells_of, find_steps, lanes, try_all
from bench.crash_map.picture import picture
from bench.crash_map.record import Map
from bench.crash_map.scenarios import SCENARIOS, Actor, Cell, Fault, Servers, places

LANES: Final = 5 * (os.cpu_count() or 1)  # almost all is waiting
_EVERY: Final = 20.0  # seconds between two lines of progress

E = TypeVar("E", bound=Enum)


def main() -> int:
    """The exit code: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m bench.crash_map", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="try all cells, or those that are named")
    run.add_argument("--servers", nargs="+", choices=[each.name.lower() for each in Servers])
    run.add_argument("--actors", nargs="+", choices=[each.name.lower() for each in Actor])
    run.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS))
    run.add_argument("--faults", nargs="+", choices=[each.name.lower() for each in Fault])
    run.add_argument("--steps", nargs="+", metavar="NAME", help="such as issue, content, ack")
    run.add_argument("--lanes", type=int, default=LANES, help=f"cells at the same time (here {LANES})")
    run.add_argument("--broken", choices=list(WAYS), default="", help="break workers on purpose: there must be red")
    run.add_argument("--results", type=Path, help="also write the results to this file (JSON)")
    run.add_argument("--picture", type=Path, help="also draw them (SVG)")
    draw = commands.add_parser("draw", help="draw results that were written before, those of parts as one")
    draw.add_argument("results", type=Path, nargs="+")
    draw.add_argument("picture", type=Path)
    options = parser.parse_args()
    if options.command == "draw":
        _draw(Map.read(options.results), options.picture)
        return 0
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    servers, actors = _named(Servers, options.servers), _named(Actor, options.actors)
    faults, scenarios = _named(Fault, options.faults), options.scenarios or list(SCENARIOS)
    wanted = [p for p in places() if p.servers in servers and p.actor in actors and p.scenario in scenarios]

    def chosen(cell: Cell) -> bool:
        named = not options.steps or (cell.step is not None and cell.step.name in options.steps)
        return named and cell.fault in faults

    progress = _Progress()
    began = time.monotonic()

    async def try_them() -> Steps:
        _end_in_order()
        async with lanes(options.lanes, broken=options.broken) as on:
            steps = await find_steps(on, wanted, progress.told)
            cells = [cell for cell in cells_of(steps) if chosen(cell)]
            progress.planned(len(cells))
            await try_all(on, cells, progress.told)
            return steps

    steps = asyncio.run(try_them())
    drawn = Map.of(steps, progress.results, lanes=options.lanes, seconds=time.monotonic() - began)
    sys.stdout.write(drawn.summary() + "\n")
    if options.results:
        drawn.write(options.results)
    if options.picture:
        _draw(drawn, options.picture)
    return 1 if drawn.breaches else 0


def _draw(drawn: Map, path: Path) -> None:
    path.write_text(picture(drawn), encoding="utf-8")


def _end_in_order() -> None:
    """Ctrl-C cancels this task, and its processes end; another one does not disturb that."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def end() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: None)
        if task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)


def _named(kind: type[E], names: Iterable[str] | None) -> list[E]:
    return list(kind) if names is None else [kind[name.upper()] for name in names]


class _Progress:
    """Prints how far it is, and each broken promise as it is found."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self._counts: Counter[str] = Counter()
        self._all = 0
        self._began = self._printed = time.monotonic()

    def planned(self, cells: int) -> None:
        self._all, self._began = cells, time.monotonic()
        sys.stderr.write(f"{cells} cells\n")

    def told(self, result: Result) -> None:
        self.results.append(result)
        self._counts["broken"] += bool(result.breaches)
        self._counts["silent"] += bool(result.silent)
        if result.silent:
            sys.stderr.write(f"{result}\n")
        if result.breaches:
            sys.stderr.write("\n".join([str(result), *result.story, ""]))
        now = time.monotonic()
        if now - self._printed > _EVERY and self._all:
            self._printed = now
            left = (now - self._began) / len(self.results) * (self._all - len(self.results))
            sys.stderr.write(
                f"{len(self.results)} of {self._all} cells, {self._counts['broken']} broke a promise,"
                f" {self._counts['silent']} showed nothing; about {left / 60:.0f} minutes left\n"
            )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(main())
    sys.exit(130)

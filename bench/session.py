"""A session of measuring: says what runs and how long it still takes, repeats what does not count, keeps the runs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from bench import foreign
from bench.record import MOST_FOREIGN, Run
from producer.errors import VerifyError

FAILURES: Final = (VerifyError, TimeoutError, OSError)  # a program did not start, has ended, or takes too long
_REPEATS: Final = 10  # of runs during which others used the machine, in one session


class Scenario(Protocol):
    """Runs that are made together, interleaved."""

    title: str
    bars: str  # the letters that need it
    seconds: float  # that it takes, about

    async def run(self, session: Session) -> None:
        """Make all its runs, in the session."""


class Meter(Protocol):
    """Tells what share of the machine others use."""

    seconds: float  # for which it looks before the first run

    def begin(self) -> Callable[[], float]:
        """Begin to look; what it returns tells the share since then, 0 to 1."""


class Machine:
    """The `Meter` of this machine."""

    seconds = 2.0

    def begin(self) -> Callable[[], float]:
        """See `Meter`."""
        before = foreign.moment()
        return lambda: foreign.share(before, foreign.moment())


class Session:
    """Keeps the runs of one session."""

    def __init__(self, scenarios: Sequence[Scenario], meter: Meter | None = None) -> None:
        self.runs: list[Run] = []
        self.notes: list[str] = []  # what a reader must know
        self.foreign_before = 0.0  # share of the machine's CPU that others used before the first run
        self._meter = meter or Machine()
        self._repeats = _REPEATS
        self._scenarios = scenarios
        self._began = time.monotonic()
        self._left = 0.0  # seconds that the scenarios take which have not begun
        self._until = 0.0  # monotonic: when the present one ends, about

    @property
    def elapsed(self) -> float:
        """Seconds since the session began."""
        return time.monotonic() - self._began

    async def run(self) -> None:
        """All scenarios. One that cannot be set up is left out, and a note says why."""
        self.say(f"about {_minutes(sum(each.seconds for each in self._scenarios))} in all")
        await self._look()
        for number, scenario in enumerate(self._scenarios):
            self._left = sum(each.seconds for each in self._scenarios[number + 1 :])
            self._until = time.monotonic() + scenario.seconds
            self.say(f"{scenario.title}  (bars {' '.join(scenario.bars)})")
            try:
                await scenario.run(self)
            except FAILURES as exc:
                self.note(f"{scenario.title}: {_reason(exc)}")

        loaded = sum(run.loaded for run in self.runs)
        if loaded:
            most = max(run.foreign for run in self.runs)
            self.note(
                f"the machine was loaded by others in {loaded} of {len(self.runs)} runs, by up to {most:.0%} of its"
                " CPU; the bars that need them are neither ok nor short, and have only CPU"
            )

    async def _look(self) -> None:
        """Others that use the machine from the beginning will go on: then nothing is repeated for them."""
        since = self._meter.begin()
        await asyncio.sleep(self._meter.seconds)
        self.foreign_before = since()
        if self.foreign_before > MOST_FOREIGN:
            self._repeats = 0
            self.note(f"before the first run, others used {self.foreign_before:.0%} of the machine's CPU")

    async def take(self, label: str, measure: Callable[[], Awaitable[Run | Sequence[Run]]]) -> None:
        """Make one run, or some that are void together. Keep what came of it.

        They are made once more if they are void, or if others used the machine, which may pass.
        """
        for again in (True, False):
            why, since = "", self._meter.begin()
            try:
                made = await measure()
                share = round(since(), 3)
                runs = [replace(run, foreign=share) for run in ([made] if isinstance(made, Run) else made)]
                why = next((run.void for run in runs if run.void), "")
            except FAILURES as exc:
                runs, why = [], _reason(exc)
            if why and again:
                self._progress(label, f"void, once more: {why}")
                continue
            if again and self._repeats and any(run.loaded for run in runs):
                self._repeats -= 1
                self._progress(label, f"others used {runs[0].foreign:.0%} of the machine, once more")
                continue
            self.runs.extend(runs)
            if why:
                self.note(f"void twice: {label}: {why}")
            else:
                self._progress(label, ", ".join(map(_shown, runs)))
            return

    def note(self, text: str) -> None:
        """Keep something that a reader must know, and say it."""
        self.notes.append(text)
        self.say(f"  ! {text}")

    def say(self, text: str) -> None:
        """A line on the terminal."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def _progress(self, label: str, shown: str) -> None:
        left = max(0.0, self._until - time.monotonic()) + self._left
        self.say(f"  {label:<44} {shown:<40} about {_minutes(left)} left")


def _shown(run: Run) -> str:
    if run.loaded:
        return f"loaded {run.foreign:.0%}" + (f", CPU {run.cpu_sum:,.0f} µs" if run.cpu_count else "")
    if run.scenario in {"lone", "wave"}:
        return f"p99 {run.latencies['p99'] / 1000:.2f} s of {run.count}"
    if run.callers == 1:
        return f"p50 {run.latencies['p50']:.2f} ms"
    if run.scenario == "start":
        return f"{run.system} {run.figures['seconds']:.2f} s"
    if run.count and run.seconds:
        return f"{run.rate:,.0f}/s"
    return ", ".join(f"{name} {figure:,.3g}" for name, figure in run.figures.items())


def _reason(failure: BaseException) -> str:
    return str(failure) or type(failure).__name__


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

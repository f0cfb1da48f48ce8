"""A session of measuring: says what runs and how long it still takes, repeats what is void, keeps what was found."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from bench.record import Run
from producer.errors import VerifyError

FAILURES: Final = (VerifyError, TimeoutError, OSError)  # a program did not start, has ended, or takes too long


class Scenario(Protocol):
    """Runs that are made together, interleaved."""

    title: str
    bars: str  # the letters that need it
    seconds: float  # that it takes, about

    async def run(self, session: Session) -> None:
        """Make all its runs, in the session."""


class Session:
    """Keeps the runs of one session."""

    def __init__(self, scenarios: Sequence[Scenario]) -> None:
        self.runs: list[Run] = []
        self.notes: list[str] = []  # what a reader must know
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
        for number, scenario in enumerate(self._scenarios):
            self._left = sum(each.seconds for each in self._scenarios[number + 1 :])
            self._until = time.monotonic() + scenario.seconds
            self.say(f"{scenario.title}  (bars {' '.join(scenario.bars)})")
            try:
                await scenario.run(self)
            except FAILURES as exc:
                self.note(f"{scenario.title}: {_reason(exc)}")

    async def take(self, label: str, measure: Callable[[], Awaitable[Run | Sequence[Run]]]) -> None:
        """Make one run, or some that are void together; once more if they are void. Keep what came of it."""
        for again in (True, False):
            why = ""
            try:
                made = await measure()
                runs = [made] if isinstance(made, Run) else list(made)
                why = next((run.void for run in runs if run.void), "")
            except FAILURES as exc:
                runs, why = [], _reason(exc)
            if why and again:
                self._progress(label, f"void, once more: {why}")
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

"""What one run measured, as it is written to the raw file and read from it. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Final, NamedTuple, Self

MOST_FOREIGN: Final = 0.1  # share of the machine's CPU that others may use while a rate is measured


class Spread(NamedTuple):
    """The same figure of several runs."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, figures: Iterable[float]) -> Self | None:
        """The spread of these figures; None without any."""
        known = sorted(figures)
        return cls(median(known), known[0], known[-1], len(known)) if known else None


@dataclass(frozen=True)
class Run:
    """One run of one system. Rates are mails a second, latencies milliseconds."""

    scenario: str
    system: str
    round: int
    relay_ms: float = 0.0
    callers: int = 0  # that ask at once
    workers: int = 0  # processes
    connections: int = 0  # of one process to the relay, at most
    tls: bool = False  # implicit, to the relay
    backlog: int = 0  # requests that wait
    count: int = 0  # requests that were measured, all answered Success
    seconds: float = 0.0  # of the measured part
    latencies: Mapping[str, float] = field(default_factory=dict)  # p50, p90, p99, in ms
    cpu: Mapping[str, float] = field(default_factory=dict)  # seconds, by part
    cpu_count: int = 0  # requests that this CPU time served
    figures: Mapping[str, float] = field(default_factory=dict)  # what only this scenario has
    load: float = 0.0  # of the machine as it began
    foreign: float = 0.0  # share of the machine's CPU that others used meanwhile
    void: str = ""  # why it does not count

    @property
    def rate(self) -> float:
        """Mails a second."""
        return self.count / self.seconds if self.seconds else 0.0

    @property
    def loaded(self) -> bool:
        """Whether others used so much of the machine that rates and times mean nothing."""
        return self.foreign > MOST_FOREIGN

    @property
    def cpu_sum(self) -> float:
        """The microseconds of CPU for a request, of all parts together."""
        return sum(self.cpu_each().values())

    def cpu_each(self) -> dict[str, float]:
        """The microseconds of CPU for a request, by part."""
        return {part: used / self.cpu_count * 1e6 for part, used in self.cpu.items()} if self.cpu_count else {}

    def written(self) -> dict[str, Any]:
        """For the raw file. The rate follows from the rest; readers want it."""
        return asdict(self) | {"rate": self.rate}

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Self:
        """The run that `written` turned into a mapping."""
        return cls(**{name: value for name, value in written.items() if name != "rate"})


def valid(runs: Iterable[Run], **wanted: object) -> list[Run]:
    """The runs that are not void and match `wanted`."""
    return [run for run in runs if not run.void and all(getattr(run, name) == value for name, value in wanted.items())]


def why_void(mails: int, **stored: int) -> str:
    """Why a run does not count: what was stored or answered is not as many as the mails that the relay took."""
    if all(count == mails for count in stored.values()):
        return ""
    return f"mails {mails}, " + ", ".join(f"{name} {count}" for name, count in stored.items())

"""The bars, computed from the runs. Arithmetic only, standard library only.

A case compares one figure with one goal; a bar is as good as its worst case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.record import Run, Spread, valid

OLD: Final = ("old", "old_best")  # the Node variants of bars a to d
LEAST, MOST = "at least", "at most"
TIMES: Final = "×"  # noqa: RUF001 - the sign, not the letter


@dataclass(frozen=True)
class Case:
    """One figure and its goal. `ours` and `theirs`: what it is the ratio of."""

    name: str
    value: float | None  # None: it could not be measured
    goal: float | None  # None: the figure is only stated
    unit: str
    sense: str = LEAST
    ours: Spread | None = None
    theirs: Spread | None = None
    against: str = ""
    each: Spread | None = None  # the ratio of each round
    cpu: tuple[float, float] | None = None  # µs for a request, all processes together: ours, theirs

    @property
    def reached(self) -> float | None:
        """The value as a share of the goal: 1 and above is good; None without a goal or a value."""
        if self.value is None or self.goal is None or not self.value:
            return None
        return self.value / self.goal if self.sense == LEAST else self.goal / self.value

    @property
    def met(self) -> bool:
        """Whether the goal is reached; a case without one is, once it was measured."""
        if self.goal is None:
            return self.value is not None
        return (self.reached or 0.0) >= 1.0

    def written(self) -> dict[str, Any]:
        """For JSON."""
        spreads = {"ours": self.ours, "theirs": self.theirs, "each_round": self.each}
        return {
            "case": self.name,
            "value": _rounded(self.value),
            "goal": self.goal,
            "sense": self.sense,
            "unit": self.unit,
            "ok": self.met,
            **({"against": self.against} if self.against else {}),
            **{name: _spread(spread) for name, spread in spreads.items() if spread},
            **({"cpu_us": [_rounded(used) for used in self.cpu]} if self.cpu else {}),
        }


@dataclass(frozen=True)
class Bar:
    """One row of the table."""

    letter: str
    title: str
    cases: Callable[[Sequence[Run]], list[Case]]
    stated: bool = False  # it is ok once measured


def result(bar: Bar, runs: Sequence[Run]) -> dict[str, Any]:
    """A bar as `latest.json` has it: `ok`, `value` and `goal` of the worst case, and all cases."""
    cases = bar.cases(runs)
    worst = worst_of(cases)
    measured = all(case.value is not None for case in cases)
    return {
        "ok": measured if bar.stated else all(case.met for case in cases),
        "value": _rounded(worst.value),
        "goal": worst.goal,
        "sense": worst.sense,
        "unit": worst.unit,
        "title": bar.title,
        "case": worst.name,
        "stated": bar.stated,
        "goal_met": all(case.met for case in cases),
        "cases": [case.written() for case in cases],
    }


def worst_of(cases: Sequence[Case]) -> Case:
    """The case furthest from its goal: one that could not be measured, if any; the first, if none has a goal."""
    with_goal = [case for case in cases if case.goal is not None] or list(cases[:1])
    return min(with_goal, key=lambda case: case.reached or 0.0)


def ratio(
    name: str,
    ours: Sequence[Run],
    theirs: Sequence[Run],
    goal: float,
    figure: Callable[[Run], float] = lambda run: run.rate,
    *,
    sense: str = LEAST,
    against: str = "",
) -> Case:
    """The median of ours divided by the median of theirs; also round by round, as far as both have the round."""
    mine, other = Spread.of(map(figure, ours)), Spread.of(map(figure, theirs))
    if mine is None or other is None or not other.median:
        return Case(name, None, goal, TIMES, sense, mine, other, against)
    by_round = {run.round: figure(run) for run in theirs}
    each = Spread.of(figure(run) / by_round[run.round] for run in ours if by_round.get(run.round))
    costs = [Spread.of(sum(run.cpu_each().values()) for run in runs if run.cpu_count) for runs in (ours, theirs)]
    cpu = (costs[0].median, costs[1].median) if costs[0] and costs[1] else None
    return Case(name, mine.median / other.median, goal, TIMES, sense, mine, other, against, each, cpu)


def best_of(
    runs: Iterable[Run], systems: Iterable[str], figure: Callable[[Run], float], *, sense: str = LEAST
) -> list[Run]:
    """The runs of the system that did best: the highest median with LEAST (a rate), the lowest with MOST (a time)."""
    found = list(runs)
    candidates = [mine for system in systems if (mine := valid(found, system=system))]
    if not candidates:
        return []

    def middle(mine: list[Run]) -> float:
        spread = Spread.of(map(figure, mine))
        return spread.median if spread else 0.0

    return (max if sense == LEAST else min)(candidates, key=middle)


def _asking(runs: Sequence[Run], system: str, relay_ms: float, goals: dict[int, float]) -> list[Case]:
    cases = []
    for callers, goal in goals.items():
        there = valid(runs, scenario="ask", relay_ms=relay_ms, callers=callers)
        theirs = best_of(there, OLD, lambda run: run.rate)
        against = theirs[0].system if theirs else "old, old_best"
        cases.append(ratio(f"{callers} callers", valid(there, system=system), theirs, goal, against=against))
    return cases


def _a(runs: Sequence[Run]) -> list[Case]:
    return _asking(runs, "asyncio", 0.0, {64: 5.0, 256: 5.0})


def _b(runs: Sequence[Run]) -> list[Case]:
    return _asking(runs, "asyncio", 50.0, {64: 1.4, 256: 2.5})


def _c(runs: Sequence[Run]) -> list[Case]:
    return _asking(runs, "api", 0.0, {64: 2.0, 256: 2.0})


def _p50(run: Run) -> float:
    return run.latencies["p50"]


def _d(runs: Sequence[Run]) -> list[Case]:
    alone = valid(runs, scenario="ask", relay_ms=0.0, callers=1)
    theirs = best_of(alone, OLD, _p50, sense=MOST)
    against = theirs[0].system if theirs else "old, old_best"
    return [ratio("p50 of a lone caller", valid(alone, system="api"), theirs, 0.85, _p50, sense=MOST, against=against)]


def _e(runs: Sequence[Run]) -> list[Case]:
    drains = valid(runs, scenario="drain", relay_ms=0.0, workers=2)
    ours = valid(drains, system="worker")
    return [
        ratio(f"against {name}", ours, valid(drains, system=peer), goal, against=peer)
        for peer, name, goal in (
            ("bullmq", "BullMQ + nodemailer", 6.0),
            ("bullmq_pipelined", "BullMQ + pipelining client", 2.0),
        )
    ]


def _f(runs: Sequence[Run]) -> list[Case]:
    alone = valid(runs, scenario="drain", relay_ms=0.0, workers=1)
    ours, pool = (valid(alone, system=system) for system in ("worker", "pool"))
    return [ratio("one worker process", ours, pool, 0.7, against="pool")]


def _limit(connections: int, runs: Sequence[Run]) -> Case:
    shares = Spread.of(run.rate / (run.workers * run.connections / run.relay_ms * 1000) for run in runs)
    rates = Spread.of(run.rate for run in runs)
    value = shares.median if shares else None
    return Case(f"{connections} connections", value, 0.95, "of the limit", ours=rates, each=shares)


def _g(runs: Sequence[Run]) -> list[Case]:
    slow = valid(runs, scenario="limit")
    measured = sorted({run.connections for run in slow}) or [32]
    return [_limit(connections, valid(slow, connections=connections)) for connections in measured]


def _h(runs: Sequence[Run]) -> list[Case]:
    held = valid(runs, scenario="backlog")
    sizes = sorted({run.backlog for run in held})
    rates = {size: spread for size in sizes if (spread := Spread.of(r.rate for r in valid(held, backlog=size)))}
    slowest = min(rates.values(), default=None, key=lambda spread: spread.median)
    fastest = max(rates.values(), default=None, key=lambda spread: spread.median)
    within = slowest.median / fastest.median if slowest and fastest and len(rates) > 1 else None
    cases = [Case("slowest backlog / fastest", within, 0.9, TIMES, ours=slowest, theirs=fastest)]
    weights = {
        size: spread for size in sizes if (spread := Spread.of(r.figures["rss_mb"] for r in valid(held, backlog=size)))
    }
    if len(weights) > 1:
        most, least = weights[sizes[-1]], weights[sizes[0]]
        name = f"worker memory at {sizes[-1]:,} / at {sizes[0]:,}"
        cases.append(Case(name, most.median / least.median, 1.1, TIMES, MOST, ours=most, theirs=least))
    weighed = valid(runs, scenario="weigh")
    for key, name in (("bytes_foreign", "the smallest message"), ("bytes_ours", "one of our producers")):
        spread = Spread.of(run.figures[key] for run in weighed)
        cases.append(Case(f"in Redis, {name}", spread.median if spread else None, None, "bytes", ours=spread))
    return cases


def _i(runs: Sequence[Run]) -> list[Case]:
    steps = valid(runs, scenario="ladder")
    one = Spread.of(run.rate for run in valid(steps, workers=1))
    cases = []
    for workers in sorted({run.workers for run in steps} - {1}) or [8]:
        rates = Spread.of(run.rate for run in valid(steps, workers=workers))
        value = rates.median / (workers * one.median) if rates and one else None
        cases.append(Case(f"{workers} workers", value, 0.9, "of linear", ours=rates, theirs=one))
    return cases


def _j(runs: Sequence[Run]) -> list[Case]:
    cases = []
    for scenario, name, goal in (("lone", "p99 behind 100,000", 1.0), ("wave", "p99 while others keep coming", None)):
        alone = valid(runs, scenario=scenario)
        p99 = Spread.of(run.latencies["p99"] / 1000 for run in alone)
        if p99 or goal:
            shown = f"{name}, of {sum(run.count for run in alone)} answers"
            cases.append(Case(shown, p99.median if p99 else None, goal, "s", MOST, ours=p99))
    return cases


def _k(runs: Sequence[Run]) -> list[Case]:
    cases = []
    for system, name, key, unit, scale in (
        ("client", "import of producer.client", "seconds", "ms", 1000.0),
        ("worker", "worker, start to first reply", "seconds", "s", 1.0),
        ("api", "API, start to first reply", "seconds", "s", 1.0),
        ("client", "idle client, resident", "rss_mb", "MB", 1.0),
        ("worker", "idle worker, resident", "rss_mb", "MB", 1.0),
        ("api", "idle API, resident", "rss_mb", "MB", 1.0),
        ("worker", "idle worker, its share (PSS)", "pss_mb", "MB", 1.0),
        ("api", "idle API, its share (PSS)", "pss_mb", "MB", 1.0),
    ):
        spread = Spread.of(run.figures[key] * scale for run in valid(runs, scenario="start", system=system))
        cases.append(Case(name, spread.median if spread else None, None, unit, ours=spread))
    return cases


BARS: Final = (
    Bar("a", "ask and be answered, asyncio client, relay 0 ms, against the best Node variant", _a),
    Bar("b", "the same, relay 50 ms", _b),
    Bar("c", "ask and be answered through the gRPC API, relay 0 ms, against the best Node variant", _c),
    Bar("d", "time of a lone caller through the gRPC API, against the best Node variant", _d),
    Bar("e", "drain, relay 0 ms, two worker processes, against BullMQ", _e),
    Bar("f", "drain, relay 0 ms, one worker process, against the bare SMTP pool", _f),
    Bar("g", "drain, relay 50 ms, against the limit: connections ÷ 50 ms", _g),
    Bar("h", "drain at a backlog of 1,000, 100,000 and 1,000,000", _h),
    Bar("i", "one to eight worker processes, relay 200 ms, 32 connections each", _i),
    Bar("j", "a lone caller while 100,000 requests of others wait", _j, stated=True),
    Bar("k", "import, start, idle memory", _k, stated=True),
)


def results(runs: Sequence[Run], letters: Iterable[str] = "") -> dict[str, dict[str, Any]]:
    """These bars by letter; all of them if none is named."""
    wanted = set(letters)
    return {bar.letter: result(bar, runs) for bar in BARS if not wanted or bar.letter in wanted}


def _rounded(value: float | None) -> float | None:
    """To four digits, which is more than such figures are good for."""
    return None if value is None else float(f"{value:.4g}")


def _spread(spread: Spread) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in spread._asdict().items()}

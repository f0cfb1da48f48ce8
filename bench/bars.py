"""The bars, computed from the runs. Arithmetic only, standard library only.

A case compares one figure with one goal; a bar is as good as its worst case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.record import Run, Spread, valid

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
    cpu: tuple[float, ...] = ()  # µs for a request, all processes together: ours, theirs
    loaded: bool = False  # others used the machine meanwhile, so that the value means nothing: see `known`

    @property
    def known(self) -> bool:
        """Whether there is a value that means something."""
        return self.value is not None and not self.loaded

    @property
    def reached(self) -> float | None:
        """The value as a share of the goal: 1 and above is good; None without a goal or a value."""
        if self.value is None or self.goal is None or not self.value or self.loaded:
            return None
        return self.value / self.goal if self.sense == LEAST else self.goal / self.value

    @property
    def met(self) -> bool:
        """Whether the goal is reached; a case without one is, once it was measured."""
        if self.goal is None:
            return self.known
        return (self.reached or 0.0) >= 1.0

    def written(self) -> dict[str, Any]:
        """For JSON. Of a loaded case only the CPU is written."""
        spreads = {} if self.loaded else {"ours": self.ours, "theirs": self.theirs, "each_round": self.each}
        return {
            "case": self.name,
            "value": _rounded(self.value if self.known else None),
            "goal": self.goal,
            "sense": self.sense,
            "unit": self.unit,
            "ok": None if self.loaded else self.met,
            **({"loaded": True} if self.loaded else {}),
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
    """A bar as `latest.json` has it: `ok`, `value` and `goal` of the worst case, and all cases.

    `ok` is None, and `loaded` there, if others used the machine during one of its runs.
    """
    cases = bar.cases(runs)
    worst = worst_of(cases)
    loaded = any(case.loaded for case in cases)
    met = all(case.known for case in cases) if bar.stated else all(case.met for case in cases)
    return {
        "ok": None if loaded else met,
        **({"loaded": True} if loaded else {}),
        "value": _rounded(worst.value if worst.known else None),
        "goal": worst.goal,
        "sense": worst.sense,
        "unit": worst.unit,
        "title": bar.title,
        "case": worst.name,
        "stated": bar.stated,
        "goal_met": None if loaded else all(case.met for case in cases),
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
    goal: float | None,
    figure: Callable[[Run], float] = lambda run: run.rate,
    *,
    sense: str = LEAST,
    against: str = "",
) -> Case:
    """The median of ours divided by the median of theirs; also round by round, as far as both have the round."""
    mine, other = Spread.of(map(figure, ours)), Spread.of(map(figure, theirs))
    cpu, loaded = _cpu(ours, theirs), _loaded(ours, theirs)
    if mine is None or other is None or not other.median:
        return Case(name, None, goal, TIMES, sense, mine, other, against, cpu=cpu, loaded=loaded)
    by_round = {run.round: figure(run) for run in theirs}
    each = Spread.of(figure(run) / by_round[run.round] for run in ours if by_round.get(run.round))
    return Case(name, mine.median / other.median, goal, TIMES, sense, mine, other, against, each, cpu, loaded)


def _cpu(*sides: Sequence[Run]) -> tuple[float, ...]:
    """µs for a request on each side, all processes together; nothing if one side has none."""
    costs = [Spread.of(run.cpu_sum for run in runs if run.cpu_count) for runs in sides]
    known = [cost.median for cost in costs if cost]
    return tuple(known) if len(known) == len(sides) else ()


def _loaded(*sides: Sequence[Run]) -> bool:
    return any(run.loaded for runs in sides for run in runs)


def _asking(runs: Sequence[Run], system: str, goals: dict[int, float]) -> list[Case]:
    """At 0 ms, by callers, against the best Node server."""
    cases = []
    for callers, goal in goals.items():
        there = valid(runs, scenario="ask", relay_ms=0.0, callers=callers)
        ours, theirs = (valid(there, system=name) for name in (system, "old_best"))
        cases.append(ratio(f"{callers} callers", ours, theirs, goal, against="old_best"))
    return cases


def _a(runs: Sequence[Run]) -> list[Case]:
    return _asking(runs, "asyncio", {64: 1.7, 256: 1.7})


def _b(runs: Sequence[Run]) -> list[Case]:
    """Each caller waits for the relay, so all of them are answered no more often than callers ÷ latency."""
    cases, stated = [], []
    for callers, goal in {64: 0.98, 256: 0.9}.items():
        there = valid(runs, scenario="ask", relay_ms=50.0, callers=callers)
        ours, theirs = (valid(there, system=name) for name in ("asyncio", "old_best"))
        cases.append(_limit(f"{callers} callers", ours, goal, lambda run: run.callers))
        stated.append(ratio(f"{callers} callers, against the best Node server", ours, theirs, None, against="old_best"))
    return cases + stated


def _c(runs: Sequence[Run]) -> list[Case]:
    return _asking(runs, "api", {64: 0.95, 256: 0.95})


def _p50(run: Run) -> float:
    return run.latencies["p50"]


def _d(runs: Sequence[Run]) -> list[Case]:
    alone = valid(runs, scenario="ask", relay_ms=0.0, callers=1)
    ours, theirs = (valid(alone, system=name) for name in ("api", "old_best"))
    return [ratio("p50 of a lone caller", ours, theirs, 1.25, _p50, sense=MOST, against="old_best")]


def _e(runs: Sequence[Run]) -> list[Case]:
    drains = valid(runs, scenario="drain", relay_ms=0.0, workers=2)
    ours = valid(drains, system="worker")
    return [
        ratio(f"against {name}", ours, valid(drains, system=peer), goal, against=peer)
        for peer, name, goal in (
            ("bullmq_pipelined", "BullMQ + pipelining client", 1.3),
            ("bullmq", "BullMQ + nodemailer", 2.5),
        )
    ]


def _f(runs: Sequence[Run]) -> list[Case]:
    alone = valid(runs, scenario="drain", relay_ms=0.0, workers=1)
    ours, pool = (valid(alone, system=system) for system in ("worker", "pool"))
    return [ratio("one worker process", ours, pool, 0.55, against="pool")]


def _limit(name: str, runs: Sequence[Run], goal: float, at_once: Callable[[Run], int]) -> Case:
    """The share of what the relay allows: so many mails at once, each as long as its latency."""
    shares = Spread.of(run.rate / (at_once(run) / run.relay_ms * 1000) for run in runs)
    rates = Spread.of(run.rate for run in runs)
    value = shares.median if shares else None
    unit = "of the limit"
    return Case(name, value, goal, unit, ours=rates, each=shares, cpu=_cpu(runs), loaded=_loaded(runs))


def _g(runs: Sequence[Run]) -> list[Case]:
    slow = valid(runs, scenario="limit")
    measured = sorted({run.connections for run in slow}) or [32]
    return [
        _limit(f"{each} connections", valid(slow, connections=each), 0.95, lambda run: run.workers * run.connections)
        for each in measured
    ]


def _h(runs: Sequence[Run]) -> list[Case]:
    held = valid(runs, scenario="backlog")
    sizes = sorted({run.backlog for run in held})
    rates = {size: spread for size in sizes if (spread := Spread.of(r.rate for r in valid(held, backlog=size)))}
    slowest = min(rates.values(), default=None, key=lambda spread: spread.median)
    fastest = max(rates.values(), default=None, key=lambda spread: spread.median)
    within = slowest.median / fastest.median if slowest and fastest and len(rates) > 1 else None
    cases = [Case("slowest backlog / fastest", within, 0.9, TIMES, ours=slowest, theirs=fastest, loaded=_loaded(held))]
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
        some, alone = valid(steps, workers=workers), valid(steps, workers=1)
        cpu, loaded = _cpu(some, alone), _loaded(some, alone)
        name, unit = f"{workers} workers", "of linear"
        cases.append(Case(name, value, 0.9, unit, ours=rates, theirs=one, cpu=cpu, loaded=loaded))
    return cases


def _j(runs: Sequence[Run]) -> list[Case]:
    cases = []
    for scenario, name, goal in (("lone", "p99 behind 100,000", 1.0), ("wave", "p99 while others keep coming", None)):
        alone = valid(runs, scenario=scenario)
        p99 = Spread.of(run.latencies["p99"] / 1000 for run in alone)
        if p99 or goal:
            shown = f"{name}, of {sum(run.count for run in alone)} answers"
            value, loaded = p99.median if p99 else None, _loaded(alone)
            cases.append(Case(shown, value, goal, "s", MOST, ours=p99, loaded=loaded))
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
        mine = valid(runs, scenario="start", system=system)
        spread = Spread.of(run.figures[key] * scale for run in mine)
        loaded = key == "seconds" and _loaded(mine)  # memory is what it is
        cases.append(Case(name, spread.median if spread else None, None, unit, ours=spread, loaded=loaded))
    return cases


_OLD_OVER_TLS: Final = {0.0: {1: 45.0, 5: 25.0, 64: 9.0, 256: 9.0}, 50.0: {1: 1.8, 5: 2.0, 64: 2.4, 256: 5.0}}
_OLD_IN_PLAIN: Final = {0.0: {64: 6.0, 256: 3.5}}
_SECOND_WORKER: Final = {1: 1.05, 5: 1.05, 64: 1.05}


def _replacing(runs: Sequence[Run], goals: dict[float, dict[int, float]], *, tls: bool) -> list[Case]:
    """One worker behind the gRPC API against the old server; goals by ms of the relay and callers."""
    cases = []
    for relay, by_callers in goals.items():
        there = valid(runs, scenario="replace", relay_ms=relay, tls=tls)
        for callers, goal in _measured(there, by_callers).items():
            ours, theirs = (valid(there, system=name, callers=callers) for name in ("api", "old"))
            cases.append(ratio(f"relay {relay:g} ms, {_asked_by(callers)}", ours, theirs, goal, against="old"))
    return cases


def _measured(runs: Sequence[Run], goals: dict[int, float]) -> dict[int, float]:
    """Those goals by callers that were measured; all of them if none was."""
    return {callers: goal for callers, goal in goals.items() if valid(runs, callers=callers)} or goals


def _asked_by(callers: int) -> str:
    return f"{callers} caller{'s' if callers > 1 else ''}"


def _l(runs: Sequence[Run]) -> list[Case]:
    return _replacing(runs, _OLD_OVER_TLS, tls=True)


def _m(runs: Sequence[Run]) -> list[Case]:
    return _replacing(runs, _OLD_IN_PLAIN, tls=False)


def _n(runs: Sequence[Run]) -> list[Case]:
    there = valid(runs, scenario="second", system="api")
    cases = []
    for callers, goal in _measured(there, _SECOND_WORKER).items():
        two, one = (valid(there, callers=callers, workers=count) for count in (2, 1))
        cases.append(
            ratio(_asked_by(callers), two, one, goal, lambda run: run.cpu_sum, sense=MOST, against="one worker")
        )
    return cases


BARS: Final = (
    Bar("a", "ask and be answered, asyncio client, relay 0 ms, against the best Node server", _a),
    Bar("b", "the same, relay 50 ms, against the limit: callers ÷ 50 ms", _b),
    Bar("c", "ask and be answered through the gRPC API, relay 0 ms, against the best Node server", _c),
    Bar("d", "time of a lone caller through the gRPC API, against the best Node server", _d),
    Bar("e", "drain, relay 0 ms, two worker processes, against BullMQ", _e),
    Bar("f", "drain, relay 0 ms, one worker process, against the bare SMTP pool", _f),
    Bar("g", "drain, relay 50 ms, against the limit: connections ÷ 50 ms", _g),
    Bar("h", "drain at a backlog of 1,000, 100,000 and 1,000,000", _h),
    Bar("i", "one to eight worker processes, relay 200 ms, 32 connections each", _i),
    Bar("j", "a lone caller while 100,000 requests of others wait", _j, stated=True),
    Bar("k", "import, start, idle memory", _k, stated=True),
    Bar("l", "our gRPC API and one worker against the old server, implicit TLS to the relay", _l),
    Bar("m", "the same, no TLS to the relay", _m),
    Bar("n", "CPU a request costs with two workers against one, through the gRPC API, relay 0 ms", _n),
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

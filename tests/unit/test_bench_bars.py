"""The arithmetic of the yardstick, on given figures. What it measures is never asserted."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable

import pytest

from bench import foreign, messages
from bench.bars import LEAST, MOST, Bar, Case, ratio, result, results, worst_of
from bench.drain import Share
from bench.load import percentile
from bench.machine import interpreter
from bench.plan import BACKLOGS, FULL, LETTERS, QUICK, Plan
from bench.record import Run, Spread, valid, why_void
from bench.scenarios import alternate, rotate, scenarios, turns
from bench.session import Session
from bench.table import table
from producer.errors import VerifyError


def rates(system: str, *found: float, **fields: object) -> list[Run]:
    """One run a round, of ten seconds."""
    return [
        Run(system=system, round=number, count=round(rate * 10), seconds=10.0, **({"scenario": "ask"} | fields))  # type: ignore[arg-type]
        for number, rate in enumerate(found, 1)
    ]


def test_a_spread_is_median_and_range() -> None:
    assert Spread.of([3, 1, 10]) == Spread(3, 1, 10, 3)
    assert Spread.of([1, 2]) == Spread(1.5, 1, 2, 2)
    assert Spread.of([]) is None


def test_a_run_is_read_as_it_was_written() -> None:
    [run] = rates("worker", 120.0, latencies={"p50": 1.5}, cpu={"redis": 0.5}, cpu_count=1000, void="mails 1, codes 2")
    written = json.loads(json.dumps(run.written()))
    assert written["rate"] == 120.0
    assert Run.read(written) == run


def test_cpu_is_told_for_each_request() -> None:
    run = Run("ask", "api", 1, cpu={"api": 0.5, "redis": 0.05}, cpu_count=1000)
    assert run.cpu_each() == pytest.approx({"api": 500.0, "redis": 50.0})
    assert Run("ask", "api", 1).cpu_each() == {}


def test_a_run_counts_only_if_everything_is_as_many_as_the_mails() -> None:
    assert why_void(10, codes=10, marks=10, replies=10) == ""
    assert why_void(10, codes=10, marks=9, replies=10) == "mails 10, codes 10, marks 9, replies 10"


def test_void_runs_are_left_out() -> None:
    good, bad = rates("worker", 1.0) + rates("worker", 2.0, void="mails 1, codes 2")
    assert valid([good, bad], system="worker") == [good]


def test_a_ratio_is_that_of_the_medians_and_tells_each_round() -> None:
    case = ratio("64 callers", rates("asyncio", 500, 600, 550), rates("old", 100, 150, 110), 5.0)
    assert case.value == 5.0
    assert case.met
    assert case.each == Spread(5.0, 4.0, 5.0, 3)
    assert (case.ours, case.theirs) == (Spread(550, 500, 600, 3), Spread(110, 100, 150, 3))


def test_a_ratio_tells_the_cpu_of_both_sides() -> None:
    ours, theirs = ({"cpu": {"a": seconds, "b": 0.01}, "cpu_count": 1000} for seconds in (0.09, 0.39))
    assert ratio("", rates("asyncio", 1, **ours), rates("old", 1, **theirs), 1.0).cpu == pytest.approx((100, 400))
    assert ratio("", rates("asyncio", 1), rates("old", 1), 1.0).cpu == ()


def test_a_ratio_without_one_side_is_no_value_and_not_met() -> None:
    case = ratio("64 callers", rates("asyncio", 500), [], 5.0)
    assert (case.value, case.met) == (None, False)


def test_rounds_that_only_one_side_has_are_in_no_rounds_ratio() -> None:
    case = ratio("", rates("asyncio", 100, 300), rates("old", 100), 1.0)
    assert case.each == Spread(1.0, 1.0, 1.0, 1)


@pytest.mark.parametrize(
    ("sense", "value", "met", "reached"),
    [(LEAST, 2.0, True, 1.0), (LEAST, 1.9, False, 0.95), (MOST, 2.0, True, 1.0), (MOST, 4.0, False, 0.5)],
)
def test_a_goal_is_met_from_its_own_side(sense: str, value: float, met: bool, reached: float) -> None:
    case = Case("", value, 2.0, "", sense)
    assert (case.met, case.reached) == (met, reached)


def test_a_bar_is_as_good_as_its_worst_case() -> None:
    near, far, missing = Case("near", 4.9, 5.0, ""), Case("far", 1.0, 2.0, ""), Case("missing", None, 2.0, "")
    assert worst_of([near, far]) is far
    assert worst_of([near, far, missing]) is missing
    found = result(Bar("x", "", lambda _: [Case("", 9.0, 5.0, ""), near]), [])
    assert (found["ok"], found["value"], found["goal"], found["case"]) == (False, 4.9, 5.0, "near")


def test_what_is_only_stated_is_ok_once_it_is_measured() -> None:
    slow = Bar("j", "", lambda _: [Case("p99", 7.0, 1.0, "s", MOST)], stated=True)
    assert (result(slow, [])["ok"], result(slow, [])["goal_met"]) == (True, False)
    missing = Bar("j", "", lambda _: [Case("p99", None, 1.0, "s", MOST)], stated=True)
    assert not result(missing, [])["ok"]


def everything() -> list[Run]:
    """Runs that every bar can be read from; the goals are met."""
    runs: list[Run] = []
    for callers, share in ((64, 0.99), (256, 0.92)):
        runs += rates("asyncio", 1800, callers=callers) + rates("api", 960, callers=callers)
        runs += rates("old_best", 1000, callers=callers)
        runs += rates("asyncio", share * callers * 20, relay_ms=50.0, callers=callers)
        runs += rates("old_best", 1000, relay_ms=50.0, callers=callers)
    for system, p50 in (("api", 1.2), ("old_best", 1.0)):
        runs += rates(system, 500, callers=1, latencies={"p50": p50})
    for system, workers, rate in (("worker", 2, 20e3), ("bullmq", 2, 4e3), ("bullmq_pipelined", 2, 15e3)):
        runs += rates(system, rate, scenario="drain", workers=workers)
    runs += rates("worker", 12e3, scenario="drain", workers=1) + rates("pool", 20e3, scenario="drain", workers=1)
    for tls, relay, callers, factor in (
        *((True, 0.0, callers, factor) for callers, factor in ((1, 46), (5, 26), (64, 9.5), (256, 9.2))),
        *((True, 50.0, callers, factor) for callers, factor in ((1, 1.9), (5, 2.1), (64, 2.5), (256, 5.1))),
        *((False, 0.0, callers, factor) for callers, factor in ((64, 6.3), (256, 3.6))),
    ):
        where: dict[str, object] = {
            "scenario": "replace",
            "tls": tls,
            "relay_ms": relay,
            "callers": callers,
            "workers": 1,
        }
        runs += rates("api", factor * 100, **where) + rates("old", 100, **where)
    for callers in (1, 5, 64):
        for workers, seconds in ((1, 1.0), (2, 1.02)):
            used: dict[str, object] = {"cpu": {"worker": seconds}, "cpu_count": 1000}
            runs += rates("api", 500, scenario="second", callers=callers, workers=workers, **used)
    for connections in (32, 256):
        slow = {"scenario": "limit", "relay_ms": 50.0, "workers": 1, "connections": connections}
        runs += rates("worker", connections * 20 * 0.96, **slow)
    for backlog, rate in ((1_000, 10_000), (100_000, 9_500), (1_000_000, 9_200)):
        runs += rates("worker", rate, scenario="backlog", backlog=backlog, figures={"rss_mb": 80.0})
    for workers, rate in ((1, 160), (2, 320), (4, 624), (8, 1190)):
        runs += rates("worker", rate, scenario="ladder", relay_ms=200.0, workers=workers)
    runs.append(Run("weigh", "worker", 1, figures={"bytes_foreign": 400.0, "bytes_ours": 700.0}))
    runs.append(Run("lone", "asyncio", 1, latencies={"p99": 7000.0}))
    figures = {"seconds": 0.5, "rss_mb": 70.0, "pss_mb": 60.0}
    runs += [Run("start", system, 1, figures=figures) for system in ("client", "worker", "api")]
    return runs


def test_every_bar_is_read_from_the_runs() -> None:
    found = results(everything())
    assert "".join(found) == LETTERS
    assert {letter: (bar["value"], bar["goal"]) for letter, bar in found.items()} == {
        "a": (1.8, 1.7),
        "b": (0.99, 0.98),
        "c": (0.96, 0.95),
        "d": (1.2, 1.25),
        "e": (1.333, 1.3),
        "f": (0.6, 0.55),
        "g": (0.96, 0.95),
        "h": (0.92, 0.9),
        "i": (0.9297, 0.9),
        "j": (7.0, 1.0),
        "k": (500.0, None),
        "l": (5.1, 5.0),
        "m": (3.6, 3.5),
        "n": (1.02, 1.05),
    }
    assert all(bar["ok"] for bar in found.values())
    assert [letter for letter, bar in found.items() if not bar["goal_met"]] == ["j"]


def test_every_bar_is_in_the_file_even_if_nothing_was_measured() -> None:
    found = json.loads(json.dumps(results([])))
    assert "".join(found) == LETTERS
    assert all(bar["ok"] is False and bar["value"] is None for bar in found.values())


@pytest.mark.parametrize(
    ("letter", "spoil"),
    [
        ("a", lambda run: run.system == "asyncio" and run.relay_ms == 0.0 and run.callers == 256),
        ("c", lambda run: run.system == "api" and run.callers == 64),
        ("e", lambda run: run.system == "worker" and run.workers == 2),
        ("g", lambda run: run.connections == 256),
        ("h", lambda run: run.backlog == 1_000_000),
        ("i", lambda run: run.scenario == "ladder" and run.workers == 8),
        ("l", lambda run: run.tls and run.relay_ms == 50.0 and run.callers == 5 and run.system == "api"),
        ("m", lambda run: run.scenario == "replace" and not run.tls and run.callers == 64 and run.system == "api"),
    ],
)
def test_one_slow_case_makes_its_bar_short(letter: str, spoil: Callable[[Run], bool]) -> None:
    runs = [Run.read({**run.written(), "count": run.count // 2}) if spoil(run) else run for run in everything()]
    found = results(runs)
    assert not found[letter]["ok"]
    assert f"\n{letter}  short" in "\n" + table(found)


def test_memory_that_grows_with_the_backlog_makes_its_bar_short() -> None:
    grown = [
        Run.read({**run.written(), "figures": {"rss_mb": 100.0}}) if run.backlog == 1_000_000 else run
        for run in everything()
    ]
    assert (results(grown)["h"]["ok"], results(grown)["h"]["value"]) == (False, 1.25)


def test_a_second_worker_that_costs_more_makes_its_bar_short() -> None:
    dear = [
        Run.read({**run.written(), "cpu": {"worker": 1.1}}) if run.scenario == "second" and run.workers == 2 else run
        for run in everything()
    ]
    assert (results(dear)["n"]["ok"], results(dear)["n"]["value"]) == (False, 1.1)


def test_a_loaded_machine_gives_cpu_and_no_verdict() -> None:
    cpu = {"cpu": {"worker": 0.5}, "cpu_count": 1000, "foreign": 0.3}
    loaded = [Run.read({**run.written(), **cpu}) if run.scenario == "ask" else run for run in everything()]
    found = results(loaded)
    assert {letter for letter, bar in found.items() if bar.get("loaded")} == set("abcd")
    for letter in "abcd":
        assert (found[letter]["ok"], found[letter]["value"], found[letter]["goal_met"]) == (None, None, None)
        for case in found[letter]["cases"]:
            assert (case["ok"], case["value"]) == (None, None)
            assert case["cpu_us"]
            assert not {"ours", "theirs", "each_round"} & case.keys()
    lines = table(found).splitlines()
    assert [line.split()[:2] for line in lines if line[:1] in set("abcd")] == [[each, "loaded"] for each in "abcd"]
    assert not any(
        "not reached" in line for line in lines[: lines.index(next(line for line in lines if line[0] == "e"))]
    )


def test_a_little_use_by_others_is_no_load() -> None:
    runs = [Run.read({**run.written(), "foreign": 0.05}) for run in everything()]
    assert all(bar["ok"] for bar in results(runs).values())


def test_a_case_that_a_short_session_left_out_is_not_asked_for() -> None:
    runs = [run for run in everything() if run.scenario != "replace" or run.callers in {1, 64}]
    assert [case["case"] for case in results(runs)["m"]["cases"]] == ["relay 0 ms, 64 callers"]
    assert results(runs)["l"]["ok"]


def test_the_table_has_a_verdict_for_every_bar() -> None:
    lines = table(results(everything())).splitlines()
    assert [line.split()[:2] for line in lines if line[0] != " "] == [[letter, "ok"] for letter in LETTERS]


@pytest.mark.parametrize(("share", "expected"), [(50, 5.0), (90, 9.0), (99, 10.0)])
def test_percentiles_are_figures_that_occurred(share: int, expected: float) -> None:
    assert percentile([float(number) for number in range(1, 11)], share) == expected
    assert percentile([], share) == 0.0


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_systems_take_turns(plan: Plan) -> None:
    for slow in (False, True):
        for names in turns(plan, LETTERS, slow=slow).values():
            assert len(set(names)) == len(names) >= 2
            assert "old_best" in names


def test_each_system_of_a_bar_comes_first_as_often_as_another() -> None:
    for slow in (False, True):
        for names in turns(FULL, LETTERS, slow=slow).values():
            first = [rotate(names, number)[0] for number in range(1, FULL.rounds + 1)]
            assert {first.count(name) for name in names} == {FULL.rounds / len(names)}


def test_only_what_the_wanted_bars_need_is_measured() -> None:
    assert [each.bars for each in scenarios(QUICK, "fg")] == ["ef", "g"]
    assert [each.bars for each in scenarios(QUICK, "lmn")] == ["l", "l", "m", "n"]
    assert turns(FULL, "d", slow=False) == {1: ["api", "old_best"]}
    assert {letter for each in scenarios(FULL, LETTERS) for letter in each.bars} == set(LETTERS)


def test_the_plans_take_what_the_help_says() -> None:
    assert sum(each.seconds for each in scenarios(QUICK, LETTERS)) < 330
    assert sum(each.seconds for each in scenarios(FULL, LETTERS)) < 43 * 60


def test_every_plan_has_rounds_to_compare() -> None:
    assert FULL.rounds >= 3
    assert min(FULL.hold_rounds, FULL.climbs) >= 3
    assert min(QUICK.rounds, QUICK.climbs) >= 2
    assert QUICK.left_out


def test_each_backlog_is_as_often_the_first_as_the_last() -> None:
    assert FULL.hold_rounds % len(BACKLOGS) == 0
    orders = [rotate(BACKLOGS, number) for number in range(1, FULL.hold_rounds + 1)]
    for place in zip(*orders, strict=True):
        assert sorted(place) == sorted(BACKLOGS * (FULL.hold_rounds // len(BACKLOGS)))


class Named:
    """A scenario of one run."""

    title, bars, seconds = "one", "a", 1.0

    def __init__(self, *outcomes: Run | Exception) -> None:
        self._outcomes = list(outcomes)

    async def run(self, session: Session) -> None:
        await session.take("it", self.measure)

    async def measure(self) -> Run:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Others:
    """A meter that tells these shares in turn, and the last one from then on."""

    seconds = 0.0

    def __init__(self, *shares: float) -> None:
        self._shares = list(shares)

    def begin(self) -> Callable[[], float]:
        return lambda: self._shares.pop(0) if len(self._shares) > 1 else self._shares[0]


VOID, GOOD = Run("ask", "api", 1, void="mails 2, codes 1"), Run("ask", "api", 1, count=5, seconds=1.0)


@pytest.mark.parametrize(
    ("outcomes", "kept", "notes"),
    [
        ([GOOD], [GOOD], []),
        ([VOID, GOOD], [GOOD], []),
        ([VOID, VOID], [VOID], ["void twice: it: mails 2, codes 1"]),
        ([TimeoutError(), GOOD], [GOOD], []),
        ([TimeoutError(), VerifyError("it is gone")], [], ["void twice: it: it is gone"]),
    ],
)
def test_what_is_void_is_measured_once_more(
    outcomes: list[Run | Exception], kept: list[Run], notes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session([Named(*outcomes)], Others(0.0))
    asyncio.run(session.run())
    assert (session.runs, session.notes) == (kept, notes)
    assert all(note in capsys.readouterr().out for note in notes)


@pytest.mark.parametrize(
    ("shares", "kept", "said"),
    [
        ((0.0, 0.0), [0.0], []),
        ((0.0, 0.5, 0.02), [0.02], []),  # it passed
        ((0.0, 0.5, 0.4), [0.4], ["in 1 of 1 runs, by up to 40%"]),
        ((0.6, 0.5), [0.5], ["before the first run, others used 60%", "in 1 of 1 runs, by up to 50%"]),
    ],
)
def test_load_by_others_is_said_and_kept(
    shares: tuple[float, ...], kept: list[float], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session([Named(GOOD, GOOD)], Others(*shares))
    asyncio.run(session.run())
    assert [run.foreign for run in session.runs] == kept
    assert len(session.notes) == len(said)
    assert all(words in note for words, note in zip(said, session.notes, strict=True))
    printed = capsys.readouterr().out
    assert all(note in printed for note in session.notes)


def test_our_own_processes_are_not_others() -> None:
    before = foreign.moment()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    after = foreign.moment()
    assert after.ours - before.ours > 0.4
    assert foreign.share(before, after) <= 1.0
    assert foreign.share(foreign.Moment(0, 10, 5), foreign.Moment(10, 12, 7)) == 0.0
    cores = os.cpu_count() or 1
    assert foreign.share(foreign.Moment(0, 10, 5), foreign.Moment(10, 12 + 2 * cores, 7)) == pytest.approx(0.2)


def test_the_interpreters_build_is_told() -> None:
    assert re.fullmatch(r".+, (no )?PGO, (no )?LTO, (no )?JIT", interpreter())


def test_steps_go_up_and_down_by_turns() -> None:
    assert [list(alternate((1, 2, 4), number)) for number in (1, 2, 3)] == [[1, 2, 4], [4, 2, 1], [1, 2, 4]]


def test_a_drain_has_more_mails_than_are_measured() -> None:
    assert Share(100, 1000).all == 1300
    assert Share(100, 10_000).all == 11_100


def test_foreign_requests_are_the_contracts_smallest_messages() -> None:
    written = [json.loads(each) for each in messages.foreign(7, 9, "verification")]
    ids = [each["headers"]["id"] for each in written] + [each["properties"]["delivery_tag"] for each in written]
    assert [str(uuid.UUID(each, version=4)) for each in ids] == ids
    assert len(set(ids)) == 4
    assert [json.loads(base64.b64decode(each["body"])) for each in written] == [
        [[], {"email": f"user{number:07}@example.com"}, {}] for number in (7, 8)
    ]
    [first, _] = written
    assert first["headers"] == {"task": "verification.send_code", "id": ids[0]}
    assert first["properties"]["delivery_info"] == {"exchange": "", "routing_key": "verification"}
    assert (first["content-type"], first["content-encoding"]) == ("application/json", "utf-8")

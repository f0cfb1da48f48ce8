"""The arithmetic of the yardstick, on given figures. What it measures is never asserted."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import Callable

import pytest

from bench import bars, messages
from bench.bars import LEAST, MOST, Bar, Case, best_of, ratio, result, results, worst_of
from bench.drain import Share
from bench.load import percentile
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
    assert ratio("", rates("asyncio", 1), rates("old", 1), 1.0).cpu is None


def test_a_ratio_without_one_side_is_no_value_and_not_met() -> None:
    case = ratio("64 callers", rates("asyncio", 500), [], 5.0)
    assert (case.value, case.met) == (None, False)


def test_rounds_that_only_one_side_has_are_in_no_rounds_ratio() -> None:
    case = ratio("", rates("asyncio", 100, 300), rates("old", 100), 1.0)
    assert case.each == Spread(1.0, 1.0, 1.0, 1)


def test_the_best_variant_is_the_one_with_the_best_median() -> None:
    runs = rates("old", 100, 900, 120) + rates("old_best", 130, 140, 150)
    assert {run.system for run in best_of(runs, bars.OLD, lambda run: run.rate)} == {"old_best"}
    assert {run.system for run in best_of(runs, bars.OLD, lambda run: run.rate, sense=MOST)} == {"old"}
    assert best_of([], bars.OLD, lambda run: run.rate) == []


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
    for relay, factor in ((0.0, 6.0), (50.0, 2.6)):
        for callers in (64, 256):
            where = {"relay_ms": relay, "callers": callers}
            runs += rates("asyncio", factor * 1000, **where) + rates("api", 2500, **where)
            runs += rates("old_best", 1000, **where) + rates("old", 700, **where)
    for system, p50 in (("api", 1.2), ("old_best", 2.0), ("old", 1.9)):
        runs += rates(system, 500, callers=1, latencies={"p50": p50})
    for system, workers, rate in (("worker", 2, 20e3), ("bullmq", 2, 3e3), ("bullmq_pipelined", 2, 9.5e3)):
        runs += rates(system, rate, scenario="drain", workers=workers)
    runs += rates("worker", 15e3, scenario="drain", workers=1) + rates("pool", 20e3, scenario="drain", workers=1)
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
        "a": (6.0, 5.0),
        "b": (2.6, 2.5),
        "c": (2.5, 2.0),
        "d": (0.6316, 0.85),
        "e": (2.105, 2.0),
        "f": (0.75, 0.7),
        "g": (0.96, 0.95),
        "h": (0.92, 0.9),
        "i": (0.9297, 0.9),
        "j": (7.0, 1.0),
        "k": (500.0, None),
    }
    assert all(bar["ok"] for bar in found.values())
    assert [letter for letter, bar in found.items() if not bar["goal_met"]] == ["j"]
    # A lone caller is served soonest by the old server that is slower in a crowd.
    assert found["d"]["cases"][0]["against"] == "old"


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
        for callers in plan.slow_callers if slow else plan.callers:
            order = [system for system, asked in turns(plan, LETTERS, slow=slow) if asked == callers]
            assert len(set(order)) == len(order) >= 2
            assert "old_best" in order


def test_only_what_the_wanted_bars_need_is_measured() -> None:
    assert [each.bars for each in scenarios(QUICK, "fg")] == ["ef", "g"]
    assert set(turns(FULL, "d", slow=False)) == {("api", 1), ("old_best", 1), ("old", 1)}
    assert {letter for each in scenarios(FULL, LETTERS) for letter in each.bars} == set(LETTERS)


def test_the_quick_plan_stays_below_four_minutes() -> None:
    assert sum(each.seconds for each in scenarios(QUICK, LETTERS)) < 240


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
    session = Session([Named(*outcomes)])
    asyncio.run(session.run())
    assert (session.runs, session.notes) == (kept, notes)
    assert all(note in capsys.readouterr().out for note in notes)


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

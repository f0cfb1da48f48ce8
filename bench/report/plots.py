"""The report's pictures, one figure each. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.record import Run, Spread, valid
from bench.report.drawing import (
    COLOURS,
    FAINT,
    GOOD,
    INK,
    PARTS,
    SHORT,
    THOUSANDS,
    beside,
    figure,
    from_zero,
    legend,
    line,
    spreads,
    systems,
)

Titles = Mapping[str, str]  # of the systems, by their names
_LEAST, _MOST = 0.2, 3.0  # shares of a goal that are still drawn to scale
_GOALS_CAPTION = (
    'Each bar runs from its goal, the line at 1, to what was measured. "At least 2" asks for twice the peer\'s '
    "speed.\nGreen, to the right of the line: the goal is reached. Red with a cross, to its left: the goal is missed."
)


def goals(bars: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How far each case is from its goal, on one scale: 1 is the goal. A bar that leaves the scale ends in an arrow."""
    rows = [(letter, case) for letter, bar in bars.items() for case in bar["cases"] if case["goal"] and case["value"]]
    made, [axes] = figure(1, height=1.4 + 0.32 * len(rows))
    axes.set_title(_GOALS_CAPTION, fontsize=10, fontweight="normal", linespacing=1.5, pad=10, x=-0.35)
    for y, (letter, case) in enumerate(rows):
        value, goal, most = case["value"], case["goal"], case["sense"] == "at most"
        reached = goal / value if most else value / goal
        colour = GOOD if case["ok"] else SHORT
        end = min(max(reached, _LEAST), _MOST)
        axes.plot([1, end], [y, y], color=colour, linewidth=8, solid_capstyle="butt", alpha=0.8)
        mark = "o" if case["ok"] else "X"
        axes.plot(end, y, mark if end == reached else ">" if end < reached else "<", color=colour, markersize=8)
        shown = f"{value:.3g} {case['unit']}  ({'at most' if most else 'at least'} {goal:g})"
        beside(axes, shown, (max(end, 1), y), (10, 0), va="center", color=colour)
        if y and letter != rows[y - 1][0]:
            axes.axhline(y - 0.5, color=FAINT, linewidth=0.8)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [f"{letter}:  {case['case']}" for letter, case in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(_LEAST / 1.06, _MOST * 2.4)
    _plain(axes)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("measured ÷ goal (goal ÷ measured where less is better)")
    return made


def asking(runs: Sequence[Run], titles: Titles, scenario: str = "ask") -> Figure:
    """Throughput by concurrency, a panel for each relay: those with TLS first."""
    asked = valid(runs, scenario=scenario)
    relays = sorted({(not run.tls, run.relay_ms) for run in asked})
    made, panels = figure(len(relays), height=4.4)
    for axes, (plain, relay) in zip(panels, relays, strict=True):
        there = valid(asked, relay_ms=relay, tls=not plain)
        for system in systems(there):
            points = spreads(valid(there, system=system), lambda run: run.callers, lambda run: run.rate)
            line(axes, points, COLOURS[system])
            most = max(points)
            beside(axes, f"{points[most].median:,.0f}", (most, points[most].median), (9, 0), va="center", fontsize=9)
        callers = sorted({run.callers for run in there})
        axes.set_xscale("log", base=2)
        axes.set_xticks(callers, [str(each) for each in callers])
        axes.set_xlim(callers[0] / 1.3, callers[-1] * 1.8)
        from_zero(axes)
        axes.set_title(f"relay {relay:g} ms" + ("" if plain else ", TLS"))
        axes.set_xlabel("callers at once")
    panels[0].set_ylabel("requests answered a second")
    legend(made, [(titles[system], COLOURS[system]) for system in systems(asked)])
    return made


def latency(runs: Sequence[Run], titles: Titles) -> Figure:
    """Percentiles by callers, a panel for each relay: a line from p50 to p99."""
    asked = valid(runs, scenario="ask")
    relays = sorted({run.relay_ms for run in asked})
    rows = max(len({(run.callers, run.system) for run in valid(asked, relay_ms=relay)}) for relay in relays)
    made, panels = figure(len(relays), height=2.0 + 0.26 * rows)
    for axes, relay in zip(panels, relays, strict=True):
        _percentiles(axes, valid(asked, relay_ms=relay))
        axes.set_title(f"relay {relay:g} ms")
        axes.set_xlabel("ms from question to answer     ● p50    | p90    ▶ p99")
    legend(made, [(titles[system], COLOURS[system]) for system in systems(asked)])
    return made


def _percentiles(axes: Axes, runs: Sequence[Run]) -> None:
    y, ticks = 0.0, {}
    for callers in sorted({run.callers for run in runs}):
        there = valid(runs, callers=callers)
        ticks[y + (len(systems(there)) - 1) / 2] = f"{callers} caller{'s' if callers > 1 else ''}"
        for system in systems(there):
            mine, colour = valid(there, system=system), COLOURS[system]
            p50, p90, p99 = (median(run.latencies[name] for run in mine) for name in ("p50", "p90", "p99"))
            axes.plot([p50, p99], [y, y], color=colour, linewidth=2.2, alpha=0.6)
            axes.plot(p50, y, "o", color=colour, markersize=7)
            axes.plot(p90, y, "|", color=colour, markersize=10, markeredgewidth=2)
            axes.plot(p99, y, ">", color=colour, markersize=6)
            beside(axes, f"{p50:.3g}", (p50, y), (-8, 0), ha="right", va="center", fontsize=8.5)
            y += 1
        y += 0.9
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.7, high)
    _plain(axes)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(y - 0.8, -0.9)
    axes.grid(visible=False, axis="y")


def _plain(axes: Axes) -> None:
    """Numbers as people write them on a logarithmic axis: 1, 2, 5, 10."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def drains(runs: Sequence[Run], titles: Titles) -> Figure:
    """Who drains how fast."""
    found = spreads(valid(runs, scenario="drain"), lambda run: (run.system, run.workers), lambda run: run.rate)
    rows = sorted(found.items(), key=lambda row: -row[1].median)
    made, [axes] = figure(1, height=0.9 + 0.42 * len(rows))
    for y, ((system, _), spread) in enumerate(rows):
        axes.barh(y, spread.median, color=COLOURS[system], height=0.66)
        axes.plot([spread.low, spread.high], [y, y], color=INK, linewidth=1.3, marker="|", markersize=8)
        beside(axes, f"{spread.median:,.0f}", (spread.high, y), (8, 0), va="center")
    axes.set_yticks(
        range(len(rows)),
        [_with_processes(titles[name], count) for (name, count), _ in rows],
    )
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(spread.high for _, spread in rows) * 1.12)
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("mails a second, relay 0 ms")
    return made


def backlog(runs: Sequence[Run]) -> Figure:
    """Rate, and memory of the worker, by how many requests wait."""
    held = valid(runs, scenario="backlog")
    made, panels = figure(2, height=3.4)
    rate: Callable[[Run], float] = lambda run: run.rate  # noqa: E731
    for axes, title, label, value in (
        (panels[0], "rate of one worker", "mails a second", rate),
        (panels[1], "memory of that worker", "MB, resident", lambda run: run.figures["rss_mb"]),
    ):
        points = spreads(held, lambda run: run.backlog, value)
        line(axes, points, COLOURS["worker"])
        axes.set_xscale("log")
        axes.set_xticks(list(points), [f"{size:,}" for size in points])
        axes.minorticks_off()
        axes.set_xlim(min(points) / 2.5, max(points) * 2.5)
        from_zero(axes, 1.2)
        for size, spread in points.items():
            beside(axes, f"{spread.median:,.0f}", (size, spread.high), (0, 7), ha="center")
        axes.set_title(title)
        axes.set_xlabel("requests that wait")
        axes.set_ylabel(label)
    return made


def scaling(runs: Sequence[Run]) -> Figure:
    """Rate by worker processes, and the straight line."""
    points = spreads(valid(runs, scenario="ladder"), lambda run: run.workers, lambda run: run.rate)
    one, most = points[min(points)].median / min(points), max(points)
    made, [axes] = figure(1, height=3.8, width=7.5)
    ends = [0.0, most * 1.06]
    axes.fill_between(ends, [0.9 * one * end for end in ends], [one * end for end in ends], color="#E8EEF3")
    axes.plot(ends, [one * end for end in ends], "--", color="#888888", linewidth=1.2)
    line(axes, points, COLOURS["worker"])
    for count, spread in points.items():
        shown = (
            f"{spread.median:,.0f}"
            if count == 1
            else f"{spread.median:,.0f}, {spread.median / count / one * 100:.0f} %"
        )
        beside(axes, shown, (count, spread.low), (8, -12))
    beside(axes, "linear (dashed), and 90 % of it", (most / 2, one * most / 2), (-14, 16), ha="right", color="#666666")
    axes.set_xticks(list(points))
    axes.set_xlim(0, most * 1.25)
    from_zero(axes, 1.0)
    axes.set_xlabel("worker processes, 32 connections each, relay 200 ms")
    axes.set_ylabel("mails a second")
    return made


def second(runs: Sequence[Run]) -> Figure:
    """What a request costs with one worker and with two, by callers and part."""
    found = valid(runs, scenario="second")
    rows = sorted({(run.callers, run.workers) for run in found})
    made, [axes] = figure(1, height=1.6 + 0.34 * len(rows))
    _costs(axes, [_cpu(valid(found, callers=callers, workers=workers)) for callers, workers in rows])
    names = [
        f"{callers} caller{'s' * (callers > 1)}, {workers} worker{'s' * (workers > 1)}" for callers, workers in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    legend(made, [entry for part, entry in PARTS.items() if any(part in run.cpu for run in found)])
    return made


def cpu(runs: Sequence[Run], titles: Titles) -> Figure:
    """What a request costs, by part: asking with 64 callers, and draining."""
    made, panels = figure(2, height=3.9)
    alike = {"callers": 64, "relay_ms": 0.0}
    for axes, title, asked, found in (
        (panels[0], "ask and be answered, 64 callers", True, valid(runs, scenario="ask", **alike)),
        (panels[1], "drain", False, valid(runs, scenario="drain")),
    ):
        rows = {key: _cpu(valid(found, system=key[0], workers=key[1])) for key in _in_order(found)}
        _costs(axes, list(rows.values()))
        names = [titles[name] if asked else _with_processes(titles[name], count) for name, count in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_title(title)
    shown = {part for run in runs for part in run.cpu}
    legend(made, [entry for part, entry in PARTS.items() if part in shown])
    return made


def _costs(axes: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    """A bar for each row, of its parts, with the sum at its end."""
    for y, parts in enumerate(rows):
        left = 0.0
        for part, used in parts.items():
            axes.barh(y, used, left=left, color=PARTS[part][1], height=0.66, edgecolor="white", linewidth=0.6)
            left += used
        beside(axes, f"{left:,.0f}", (left, y), (6, 0), va="center")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("µs of CPU for a request, relay 0 ms")


def _with_processes(title: str, count: int) -> str:
    return f"{title}, {count} process{'es' if count > 1 else ''}"


def _in_order(runs: Sequence[Run]) -> list[tuple[str, int]]:
    order = list(COLOURS)
    return sorted({(run.system, run.workers) for run in runs}, key=lambda key: (order.index(key[0]), -key[1]))


def _cpu(runs: Sequence[Run]) -> dict[str, float]:
    """The median of each part."""
    each = [run.cpu_each() for run in runs]
    medians = {part: Spread.of(used[part] for used in each if part in used) for part in PARTS}
    return {part: spread.median for part, spread in medians.items() if spread}

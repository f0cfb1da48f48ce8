"""How pictures are drawn: colours, lines with ranges, labels at their ends. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.record import Run, Spread

# Each system has the same colour everywhere; colour-blind readers can tell them apart.
COLOURS: Final = {
    "asyncio": "#0072B2",
    "worker": "#0072B2",
    "api": "#56B4E9",
    "pool": "#7F7F7F",
    "old_best": "#E69F00",
    "old": "#B8860B",
    "bullmq_pipelined": "#D55E00",
    "bullmq": "#CC79A7",
    "dramatiq": "#009E73",
    "celery": "#6B6B2F",
}
# Of the parts of one system's CPU.
PARTS: Final = {
    "client": ("client", "#C9D7E8"),
    "api": ("API", "#56B4E9"),
    "worker": ("worker", "#0072B2"),
    "server": ("server", "#E69F00"),
    "peer": ("worker of a peer", "#D55E00"),
    "pool": ("SMTP pool", "#7F7F7F"),
    "redis": ("Redis", "#A02C2C"),
    "sink": ("relay", "#BBBBBB"),
}
GOOD, SHORT, INK, FAINT = "#2E7D32", "#C62828", "#222222", "#D9D9D9"
TIMES: Final = "×"  # noqa: RUF001 - the sign, not the letter

mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "bench",  # the same runs give the same file
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.7,
        "xtick.color": "#555555",
        "ytick.color": INK,
        "text.color": INK,
        "figure.facecolor": "white",
    }
)
THOUSANDS: Final = ticker.FuncFormatter(lambda value, _: f"{value:,.0f}")


def figure(panels: int, *, height: float, width: float = 10.5) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels beside each other; inches."""
    made = Figure(figsize=(width, height), layout="constrained")
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def spreads(runs: Iterable[Run], key: Callable[[Run], Any], value: Callable[[Run], float]) -> dict[Any, Spread]:
    """Medians and ranges of a figure, by what `key` says, in order."""
    found: dict[Any, list[float]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(value(run))
    return {each: spread for each in sorted(found) if (spread := Spread.of(found[each]))}


def systems(runs: Iterable[Run]) -> list[str]:
    """Those that are in the runs, in the order of COLOURS."""
    there = {run.system for run in runs}
    return [system for system in COLOURS if system in there]


def line(axes: Axes, points: Mapping[float, Spread], colour: str) -> None:
    """Medians, joined, each with its range."""
    x = list(points)
    axes.fill_between(x, [p.low for p in points.values()], [p.high for p in points.values()], color=colour, alpha=0.18)
    axes.plot(x, [point.median for point in points.values()], "o-", color=colour, linewidth=2, markersize=5)
    for at, point in points.items():
        axes.plot([at, at], [point.low, point.high], color=colour, linewidth=1.5, marker="_", markersize=6)


def from_zero(axes: Axes, room: float = 1.12) -> None:
    """Heights that can be compared by eye, with room above."""
    axes.set_ylim(0, axes.get_ylim()[1] * room)
    axes.yaxis.set_major_formatter(THOUSANDS)


def beside(axes: Axes, text: str, at: tuple[float, float], by: tuple[float, float], **given: Any) -> None:
    """A text so many points away from a place."""
    axes.annotate(text, at, xytext=by, textcoords="offset points", **given)


def legend(made: Figure, entries: Sequence[tuple[str, str]]) -> None:
    """What the colours mean, below all panels."""
    patches = [Patch(color=colour, label=name) for name, colour in entries]
    made.legend(handles=patches, loc="outside lower center", ncols=min(4, len(patches)), frameon=False)

"""`python tests/faults/picture.py FILM PICTURE`: a film of the soak, drawn as the dashboard lays it out.

Needs matplotlib; `bench.soak.draw_dashboard` runs it where there is one. So it imports nothing of ours.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

COLOURS: Final = {  # Grafana's names
    "green": "#2f9e44",
    "orange": "#f08c00",
    "yellow": "#f2c037",
    "red": "#d6293e",
    "dark-red": "#8c1c2b",
    "blue": "#1c7ed6",
    "purple": "#9c36b5",
    "dark-purple": "#5f2170",
}
PALETTE: Final = ("#1c7ed6", "#2f9e44", "#f08c00", "#9c36b5", "#0ca5a5", "#d6293e", "#7a5c2e", "#868e96")
GROUPS: Final = {"worker": "#9c36b5", "relay": "#f08c00", "Redis": "#d6293e", "poison": "#495057"}
INK, FAINT, PALE = "#222222", "#e3e3e3", "#777777"
WIDTH, UNIT, DPI = 20.0, 0.27, 76  # inches; inches of a grid row; dots per inch
STRIP: Final = 5.5  # grid rows for the faults' names
LANES: Final = 4  # of the strip, so that names have room
BRIEFLY: Final = 3.0  # seconds that a fault without length is drawn with

mpl.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "xtick.color": PALE,
        "ytick.color": PALE,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.color": INK,
    }
)


def short(value: float, _: object = None) -> str:
    """A number without trailing zeros."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float, _: object = None) -> str:
    """A time as people say it."""
    return f"{value * 1000:.3g} ms" if 0 < value < 1 else f"{short(value)} s"


FORMATS: Final[dict[str, Callable[..., str]]] = {
    "s": seconds,
    "percentunit": lambda value, _=None: f"{value * 100:.3g} %",
    "bytes": lambda value, _=None: f"{value / 2**20:.0f} MiB",
}


class Picture:
    """The whole dashboard on one time axis."""

    def __init__(self, film: dict[str, Any]) -> None:
        self._film = film
        self._seconds = film["seconds"]
        shown = film["panels"]
        tops = sorted({panel["gridPos"]["y"] for panel in shown})
        # The dashboard's rows without the lines between them; each needs a title and an axis of its own here.
        heights = {y: next(p["gridPos"]["h"] for p in shown if p["gridPos"]["y"] == y) for y in tops}
        for panel in shown:
            if panel["gridPos"]["w"] == 24:  # a strip with a row for each of many names
                heights[panel["gridPos"]["y"]] = max(4, 0.72 * len(panel["lines"]))
        ratios = [STRIP, *heights.values()]
        self._figure = Figure(figsize=(WIDTH, UNIT * (sum(ratios) + 2.1 * len(ratios))))
        grid = GridSpec(len(ratios), 24, self._figure, height_ratios=ratios, hspace=0.33, wspace=4.2)
        grid.update(left=0.04, right=0.985, top=0.975, bottom=0.02)
        self._strip(self._figure.add_subplot(grid[0, :]))
        for panel in shown:
            at = panel["gridPos"]
            axes = self._figure.add_subplot(grid[1 + tops.index(at["y"]), at["x"] : at["x"] + at["w"]])
            self._panel(panel, axes)

    def save(self, path: Path) -> None:
        """As PNG, in as many colours as are needed to look at it."""
        drawn = io.BytesIO()
        self._figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
        Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)

    def _faults(self) -> list[tuple[str, float, float, str]]:
        """What was done, from when to when, in which colour; the same done to several at once counts once."""
        found: dict[tuple[str, int], tuple[list[str], float, float]] = {}
        for fault in self._film["faults"]:
            key = (fault["kind"], round(fault["start"]))
            where, start, end = found.get(key, ([], fault["start"], fault["end"]))
            found[key] = ([*where, fault["where"]], start, max(end, fault["end"], start + BRIEFLY))
        told = []
        for (kind, _), (where, start, end) in found.items():
            group, _, what = kind.partition(": ")
            name = where[0] if len(where) == 1 else f"all {len(where)} workers"
            text = f"{name}: {what}" if what else f"{group} on the {name}"
            told.append((text, start, end, GROUPS[group]))
        return told

    def _bands(self, axes: Axes, alpha: float) -> None:
        for _, start, end, colour in self._faults():
            axes.axvspan(start, end, color=colour, alpha=alpha, linewidth=0)

    def _time(self, axes: Axes) -> None:
        axes.set_xlim(0, self._seconds)
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 3, 6, 10], nbins=11))
        step = 60 if self._seconds > 150 else 30
        axes.set_xticks([i * step for i in range(int(self._seconds // step) + 1)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{int(at) // 60}:{int(at) % 60:02d}"))

    def _strip(self, axes: Axes) -> None:
        axes.set_title(
            f"VerifyServer's dashboard over {self._seconds / 60:.0f} minutes in which one thing after the other was"
            f" broken. Scraped every second, rates over {self._film['window']}.",
            fontsize=13,
        )
        self._bands(axes, 0.13)
        for number, (text, start, end, colour) in enumerate(sorted(self._faults(), key=lambda each: each[1])):
            lane = LANES - 1 - number % LANES
            axes.broken_barh([(start, end - start)], (lane + 0.12, 0.76), color=colour, linewidth=0)
            late = start > 0.88 * self._seconds
            axes.annotate(
                text,
                (start if late else end, lane + 0.5),
                xytext=(-5 if late else 5, 0),
                textcoords="offset points",
                ha="right" if late else "left",
                va="center",
                fontsize=11,
                color=colour,
                fontweight="bold",
            )
        axes.set_ylim(0, LANES)
        axes.set_yticks([])
        axes.grid(visible=False)
        self._time(axes)

    def _panel(self, panel: dict[str, Any], axes: Axes) -> None:
        kind = panel["type"]
        axes.set_title(panel["title"], fontsize=9 if kind == "stat" else 10.5)
        if kind == "state-timeline":
            self._states(panel, axes)
        elif kind == "heatmap":
            self._heat(panel, axes)
        else:
            if kind != "stat":
                self._bands(axes, 0.13)
            self._lines(panel, axes)
        if kind == "stat":
            self._time(axes)
            axes.set_xticks([])
            axes.yaxis.set_major_locator(MaxNLocator(2, integer=panel["fieldConfig"]["defaults"]["unit"] == "short"))
        else:
            self._time(axes)
            if panel["gridPos"]["w"] < 12:
                axes.set_xticks(axes.get_xticks()[::2])

    def _lines(self, panel: dict[str, Any], axes: Axes) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        fixed, names = _overrides(panel)
        stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
        lines = [line for line in panel["lines"] if panel["type"] == "stat" or _moves(line) or len(panel["lines"]) < 4]
        if stacked:
            lines = [line for line in lines if _moves(line)]
            self._stack(lines, axes, fixed, names)
        else:
            for number, line in enumerate(lines):
                x, y = _curve(line)
                colour = fixed.get(line["name"], PALETTE[number % len(PALETTE)])
                if panel["type"] == "stat":
                    colour = INK
                    _wash(axes, x, y, defaults["thresholds"]["steps"])
                axes.plot(x, y, color=colour, linewidth=1.4, label=names.get(line["name"], _short(line["name"])))
        if defaults.get("custom", {}).get("thresholdsStyle", {}).get("mode") == "dashed":
            top = axes.get_ylim()[1]
            for step in defaults["thresholds"]["steps"]:
                if step["value"] is not None and step["value"] < 1.5 * top:
                    axes.axhline(step["value"], color=COLOURS[step["color"]], linewidth=1, linestyle=(0, (5, 3)))
        if "log" in defaults.get("custom", {}).get("scaleDistribution", {}):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(seconds))
            axes.set_ylim(axes.get_ylim()[0], axes.get_ylim()[1] * 6)
            axes.yaxis.set_minor_locator(NullLocator())
            _legend(axes)
            return
        axes.yaxis.set_major_formatter(FuncFormatter(FORMATS.get(defaults["unit"], short)))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        high = axes.get_ylim()[1]
        moving = any(_moves(line) for line in lines)
        axes.set_ylim(0, high * (1.22 if panel["type"] != "stat" else 1.1) if moving else 1)
        if panel["type"] != "stat" and lines:
            _legend(axes)
        if not lines:
            axes.text(0.5, 0.5, "nothing", transform=axes.transAxes, ha="center", va="center", color=PALE)

    def _stack(self, lines: list[dict[str, Any]], axes: Axes, fixed: dict[str, str], names: dict[str, str]) -> None:
        moments = sorted({at for line in lines for at, _ in line["points"]})
        if not moments:
            return
        rows, colours, labels = [], [], []
        for number, line in enumerate(lines):
            known = {at: value or 0.0 for at, value in line["points"]}
            rows.append([known.get(at, 0.0) for at in moments])
            colours.append(fixed.get(line["name"], PALETTE[number % len(PALETTE)]))
            labels.append(names.get(line["name"], _short(line["name"])))
        axes.stackplot(moments, rows, colors=colours, labels=labels, alpha=0.8, linewidth=0)

    def _states(self, panel: dict[str, Any], axes: Axes) -> None:
        self._bands(axes, 0.13)
        [mapping] = panel["fieldConfig"]["defaults"]["mappings"]
        known = {float(value): COLOURS[look["color"]] for value, look in mapping["options"].items()}
        lines = sorted(panel["lines"], key=lambda line: line["points"][0][0], reverse=True)
        for row, line in enumerate(lines):
            for (at, value), after in zip(line["points"], [*line["points"][1:], (None, None)], strict=True):
                if value is not None:
                    until = after[0] if after[0] is not None and after[0] - at < 3 else at + 2
                    axes.broken_barh([(at, until - at)], (row - 0.38, 0.76), color=known[value], linewidth=0)
            name, first, last = _short(line["name"]), line["points"][0][0], line["points"][-1][0]
            inside = len(known) == 2 and 0.0 in known
            right = last < 0.8 * self._seconds
            at = 0.02 * self._seconds if inside else (last + 4 if right else first - 4)
            if inside:
                axes.text(first + at, row, name, color="white", fontweight="bold", va="center", fontsize=8.5)
            else:
                axes.text(at, row, name, va="center", ha="left" if right else "right", fontsize=8.5)
        axes.set_yticks([])
        axes.set_ylim(-0.6, max(len(lines), 1) - 0.4)
        axes.grid(visible=False)

    def _heat(self, panel: dict[str, Any], axes: Axes) -> None:
        bounds = sorted({float(line["labels"]["le"]) for line in panel["lines"]})
        whole = {
            float(line["labels"]["le"]): sum(value or 0.0 for _, value in line["points"]) for line in panel["lines"]
        }
        bounds = [
            bound for i, bound in enumerate(bounds) if not i or whole[bounds[i - 1]] < 0.9999 * max(whole.values())
        ]
        table = {float(line["labels"]["le"]): dict(map(tuple, line["points"])) for line in panel["lines"]}
        moments = sorted({at for points in table.values() for at in points})
        rows, below = [], dict.fromkeys(moments, 0.0)
        for bound in bounds:
            here = {at: table[bound].get(at) or 0.0 for at in moments}
            rows.append([max(0.0, here[at] - below[at]) ** 0.5 or float("nan") for at in moments])
            below = here
        axes.pcolormesh(moments, range(len(bounds)), rows, cmap="YlOrRd", shading="nearest", rasterized=True)
        shown = range(0, len(bounds), 2)
        labels = [seconds(bounds[i]) if bounds[i] < 1e9 else "longer" for i in shown]
        axes.set_yticks(list(shown), [f"≤ {label}" if label != "longer" else label for label in labels])
        axes.grid(visible=False)


def _overrides(panel: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Colours and names of lines that the dashboard fixes."""
    colours, names = {}, {}
    for override in panel["fieldConfig"]["overrides"]:
        for each in override["properties"]:
            if each["id"] == "color":
                fixed = each["value"]["fixedColor"]
                colours[override["matcher"]["options"]] = COLOURS.get(fixed, fixed)
            else:
                names[override["matcher"]["options"]] = each["value"]
    return colours, names


def _moves(line: dict[str, Any]) -> bool:
    return any(value for _, value in line["points"])


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="upper left",
        ncols=3,
        fontsize=7.5,
        frameon=False,
        handlelength=1.1,
        columnspacing=0.9,
        borderaxespad=0.1,
        labelspacing=0.2,
    )


def _wash(axes: Axes, x: list[float], y: list[float], steps: list[dict[str, Any]]) -> None:
    """The whole height in the colour of the threshold that the value has reached."""
    for at, value in zip(x, y, strict=True):
        if value == value:  # no gap
            colour = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
            axes.axvspan(at - 1, at + 1, color=COLOURS[colour], alpha=0.3, linewidth=0)


def _short(name: str) -> str:
    """Without what is the same in all names of one run."""
    for word in ("VerifyServer", "smtp://127.0.0.1", "127.0.0.1", "verify-"):
        name = name.replace(word, "")
    return name


def _curve(line: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Points, with a gap where there was no data."""
    x: list[float] = []
    y: list[float] = []
    for at, value in line["points"]:
        if x and at - x[-1] > 3:
            x.append(x[-1])
            y.append(float("nan"))
        x.append(at)
        y.append(float("nan") if value is None else value)
    return x, y


if __name__ == "__main__":
    source, target = (Path(word) for word in sys.argv[1:])
    Picture(json.loads(source.read_text("utf-8"))).save(target)

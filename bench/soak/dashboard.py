"""`dashboard.py RECORDING PICTURE`: the first screen of the dashboard over a recorded soak, as Grafana shows it.

It runs where matplotlib is (`bench/report/requirements.txt`), so it imports nothing of ours.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

WIDTH, HEIGHT, DPI = 1920, 1080, 120  # pixels; dots per inch
HEADER: Final = 62  # pixels above the panels
COLUMNS, ROWS = 24, 28  # Grafana's grid; so many of its rows are on the first screen
GAP: Final = 8  # pixels between panels
BACKGROUND, PANEL, BORDER, GRID = "#111217", "#181b1f", "#2c3235", "#2c3235"
INK, PALE = "#d8d9da", "#8e8e9a"
COLOURS: Final = {  # Grafana's names
    "green": "#73bf69",
    "yellow": "#f2cc0c",
    "orange": "#ff9830",
    "red": "#f2495c",
    "dark-red": "#c4162a",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "dark-purple": "#8f3bb8",
}
PALETTE: Final = ("#73bf69", "#5794f2", "#ff9830", "#b877d9", "#f2cc0c", "#8ab8ff", "#f2495c", "#8e8e9a")
FAULT: Final = "#8ab8ff"
FAULTS: Final = {  # how the picture names what was done
    "worker: kill -9": "killed",
    "relay: down": "down",
    "relay: 451 at RCPT": "answer 451",
    "relay: silent": "silent",
    "Redis: kill -9": "killed",
    "Redis: SIGSTOP": "frozen",
}
BRIEFLY: Final = 3.0  # seconds that a fault without length is drawn with

mpl.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.sans-serif": ["Inter", "Noto Sans", "DejaVu Sans"],
        "font.size": 7.5,
        "text.color": INK,
        "axes.facecolor": PANEL,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": PALE,
        "ytick.color": PALE,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
)


def short(value: float, _: object = None) -> str:
    """A number without trailing zeros."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float, _: object = None) -> str:
    """A duration with its unit."""
    return f"{value * 1000:.3g} ms" if 0 < value < 1 else f"{short(value)} s"


FORMATS: Final[dict[str, Callable[..., str]]] = {
    "s": seconds,
    "percentunit": lambda value, _=None: f"{value * 100:.3g} %",
    "bytes": lambda value, _=None: f"{value / 2**20:.0f} MiB",
}


class Picture:
    """The panels of the first screen, where the dashboard places them."""

    def __init__(self, recording: dict[str, Any]) -> None:
        self._faults = _faults(recording["faults"])
        self._seconds = recording["seconds"]
        self._figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), facecolor=BACKGROUND)
        self._header(recording["window"])
        top = 0
        for y in sorted({panel["gridPos"]["y"] for panel in recording["panels"]}):
            row = [panel for panel in recording["panels"] if panel["gridPos"]["y"] == y]
            height = row[0]["gridPos"]["h"]
            if top + height > ROWS:
                break
            for panel in row:
                self._panel(panel, top)
            top += height

    def save(self, path: Path) -> None:
        """Write a PNG with as few colours as are needed to look at it."""
        drawn = io.BytesIO()
        self._figure.savefig(drawn, format="png", dpi=DPI, facecolor=BACKGROUND)
        Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)

    def _header(self, window: str) -> None:
        at = 1 - HEADER / 2 / HEIGHT
        self._figure.text(12 / WIDTH, at, "VerifyServer", fontsize=13, fontweight="bold", va="center")
        text = f"{self._seconds / 60:.0f} minutes with one fault after another (shaded); rates over {window}"
        self._figure.text(1 - 12 / WIDTH, at, text, fontsize=9.5, color=PALE, ha="right", va="center")

    def _panel(self, panel: dict[str, Any], top: int) -> None:
        at, unit = panel["gridPos"], (HEIGHT - HEADER) / ROWS
        x, width = at["x"] * WIDTH / COLUMNS + GAP / 2, at["w"] * WIDTH / COLUMNS - GAP
        y, height = HEIGHT - HEADER - (top + at["h"]) * unit + GAP / 2, at["h"] * unit - GAP
        box = FancyBboxPatch(
            (x / WIDTH, y / HEIGHT), width / WIDTH, height / HEIGHT, boxstyle="square,pad=0", facecolor=PANEL,
            edgecolor=BORDER, linewidth=0.8, transform=self._figure.transFigure, zorder=-1,
        )  # fmt: skip
        self._figure.add_artist(box)
        self._figure.text((x + 10) / WIDTH, (y + height - 18) / HEIGHT, panel["title"], fontsize=8.5, va="center")
        draw, left, right, bottom = {
            "stat": (self._stat, 0, 0, 0),
            "state-timeline": (self._states, 190, 16, 26),
            "heatmap": (self._heat, 78, 14, 28),
        }.get(panel["type"], (self._lines, 58, 14, 46))
        inner = (x + left, y + bottom, width - left - right, height - bottom - 36)
        axes = self._figure.add_axes((inner[0] / WIDTH, inner[1] / HEIGHT, inner[2] / WIDTH, inner[3] / HEIGHT))
        draw(panel, axes)

    def _time(self, axes: Axes, *, every: int = 60) -> None:
        axes.set_xlim(0, self._seconds)
        axes.set_xticks(range(0, int(self._seconds) + 1, every))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{int(at) // 60}:{int(at) % 60:02d}"))

    def _shade(self, axes: Axes) -> None:
        for _, start, end in self._faults:
            axes.axvspan(start, end, color=FAULT, alpha=0.16, linewidth=0)

    def _stat(self, panel: dict[str, Any], axes: Axes) -> None:
        """The last value in the colour of its threshold, above its course."""
        defaults = panel["fieldConfig"]["defaults"]
        axes.set_axis_off()
        points = [(at, value) for line in panel["lines"] for at, value in line["points"] if value is not None]
        if not points:
            return
        steps, last = defaults["thresholds"]["steps"], points[-1][1]
        high = max(value for _, value in points) or 1
        for (at, value), (after, _) in pairwise(points):
            if after - at < 5:
                axes.fill_between((at, after), (value, value), color=_threshold(value, steps), alpha=0.35, linewidth=0)
        axes.set_xlim(0, self._seconds)
        axes.set_ylim(0, 2.6 * high)
        text = FORMATS.get(defaults["unit"], short)(last)
        colour = _threshold(last, steps)
        axes.text(0.5, 0.68, text, transform=axes.transAxes, fontsize=21, color=colour, ha="center", va="center")

    def _lines(self, panel: dict[str, Any], axes: Axes) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        custom = defaults.get("custom", {})
        fixed, names = _overrides(panel)
        lines = [line for line in panel["lines"] if _moves(line)] or panel["lines"][:1]
        colours = [fixed.get(line["name"], PALETTE[i % len(PALETTE)]) for i, line in enumerate(lines)]
        labels = [names.get(line["name"], _short(line["name"])) for line in lines]
        self._shade(axes)
        if custom.get("stacking", {}).get("mode") == "normal":
            moments = sorted({at for line in lines for at, _ in line["points"]})
            known = [{at: value or 0.0 for at, value in line["points"]} for line in lines]
            rows = [[values.get(at, 0.0) for at in moments] for values in known]
            axes.stackplot(moments, rows, colors=colours, labels=labels, alpha=0.75, linewidth=0)
        else:
            for line, colour, label in zip(lines, colours, labels, strict=True):
                axes.plot(*_curve(line), color=colour, linewidth=1.3, label=label)
        if "log" in custom.get("scaleDistribution", {}):
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, axes.get_ylim()[1] * 1.05 if any(map(_moves, lines)) else 1)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        if custom.get("thresholdsStyle", {}).get("mode") == "dashed":
            for step in defaults["thresholds"]["steps"]:
                if step["value"] is not None and step["value"] < axes.get_ylim()[1]:
                    axes.axhline(step["value"], color=COLOURS[step["color"]], linewidth=1, linestyle=(0, (5, 3)))
        axes.yaxis.set_major_formatter(FuncFormatter(FORMATS.get(defaults["unit"], short)))
        self._time(axes, every=60 if panel["gridPos"]["w"] >= 8 else 120)
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.1), ncols=4, fontsize=7.5, frameon=False, handlelength=1.2,
            columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip

    def _states(self, panel: dict[str, Any], axes: Axes) -> None:
        """A row for each name, and above them the names of the faults."""
        [mapping] = panel["fieldConfig"]["defaults"]["mappings"]
        known = {float(value): COLOURS[look["color"]] for value, look in mapping["options"].items()}
        lines = sorted((line for line in panel["lines"] if line["points"]), key=lambda line: -line["points"][0][0])
        self._shade(axes)
        for row, line in enumerate(lines):
            for (at, value), after in zip(line["points"], [*line["points"][1:], (None, None)], strict=True):
                if value is not None:
                    until = after[0] if after[0] is not None and after[0] - at < 3 else at + 2
                    axes.broken_barh([(at, until - at)], (row - 0.4, 0.8), color=known[value], linewidth=0)
        for number, (text, start, end) in enumerate(self._faults):
            middle = min(max((start + end) / 2, 8), self._seconds - 12)
            height = len(lines) + (0.15 if number % 2 else 1.35)
            axes.text(middle, height, text, color=FAULT, fontsize=8, ha="center", va="center", clip_on=False)
        axes.set_yticks(range(len(lines)), [_short(line["name"]) for line in lines], fontsize=6.8, color=INK)
        axes.set_ylim(-0.6, len(lines) + 2)
        axes.grid(visible=False)
        self._time(axes, every=30)

    def _heat(self, panel: dict[str, Any], axes: Axes) -> None:
        table = {float(line["labels"]["le"]): dict(map(tuple, line["points"])) for line in panel["lines"]}
        whole = {bound: sum(value or 0.0 for value in points.values()) for bound, points in table.items()}
        bounds = sorted(table)
        # Above the first bound that holds everything, every row is empty.
        bounds = [b for i, b in enumerate(bounds) if not i or whole[bounds[i - 1]] < 0.9999 * max(whole.values())]
        moments = sorted({at for points in table.values() for at in points})
        rows, below = [], dict.fromkeys(moments, 0.0)
        for bound in bounds:
            here = {at: table[bound].get(at) or 0.0 for at in moments}
            rows.append([max(0.0, here[at] - below[at]) ** 0.5 or float("nan") for at in moments])
            below = here
        axes.pcolormesh(moments, range(len(bounds)), rows, cmap="inferno", shading="nearest", rasterized=True)
        shown = range(0, len(bounds), 3)
        axes.set_yticks(list(shown), [f"≤ {seconds(bounds[i])}" if bounds[i] < 1e9 else "longer" for i in shown])
        axes.grid(visible=False)
        self._time(axes)


def _faults(recorded: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """What was done, from when to when; the same done to several at once counts once."""
    found: dict[tuple[str, int], tuple[list[str], float, float]] = {}
    for fault in recorded:
        key = (fault["kind"], round(fault["start"]))
        where, start, end = found.get(key, ([], fault["start"], fault["end"]))
        found[key] = ([*where, fault["where"]], start, max(end, fault["end"], start + BRIEFLY))
    named = []
    for (kind, _), (where, start, end) in found.items():
        what = FAULTS.get(kind)
        who = where[0].replace("relays 0 and 1", "both relays") if len(where) == 1 else f"all {len(where)} workers"
        named.append((f"{who} {what}" if what else "malformed message", start, end))
    return sorted(named, key=lambda each: each[1])


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


def _threshold(value: float, steps: list[dict[str, Any]]) -> str:
    """The colour of the threshold that a value has reached."""
    return COLOURS[[step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]]


def _moves(line: dict[str, Any]) -> bool:
    return any(value for _, value in line["points"])


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

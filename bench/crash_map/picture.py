"""Draws the map as SVG: the same results give the same bytes. It can be read on a light and on a dark background, and
is no wider than a page."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from typing import Final

from bench.crash_map.cells import Result
from bench.crash_map.record import Map
from bench.crash_map.scenarios import SCENARIOS, Actor, Cell, Fault, Place, Servers

_WIDE, _HIGH, _GAP = 14, 13, 2  # of a cell, with the gap to the next
_LABELS: Final = 96  # above the cells: the names of the steps
_FAULTS: Final = 244  # left of them: the names of the faults
_MARGIN, _BETWEEN = 24, 46
_TITLE: Final = 30
_LINE: Final = 17
_CHARACTER: Final = 7.5  # of a title, at most

# Colour-blind readers can tell them apart, and a broken promise has a cross as well.
_COLOURS: Final = {
    "none": ("0 mails", "#b9d3ea"),
    "one": ("1 mail", "#2f78b7"),
    "two": ("more than 1, as promise 3 permits", "#e69f00"),
    "broken": ("a broken promise", "#c62828"),
    "silent": ("did not occur in these runs", "none"),
}
_STYLE: Final = """
  :root { --paper: #ffffff; --ink: #1f2328; --faint: #6e7781; }
  @media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --faint: #8d96a0; } }
  .paper { fill: var(--paper); }
  text { font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); }
  .title { font-size: 20px; font-weight: 600; }
  .servers { font-size: 15px; font-weight: 600; }
  .place { font-size: 12.5px; font-weight: 600; }
  .step { font-size: 9.5px; }
  .faint { fill: var(--faint); }
  .cross { stroke: #ffffff; stroke-width: 1.6; fill: none; }
"""


def picture(drawn: Map) -> str:
    """The whole file."""
    sections = {servers: _rows(drawn, servers) for servers in Servers}
    width = max([900, *(_width(drawn, row) + 2 * _MARGIN for rows in sections.values() for row in rows)])
    head = list(_head(drawn, width))
    bottom: float = len(_conditions(drawn, width)) * _LINE + 3 * _TITLE + 2 * _LINE
    body: list[str] = []
    for servers, rows in sections.items():
        if not rows:
            continue
        body.append(_text(_MARGIN, bottom, servers.value, "servers"))
        bottom += _LINE
        for row in rows:
            body += _row(drawn, row, _MARGIN, bottom)
            bottom += _height(row)
        bottom += _TITLE
    size = f'viewBox="0 0 {width:g} {bottom:g}" width="{width:g}" height="{bottom:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="what">',
        '<title id="what">What becomes of a request when a process fails at each of its steps</title>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width:g}" height="{bottom:g}"/>',
        *head,
        *body,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _rows(drawn: Map, servers: Servers) -> list[list[Place]]:
    """A worker's bands have a row each, those of client and API share one."""
    there = [place for place in drawn.steps if place.servers is servers and drawn.steps[place]]
    rows = []
    for actors in ([Actor.WORKER], [Actor.CLIENT, Actor.API]):
        for scenario in SCENARIOS:
            row = [place for actor in actors for place in there if (place.actor, place.scenario) == (actor, scenario)]
            rows += [row] if row else []
    return rows


def _faults(row: list[Place]) -> list[Fault]:
    return [fault for fault in Fault if fault is not Fault.TWICE or row[0].actor is Actor.WORKER]


def _width(drawn: Map, row: list[Place]) -> float:
    bands = sum(_band(drawn, place, first=place is row[0]) for place in row)
    return _FAULTS + bands + _BETWEEN * (len(row) - 1) + _LABELS / 2


def _band(drawn: Map, place: Place, *, first: bool) -> float:
    """The width of the cells, or of the title if that needs more; the first one's begins above the faults."""
    title = _CHARACTER * len(_title(place)) - (_FAULTS if first else 0)
    return max(len(drawn.steps[place]) * _WIDE, title)


def _title(place: Place) -> str:
    return f"{place.actor.value}: {SCENARIOS[place.scenario].title}"


def _height(row: list[Place]) -> float:
    return _TITLE + _LABELS + len(_faults(row)) * _HIGH + 12


def _head(drawn: Map, width: float) -> Iterator[str]:
    """Title, legend and conditions."""
    yield _text(_MARGIN, _MARGIN + 14, "What becomes of a request when a process fails at each of its steps", "title")
    numbers = Counter(map(_kind, drawn.results.values()))
    left, at = float(_MARGIN), _MARGIN + 14 + _TITLE
    for kind, (meaning, colour) in _COLOURS.items():
        yield _cells(kind, colour, [(left, at - 9)])
        label = f"{meaning}: {numbers[kind]:,}"
        yield _text(left + _WIDE + 4, at, label)
        left += _WIDE + 34 + 6.2 * len(label)
    for line in _conditions(drawn, width):
        at += _LINE
        yield _text(_MARGIN, at + 4, line, "faint")


def _conditions(drawn: Map, width: float) -> list[str]:
    counts = drawn.counts()
    said = (
        f"{counts['cells']:,} cells: at every step (across: every command → of the process and every reply ← to it) one"
        f" process fails in one way (down). Requests lost: {counts['requests lost']}. Mails for the address of the"
        f" request are counted. Lease 1 s. {drawn.conditions}."
    )
    return textwrap.wrap(said, int((width - 2 * _MARGIN) / 5.6))


def _row(drawn: Map, row: list[Place], left: float, top: float) -> Iterator[str]:
    first = top + _TITLE + _LABELS
    for number, fault in enumerate(_faults(row)):
        yield _text(left, first + number * _HIGH + 9, fault.value)
    at = left + _FAULTS
    for place in row:
        start = left if place is row[0] else at
        yield _text(start, top + _TITLE - 8, _title(place), "place")
        steps = drawn.steps[place]
        for number, (_, name) in enumerate(steps):
            x, y = at + number * _WIDE + 9, first - 5
            yield (f'<text class="step" x="{x:g}" y="{y:g}" transform="rotate(-60 {x:g} {y:g})">{escape(name)}</text>')
        found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for down, fault in enumerate(_faults(row)):
            for across, (step, _) in enumerate(steps):
                result = drawn.results.get(Cell(place, step, fault))
                if result is not None:
                    found[_kind(result)].append((at + across * _WIDE, first + down * _HIGH))
        for kind, (_, colour) in _COLOURS.items():
            if found[kind]:
                yield _cells(kind, colour, found[kind])
        at += _band(drawn, place, first=place is row[0]) + _BETWEEN


def _kind(result: Result) -> str:
    if result.silent:
        return "silent"
    if result.breaches:
        return "broken"
    return ("none", "one", "two")[min(result.mails, 2)]


def _cells(kind: str, colour: str, places: list[tuple[float, float]]) -> str:
    """Cells of one colour, as one path."""
    wide, high = _WIDE - _GAP, _HIGH - _GAP
    squares = "".join(f"M{x:g} {y:g}h{wide}v{high}h-{wide}z" for x, y in places)
    outline = ' stroke="#8d96a0" stroke-dasharray="2 2"' if kind == "silent" else ""
    path = f'<path fill="{colour}"{outline} d="{squares}"/>'
    if kind == "broken":
        crosses = "".join(f"M{x + 3:g} {y + 2.5:g}l6 6m0 -6l-6 6" for x, y in places)
        path += f'<path class="cross" d="{crosses}"/>'
    return path


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:g}" y="{y:g}">{escape(text)}</text>'

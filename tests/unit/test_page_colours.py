"""The demo page's colours, light and dark: text and shapes stand out (WCAG 2.2, 1.4.3 and 1.4.11)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

STYLE = Path(__file__).parents[2] / "producer" / "api" / "demo" / "page" / "style.css"
# Which text colour is used on which background.
TEXT = [
    *[(ink, ground) for ink in ("ink", "soft") for ground in ("ground", "card", "field")],
    ("soft", "line"),  # the language that is not chosen
    ("accent", "card"),
    ("on-accent", "accent"),
    ("on-accent", "accent-deep"),
    ("accent-deep", "accent-wash"),
    ("good", "good-wash"),
    ("bad", "bad-wash"),
    ("wait", "wait-wash"),
    ("wait", "card"),
]
# Borders of fields, the ring of the focus, and the stages' marks.
SHAPES = [
    ("edge", "card"),
    ("edge", "field"),
    ("accent", "ground"),
    ("bad", "card"),
    ("accent", "accent-wash"),
    ("good", "card"),
]


def colours() -> dict[str, dict[str, str]]:
    found = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", STYLE.read_text(encoding="utf-8"))
    return {"light": {name: light for name, light, _ in found}, "dark": {name: dark for name, _, dark in found}}


def luminance(colour: str) -> float:
    """Relative, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("pairs", "least"), [(TEXT, 4.5), (SHAPES, 3.0)])
def test_it_stands_out(scheme: str, pairs: list[tuple[str, str]], least: float) -> None:
    named = colours()[scheme]
    found = {(front, back): round(contrast(named[front], named[back]), 2) for front, back in pairs}
    assert {pair: value for pair, value in found.items() if value < least} == {}


def test_the_measure_is_right() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)

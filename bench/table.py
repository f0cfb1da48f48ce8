"""The bars as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

SENSES: Final = {"at least": "≥", "at most": "≤"}
_WIDTH: Final = 46  # of a case's name


def table(bars: Mapping[str, Mapping[str, Any]]) -> str:
    """A block for each bar: how it stands, then its cases."""
    return "\n".join(line for letter, bar in bars.items() for line in _bar(letter, bar))


def _bar(letter: str, bar: Mapping[str, Any]) -> Iterator[str]:
    yield f"{letter}  {verdict(bar):<6}  {bar['title']}"
    for case in bar["cases"]:
        words = [f"{case['case']:<{_WIDTH}}", f"{value(case):>14}"]
        if case["goal"] is not None:
            missed = not case["ok"] and not case.get("loaded")
            words.append(f"{SENSES[case['sense']]} {case['goal']:g}{'  not reached' if missed else ''}")
        yield "          " + "  ".join([*words, *_details(case)])


def _details(case: Mapping[str, Any]) -> Iterator[str]:
    """What the value comes from: medians and ranges."""
    if "each_round" in case:
        yield f"(rounds {span(case['each_round'])})"
    if "ours" in case and "theirs" in case:
        yield f"{span(case['ours'])} : {span(case['theirs'])}" + (f" {case['against']}" if "against" in case else "")
    elif "ours" in case:
        yield span(case["ours"])
    if "cpu_us" in case:
        yield f"CPU {cpu(case)}"


def verdict(bar: Mapping[str, Any]) -> str:
    """Of a bar or a case."""
    return "loaded" if bar.get("loaded") else "ok" if bar["ok"] else "short"


def value(case: Mapping[str, Any]) -> str:
    """A case's value with its unit, or why there is none."""
    return "loaded" if case.get("loaded") and case["value"] is None else figure(case["value"], case["unit"])


def cpu(case: Mapping[str, Any]) -> str:
    """What a request costs, ours and theirs; nothing if it is not known."""
    each = " : ".join(f"{cost:,.0f}" for cost in case.get("cpu_us", ()))
    return f"{each} µs" if each else ""


def figure(value: float | None, unit: str) -> str:
    """A value with its unit."""
    if value is None:
        return "not measured"
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} {unit}"


def span(spread: Mapping[str, float]) -> str:
    """A median and its range."""
    median, low, high = (_short(spread[name]) for name in ("median", "low", "high"))
    return f"{median} [{low}-{high}]"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

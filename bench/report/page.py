"""The page: `report.md` and its pictures, beside the raw file.

Needs matplotlib; `bench.report.drawn` runs it where there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.record import Run
from bench.report import plots
from bench.table import SENSES, figure, span

# Runs until November 2026 call the API a door.
_RENAMED = {
    '"door"': '"api"',
    '"doors"': '"api"',
    "gRPC door": "gRPC API",
    '"doors, start': '"API, start',
    "idle doors, their": "idle API, its",
    "idle doors": "idle API",
}


def write(raw: Mapping[str, Any], directory: Path, name: str) -> Path:
    """The report on `raw`, whose file is called `name`."""
    runs = [Run.read(each) for each in raw["runs"]]
    titles = {system: each["title"] for system, each in raw["systems"].items()}
    pictures: tuple[tuple[str, str, str, Callable[[], Figure]], ...] = (
        (
            "asking",
            "Throughput by concurrency",
            "Callers ask and wait for the reply, each for a new address each time. Medians; the shade is the range.",
            lambda: plots.asking(runs, titles),
        ),
        (
            "latency",
            "Latency percentiles",
            "Time from request to reply, in the same runs; the number is the p50.",
            lambda: plots.latency(runs, titles),
        ),
        (
            "drains",
            "Draining, against peers",
            "Single messages wait in the queue; each has its best settings (below). The black line is the range.",
            lambda: plots.drains(runs, titles),
        ),
        (
            "cpu",
            "What a request costs",
            "CPU seconds of each process divided by the requests. On shared cores, this sets the throughput.",
            lambda: plots.cpu(runs, titles),
        ),
        (
            "backlog",
            "Draining by backlog",
            "The backlog is topped up while it is drained.",
            lambda: plots.backlog(runs),
        ),
        (
            "scaling",
            "Scaling by worker processes",
            "Several worker processes on one slow relay.",
            lambda: plots.scaling(runs),
        ),
    )
    _save(plots.goals(raw["bars"]), directory / "goals.svg")
    lines = [
        *_head(raw),
        "",
        "![Each measured figure against its goal: green bars reach it, red ones miss it](goals.svg)",
        "",
        *_table(raw["bars"]),
    ]
    for file, title, text, draw in pictures:
        _save(draw(), directory / f"{file}.svg")
        lines += ["", f"## {title}", "", text, "", f"![{title}]({file}.svg)"]
    lines += ["", *_settings(raw["systems"]), "", *_conditions(raw, name)]
    path = directory / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _save(drawn: Figure, path: Path) -> None:
    drawn.savefig(path, metadata={"Date": None})


def _head(raw: Mapping[str, Any]) -> Iterator[str]:
    bars, machine = raw["bars"], raw["machine"]
    short = [letter for letter, bar in bars.items() if not bar["ok"]]
    met = (
        f"{len(bars) - len(short)} of {len(bars)} goals are met; missed: {', '.join(short)}"
        if short
        else "All goals are met"
    )
    where = f"on {raw['when'][:10]} at commit {raw['commit']}, {machine['cores']} cores of {machine['cpu']}"
    yield "# How fast it is, and against whom"
    yield ""
    yield (
        f"{met}. Measured {where}, in the configuration that ships. What counts are ratios, of runs that were"
        " interleaved on one machine; the single figures are those of that machine on that day."
    )


def _table(bars: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| | measured | value | goal | | median [range] of ours | of theirs | CPU of a request, ours : theirs |"
    yield "|---|---|--:|--:|---|---|---|---|"
    for letter, bar in bars.items():
        for number, case in enumerate(bar["cases"]):
            first = (f"**{letter}**", f"{bar['title']}: {case['case']}") if not number else ("", case["case"])
            goal = "stated" if case["goal"] is None else f"{SENSES[case['sense']]} {case['goal']:g}"
            missed = "not met" if bar["stated"] else "**short**"
            outcome = "" if case["goal"] is None else "ok" if case["ok"] else missed
            sides = (span(case[side]) if side in case else "" for side in ("ours", "theirs"))
            cpu = "{:,.0f} : {:,.0f} µs".format(*case["cpu_us"]) if "cpu_us" in case else ""
            yield f"| {' | '.join([*first, figure(case['value'], case['unit']), goal, outcome, *sides, cpu])} |"


def _settings(systems: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    yield "## Who was measured, and how it was set"
    yield ""
    yield "| system | setting |"
    yield "|---|---|"
    for each in systems.values():
        yield f"| {each['title']} | {each['setting']} |"


def _conditions(raw: Mapping[str, Any], name: str) -> Iterator[str]:
    machine = raw["machine"]
    yield "## Conditions"
    yield ""
    yield (
        f"- Machine: {machine['cores']} cores, {machine['cpu']}, {machine['memory_gb']} GB, {machine['system']}; load"
        f" {', '.join(map(str, machine['load_at_start']))} as it began. Clients, servers, Redis and relay share it."
    )
    yield "- Redis: one server for each system, `appendonly yes`, `appendfsync everysec`."
    yield "- Relay: `bench/sink.c`. Successes, codes, marks and replies are as many as its mails, or a run is void."
    void, took = sum(bool(run["void"]) for run in raw["runs"]), raw["seconds"] / 60
    yield f"- {len(raw['runs'])} runs in {took:.0f} minutes, {void} of them void; each is in [{name}]({name})."
    for note in raw["notes"]:
        yield f"- {note}"
    for what in raw["left_out"]:
        yield f"- Left out: {what}."
    for whose, versions in (("Versions", raw["versions"]), ("The peers'", raw["peer_versions"])):
        yield f"- {whose}: {', '.join(f'{what} {which}' for what, which in versions.items())}."


def main() -> None:
    """Write the report of one run."""
    path = Path(sys.argv[1]).resolve()
    text = path.read_text(encoding="utf-8")
    for old, new in _RENAMED.items():
        text = text.replace(old, new)
    sys.stdout.write(f"{write(json.loads(text), path.parent, path.name)}\n")


if __name__ == "__main__":
    main()

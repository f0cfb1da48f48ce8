"""The page: `report.md` and its pictures, beside the raw file.

Needs matplotlib; `bench.report.drawn` runs it where there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.record import Run, valid
from bench.report import plots
from bench.table import SENSES, cpu, span, value

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
    quiet = [run for run in runs if not run.loaded]  # rates and times are theirs alone
    titles = {system: each["title"] for system, each in raw["systems"].items()}
    # What it is called, which runs it needs, its title, what it shows, how it is drawn.
    pictures: tuple[tuple[str, Sequence[Run], str, str, Callable[[], Figure]], ...] = (
        (
            "asking",
            valid(quiet, scenario="ask"),
            "Throughput by concurrency",
            "Callers ask and wait for the reply, each for a new address each time. Medians; the shade is the range.",
            lambda: plots.asking(quiet, titles),
        ),
        (
            "latency",
            valid(quiet, scenario="ask"),
            "Latency percentiles",
            "Time from request to reply, in the same runs; the number is the p50.",
            lambda: plots.latency(quiet, titles),
        ),
        (
            "drains",
            valid(quiet, scenario="drain"),
            "Draining, against peers",
            "Single messages wait in the queue; each has its best settings (below). The black line is the range.",
            lambda: plots.drains(quiet, titles),
        ),
        (
            "cpu",
            valid(runs, scenario="ask") and valid(runs, scenario="drain"),
            "What a request costs",
            "CPU seconds of each process divided by the requests. On shared cores, this sets the throughput.",
            lambda: plots.cpu(runs, titles),
        ),
        (
            "backlog",
            valid(quiet, scenario="backlog"),
            "Draining by backlog",
            "The backlog is topped up while it is drained.",
            lambda: plots.backlog(quiet),
        ),
        (
            "scaling",
            valid(quiet, scenario="ladder"),
            "Scaling by worker processes",
            "Several worker processes on one slow relay.",
            lambda: plots.scaling(quiet),
        ),
        (
            "replacing",
            valid(quiet, scenario="replace"),
            "In place of the old server",
            "Our gRPC API and one worker against the old server, both as they ship. Medians; the shade is the range.",
            lambda: plots.asking(quiet, titles, "replace"),
        ),
        (
            "second",
            valid(runs, scenario="second"),
            "What a second worker costs",
            "CPU of a request through the gRPC API, with one worker and with two.",
            lambda: plots.second(runs),
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
    for file, needed, title, text, draw in pictures:
        if not needed:
            continue
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
    loaded = [letter for letter, bar in bars.items() if bar.get("loaded")]
    short = [letter for letter, bar in bars.items() if not bar["ok"] and letter not in loaded]
    met = f"{len(bars) - len(short) - len(loaded)} of {len(bars)} goals are met"
    met += f"; missed: {', '.join(short)}" if short else ""
    met += f"; not known, as others used the machine: {', '.join(loaded)}" if loaded else ""
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
            outcome = "loaded" if case.get("loaded") else outcome
            sides = (span(case[side]) if side in case else "" for side in ("ours", "theirs"))
            yield f"| {' | '.join([*first, value(case), goal, outcome, *sides, cpu(case)])} |"


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
    if "foreign" in raw:
        before, most = (f"{raw['foreign'][when] * 100:.0f} %" for when in ("before", "most"))
        yield f"- Others used {before} of its CPU before the first run, and at most {most} during one."
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

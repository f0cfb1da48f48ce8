"""The benchmark: `python -m bench [--quick] [--bars a c]`, which `make bench` runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import uvloop

from bench import bars, machine, peers, table
from bench.plan import FULL, LETTERS, OURS, QUICK, Plan
from bench.report.drawn import NotDrawn, draw
from bench.scenarios import scenarios
from bench.session import Session
from producer.errors import VerifyError

RESULTS: Final = Path(__file__).parent / "results"
LATEST: Final = RESULTS / "latest.json"
_LETTERS: Final = (
    "only these: a to d ask, e to h drain, i adds workers, j asks behind a backlog, k starts, l and m stand against the"
    " old server with TLS and without, n adds a worker that is not needed; all of them take 40 minutes"
)
_AGAINST_OTHERS: Final = "abcdelm"  # the bars that need the peers
_INTERRUPTED: Final = 130  # exit status of a program that Ctrl-C ended


def main() -> int:
    """Measure, write the results, print the table; the exit status."""
    given = _arguments()
    plan = QUICK if given.quick else FULL
    letters = "".join(letter for letter in LETTERS if letter in given.bars)
    try:
        return _measure(plan, letters)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; nothing was written\n")
        return _INTERRUPTED
    except VerifyError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1


def _measure(plan: Plan, letters: str) -> int:
    about, measured, why = _about(plan), letters, ""
    if set(_AGAINST_OTHERS) & set(letters):
        try:
            peers.install()
            about["peer_versions"] = peers.versions()
        except VerifyError as exc:
            measured, why = "".join(letter for letter in letters if letter not in _AGAINST_OTHERS), str(exc)
    session = Session(scenarios(plan, measured))
    if why:
        session.note(f"the peers cannot be measured: {why}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(session.run())
    results = bars.results(session.runs, letters)
    raw = about | {
        "seconds": round(session.elapsed),
        "foreign": {
            "before": round(session.foreign_before, 3),
            "most": max((run.foreign for run in session.runs), default=0.0),
        },
        "notes": session.notes,
        "bars": results,
        "runs": [run.written() for run in session.runs],
    }
    path = _write(raw, whole=letters == LETTERS)
    versions = about["versions"]
    session.say(
        f"\n{table.table(results)}\n\non Python {versions['python']} ({versions['python build']}), {versions['store']}"
    )
    session.say(f"in {session.elapsed / 60:.1f} min; every run is in {path}")
    for line in (*(f"left out: {what}" for what in plan.left_out), *session.notes):
        session.say(line)
    if letters == LETTERS and not plan.quick:
        try:
            session.say(f"the report: {draw(path)}")
        except NotDrawn as exc:
            session.say(f"no report: {exc}")
    return 0


def _about(plan: Plan) -> dict[str, Any]:
    name, changed = machine.commit()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": name,
        "changed": changed,
        "quick": plan.quick,
        "left_out": list(plan.left_out),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "peer_versions": {},
        "systems": {name: {"title": title, "setting": setting} for name, (title, setting) in OURS.items()}
        | {each.name: {"title": each.title, "setting": each.setting} for each in peers.PEERS},
    }


def _write(raw: dict[str, Any], *, whole: bool) -> Path:
    """Write the raw file; and `latest.json`, the same without single runs, if every bar was measured."""
    RESULTS.mkdir(exist_ok=True)
    when = raw["when"][:19].replace(":", "").replace("T", "-")
    kind = "" if whole and not raw["quick"] else "-quick" if whole else "-part"
    path = RESULTS / f"{when}-{raw['commit']}{kind}.json"
    path.write_text(_json(raw))
    if whole:
        LATEST.write_text(_json({"raw": path.name} | {name: raw[name] for name in raw if name != "runs"}))
    return path


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the bars, and compare with peers.")
    parser.add_argument("--quick", action="store_true", help="about 5 minutes: fewer and shorter runs")
    parser.add_argument(
        "--bars", nargs="+", metavar="LETTER", default=list(LETTERS), choices=list(LETTERS), help=_LETTERS
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

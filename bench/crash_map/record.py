"""The results of a map: counted, kept in a file, and read again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.crash_map.cells import Result, Steps
from bench.crash_map.network import Step
from bench.crash_map.scenarios import Actor, Cell, Fault, Place, Servers
from bench.soak import installed


@dataclass(frozen=True)
class Map:
    """All that is drawn."""

    steps: Steps
    results: Mapping[Cell, Result]
    installed: str  # versions and machine
    lanes: int  # cells at a time, at most
    seconds: float

    @property
    def conditions(self) -> str:
        """For people to read."""
        return f"{self.installed}; up to {self.lanes} cells at a time, {self.seconds / 60:.0f} minutes"

    @classmethod
    def of(
        cls,
        steps: Steps,
        results: Iterable[Result],
        *,
        lanes: int,
        seconds: float,
    ) -> Self:
        """Of one run, which took so many seconds on so many lanes."""
        return cls(steps, {result.cell: result for result in results}, installed(), lanes, seconds)

    @property
    def breaches(self) -> list[Result]:
        """The cells that broke a promise."""
        return [result for result in self.results.values() if result.breaches]

    def counts(self) -> dict[str, int]:
        """How many cells showed what."""
        shown = [result for result in self.results.values() if not result.silent]
        mails = {f"{n} mails": sum(min(result.mails, 3) == n for result in shown) for n in range(4)}
        lost = sum("lost" in text for result in shown for text in result.breaches)
        return {
            "cells": len(self.results),
            **mails,
            "requests lost": lost,
            "broken promises": len(self.breaches),
            "not reached": len(self.results) - len(shown),
        }

    def summary(self) -> str:
        """For people to read."""
        lines = [f"{count:6} {what}" for what, count in self.counts().items()]
        return "\n".join([*lines, *map(str, self.breaches)])

    def write(self, path: Path) -> None:
        """Keep it."""
        data = {
            "installed": self.installed,
            "lanes": self.lanes,
            "seconds": self.seconds,
            "steps": [[_place(place), steps] for place, steps in self.steps.items()],
            "results": [
                [
                    _place(each.cell.place),
                    each.cell.step,
                    each.cell.fault and each.cell.fault.name,
                    *(each.mails, each.errors, each.breaches, each.silent),
                ]
                for each in self.results.values()
            ],
        }
        path.write_text(json.dumps(data, indent=0, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Self:
        """What `write` has written; of several, the parts of one map."""
        steps: Steps = {}
        results: dict[Cell, Result] = {}
        lanes, seconds = 0, 0.0
        for path in paths:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for words, found in data["steps"]:
                steps.setdefault(_read_place(words), [(Step(*step), name) for step, name in found])
            for place, step, fault, *rest in data["results"]:
                cell = Cell(_read_place(place), step and Step(*step), fault and Fault[fault])
                results[cell] = Result(cell, *rest)
            lanes, seconds = max(lanes, data["lanes"]), seconds + data["seconds"]
        return cls(steps, results, data["installed"], lanes, seconds)


def _place(place: Place) -> list[str]:
    return [place.servers.name, place.actor.name, place.scenario]


def _read_place(words: list[str]) -> Place:
    return Place(Servers[words[0]], Actor[words[1]], words[2])

"""What all three targets share: inputs by number, batches, and what must hold after each batch."""

from __future__ import annotations

import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.api_process import LOUD
from support.process import Process

BATCH: Final = 500  # inputs between two looks at the process
_AT_ONCE: Final = 8  # inputs
GROWTH: Final = 40.0  # MB that a process may grow after the first batch
_ADDRESS: Final = re.compile(r"[\w.]{2,}@[\w-]+\.\w")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not happen, and the input that made it happen; number -1: one of the batch before it."""

    kind: str
    seed: int
    number: int
    what: str
    data: bytes = b""

    def __str__(self) -> str:
        return f"{self.kind} input {self.number} of seed {self.seed}: {self.what}"


class Target(ABC):
    """One kind of input and the process that gets it."""

    kind: str

    def __init__(self, process: Process, seed: int) -> None:
        self.process, self.seed = process, seed
        self._read = 0  # bytes of the log
        self._first = 0.0  # MB after the first batch
        self.most = 0.0  # MB after any batch

    def make(self, number: int) -> bytes:
        """The input of this number; each has random numbers of its own, so that it can be made again alone."""
        return self.mutated(random.Random(f"{self.kind} {self.seed} {number}"))

    @abstractmethod
    def mutated(self, chance: random.Random) -> bytes:
        """A well-formed input that was broken."""

    @abstractmethod
    def send(self, inputs: Sequence[bytes]) -> Iterable[tuple[int, str]]:
        """Send a batch; what went wrong, by the place in the batch, -1 if that is not known."""

    @abstractmethod
    def honest(self) -> bool:
        """Whether an honest request is served."""

    def secrets(self) -> Iterable[str]:
        """What else must not be in a log: codes."""
        return ()

    def batch(self, numbers: range) -> list[Finding]:
        """Send the inputs with these numbers, then look at the process."""
        inputs = [self.make(number) for number in numbers]
        wrong = list(self.send(inputs))
        if not self.process.alive:
            wrong.append((-1, f"the process ended ({self.process.process.returncode})"))
        else:
            try:
                served = self.honest()
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is a finding
                wrong.append((-1, f"an honest request failed: {exc!r}"[:300]))
            else:
                wrong += [] if served else [(-1, "an honest request was not served")]
            wrong += [(-1, what) for what in self._logged()]
            self.most = max(self.most, memory := resident(self.process.pid))
            self._first = self._first or memory
            if memory > self._first + GROWTH:
                wrong.append((-1, f"the process grew from {self._first:.0f} to {memory:.0f} MB"))
        return [
            Finding(self.kind, self.seed, -1 if at < 0 else numbers[at], what, b"" if at < 0 else inputs[at])
            for at, what in wrong
        ]

    def _logged(self) -> list[str]:
        with self.process.log_path.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        self._read += len(new)
        text = new.decode(errors="replace")
        found = [f"in the log: {_around(text, sign)}" for sign in LOUD if sign in text]
        found += [f"an address in the log: {each}" for each in set(_ADDRESS.findall(text))]
        return found + ["a code in the log" for each in self.secrets() if each in text]


class SocketTarget(Target):
    """One whose inputs each have a connection, or a call, of their own; a few are sent at once."""

    def send(self, inputs: Sequence[bytes]) -> Iterable[tuple[int, str]]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for at, what in enumerate(pool.map(self._try, inputs)):
                if what:
                    yield at, what

    @abstractmethod
    def _try(self, data: bytes) -> str | None:
        """Send one input; what went wrong."""


def _around(text: str, sign: str) -> str:
    at = text.index(sign)
    return text[max(0, at - 300) : at + 2000]


def resident(pid: int) -> float:
    """The memory of a process in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text("ascii"))
    assert found
    return int(found[1]) / 1000


def fuzz(
    target: Target, *, count: int | None = None, seconds: float = 0.0, first: int = 0
) -> tuple[int, list[Finding]]:
    """Send `count` inputs, or as many as fit in `seconds`; how many, and the findings. A dead process ends it."""
    findings: list[Finding] = []
    end = time.monotonic() + seconds
    number = first
    while target.process.alive and (time.monotonic() < end if count is None else number < first + count):
        until = number + BATCH if count is None else min(number + BATCH, first + count)
        findings += target.batch(range(number, until))
        number = until
    return number - first, findings

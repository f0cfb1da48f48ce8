"""How much of the machine's CPU others use while something is measured. Linux only.

The machine's time is that of `/proc/stat`; ours is that of this process and of all that it started. What is left is
others': programs, the kernel's own threads, and what a hypervisor gives to other machines.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_USER, _NICE, _SYSTEM, _STEAL = 0, 1, 2, 7  # places in the line of /proc/stat; interrupts belong to nobody


class Moment(NamedTuple):
    """CPU seconds so far."""

    time: float  # monotonic
    machine: float
    ours: float


def moment() -> Moment:
    """How things stand now."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    machine = sum(int(fields[place]) for place in (_USER, _NICE, _SYSTEM, _STEAL)) / _TICKS
    return Moment(time.monotonic(), machine, _ours())


def share(before: Moment, after: Moment) -> float:
    """What others used meanwhile, as a share of all that the machine has: 0 to 1."""
    all_of_it = (after.time - before.time) * (os.cpu_count() or 1)
    others = (after.machine - before.machine) - (after.ours - before.ours)
    return min(1.0, max(0.0, others / all_of_it)) if all_of_it else 0.0


def _ours() -> float:
    """Of this process and its descendants, those that have ended included."""
    processes: dict[int, tuple[int, int]] = {}  # parent, ticks
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        processes[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    ours, latest = {os.getpid()}, {os.getpid()}
    while latest:
        latest = {pid for pid, (parent, _) in processes.items() if parent in latest} - ours
        ours |= latest
    return sum(processes[pid][1] for pid in ours if pid in processes) / _TICKS

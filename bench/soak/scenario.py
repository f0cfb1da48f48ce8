"""The faults of `make picture`: each long enough to be seen, with calm between them."""

from __future__ import annotations

from typing import Final

from bench.soak.faults import WORKERS, PlannedFault

SECONDS: Final = 560.0  # all of them, and calm at the end
# Begin in seconds, fault, target, duration in seconds. The longer ones outlast the `for` of their alert.
_FAULTS: Final = (
    (25, "worker: kill -9", "worker 1", 10),
    (60, "relay: down", "relay 0", 25),
    (115, "relay: down", "relays 0 and 1", 75),
    (225, "Redis: kill -9", "Redis", 40),
    *((305, "worker: kill -9", f"worker {i}", 40) for i in range(WORKERS)),
    (390, "relay: 451 at RCPT", "relays 0 and 1", 20),
    (440, "relay: silent", "relay 0", 20),
    (485, "malformed messages", "queue", 0),
    (505, "Redis: SIGSTOP", "Redis", 8),
)


def long_faults() -> list[PlannedFault]:
    """The faults, the same every time."""
    return [PlannedFault(at, kind, where, seconds, number) for number, (at, kind, where, seconds) in enumerate(_FAULTS)]

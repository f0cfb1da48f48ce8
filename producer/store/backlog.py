"""Where requests stand in the broker database, as far as a producer looks: how many wait, who serves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from producer.contract import DEAD_LETTERS
from producer.redis.scripts import Command, Script

_LUA = Path(__file__).parent
_PUSH, _BACKLOG = (Script(_LUA / f"{name}.lua") for name in ("push", "backlog"))

# What the worker keeps beside the queue, named after it.
PARKED: Final = ".parked"  # a hash: requests that wait for another's send, or for their next try
SUSPECTS: Final = ".suspects"  # a list: requests whose worker died twice
WORKERS: Final = ".workers"  # a zset: workers by the time of their last sign of life, which each gives every second
UNHEALTHY_WORKERS: Final = ".unhealthy_workers"  # a zset: the same, of workers none of whose relays is healthy
SILENCE: Final = 5.0  # seconds after which a worker without a sign of life counts as gone


class Backlog(NamedTuple):
    """How the queue stands."""

    queued: int
    parked: int
    suspects: int
    dead: int  # dead letters
    workers: int  # that are alive
    oldest: float | None  # seconds since the oldest request was made, of those that say it; None if none does
    unhealthy_workers: int = 0  # of `workers`, those without a healthy relay; an older worker counts as healthy


def backlog(queue: str) -> Command:
    """Ask how the queue stands; read with `read_depth`."""
    workers = (queue + WORKERS, queue + UNHEALTHY_WORKERS)
    return _BACKLOG([queue, queue + PARKED, queue + SUSPECTS, DEAD_LETTERS, *workers], [SILENCE])


def read_backlog(answer: Sequence[Any]) -> Backlog:
    """What `depth` answered."""
    queued, parked, suspects, dead, workers, oldest, unhealthy = answer
    return Backlog(queued, parked, suspects, dead, workers, None if oldest < 0 else oldest / 1000, unhealthy)


def push(queue: str, messages: Sequence[bytes], *, limit: int | None) -> Command:
    """Put messages on the queue; answers how many, the first ones, have room: none once more than `limit` wait."""
    if limit is None:
        return ("LPUSH", queue, *messages)
    return _PUSH([queue, queue + PARKED, queue + SUSPECTS], [limit, *messages])

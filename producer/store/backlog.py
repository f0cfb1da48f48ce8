"""The queue as producers see it: how many requests wait and how many workers are alive. Also `push`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from producer.contract import DEAD_LETTERS, LARGEST_MESSAGE
from producer.redis.scripts import Command, Script

_LUA = Path(__file__).parent
_PUSH, _BACKLOG = (Script(_LUA / f"{name}.lua") for name in ("push", "backlog"))

# Suffixes of the keys that workers keep beside the queue.
DELAYED: Final = ".parked"  # a hash: requests that wait for another request's send, or for a retry
SUSPECTS: Final = ".suspects"  # a list: messages that have killed two workers
WORKERS: Final = ".workers"  # a zset: each worker by the time of its last sign of life, given every second
UNHEALTHY_WORKERS: Final = ".unhealthy_workers"  # a zset: likewise, the workers that have no healthy relay
SILENCE: Final = 5.0  # seconds after which a worker without a sign of life counts as gone


class Backlog(NamedTuple):
    """How many requests wait, and for whom."""

    queued: int
    delayed: int
    suspects: int
    dead: int  # dead letters
    workers: int  # that are alive
    oldest: float | None  # age of the oldest queued request in seconds; None: no message says when it was enqueued
    unhealthy_workers: int = 0  # of `workers`, those without a healthy relay; an older worker counts as healthy


def backlog(queue: str) -> Command:
    """Ask for the backlog; read the answer with `read_backlog`."""
    workers = (queue + WORKERS, queue + UNHEALTHY_WORKERS)
    return _BACKLOG([queue, queue + DELAYED, queue + SUSPECTS, DEAD_LETTERS, *workers], [SILENCE, LARGEST_MESSAGE])


def read_backlog(answer: Sequence[Any]) -> Backlog:
    """Read the answer to `backlog`."""
    queued, delayed, suspects, dead, workers, oldest, unhealthy = answer
    return Backlog(queued, delayed, suspects, dead, workers, None if oldest < 0 else oldest / 1000, unhealthy)


def push(queue: str, messages: Sequence[bytes], *, limit: int | None) -> Command:
    """Put messages on the queue until more than `limit` requests wait. Answers how many were put, first ones first."""
    if limit is None:
        return ("LPUSH", queue, *messages)
    return _PUSH([queue, queue + DELAYED, queue + SUSPECTS], [limit, *messages])

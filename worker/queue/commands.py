"""The worker's commands on the queue, and how to read their answers. No I/O.

A message is always in exactly one place: the queue, `unacked` (with its index), delayed, among the suspected poison
messages, or among the dead letters. Only Lua moves it, so neither a crash nor a lost connection can lose it between two
places. `unacked` keeps kombu's layout, so that kombu's tools can read it.
"""

from __future__ import annotations

import itertools
import uuid
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from producer.contract import DEAD_LETTERS, LARGEST_MESSAGE, REPLY_TTL, TASK
from producer.redis.scripts import Command, Script
from producer.store.backlog import DELAYED, SUSPECTS, UNHEALTHY_WORKERS, WORKERS
from worker.queue.message import POISON_DEATHS, SUSPECT_DEATHS, DeadLetterCode, DeadLetterReason, Reserved

_LUA = Path(__file__).parent
_UNACKED, _DELAYED = _LUA / "unacked.lua", _LUA / "delayed.lua"
_ACK = Script(_LUA / "ack.lua")
_RESERVE, _WAKE = (Script(_DELAYED, _LUA / f"{name}.lua") for name in ("reserve", "wake"))
_DEAD_LETTER, _RELEASE = (Script(_UNACKED, _LUA / f"{name}.lua") for name in ("dead_letter", "release"))
_MAINTAIN, _DELAY, _SCHEDULE = (
    Script(_UNACKED, _DELAYED, _LUA / f"{name}.lua") for name in ("maintain", "delay", "schedule")
)

UNACKED: Final = "unacked"  # kombu's name, as is the next
INDEX: Final = "unacked_index"
# kombu's lists for lower priorities, beside the queue; the higher the number, the lower the priority.
PRIORITY_SEPARATOR: Final = "\x06\x16"
PRIORITY_STEPS: Final = (3, 6, 9)
# Suffixes of two zsets beside the queue: delayed requests by the time at which they are due, and those that are due.
DUE: Final = ".parked.due"
READY: Final = ".parked.ready"
MAX_MOVES: Final = 1000  # messages that one call may move; the rest waits for the next call
TICK: Final = 1.0  # seconds between two rounds of maintenance, at most; several must fit into the visibility timeout
# Beside the queue: the list through which a message reaches the one worker that wakes for it; who waits on the queue;
# and the list on which the other workers wait.
HANDOVER: Final = ".handover"
WAITER: Final = ".waiter"
TURN: Final = ".turn"
BLOCK_TIME: Final = 0.5  # seconds of one wait on the queue; less than the connection's timeout for an answer
LOOK_EVERY: Final = 0.25  # seconds in which the other workers look at the queue, as the one that waits may be dead
WAITER_LIFE: Final = 3 * BLOCK_TIME  # seconds after which a worker that waited on the queue counts as gone
WOKEN_TTL: Final = 5000  # ms; a request woken before it is delayed finds the note within one round trip
DEAD_AGE: Final = 7 * 86_400  # seconds that a dead letter is kept
DEAD_KEPT: Final = 10_000  # dead letters that are kept, at most


class Waiter(IntEnum):
    """Who waits on the queue."""

    NONE = -1
    OTHER = 0
    SELF = 1


NOTHING_TAKEN: Final = 3  # elements of `reserve`'s answer beside the messages


class Reservation(NamedTuple):
    """What `reserve` took."""

    taken: list[Reserved]
    suspects: int  # suspected poison messages that still wait
    alone: bool  # the only message in `taken` is a suspect: nothing else may run beside it
    waiter: Waiter


class MaintenanceResult(NamedTuple):
    ready: int  # delayed requests that are due
    suspects: int
    restored: int  # messages of dead workers
    dead_too_old: int  # dead letters that this call has removed
    dead_too_many: int  # likewise
    left: int  # entries that another release wrote and this one cannot read: they are left to its workers
    refusal: str  # the first word of the error with which the server refuses what needs memory, else ""
    poison: list[Reserved]  # reserved by this call: each must be answered and dead-lettered


class RequestQueue:
    """Builds the commands of one worker process on one queue."""

    def __init__(self, name: str, *, visibility_timeout: float) -> None:
        self.name = name
        self.tick = min(TICK, visibility_timeout / 4)
        self._visibility_timeout = visibility_timeout
        self._owner = uuid.uuid4().hex
        self._calls = itertools.count()
        self._due, self._ready = name + DUE, name + READY
        self._delayed, self._suspects = name + DELAYED, name + SUSPECTS
        self._woken, self._deaths = f"{name}.woken:", f"{name}.deaths:"
        self._handover, self._waiter, self._turn = name + HANDOVER, name + WAITER, name + TURN

    def _prefix(self) -> str:
        return f"{self._owner}.{next(self._calls)}."

    def reserve(self, count: int, *, held: int, worth_waiting_for: int = 1) -> Command:
        """Take up to `count` messages; 0: this worker waits no longer. Read the answer with `read_reserve`.

        `held`: how many this worker holds. If it wants so many more that they are worth waiting for, it may become the
        one that waits on the queue; otherwise it leaves that to others.
        """
        keys = [self.name, self._ready, self._delayed, self._suspects, UNACKED, INDEX, self._due]
        keys += [self._waiter, self._turn, self._handover]
        keys += [f"{self.name}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS]
        life = round(WAITER_LIFE * 1000)
        return _RESERVE(
            keys, [count, self._prefix(), self.name, held, LARGEST_MESSAGE, TASK, self._owner, life, worth_waiting_for]
        )

    @staticmethod
    def tags_of(reserve: Command) -> list[str]:
        """Every tag that this `reserve` command may have made: if its answer is lost, they can still be released."""
        count, prefix = reserve[3 + int(reserve[2]) :][:2]
        return [f"{prefix!s}{2 * i + NOTHING_TAKEN}" for i in range(int(count))]

    @staticmethod
    def read_reserve(answer: list[Any]) -> Reservation:
        return Reservation(_pairs(answer[NOTHING_TAKEN:]), answer[0], answer[1] == 1, Waiter(answer[2]))

    def await_message(self) -> Command:
        """Block until the queue has a message, at most for BLOCK_TIME; only the worker that waits on the queue does.

        It moves to where the next `reserve` finds it first, whichever worker's that is. Run it muted: the answer is the
        message, however long that is.
        """
        return ("BLMOVE", self.name, self._handover, "RIGHT", "LEFT", BLOCK_TIME)

    def await_turn(self) -> Command:
        """Block until the worker that waits on the queue leaves that to another, at most for LOOK_EVERY."""
        return ("BLPOP", self._turn, LOOK_EVERY)

    def maintain(
        self, tags: list[str], *, restore: bool, relay_healthy: bool, redis_time: float | None = None
    ) -> Command:
        """Give a sign of life, renew what is held, restore what dead workers held and what is due.

        `relay_healthy`: whether this worker has a healthy relay; `redis_time`: Redis' time as far as it knows, Unix
        seconds. Read the answer with `read_maintain`.
        """
        keys = [INDEX, UNACKED, self.name, self._suspects, self._due, self._ready, self._delayed]
        keys += [self.name + WORKERS, self.name + UNHEALTHY_WORKERS, DEAD_LETTERS]
        visibility = self._visibility_timeout if restore else 0
        arguments = [visibility, MAX_MOVES, self._prefix(), self._deaths, REPLY_TTL, SUSPECT_DEATHS, POISON_DEATHS]
        bounds = (LARGEST_MESSAGE, DEAD_AGE, DEAD_KEPT)
        expected = "" if redis_time is None else redis_time
        return _MAINTAIN(keys, [*arguments, self._owner, int(relay_healthy), *bounds, expected, *tags])

    @staticmethod
    def read_maintain(answer: list[Any]) -> MaintenanceResult:
        ready, suspects, restored, too_old, too_many, left, refusal, *poison = answer
        return MaintenanceResult(ready, suspects, restored, too_old, too_many, left, refusal.decode(), _pairs(poison))

    @staticmethod
    def ack(tags: list[str]) -> Command:
        """Remove these messages: they are done."""
        return _ACK([UNACKED, INDEX], tags)

    def delay_request(self, tag: str, request_id: str, delay: float, enqueued_at: float | None) -> Command:
        """Hold a request back for `delay` seconds, or until it is woken. `enqueued_at`: Unix seconds."""
        keys = [UNACKED, INDEX, self._due, self._delayed, self.name, self._woken + request_id]
        born = "" if enqueued_at is None else round(enqueued_at * 1000)
        return _DELAY(keys, [tag, request_id, round(delay * 1000), born])

    def schedule(self, due: list[tuple[str, float]]) -> Command:
        """Hold each (tag, Unix seconds) back until its time. Answers 0 for each that is due now, else 1."""
        keys = [UNACKED, INDEX, self._due, self._delayed]
        return _SCHEDULE(keys, [part for tag, at in due for part in (tag, round(at * 1000))])

    def wake(self, request_ids: list[str]) -> Command:
        """Put these delayed requests back on the queue, to be served next."""
        return _WAKE([self._due, self._ready, self._delayed, self.name], [self._woken, WOKEN_TTL, *request_ids])

    @staticmethod
    def dead_letter(tag: str, reason: DeadLetterReason) -> Command:
        return _DEAD_LETTER([UNACKED, INDEX, DEAD_LETTERS], [tag, *reason, DeadLetterCode.TOO_LARGE])

    def release(self, tags: list[str]) -> Command:
        """Put these messages back on the queue, to be served next."""
        return _RELEASE([UNACKED, INDEX, self.name], tags)


def _pairs(flat: list[Any]) -> list[Reserved]:
    return [Reserved(tag.decode(), message) for tag, message in zip(flat[::2], flat[1::2], strict=True)]

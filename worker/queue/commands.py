"""The queue as the worker sees it: commands on the broker database, and their answers. No I/O.

At every instant a message stands in exactly one place: the queue, `unacked` (with its index), parked, or the dead
letters. kombu's own layout is kept for `unacked`, so that its tools can read it; everything moves by Lua, so that no
crash and no cut connection can lose a message between two places.
"""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from producer.contract import DEAD_LETTERS, REPLY_TTL, TASK
from producer.redis.scripts import Command, Script
from producer.store.backlog import PARKED, SUSPECTS, UNHEALTHY_WORKERS, WORKERS

_LUA = Path(__file__).parent
_RESERVE, _MAINTAIN, _ACK, _DELAY, _WAKE, _DEAD_LETTER, _RELEASE = (
    Script(_LUA / f"{name}.lua") for name in ("reserve", "maintain", "ack", "delay", "wake", "dead_letter", "release")
)

UNACKED, INDEX = "unacked", "unacked_index"  # kombu's names
PRIORITY_SEPARATOR, PRIORITY_STEPS = "\x06\x16", (3, 6, 9)  # kombu's: lists beside the queue, the later the lower
DEADLY = 4  # a message that killed so many workers is not tried again
MOVES = 1000  # messages that one call may move; what is left waits for the next second
TICK = 1.0  # seconds between two calls of `tend`, at most; several must fit into the visibility timeout
NOTE_LIFE = 5000  # ms that the note for a request about to be parked lasts: longer than any round trip may take


class Reserved(NamedTuple):
    """A message that this worker holds. The tag is new with each reservation, so only its holder can settle it."""

    tag: str
    message: bytes


class Reservation(NamedTuple):
    """What `reserve` took, and how many suspects (messages whose worker died twice) wait."""

    taken: list[Reserved]
    suspects: int
    alone: bool  # the one message taken is a suspect: nothing else may run beside it
    dead_lettered: list[str]  # the reasons of those that were unfit


class MaintenanceResult(NamedTuple):
    """What a second's tending found."""

    ready: int
    suspects: int
    restored: int
    killers: list[Reserved]


class RequestQueue:
    """Builds the commands of one worker process for one queue."""

    def __init__(self, name: str, *, visibility_timeout: float) -> None:
        self.name = name
        self.tick = min(TICK, visibility_timeout / 4)
        self._visibility_timeout = visibility_timeout
        self._owner = uuid.uuid4().hex
        self._calls = itertools.count()
        self._due, self._ready = f"{name}.parked.due", f"{name}.parked.ready"
        self._parked, self._suspects = name + PARKED, name + SUSPECTS
        self._woken, self._deaths = f"{name}.woken:", f"{name}.deaths:"

    def _prefix(self) -> str:
        return f"{self._owner}.{next(self._calls)}."

    def reserve(self, count: int, *, held: int) -> Command:
        """Take up to `count` messages; read with `read_reserve`. `held`: how many this worker holds already."""
        keys = [self.name, self._ready, self._parked, self._suspects, UNACKED, INDEX, DEAD_LETTERS]
        keys += [f"{self.name}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS]
        return _RESERVE(keys, [count, self._prefix(), TASK, self.name, held])

    @staticmethod
    def tags_of(reserve: Command) -> list[str]:
        """Every tag that this `reserve` can have given: if its answer was lost, what it took can be put back."""
        count, prefix = reserve[3 + int(reserve[2]) :][:2]
        return [f"{prefix!s}{2 * i + 2}" for i in range(int(count))]

    @staticmethod
    def read_reserve(answer: list[Any]) -> Reservation:
        """What `reserve` answered."""
        pairs = _pairs(answer[2:])
        dead_lettered = [reason.decode() for tag, reason in pairs if not tag]
        return Reservation([pair for pair in pairs if pair.tag], answer[0], answer[1] == 1, dead_lettered)

    def await_message(self, seconds: float) -> Command:
        """Block until the queue has a message, and leave it there: from its end to its end."""
        return ("BLMOVE", self.name, self.name, "RIGHT", "RIGHT", seconds)

    def maintain(self, tags: list[str], *, restore: bool, relay_healthy: bool) -> Command:
        """Give a sign of life, renew what is held, restore what dead workers held and what is due.

        `relay_healthy`: whether this worker has a healthy relay. Read the answer with `read_maintain`.
        """
        keys = [INDEX, UNACKED, self.name, self._suspects, self._due, self._ready, self._parked]
        keys += [self.name + WORKERS, self.name + UNHEALTHY_WORKERS]
        visibility = self._visibility_timeout if restore else 0
        arguments = [visibility, MOVES, self._prefix(), self._deaths, REPLY_TTL, DEADLY, self._owner]
        return _MAINTAIN(keys, [*arguments, int(relay_healthy), *tags])

    @staticmethod
    def read_maintain(answer: list[Any]) -> MaintenanceResult:
        """What `tend` answered."""
        return MaintenanceResult(answer[0], answer[1], answer[2], _pairs(answer[3:]))

    @staticmethod
    def ack(tags: list[str]) -> Command:
        """These messages are done. Answers 0."""
        return _ACK([UNACKED, INDEX], ["", "", len(tags), *tags])

    @staticmethod
    def ack_if_stored(tags: list[str], replies: list[str], *, broker: int, results: int) -> Command:
        """These messages are done, each if its reply is stored under its key. Answers how many stay.

        `broker`, `results`: the numbers of two databases of one server.
        """
        return _ACK([UNACKED, INDEX], [broker, results, len(tags), *tags, *replies])

    def delay_request(self, tag: str, request_id: str, delay: float, enqueued_at: float | None) -> Command:
        """The request waits for `delay` seconds, or until it is woken."""
        keys = [UNACKED, INDEX, self._due, self._parked, self.name, self._woken + request_id]
        born = "" if enqueued_at is None else round(enqueued_at * 1000)
        return _DELAY(keys, [tag, request_id, round(delay * 1000), born])

    def wake(self, request_ids: list[str]) -> Command:
        """These requests need not wait any longer."""
        return _WAKE([self._due, self._ready, self._parked, self.name], [self._woken, NOTE_LIFE, *request_ids])

    @staticmethod
    def dead_letter(tag: str, reason: str) -> Command:
        """The message becomes a dead letter."""
        return _DEAD_LETTER([UNACKED, INDEX, DEAD_LETTERS], [tag, reason])

    def release(self, tags: list[str]) -> Command:
        """Put these messages back, to be served next."""
        return _RELEASE([UNACKED, INDEX, self.name], tags)


def _pairs(flat: list[Any]) -> list[Reserved]:
    return [Reserved(tag.decode(), message) for tag, message in zip(flat[::2], flat[1::2], strict=True)]

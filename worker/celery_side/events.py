"""What becomes of requests, as Celery's task events: what `celery events` and Flower read.

Celery's own dispatcher costs a third of a request, an event at a time. Here the events of many requests are built on
the service's loop and leave as one `task.multi`, in the form that kombu gives to its Redis transport's fanout exchange.
What Celery's dispatcher knows (who we are, whether anybody wants events, the logical clock) is asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from base64 import b64encode
from collections.abc import Iterable
from typing import Any, Protocol

import orjson

from producer.contract import TASK, ErrorCode
from producer.errors import RedisUnavailable
from producer.logs import mask_email, mask_text
from producer.redis.scripts import Command
from worker.databases import Database
from worker.job import Job

LATE = 0.05  # seconds that an event may wait for others: no monitor minds, and a lone request does not pay for them
AT_ONCE = 300  # events that leave without waiting; more at once would hold up the loop for longer than 0.1 ms
FAREWELL = 0.5  # seconds that the last events may take
_GROUP, _ROUTING_KEY = "task", "task.multi"


class Clock(Protocol):
    """Celery's logical clock."""

    mutex: Any
    value: int


class Exchange(Protocol):
    """Where events go."""

    name: str


class Dispatcher(Protocol):
    """What is asked of Celery's event dispatcher. Remote control changes it at any time, on its own thread."""

    enabled: bool
    groups: set[str]  # empty: all
    hostname: str
    pid: int
    clock: Clock
    exchange: Exchange
    delivery_mode: int


class Events:
    """Collects events and publishes them, many at a time. While Redis is away they are dropped.

    Belongs to the service's loop, but for `attach`.
    """

    def __init__(self, broker: Database) -> None:
        self._broker = broker
        self._dispatcher: Dispatcher | None = None
        self._collected: list[dict[str, Any]] = []
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, dispatcher: Dispatcher | None) -> None:
        """Ask this dispatcher from now on; Celery makes a new one at each reconnect. Call it on any thread."""
        self._dispatcher = dispatcher

    def received(self, jobs: list[Job]) -> None:
        """These requests were taken, and are served at once. An id is the caller's choice, and may be an address."""
        dispatcher = self._wanted()
        if dispatcher is None:
            return
        common = _common(dispatcher)
        clock = _forward(dispatcher.clock, 2 * len(jobs))
        events: list[dict[str, Any]] = []
        for job in jobs:
            uid = mask_text(job.request_id)
            events += (
                {
                    **common,
                    "clock": clock,
                    "type": "task-received",
                    "uuid": uid,
                    "root_id": uid,
                    "name": TASK,
                    "args": "()",
                    "kwargs": f"{{'email': {mask_email(job.request.email)!r}}}",
                    "retries": 0,
                },
                {**common, "clock": clock + 1, "type": "task-started", "uuid": uid},
            )
            clock += 2
        self._collect(events)

    def done(self, finished: Iterable[tuple[Job, ErrorCode | None]]) -> None:
        """These requests left; None: without an answer."""
        dispatcher = self._wanted()
        if dispatcher is None:
            return
        # What could not be read has no id, and never was a task.
        tasks = [(job, error) for job, error in finished if job.request_id]
        common = _common(dispatcher)
        clock = _forward(dispatcher.clock, len(tasks))
        now = asyncio.get_running_loop().time()
        events: list[dict[str, Any]] = []
        for job, error in tasks:
            event = {**common, "clock": clock, "uuid": mask_text(job.request_id)}
            clock += 1
            if error is not None:
                event["type"] = "task-succeeded"
                event["result"] = shown(job.request.email, error)
                event["runtime"] = now - job.began
            else:
                # Celery's own order of states keeps a SUCCESS of the same id before a rejection.
                event["type"] = "task-rejected" if job.dead_lettered else "task-retried"
                event["exception"] = "not yet answered"
            events.append(event)
        self._collect(events)

    def flush(self) -> None:
        """Publish what is collected, now."""
        # What cannot be written is dropped: no event is worth a request.
        with contextlib.suppress(RedisUnavailable, orjson.JSONEncodeError):
            command = self._publication()
            if command is not None:
                self._broker.connection.post([command], database=self._broker.number)

    async def close(self) -> None:
        """Publish what is left, and see it through."""
        with contextlib.suppress(RedisUnavailable, orjson.JSONEncodeError, TimeoutError):
            command = self._publication()
            if command is not None:
                async with asyncio.timeout(FAREWELL):
                    await self._broker.run([command])

    def _publication(self) -> Command | None:
        """The command that publishes what is collected, which is no more then; None: there is nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._collected = self._collected, []
        dispatcher = self._dispatcher
        if not events or dispatcher is None:
            return None
        exchange = dispatcher.exchange.name
        # kombu's topic: with the database's number in it, though to Redis a channel is the same in all.
        channel = f"/{self._broker.number}.{exchange}/{_ROUTING_KEY}"
        message = {
            "body": b64encode(orjson.dumps(events)).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"hostname": dispatcher.hostname},
            "properties": {
                "delivery_mode": dispatcher.delivery_mode,
                "delivery_info": {"exchange": exchange, "routing_key": _ROUTING_KEY},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
        return ("PUBLISH", channel, orjson.dumps(message))

    def _wanted(self) -> Dispatcher | None:
        """The dispatcher, if task events are to be sent now."""
        dispatcher = self._dispatcher
        if dispatcher is None or not dispatcher.enabled or (dispatcher.groups and _GROUP not in dispatcher.groups):
            return None
        return dispatcher

    def _collect(self, events: list[dict[str, Any]]) -> None:
        self._collected += events
        if len(self._collected) >= AT_ONCE:
            self.flush()
        elif self._timer is None and events:
            self._timer = asyncio.get_running_loop().call_later(LATE, self.flush)


def _common(dispatcher: Dispatcher) -> dict[str, Any]:
    """What all events of one moment share. Celery gives the offset to UTC in hours, positive in the west."""
    now = time.time()
    offset = -time.localtime(now).tm_gmtoff / 3600
    return {"hostname": dispatcher.hostname, "utcoffset": offset, "pid": dispatcher.pid, "timestamp": now}


def _forward(clock: Clock, steps: int) -> int:
    """`LamportClock.forward`, so many steps at once: the first one's stamp."""
    with clock.mutex:
        first = clock.value + 1
        clock.value += steps
    return first


def shown(email: object, error: ErrorCode) -> str:
    """A reply as Flower, events and logs may show it."""
    return f"{{'email': {mask_email(email)!r}, 'error': {int(error)}}}"

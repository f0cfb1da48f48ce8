"""Celery's task events, which `celery events` and Flower read.

Celery's own dispatcher publishes one event at a time, at a third of a request's cost. Here the events of many requests
are built on the service's loop and published as one `task.multi` message, in the form of kombu's Redis fanout exchange.
Celery's dispatcher still decides: the node's name, whether events are enabled, the logical clock.
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

MAX_DELAY = 0.05  # seconds that an event may wait for others, off the path of its request
FLUSH_AT = 300  # events that are published at once; to build more would hold up the loop for over 0.1 ms
FAREWELL = 0.5  # seconds to publish the last events
_GROUP, _ROUTING_KEY = "task", "task.multi"


class Clock(Protocol):
    """Celery's logical clock."""

    mutex: Any
    value: int


class Exchange(Protocol):
    """The exchange that events are published to."""

    name: str


class Dispatcher(Protocol):
    """What we read from Celery's event dispatcher; remote control may change it at any time, on Celery's thread."""

    enabled: bool
    groups: set[str]  # empty: all
    hostname: str
    pid: int
    clock: Clock
    exchange: Exchange
    delivery_mode: int


class Events:
    """Collects events and publishes them many at a time; drops them while Redis is away.

    Used on the service's loop only, except for `attach`.
    """

    def __init__(self, broker: Database) -> None:
        self._broker = broker
        self._dispatcher: Dispatcher | None = None
        self._collected: list[dict[str, Any]] = []
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, dispatcher: Dispatcher | None) -> None:
        """Use this dispatcher from now on; Celery makes a new one at each reconnect. May be called on any thread."""
        self._dispatcher = dispatcher

    def received(self, jobs: list[Job]) -> None:
        """Requests were taken and are served at once. Ids are masked: a caller may use an address as one."""
        dispatcher = self._enabled()
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
        """Requests were settled; None: without a reply."""
        dispatcher = self._enabled()
        if dispatcher is None:
            return
        # An unreadable message has no id: it never was a task.
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
                # Where an id had a SUCCESS before, monitors keep it: Celery ranks states.
                event["type"] = "task-rejected" if job.dead_lettered else "task-retried"
                event["exception"] = "not yet answered"
            events.append(event)
        self._collect(events)

    def flush(self) -> None:
        """Publish now what was collected."""
        # Dropped if it cannot be written: no request may fail because of an event.
        with contextlib.suppress(RedisUnavailable, orjson.JSONEncodeError):
            command = self._publication()
            if command is not None:
                self._broker.connection.post([command], database=self._broker.number)

    async def close(self) -> None:
        """Publish what is left, and wait for it."""
        with contextlib.suppress(RedisUnavailable, orjson.JSONEncodeError, TimeoutError):
            command = self._publication()
            if command is not None:
                async with asyncio.timeout(FAREWELL):
                    await self._broker.run([command])

    def _publication(self) -> Command | None:
        """Take what was collected, as the command that publishes it. None: there is nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._collected = self._collected, []
        dispatcher = self._dispatcher
        if not events or dispatcher is None:
            return None
        exchange = dispatcher.exchange.name
        # kombu puts the database's number into the channel, though Redis' channels belong to no database.
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

    def _enabled(self) -> Dispatcher | None:
        """The dispatcher, if task events are enabled now."""
        dispatcher = self._dispatcher
        if dispatcher is None or not dispatcher.enabled or (dispatcher.groups and _GROUP not in dispatcher.groups):
            return None
        return dispatcher

    def _collect(self, events: list[dict[str, Any]]) -> None:
        self._collected += events
        if len(self._collected) >= FLUSH_AT:
            self.flush()
        elif self._timer is None and events:
            self._timer = asyncio.get_running_loop().call_later(MAX_DELAY, self.flush)


def _common(dispatcher: Dispatcher) -> dict[str, Any]:
    """The fields that events of one moment share. `utcoffset` is Celery's: hours, positive in the west."""
    now = time.time()
    offset = -time.localtime(now).tm_gmtoff / 3600
    return {"hostname": dispatcher.hostname, "utcoffset": offset, "pid": dispatcher.pid, "timestamp": now}


def _forward(clock: Clock, steps: int) -> int:
    """As `LamportClock.forward`, several steps at once. Returns the first stamp."""
    with clock.mutex:
        first = clock.value + 1
        clock.value += steps
    return first


def shown(email: object, error: ErrorCode) -> str:
    """A reply as Flower, events and logs show it: masked."""
    return f"{{'email': {mask_email(email)!r}, 'error': {int(error)}}}"

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
from typing import Any

import orjson
from celery.app import events as celery_events
from celery.events.dispatcher import EventDispatcher

from producer.contract import TASK, ErrorCode
from producer.errors import RedisUnavailable
from producer.masking import mask_email, mask_text
from producer.redis.scripts import Command
from worker.databases import Database
from worker.job import Job

MAX_DELAY = 0.05  # seconds that an event may wait for others, off the path of its request
FLUSH_AT = 300  # events that are published at once; to build more would hold up the loop for over 0.1 ms
FAREWELL = 0.5  # seconds to publish the last events
_ROUTING_KEY = "task.multi"
_RECEIVED = f'"type":"task-received","name":"{TASK}","args":"()","retries":0'


class Events:
    """Collects events and publishes them many at a time; drops them while Redis is unreachable.

    Used on the service's loop only, except for `attach`.
    """

    def __init__(self, broker: Database) -> None:
        self._broker = broker
        self._dispatcher: Any = None  # remote control may change it at any time, on Celery's thread
        self._collected: list[str] = []  # events in JSON
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, dispatcher: Any) -> None:
        """Use this `EventDispatcher` from now on; Celery makes a new one at each reconnect. Called on any thread."""
        self._dispatcher = dispatcher

    def received(self, jobs: list[Job]) -> None:
        """Requests were taken and are served at once. Ids are masked: a caller may use an address as one."""
        if (dispatcher := self._enabled()) is None:
            return
        events = []
        for job in jobs:
            uid = _json(mask_text(job.request_id))
            kwargs = _json(f"{{'email': {mask_email(job.request.email)!r}}}")
            events.append(f'{_RECEIVED},"uuid":{uid},"root_id":{uid},"kwargs":{kwargs}')
            events.append(f'"type":"task-started","uuid":{uid}')
        self._collect(dispatcher, events)

    def done(self, finished: Iterable[tuple[Job, ErrorCode | None]]) -> None:
        """Requests were settled; None: without a reply."""
        if (dispatcher := self._enabled()) is None:
            return
        now = asyncio.get_running_loop().time()
        events = []
        for job, error in finished:
            if not job.request_id:  # an unreadable message: it never was a task
                continue
            uid = _json(mask_text(job.request_id))
            if error is not None:
                result, runtime = _json(shown(job.request.email, error)), now - job.began
                events.append(f'"type":"task-succeeded","uuid":{uid},"result":{result},"runtime":{runtime:.6f}')
            else:
                # Where an id had a SUCCESS before, monitors keep it: Celery ranks states.
                kind = "task-rejected" if job.dead_lettered else "task-retried"
                events.append(f'"type":"{kind}","uuid":{uid},"exception":"not yet answered"')
        self._collect(dispatcher, events)

    def flush(self) -> None:
        # Dropped if it cannot be written: no request may fail because of an event.
        with contextlib.suppress(RedisUnavailable):
            command = self._publication()
            if command is not None:
                self._broker.connection.post([command], database=self._broker.number)

    async def close(self) -> None:
        """Publish what is left, and wait for it."""
        with contextlib.suppress(RedisUnavailable, TimeoutError):
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
            "body": b64encode(f"[{','.join(events)}]".encode()).decode(),
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

    def _enabled(self) -> Any:
        """The dispatcher, if task events are enabled now; else None."""
        dispatcher = self._dispatcher
        if dispatcher is None or not dispatcher.enabled or (dispatcher.groups and "task" not in dispatcher.groups):
            return None
        return dispatcher

    def _collect(self, dispatcher: Any, events: list[str]) -> None:
        """Complete and keep these events: each the fields of a JSON object."""
        with dispatcher.clock.mutex:  # as `LamportClock.forward`, several steps at once
            first = dispatcher.clock.value + 1
            dispatcher.clock.value += len(events)
        now = time.time()
        offset = -time.localtime(now).tm_gmtoff / 3600  # Celery's: hours, positive in the west
        common = _json({"hostname": dispatcher.hostname, "utcoffset": offset, "pid": dispatcher.pid, "timestamp": now})
        before_clock = common[1:-1] + ',"clock":'
        self._collected += [f"{{{event},{before_clock}{clock}}}" for clock, event in enumerate(events, first)]
        if len(self._collected) >= FLUSH_AT:
            self.flush()
        elif self._timer is None and events:
            self._timer = asyncio.get_running_loop().call_later(MAX_DELAY, self.flush)


class Dispatcher(EventDispatcher):  # type: ignore[misc]  # Celery ships no types
    """Celery's, for its own events and those of the requests that it runs; shows no address whole."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As Celery's, but drops an event that cannot be published, as we do: Celery keeps any number of them."""
        super().__init__(*args, **{**options, "buffer_while_offline": False})

    def _publish(self, *args: Any, **options: Any) -> None:
        # A retry would hold up Celery's thread until Redis is back.
        with contextlib.suppress(*self.connection.connection_errors):
            super()._publish(*args, **{**options, "retry": False})

    def send(self, type: str, *args: Any, **fields: Any) -> Any:  # noqa: A002 - Celery's name
        """As Celery's."""
        masked = {name: mask_text(value) if isinstance(value, str) else value for name, value in fields.items()}
        return super().send(type, *args, **masked)


class CeleryEvents(celery_events.Events):  # type: ignore[misc]  # Celery ships no types
    """What `app.events` makes."""

    dispatcher_cls = Dispatcher


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def shown(email: object, error: ErrorCode) -> str:
    """A reply as Flower, events and logs show it: masked."""
    return f"{{'email': {mask_email(email)!r}, 'error': {int(error)}}}"

"""Celery's task events, which workers publish for `celery events` and Flower.

They are published on kombu's fanout exchange, which in Redis is a channel: a JSON message whose body is a JSON list in
base64 (https://docs.celeryq.dev/en/stable/userguide/monitoring.html#event-reference).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from base64 import b64decode
from collections.abc import Callable
from typing import Any, Final

from producer.errors import VerifyError
from producer.redis.connection import RedisConnection, RedisConnections, raise_errors
from producer.settings import Settings

SUBSCRIBE_TIMEOUT: Final = 1.0  # seconds that a request waits for the subscription; later events are received anyway

OnEvent = Callable[[str, float], None]  # an event's type, and the worker's clock in Unix seconds


class TaskEvents:
    """Receives all task events on one connection and passes on those of the requests that are followed."""

    def __init__(self, settings: Settings, redis: RedisConnections) -> None:
        self._connection = redis.connection(settings.broker_url, on_push=self._receive, on_open=self._subscribe)
        self._followed: dict[str, OnEvent] = {}
        self._opening: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Subscribe. If that fails, requests are followed without a worker's events."""
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())
        await asyncio.wait([self._opening], timeout=SUBSCRIBE_TIMEOUT)

    def follow(self, request_id: str, on_event: OnEvent) -> None:
        """From now on, call `on_event` with each event of this request."""
        self._followed[request_id] = on_event

    def forget(self, request_id: str) -> None:
        self._followed.pop(request_id, None)

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()

    async def _open(self) -> None:
        for _ in range(2):  # twice, as an old connection may turn out to be lost
            with contextlib.suppress(VerifyError):
                await self._connection.run([("PING",)])
                return

    async def _subscribe(self, connection: RedisConnection) -> None:
        # kombu puts the database's number into the channel, which to Redis is the same in all databases.
        raise_errors(await connection.run([("PSUBSCRIBE", f"/{connection.database}.celeryev/task.*")]))

    def _receive(self, push: list[bytes]) -> None:
        if not self._followed:
            return
        for event in read_events(push[-1]):
            uuid, kind, timestamp = event.get("uuid"), event.get("type"), event.get("timestamp")
            on_event = self._followed.get(uuid) if isinstance(uuid, str) else None
            # A worker's timestamp is a float; an integer may have more digits than arithmetic can take.
            if on_event is not None and isinstance(kind, str) and isinstance(timestamp, float):
                on_event(kind, timestamp)


def read_events(message: bytes) -> list[dict[str, Any]]:
    """The events in a message of the exchange; none if it is not such a message. Anyone may publish there."""
    try:
        events = json.loads(b64decode(json.loads(message)["body"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [each for each in (events if isinstance(events, list) else [events]) if isinstance(each, dict)]

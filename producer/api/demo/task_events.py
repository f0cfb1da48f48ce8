"""What workers say of requests: Celery's task events, as `celery events` and Flower hear them.

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

LISTENING: Final = 1.0  # seconds that a request may wait for us to listen; later events are heard all the same

Hear = Callable[[str, float], None]  # an event's type, and the worker's clock in Unix seconds


class TaskEvents:
    """Hears all task events on one connection, and passes on those of requests that someone follows."""

    def __init__(self, settings: Settings, redis: RedisConnections) -> None:
        self._link = redis.connection(settings.broker_url, on_push=self._take, on_open=self._subscribe)
        self._followed: dict[str, Hear] = {}
        self._opening: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Be subscribed, or give up: without events a request is followed from its door to its reply."""
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._listen())
        await asyncio.wait([self._opening], timeout=LISTENING)

    def follow(self, request_id: str, hear: Hear) -> None:
        """From now on, call `hear` with each event of this request."""
        self._followed[request_id] = hear

    def forget(self, request_id: str) -> None:
        """Nobody follows it any more."""
        self._followed.pop(request_id, None)

    async def close(self) -> None:
        """Drop the connection."""
        if self._opening is not None:
            self._opening.cancel()
        await self._link.close()

    async def _listen(self) -> None:
        # A second time, as perhaps only the connection was lost.
        for _ in range(2):
            with contextlib.suppress(VerifyError):
                await self._link.run([("PING",)])
                return

    async def _subscribe(self, link: RedisConnection) -> None:
        # kombu's topic has the database's number in it, though to Redis a channel is the same in all.
        raise_errors(await link.run([("PSUBSCRIBE", f"/{link.database}.celeryev/task.*")]))

    def _take(self, push: list[bytes]) -> None:
        if not self._followed:
            return
        for event in read_events(push[-1]):
            uuid, kind, stamp = event.get("uuid"), event.get("type"), event.get("timestamp")
            hear = self._followed.get(uuid) if isinstance(uuid, str) else None
            # A worker's clock has a fraction; an integer may have more digits than can be reckoned with.
            if hear is not None and isinstance(kind, str) and isinstance(stamp, float):
                hear(kind, stamp)


def read_events(message: bytes) -> list[dict[str, Any]]:
    """The events in a message of the exchange; none if it is no such message. Anyone may publish there."""
    try:
        events = json.loads(b64decode(json.loads(message)["body"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [each for each in (events if isinstance(events, list) else [events]) if isinstance(each, dict)]

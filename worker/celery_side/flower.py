"""Queue lengths in Flower when Sentinel manages the broker.

Flower 2.2 asks only the first sentinel, and then reads database 0 whatever the URL says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from producer.redis.connection import RedisConnections, raise_errors


class QueueLengths:
    """Stands in for Flower's `RedisSentinel`, which is constructed once a page."""

    def __init__(self, url: str, *_args: object, **_options: object) -> None:  # the rest is what Flower passes
        self._url = url

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Name and length of each queue. Raises `RedisUnavailable`, which Flower logs."""
        names = list(names)
        async with RedisConnections() as redis:
            lengths = raise_errors(await redis.connection(self._url).run([("LLEN", name) for name in names]))
        return [{"name": name, "messages": length} for name, length in zip(names, lengths, strict=True)]

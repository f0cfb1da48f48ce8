"""The lengths of queues in Flower, where sentinels name the broker.

Flower 2.2 asks the first sentinel only, and then looks into database 0 whatever the URL says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from producer.redis.connection import RedisConnections, raise_errors
from producer.settings import load_or_exit


class Queues:
    """In the place of Flower's `RedisSentinel`, which is made for each page."""

    def __init__(self, *_args: object, **_options: object) -> None:
        self._url = load_or_exit().broker_url

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Name and length of each. Raises `RedisUnavailable`, which Flower logs."""
        names = list(names)
        async with RedisConnections() as redis:
            lengths = raise_errors(await redis.connection(self._url).run([("LLEN", name) for name in names]))
        return [{"name": name, "messages": length} for name, length in zip(names, lengths, strict=True)]

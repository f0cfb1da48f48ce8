"""The three Redis databases, over as few connections as they have servers."""

from __future__ import annotations

from typing import Any

from producer.redis.connection import Batch, RedisConnection, RedisConnections
from producer.settings import Settings


class Database:
    """One of the three: a connection, possibly shared, and a database number."""

    def __init__(self, connection: RedisConnection, number: int) -> None:
        self.connection = connection
        self.number = number

    async def run(self, batch: Batch) -> list[Any]:
        """As `RedisConnection.run`."""
        return await self.connection.run(batch, database=self.number)


class Databases:
    """Codes, broker and results. Those on one server share a connection."""

    def __init__(self, settings: Settings, redis: RedisConnections) -> None:
        self._redis = redis
        self._connections: dict[object, RedisConnection] = {}
        self.codes = self._database(settings.codes_url)
        self.broker = self._database(settings.broker_url)
        self.results = self._database(settings.results_url)

    def _database(self, url: str) -> Database:
        connection = self._redis.connection(url)
        return Database(self._connections.setdefault(connection.server, connection), connection.database)

"""The three Redis databases, over as few connections as they have servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from producer.redis.connection import Batch, RedisConnection, RedisConnections
from producer.settings import Settings


@dataclass
class Database:
    """One of the three: a connection, possibly shared, and a database number."""

    connection: RedisConnection
    number: int

    async def run(self, batch: Batch) -> list[Any]:
        """As `RedisConnection.run`."""
        return await self.connection.run(batch, database=self.number)


class Databases:
    """Codes, broker and results. Those on one server share a connection."""

    def __init__(self, settings: Settings, redis: RedisConnections) -> None:
        connections: dict[object, RedisConnection] = {}

        def database(url: str) -> Database:
            connection = redis.connection(url)
            return Database(connections.setdefault(connection.server, connection), connection.database)

        urls = (settings.codes_url, settings.broker_url, settings.results_url)
        self.codes, self.broker, self.results = map(database, urls)

"""The three Redis databases, over as few connections as they have servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from producer.redis.connection import Batch, RedisConnection
from producer.settings import Settings


class Database:
    """One of the three: a connection, possibly shared, and a database number."""

    def __init__(self, link: RedisConnection, number: int) -> None:
        self.link = link
        self.number = number

    async def run(self, batch: Batch) -> list[Any]:
        """As `Link.run`."""
        return await self.link.run(batch, database=self.number)


class Databases:
    """Codes, broker and results. On one server they share one connection: what concerns all three is one trip."""

    def __init__(self, settings: Settings) -> None:
        self._links: dict[tuple[Any, ...], RedisConnection] = {}
        self.codes = self._database(settings.codes_url)
        self.broker = self._database(settings.broker_url)
        self.results = self._database(settings.results_url)
        self.one_server = len(self._links) == 1

    def _database(self, url: str) -> Database:
        link = RedisConnection(url)
        return Database(self._links.setdefault(link.server, link), link.database)

    async def run_all(self, parts: Sequence[tuple[Database, Batch]]) -> list[list[Any]]:
        """As `Link.run_all`, for databases of one server."""
        return await parts[0][0].link.run_all([(database.number, batch) for database, batch in parts])

    async def close(self) -> None:
        """Drop the connections."""
        for link in self._links.values():
            await link.close()

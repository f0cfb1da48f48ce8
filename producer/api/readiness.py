"""Whether the API can serve: the three databases answer, and a worker is alive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, NamedTuple

from producer.errors import RedisLoginRefused, VerifyError
from producer.redis.connection import REDIS_TIMEOUT, RedisConnections, check_version, raise_errors
from producer.settings import Settings
from producer.store.backlog import Backlog, backlog, read_backlog

FRESH = 0.25  # seconds for which one look serves everyone, so that a crowd costs Redis nothing
_DATABASES = ("broker", "results", "codes")


class Finding(NamedTuple):
    """What one look found."""

    errors: dict[str, Exception]  # by database, of those that cannot be used
    backlog: Backlog | None  # None: the broker cannot be used

    @property
    def workers(self) -> int:
        return 0 if self.backlog is None else self.backlog.workers

    @property
    def ready(self) -> bool:
        return not self.errors and self.workers > 0

    @property
    def problem(self) -> str:
        """What is wrong with which databases, without their URLs; empty if they can be used."""
        kinds: dict[str, list[str]] = {}
        for database, error in self.errors.items():
            refused = isinstance(error, RedisLoginRefused)
            kinds.setdefault("Redis refused the login" if refused else "Redis cannot be reached", []).append(database)
        return "; ".join(f"{kind} ({', '.join(databases)})" for kind, databases in kinds.items())


class Readiness:
    """Looks over connections of its own: whatever keeps the client's busy says nothing about health."""

    def __init__(self, settings: Settings, redis: RedisConnections) -> None:
        self._queue = settings.queue
        urls = (settings.broker_url, settings.results_url, settings.codes_url)
        self._connections = [redis.connection(url, on_open=check_version) for url in urls]
        self._look: asyncio.Task[Finding] | None = None
        self._found_at = 0.0  # loop time

    async def find(self) -> Finding:
        """The state now, within 3 s whatever is down."""
        look = self._look
        if look is None or (look.done() and asyncio.get_running_loop().time() - self._found_at > FRESH):
            look = self._look = asyncio.create_task(self._find())
        return await asyncio.shield(look)  # one look for all; a caller that is cancelled does not cancel it

    async def close(self) -> None:
        if self._look is not None:
            self._look.cancel()

    async def _find(self) -> Finding:
        commands = (backlog(self._queue), ("PING",), ("PING",))
        runs = [connection.run([command]) for connection, command in zip(self._connections, commands, strict=True)]
        answers = await asyncio.gather(*(_answer(run) for run in runs))
        self._found_at = asyncio.get_running_loop().time()
        found = dict(zip(_DATABASES, answers, strict=True))
        errors = {database: answer for database, answer in found.items() if isinstance(answer, Exception)}
        figures = found["broker"]
        return Finding(errors, None if isinstance(figures, Exception) else read_backlog(figures[0]))


async def _answer(replies: Awaitable[list[Any]]) -> list[Any] | Exception:
    try:
        async with asyncio.timeout(REDIS_TIMEOUT):
            return raise_errors(await replies)
    except (OSError, VerifyError) as exc:  # TimeoutError is an OSError
        return exc

"""Whether the doors lead anywhere: the three databases, and a worker behind the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, NamedTuple

from producer.errors import VerifyError
from producer.redis.connection import REDIS_TIMEOUT, RedisConnections, check_version, raise_errors
from producer.settings import Settings
from producer.store.backlog import Backlog, backlog, read_backlog

FRESH = 0.25  # seconds that a finding serves all who ask, so that a crowd of them costs Redis nothing


class Finding(NamedTuple):
    """What was found."""

    broker: bool
    results: bool
    codes: bool
    backlog: Backlog | None  # None: the broker did not answer

    @property
    def workers(self) -> int:
        """How many are alive."""
        return 0 if self.backlog is None else self.backlog.workers

    @property
    def ready(self) -> bool:
        """Whether a request can be served."""
        return self.broker and self.results and self.codes and self.workers > 0


class Readiness:
    """Looks over connections of its own: what the client's are busy with is no sign of health."""

    def __init__(self, settings: Settings, redis: RedisConnections) -> None:
        self._queue = settings.queue
        urls = (settings.broker_url, settings.results_url, settings.codes_url)
        self._links = [redis.connection(url, on_open=check_version) for url in urls]
        self._look: asyncio.Task[Finding] | None = None
        self._found_at = 0.0  # loop time

    async def find(self) -> Finding:
        """How it stands now, within 3 s whatever is down."""
        look = self._look
        if look is None or (look.done() and asyncio.get_running_loop().time() - self._found_at > FRESH):
            look = self._look = asyncio.create_task(self._find())
        return await asyncio.shield(look)  # one for all; who is cancelled takes it from nobody

    async def close(self) -> None:
        """Drop the connections."""
        if self._look is not None:
            self._look.cancel()
        for link in self._links:
            await link.close()

    async def _find(self) -> Finding:
        broker, results, codes = self._links
        figures, *answers = await asyncio.gather(
            _answer(broker.run([backlog(self._queue)])),
            _answer(results.run([("PING",)])),
            _answer(codes.run([("PING",)])),
        )
        self._found_at = asyncio.get_running_loop().time()
        results_up, codes_up = (answer is not None for answer in answers)
        return Finding(figures is not None, results_up, codes_up, None if figures is None else read_backlog(figures[0]))


async def _answer(replies: Awaitable[list[Any]]) -> list[Any] | None:
    try:
        async with asyncio.timeout(REDIS_TIMEOUT):
            return raise_errors(await replies)
    except (OSError, VerifyError):  # TimeoutError is of the first kind
        return None

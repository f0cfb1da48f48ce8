"""Steps: commands for one database together with what reads their answers. Several can leave in one write."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

from producer.redis.connection import Batch, RedisConnection

T = TypeVar("T")


class Step(Generic[T]):
    """Await it to run it alone. Raises `RedisUnavailable`, and whatever `read` raises."""

    __slots__ = ("commands", "connection", "database", "read")

    def __init__(
        self, connection: RedisConnection, database: int, commands: Batch, read: Callable[[list[Any]], T]
    ) -> None:
        """`read`: gets one answer for each command, an error answer as a `ServerError`."""
        self.connection = connection
        self.database = database
        self.commands = commands
        self.read = read

    async def _run(self) -> T:
        return self.read(await self.connection.run(self.commands, database=self.database))

    def __await__(self) -> Generator[Any, Any, T]:
        return self._run().__await__()


async def run_steps(steps: Sequence[Step[Any]]) -> list[Any]:
    """Run steps that share a connection in one write, in their order; the result of each.

    Raises `RedisUnavailable`; then none is read.
    """
    found = await steps[0].connection.run_all([(step.database, step.commands) for step in steps])
    return [step.read(answers) for step, answers in zip(steps, found, strict=True)]

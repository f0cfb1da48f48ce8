"""Of all workers that wait, one wakes for a message, and nothing is lost if it dies then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis as redis_py
from support.redis_server import RedisServer

from producer.redis.connection import RedisConnections
from worker.queue.commands import HANDOVER, RequestQueue, Reservation, Waiter

pytestmark = pytest.mark.usefixtures("redis")  # each test begins with empty databases

QUEUE = "verification"
WANTED, WORTH = 8, 2


class Waiting:
    """A worker's two connections, and its view of who waits on the queue."""

    def __init__(self, connections: RedisConnections, url: str) -> None:
        self.queue = RequestQueue(QUEUE, visibility_timeout=30)
        self.connection, self.waiter = connections.connection(url), connections.connection(url)
        self.waits = Waiter.NONE

    async def take(self, wanted: int = WANTED) -> list[bytes]:
        """Take what is there."""
        [answer] = await self.connection.run([self.reservation(wanted)])
        return self._read(answer)

    async def wait(self, wanted: int = WANTED) -> list[bytes]:
        """Wait for messages, and take them."""
        block = self.queue.await_message() if self.waits is Waiter.SELF else self.queue.await_turn()
        return self._read(await self.waiter.run_muted(block, self.reservation(wanted)))

    def reservation(self, wanted: int) -> Any:
        return self.queue.reserve(wanted, held=0, worth_waiting_for=WORTH)

    def _read(self, answer: list[Any]) -> list[bytes]:
        found: Reservation = self.queue.read_reserve(answer)
        self.waits = found.waiter
        return [each.message for each in found.taken]


@pytest.fixture
async def workers(redis_server: RedisServer) -> AsyncIterator[list[Waiting]]:
    async with RedisConnections() as connections:
        workers = [Waiting(connections, redis_server.url()) for _ in range(3)]
        for worker in workers:
            await worker.connection.open()
            await worker.waiter.open()
        yield workers


async def test_a_message_wakes_one_of_the_workers_that_wait(workers: list[Waiting], redis: redis_py.Redis) -> None:
    first, second, third = workers
    assert [await each.take() for each in workers] == [[], [], []]
    assert [each.waits for each in workers] == [Waiter.SELF, Waiter.OTHER, Waiter.OTHER]
    others = [asyncio.create_task(each.wait()) for each in (second, third)]
    taking = asyncio.create_task(first.wait())
    redis.lpush(QUEUE, b"{}")
    assert await taking == [b"{}"]
    assert [await each for each in others] == [[], []]
    assert first.waits is Waiter.SELF


async def test_a_worker_that_is_full_leaves_the_wait_to_the_next(workers: list[Waiting], redis: redis_py.Redis) -> None:
    first, second, _ = workers
    await first.take()
    await second.take()
    redis.lpush(QUEUE, *[b"{}"] * (WANTED - WORTH + 1))
    assert len(await first.take()) == WANTED - WORTH + 1
    assert first.waits is Waiter.NONE
    await second.wait()
    assert second.waits is Waiter.SELF


async def test_what_a_worker_left_on_its_way_is_taken_by_any(workers: list[Waiting], redis: redis_py.Redis) -> None:
    redis.lpush(QUEUE + HANDOVER, b"{}")
    assert await workers[2].take() == [b"{}"]
    assert not redis.exists(QUEUE + HANDOVER)


async def test_a_worker_that_takes_no_more_puts_back_what_is_on_its_way(
    workers: list[Waiting], redis: redis_py.Redis
) -> None:
    first, second, _ = workers
    await first.take()
    redis.lpush(QUEUE, b"1", b"2")
    redis.lmove(QUEUE, QUEUE + HANDOVER, "RIGHT", "LEFT")
    assert await first.take(0) == []
    assert redis.lrange(QUEUE, 0, -1) == [b"2", b"1"]
    assert await second.wait() == [b"1", b"2"]
    assert second.waits is Waiter.SELF


async def test_the_wait_of_a_worker_that_died_passes_to_another(workers: list[Waiting], redis: redis_py.Redis) -> None:
    first, second, _ = workers
    await first.take()
    await first.waiter.close()
    async with asyncio.timeout(60):
        while second.waits is not Waiter.SELF:
            await second.wait()
    redis.lpush(QUEUE, b"{}")
    assert await second.wait() == [b"{}"]

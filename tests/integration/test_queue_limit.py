"""A client with a limit on the queue, on a real Redis server."""

from __future__ import annotations

import asyncio

import pytest
from support.fake_worker import settings
from support.redis_server import RedisServer

from producer.aio import AsyncVerificationClient
from producer.contract import ErrorCode
from producer.errors import QueueFull

pytestmark = pytest.mark.usefixtures("redis")  # it has emptied the shared server


def test_nothing_is_added_to_a_full_queue(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with AsyncVerificationClient(settings(redis_server), max_queue=2) as client:
            await client.enqueue("in.time@example.com")
            with pytest.raises(QueueFull):
                await client.enqueue("late@example.com")
            assert (await client.request("late@example.com")).error is ErrorCode.TOO_MANY_REQUESTS

    with redis_server.client(1) as broker:
        # Delayed requests and suspected poison messages count too; the queue is full once more than two wait.
        broker.hset("verification.parked", "one", "x")
        broker.lpush("verification.suspects", "x")
        asyncio.run(work())
        assert broker.llen("verification") == 1


def test_a_crowd_fills_the_queue_to_its_limit_exactly(redis_server: RedisServer) -> None:
    async def work() -> list[object]:
        async with AsyncVerificationClient(settings(redis_server), max_queue=9) as client:
            requests = (client.enqueue(f"u{i}@example.com") for i in range(700))  # more than one push takes
            return list(await asyncio.gather(*requests, return_exceptions=True))

    outcomes = asyncio.run(work())
    assert sum(isinstance(each, str) for each in outcomes) == 10
    assert sum(isinstance(each, QueueFull) for each in outcomes) == 690

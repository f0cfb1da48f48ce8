"""Our clients write Redis' time into their messages, whatever the clock of their own host says."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py
from support.caller import QUEUE, address
from support.redis_server import RedisServer
from support.rig import Rig

from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient
from producer.redis import clock
from producer.settings import Settings


@pytest.fixture(params=[-600, 600])
def wrong_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many seconds this host's clock is off."""
    by: int = request.param
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + by)
    return by


@pytest.fixture
def broker(redis: redis_py.Redis, redis_server: RedisServer) -> Iterator[redis_py.Redis]:
    """The database with the queue, which nobody serves."""
    assert redis.dbsize() == 0
    with redis_server.client(1) as client:
        yield client


def headers(broker: redis_py.Redis) -> dict[str, Any]:
    """Those of the newest message."""
    found: dict[str, Any] = json.loads(broker.lindex(QUEUE, 0) or "")["headers"]
    return found


def redis_time(broker: redis_py.Redis) -> float:
    seconds, microseconds = broker.time()
    return seconds + microseconds / 1e6


@pytest.mark.usefixtures("wrong_clock")
def test_a_caller_with_a_wrong_clock_is_served(rig: Rig) -> None:
    with VerificationClient(Settings(redis_url=rig.settings["VERIFY_REDIS_URL"], reply_timeout=60)) as client:
        assert [int(client.request(address()).error) for _ in range(3)] == [0] * 3


@pytest.mark.usefixtures("wrong_clock")
@pytest.mark.parametrize("max_queue", [None, 1000])
async def test_a_message_has_the_time_at_which_it_is_sent(
    broker: redis_py.Redis, redis_server: RedisServer, max_queue: int | None
) -> None:
    async with AsyncVerificationClient(Settings(redis_url=redis_server.url()), max_queue=max_queue) as client:
        for _ in range(2):  # on a new connection, and on one that is open
            before = redis_time(broker)
            await client.enqueue(address())
            # The middle of a trip is a guess, which is off by half of it at most.
            assert before - 1 < headers(broker)["enqueued_at"] < redis_time(broker) + 1


async def test_an_open_connection_asks_for_the_time_again_with_a_push(
    broker: redis_py.Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis' clock may be set, and a machine be suspended, while the connection stays."""
    async with AsyncVerificationClient(Settings(redis_url=redis_server.url())) as client:
        await client.enqueue(address())
        here = client._on_loop
        assert here is not None
        here.publisher._clock.read([b"1700000000", b"0"], time.monotonic())  # what Redis said before
        await client.enqueue(address())
        assert abs(headers(broker)["enqueued_at"] - 1_700_000_000) < 60
        monkeypatch.setattr(clock, "STALE_AFTER", 0.0)
        await client.enqueue(address())
        await client.enqueue(address())
        assert abs(headers(broker)["enqueued_at"] - redis_time(broker)) < 60


async def test_without_the_right_to_ask_the_message_has_no_time(
    broker: redis_py.Redis, redis_server: RedisServer
) -> None:
    """Its age then counts from its first reservation."""
    broker.acl_setuser("timeless", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-time"])
    url = redis_server.url().replace("redis://", "redis://timeless:any@")
    try:
        async with AsyncVerificationClient(Settings(redis_url=url)) as client:
            await client.enqueue(address())
            await client.enqueue(address())
    finally:
        broker.acl_deluser("timeless")
    assert broker.llen(QUEUE) == 2
    assert "enqueued_at" not in headers(broker)

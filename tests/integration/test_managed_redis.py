"""Connections to a host name whose server has become a replica: all of them follow the name, also the silent ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import celery
import pytest
import redis as redis_py
from support.caller import QUEUE
from support.fake_worker import FakeWorker
from support.managed_redis import NAME, ManagedRedis, became_stranded
from support.process import eventually

from producer.aio import AsyncVerificationClient
from producer.contract import ErrorCode
from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnections
from producer.settings import Settings
from worker.celery_side.connections import Connection
from worker.queue.commands import RequestQueue


@pytest.fixture
def managed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagedRedis]:
    with ManagedRedis() as managed:
        managed.resolve_here(monkeypatch)
        yield managed


async def test_replies_are_heard_where_requests_are_pushed(managed: ManagedRedis) -> None:
    """The subscription to replies would stay at the former primary, which answers its pings and hears nothing."""
    settings = Settings(redis_url=managed.url(), reply_timeout=5)
    async with AsyncVerificationClient(settings) as client:
        with FakeWorker(managed.primary):
            assert (await client.request("a@example.com")).error is ErrorCode.SUCCESS
        managed.fail_over(became_stranded)
        with FakeWorker(managed.replica):
            errors = [(await client.request("a@example.com")).error for _ in range(3)]
    assert errors[-1] is ErrorCode.SUCCESS
    assert ErrorCode.TIMEOUT not in errors


async def test_a_worker_without_requests_finds_out_that_its_server_is_a_replica(managed: ManagedRedis) -> None:
    """It asks for few writes: one in the round of each second, whose errors count for nothing otherwise."""
    command = RequestQueue(QUEUE, visibility_timeout=15).maintain([], restore=True, relay_healthy=True)
    async with RedisConnections() as connections:
        working, waiting = (connections.connection(managed.url()) for _ in range(2))
        assert await waiting.run([("PING",)]) == [b"PONG"]
        await working.run([command])
        managed.fail_over(became_stranded)
        with pytest.raises(RedisUnavailable, match="READONLY"):
            await working.run([command])
        await working.run([command])
        assert not waiting.connected  # it reads only: nobody else would tell it
        assert (await waiting.run([("ROLE",)]))[0][0] == b"master"


def test_all_of_a_pool_of_celery_follows_the_name(managed: ManagedRedis) -> None:
    """A connection that only publishes is refused nothing."""
    port = managed.primary.port
    pool = redis_py.ConnectionPool(connection_class=Connection, host=NAME, port=port)
    both = [pool.get_connection() for _ in range(2)]
    for each in both:
        pool.release(each)
    managed.fail_over(became_stranded)
    client = redis_py.Redis(connection_pool=pool)
    with pytest.raises(redis_py.ConnectionError, match="replica"):
        client.set("a", 1)
    for each in [pool.get_connection() for _ in range(2)]:
        each.send_command("ROLE")  # type: ignore[no-untyped-call]
        assert each.read_response()[0] == b"master"
    client.close()


def test_the_result_backend_follows_the_name(managed: ManagedRedis) -> None:
    backend = f"worker.celery_side.backend:ReplyBackend+{managed.url()}"
    client = celery.Celery("any", backend=backend, set_as_current=False).backend.client
    client.set("a", 1)
    managed.fail_over(became_stranded)
    with pytest.raises(redis_py.ConnectionError, match="replica"):
        client.set("a", 2)
    client.set("a", 2)
    with managed.replica.client() as direct:
        assert direct.get("a") == b"2"


@pytest.mark.slow
def test_a_subscription_without_an_event_loop_follows_the_name(managed: ManagedRedis) -> None:
    """Flower's: nothing but the poller looks after it."""
    app = celery.Celery("any", broker=managed.url(), set_as_current=False)
    app.conf.broker_transport = "worker.celery_side.transport:Transport"
    heard: list[Any] = []
    receivers: list[Any] = []
    end = threading.Event()

    def capture() -> None:
        while not end.is_set():
            with contextlib.suppress(redis_py.RedisError), app.connection() as connection:
                receivers.append(app.events.Receiver(connection, handlers={"*": heard.append}))
                receivers[-1].capture(limit=None, timeout=None, wakeup=False)

    thread = threading.Thread(target=capture)
    thread.start()
    try:
        for fail_over in (False, True):
            if fail_over:
                managed.fail_over(became_stranded)
            heard.clear()

            def told() -> bool:
                with app.connection() as connection, app.events.Dispatcher(connection) as dispatcher:
                    dispatcher.send("worker-heartbeat")
                return bool(heard)

            eventually(told)
    finally:
        end.set()
        receivers[-1].should_stop = True
        thread.join()

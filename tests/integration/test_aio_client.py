"""The asyncio client: crowds, cancellation, connections that break, event loops. Real Redis, fake worker.

What each verb does is shown through the blocking client, in test_client.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.fake_worker import FakeWorker, Taken, connections, exit_child, pending, read, settings
from support.redis_server import RedisServer
from support.tcp_proxy import TcpProxy

from producer.aio import AsyncVerificationClient
from producer.audit import Audit, AuditEvent
from producer.contract import ErrorCode, Reply, code_key
from producer.errors import RedisUnavailable

pytestmark = pytest.mark.usefixtures("redis")  # the shared server is empty at first

A = "a@example.com"
LIMIT = 60.0  # seconds of a whole test
NewServer = Callable[..., RedisServer]


@asynccontextmanager
async def client_of(server: RedisServer, **options: Any) -> AsyncIterator[AsyncVerificationClient]:
    """A client in which nothing may be pending at the end."""
    async with asyncio.timeout(LIMIT), AsyncVerificationClient(settings(server, **options)) as client:
        yield client
        assert pending(client) == 0


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - `client_of` limits the time
        await asyncio.sleep(0.01)


def emails_on_the_queue(server: RedisServer) -> list[str]:
    with server.client(1) as broker:
        return [read(raw).kwargs["email"] for raw in reversed(broker.lrange("verification", 0, -1))]


def pushes(server: RedisServer) -> int:
    with server.client() as client:
        calls: int = client.info("commandstats").get("cmdstat_lpush", {"calls": 0})["calls"]
        return calls


class TestCrowd:
    async def test_2000_requests_share_two_connections_and_few_pushes(self, redis_server: RedisServer) -> None:
        emails = [f"user{i}@example.com" for i in range(2000)]
        count = pushes(redis_server)
        with FakeWorker(redis_server, error=lambda kwargs: int(kwargs["email"][4:-12]) % 6) as worker:
            async with client_of(redis_server) as client:
                before = connections(redis_server)
                replies = await asyncio.gather(*map(client.request, emails))
                assert len(connections(redis_server) - before) == 2
        assert replies == [Reply(email, ErrorCode(i % 6)) for i, email in enumerate(emails)]
        assert len({each.request_id for each in worker.taken}) == 2000
        assert pushes(redis_server) - count < 50

    async def test_requests_are_pushed_in_their_order(self, redis_server: RedisServer) -> None:
        emails = [f"user{i}@example.com" for i in range(700)]
        async with client_of(redis_server) as client:
            await asyncio.gather(*map(client.enqueue, emails))
        assert emails_on_the_queue(redis_server) == emails

    async def test_a_lone_request_waits_for_no_timer(self, redis_server: RedisServer) -> None:
        async with client_of(redis_server) as client:
            await client.enqueue(A)
            assert client._on_loop is not None
            protocol = client._on_loop.publisher._connection._protocol
            assert protocol is not None
            push = asyncio.create_task(client.enqueue(A))
            written = False
            for _ in range(5):  # steps of the loop
                await asyncio.sleep(0)
                written = written or bool(protocol.waiting)
            assert written
            await push

    async def test_cancelled_requests_leave_nothing_behind(self, redis_server: RedisServer) -> None:
        async with client_of(redis_server) as client:
            tasks = [asyncio.create_task(client.request(A)) for _ in range(100)]
            await until(lambda: pending(client) == 100 and len(emails_on_the_queue(redis_server)) == 100)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def test_a_request_cancelled_before_its_push_is_not_pushed(self, redis_server: RedisServer) -> None:
        async with client_of(redis_server) as client:
            task = asyncio.create_task(client.enqueue("gone@example.com"))
            await asyncio.sleep(0)
            task.cancel()
            await client.enqueue(A)
        assert emails_on_the_queue(redis_server) == [A]


class TestRedisUnavailable:
    async def test_500_callers_of_a_frozen_server_get_redis_err(self, new_redis_server: NewServer) -> None:
        server = new_redis_server()
        with FakeWorker(server):
            async with client_of(server) as client:
                await client.request(A)
                server.pause()
                try:
                    crowd = asyncio.gather(*(client.request(A) for _ in range(500)))
                    with pytest.raises(RedisUnavailable):
                        await client.enqueue(A)
                    assert {reply.error for reply in await crowd} == {ErrorCode.REDIS_ERR}
                finally:
                    server.resume()
                assert (await client.request(A)).error is ErrorCode.SUCCESS

    async def test_a_restart_loses_no_waiting_request(self, new_redis_server: NewServer) -> None:
        server = new_redis_server(aof=True, options=("--appendfsync", "always"))
        async with client_of(server) as client:
            crowd = asyncio.gather(*(client.request(A) for _ in range(50)))
            await until(lambda: len(emails_on_the_queue(server)) == 50)
            server.kill()
            server.start()
            with FakeWorker(server):
                assert {reply.error for reply in await crowd} == {ErrorCode.SUCCESS}

    async def test_a_half_open_push_is_tried_again_on_a_new_connection(self, redis_server: RedisServer) -> None:
        with TcpProxy(redis_server.port) as proxy, FakeWorker(redis_server) as worker:
            async with client_of(redis_server, broker_url=proxy.url(1)) as client:
                await client.enqueue(A)
                proxy.mute_open()
                await client.enqueue(A)
                await until(lambda: len(worker.taken) == 3)
        assert len({each.request_id for each in worker.taken}) == 2

    async def test_a_reply_is_as_good_as_a_confirmed_push(self, redis_server: RedisServer) -> None:
        with TcpProxy(redis_server.port) as proxy, FakeWorker(redis_server) as worker:
            async with client_of(redis_server, broker_url=proxy.url(1)) as client:
                await client.enqueue(A)
                proxy.mute_open()
                assert (await client.request(A)).error is ErrorCode.SUCCESS
        assert len(worker.taken) == 2


class TestReplies:
    async def test_replies_published_during_a_lost_connection_are_found(self, redis_server: RedisServer) -> None:
        def cut(worker: FakeWorker, _taken: Taken) -> None:
            worker.results.client_kill_filter(_type="pubsub")

        with FakeWorker(redis_server, before=cut, publish=False):
            async with client_of(redis_server) as client:
                replies = await asyncio.gather(*(client.request(A) for _ in range(100)))
        assert {reply.error for reply in replies} == {ErrorCode.SUCCESS}

    async def test_a_reply_counts_even_if_the_push_failed(self, redis_server: RedisServer) -> None:
        with TcpProxy(redis_server.port) as proxy, FakeWorker(redis_server):
            async with client_of(redis_server, broker_url=proxy.url(1)) as client:
                await client.enqueue(A)
                proxy.refuse(reset=False)
                proxy.cut_after(b"LPUSH", seconds=1)
                assert (await client.request(A)).error is ErrorCode.SUCCESS


async def test_a_code_that_wrong_checks_have_dropped_is_an_audit_event(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    audit = Audit()
    with redis_server.client(0) as codes:
        codes.set(code_key(A), "123456", px=600_000)
    async with AsyncVerificationClient(settings(redis_server), audit=audit) as client:
        for _ in range(4):
            await client.check(A, "000000")
        assert audit.counts[AuditEvent.CODE_BURNT] == 0
        found = [(await client.check(A, code)).error for code in ("000000", "123456")]
    assert found == [ErrorCode.VARIFY_CODE_ERR, ErrorCode.VARIFY_EXPIRED]
    assert audit.counts[AuditEvent.CODE_BURNT] == 1
    assert A not in caplog.text


def test_each_loop_has_its_own_connections(redis_server: RedisServer) -> None:
    client = AsyncVerificationClient(settings(redis_server))

    async def error() -> ErrorCode:
        return (await client.request(A)).error

    with FakeWorker(redis_server):
        assert [asyncio.run(error()) for _ in range(3)] == [ErrorCode.SUCCESS] * 3
        pid = os.fork()
        if not pid:
            exit_child(lambda: asyncio.run(error()) is ErrorCode.SUCCESS)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


async def test_close_ends_everything(redis_server: RedisServer) -> None:
    before, tasks = connections(redis_server), asyncio.all_tasks()
    async with client_of(redis_server) as client:
        waiting = asyncio.gather(*(client.request(A) for _ in range(5)))
        await client.check(A, "1")
        await until(lambda: pending(client) == 5 and len(emails_on_the_queue(redis_server)) == 5)
        assert len(connections(redis_server) - before) == 3
        await client.close()
        assert {reply.error for reply in await waiting} == {ErrorCode.TIMEOUT}
        await until(lambda: not connections(redis_server) - before)
        await until(lambda: asyncio.all_tasks() == tasks)
        with pytest.raises(RuntimeError, match="closed"):
            await client.request(A)


async def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERIFY_REDIS_URL", "redis://127.0.0.1:1")
    async with AsyncVerificationClient() as client:
        assert (await client.request(A)).error is ErrorCode.REDIS_ERR

"""The asyncio client, against a real Redis server and a stand-in for the worker."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis as redis_py
from support.fake_worker import FakeWorker, Taken, connections, pending, read, settings
from support.redis_server import RedisServer
from support.tcp_proxy import TcpProxy

from producer.aio import AsyncVerificationClient
from producer.contract import CheckResult, ErrorCode, Reply
from producer.errors import RedisUnavailable, ServerTooOld
from producer.settings import Settings

pytestmark = pytest.mark.usefixtures("redis")  # the shared server is empty at first

A = "a@example.com"
REDIS_BOUND = 3.0  # seconds, by contract
NewServer = Callable[..., RedisServer]


@asynccontextmanager
async def opened(server: RedisServer, **more: Any) -> AsyncIterator[AsyncVerificationClient]:
    async with AsyncVerificationClient(settings(server, **more)) as client:
        yield client
        assert pending(client) == 0


async def eventually(true: Callable[[], bool], within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while not (said := true()) and time.monotonic() < deadline:  # noqa: ASYNC110 - what it waits for is elsewhere
        await asyncio.sleep(0.01)
    return said


async def timed(work: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
    start = time.monotonic()
    try:
        return await work, time.monotonic() - start
    except RedisUnavailable as exc:
        return exc, time.monotonic() - start


async def assert_redis_err(client: AsyncVerificationClient) -> None:
    outcomes = await asyncio.gather(timed(client.request(A)), timed(client.enqueue(A)), timed(client.check(A, "1")))
    (reply, _), (failure, _), (result, _) = outcomes
    assert reply == Reply(A, ErrorCode.REDIS_ERR)
    assert isinstance(failure, RedisUnavailable)
    assert result == CheckResult(A, ErrorCode.REDIS_ERR)
    assert max(seconds for _, seconds in outcomes) < REDIS_BOUND


def pushes(server: RedisServer) -> int:
    with server.client() as client:
        calls: int = client.info("commandstats").get("cmdstat_lpush", {"calls": 0})["calls"]
        return calls


class TestTheVerbs:
    def test_request(self, redis_server: RedisServer) -> None:
        async def work() -> None:
            async with opened(redis_server) as client:
                assert await client.request(" A@b.example ", purpose="p", locale="en") == Reply(
                    " A@b.example ", ErrorCode.SUCCESS
                )
                assert (await client.request("nobody")).error is ErrorCode.INVALID_ADDRESS
                assert (await client.request(A, purpose="Not One")).error is ErrorCode.EXCEPTION

        with FakeWorker(redis_server) as worker:
            asyncio.run(work())
        assert [each.kwargs for each in worker.taken] == [{"email": " A@b.example ", "purpose": "p", "locale": "en"}]

    def test_enqueue(self, redis_server: RedisServer) -> None:
        async def work() -> list[str]:
            async with opened(redis_server) as client:
                with pytest.raises(ValueError, match="request_id"):
                    await client.enqueue(A, request_id="")
                with pytest.raises(TypeError, match="email"):
                    await client.enqueue(b"a@example.com")
                return [await client.enqueue(A), *[await client.enqueue(A, request_id="mine") for _ in range(2)]]

        ids = asyncio.run(work())
        with redis_server.client(1) as broker:
            assert [read(raw).request_id for raw in reversed(broker.lrange("verification", 0, -1))] == ids

    def test_check(self, redis: redis_py.Redis, redis_server: RedisServer) -> None:
        async def work() -> list[ErrorCode]:
            async with opened(redis_server) as client:
                return [(await client.check(A, code)).error for code in ("1", "123456", "123456")]

        redis.set("code_" + A, "123456", ex=60)
        assert asyncio.run(work()) == [ErrorCode.VARIFY_CODE_ERR, ErrorCode.SUCCESS, ErrorCode.VARIFY_EXPIRED]


class TestACrowd:
    def test_2000_share_two_connections_and_few_pushes(self, redis_server: RedisServer) -> None:
        emails = [f"user{i}@example.com" for i in range(2000)]

        async def work() -> list[Reply]:
            before = connections(redis_server)
            async with opened(redis_server) as client:
                replies = await asyncio.gather(*map(client.request, emails))
                assert len(connections(redis_server) - before) == 2
                return replies

        count = pushes(redis_server)
        with FakeWorker(redis_server, error=lambda kwargs: int(kwargs["email"][4:-12]) % 6) as worker:
            replies = asyncio.run(work())
        assert replies == [Reply(email, ErrorCode(i % 6)) for i, email in enumerate(emails)]
        assert len({each.request_id for each in worker.taken}) == 2000
        assert pushes(redis_server) - count < 50

    def test_first_come_first_pushed(self, redis_server: RedisServer) -> None:
        emails = [f"user{i}@example.com" for i in range(700)]

        async def work() -> None:
            async with opened(redis_server) as client:
                await asyncio.gather(*map(client.enqueue, emails))

        asyncio.run(work())
        with redis_server.client(1) as broker:
            assert [read(raw).kwargs["email"] for raw in reversed(broker.lrange("verification", 0, -1))] == emails

    def test_a_lone_request_is_pushed_at_once(self, redis_server: RedisServer) -> None:
        async def work() -> list[float]:
            async with opened(redis_server) as client:
                await client.enqueue(A)
                return sorted([(await timed(client.enqueue(A)))[1] for _ in range(21)])

        assert asyncio.run(work())[10] < 0.02

    def test_who_is_cancelled_leaves_nothing(self, redis_server: RedisServer) -> None:
        async def work() -> None:
            async with opened(redis_server) as client:
                tasks = [asyncio.create_task(client.request(A)) for _ in range(100)]
                await asyncio.sleep(0.1)
                assert pending(client) == 100
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert pending(client) == 0

        asyncio.run(work())

    def test_who_gave_up_before_the_push_is_not_pushed(self, redis_server: RedisServer) -> None:
        async def work() -> None:
            async with opened(redis_server) as client:
                task = asyncio.create_task(client.enqueue("gone@example.com"))
                await asyncio.sleep(0)
                task.cancel()
                await client.enqueue(A)

        asyncio.run(work())
        with redis_server.client(1) as broker:
            assert [read(raw).kwargs["email"] for raw in broker.lrange("verification", 0, -1)] == [A]


class TestRedisAway:
    def test_down_and_back(self, new_redis_server: NewServer) -> None:
        server = new_redis_server()

        async def work() -> None:
            async with opened(server) as client:
                for _ in range(2):
                    server.kill()
                    await assert_redis_err(client)
                    server.start()
                    with FakeWorker(server):
                        assert (await client.request(A)).error is ErrorCode.SUCCESS

        asyncio.run(work())

    def test_frozen_for_500_callers_and_awake(self, new_redis_server: NewServer) -> None:
        server = new_redis_server()

        async def work() -> None:
            async with opened(server) as client:
                await client.request(A)
                server.pause()
                try:
                    crowd = asyncio.gather(*(timed(client.request(A)) for _ in range(500)))
                    await assert_redis_err(client)
                    outcomes = await crowd
                finally:
                    server.resume()
                assert {reply.error for reply, _ in outcomes} == {ErrorCode.REDIS_ERR}
                assert max(seconds for _, seconds in outcomes) < REDIS_BOUND
                assert (await client.request(A)).error is ErrorCode.SUCCESS

        with FakeWorker(server):
            asyncio.run(work())

    def test_restarted_while_requests_wait(self, new_redis_server: NewServer) -> None:
        server = new_redis_server(aof=True, options=("--appendfsync", "always"))

        async def work() -> list[Reply]:
            async with opened(server) as client:
                crowd = asyncio.gather(*(client.request(A) for _ in range(50)))
                with server.client(1) as broker:
                    assert await eventually(lambda: broker.llen("verification") == 50)
                server.kill()
                server.start()
                with FakeWorker(server):
                    return await crowd

        assert {reply.error for reply in asyncio.run(work())} == {ErrorCode.SUCCESS}

    def test_without_a_worker_the_answer_is_timeout(self, redis_server: RedisServer) -> None:
        async def work() -> tuple[Reply, float]:
            async with opened(redis_server, reply_timeout=0.4) as client:
                return await timed(client.request(A))

        reply, seconds = asyncio.run(work())
        assert reply.error is ErrorCode.TIMEOUT
        assert 0.4 <= seconds < 1.4

    def test_a_half_open_push_is_tried_again_on_a_new_connection(self, redis_server: RedisServer) -> None:
        async def work(proxy: TcpProxy, worker: FakeWorker) -> None:
            async with opened(redis_server, broker_url=proxy.url(1)) as client:
                await client.enqueue(A)
                proxy.mute_open()
                await client.enqueue(A)
                assert await eventually(lambda: len(worker.taken) == 3)

        with TcpProxy(redis_server.port) as proxy, FakeWorker(redis_server) as worker:
            asyncio.run(work(proxy, worker))
        assert len({each.request_id for each in worker.taken}) == 2

    def test_a_reply_is_as_good_as_a_confirmed_push(self, redis_server: RedisServer) -> None:
        async def work(proxy: TcpProxy) -> tuple[Reply, float]:
            async with opened(redis_server, broker_url=proxy.url(1)) as client:
                await client.enqueue(A)
                proxy.mute_open()
                return await timed(client.request(A))

        with TcpProxy(redis_server.port) as proxy, FakeWorker(redis_server) as worker:
            reply, seconds = asyncio.run(work(proxy))
        assert reply.error is ErrorCode.SUCCESS
        assert seconds < 1.0
        assert len(worker.taken) == 2

    def test_too_old_is_said_loudly(self, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
        async def work() -> None:
            async with opened(redis_server) as client:
                for verb in (client.request(A), client.enqueue(A), client.check(A, "1")):
                    with pytest.raises(ServerTooOld, match="is needed"):
                        await verb

        monkeypatch.setattr("producer.redis.connection.OLDEST", (99, 0))
        asyncio.run(work())


class TestReplies:
    def test_those_published_while_nobody_listened_are_found(self, redis_server: RedisServer) -> None:
        async def work() -> list[Reply]:
            async with opened(redis_server) as client:
                return await asyncio.gather(*(client.request(A) for _ in range(100)))

        def cut(worker: FakeWorker, _taken: Taken) -> None:
            worker.results.client_kill_filter(_type="pubsub")

        with FakeWorker(redis_server, before=cut, publish=False):
            assert {reply.error for reply in asyncio.run(work())} == {ErrorCode.SUCCESS}

    def test_one_that_cannot_be_pushed_but_was_answered_counts(self, redis_server: RedisServer) -> None:
        async def work(proxy: TcpProxy) -> Reply:
            async with opened(redis_server, broker_url=proxy.url(1)) as client:
                await client.enqueue(A)
                proxy.refuse(reset=False)
                proxy.cut_after(b"LPUSH", seconds=1)
                return await client.request(A)

        with TcpProxy(redis_server.port) as proxy, FakeWorker(redis_server):
            assert asyncio.run(work(proxy)).error is ErrorCode.SUCCESS


class TestLoops:
    def test_each_loop_has_its_own_connections(self, redis_server: RedisServer) -> None:
        client = AsyncVerificationClient(settings(redis_server))

        async def work() -> ErrorCode:
            return (await client.request(A)).error

        with FakeWorker(redis_server):
            assert [asyncio.run(work()) for _ in range(3)] == [ErrorCode.SUCCESS] * 3

    def test_a_forked_child_has_its_own(self, redis_server: RedisServer) -> None:
        client = AsyncVerificationClient(settings(redis_server))

        async def work() -> ErrorCode:
            return (await client.request(A)).error

        with FakeWorker(redis_server):
            assert asyncio.run(work()) is ErrorCode.SUCCESS
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    status = int(asyncio.run(work()))
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def test_close_ends_everything(self, redis_server: RedisServer) -> None:
        async def work() -> None:
            before = connections(redis_server)
            client = AsyncVerificationClient(settings(redis_server))
            waits = asyncio.gather(*(client.request(A) for _ in range(5)))
            await client.check(A, "1")
            await asyncio.sleep(0.1)
            assert len(connections(redis_server) - before) == 3
            await client.close()
            assert {reply.error for reply in await waits} == {ErrorCode.TIMEOUT}
            assert await eventually(lambda: not connections(redis_server) - before)
            assert await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})
            with pytest.raises(RuntimeError, match="closed"):
                await client.request(A)

        asyncio.run(work())


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> ErrorCode:
        async with AsyncVerificationClient() as client:
            return (await client.request(A)).error

    monkeypatch.setenv("VERIFY_REDIS_URL", "redis://127.0.0.1:1")
    assert asyncio.run(work()) is ErrorCode.REDIS_ERR
    assert Settings().redis_url != "redis://127.0.0.1:1"

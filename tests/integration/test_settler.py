"""The settler on a real Redis: what happens to one request on its way out holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis as redis_py
from support.redis_server import RedisServer

from producer.contract import ErrorCode, VerifyRequest, code_key, reply_key
from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnections
from producer.settings import load
from producer.store.codes import Answered, Claim, CodePolicy, IssueRequest, Wait
from producer.store.redis_codes import RedisCodeStore
from worker.databases import Databases
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import INDEX, UNACKED, RequestQueue
from worker.settler import Settler


class Scene:
    """A settler, and the requests that it has in hand."""

    def __init__(self, server: RedisServer) -> None:
        settings = load({"VERIFY_REDIS_URL": server.url()}, dotenv=None)
        self.redis = RedisConnections()
        self.databases = Databases(settings, self.redis)
        codes = self.databases.codes
        self.store = RedisCodeStore(codes.connection, CodePolicy.of(settings), database=codes.number)
        self.done: Finished = []
        self.wrong = False  # whether who is told of what is done raises
        queue = RequestQueue("verification", visibility_timeout=15)
        self.settler = Settler(self.store, self.databases, queue, Counters())
        self.settler.subscribe(self._on_done)

    def _on_done(self, finished: Finished) -> None:
        self.done += finished
        if self.wrong:
            raise LookupError

    async def sent(self, name: str) -> Job:
        """A request that was issued to us and whose mail was accepted."""
        email = f"{name}@example.com"
        job = Job(name, f"tag-{name}", VerifyRequest(email), None, None)
        job.claim = Claim.of(name, job.tag, email, "default", email)
        await self.store.issue([IssueRequest(job.claim, "123456")])
        await self.databases.broker.run([("HSET", UNACKED, job.tag, "message"), ("ZADD", INDEX, 1, job.tag)])
        return job

    async def in_hand(self) -> int:
        """How many messages are not acked."""
        [found] = await self.databases.broker.run([("HLEN", UNACKED)])
        return int(found)


def play(server: RedisServer, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        stage = Scene(server)
        try:
            await scene(stage)
        finally:
            await stage.redis.close()

    asyncio.run(main())


def test_a_reply_that_its_reader_deletes_at_once_holds_up_nothing(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Scene) -> None:
        jobs = [await stage.sent(f"user{number}") for number in range(3)]
        connection = stage.databases.results.connection
        run_all = connection.run_all

        async def deleting(parts: Any) -> Any:
            # Between the storing of the reply and the ack, as its reader may.
            parts = list(parts)
            if len(parts) == 3:
                parts.insert(2, (stage.databases.results.number, [("DEL", reply_key("user0"))]))
                found = await run_all(parts)
                del found[2]
                return found
            return await run_all(parts)

        monkeypatch.setattr(connection, "run_all", deleting)
        for job in jobs:
            stage.settler.answer(job, ErrorCode.SUCCESS, mark=True)
        async with asyncio.timeout(5):
            await stage.settler.drain()
        assert sorted(job.request_id for job, _ in stage.done) == ["user0", "user1", "user2"]
        assert await stage.in_hand() == 0

    play(redis_server, scene)


def test_those_who_wait_for_a_send_are_woken_even_if_the_connection_is_lost_on_the_way(
    redis_server: RedisServer, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Scene) -> None:
        job = await stage.sent("one")
        joined = Claim.of("two", "tag-two", "one@example.com", "default", "one@example.com")
        [found] = await stage.store.issue([IssueRequest(joined, "654321")])
        assert isinstance(found, Wait)
        assert found.joined
        parked = ("HSET", "verification.parked", "two", "1 message")
        await stage.databases.broker.run([parked, ("ZADD", "verification.parked.due", 1e13, "two")])
        run = stage.databases.broker.run
        lost: list[Any] = []

        async def losing(batch: Any) -> Any:
            if not lost:
                lost.append(batch)
                raise RedisUnavailable
            return await run(batch)

        monkeypatch.setattr(stage.databases.broker, "run", losing)
        stage.settler.answer(job, ErrorCode.SUCCESS, mark=True)
        async with asyncio.timeout(5):
            await stage.settler.drain()
        assert len(lost) == 1
        assert await run([("LRANGE", "verification", 0, -1), ("HLEN", "verification.parked")]) == [[b"message"], 0]

    assert redis.dbsize() == 0
    play(redis_server, scene)


def test_an_error_of_those_who_are_told_keeps_no_request(redis_server: RedisServer) -> None:
    async def scene(stage: Scene) -> None:
        stage.wrong = True
        for name in ("one", "two"):
            stage.settler.answer(await stage.sent(name), ErrorCode.SUCCESS, mark=True)
            async with asyncio.timeout(5):
                await stage.settler.drain()
        assert stage.settler.under_way == 0
        assert {job.request_id for job, _ in stage.done} == {"one", "two"}
        assert await stage.in_hand() == 0

    play(redis_server, scene)


def test_an_answer_that_only_a_newer_worker_knows_is_read_as_an_unforeseen_one(redis_server: RedisServer) -> None:
    async def scene(stage: Scene) -> None:
        job = await stage.sent("later")
        await stage.databases.codes.run([("HSET", "request:later", "error", 8)])
        assert await stage.store.issue([IssueRequest(job.claim, "654321")]) == [Answered(ErrorCode.EXCEPTION)]
        [code] = await stage.databases.codes.run([("GET", code_key("later@example.com", "default"))])
        assert code == b"123456"

    play(redis_server, scene)

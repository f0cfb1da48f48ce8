"""The settler on a real Redis server: marks, replies and acks of many requests, each in its order."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest
import redis as redis_py
from support.caller import QUEUE
from support.memory_store import MemoryCodeStore
from support.redis_server import RedisServer
from support.store_driver import POLICY, claim_of

from producer.contract import DEAD_LETTERS, ErrorCode, VerifyRequest, read_reply, reply_key
from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnections, ServerError
from producer.redis.scripts import Command
from producer.settings import load
from producer.store.codes import Answered, CodeStore, IssueRequest, Send, Wait
from producer.store.redis_codes import RedisCodeStore
from worker.databases import Databases
from worker.gathering import Gathering
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import INDEX, UNACKED, RequestQueue
from worker.queue.message import ID_CONFLICT
from worker.settler import Settlement, Settler, answer_requests


def new_job(request_id: str, email: object = "anna@example.com") -> Job:
    return Job(request_id, f"tag-{request_id}", VerifyRequest(email), None, None)


class Harness:
    """A settler on one Redis server, and requests for it."""

    def __init__(self, server: RedisServer, *, memory: bool) -> None:
        self.redis = RedisConnections()
        self.databases = Databases(load({"VERIFY_REDIS_URL": server.url()}, dotenv=None), self.redis)
        self.store: CodeStore = RedisCodeStore(self.databases.codes.connection, POLICY, database=0)
        if memory:
            self.store = MemoryCodeStore(POLICY)
        self.queue = RequestQueue("verification", visibility_timeout=15)
        self.settler = Settler(self.store, self.databases, self.queue, Counters(), Gathering())
        self.settler.on_settled.append(self._on_settled)
        self.settled: Finished = []
        self.broken = False  # the subscriber raises
        self.writes: list[int] = []  # how many databases each write was for
        connection = self.databases.broker.connection
        run_all = connection.run_all

        async def counting(parts: Sequence[Any]) -> Any:
            self.writes.append(len(parts))
            return await run_all(parts)

        connection.run_all = counting  # type: ignore[method-assign]

    def _on_settled(self, finished: Finished) -> None:
        self.settled += finished
        if self.broken:
            raise LookupError

    async def sending(self, name: str) -> Job:
        """A request that this worker holds, whose mail is being sent."""
        job = new_job(name, f"{name}@example.com")
        job.validate()
        await self.store.issue([IssueRequest(job.claim, "123456")])
        entry = '["message", "", ""]'  # as kombu writes it: the message, exchange, routing key
        await self.databases.broker.run([("HSET", UNACKED, job.tag, entry), ("ZADD", INDEX, 1, job.tag)])
        self.writes.clear()
        return job

    async def finish(self) -> None:
        """Wait until everything is settled."""
        async with asyncio.timeout(60):
            await self.settler.drain()

    async def replies(self, *names: str) -> list[ErrorCode]:
        """The stored replies."""
        stored = await self.databases.results.run([("GET", reply_key(name)) for name in names])
        return [read_reply(payload).error for payload in stored]

    async def unacked(self) -> int:
        [found] = await self.databases.broker.run([("HLEN", UNACKED)])
        return int(found)


@pytest.fixture(params=["redis", "memory"])
def harness(request: pytest.FixtureRequest, redis: redis_py.Redis, redis_server: RedisServer) -> Harness:
    """With the code store in Redis, where steps share a write, and with one elsewhere."""
    del redis  # it has emptied the server
    return Harness(redis_server, memory=request.param == "memory")


def settler_test(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test, and close its connections."""

    @functools.wraps(test)
    def run(harness: Harness, **fixtures: Any) -> None:
        async def main() -> None:
            async with harness.redis:
                await test(harness, **fixtures)

        asyncio.run(main())

    return run


@settler_test
async def test_outcomes_are_recorded_answered_and_acked(harness: Harness) -> None:
    jobs = [await harness.sending(name) for name in ("one", "two")]
    harness.settler.answer(jobs[0], ErrorCode.SUCCESS, mark=True)
    harness.settler.answer(jobs[1], ErrorCode.MAIL_REJECTED, mark=True)
    await harness.finish()
    # Mark and answer are one write, or one beside the store.
    assert harness.writes == ([2] if harness.store.connection else [1])
    assert await harness.replies("one", "two") == [ErrorCode.SUCCESS, ErrorCode.MAIL_REJECTED]
    assert await harness.unacked() == 0
    again = await harness.store.issue([IssueRequest(job.claim, "") for job in jobs])
    assert again == [Answered(ErrorCode.SUCCESS), Answered(ErrorCode.MAIL_REJECTED)]


@settler_test
async def test_requests_that_wait_for_a_send_are_woken_though_the_connection_is_lost(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await harness.sending("one")
    joining = claim_of("two", "one@example.com")
    [found] = await harness.store.issue([IssueRequest(joining, "654321")])
    assert isinstance(found, Wait)
    assert found.joined
    delayed = ("HSET", "verification.parked", "two", "1:1 message")
    await harness.databases.broker.run([delayed, ("ZADD", "verification.parked.due", 1e13, "two")])
    run_batch = harness.databases.broker.run
    lost: list[Any] = []

    async def losing(batch: Any) -> Any:
        if not lost:
            lost.append(batch)
            raise RedisUnavailable
        return await run_batch(batch)

    monkeypatch.setattr(harness.databases.broker, "run", losing)
    harness.settler.answer(job, ErrorCode.SUCCESS, mark=True)
    await harness.finish()
    assert len(lost) == 1
    queue = [("LRANGE", "verification", 0, -1), ("HLEN", "verification.parked")]
    assert await run_batch(queue) == [[b"message"], 0]


@settler_test
async def test_a_dead_letter_is_answered_with_the_answer_that_its_request_has(harness: Harness) -> None:
    known, new = await harness.sending("known"), await harness.sending("new")
    harness.settler.answer(known, ErrorCode.SUCCESS, mark=True)
    await harness.finish()
    for job in (known, new):
        harness.settler.dead_letter(job, ID_CONFLICT, answer=ErrorCode.EXCEPTION)
    await harness.finish()
    assert await harness.replies("known", "new") == [ErrorCode.SUCCESS, ErrorCode.EXCEPTION]
    assert await harness.unacked() == 0
    assert await harness.databases.broker.run([("LLEN", DEAD_LETTERS)]) == [1]


@settler_test
async def test_a_subscriber_that_raises_keeps_no_request(harness: Harness) -> None:
    harness.broken = True
    for name in ("one", "two"):
        harness.settler.answer(await harness.sending(name), ErrorCode.SUCCESS, mark=True)
        await harness.finish()
    assert harness.settler.under_way == 0
    assert {job.request_id for job, _ in harness.settled} == {"one", "two"}
    assert await harness.unacked() == 0


@settler_test
async def test_a_store_that_cannot_be_asked_is_answered_only_where_a_reply_can_be_stored(harness: Harness) -> None:
    job = await harness.sending("one")
    harness.settler.store_unavailable(job)
    await harness.finish()
    [(_, error)] = harness.settled
    assert error is (None if harness.store.connection else ErrorCode.REDIS_ERR)
    # The question may have been executed all the same: the lease is given back.
    harness.settler.free_leases()
    await asyncio.sleep(0.05)
    await harness.finish()
    again = new_job("one", "one@example.com")
    again.tag = "another"
    again.validate()
    assert isinstance((await harness.store.issue([IssueRequest(again.claim, "123456")]))[0], Send)


@settler_test
async def test_a_reply_of_1_is_published_and_not_remembered(harness: Harness, redis_server: RedisServer) -> None:
    refused, sent = await harness.sending("one"), await harness.sending("two")
    with redis_server.client().pubsub() as heard:  # type: ignore[no-untyped-call]
        heard.psubscribe(reply_key("*"))
        assert heard.get_message(timeout=30)
        harness.settler.answer(refused, ErrorCode.REDIS_ERR, mark=False)
        harness.settler.answer(sent, ErrorCode.SUCCESS, mark=True)
        await harness.finish()
        published = [heard.get_message(timeout=30) for _ in range(2)]
    told = {each["channel"].decode(): read_reply(each["data"]).error for each in published if each}
    assert told == {reply_key("one"): ErrorCode.REDIS_ERR, reply_key("two"): ErrorCode.SUCCESS}
    assert await harness.databases.results.run([("EXISTS", reply_key("one"))]) == [0]
    assert await harness.replies("two") == [ErrorCode.SUCCESS]
    assert await harness.unacked() == 0
    assert {job.request_id: error for job, error in harness.settled}["one"] is ErrorCode.REDIS_ERR


# --- the commands ---


@settler_test
async def test_a_reply_of_1_that_cannot_be_published_loses_no_request(harness: Harness, redis: redis_py.Redis) -> None:
    job = await harness.sending("one")
    redis.execute_command("ACL", "SETUSER", "default", "resetchannels")  # type: ignore[no-untyped-call]
    try:
        harness.settler.answer(job, ErrorCode.REDIS_ERR, mark=False)
        await harness.finish()
    finally:
        redis.execute_command("ACL", "SETUSER", "default", "allchannels")  # type: ignore[no-untyped-call]
    assert await harness.databases.broker.run([("HLEN", UNACKED), ("HLEN", "verification.parked")]) == [0, 1]


def answers_of(answered: Sequence[tuple[Job, ErrorCode]], *, broker: int | None) -> Command:
    items = [Settlement(job, error, reply=True, ack=not job.through_celery) for job, error in answered]
    return answer_requests(items, broker=broker)


def execute(server: RedisServer, *commands: tuple[int, Command]) -> list[Any]:
    """Run commands, each in its database."""

    async def main() -> list[Any]:
        connections = RedisConnections()
        try:
            connection = connections.connection(server.url())
            found = await connection.run_all([(number, [command]) for number, command in commands])
        finally:
            await connections.close()
        return [answer for [answer] in found]

    return asyncio.run(main())


def test_each_reply_is_stored_and_published_and_the_first_one_stays(
    redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    success = ErrorCode.SUCCESS
    execute(redis_server, (0, answers_of([(new_job("two"), ErrorCode.TIMEOUT)], broker=None)))
    redis.lpush(reply_key("three"), "no reply")
    batch = [(new_job("one"), success), (new_job("two"), success), (new_job("three", "\ud800"), success)]
    with redis.pubsub() as heard:  # type: ignore[no-untyped-call]
        heard.psubscribe(reply_key("*"))
        assert heard.get_message(timeout=30)
        again = (new_job("one"), ErrorCode.EXCEPTION)
        assert execute(redis_server, (0, answers_of([*batch, again], broker=None))) == [[1, 0, 0, 0, 0]]
        published = [heard.get_message(timeout=30) for _ in range(4)]
    stored: dict[str, Any] = {name: redis.get(reply_key(name)) for name in ("one", "two", "three")}
    assert [read_reply(payload).error for payload in stored.values()] == [success, ErrorCode.TIMEOUT, success]
    assert [(each["channel"].decode(), each["data"]) for each in published if each] == [
        (reply_key(name), stored[name]) for name in ("one", "two", "three", "one")
    ]
    assert all(3500 < redis.ttl(reply_key(name)) <= 3600 for name in stored)


def test_a_reply_that_is_not_final_gives_way_to_a_stored_one(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    execute(redis_server, (0, answers_of([(new_job("one"), ErrorCode.SUCCESS)], broker=None)))
    passing = answers_of([(new_job(name), ErrorCode.REDIS_ERR) for name in ("one", "two")], broker=None)
    with redis.pubsub() as heard:  # type: ignore[no-untyped-call]
        heard.psubscribe(reply_key("*"))
        assert heard.get_message(timeout=30)
        assert execute(redis_server, (0, passing)) == [[0, 0, 0]]
        published = [heard.get_message(timeout=30) for _ in range(2)]
    assert [read_reply(each["data"]).error for each in published if each] == [ErrorCode.SUCCESS, ErrorCode.REDIS_ERR]
    assert not redis.exists(reply_key("two"))


def test_a_full_server_refuses_each_reply_of_a_batch_and_its_message_stays(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    server = new_redis_server()
    jobs = [new_job(name) for name in ("one", "two")]
    with server.client() as client:
        client.hset(UNACKED, mapping={job.tag: "message" for job in jobs})
        client.config_set("maxmemory", 1)
        [answer] = execute(server, (2, answers_of([(job, ErrorCode.SUCCESS) for job in jobs], broker=0)))
        assert [isinstance(entry, ServerError) for entry in answer] == [True, True, False]
        assert client.hlen(UNACKED) == 2
    with server.client(2) as client:
        assert client.dbsize() == 0


def test_on_a_full_server_a_worker_keeps_what_it_holds_and_shows_that_it_lives(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    server, queue = new_redis_server(), RequestQueue(QUEUE, visibility_timeout=15)
    with server.client() as client:
        client.zadd(INDEX, {"held": 1.0})
        maintain = queue.maintain(["held"], restore=False, relay_healthy=True)
        for maxmemory, refusal in ((0, ""), (1, "OOM")):
            client.config_set("maxmemory", maxmemory)
            before, _ = cast(tuple[int, int], client.time())
            [answer] = execute(server, (0, maintain))
            assert queue.read_maintain(answer).refusal == refusal
            assert float(client.zscore(INDEX, "held")) >= before
            assert client.zcount(f"{QUEUE}.workers", before, "+inf") == 1
            time.sleep(1)


@pytest.mark.parametrize(("set_forward", "restored"), [(0, 1), (2, 1), (5, 0), (3600, 0), (-3600, 1)])
def test_no_worker_looks_dead_because_the_servers_clock_was_set_forward(
    redis: redis_py.Redis, redis_server: RedisServer, set_forward: float, restored: int
) -> None:
    now, _ = redis.time()
    redis.hset(UNACKED, "held", f'[{{}},"","{QUEUE}"]')
    redis.zadd(INDEX, {"held": now - 17})
    queue = RequestQueue(QUEUE, visibility_timeout=16)
    maintain = queue.maintain([], restore=True, relay_healthy=True, redis_time=now - set_forward)
    [answer] = execute(redis_server, (0, maintain))
    assert queue.read_maintain(answer).restored == restored


@pytest.mark.parametrize("refused", [[], ["two"], ["one", "two", "three"]])
def test_a_message_is_removed_only_if_its_reply_was_taken(
    refused: list[str], redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    jobs = [new_job(name) for name in ("one", "two", "three", "celerys")]
    jobs[3].through_celery = True
    for job in jobs:
        redis.hset(UNACKED, job.tag, "message")
        redis.zadd(INDEX, {job.tag: 1.0})
    # Of these the channel may not be used: the reply is stored and not published.
    channels = [f"&{reply_key(job.request_id)}" for job in jobs if job.request_id not in refused]
    redis.execute_command("ACL", "SETUSER", "default", "resetchannels", *channels)  # type: ignore[no-untyped-call]
    try:
        answer = answers_of([(job, ErrorCode.SUCCESS) for job in jobs], broker=0)
        [[*found, removed]] = execute(redis_server, (2, answer))
    finally:
        redis.execute_command("ACL", "SETUSER", "default", "allchannels")  # type: ignore[no-untyped-call]
    assert [isinstance(entry, ServerError) for entry in found] == [job.request_id in refused for job in jobs]
    assert removed == 1
    left = sorted(f"tag-{name}" for name in [*refused, "celerys"])
    tags, index = execute(redis_server, (0, ("HKEYS", UNACKED)), (0, ("ZRANGE", INDEX, 0, -1)))
    assert sorted(tag.decode() for tag in tags) == sorted(tag.decode() for tag in index) == left


def test_a_message_that_cannot_be_removed_is_known_beside_the_replies(
    redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    redis.set(UNACKED, "no hash")
    answer = answers_of([(new_job("one"), ErrorCode.SUCCESS)], broker=0)

    async def main() -> list[Any]:
        async with RedisConnections() as connections:
            # Twice in one batch: after an error, too, the script comes back to its connection's database.
            return await connections.connection(redis_server.url()).run([answer, answer], database=2)

    (first, refusal), (second, _) = asyncio.run(main())
    assert isinstance(refusal, ServerError)
    assert [first, second] == [1, 0]
    with redis_server.client(2) as results:
        assert results.keys() == [reply_key("one").encode()]


@settler_test
async def test_a_message_that_cannot_be_removed_is_removed_later(harness: Harness, redis_server: RedisServer) -> None:
    job = await harness.sending("one")
    databases = harness.databases
    with (
        redis_server.client(databases.broker.number) as broker,
        redis_server.client().pubsub() as heard,  # type: ignore[no-untyped-call]
    ):
        broker.rename(UNACKED, "aside")
        broker.set(UNACKED, "no hash")
        heard.subscribe(reply_key("one"))
        assert heard.get_message(timeout=30)
        harness.settler.answer(job, ErrorCode.SUCCESS, mark=True)
        assert await asyncio.to_thread(heard.get_message, timeout=30)
        await databases.results.run([("DEL", reply_key("one"))])  # its reader has it
        broker.rename("aside", UNACKED)
    await harness.finish()
    assert await harness.unacked() == 0
    assert await databases.results.run([("EXISTS", reply_key("one"))]) == [0]


def test_messages_are_removed_by_their_tags(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    for name in ("one", "two"):
        redis.hset(UNACKED, name, "message")
        redis.zadd(INDEX, {name: 1.0})
    execute(redis_server, (0, RequestQueue.ack(["one", "two"])))
    assert not redis.exists(UNACKED, INDEX)

"""Replies and acks of many requests in one call each, on a real server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis as redis_py
from support.redis_server import RedisServer
from support.store_driver import is_error, run

from producer.contract import ErrorCode, VerifyRequest, read_reply, reply_key
from worker.job import Job
from worker.queue.commands import INDEX, UNACKED, RequestQueue
from worker.settler import store_replies


def item(
    request_id: str, email: object = "anna@example.com", error: ErrorCode = ErrorCode.SUCCESS
) -> tuple[Job, ErrorCode]:
    """A request and its answer."""
    return Job(request_id, f"tag-{request_id}", VerifyRequest(email), None, None), error


def test_each_reply_of_a_batch_is_stored_and_published_and_the_first_one_stands(redis: redis_py.Redis) -> None:
    run(redis, store_replies([item("two", error=ErrorCode.TIMEOUT)]))
    redis.lpush(reply_key("three"), "no reply")
    with redis.pubsub() as heard:  # type: ignore[no-untyped-call]
        heard.psubscribe(reply_key("*"))
        assert heard.get_message(timeout=5)
        batch = [item("one"), item("two"), item("three", "\ud800"), item("one", error=ErrorCode.EXCEPTION)]
        assert run(redis, store_replies(batch)) == [1, 0, 0, 0]
        published = [heard.get_message(timeout=5) for _ in batch]
    stored = {request_id: redis.get(reply_key(request_id)) for request_id in ("one", "two", "three")}
    assert [read_reply(stored[each]).error for each in stored] == [0, ErrorCode.TIMEOUT, 0]  # type: ignore[arg-type]
    assert [(each["channel"].decode(), each["data"]) for each in published if each] == [
        (reply_key(request_id), stored[request_id]) for request_id in ("one", "two", "three", "one")
    ]
    assert all(3590 < redis.ttl(reply_key(request_id)) <= 3600 for request_id in stored)


def test_a_full_server_stores_no_reply_and_says_so_of_each(new_redis_server: Callable[..., RedisServer]) -> None:
    with new_redis_server().client() as client:
        run(client, store_replies([item("known")]))
        client.config_set("maxmemory", 1)
        one, known, two = run(client, store_replies([item("one"), item("known"), item("two")]))
        assert [is_error(entry) for entry in (one, known, two)] == [True, True, True]
        assert client.dbsize() == 1


@pytest.mark.parametrize("stored", [["one", "two", "three"], ["one", "three"], ["two"], []])
def test_of_a_batch_those_are_acked_whose_reply_is_stored(stored: list[str], redis_server: RedisServer) -> None:
    ids = ["one", "two", "three"]
    with redis_server.client(1) as broker, redis_server.client(2) as results:
        broker.flushall()
        for request_id in ids:
            broker.hset(UNACKED, request_id, "message")
            broker.zadd(INDEX, {request_id: 1.0})
        for request_id in stored:
            results.set(reply_key(request_id), "a reply", ex=60)
        ack = RequestQueue("verification", visibility_timeout=15).ack_if_stored(
            ids, [reply_key(request_id) for request_id in ids], broker=1, results=2
        )
        assert run(broker, ack) == 3 - len(stored)
        left = sorted(set(ids) - set(stored))
        assert sorted(key.decode() for key in broker.hkeys(UNACKED)) == left
        assert sorted(tag.decode() for tag in broker.zrange(INDEX, 0, -1)) == left
        assert run(broker, RequestQueue.ack(ids)) == 0
        assert not broker.exists(UNACKED, INDEX)

"""A message larger than 64 kB is dead-lettered, cut, wherever it lies: nothing decodes it, no worker receives it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from support.caller import QUEUE, address, message
from support.fake_worker import settings
from support.process import eventually
from support.redis_server import RedisServer
from support.rig import NewRig, Rig
from support.smtp_server import Held

from producer.address import MAX_GIVEN
from producer.aio import AsyncVerificationClient
from producer.contract import LARGEST_MESSAGE, LONGEST_CLIENT, LONGEST_ID, LONGEST_LOCALE, VerifyRequest, stamp

DEAD = "verification.dead"
LARGE = 300_000  # bytes


def large(request_id: str | None = None, size: int = LARGE, **changes: Any) -> bytes:
    """A sound message of our task with a long argument; as in all of ours, the headers come after the body."""
    kwargs = {"email": address(), "extra": "x" * (size * 3 // 4)}
    return json.dumps(message(kwargs, request_id=request_id, **changes)).encode()


def letters(rig: Rig) -> list[dict[str, Any]]:
    return [json.loads(each.decode("utf-8", "surrogateescape")) for each in rig.dead_letters()]


def assert_cut(rig: Rig, raw: bytes, request_id: str | None) -> None:
    """The one dead letter is that of `raw`, and the caller, if known, is answered 2."""
    eventually(lambda: rig.broker.llen(DEAD) == 1)
    [letter] = letters(rig)
    assert (letter["code"], letter["reason"]) == ("too_large", "larger than 65536 bytes")
    assert (letter["message"].encode(), letter["size"]) == (raw[:1024], len(raw))
    assert letter.get("id") == request_id
    if request_id is not None:
        assert rig.caller.reply(request_id) == {"email": None, "error": 2}
    rig.settled()


def on_the_queue(rig: Rig, raw: bytes) -> None:
    rig.broker.lpush(QUEUE, raw)


def at_low_priority(rig: Rig, raw: bytes) -> None:
    rig.broker.lpush(f"{QUEUE}\x06\x169", raw)
    rig.caller.ask(address())  # the worker looks there when it looks at the queue


def among_the_suspects(rig: Rig, raw: bytes) -> None:
    rig.broker.lpush(f"{QUEUE}.suspects", raw)


def delayed(rig: Rig, raw: bytes) -> None:
    with rig.broker.pipeline() as pipe:
        pipe.hset(f"{QUEUE}.parked", "some-id", b"1:0 " + raw)
        pipe.zadd(f"{QUEUE}.parked.due", {"some-id": 0})
        pipe.execute()


def left_behind_by_kombu(rig: Rig, raw: bytes) -> None:
    """As a consumer with stock kombu that died leaves it."""
    with rig.broker.pipeline() as pipe:
        pipe.hset("unacked", "some-tag", b"[" + raw + b', "", "verification"]')
        pipe.zadd("unacked_index", {"some-tag": 1})
        pipe.execute()


PLACES = (on_the_queue, at_low_priority, among_the_suspects, delayed, left_behind_by_kombu)


@pytest.mark.parametrize("put", PLACES)
def test_a_large_message_is_dead_lettered_cut_and_its_caller_answered(
    rig: Rig, put: Callable[[Rig, bytes], None]
) -> None:
    rig.broker.delete(DEAD)
    request_id = str(uuid.uuid4())
    raw = large(request_id)
    put(rig, raw)
    assert_cut(rig, raw, request_id)
    assert [meta["status"] for meta in rig.caller.published(request_id)] == ["SUCCESS"]
    assert rig.caller.ask(address())["error"] == 0


def test_no_worker_receives_a_large_message(rig: Rig) -> None:
    rig.broker.delete(DEAD)
    size = 2_000_000

    def sent() -> int:
        """Bytes that Redis has sent to anybody."""
        return int(rig.broker.info("stats")["total_net_output_bytes"])

    before = sent()
    on_the_queue(rig, large(size=size))
    ids = rig.caller.request_all(*(address() for _ in range(20)))
    on_the_queue(rig, large(size=size))
    assert rig.caller.replies(ids) == [0] * 20
    eventually(lambda: rig.broker.llen(DEAD) == 2)
    assert sent() - before < size


@pytest.mark.slow
def test_a_message_of_80_megabytes_costs_other_callers_nothing(new_rig: NewRig) -> None:
    rig = new_rig()
    rig.add_workers(2)
    request_id = str(uuid.uuid4())
    raw = large(request_id, size=80_000_000)
    first = rig.caller.request_all(*(address() for _ in range(16)))
    on_the_queue(rig, raw)
    ids = first + rig.caller.request_all(*(address() for _ in range(16)))
    assert rig.caller.replies(ids) == [0] * 32
    assert_cut(rig, raw, request_id)
    assert len(rig.alive) == 2
    assert "Traceback" not in "".join(worker.log for worker in rig.workers)


def headers_first(request_id: str) -> bytes:
    sound = message({"email": address()}, request_id=request_id)
    return json.dumps({"headers": sound.pop("headers"), **sound, "more": "x" * LARGE}).encode()


def long_header(request_id: str) -> bytes:
    return json.dumps(message({"email": address()}, request_id=request_id, headers={"argsrepr": "x" * LARGE})).encode()


@pytest.mark.parametrize("made", [headers_first, long_header])
def test_the_request_id_is_found_at_either_end(rig: Rig, made: Callable[[str], bytes]) -> None:
    rig.broker.delete(DEAD)
    request_id = str(uuid.uuid4())
    raw = made(request_id)
    on_the_queue(rig, raw)
    assert_cut(rig, raw, request_id)


def named(headers: dict[str, Any]) -> bytes:
    return json.dumps({"body": "x" * LARGE, "headers": headers}).encode()


TASK = {"task": "verification.send_code"}


@pytest.mark.parametrize(
    "raw",
    [
        b"x" * LARGE,
        b"\xff" * LARGE,
        b'{"headers": ' * (LARGE // 10),
        named({**TASK, "root_id": "a-stranger"}),
        named({"task": "other.task", "id": "a-stranger"}),
        named({**TASK, "kwargsrepr": '{"id": "a-stranger"}'}),
        named({**TASK, "id": "a-stranger" * 30}),
        named({**TASK, "id": 5}),
        json.dumps({"id": "a-stranger", "body": "x" * LARGE, **TASK}).encode(),
        named({**TASK, "id": "XX"}).replace(b"XX", b"\xff"),
    ],
    ids=lambda raw: repr(raw[-60:]),
)
def test_a_large_message_without_an_id_of_our_task_answers_nobody(rig: Rig, raw: bytes) -> None:
    rig.broker.delete(DEAD)
    rig.results.flushdb()
    on_the_queue(rig, raw)
    eventually(lambda: rig.broker.llen(DEAD) == 1)
    assert rig.caller.ask(address())["error"] == 0
    rig.settled()
    assert rig.results.dbsize() == 1


def test_a_large_message_with_another_requests_id_changes_nothing(rig: Rig) -> None:
    rig.broker.delete(DEAD)
    held, email = Held("250 2.0.0 ok"), address()
    rig.script(email, dot=[held])
    [sending] = rig.caller.request_all(email)
    eventually(lambda: rig.dotted_to(email))
    [answered] = rig.caller.request_all(address())
    assert rig.caller.reply(answered)["error"] == 0
    for request_id in (sending, answered):
        on_the_queue(rig, large(request_id))
    eventually(lambda: rig.broker.llen(DEAD) == 2)
    assert rig.caller.ask(address())["error"] == 0
    assert rig.caller.stored(sending) is None
    held.release.set()
    assert rig.caller.replies([sending, answered]) == [0, 0]
    assert {meta["result"]["error"] for each in (sending, answered) for meta in rig.caller.published(each)} == {0}


def test_a_crowd_of_large_messages_does_not_stop_the_small_ones(rig: Rig) -> None:
    rig.broker.delete(DEAD)
    ids = []
    for _ in range(30):
        rig.broker.lpush(QUEUE, *[large(size=70_000)] * 3)
        ids += rig.caller.request_all(*(address() for _ in range(3)))
    assert rig.caller.replies(ids) == [0] * 90
    eventually(lambda: rig.broker.llen(DEAD) == 90)


def test_our_clients_refuse_what_no_worker_would_read(redis_server: RedisServer) -> None:
    async def enqueue(email: object) -> str:
        async with AsyncVerificationClient(settings(redis_server)) as client:
            return await client.enqueue(email)

    with pytest.raises(ValueError, match=f"{LARGEST_MESSAGE} are allowed"):
        asyncio.run(enqueue(["x" * LARGEST_MESSAGE]))
    with pytest.raises(ValueError, match=f"at most {MAX_GIVEN} characters"):
        asyncio.run(enqueue(f"{' ' * MAX_GIVEN}a@example.com"))  # the reply would repeat it


def test_the_largest_message_of_our_clients_is_as_large_as_the_docs_say() -> None:
    email = "\N{LATIN SMALL LETTER E WITH ACUTE}" * 122 + "@example.com"  # 256 bytes, at 6 for each letter
    wide = "\U0001f600"
    request = VerifyRequest(email, "p" * 32, wide * LONGEST_LOCALE, wide * LONGEST_CLIENT)
    trace = {"traceparent": "0" * 55, "tracestate": "s" * 512}
    [raw] = stamp([request.message(wide * (LONGEST_ID // 4), queue=QUEUE, trace=trace)], time.time())
    assert 6000 < len(raw) <= 6200

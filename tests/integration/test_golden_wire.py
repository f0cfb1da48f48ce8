"""Workers answer the golden wire files as they say; our clients and Celery's write what they say."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any, Final

import pytest
import redis
from celery import Celery
from support import golden
from support.caller import TASK, address
from support.golden import Blanks
from support.redis_server import RedisServer
from support.rig import Rig, code_in

from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient
from producer.contract import ErrorCode, Reply, VerifyRequest, read_reply, stamp
from producer.settings import Settings

MESSAGES: Final = golden.files("push")
REPLIES: Final = golden.files("stored")
ANSWERED: Final = {name: file for name, file in MESSAGES.items() if "dead" not in file["expect"]}
DEAD_LETTERED: Final = {name: file for name, file in MESSAGES.items() if "dead" in file["expect"]}
TIMEOUT: Final = 60.0  # seconds


def test_each_file_describes_itself_and_what_must_happen() -> None:
    assert len(ANSWERED) + len(DEAD_LETTERED) == len(MESSAGES)
    assert len(MESSAGES) + len(REPLIES) == len(list(golden.DIRECTORY.glob("*.json")))
    for file in (*MESSAGES.values(), *REPLIES.values()):
        assert set(file) - {"bytes"} in ({"what", "push", "expect"}, {"what", "stored", "read"})
        assert file["what"].endswith(".")
        assert set(file.get("expect", {})) <= {"reply", "key", "dead"}


def pushed(rig: Rig, name: str, blanks: Blanks) -> bytes:
    """Push a golden message; returns the bytes pushed."""
    raw = golden.raw(MESSAGES[name], blanks)
    rig.broker.lpush("verification", raw)
    return raw


def answered(rig: Rig, name: str, blanks: Blanks) -> Any:
    """Push a golden message as the contract says (SUBSCRIBE, LPUSH, GET); returns the stored reply."""
    key = f"celery-task-meta-{blanks.uuid}"
    with rig.results.pubsub() as subscription:  # type: ignore[no-untyped-call]
        subscription.subscribe(key)
        assert subscription.get_message(timeout=TIMEOUT)["type"] == "subscribe"
        pushed(rig, name, blanks)
        payload = rig.results.get(key)
        deadline = time.monotonic() + TIMEOUT
        while payload is None:
            assert time.monotonic() < deadline, "no reply"
            published = subscription.get_message(timeout=0.5)
            payload = published and published["data"]
    assert rig.results.get(key) == payload
    assert isinstance(payload, bytes)
    return json.loads(payload)


@pytest.mark.parametrize("name", ANSWERED)
def test_a_worker_answers_a_golden_message_as_the_file_says(rig: Rig, name: str) -> None:
    blanks = Blanks(address())
    expect = ANSWERED[name]["expect"]
    stored = answered(rig, name, blanks)
    blanks.assert_equal(expect["reply"], stored["result"])
    mails = rig.mails_to(blanks.email)
    if expect["reply"]["error"] != 0:
        assert mails == []
        return
    [mail] = mails
    code = rig.codes.get(blanks.fill(expect.get("key", "code_<email>")))
    assert code == code_in(mail).encode()


@pytest.mark.parametrize("name", DEAD_LETTERED)
def test_an_unreadable_golden_message_is_dead_lettered(rig: Rig, name: str) -> None:
    blanks = Blanks(address())
    rig.broker.delete("verification.dead")
    expect = DEAD_LETTERED[name]["expect"]
    raw = pushed(rig, name, blanks)
    found = rig.broker.brpop(["verification.dead"], timeout=TIMEOUT)
    assert found is not None
    letter = json.loads(found[1])
    assert letter["reason"] == expect["dead"]
    if "reply" in expect:
        assert (letter["message"].encode(), letter["size"], letter["id"]) == (raw[:1024], len(raw), blanks.uuid)
        blanks.assert_equal(expect["reply"], rig.caller.reply(blanks.uuid))
    else:
        assert letter["message"].encode() == raw
        assert rig.results.exists(f"celery-task-meta-{blanks.uuid}") == 0
    assert rig.mails_to(blanks.email) == []
    assert rig.caller.ask(address())["error"] == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [("reply-success", "minimal"), ("reply-invalid-address", "bad-address"), ("reply-timeout", "expired")],
)
def test_a_worker_stores_the_golden_reply(rig: Rig, reply: str, message: str) -> None:
    blanks = Blanks(address())
    blanks.assert_equal(REPLIES[reply]["stored"], answered(rig, message, blanks))


@pytest.mark.parametrize("name", REPLIES)
def test_our_clients_read_a_golden_reply_as_the_file_says(name: str) -> None:
    blanks = Blanks(address())
    read = blanks.fill(REPLIES[name]["read"])
    payload = json.dumps(blanks.fill(REPLIES[name]["stored"]))
    assert read_reply(payload) == Reply(read["email"], ErrorCode(read["error"]))


REQUESTS: Final = {
    "client": VerifyRequest("a@example.com"),
    "client-purpose": VerifyRequest("a@example.com", "login", "en"),
    "client-end-user": VerifyRequest("a@example.com", client="5f2c1d"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_our_message_equals_the_golden_message(name: str) -> None:
    [message] = stamp([REQUESTS[name].message("an id")], time.time())
    Blanks("a@example.com", "an id").assert_equal(MESSAGES[name]["push"], json.loads(message))


@pytest.fixture
def written(redis: redis.Redis, redis_server: RedisServer) -> Any:
    """Takes the one message off the queue; no worker is running."""

    def take() -> Any:
        with redis_server.client(1) as broker:
            [raw] = broker.lrange("verification", 0, -1)
            broker.delete("verification")
        return json.loads(raw)

    assert redis.dbsize() == 0
    return take


@pytest.mark.parametrize("name", REQUESTS)
def test_our_clients_push_the_golden_message(written: Any, redis_server: RedisServer, name: str) -> None:
    settings, request = Settings(redis_url=redis_server.url()), REQUESTS[name]
    request_id = str(uuid.uuid4())
    blanks = Blanks(request.email, request_id)
    options = {"purpose": request.purpose, "locale": request.locale, "client": request.client}
    with VerificationClient(settings) as client:
        client.enqueue(request.email, request_id=request_id, **options)
    blanks.assert_equal(MESSAGES[name]["push"], written())

    async def enqueue() -> None:
        async with AsyncVerificationClient(settings) as client:
            await client.enqueue(request.email, request_id=request_id, **options)

    asyncio.run(enqueue())
    blanks.assert_equal(MESSAGES[name]["push"], written())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("celery", {"kwargs": {"email": "a@example.com"}}),
        ("celery-arguments", {"args": ["a@example.com", "login"], "expires": 60}),
    ],
)
def test_celery_pushes_the_golden_message(
    written: Any, redis_server: RedisServer, name: str, options: dict[str, Any]
) -> None:
    app = Celery("caller", set_as_current=False)
    app.config_from_object(
        {
            "broker_url": redis_server.url(1),
            "broker_transport": "kombu.transport.redis:Transport",
            "result_backend": redis_server.url(2),
            "task_routes": {TASK: {"queue": "verification"}},
        }
    )
    with app:
        result = app.send_task(TASK, **options)
        Blanks("a@example.com", result.id).assert_equal(MESSAGES[name]["push"], written())

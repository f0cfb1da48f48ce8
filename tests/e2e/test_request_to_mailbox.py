"""One request from a plain Redis client to an SMTP server, through a worker with default settings."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Iterator

import pytest
import redis
from support.caller import address
from support.process import eventually
from support.redis_server import RedisServer
from support.rig import parsed
from support.smtp_server import ScriptedServer, running
from support.worker_process import WorkerProcess


@pytest.fixture(scope="module")
def relay() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as relay:
        yield relay


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def worker(server: RedisServer, relay: ScriptedServer) -> Iterator[WorkerProcess]:
    """A worker that knows only where Redis and the relay are, with its metrics on a free port."""
    settings = {
        "VERIFY_REDIS_URL": server.url(),
        "VERIFY_RELAYS": f"smtp://127.0.0.1:{relay.port}",
        "VERIFY_METRICS_BIND": "127.0.0.1:0",
    }
    with WorkerProcess(settings) as worker:
        yield worker


def envelope(body: str, request_id: str) -> str:
    """The minimal message of the contract."""
    headers = f'{{"task": "verification.send_code", "id": "{request_id}"}}'
    delivery = '{"exchange": "", "routing_key": "verification"}'
    properties = f'{{"delivery_tag": "{uuid.uuid4()}", "body_encoding": "base64", "delivery_info": {delivery}}}'
    return (
        f'{{"body": "{body}", "content-type": "application/json", "content-encoding": "utf-8",'
        f' "headers": {headers}, "properties": {properties}}}'
    )


def subscribe(client: redis.Redis, channel: str) -> redis.client.PubSub:
    pubsub: redis.client.PubSub = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    pubsub.subscribe(channel)
    pubsub.get_message(timeout=60)
    return pubsub


def without_times(log: str) -> str:
    """The log without its timestamps, whose microseconds are six digits too."""
    return re.sub(r'"timestamp": "[^"]*"', "", log)


def test_a_raw_message_becomes_a_mail_and_no_log_shows_code_or_address(
    server: RedisServer, relay: ScriptedServer, worker: WorkerProcess
) -> None:
    codes, broker, results = (server.client(number) for number in range(3))
    email, request_id = address("alice"), str(uuid.uuid4())
    body = base64.b64encode(json.dumps([[], {"email": email}, {}]).encode()).decode()
    key = f"celery-task-meta-{request_id}"
    pubsub = subscribe(results, key)

    broker.lpush("verification", envelope(body, request_id))

    published = pubsub.get_message(timeout=60)
    stored = results.get(key)
    assert published is not None
    assert published["data"] == stored
    meta = json.loads(stored)  # type: ignore[arg-type]
    assert meta["status"] == "SUCCESS"
    assert meta["result"] == {"email": email, "error": 0}
    assert type(meta["result"]["error"]) is int
    assert meta["task_id"] == request_id
    assert {"traceback", "children", "date_done"} <= set(meta)
    assert 3500 <= results.ttl(key) <= 3600

    code = codes.get(f"code_{email}")
    assert isinstance(code, bytes)
    assert re.fullmatch(rb"[0-9]{6}", code)
    assert 500 <= codes.ttl(f"code_{email}") <= 600

    [mail] = relay.mails
    assert (mail.sender, mail.recipient) == ("no-reply@example.com", email)
    message = parsed(mail)
    assert message["To"] == email
    assert "验证码" in message["Subject"]
    for kind in ("plain", "html"):
        part = message.get_body((kind,))
        assert part is not None
        assert code.decode() in part.get_content()

    said = without_times(worker.log)
    for secret in (code.decode(), email, body, base64.b64encode(email.encode()).decode().rstrip("=")):
        assert secret not in said


def test_the_broker_is_left_empty_and_every_key_has_a_ttl(server: RedisServer, worker: WorkerProcess) -> None:
    assert worker.alive
    codes, broker, results = (server.client(number) for number in range(3))
    leftovers = ["verification", "unacked", "unacked_index", "verification.parked", "verification.dead"]
    eventually(lambda: broker.exists(*leftovers) == 0)
    for client in (codes, results):
        assert [key for key in client.scan_iter() if client.ttl(key) == -1] == []


def test_a_second_request_within_the_cooldown_sends_no_second_mail(
    server: RedisServer, relay: ScriptedServer, worker: WorkerProcess
) -> None:
    assert worker.alive
    codes, broker, results = (server.client(number) for number in range(3))
    email = address("again")
    body = base64.b64encode(json.dumps([[], {"email": email}, {}]).encode()).decode()
    seen = []
    for request_id in (str(uuid.uuid4()), str(uuid.uuid4())):
        pubsub = subscribe(results, f"celery-task-meta-{request_id}")
        broker.lpush("verification", envelope(body, request_id))
        published = pubsub.get_message(timeout=60)
        assert published is not None
        assert json.loads(published["data"])["result"]["error"] == 0
        seen.append(codes.get(f"code_{email}"))
    assert seen[0] == seen[1] is not None
    assert [mail.recipient for mail in relay.mails].count(email) == 1

"""`python -m worker erase` removes all that is kept about an address, and nothing else, while the service goes on."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from support.caller import META, QUEUE, Load, address, message
from support.fake_worker import settings
from support.process import eventually
from support.rig import NewRig, Rig
from support.smtp_server import Held
from typer.testing import CliRunner, Result

from producer.client import VerificationClient
from worker.cli import app

Erase = Callable[..., Result]


@pytest.fixture
def erase(monkeypatch: pytest.MonkeyPatch) -> Erase:
    """Runs the command in this process."""

    def run(rig: Rig, *arguments: str) -> Result:
        for name, value in rig.settings.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(app, ["erase", *arguments])

    return run


def everything(rig: Rig) -> list[str]:
    """Each key of the three databases with what it holds, base64 decoded."""
    found = []
    clients: list[Any] = [rig.codes, rig.broker, rig.results]
    for client in clients:
        for key in client.scan_iter():
            reads: dict[bytes, Callable[[], Any]] = {
                b"string": partial(client.get, key),
                b"hash": partial(client.hgetall, key),
                b"set": partial(client.smembers, key),
                b"list": partial(client.lrange, key, 0, -1),
                b"zset": partial(client.zrange, key, 0, -1),
                b"none": lambda: "",  # it has expired
            }
            text = f"{key} {reads[client.type(key)]()}"
            for run in re.findall(r"[A-Za-z0-9+/]{16,}", text):
                text += base64.b64decode(run[: len(run) // 4 * 4]).decode("latin-1")
            found.append(text)
    return found


def holding(rig: Rig, part: str) -> list[str]:
    return [text for text in everything(rig) if part.lower() in text.lower()]


def counts(done: Result) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"(?m)^(.+): (\d+) removed$", done.output)}


NOTHING = {
    "queued requests": 0,
    "delayed requests": 0,
    "dead letters": 0,
    "codes": 0,
    "counts and limits": 0,
    "request records": 0,
    "replies": 0,
}


def test_everything_about_an_address_goes_and_nothing_else(rig: Rig, erase: Erase) -> None:
    part = f"u*{uuid.uuid4().hex[:8]}"
    email, spelt = f"{part}@example.com", f" {part.upper()}@Example.COM "
    others = [f"x{email}", f"{email}.cn", f"u{part[2:]}@example.com", f"{part}+tag@example.com"]
    with VerificationClient(settings(rig.server)) as client:
        for each in (email, spelt, *others):
            assert rig.caller.ask(each)["error"] == 0
            client.check(each, "wrong")
    deleted = rig.caller.request(email, purpose="login", client="a-client")
    assert rig.caller.reply(deleted)["error"] == 0
    rig.settled()
    rig.results.delete(META + deleted)  # as its reader may do
    named = rig.caller.push(message({"email": address()}, request_id=f"{uuid.uuid4()}:{email}"))[0]
    assert rig.caller.reply(named)["error"] == 0
    rig.caller.push(message({"email": email}, headers={"eta": "2100-01-01T00:00:00"}))
    rig.caller.push(message({"email": email}, headers={"task": "other"}))
    rig.caller.push(message({"email": spelt}, headers={"eta": "soon"}))
    rig.broker.lpush(QUEUE, f"no JSON, but {email} is in it", json.dumps(message({"email": email, "x": "x" * 70_000})))
    rig.broker.lpush(QUEUE, f"no JSON, but {others[0]} is in it")
    eventually(lambda: rig.broker.llen("verification.dead") == 5 and rig.broker.hlen("verification.parked") == 1)
    before = {each: len(holding(rig, each)) for each in others}

    done = erase(rig, email)
    assert done.exit_code == 0, done.output
    removed = counts(done)
    assert removed["delayed requests"] == 1
    assert removed["dead letters"] == 4
    assert removed["codes"] == 3
    assert removed["replies"] == 3
    assert removed["request records"] == 4
    assert removed["counts and limits"] > 3
    left = [text for text in holding(rig, email) if not any(each in text for each in others)]
    assert left == []
    assert {each: len(holding(rig, each)) for each in others} == before
    assert counts(erase(rig, email)) == NOTHING
    assert rig.caller.ask(email)["error"] == 0


def test_a_refused_mailbox_is_forgotten(rig: Rig, erase: Erase) -> None:
    email = address()
    assert rig.caller.ask(address())["error"] == 0
    rig.script(email, rcpt="550 5.1.1 no such user")
    assert rig.caller.ask(email)["error"] == 5
    assert holding(rig, f"suppressed:{email}")
    assert erase(rig, email.upper()).exit_code == 0
    assert holding(rig, email) == []


def test_requests_that_wait_are_removed_and_answered_6(new_rig: NewRig, erase: Erase) -> None:
    rig = new_rig()
    email, other = address(), address("other")
    waiting = [message({"email": each}) for each in (email, other) * 120]
    rig.caller.push(*waiting)
    low, suspect, delayed, joined = (message({"email": email}) for _ in range(4))
    rig.broker.lpush(f"{QUEUE}\x06\x169", json.dumps(low))
    rig.broker.lpush(f"{QUEUE}.suspects", json.dumps(suspect))
    for each, key in ((delayed, "due"), (joined, "ready")):
        request_id = each["headers"]["id"]
        rig.broker.hset(f"{QUEUE}.parked", request_id, f"1:0 {json.dumps(each)}")
        rig.broker.zadd(f"{QUEUE}.parked.{key}", {request_id: time.time() * 2000})
    asked = [*waiting[::2], low, suspect, delayed, joined]

    done = erase(rig, email)
    assert (done.exit_code, counts(done)) == (0, NOTHING | {"queued requests": 122, "delayed requests": 2})
    assert rig.held() == {"queue": 120}
    assert [json.loads(each) for each in rig.broker.lrange(QUEUE, 0, -1)] == waiting[1::2][::-1]
    answers = {meta["task_id"]: meta["result"] for meta in rig.caller.published()}
    assert answers == {each["headers"]["id"]: {"email": email, "error": 6} for each in asked}
    assert rig.results.dbsize() == 0
    assert holding(rig, email) == []
    rig.broker.delete(QUEUE)


def test_what_a_worker_holds_is_finished_first(rig: Rig, erase: Erase) -> None:
    held, email = Held("250 2.0.0 ok"), address()
    rig.script(email, dot=[held])
    [request_id] = rig.caller.request_all(email)
    assert held.reached.wait(60)
    done = erase(rig, email, "--wait", "0")
    assert done.exit_code == 3
    assert "left: 1 (requests in hand)" in done.output
    assert rig.codes.exists(f"request:{request_id}", f"sending:code_{email}") == 2
    with ThreadPoolExecutor(1) as thread:
        erasing = thread.submit(erase, rig, email)
        threading.Timer(0.5, held.release.set).start()
        done = erasing.result(60)
    assert done.exit_code == 0, done.output
    assert [meta["result"]["error"] for meta in rig.caller.published(request_id)] == [0]
    assert holding(rig, email) == []
    assert rig.codes.exists(f"request:{request_id}") == 0


def test_the_service_goes_on_meanwhile(rig: Rig, erase: Erase) -> None:
    email = address()
    assert rig.caller.ask(email)["error"] == 0
    with Load(rig.caller, a_second=100) as load:
        eventually(lambda: len(load.ids) > 20)
        for _ in range(3):
            assert erase(rig, email).exit_code == 0
    assert set(rig.caller.replies(load.ids)) == {0}
    assert holding(rig, email) == []


def test_a_text_that_is_no_address_is_erased_as_it_is(rig: Rig, erase: Erase) -> None:
    rig.codes.set("code_nobody", "old", ex=60)
    rig.codes.set("code_Nobody", "old", ex=60)
    assert rig.caller.ask("nobody")["error"] == 3
    assert counts(erase(rig, "nobody")) == NOTHING | {"codes": 1, "replies": 1, "request records": 1}
    assert rig.codes.delete("code_Nobody") == 1


@pytest.mark.parametrize("given", ["<EMAIL>", "to EMAIL", ["EMAIL"], {"EMAIL": 1}, [{"to": "EMAIL"}]], ids=str)
def test_an_address_within_something_else_is_found(given: Any, rig: Rig, erase: Erase) -> None:
    email = f"{address()[:-12]}.\N{GRINNING FACE}@example.com"
    request_id = rig.caller.request(json.loads(json.dumps(given).replace("EMAIL", email)))
    assert rig.caller.reply(request_id)["error"] == 3
    rig.settled()
    assert counts(erase(rig, email)) == NOTHING | {"replies": 1, "request records": 1}


@pytest.mark.parametrize("escaped", ["/", "\\/"], ids=["plain", "escaped"])
def test_an_address_in_a_message_that_cannot_be_read_is_found(escaped: str, rig: Rig, erase: Erase) -> None:
    """However the program that pushed it writes JSON: PHP escapes slashes, many escape what is not ASCII."""
    email = f"{address()[:-12]}.\N{GRINNING FACE}@example.com"
    envelope = message({"filler": "???>>>" * 20, "email": email}, headers={"eta": "soon"})
    rig.broker.delete("verification.dead")
    rig.broker.lpush(QUEUE, json.dumps(envelope | {"properties": {}}).replace("/", escaped))
    rig.broker.lpush(QUEUE, json.dumps(f"no object, but {email}"))
    eventually(lambda: rig.broker.llen("verification.dead") == 2)
    assert counts(erase(rig, email)) == NOTHING | {"dead letters": 2}


def test_it_says_how_it_ends(rig: Rig, erase: Erase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Exit status" in erase(rig, "--help").output
    assert erase(rig).exit_code == 2
    monkeypatch.setitem(rig.settings, "VERIFY_REDIS_URL", "redis://:hush@127.0.0.1:1")
    failed = erase(rig, address())
    assert failed.exit_code == 1
    assert "hush" not in failed.output
    assert META not in failed.output

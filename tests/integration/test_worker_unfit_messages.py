"""Messages that cannot be executed: each becomes a dead letter with a code and a reason, and the worker goes on.

The golden files in tests/contract have one for each missing field.
"""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from typing import Any

import pytest
from support.caller import address, message
from support.process import eventually
from support.rig import Rig

DEAD = "verification.dead"


def dump(kwargs: Any = None, **options: Any) -> bytes:
    return json.dumps(message({"email": "a@example.com"} if kwargs is None else kwargs, **options)).encode()


def body(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return dump(body=base64.b64encode(raw).decode())


UNFIT: dict[str, dict[str, bytes]] = {
    "envelope": {
        "empty": b"",
        "null": b"null",
        "cut": dump()[:-5],
        "binary": bytes(range(256)),
        "not UTF-8": dump(headers={"origin": "XX"}).replace(b"XX", b"\xff\xfe"),
        "deeper": b'{"headers":' * 1000 + b"1" + b"}" * 1000,
        "NaN": b'{"headers": NaN}',
        "body empty": dump(body=""),
        "foreign encoding": dump(content_encoding="utf-16"),
        "content-type a list": dump(content_type=["application/json"]),
        "headers a list": json.dumps({**message({}), "headers": []}).encode(),
        "properties null": json.dumps({**message({}), "properties": None}).encode(),
        "task a number": dump(headers={"task": 5}),
        "id a number": dump(headers={"id": 5}),
        "id empty": dump(headers={"id": ""}),
        "id too long": dump(request_id="x" * 256),
        "id not Unicode": dump(request_id="\ud800"),
        "large": b'{"x": "' + b"x" * 65_000 + b'"}',
    },
    "unknown_task": {
        "unknown task": dump(headers={"task": "celery.backend_cleanup"}),
    },
    "body": {
        "body not UTF-8": body(b"\xff\xfe"),
        "body deep": body("[" * 20_000 + "]" * 20_000),
        "callbacks no signatures": dump(embed={"callbacks": [5]}),
    },
    "time": {
        "eta no time": dump(headers={"eta": "soon"}),
        "expires a bool": dump(headers={"expires": True}),
    },
}


@pytest.mark.parametrize(
    ("code", "unfit"),
    [pytest.param(code, raw, id=name) for code, messages in UNFIT.items() for name, raw in messages.items()],
)
def test_an_unfit_message_becomes_a_dead_letter_and_the_next_is_served(rig: Rig, code: str, unfit: bytes) -> None:
    rig.broker.delete(DEAD)
    before = time.time()
    rig.broker.lpush("verification", unfit)
    email = address()
    assert rig.caller.ask(email) == {"email": email, "error": 0}
    rig.settled()
    [letter] = rig.broker.lrange(DEAD, 0, -1)
    assert isinstance(letter, bytes)
    # The letter is JSON around a message that need not be UTF-8.
    found = json.loads(letter.decode("utf-8", "surrogateescape"))
    assert found["message"].encode("utf-8", "surrogateescape") == unfit
    assert found["code"] == code
    assert isinstance(found["reason"], str)
    assert found["reason"]
    assert "example" not in found["reason"]
    assert before - 5 < found["at"] < time.time() + 5
    assert rig.worker.alive


def test_messages_without_an_id_that_a_dead_worker_held_do_not_count_as_one(rig: Rig) -> None:
    rig.broker.delete(DEAD)
    left = [b"not JSON %d" % number for number in range(4)] + [b"[]", dump(headers={"id": ["x"]})]
    with rig.broker.pipeline() as pipe:
        for number, raw in enumerate(left):
            pipe.hset("unacked", f"dead-{number}", b"[" + raw + b', "", "verification"]')
            pipe.zadd("unacked_index", {f"dead-{number}": number})
        pipe.execute()
    eventually(lambda: rig.broker.llen(DEAD) == len(left))
    letters = [json.loads(each) for each in rig.dead_letters()]
    assert {each["message"].encode() for each in letters} == set(left)
    assert {each["code"] for each in letters} == {"envelope"}


@pytest.mark.parametrize("deep", [5, 1005])
def test_what_looks_like_a_message_that_was_cut_is_dead_lettered_once(rig: Rig, deep: int) -> None:
    rig.broker.delete(DEAD)
    looks = {"headers": {"id": {"x": 1}}, "cut": {"size": 5, "message": "x"}, "more": 0}
    rig.broker.lpush("verification", json.dumps(looks).replace(": 0}", ": " + "[" * deep + "]" * deep + "}"))
    assert rig.caller.ask(address())["error"] == 0
    rig.settled()
    [letter] = [json.loads(each) for each in rig.dead_letters()]
    assert letter["code"] == "too_large"
    assert "id" not in letter


def test_dead_letters_are_logged_with_reason_and_count_in_few_lines(rig: Rig) -> None:
    started = len(rig.worker.log.splitlines())
    rig.broker.lpush("verification", *[b"not JSON"] * 300, *UNFIT["time"].values())

    def warnings() -> list[dict[str, Any]]:
        lines = rig.worker.log.splitlines()[started:]
        return [json.loads(line) for line in lines if "messages were dead-lettered" in line]

    def counted(code: str) -> int:
        return sum(int(found) for each in warnings() for found in re.findall(rf"\b{code} (\d+)", each["reason"]))

    # The first line may also count what an earlier test pushed.
    eventually(lambda: counted("envelope") >= 300 and counted("time") >= len(UNFIT["time"]))
    assert sum(each["count"] for each in warnings()) >= 300 + len(UNFIT["time"])
    assert len(warnings()) <= 10
    assert {each["level"] for each in warnings()} == {"warning"}


@pytest.mark.parametrize(
    "odd",
    [
        {"headers": {"group": 5}},
        {"headers": {"retries": "many"}},
        {"headers": {"timelimit": "no"}},
        {"headers": {"root_id": {}, "parent_id": [], "kwargsrepr": 7, "argsrepr": None, "origin": {}, "lang": 5}},
        {"headers": {"stamped_headers": 5, "stamps": "x"}},
        {"headers": {"compression": "zlib"}},
        {"headers": {"ignore_result": True}},
        {"headers": {"eta": "20200101T000000", "timelimit": "no", "retries": "many", "group_index": "x"}},
        {"headers": {"meth": "x", "shadow": "other.name"}},
        {"embed": []},
        {"embed": 5},
        {"embed": {"unknown": 1}},
        {"embed": {"callbacks": []}},
        {"body": base64.b64encode(b'[[], {"email": "odd@example.com"}, null]').decode()},
    ],
    ids=repr,
)
def test_what_is_odd_but_readable_ends_in_one_reply_or_dead_letter(rig: Rig, odd: dict[str, Any]) -> None:
    rig.broker.delete(DEAD)
    [request_id] = rig.caller.push(message({"email": address()}, **odd))
    rig.settled()
    assert rig.caller.answered([request_id]) + rig.broker.llen(DEAD) == 1
    assert rig.caller.ask(address())["error"] == 0


def test_of_duplicate_keys_the_last_one_counts(rig: Rig) -> None:
    email, request_id = address(), str(uuid.uuid4())
    text = json.dumps(message({"email": email}, request_id=request_id))
    rig.broker.lpush("verification", '{"content-type": "text/plain", "headers": {}, ' + text[1:])
    assert rig.caller.reply(request_id) == {"email": email, "error": 0}


def test_an_id_of_255_characters_is_served(rig: Rig) -> None:
    request_id = uuid.uuid4().hex.ljust(255, "x")
    [request_id] = rig.caller.push(message({"email": address()}, request_id=request_id))
    assert rig.caller.reply(request_id)["error"] == 0

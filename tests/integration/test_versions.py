"""What another release wrote in a form that this one does not know is left to that release's workers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest
from support.caller import QUEUE, address, message
from support.process import eventually
from support.rig import Rig

from producer.contract import ErrorCode
from producer.store.codes import Claim

PARKED = f"{QUEUE}.parked"
RECORD_LEFT, ENTRY_LEFT = "another release has begun a request", "another release wrote entries"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One worker, which soon restores what another one held."""
    with Rig(visibility_timeout=2) as rig:
        rig.add_worker()
        yield rig


def request() -> tuple[str, str, dict[str, Any]]:
    """A request that nobody has made yet: its id, its address and its message."""
    email = address()
    envelope = message({"email": email})
    return envelope["headers"]["id"], email, envelope


def rounds(rig: Rig, count: int = 3) -> None:
    """Let the worker make so many rounds of maintenance; a sign of life is the last that it does in each."""
    for _ in range(count):
        [(_, seen)] = cast(list[tuple[bytes, float]], rig.broker.zrange(f"{QUEUE}.workers", 0, -1, withscores=True))
        eventually(partial(rig.broker.zcount, f"{QUEUE}.workers", f"({seen}", "+inf"))


def test_a_request_with_an_unknown_record_is_left_to_others(rig: Rig) -> None:
    request_id, email, envelope = request()
    record = f"request:{request_id}"
    who = Claim.of(request_id, "", email, "default", email).who
    rig.codes.hset(record, mapping={"who": who.replace("1:", "2:", 1), "first": round(time.time() * 1000)})
    rig.codes.expire(record, 60)
    rig.caller.push(envelope)
    rig.worker.wait_for_log(RECORD_LEFT)
    rounds(rig)
    assert rig.held().keys() & {"queue", "unacked", "delayed"}
    assert rig.dead_letters() == []
    assert rig.caller.stored(request_id) is None
    # One that knows it serves it.
    rig.codes.hset(record, "who", who)
    assert rig.caller.reply(request_id) == {"email": email, "error": ErrorCode.SUCCESS}
    assert len(rig.mails_to(email)) == 1
    assert rig.worker.log.count(RECORD_LEFT) == 1


def test_a_delayed_request_in_an_unknown_form_is_left_to_others(rig: Rig) -> None:
    request_id, email, envelope = request()
    entry = f"1:0 {json.dumps(envelope)}"
    rig.broker.hset(PARKED, request_id, f"2:new {entry}")
    rig.broker.zadd(f"{PARKED}.due", {request_id: 0})
    rig.worker.wait_for_log(ENTRY_LEFT)
    # A worker that knows the form has made it ready.
    rig.broker.zadd(f"{PARKED}.ready", {request_id: 0})
    eventually(lambda: rig.broker.zcard(f"{PARKED}.ready") == 0)
    rounds(rig)
    assert rig.held() == {"delayed": 1, "delayed.due": 1}
    assert rig.caller.ask(address())["error"] == ErrorCode.SUCCESS  # others are served meanwhile
    rig.broker.hset(PARKED, request_id, entry)
    assert rig.caller.reply(request_id) == {"email": email, "error": ErrorCode.SUCCESS}
    assert rig.worker.log.count(ENTRY_LEFT) == 1


def test_waking_a_request_in_an_unknown_form_makes_it_due(rig: Rig) -> None:
    request_id, email, envelope = request()
    entry = f"1:0 {json.dumps(envelope)}"
    rig.broker.hset(PARKED, request_id, f"2:new {entry}")
    rig.broker.zadd(f"{PARKED}.due", {request_id: 1e13})
    rig.codes.sadd(f"joined:code_{email}", request_id)
    rig.codes.expire(f"joined:code_{email}", 60)
    assert rig.caller.ask(email)["error"] == ErrorCode.SUCCESS
    eventually(lambda: rig.broker.zcount(f"{PARKED}.due", 0, "(1e13") == 1)
    rig.broker.hset(PARKED, request_id, entry)
    assert rig.caller.reply(request_id) == {"email": email, "error": ErrorCode.SUCCESS}


def test_a_reservation_in_an_unknown_form_is_left_to_others(rig: Rig) -> None:
    request_id, email, envelope = request()
    entry = f'[{json.dumps(envelope)},"","{QUEUE}"]'
    rig.broker.hset("unacked", "a tag", f"2:{entry}")
    rig.broker.zadd("unacked_index", {"a tag": 1})
    eventually(lambda: rig.broker.zscore("unacked_index", "a tag") != 1)  # a round has looked at it
    rounds(rig, 1)
    assert rig.held() == {"unacked": 1, "unacked_index": 1}
    rig.broker.hset("unacked", "a tag", entry)
    assert rig.caller.reply(request_id) == {"email": email, "error": ErrorCode.SUCCESS}

"""Redis refuses single commands, or holds keys of the wrong type: no request is lost."""

from __future__ import annotations

import json
import time

import pytest
from support.caller import QUEUE, address, message
from support.process import eventually
from support.rig import NewRig
from support.smtp_server import Held


def some(*quick: str, slow: tuple[str, ...]) -> list[object]:
    """Parameters of a test; the `slow` ones run only in `make faults`."""
    return [*quick, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


@pytest.mark.parametrize("command", some("zadd", slow=("hdel", "hset", "ltrim", "zrem", "rpush", "lpush")))
def test_a_command_that_is_refused_for_a_while_loses_no_request(new_rig: NewRig, command: str) -> None:
    rig = new_rig(give_up_after=60)
    again = address()
    rig.script(again, rcpt=["451 4.3.0 later"] * 2)
    ids = rig.caller.push(*(message({"email": address()}) for _ in range(20)), message({"email": again}))
    admin = rig.server.client()
    admin.acl_setuser("default", enabled=True, nopass=True, commands=[f"-{command}"])
    try:
        if command != "lpush":
            ids += rig.caller.push(*(message({"email": address()}) for _ in range(20)))
        time.sleep(1)
    finally:
        admin.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"])
    assert set(rig.caller.replies(ids)) <= {0, 1}
    eventually(lambda: rig.caller.ask(address())["error"] == 0)


@pytest.mark.parametrize(
    "key",
    some("unacked_index", "verification.dead", slow=("unacked", "verification.parked", "verification.parked.due")),
)
def test_a_key_of_the_wrong_type_delays_requests_and_loses_none(new_rig: NewRig, key: str) -> None:
    rig = new_rig()
    assert rig.caller.ask(address())["error"] == 0
    eventually(lambda: not rig.broker.exists("unacked"))
    rig.broker.delete(key)
    rig.broker.set(key, "not what it should be")
    again = address()
    rig.script(again, rcpt=["451 4.3.0 later"])
    ids = rig.caller.push(*(message({"email": address()}) for _ in range(10)), message({"email": again}))
    if key == "verification.dead":
        rig.broker.lpush(QUEUE, "no message at all")
    time.sleep(1)
    rig.broker.delete(key)
    assert rig.caller.replies(ids) == [0] * 11
    if key == "verification.dead":
        eventually(lambda: rig.broker.llen("verification.dead") == 1)


def test_a_reply_replaces_whatever_is_stored_under_its_key(new_rig: NewRig) -> None:
    rig = new_rig()
    asked = message({"email": address()})
    request_id = asked["headers"]["id"]
    rig.results.lpush(f"celery-task-meta-{request_id}", "not a reply")
    rig.results.expire(f"celery-task-meta-{request_id}", 60)
    rig.broker.lpush(QUEUE, json.dumps(asked))
    eventually(lambda: rig.results.type(f"celery-task-meta-{request_id}") == b"string")
    assert rig.caller.reply(request_id)["error"] == 0


def test_an_outage_of_the_results_database_does_not_count_as_a_dead_worker(new_rig: NewRig) -> None:
    rig = new_rig(own=["results"], visibility_timeout=1)
    assert rig.caller.ask(address())["error"] == 0
    rig.servers["results"].kill()
    email = address()
    ids = rig.caller.push(message({"email": email}))
    eventually(lambda: rig.mails_to(email))
    # Wait so long that it could have been redelivered four times; meanwhile others are sent.
    other = address()
    rig.caller.push(message({"email": other}))
    eventually(lambda: rig.mails_to(other))
    time.sleep(6)
    rig.servers["results"].start()
    assert rig.caller.replies(ids) == [0]
    assert rig.broker.llen("verification.dead") == 0


def test_a_frozen_worker_does_not_answer_for_the_one_that_sent(new_rig: NewRig) -> None:
    rig = new_rig()
    email = address()
    refused = Held("550 5.1.1 no such mailbox")
    rig.script(email, rcpt=[refused, "250 2.1.5 ok"])
    request_id = rig.caller.request(email)
    assert refused.reached.wait(60)
    rig.worker.pause()
    rig.add_worker()
    eventually(lambda: len(rig.mails_to(email)) == 1)
    refused.release.set()
    rig.worker.resume()
    time.sleep(1)
    assert rig.caller.reply(request_id)["error"] == 0


def test_an_eta_out_of_range_stops_neither_the_worker_nor_its_batch(new_rig: NewRig) -> None:
    rig = new_rig(workers=0)
    ids = []
    for eta in ("9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"):
        ids += rig.caller.push(*(message({"email": address()}) for _ in range(5)))
        rig.caller.push(message({"email": address()}, headers={"eta": eta}))
    ids += rig.caller.push(*(message({"email": address()}) for _ in range(5)))
    rig.add_worker()
    assert rig.caller.replies(ids) == [0] * 15
    eventually(lambda: rig.broker.llen("verification.dead") == 2)


def test_a_request_with_a_priority_is_served(new_rig: NewRig) -> None:
    rig = new_rig()
    for priority in (3, 6, 9):
        asked = message({"email": address()})
        rig.broker.lpush(f"{QUEUE}\x06\x16{priority}", json.dumps(asked))
        assert rig.caller.reply(asked["headers"]["id"])["error"] == 0

"""Malformed messages are answered or dead-lettered; none is lost, and none delays other requests."""

from __future__ import annotations

import base64
import copy
import json
import random
import uuid
from collections import Counter
from typing import Any

import pytest
from support.caller import META, QUEUE, address, message
from support.malformed import malformed_messages
from support.process import eventually
from support.rig import Calling, NewRig

# fmt: off
VALUES: list[Any] = [
    None, True, False, 0, -1, 42, 1.5, 1e308, 2**63, 10**30, "", " ", "x", "\x00", "\xe9", "\U0001f600", "\ud800",
    "a" * 5000, "***", [], [[]], [None], {}, {"a": 1}, {"": ""}, "application/x-python-serialize", "utf-16",
    "2020-01-01T00:00:00", "NaN", "verification.send_code", "celery.backend_cleanup", "../../etc", "'; DROP", "%s%n",
    "a@example.com",
]
HEADERS = [
    "eta", "expires", "group", "retries", "timelimit", "root_id", "lang", "enqueued_at", "stamps", "stamped_headers",
    "argsrepr", "kwargsrepr", "origin", "ignore_result", "shadow", "compression",
]
# fmt: on


def test_known_malformed_messages_are_dead_lettered_and_stop_no_worker(new_rig: NewRig) -> None:
    rig = new_rig()
    poison = malformed_messages()
    for each in poison.values():
        rig.broker.lpush(QUEUE, each)
        assert rig.caller.ask(address("good"))["error"] == 0
    rig.audit(dead=len(poison))


class Mutator:
    """Breaks good messages; the same seed breaks them the same way."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def mutated(self) -> bytes:
        """A good message with one to three changes, in its structure or in its bytes."""
        chance = self._random
        envelope = message({"email": address("mutant")}, request_id=str(uuid.UUID(int=chance.getrandbits(128))))
        if chance.random() < 0.5:
            for _ in range(chance.choice([1, 1, 1, 2, 3])):
                self._change(envelope)
            return json.dumps(envelope).encode()
        if chance.random() < 0.5:
            raw = bytearray(base64.b64decode(envelope["body"]))
            self._bytes(raw)
            envelope["body"] = base64.b64encode(bytes(raw)).decode()
            return json.dumps(envelope).encode()
        raw = bytearray(json.dumps(envelope).encode())
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            self._bytes(raw)
        return bytes(raw)

    def _change(self, envelope: dict[str, Any]) -> None:
        chance = self._random
        value = copy.deepcopy(chance.choice(VALUES))
        if chance.random() < 0.4:
            body = [[], {"email": address("mutant")}, {}]
            where: Any = body
            if chance.random() < 0.7:
                where = body[1]
                where[chance.choice(["email", "purpose", "locale", "x"])] = value
            else:
                where[chance.randrange(3)] = value
            envelope["body"] = base64.b64encode(json.dumps(body).encode()).decode()
            return
        if chance.random() < 0.3 and isinstance(envelope.get("headers"), dict):
            envelope["headers"][chance.choice(HEADERS)] = value
            return
        place: Any = envelope
        while isinstance(place, dict) and place:
            key = chance.choice(list(place))
            if isinstance(place[key], dict) and chance.random() < 0.7:
                place = place[key]
            elif chance.random() < 0.3:
                del place[key]
                return
            else:
                place[key] = value
                return

    def _bytes(self, raw: bytearray) -> None:
        chance = self._random
        at = chance.randrange(len(raw)) if raw else 0
        match chance.randrange(5):
            case 0:
                del raw[at : at + chance.randint(1, 20)]
            case 1:
                raw[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 4)))
            case 2:
                raw[at : at + 1] = bytes([chance.randrange(256)])
            case 3:
                del raw[at:]
            case _:
                raw[at:at] = chance.choice(
                    [b'"', b"{", b"}", b"[", b"]", b"\\", b",", b"\x00", b"\\ud800", b"NaN", b"e999"]
                )


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutated_message_is_answered_or_dead_lettered(new_rig: NewRig, count: int) -> None:
    rig = new_rig(log_level="INFO", give_up_after=8)
    mutator = Mutator(seed=20261124)
    pushed: list[bytes] = []
    for _ in range(0, count, 500):
        batch = [mutator.mutated() for _ in range(500)]
        pushed += batch
        rig.broker.lpush(QUEUE, *batch)
        assert rig.caller.ask(address("good"), 20)["error"] == 0
    assert rig.worker.alive
    eventually(lambda: not rig.held())
    dead = [json.loads(raw.decode("utf-8", "surrogateescape")) for raw in rig.dead_letters()]
    dead_lettered = Counter(each["message"].encode("utf-8", "surrogateescape") for each in dead)
    answered = {key.decode("utf-8", "replace").removeprefix(META) for key in rig.results.scan_iter(META + "*")}
    assert dead_lettered - Counter(pushed) == Counter()
    served = Counter(pushed) - dead_lettered
    assert [raw for raw in served if json.loads(raw)["headers"]["id"] not in answered] == []
    assert len(pushed) == served.total() + len(dead)
    assert min(served.total(), len(dead)) > count / 10
    assert all(each["reason"] and isinstance(each["at"], (int, float)) for each in dead)
    for key in rig.results.scan_iter(META + "*"):
        assert json.loads(rig.results.get(key) or b"")["status"] == "SUCCESS"
    rig.assert_ttls()
    assert "Traceback" not in rig.worker.log


def test_a_reused_id_with_another_address_is_dead_lettered(new_rig: NewRig) -> None:
    rig = new_rig()
    email, other = address(), address("other")
    first = message({"email": email})
    same_id = first["headers"]["id"]
    rig.caller.push(first)
    assert rig.caller.reply(same_id)["error"] == 0
    before = (rig.caller.stored(same_id), rig.codes.get(f"code_{email}"), len(rig.relay.dotted))
    rig.caller.push(message({"email": other}, request_id=same_id))
    rig.caller.push(message({"email": email, "purpose": "login"}, request_id=same_id))
    eventually(lambda: rig.broker.llen("verification.dead") == 2)
    assert (rig.caller.stored(same_id), rig.codes.get(f"code_{email}"), len(rig.relay.dotted)) == before
    assert rig.codes.exists(f"code_{other}") == 0
    rig.audit(dead=2)


def test_a_message_that_is_queued_twice_sends_one_mail(new_rig: NewRig) -> None:
    rig = new_rig(workers=2)
    emails = [address() for _ in range(200)]
    envelopes = [message({"email": email}) for email in emails]
    rig.caller.push(*envelopes, *envelopes)
    interleaved = [each for envelope in envelopes for each in (envelope, envelope)]
    rig.caller.push(*interleaved)
    finding = rig.audit()
    assert set(finding.errors.values()) == {0}


def test_many_requests_for_one_address_yield_one_code_and_one_mail(new_rig: NewRig) -> None:
    rig = new_rig(workers=2, max_sends_per_hour=1000)
    email = address()
    ids = rig.caller.request_all(*[email] * 300)
    assert rig.caller.replies(ids) == [0] * 300
    assert len(rig.dotted_to(email)) == 1
    rig.audit()


def test_requests_that_wait_for_the_send_of_a_dead_worker_are_served(new_rig: NewRig) -> None:
    rig = new_rig(max_sends_per_hour=1000)
    email = address()
    rig.script(email, rcpt=[Calling("250 2.1.5 ok", rig.worker.kill, after=0.3)])
    ids = rig.caller.request_all(*[email] * 50)
    eventually(lambda: not rig.worker.alive)
    rig.add_worker()
    assert rig.caller.replies(ids) == [0] * 50
    assert len(rig.dotted_to(email)) == 1
    rig.audit()

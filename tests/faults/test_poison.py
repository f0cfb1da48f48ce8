"""Messages that no producer of ours would send: answered, or among the dead letters; never lost, never in the way."""

from __future__ import annotations

import base64
import copy
import json
import random
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support.caller import META, QUEUE
from support.harness import BACK, Calling, Stage, eventually, message, new_address

NewStage = Callable[..., Stage]
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


def from_field() -> dict[str, bytes]:
    """What field.md and experience name."""

    def dumped(**changes: Any) -> bytes:
        return json.dumps(message({"email": "poison@example.com"}, **changes)).encode()

    whole = message({"email": "poison@example.com"})
    return {
        "not JSON": b"hello",
        "list": b"[]",
        "null": b"null",
        "bad base64": dumped(body="***"),
        "dict body": dumped(body={"email": "poison@example.com"}),
        "no content-type": json.dumps({k: v for k, v in whole.items() if k != "content-type"}).encode(),
        "no id": json.dumps(whole | {"headers": {"task": "verification.send_code"}}).encode(),
        "undecodable body": dumped(body=base64.b64encode(b"\xff\xfe").decode()),
        "bad expires": dumped(headers={"expires": "tomorrow"}),
        "foreign content-type": dumped(content_type="application/x-python-serialize"),
        "unknown task": dumped(headers={"task": "other.task"}),
        "empty": b"",
    }


def test_every_known_poison_becomes_a_dead_letter_and_stops_no_worker(new_stage: NewStage) -> None:
    stage = new_stage()
    poison = from_field()
    for each in poison.values():
        stage.broker.lpush(QUEUE, each)
        assert stage.ask(new_address("good")) == 0
    stage.check(dead=len(poison))


class Mutator:
    """Breaks good envelopes, reproducibly."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def mutated(self) -> bytes:
        """One message: a good one with one to three changes, in its structure or in its bytes."""
        chance = self._random
        envelope = message({"email": new_address("mutant")}, request_id=str(uuid.UUID(int=chance.getrandbits(128))))
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
            body = [[], {"email": new_address("mutant")}, {}]
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
def test_every_mutated_message_is_answered_or_a_dead_letter_and_none_is_in_the_way(
    new_stage: NewStage, count: int
) -> None:
    stage = new_stage(log_level="INFO", give_up_after=8)
    mutator = Mutator(seed=20261124)
    pushed: list[bytes] = []
    for _ in range(0, count, 500):
        batch = [mutator.mutated() for _ in range(500)]
        pushed += batch
        stage.broker.lpush(QUEUE, *batch)
        assert stage.ask(new_address("good"), 20) == 0
    assert stage.worker.alive
    eventually(lambda: not stage.held(), 40)
    dead = [json.loads(raw.decode("utf-8", "surrogateescape")) for raw in stage.dead_letters()]
    dead_lettered = Counter(each["message"].encode("utf-8", "surrogateescape") for each in dead)
    answered = {key.decode("utf-8", "replace").removeprefix(META) for key in stage.results.scan_iter(META + "*")}
    assert dead_lettered - Counter(pushed) == Counter()
    served = Counter(pushed) - dead_lettered
    assert [raw for raw in served if json.loads(raw)["headers"]["id"] not in answered] == []
    assert len(pushed) == served.total() + len(dead)
    assert min(served.total(), len(dead)) > count / 10
    assert all(each["reason"] and isinstance(each["at"], (int, float)) for each in dead)
    for key in stage.results.scan_iter(META + "*"):
        assert json.loads(stage.results.get(key) or b"")["status"] == "SUCCESS"
    stage._check_ttls()
    assert "Traceback" not in stage.worker.log


def test_the_same_id_with_another_address_is_a_dead_letter_and_changes_nothing(new_stage: NewStage) -> None:
    stage = new_stage()
    email, other = new_address(), new_address("other")
    first = message({"email": email})
    same_id = first["headers"]["id"]
    stage.push_envelopes(first, emails=[email])
    assert stage.reply(same_id) == 0
    before = (stage.stored(same_id), stage.codes.get(f"code_{email}"), len(stage.sink.dotted))
    stage.push_envelopes(message({"email": other}, request_id=same_id), emails=[email])
    stage.push_envelopes(message({"email": email, "purpose": "login"}, request_id=same_id), emails=[email])
    eventually(lambda: stage.broker.llen("verification.dead") == 2)
    assert (stage.stored(same_id), stage.codes.get(f"code_{email}"), len(stage.sink.dotted)) == before
    assert stage.codes.exists(f"code_{other}") == 0
    stage.check(dead=2)


def test_one_envelope_twice_at_once_on_two_workers_sends_one_mail(new_stage: NewStage) -> None:
    stage = new_stage(workers=2)
    emails = [new_address() for _ in range(200)]
    envelopes = [message({"email": email}) for email in emails]
    stage.push_envelopes(*envelopes, *envelopes, emails=emails * 2)
    interleaved = [each for envelope in envelopes for each in (envelope, envelope)]
    stage.push_envelopes(*interleaved, emails=[email for email in emails for _ in range(2)])
    finding = stage.check()
    assert set(finding.errors.values()) == {0}


def test_many_requests_for_one_address_at_once_yield_one_code_and_one_mail(new_stage: NewStage) -> None:
    stage = new_stage(workers=2, max_sends_per_hour=1000)
    email = new_address()
    ids = stage.push(*[email] * 300)
    assert stage.replies(ids, 20) == [0] * 300
    assert len(stage.whole(email)) == 1
    stage.check()


def test_joined_requests_outlive_the_worker_whose_send_they_wait_for(new_stage: NewStage) -> None:
    stage = new_stage(max_sends_per_hour=1000)
    email = new_address()
    stage.script(email, rcpt=[Calling("250 2.1.5 ok", stage.worker.kill, after=0.3)])
    ids = stage.push(*[email] * 50)
    eventually(lambda: not stage.worker.alive)
    stage.add_worker()
    assert stage.replies(ids, BACK + 5) == [0] * 50
    assert len(stage.whole(email)) == 1
    stage.check()

"""Malformed messages are answered or dead-lettered; none is lost, and none delays other requests."""

from __future__ import annotations

import pytest
from support.caller import QUEUE, address, message
from support.malformed import malformed_messages
from support.process import eventually
from support.rig import Calling, NewRig

from bench.fuzz.envelope import SETTINGS, EnvelopeTarget
from bench.fuzz.target import fuzz


def test_known_malformed_messages_are_dead_lettered_and_stop_no_worker(new_rig: NewRig) -> None:
    rig = new_rig()
    poison = malformed_messages()
    for each in poison.values():
        rig.broker.lpush(QUEUE, each)
        assert rig.caller.ask(address("good"))["error"] == 0
    rig.audit(dead=len(poison))


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutated_message_is_answered_or_dead_lettered(new_rig: NewRig, count: int) -> None:
    target = EnvelopeTarget(new_rig(**SETTINGS), seed=20261124)
    assert fuzz(target, count=count) == (count, [])
    assert min(target.answered, target.dead) > count / 10


@pytest.mark.slow
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


@pytest.mark.slow
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

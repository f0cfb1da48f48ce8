"""Codes, broker and results are on servers of their own, and one of them fails."""

from __future__ import annotations

import time
import uuid

import pytest
from support.caller import QUEUE, TASK, address
from support.process import WAIT_TIMEOUT, eventually
from support.rig import NewRig, operator_app


@pytest.mark.parametrize("seconds", [1.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_replies_are_stored_once_the_results_database_is_back(new_rig: NewRig, seconds: float) -> None:
    rig = new_rig(own=["results"])
    held, ids = rig.hold_at_dot(20)
    rig.servers["results"].kill()
    held.release.set()
    ids += rig.caller.request_all(*(address() for _ in range(20)))
    time.sleep(seconds)
    rig.servers["results"].start()
    assert rig.caller.replies(ids) == [0] * 40
    # The mark keeps a sent mail from being sent again, however long its reply could not be stored.
    finding = rig.audit(heard=False)
    assert all(len(mails) == 1 for mails in finding.mails.values())


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 8.0])
def test_while_the_broker_is_away_requests_in_hand_are_answered(new_rig: NewRig, seconds: float) -> None:
    rig = new_rig(own=["broker"], aof="always")
    held, ids = rig.hold_at_dot(20)
    rig.servers["broker"].kill()
    held.release.set()
    # Neither mark nor reply needs the broker.
    assert rig.caller.replies(ids) == [0] * 20
    time.sleep(seconds)
    rig.servers["broker"].start()
    ids = rig.caller.request_all(*(address() for _ in range(20)))
    assert rig.caller.replies(ids) == [0] * 20
    finding = rig.audit()
    assert all(len(mails) == 1 for mails in finding.mails.values())


@pytest.mark.parametrize("how", ["killed", pytest.param("paused", marks=pytest.mark.slow)])
def test_a_request_that_was_answered_1_is_served_when_it_is_asked_again(new_rig: NewRig, how: str) -> None:
    rig = new_rig(own=["codes"], aof="always")
    (rig.servers["codes"].kill if how == "killed" else rig.servers["codes"].pause)()
    ids = rig.caller.request_all(*(address() for _ in range(20)))
    assert rig.caller.replies(ids) == [1] * 20
    assert rig.caller.answered(ids) == 0
    if how == "killed":
        rig.servers["codes"].start()
    else:
        rig.servers["codes"].resume()
    rig.caller.push(*rig.caller.pushed)
    eventually(lambda: rig.caller.answered(ids) == 20)
    assert rig.caller.replies(ids) == [0] * 20
    finding = rig.audit()
    assert all(len(mails) == 1 for mails in finding.mails.values())


@pytest.mark.slow
def test_a_request_asked_again_does_not_wait_for_a_lease_that_nobody_holds(new_rig: NewRig) -> None:
    rig = new_rig(own=["codes"], visibility_timeout=300)
    assert rig.caller.ask(address())["error"] == 0
    rig.servers["codes"].pause()
    asked = rig.caller.request(address())
    assert rig.caller.reply(asked)["error"] == 1
    rig.servers["codes"].resume()
    # Now Redis executes what it was asked while it stood still, and takes the lease.
    eventually(lambda: rig.codes.exists(f"request:{asked}"))
    rig.caller.push(rig.caller.pushed[-1])
    eventually(lambda: rig.caller.answered([asked]) == 1)
    assert rig.caller.reply(asked)["error"] == 0
    rig.audit()


def test_celery_callers_hear_1_and_may_ask_again_with_the_same_id(new_rig: NewRig) -> None:
    rig = new_rig(own=["codes"], aof="always")
    rig.servers["codes"].kill()
    email, request_id = address(), str(uuid.uuid4())
    with operator_app(rig) as app:
        app.conf.result_backend = rig.url("results")

        def ask() -> object:
            # The link sends it through Celery's own machinery.
            link = app.signature("verification.send_code", kwargs={"email": address("linked")}, immutable=True)
            return app.send_task(
                TASK, kwargs={"email": email}, task_id=request_id, queue=QUEUE, link=link.set(queue=QUEUE)
            ).get(timeout=WAIT_TIMEOUT)

        assert ask() == {"email": email, "error": 1}
        rig.servers["codes"].start()
        assert ask() == {"email": email, "error": 0}
    assert len(rig.mails_to(email)) == 1


@pytest.mark.slow
def test_losing_the_codes_database_between_250_and_mark_loses_no_reply(new_rig: NewRig) -> None:
    rig = new_rig(own=["codes"], aof="always")
    held, ids = rig.hold_at_dot(20)
    rig.servers["codes"].kill()
    held.release.set()
    time.sleep(8)
    rig.servers["codes"].start()
    assert set(rig.caller.replies(ids)) <= {0, 1}
    rig.audit(twice=ids)

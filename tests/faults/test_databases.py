"""Codes, broker and results on servers of their own, of which one fails while the others work."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.harness import BACK, Stage, eventually, new_address
from support.smtp_server import Held

NewStage = Callable[..., Stage]


@pytest.mark.parametrize("seconds", [1.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_replies_outlive_a_results_database_that_is_away(new_stage: NewStage, seconds: float) -> None:
    stage = new_stage(own=["results"])
    held = Held("250 2.0.0 ok")
    emails = [new_address() for _ in range(20)]
    for email in emails:
        stage.script(email, dot=[held])
    ids = stage.push(*emails)
    eventually(lambda: len(stage.sink.dotted) == 20)
    stage.servers["results"].kill()
    held.release.set()
    ids += stage.push(*(new_address() for _ in range(20)))
    time.sleep(seconds)
    stage.servers["results"].start()
    assert stage.replies(ids, BACK + 5) == [0] * 40
    # The mark decides: what was sent is not sent again, however long its reply could not be stored.
    finding = stage.check(heard=False)
    assert all(len(mails) == 1 for mails in finding.mails.values())


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 8.0])
def test_a_broker_that_is_away_delays_requests_and_those_in_hand_are_answered(
    new_stage: NewStage, seconds: float
) -> None:
    stage = new_stage(own=["broker"], aof="always")
    held = Held("250 2.0.0 ok")
    emails = [new_address() for _ in range(20)]
    for email in emails:
        stage.script(email, dot=[held])
    ids = stage.push(*emails)
    eventually(lambda: len(stage.sink.dotted) == 20)
    stage.servers["broker"].kill()
    held.release.set()
    # Mark and reply need no broker.
    assert stage.replies(ids, 3) == [0] * 20
    time.sleep(seconds)
    stage.servers["broker"].start()
    ids = stage.push(*(new_address() for _ in range(20)))
    assert stage.replies(ids, BACK) == [0] * 20
    finding = stage.check()
    assert all(len(mails) == 1 for mails in finding.mails.values())


@pytest.mark.parametrize("how", ["killed", pytest.param("paused", marks=pytest.mark.slow)])
def test_without_the_codes_database_requests_are_answered_1_within_3_seconds(new_stage: NewStage, how: str) -> None:
    stage = new_stage(own=["codes"], aof="always")
    (stage.servers["codes"].kill if how == "killed" else stage.servers["codes"].pause)()
    began = time.monotonic()
    ids = stage.push(*(new_address() for _ in range(20)))
    assert stage.replies(ids, 4) == [1] * 20
    assert time.monotonic() - began < 3.3
    if how == "killed":
        stage.servers["codes"].start()
    else:
        stage.servers["codes"].resume()
    stage.check()


@pytest.mark.slow
def test_a_codes_database_lost_between_250_and_mark_costs_no_reply(new_stage: NewStage) -> None:
    stage = new_stage(own=["codes"], aof="always")
    held = Held("250 2.0.0 ok")
    emails = [new_address() for _ in range(20)]
    for email in emails:
        stage.script(email, dot=[held])
    ids = stage.push(*emails)
    eventually(lambda: len(stage.sink.dotted) == 20)
    stage.servers["codes"].kill()
    held.release.set()
    time.sleep(8)
    stage.servers["codes"].start()
    assert set(stage.replies(ids, BACK + 5)) <= {0, 1}
    stage.check(twice=ids)

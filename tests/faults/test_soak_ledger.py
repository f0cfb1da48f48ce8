"""The soak finds what it is for: what a broken worker or store does is a violation, and what is permitted is not."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable

import pytest
from support.caller import META
from support.rig import reference
from support.smtp_server import Mail

from bench.soak.faults import KINDS, STEADY, schedule
from bench.soak.ledger import Breach, Ledger, Record, Scanner

CODE = 123456789012
OTHER = 210987654321


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(60)


def asked(ledger: Ledger, email: str = "a@soak.example") -> Record:
    record = ledger.asking(email, "LPUSH", str(uuid.uuid4()))
    record.acknowledged = True
    return record


def mailed(ledger: Ledger, record: Record, code: int = CODE) -> Mail:
    assert record.request_id is not None
    content = f"\r\nMessage-ID: <{reference(record.request_id)}@example.com>\r\n\r\n{code}=\r\n"
    mail = Mail("no-reply@example.com", record.email, content.encode())
    ledger.whole(mail)
    ledger.accepted(mail)
    return mail


def replied(ledger: Ledger, record: Record, error: int, *, stored: bool = False) -> None:
    reply = {"status": "SUCCESS", "result": {"email": record.email, "error": error}}
    ledger.replied(f"{META}{record.request_id}", json.dumps(reply).encode(), stored=stored)


def fault(ledger: Ledger, kind: str = "worker: kill -9", *, doubts: bool = True) -> None:
    ledger.end(ledger.begin(kind, "", doubts=doubts))


def served(ledger: Ledger) -> None:
    record = asked(ledger)
    mailed(ledger, record)
    replied(ledger, record, 0)


def sent_twice_after_a_fault(ledger: Ledger) -> None:
    record = asked(ledger)
    fault(ledger)
    mailed(ledger, record)
    mailed(ledger, record)
    replied(ledger, record, 0)


def sent_twice_after_a_connection_ended_at_the_dot(ledger: Ledger) -> None:
    record = asked(ledger)
    ledger.hung_up(mailed(ledger, record))
    mailed(ledger, record)
    replied(ledger, record, 0)


def served_after_a_reply_of_1(ledger: Ledger) -> None:
    record = asked(ledger)
    fault(ledger, "Redis: kill -9")
    replied(ledger, record, 1)
    assert ledger.ask_again(record)
    mailed(ledger, record)
    replied(ledger, record, 0)


def another_code_after_a_check(ledger: Ledger) -> None:
    served(ledger)
    assert ledger.claim("a@soak.example", CODE)
    ledger.checked("a@soak.example", CODE, 0, first=True)
    record = asked(ledger)
    mailed(ledger, record, OTHER)
    replied(ledger, record, 0)


def reply_of_1_that_only_a_log_tells_of(ledger: Ledger) -> None:
    record = asked(ledger)
    fault(ledger, "Redis: kill -9")
    line = {"event": "request answered", "request_id": record.request_id, "error": "RedisErr"}
    Scanner(ledger).scan(json.dumps(line).encode(), "w")
    assert ledger.ask_again(record)
    mailed(ledger, record)
    replied(ledger, record, 0)


@pytest.mark.parametrize(
    "story",
    [
        served,
        sent_twice_after_a_fault,
        sent_twice_after_a_connection_ended_at_the_dot,
        served_after_a_reply_of_1,
        another_code_after_a_check,
        reply_of_1_that_only_a_log_tells_of,
    ],
)
def test_what_the_promises_permit_is_no_violation(ledger: Ledger, story: Callable[[Ledger], None]) -> None:
    story(ledger)
    ledger.check()
    assert ledger.violations == []


def lost(ledger: Ledger) -> None:
    asked(ledger)


def sent_twice(ledger: Ledger) -> None:
    record = asked(ledger)
    mailed(ledger, record)
    mailed(ledger, record)
    replied(ledger, record, 0)


def sent_thrice(ledger: Ledger) -> None:
    sent_twice_after_a_fault(ledger)
    mailed(ledger, ledger.records[0])


def second_mail_with_another_code(ledger: Ledger) -> None:
    record = asked(ledger)
    fault(ledger)
    mailed(ledger, record)
    ledger.claim(record.email, CODE)
    ledger.checked(record.email, CODE, 0, first=True)
    mailed(ledger, record, OTHER)
    replied(ledger, record, 0)


def code_that_works_twice(ledger: Ledger) -> None:
    served(ledger)
    for _ in range(2):
        ledger.checked("a@soak.example", CODE, 0, first=True)


def stuck_at_1(ledger: Ledger) -> None:
    record = asked(ledger)
    fault(ledger, "Redis: kill -9")
    replied(ledger, record, 1)
    time.sleep(0.01)
    assert ledger.ask_again(record)
    replied(ledger, record, 1)


def stored_1(ledger: Ledger) -> None:
    record = asked(ledger)
    fault(ledger, "Redis: kill -9")
    replied(ledger, record, 1, stored=True)


def given_up_for_nothing(ledger: Ledger) -> None:
    record = asked(ledger)
    fault(ledger, doubts=False)
    replied(ledger, record, 6)


@pytest.mark.parametrize(
    ("story", "breach"),
    [
        (lost, Breach.LOST),
        (sent_twice, Breach.NOT_PERMITTED),
        (sent_thrice, Breach.THIRD),
        (second_mail_with_another_code, Breach.OTHER_CODE),
        (code_that_works_twice, Breach.CONSUMED),
        (stuck_at_1, Breach.STUCK),
        (stored_1, Breach.STUCK),
        (given_up_for_nothing, Breach.UNEXPLAINED),
    ],
)
def test_each_broken_promise_is_a_violation(ledger: Ledger, story: Callable[[Ledger], None], breach: Breach) -> None:
    story(ledger)
    ledger.check()
    assert ledger.breaches[breach] == 1, ledger.violations


def test_a_reused_id_is_a_dead_letter_unless_the_store_could_not_tell(ledger: Ledger) -> None:
    served(ledger)
    record = ledger.records[0]
    ledger.reuse(record)
    ledger.expect_dead(1, 1)
    line = {"event": "request answered", "request_id": record.request_id, "error": "RedisErr"}
    Scanner(ledger).scan(json.dumps(line).encode(), "w")
    assert (ledger.dead_least, ledger.dead_most) == (0, 1)


def test_a_fault_excuses_only_what_it_may_concern(ledger: Ledger) -> None:
    fault(ledger)
    for window in ledger.windows:
        window.end -= 100
        window.start -= 100
    ledger._starts[:] = [window.start for window in ledger.windows]
    sent_twice(ledger)
    ledger.check()
    assert ledger.breaches[Breach.NOT_PERMITTED] == 1


@pytest.mark.parametrize("servers", [1, 3])
def test_one_seed_gives_one_schedule_and_a_longer_run_begins_like_a_shorter(servers: int) -> None:
    hour = schedule(7, 3600, servers)
    assert schedule(7, 600, servers) == [fault for fault in hour if fault.at <= 600]
    kinds = {fault.kind for fault in hour}
    assert {kind.name for kind in KINDS} - kinds <= {"Redis, codes alone: cut off"}
    ends = [fault for fault in hour if fault.kind in {"worker: kill -9", "worker: SIGTERM", "API: SIGTERM"}]
    assert not {fault.where for fault in ends} & set(STEADY)

"""A worker sends one code and one mail: joins, codes of the old server, the bucket, several workers and callers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from support.caller import Caller, address, message
from support.process import eventually
from support.rig import Rig, code_in
from support.smtp_server import Held

N = 50

# Four hexadecimal digits, as the old server made them; in capitals, as the ids in a log may contain any lower case.
OLD_CODE = "3F7A"


def code(rig: Rig, email: str) -> str:
    """The code that GateServer reads."""
    found = rig.codes.get(f"code_{email}")
    assert isinstance(found, bytes)
    return found.decode()


@pytest.mark.parametrize(("life", "reused"), [(500, True), (30, False), (None, False)])
def test_a_code_of_the_old_server_is_reused_if_it_lives_long_enough(rig: Rig, life: int | None, reused: bool) -> None:
    email = address()
    rig.codes.set(f"code_{email}", OLD_CODE, ex=life)
    assert rig.caller.ask(email)["error"] == 0
    assert (code(rig, email) == OLD_CODE) == reused
    assert 400 <= rig.codes.ttl(f"code_{email}") <= (500 if reused else 600)
    [mail] = rig.mails_to(email)
    assert code_in(mail) == code(rig, email)


def test_an_empty_bucket_answers_4_for_all_spellings_of_an_address(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(max_sends_per_hour=2, resend_cooldown=0, log_level="INFO")
    rig.add_worker()
    email = address()
    assert [rig.caller.ask(each)["error"] for each in (email, email.upper(), f" {email}")] == [0, 0, 4]
    request_id = rig.caller.request(address())
    assert rig.caller.reply(request_id)["error"] == 0
    rig.worker.wait_for_log(request_id)  # at INFO each request has a line


def test_requests_that_meet_anothers_send_share_its_mail_and_block_no_other(rig: Rig) -> None:
    email = address()
    hold, first = held(rig, email, "250 ok")
    ids = rig.caller.push(*(message({"email": email}) for _ in range(N)))
    # They wait in Redis; the worker does not hold them.
    eventually(lambda: rig.broker.hlen("verification.parked") == N)
    assert rig.broker.hlen("unacked") == 1
    # More than the worker has connections: with one of these blocked, all others are served meanwhile.
    others = rig.caller.push(*(message({"email": address()}) for _ in range(N)))
    assert rig.caller.replies(others) == [0] * N
    assert rig.results.exists(f"celery-task-meta-{first}") == 0

    hold.release.set()
    assert rig.caller.replies([first, *ids]) == [0] * (N + 1)
    assert len(rig.mails_to(email)) == 1
    assert code_in(rig.mails_to(email)[0]) == code(rig, email)


def held(rig: Rig, email: str, reply: str) -> tuple[Held, str]:
    """A request whose mail the relay has, and answers so once released."""
    hold = Held(reply)
    rig.script(email, dot=[hold])
    first = rig.caller.request(email)
    assert hold.reached.wait(60)
    return hold, first


@pytest.mark.parametrize(
    ("reply", "error", "mails"), [("450 4.2.1 later", 0, 2), ("421 4.3.2 closing", 0, 2), ("550 5.1.1 gone", 5, 1)]
)
def test_a_failure_for_now_wakes_one_waiting_request_and_a_final_one_answers_all(
    rig: Rig, reply: str, error: int, mails: int
) -> None:
    email = address()
    hold, first = held(rig, email, reply)
    ids = rig.caller.push(*(message({"email": email}) for _ in range(5)))
    eventually(lambda: rig.broker.hlen("verification.parked") == 5)
    hold.release.set()
    assert rig.caller.replies([first, *ids]) == [error] * 6
    assert len(rig.dotted_to(email)) == mails


def test_a_waiting_request_is_answered_6_at_its_own_deadline(rig: Rig) -> None:
    email = address()
    hold, first = held(rig, email, "250 ok")
    expires = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    [second] = rig.caller.push(message({"email": email}, headers={"expires": expires}))
    assert rig.caller.reply(second) == {"email": email, "error": 6}
    hold.release.set()
    assert rig.caller.reply(first)["error"] == 0


def test_two_workers_on_one_queue_send_each_request_once(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay_connections=4)
    rig.add_workers(2)
    emails = [address() for _ in range(200)]
    same = address()
    ids = rig.caller.push(*(message({"email": each}) for email in emails for each in (email, same)))
    assert rig.caller.replies(ids) == [0] * len(ids)
    assert sorted(mail.recipient for mail in rig.relay.mails) == sorted([*emails, same])


def test_two_producers_on_one_queue_get_their_own_replies(rig: Rig) -> None:
    with Caller(rig.url("broker"), rig.url("results")) as second:
        emails = [address() for _ in range(20)]
        ids = [(rig.caller, second)[number % 2].request(email) for number, email in enumerate(emails)]
        assert [rig.caller.reply(each)["email"] for each in ids] == emails
        # Both receive everything that is published; each knows its own by the id.
        eventually(lambda: all(len(caller.published(each)) == 1 for caller in (rig.caller, second) for each in ids))

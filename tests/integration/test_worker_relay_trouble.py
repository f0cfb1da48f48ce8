"""Relays that are down or slow, refuse, have a wrong certificate, or drop the connection half way."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator

import pytest
import trustme
from support.caller import address, message
from support.rig import Rig, code_in, parsed
from support.smtp_server import Act, Drop, Held, Last, ScriptedServer, Silence, Slowly, running


@pytest.fixture(scope="module")
def impatient() -> Iterator[Rig]:
    """A rig with short timeouts."""
    with Rig(send_timeout=1, connect_timeout=0.5) as rig:
        rig.add_worker()
        yield rig


@pytest.mark.parametrize(
    "script",
    [
        {"rcpt": ["450 4.2.1 later"]},
        {"rcpt": ["421 4.3.2 closing"]},
        {"dot": ["451 4.3.0 later"]},
        {"dot": [Last("421 4.3.2 closing")]},
        {"data": ["452 4.3.1 full"]},
        {"rcpt": [Drop()]},
    ],
    ids=str,
)
def test_a_transient_failure_is_retried_with_the_same_code(impatient: Rig, script: dict[str, Act | list[Act]]) -> None:
    email = address()
    impatient.script(email, **script)
    assert impatient.caller.ask(email) == {"email": email, "error": 0}
    [mail] = impatient.mails_to(email)
    assert code_in(mail).encode() == impatient.codes.get(f"code_{email}")


@pytest.mark.parametrize(
    "script",
    [
        {"rcpt": "550 no such user"},
        {"rcpt": "551 moved"},
        {"rcpt": "553 bad name"},
        {"rcpt": "550 5.1.1 no such user"},
        {"rcpt": "552 5.2.2 full"},
        {"rcpt": "550 5.7.1 policy"},
        {"data": "554 5.7.1 policy"},
        {"dot": "554 5.7.1 spam"},
        {"dot": "552 5.3.4 too big"},
    ],
    ids=str,
)
def test_a_permanent_failure_is_answered_5(impatient: Rig, script: dict[str, Act | list[Act]]) -> None:
    email = address()
    impatient.script(email, **script)
    assert impatient.caller.ask(email) == {"email": email, "error": 5}
    assert impatient.mails_to(email) == []


def test_a_relay_that_refuses_the_sender_is_a_warning_that_names_the_setting(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay=ScriptedServer({"mail": "553 5.1.8 no such domain"}))
    rig.add_worker()
    email = address()
    assert rig.caller.ask(email) == {"email": email, "error": 5}
    rig.worker.wait_for_log("the relay refused the sender: check VERIFY_MAIL_FROM")


@pytest.mark.parametrize("step", ["content", "dot"])
@pytest.mark.parametrize(
    "end", [Drop(), Silence(), Slowly("250 ok" + "." * 90, 0.2)], ids=["drop", "silence", "trickle"]
)
def test_an_unknown_outcome_is_retried_once_with_the_same_code_and_message_id(
    impatient: Rig, step: str, end: Act
) -> None:
    email = address()
    impatient.script(email, **{step: [end]})
    assert impatient.caller.ask(email) == {"email": email, "error": 0}
    assert len(impatient.mails_to(email)) == 1
    sent = impatient.dotted_to(email)
    assert len(sent) <= 2
    assert len({(code_in(mail), parsed(mail)["Message-ID"]) for mail in sent}) == 1


def test_an_unknown_outcome_twice_is_answered_6_and_not_sent_again(impatient: Rig) -> None:
    email = address()
    impatient.script(email, dot=[Drop(), Drop()])
    assert impatient.caller.ask(email) == {"email": email, "error": 6}
    assert len(impatient.dotted_to(email)) == 2


def test_an_unknown_outcome_whose_code_is_gone_is_answered_6(impatient: Rig) -> None:
    email = address()
    hold = Held("")
    impatient.script(email, content=[hold], dot=[Drop()])
    request_id = impatient.caller.request(email)
    assert hold.reached.wait(60)
    impatient.codes.delete(f"code_{email}")
    hold.release.set()
    assert impatient.caller.reply(request_id) == {"email": email, "error": 6}
    assert impatient.codes.exists(f"code_{email}") == 0


@pytest.mark.parametrize("step", ["banner", "rcpt"])
def test_a_relay_that_answers_a_byte_a_second_is_given_up_for_the_next(new_rig: Callable[..., Rig], step: str) -> None:
    slow = ScriptedServer({step: Slowly("250 " + "x" * 99, 1)})
    with running(ScriptedServer()) as second:
        rig = new_rig(relay=slow, send_timeout=1, connect_timeout=0.5)
        rig.settings["VERIFY_RELAYS"] += f",smtp://127.0.0.1:{second.port}"
        rig.add_worker()
        email = address()
        assert rig.caller.ask(email)["error"] == 0
        assert [mail.recipient for mail in second.mails] == [email]


def test_a_request_is_given_up_at_its_deadline_and_answered_6(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay=ScriptedServer({"rcpt": "451 4.3.0 later"}), give_up_after=2)
    rig.add_worker()
    email = address()
    assert rig.caller.ask(email) == {"email": email, "error": 6}


def test_a_request_older_than_its_deadline_is_answered_6_unsent(impatient: Rig) -> None:
    email = address()
    [request_id] = impatient.caller.push(message({"email": email}, headers={"enqueued_at": time.time() - 301}))
    assert impatient.caller.reply(request_id) == {"email": email, "error": 6}
    assert impatient.dotted_to(email) == []


def test_a_relay_that_comes_up_late_gets_the_mail(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    with running(ScriptedServer()) as late:
        port = late.port
    rig.settings["VERIFY_RELAYS"] = f"smtp://127.0.0.1:{port}"
    rig.add_worker()
    request_id = rig.caller.request(address())
    rig.worker.wait_for_log("is unhealthy")
    assert rig.results.exists(f"celery-task-meta-{request_id}") == 0
    with running(ScriptedServer(), port) as late:
        assert rig.caller.reply(request_id)["error"] == 0
        assert len(late.mails) == 1


def test_with_the_first_relay_down_the_second_is_used(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    with running(ScriptedServer()) as gone:
        port = gone.port
    rig.settings["VERIFY_RELAYS"] = f"smtp://127.0.0.1:{port}," + rig.settings["VERIFY_RELAYS"]
    rig.add_worker()
    email = address()
    assert rig.caller.ask(email)["error"] == 0
    assert len(rig.mails_to(email)) == 1


def test_a_relay_that_refuses_the_login_is_skipped_and_the_password_is_in_no_log(new_rig: Callable[..., Rig]) -> None:
    refusing = ScriptedServer({"auth": "535 5.7.8 no"}, offers=("AUTH PLAIN LOGIN", "PIPELINING"))
    with running(ScriptedServer()) as second:
        rig = new_rig(relay=refusing)
        first = f"smtp://us%40er:hush-hush@127.0.0.1:{refusing.port}"
        rig.settings["VERIFY_RELAYS"] = f"{first},smtp://127.0.0.1:{second.port}"
        rig.add_worker()
        assert rig.caller.ask(address())["error"] == 0
        assert len(second.mails) == 1
        assert refusing.mails == []
        assert "hush" not in rig.worker.log


@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
def test_a_relay_with_a_wrong_certificate_never_gets_a_mail(new_rig: Callable[..., Rig], scheme: str) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
    offers = ("STARTTLS", "PIPELINING")
    liar = ScriptedServer(tls=tls, implicit_tls=scheme == "smtps", offers=offers)
    rig = new_rig(relay=liar, give_up_after=1)
    rig.settings["VERIFY_RELAYS"] = f"{scheme}://127.0.0.1:{liar.port}"
    rig.add_worker()
    email = address()
    assert rig.caller.ask(email) == {"email": email, "error": 6}
    assert liar.dotted == []


def test_a_relay_that_limits_connections_gets_every_mail(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay=ScriptedServer(most=2))
    rig.add_worker()
    ids = rig.caller.push(*(message({"email": address()}) for _ in range(100)))
    assert rig.caller.replies(ids) == [0] * 100
    assert len(rig.relay.mails) == 100


def test_a_slow_send_delays_no_other(impatient: Rig) -> None:
    slow, hold = address(), Held("250 ok")
    impatient.script(slow, dot=[hold])
    ids = impatient.caller.push(*(message({"email": each}) for each in (slow, *(address() for _ in range(20)))))
    assert impatient.caller.replies(ids[1:]) == [0] * 20
    hold.release.set()
    assert impatient.caller.reply(ids[0])["error"] == 0


def test_an_address_that_needs_smtputf8_is_answered_3_if_no_relay_offers_it(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay=ScriptedServer(offers=("PIPELINING", "8BITMIME")))
    rig.add_worker()
    assert rig.caller.ask("用户@example.com") == {"email": "用户@example.com", "error": 3}
    assert rig.relay.dotted == []

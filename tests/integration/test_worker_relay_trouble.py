"""Relays that are down or slow, refuse, have a wrong certificate, or drop the connection half way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.caller import address
from support.rig import Rig, code_in, parsed
from support.smtp_server import Act, Drop, Last, ScriptedServer, Silence, Slowly, running


@pytest.fixture(scope="module")
def give_up_rig() -> Iterator[Rig]:
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
def test_a_transient_failure_is_retried_with_the_same_code(
    give_up_rig: Rig, script: dict[str, Act | list[Act]]
) -> None:
    email = address()
    give_up_rig.script(email, **script)
    assert give_up_rig.caller.ask(email) == {"email": email, "error": 0}
    [mail] = give_up_rig.mails_to(email)
    assert code_in(mail).encode() == give_up_rig.codes.get(f"code_{email}")


@pytest.mark.parametrize(
    "script", [{"rcpt": "550 no such user"}, {"rcpt": "552 5.2.2 full"}, {"dot": "554 5.7.1 spam"}], ids=str
)
def test_a_permanent_failure_is_answered_5(give_up_rig: Rig, script: dict[str, Act | list[Act]]) -> None:
    email = address()
    give_up_rig.script(email, **script)
    assert give_up_rig.caller.ask(email) == {"email": email, "error": 5}
    assert give_up_rig.mails_to(email) == []


@pytest.fixture(scope="module")
def refusing_rig() -> Iterator[Rig]:
    """A rig whose relay accepted a mail already."""
    with Rig() as rig:
        rig.add_worker()
        assert rig.caller.ask(address())["error"] == 0
        yield rig


def asks(rig: Rig) -> int:
    """How often the relay was asked for a mailbox."""
    return sum(command.startswith("RCPT ") for command in rig.relay.commands)


def test_a_mailbox_that_the_relay_refused_is_asked_for_once(refusing_rig: Rig) -> None:
    rig = refusing_rig
    emails = [address() for _ in range(10)]
    for number, email in enumerate(emails):
        rig.script(email, rcpt="550 5.1.1 gone" if number % 2 else "550 no such user")
    before = asks(rig)
    for _ in range(5):
        assert set(rig.caller.replies(rig.caller.request_all(*emails))) == {5}
    assert asks(rig) - before == len(emails)
    assert rig.codes.keys("bucket:" + emails[0]) == []
    key = f"suppressed:{emails[0]}"
    reason, until, period = read(rig, key).split()
    assert (reason, period) == ("refused", "600000")
    assert 600 < rig.codes.ttl(key) <= 4_200
    # After the end the relay is asked again, and a mail that it accepts leaves no record.
    ended = f"refused {int(until) - 600_000} 600000"
    rig.codes.set(key, ended, px=60_000)
    assert rig.caller.ask(emails[0])["error"] == 5
    assert read(rig, key).endswith(" 1200000")
    rig.codes.set(key, ended, px=60_000)
    del rig.relay.scripts[emails[0]]
    assert rig.caller.ask(emails[0])["error"] == 0
    assert not rig.codes.exists(key)


def read(rig: Rig, key: str) -> str:
    value = rig.codes.get(key)
    assert isinstance(value, bytes), key
    return value.decode()


@pytest.mark.parametrize("script", [{"mail": "553 5.1.8 no such domain"}, {"rcpt": "550 5.1.7 bad sender"}], ids=str)
def test_a_refused_sender_suppresses_no_mailbox(refusing_rig: Rig, script: dict[str, str]) -> None:
    rig = refusing_rig
    email = address()
    rig.relay.script.update(script)
    before = asks(rig)
    for _ in range(3):
        assert rig.caller.ask(email) == {"email": email, "error": 5}
    assert asks(rig) - before == 3  # pipelined after MAIL
    rig.relay.script.clear()
    assert rig.caller.ask(email)["error"] == 0


def test_a_relay_that_refuses_every_mailbox_suppresses_none(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay=ScriptedServer({"rcpt": "550 5.1.1 gone"}))
    rig.add_worker()
    email = address()
    assert [rig.caller.ask(each)["error"] for each in (address(), email, email)] == [5] * 3
    assert asks(rig) == 3
    assert rig.codes.keys("suppressed:*") == []
    del rig.relay.script["rcpt"]
    assert rig.caller.ask(email)["error"] == 0


@pytest.mark.parametrize("step", ["content", "dot"])
@pytest.mark.parametrize(
    "end", [Drop(), Silence(), Slowly("250 ok" + "." * 90, 0.2)], ids=["drop", "silence", "trickle"]
)
def test_an_unknown_outcome_is_retried_once_with_the_same_code_and_message_id(
    give_up_rig: Rig, step: str, end: Act
) -> None:
    email = address()
    give_up_rig.script(email, **{step: [end]})
    assert give_up_rig.caller.ask(email) == {"email": email, "error": 0}
    assert len(give_up_rig.mails_to(email)) == 1
    sent = give_up_rig.dotted_to(email)
    assert len(sent) <= 2
    assert len({(code_in(mail), parsed(mail)["Message-ID"]) for mail in sent}) == 1


def test_an_unknown_outcome_twice_is_answered_6_and_not_sent_again(give_up_rig: Rig) -> None:
    email = address()
    give_up_rig.script(email, dot=[Drop(), Drop()])
    assert give_up_rig.caller.ask(email) == {"email": email, "error": 6}
    assert len(give_up_rig.dotted_to(email)) == 2


@pytest.mark.parametrize("step", [pytest.param("banner", marks=pytest.mark.slow), "rcpt"])
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


@pytest.mark.slow
def test_a_relay_that_comes_up_late_gets_the_mail(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    with running(ScriptedServer()) as late:
        port = late.port
    rig.settings["VERIFY_RELAYS"] = f"smtp://127.0.0.1:{port}"
    rig.add_worker()
    request_id = rig.caller.request(address())
    rig.worker.wait_for_log("cannot be reached")
    assert rig.results.exists(f"celery-task-meta-{request_id}") == 0
    with running(ScriptedServer(), port) as late:
        assert rig.caller.reply(request_id)["error"] == 0
        assert len(late.mails) == 1


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

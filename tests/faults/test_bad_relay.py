"""Relays that fail at every step, in every way: each request ends in the reply that the contract names."""

from __future__ import annotations

import datetime as dt
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.harness import Stage, eventually, new_address
from support.smtp_server import Act, Drop, Last, ScriptedServer, Silence, Slowly, running
from support.tcp_proxy import HOLE, PASS, STALL, TRICKLE

NewStage = Callable[..., Stage]
SEND_TIMEOUT = 1.5


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    """One stage for every fault that concerns a single recipient: the others must not feel it."""
    with Stage(send_timeout=SEND_TIMEOUT, give_up_after=20) as stage:
        stage.add_worker()
        yield stage


REFUSALS: list[tuple[str, str, int]] = [
    ("rcpt", "550 5.1.1 no such user", 5),
    ("rcpt", "550 no such user", 5),
    ("rcpt", "551 not here", 5),
    ("rcpt", "552 5.2.2 mailbox full", 5),
    ("rcpt", "553 bad name", 5),
    ("rcpt", "554 5.7.1 no", 5),
    ("data", "554 5.5.1 no", 5),
    ("dot", "550 5.1.1 no such user", 5),
    ("dot", "552 5.3.4 too big", 5),
    ("dot", "554 5.7.1 spam", 5),
    ("mail", "550 5.1.8 no", 0),  # the script of a recipient begins at RCPT: this one is never played
]
FOR_NOW: list[tuple[str, Act]] = [
    ("rcpt", "421 4.3.2 shutting down"),
    ("rcpt", Last("421 4.3.2 shutting down")),
    ("rcpt", "450 4.2.1 busy"),
    ("rcpt", "451 4.3.0 greylisted"),
    ("rcpt", "452 4.2.2 full"),
    ("data", "421 4.3.2 shutting down"),
    ("data", "451 4.3.0 later"),
    ("dot", "421 4.3.2 shutting down"),
    ("dot", "450 4.2.1 busy"),
    ("dot", "451 4.3.0 later"),
    ("rcpt", Drop()),
    ("data", Drop()),
    ("rcpt", Silence()),
    ("rcpt", Slowly("250 2.1.5 ok, and that takes its time", 1.0)),
]
UNKNOWN: list[Act] = [Drop(), Silence(), Slowly("250 2.0.0 ok", 1.0), "354 what?", b"\xff\xfe\r\n"]


def test_every_single_recipients_trouble_ends_in_its_reply_and_no_other_recipient_feels_it(shared: Stage) -> None:
    expected: dict[str, int] = {}
    for step, reply, error in REFUSALS:
        email = new_address(step)
        shared.script(email, **{step: reply})
        expected[email] = error
    for step, act in FOR_NOW:
        email = new_address(step)
        shared.script(email, **{step: [act]})
        expected[email] = 0
    for act in UNKNOWN:
        email = new_address("unknown")
        shared.script(email, dot=[act])
        expected[email] = 0
    twice_unknown = new_address("twice")
    shared.script(twice_unknown, dot=Drop())
    expected[twice_unknown] = 6
    for _ in range(50):
        expected[new_address("good")] = 0
    emails = list(expected)
    ids = shared.push(*emails)
    assert dict(zip(emails, shared.replies(ids, 30), strict=True)) == expected
    refused = [email for email in emails if email.startswith("dot.")]
    doubtful = [each for each, email in zip(ids, emails, strict=True) if email.startswith(("unknown.", "twice."))]
    finding = shared.check(twice=doubtful, refused=refused)
    assert len(finding.mails[ids[emails.index(twice_unknown)]]) == 2


@pytest.mark.slow
def test_what_no_relay_takes_before_the_deadline_is_answered_6_unsent(new_stage: NewStage) -> None:
    stage = new_stage(give_up_after=3)
    email = new_address()
    stage.script(email, rcpt="451 4.3.0 later")
    began = time.monotonic()
    assert stage.ask(email, 8) == 6
    assert time.monotonic() - began > 2.5
    assert stage.whole(email) == []
    stage.check()


def outage(stage: Stage, begin: Callable[[], Any], end: Callable[[], Any], seconds: float) -> list[str]:
    """Requests before, during and after an outage of the only relay."""
    ids = stage.push(*(new_address() for _ in range(50)))
    begin()
    ids += stage.push(*(new_address() for _ in range(200)))
    time.sleep(seconds)
    end()
    ids += stage.push(*(new_address() for _ in range(50)))
    return ids


@pytest.mark.slow
def test_requests_outlive_a_relay_that_refuses_connections(new_stage: NewStage) -> None:
    stage = new_stage(relay_proxy=True)
    assert stage.relay_proxy is not None
    ids = outage(stage, stage.relay_proxy.refuse, stage.relay_proxy.admit, 2)
    assert stage.replies(ids, 20) == [0] * len(ids)
    stage.check(twice=ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [HOLE, STALL, TRICKLE])
def test_requests_outlive_a_network_that_fails_on_the_way_to_the_relay(new_stage: NewStage, mode: str) -> None:
    stage = new_stage(relay_proxy=True, send_timeout=SEND_TIMEOUT, connect_timeout=1)
    proxy = stage.relay_proxy
    assert proxy is not None

    def put(wanted: str) -> Callable[[], None]:
        return lambda: setattr(proxy, "mode", wanted)

    ids = outage(stage, put(mode), put(PASS), 5)
    assert set(stage.replies(ids, 60)) <= {0, 6}
    finding = stage.check(twice=ids, within=30)
    # Whoever got no answer twice is told so.
    assert all(len(finding.mails[each]) == 2 for each, error in finding.errors.items() if error == 6)


@pytest.mark.slow
def test_requests_outlive_resets_on_the_way_to_the_relay(new_stage: NewStage) -> None:
    stage = new_stage(relay_proxy=True)
    assert stage.relay_proxy is not None
    ids: list[str] = []
    for _ in range(30):
        ids += stage.push(*(new_address() for _ in range(20)))
        stage.relay_proxy.reset()
        time.sleep(0.05)
    assert set(stage.replies(ids, 60)) <= {0, 6}
    stage.check(twice=ids)


def expired(authority: trustme.CA) -> ssl.SSLContext:
    """A server's side of TLS, whose certificate has expired and has no other fault."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", not_after=dt.datetime.now(dt.UTC) - dt.timedelta(days=1)).configure_cert(context)
    return context


def trusting(authority: trustme.CA, directory: Path) -> dict[str, str]:
    """A worker's environment in which it trusts the authority."""
    path = directory / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return {"SSL_CERT_FILE": str(path)}


FAULTS: dict[str, tuple[str, dict[str, Act | list[Act]]]] = {
    "silent": ("smtp", {"banner": Silence()}),
    "a byte a second": ("smtp", {"banner": Slowly("220 scripted ESMTP", 1.0)}),
    "hangs up": ("smtp", {"banner": Drop()}),
    "421": ("smtp", {"banner": Last("421 4.7.0 too busy")}),
    "554": ("smtp", {"banner": Last("554 5.7.1 go away")}),
    "EHLO refused": ("smtp", {"ehlo": "502 5.5.1 what?"}),
    "MAIL 451": ("smtp", {"mail": "451 4.3.0 later"}),
    "MAIL 421": ("smtp", {"mail": Last("421 4.3.2 bye")}),
    "STARTTLS refused": ("smtp+starttls", {"starttls": "454 4.7.0 no TLS"}),
    "TLS stalls": ("smtp+starttls", {"starttls": Silence()}),
    "TLS stalls after 220": ("smtp+starttls", {}),
    "implicit TLS stalls": ("smtps", {"banner": Silence()}),
    "certificate expired": ("smtps", {}),
    "AUTH refused": ("smtp", {"auth": "535 5.7.8 no"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_sick_relay_is_passed_over_for_the_next_one(new_stage: NewStage, tmp_path: Path, fault: str) -> None:
    scheme, script = FAULTS[fault]
    authority = trustme.CA()
    tls = expired(authority) if fault == "certificate expired" else None
    offers = ("PIPELINING", "8BITMIME", "SMTPUTF8", "STARTTLS", "AUTH PLAIN")
    unhealthy = ScriptedServer(script, offers=offers, tls=tls, implicit_tls=tls is not None)
    with ExitStack() as stack:
        stack.enter_context(running(unhealthy))
        stage = new_stage(workers=0, connect_timeout=1, send_timeout=8)
        who = "user:secret@" if fault == "AUTH refused" else ""
        first = f"{scheme}://{who}127.0.0.1:{unhealthy.port}"
        stage.settings["VERIFY_RELAYS"] = f"{first},smtp://127.0.0.1:{stage.sink.port}"
        stage.add_worker(environment=trusting(authority, tmp_path))
        ids = stage.push(*(new_address() for _ in range(100)))
        assert stage.replies(ids, 15) == [0] * 100
        assert unhealthy.connections > 0 or tls  # asyncio tells its servers nothing of a handshake that fails
        assert unhealthy.mails == []
        assert stage.check().errors
        assert "secret" not in stage.worker.log


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_requests_wait_for_the_only_relay_until_their_deadline(new_stage: NewStage, tmp_path: Path, fault: str) -> None:
    scheme, script = FAULTS[fault]
    authority = trustme.CA()
    tls = expired(authority) if fault == "certificate expired" else None
    offers = ("PIPELINING", "8BITMIME", "SMTPUTF8", "STARTTLS", "AUTH PLAIN")
    unhealthy = ScriptedServer(script, offers=offers, tls=tls, implicit_tls=tls is not None)
    stage = new_stage(workers=0, sink=unhealthy, connect_timeout=1, send_timeout=3, give_up_after=4)
    who = "user:secret@" if fault == "AUTH refused" else ""
    stage.settings["VERIFY_RELAYS"] = f"{scheme}://{who}127.0.0.1:{unhealthy.port}"
    stage.add_worker(environment=trusting(authority, tmp_path))
    ids = stage.push(*(new_address() for _ in range(40)))
    # "Every relay answered some 5xx" is a refusal; what else a relay may do is no answer.
    assert stage.replies(ids, 12) == [5 if fault in {"554", "EHLO refused"} else 6] * 40
    eventually(lambda: not stage.held())
    assert unhealthy.dotted == []
    stage.check(fresh=False)


@pytest.mark.slow
def test_a_relay_that_is_away_for_long_costs_bounded_memory_and_drains_oldest_first(new_stage: NewStage) -> None:
    stage = new_stage(relay_proxy=True, log_level="INFO")
    proxy = stage.relay_proxy
    assert proxy is not None
    proxy.refuse()
    old = stage.push(*(new_address("old") for _ in range(5000)))
    eventually(lambda: stage.held().get("parked", 0) > 500, 30)
    new = stage.push(*(new_address("new") for _ in range(5000)))
    time.sleep(5)
    assert stage.held().get("unacked", 0) < 300
    proxy.admit()
    assert stage.replies([*old, *new], 100) == [0] * 10_000
    stage.check(within=60)

"""Relays fail at every step, in every way: each request ends in the reply that the contract names."""

from __future__ import annotations

import datetime as dt
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.caller import address
from support.process import eventually
from support.rig import Rig
from support.smtp_server import Act, Drop, Last, ScriptedServer, Silence, Slowly, running
from support.tcp_proxy import HOLE, PASS, STALL, TRICKLE

NewRig = Callable[..., Rig]
SEND_TIMEOUT = 5  # seconds


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
    ("mail", "550 5.1.8 no", 0),  # never used: the script of a recipient begins at RCPT
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


def test_a_fault_at_one_recipient_affects_no_other(new_rig: NewRig) -> None:
    rig = new_rig(send_timeout=SEND_TIMEOUT, give_up_after=60)
    expected: dict[str, int] = {}
    for step, reply, error in REFUSALS:
        email = address(step)
        rig.script(email, **{step: reply})
        expected[email] = error
    for step, act in FOR_NOW:
        email = address(step)
        rig.script(email, **{step: [act]})
        expected[email] = 0
    for act in UNKNOWN:
        email = address("unknown")
        rig.script(email, dot=[act])
        expected[email] = 0
    twice_unknown = address("twice")
    rig.script(twice_unknown, dot=Drop())
    expected[twice_unknown] = 6
    for _ in range(50):
        expected[address("good")] = 0
    emails = list(expected)
    ids = rig.caller.request_all(*emails)
    assert dict(zip(emails, rig.caller.replies(ids), strict=True)) == expected
    refused = [email for email in emails if email.startswith("dot.")]
    doubtful = [each for each, email in zip(ids, emails, strict=True) if email.startswith(("unknown.", "twice."))]
    finding = rig.audit(twice=doubtful, refused=refused)
    assert len(finding.mails[ids[emails.index(twice_unknown)]]) == 2


@pytest.mark.slow
def test_a_request_that_no_relay_takes_in_time_is_answered_6_unsent(new_rig: NewRig) -> None:
    rig = new_rig(give_up_after=3)
    email = address()
    rig.script(email, rcpt="451 4.3.0 later")
    assert rig.caller.ask(email)["error"] == 6
    assert rig.dotted_to(email) == []
    rig.audit()


def outage(rig: Rig, begin: Callable[[], Any], end: Callable[[], Any], seconds: float) -> list[str]:
    """Requests before, during and after an outage of the only relay."""
    ids = rig.caller.request_all(*(address() for _ in range(50)))
    begin()
    ids += rig.caller.request_all(*(address() for _ in range(200)))
    time.sleep(seconds)
    end()
    ids += rig.caller.request_all(*(address() for _ in range(50)))
    return ids


@pytest.mark.slow
def test_requests_survive_a_relay_that_refuses_connections(new_rig: NewRig) -> None:
    rig = new_rig(relay_proxy=True)
    assert rig.relay_proxy is not None
    ids = outage(rig, rig.relay_proxy.refuse, rig.relay_proxy.admit, 2)
    assert rig.caller.replies(ids) == [0] * len(ids)
    rig.audit(twice=ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [HOLE, STALL, TRICKLE])
def test_requests_survive_a_failing_network_to_the_relay(new_rig: NewRig, mode: str) -> None:
    rig = new_rig(relay_proxy=True, send_timeout=SEND_TIMEOUT, connect_timeout=1)
    proxy = rig.relay_proxy
    assert proxy is not None

    def put(wanted: str) -> Callable[[], None]:
        return lambda: setattr(proxy, "mode", wanted)

    ids = outage(rig, put(mode), put(PASS), 5)
    assert set(rig.caller.replies(ids)) <= {0, 6}
    finding = rig.audit(twice=ids)
    # Error 6 is for those whose mail was in doubt twice.
    assert all(len(finding.mails[each]) == 2 for each, error in finding.errors.items() if error == 6)


@pytest.mark.slow
def test_requests_survive_resets_of_relay_connections(new_rig: NewRig) -> None:
    rig = new_rig(relay_proxy=True)
    assert rig.relay_proxy is not None
    ids: list[str] = []
    for _ in range(30):
        ids += rig.caller.request_all(*(address() for _ in range(20)))
        rig.relay_proxy.reset()
        time.sleep(0.05)
    assert set(rig.caller.replies(ids)) <= {0, 6}
    rig.audit(twice=ids)


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
def test_an_unhealthy_relay_is_passed_over_for_the_next_one(new_rig: NewRig, tmp_path: Path, fault: str) -> None:
    scheme, script = FAULTS[fault]
    authority = trustme.CA()
    tls = expired(authority) if fault == "certificate expired" else None
    offers = ("PIPELINING", "8BITMIME", "SMTPUTF8", "STARTTLS", "AUTH PLAIN")
    unhealthy = ScriptedServer(script, offers=offers, tls=tls, implicit_tls=tls is not None)
    with ExitStack() as stack:
        stack.enter_context(running(unhealthy))
        rig = new_rig(workers=0, connect_timeout=1, send_timeout=8)
        who = "user:secret@" if fault == "AUTH refused" else ""
        first = f"{scheme}://{who}127.0.0.1:{unhealthy.port}"
        rig.settings["VERIFY_RELAYS"] = f"{first},smtp://127.0.0.1:{rig.relay.port}"
        rig.add_worker(environment=trusting(authority, tmp_path))
        ids = rig.caller.request_all(*(address() for _ in range(100)))
        assert rig.caller.replies(ids) == [0] * 100
        assert unhealthy.connections > 0 or tls  # asyncio does not tell its servers about failed handshakes
        assert unhealthy.mails == []
        assert rig.audit().errors
        assert "secret" not in rig.worker.log


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_requests_wait_for_the_only_relay_until_their_deadline(new_rig: NewRig, tmp_path: Path, fault: str) -> None:
    scheme, script = FAULTS[fault]
    authority = trustme.CA()
    tls = expired(authority) if fault == "certificate expired" else None
    offers = ("PIPELINING", "8BITMIME", "SMTPUTF8", "STARTTLS", "AUTH PLAIN")
    unhealthy = ScriptedServer(script, offers=offers, tls=tls, implicit_tls=tls is not None)
    rig = new_rig(workers=0, relay=unhealthy, connect_timeout=1, send_timeout=3, give_up_after=4)
    who = "user:secret@" if fault == "AUTH refused" else ""
    rig.settings["VERIFY_RELAYS"] = f"{scheme}://{who}127.0.0.1:{unhealthy.port}"
    rig.add_worker(environment=trusting(authority, tmp_path))
    ids = rig.caller.request_all(*(address() for _ in range(40)))
    # A relay that answers 5xx has refused; anything else is no answer.
    assert rig.caller.replies(ids) == [5 if fault in {"554", "EHLO refused"} else 6] * 40
    eventually(lambda: not rig.held())
    assert unhealthy.dotted == []
    rig.audit(fresh=False)


@pytest.mark.slow
def test_a_long_outage_of_the_relay_costs_bounded_memory(new_rig: NewRig) -> None:
    rig = new_rig(relay_proxy=True, log_level="INFO")
    proxy = rig.relay_proxy
    assert proxy is not None
    proxy.refuse()
    old = rig.caller.request_all(*(address("old") for _ in range(5000)))
    eventually(lambda: rig.held().get("delayed", 0) > 500)
    new = rig.caller.request_all(*(address("new") for _ in range(5000)))
    time.sleep(5)
    assert rig.held().get("unacked", 0) < 300
    proxy.admit()
    assert rig.caller.replies([*old, *new]) == [0] * 10_000
    rig.audit()

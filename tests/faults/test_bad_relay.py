"""Relays fail at every step, in every way: each request ends in the reply that the contract names."""

from __future__ import annotations

import datetime as dt
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.caller import address
from support.process import eventually
from support.rig import NewRig, Rig
from support.smtp_server import Act, Drop, Last, ScriptedServer, Silence, Slowly, running
from support.tcp_proxy import HOLE, PASS, STALL, TRICKLE, in_mode

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
    ids = outage(rig, rig.relay_proxy.refuse, rig.relay_proxy.admit, 2)
    assert rig.caller.replies(ids) == [0] * len(ids)
    rig.audit(twice=ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [HOLE, STALL, TRICKLE])
def test_requests_survive_a_failing_network_to_the_relay(new_rig: NewRig, mode: str) -> None:
    rig = new_rig(relay_proxy=True, send_timeout=SEND_TIMEOUT, connect_timeout=1)
    ids = outage(rig, in_mode(rig.relay_proxy, mode), in_mode(rig.relay_proxy, PASS), 5)
    assert set(rig.caller.replies(ids)) <= {0, 6}
    finding = rig.audit(twice=ids)
    # Error 6 is for those whose mail was in doubt twice.
    assert all(len(finding.mails[each]) == 2 for each, error in finding.errors.items() if error == 6)


@pytest.mark.slow
def test_requests_survive_resets_of_relay_connections(new_rig: NewRig) -> None:
    rig = new_rig(relay_proxy=True)
    ids: list[str] = []
    for _ in range(30):
        ids += rig.caller.request_all(*(address() for _ in range(20)))
        rig.relay_proxy.reset()
        time.sleep(0.05)
    assert set(rig.caller.replies(ids)) <= {0, 6}
    rig.audit(twice=ids)


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


def unhealthy_relay(fault: str, authority: trustme.CA) -> ScriptedServer:
    """A relay with one of `FAULTS`, not started. An expired certificate has no other fault."""
    tls = None
    if fault == "certificate expired":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        yesterday = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
        authority.issue_cert("127.0.0.1", not_after=yesterday).configure_cert(tls)
    offers = ("PIPELINING", "8BITMIME", "SMTPUTF8", "STARTTLS", "AUTH PLAIN")
    return ScriptedServer(FAULTS[fault][1], offers=offers, tls=tls, implicit_tls=tls is not None)


def relay_url(fault: str, relay: ScriptedServer) -> str:
    """How a worker reaches it."""
    login = "user:secret@" if fault == "AUTH refused" else ""
    return f"{FAULTS[fault][0]}://{login}127.0.0.1:{relay.port}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_unhealthy_relay_is_passed_over_for_the_next_one(new_rig: NewRig, tmp_path: Path, fault: str) -> None:
    environment = trusting(authority := trustme.CA(), tmp_path)
    with running(unhealthy_relay(fault, authority)) as unhealthy:
        rig = new_rig(workers=0, connect_timeout=1, send_timeout=8)
        rig.settings["VERIFY_RELAYS"] = f"{relay_url(fault, unhealthy)},smtp://127.0.0.1:{rig.relay.port}"
        rig.add_worker(environment=environment)
        ids = rig.caller.request_all(*(address() for _ in range(100)))
        assert rig.caller.replies(ids) == [0] * 100
        # asyncio does not tell its servers about failed handshakes.
        assert unhealthy.connections > 0 or unhealthy.tls
        assert unhealthy.mails == []
        assert rig.audit().errors
        assert "secret" not in rig.worker.log


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_requests_wait_for_the_only_relay_until_their_deadline(new_rig: NewRig, tmp_path: Path, fault: str) -> None:
    environment = trusting(authority := trustme.CA(), tmp_path)
    unhealthy = unhealthy_relay(fault, authority)
    rig = new_rig(workers=0, relay=unhealthy, connect_timeout=1, send_timeout=3, give_up_after=4)
    rig.settings["VERIFY_RELAYS"] = relay_url(fault, unhealthy)
    rig.add_worker(environment=environment)
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
    proxy.refuse()
    old = rig.caller.request_all(*(address("old") for _ in range(5000)))
    eventually(lambda: rig.held().get("delayed", 0) > 500)
    new = rig.caller.request_all(*(address("new") for _ in range(5000)))
    time.sleep(5)
    assert rig.held().get("unacked", 0) < 300
    proxy.admit()
    assert rig.caller.replies([*old, *new]) == [0] * 10_000
    rig.audit()

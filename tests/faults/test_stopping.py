"""A worker stopped under load: requests in hand are finished or put back, and nothing answered is served again."""

from __future__ import annotations

import signal
import time

import pytest
from support.caller import address
from support.process import eventually
from support.rig import NewRig, Rig
from support.smtp_server import Later, Silence

BOUND = 15.0 + 30.0  # seconds from SIGTERM to exit: the contract's, and room for a loaded machine


def under_load(new_rig: NewRig, count: int = 1000, **options: object) -> tuple[Rig, list[str]]:
    rig = new_rig(**options)
    ids = rig.caller.request_all(*(address() for _ in range(count)))
    eventually(lambda: len(rig.relay.mails) > 100)
    return rig, ids


def stop(rig: Rig, *signals: signal.Signals, apart: float = 0.1) -> float:
    """Send the signals; how many seconds the worker took to end."""
    began = time.monotonic()
    for each in signals:
        if rig.worker.alive:
            rig.worker.signal(each)
            time.sleep(apart)
    rig.worker.wait(BOUND)
    return time.monotonic() - began


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), pytest.param((signal.SIGINT,), marks=pytest.mark.slow)],
    ids=["TERM", "INT"],
)
def test_a_warm_shutdown_finishes_what_is_on_the_wire_and_puts_back_the_rest(
    new_rig: NewRig, signals: tuple[signal.Signals, ...]
) -> None:
    rig, ids = under_load(new_rig)
    assert stop(rig, *signals) < BOUND
    held = rig.held()
    assert held.get("unacked", 0) == held.get("unacked_index", 0) == 0, held
    assert held["queue"] + rig.caller.answered(ids) == len(ids)
    assert len(rig.relay.dotted) == rig.caller.answered(ids)
    rig.add_worker()
    # The rest was put back, so it is served without waiting for the visibility timeout.
    assert rig.caller.replies(ids) == [0] * len(ids)
    rig.audit()


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param((signal.SIGTERM, signal.SIGTERM), marks=pytest.mark.slow),
        pytest.param((signal.SIGINT, signal.SIGINT), marks=pytest.mark.slow),
        pytest.param((signal.SIGQUIT,), marks=pytest.mark.slow),
        pytest.param((signal.SIGQUIT, signal.SIGQUIT), marks=pytest.mark.slow),
        pytest.param((signal.SIGTERM, signal.SIGQUIT), marks=pytest.mark.slow),
    ],
    ids=["TERM-TERM", "INT-INT", "QUIT", "QUIT-QUIT", "TERM-QUIT"],
)
def test_a_cold_shutdown_loses_nothing(new_rig: NewRig, signals: tuple[signal.Signals, ...]) -> None:
    rig, ids = under_load(new_rig)
    assert stop(rig, *signals, apart=0.02) < BOUND
    rig.add_worker()
    assert rig.caller.replies(ids) == [0] * len(ids)
    finding = rig.audit(twice=ids)
    assert sum(len(mails) == 2 for mails in finding.mails.values()) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("connections", [2, 32])
def test_a_slow_relay_does_not_delay_the_shutdown(new_rig: NewRig, connections: int) -> None:
    rig = new_rig(relay_connections=connections, send_timeout=10)
    emails = [address() for _ in range(30)]
    silent = set(emails[::15])
    for email in emails:
        rig.script(email, dot=[Silence()] if email in silent else [Later("250 2.0.0 ok", 1.0)])
    ids = rig.caller.request_all(*emails)
    eventually(lambda: len(rig.relay.dotted) >= 2)
    assert stop(rig, signal.SIGTERM) < BOUND
    held = rig.held()
    assert held.get("unacked", 0) == held.get("unacked_index", 0) == 0, held
    rig.add_worker()
    rig.caller.replies(ids)
    rig.audit(twice=[request_id for request_id, email in zip(ids, emails, strict=True) if email in silent])


@pytest.mark.slow
@pytest.mark.parametrize("away", ["killed", "paused"])
def test_a_shutdown_while_redis_is_away_ends_and_loses_nothing(new_rig: NewRig, away: str) -> None:
    rig, ids = under_load(new_rig, aof="always", count=1000)
    (rig.server.kill if away == "killed" else rig.server.pause)()
    try:
        assert stop(rig, signal.SIGTERM) < BOUND
    finally:
        if away == "killed":
            rig.server.start()
        else:
            rig.server.resume()
    rig.add_worker()
    assert set(rig.caller.replies(ids)) <= {0, 1}
    rig.audit(twice=ids, heard=False)


@pytest.mark.slow
def test_a_shutdown_while_redis_is_full_loses_no_reply(new_rig: NewRig) -> None:
    rig = new_rig()
    emails = [address() for _ in range(20)]
    for email in emails:
        rig.script(email, dot=[Later("250 2.0.0 ok", 1.0)])
    ids = rig.caller.request_all(*emails)
    eventually(lambda: len(rig.relay.dotted) == 20)
    rig.broker.config_set("maxmemory", 1)
    assert stop(rig, signal.SIGTERM) < BOUND
    rig.broker.config_set("maxmemory", 0)
    rig.add_worker()
    assert rig.caller.replies(ids) == [0] * 20
    rig.audit()

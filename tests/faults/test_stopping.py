"""Signals under load: what is in hand is finished or put back, and nothing that was answered comes again."""

from __future__ import annotations

import datetime as dt
import signal
import time
from collections.abc import Callable

import pytest
from support.harness import BACK, Stage, eventually, new_address
from support.smtp_server import Later, Silence

NewStage = Callable[..., Stage]
BOUND = 15.0  # seconds from SIGTERM to exit, by contract


def under_load(new_stage: NewStage, count: int = 1000, **options: object) -> tuple[Stage, list[str]]:
    stage = new_stage(**options)
    ids = stage.push(*(new_address() for _ in range(count)))
    eventually(lambda: len(stage.sink.mails) > 100, 30)
    return stage, ids


def stop(stage: Stage, *signals: signal.Signals, apart: float = 0.1) -> float:
    """Send the signals; the seconds until the worker has ended."""
    began = time.monotonic()
    for each in signals:
        if stage.worker.alive:
            stage.worker.process.send_signal(each)
            time.sleep(apart)
    stage.worker.wait(BOUND)
    return time.monotonic() - began


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), pytest.param((signal.SIGINT,), marks=pytest.mark.slow)],
    ids=["TERM", "INT"],
)
def test_a_warm_shutdown_finishes_what_is_in_hand_and_puts_back_the_rest(
    new_stage: NewStage, signals: tuple[signal.Signals, ...]
) -> None:
    stage, ids = under_load(new_stage)
    assert stop(stage, *signals) < BOUND
    held = stage.held()
    assert held.get("unacked", 0) == held.get("unacked_index", 0) == 0, held
    assert held["queue"] + stage.answered(ids) == len(ids)
    assert len(stage.sink.dotted) == stage.answered(ids)
    stage.add_worker()
    # No visibility has to lapse: the rest is served at once.
    assert stage.replies(ids, 20) == [0] * len(ids)
    stage.check()


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
def test_an_impatient_shutdown_loses_nothing(new_stage: NewStage, signals: tuple[signal.Signals, ...]) -> None:
    stage, ids = under_load(new_stage)
    assert stop(stage, *signals, apart=0.02) < BOUND
    stage.add_worker()
    assert stage.replies(ids, BACK + 20) == [0] * len(ids)
    finding = stage.check(twice=ids)
    assert sum(len(mails) == 2 for mails in finding.mails.values()) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("connections", [2, 32])
def test_a_slow_relay_does_not_hold_up_the_shutdown(new_stage: NewStage, connections: int) -> None:
    stage = new_stage(relay_connections=connections)
    emails = [new_address() for _ in range(30)]
    silent = set(emails[::15])
    for email in emails:
        stage.script(email, dot=[Silence()] if email in silent else [Later("250 2.0.0 ok", 1.0)])
    ids = stage.push(*emails)
    eventually(lambda: len(stage.sink.dotted) >= 2)
    assert stop(stage, signal.SIGTERM) < BOUND
    held = stage.held()
    assert held.get("unacked", 0) == held.get("unacked_index", 0) == 0, held
    stage.add_worker()
    stage.replies(ids, 60)
    stage.check(twice=[request_id for request_id, email in zip(ids, emails, strict=True) if email in silent], within=60)


@pytest.mark.slow
@pytest.mark.parametrize("away", ["killed", "paused"])
def test_a_shutdown_while_redis_is_away_ends_in_time_and_loses_nothing(new_stage: NewStage, away: str) -> None:
    stage, ids = under_load(new_stage, aof="always", count=1000)
    (stage.server.kill if away == "killed" else stage.server.pause)()
    try:
        assert stop(stage, signal.SIGTERM) < BOUND
    finally:
        if away == "killed":
            stage.server.start()
        else:
            stage.server.resume()
    stage.add_worker()
    assert set(stage.replies(ids, BACK + 20)) <= {0, 1}
    stage.check(twice=ids, heard=False)


@pytest.mark.slow
def test_a_shutdown_while_redis_is_full_loses_no_reply(new_stage: NewStage) -> None:
    stage = new_stage()
    emails = [new_address() for _ in range(20)]
    for email in emails:
        stage.script(email, dot=[Later("250 2.0.0 ok", 1.0)])
    ids = stage.push(*emails)
    eventually(lambda: len(stage.sink.dotted) == 20)
    stage.broker.config_set("maxmemory", 1)
    assert stop(stage, signal.SIGTERM) < BOUND
    stage.broker.config_set("maxmemory", 0)
    stage.add_worker()
    assert stage.replies(ids, BACK) == [0] * 20
    stage.check()


@pytest.mark.slow
def test_a_worker_stopped_while_it_waits_for_an_eta_puts_the_request_back(new_stage: NewStage) -> None:
    stage = new_stage()
    eta = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=5)).isoformat()
    ids = stage.push(new_address(), new_address(), headers={"eta": eta})
    eventually(lambda: stage.held().get("unacked") == 2)
    assert stop(stage, signal.SIGTERM) < BOUND
    assert stage.held() == {"queue": 2}
    stage.add_worker()
    assert stage.replies(ids, 10) == [0, 0]
    stage.check()

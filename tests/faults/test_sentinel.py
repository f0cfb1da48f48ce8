"""A primary behind sentinels that dies, falls silent or is replaced: the service goes on by itself.

What asynchronous replication loses with a primary is lost, and nothing else: docs/high-availability.md counts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import redis
from support.harness import Stage, eventually_empty, new_address
from support.process import eventually
from support.sentinel_servers import SentinelServers, role
from support.smtp_server import Held

from bench.soak.failover import FAULTS, Failover, servers_for
from producer.client import VerificationClient
from producer.settings import Settings

NewStage = Callable[..., Stage]
SAID = 3.0  # seconds within which a client is told that Redis is away


@pytest.fixture
def new_failover() -> Iterator[Callable[..., Failover]]:
    with ExitStack() as stack:

        def make(watched: SentinelServers) -> Failover:
            failover = Failover(watched)
            stack.callback(failover.close)
            return failover

        yield make


def ask_until_served(client: VerificationClient, within: float) -> set[int]:
    """Ask again and again, each time within 3 s, until the answer is Success; the errors before."""
    errors: set[int] = set()
    deadline = time.monotonic() + within
    while True:
        began = time.monotonic()
        error = client.request(new_address()).error
        assert time.monotonic() - began < SAID or error != 1
        if error == 0:
            return errors
        errors.add(int(error))
        assert time.monotonic() < deadline, errors


def assert_in_order(stage: Stage) -> None:
    """Nothing is left anywhere, nothing lives for ever, and nothing unforeseen or private is in a log."""
    eventually_empty(stage.held, 15, stage._state)
    stage._check_ttls()
    stage._check_logs()
    assert stage.worker.alive


@pytest.mark.slow
def test_a_dead_primary_is_replaced_and_what_waited_is_served(new_stage: NewStage) -> None:
    stage = new_stage(watched=SentinelServers())
    servers = stage.watched
    assert servers is not None
    with VerificationClient(Settings(redis_url=servers.url())) as client:
        assert client.request(new_address()).error == 0
        held = Held("250 2.0.0 ok")
        email = new_address()
        stage.script(email, dot=[held])
        [request_id] = stage.push(email)
        eventually(held.reached.is_set)
        old = servers.primary
        with old.client() as direct:
            assert direct.wait(1, 5000) == 1  # the replica has all of it
        old.kill()
        held.release.set()
        assert ask_until_served(client, 15) <= {1, 6}
        assert stage.reply(request_id, 10) == 0
        old.start()
        eventually(lambda: role(old) == "slave", 30)
        assert client.request(new_address()).error == 0
    # The mark was kept in hand while there was no primary, so what was accepted is not sent again.
    assert len(stage.whole(email)) == 1
    assert_in_order(stage)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", FAULTS)
def test_under_load_nothing_is_lost_but_what_the_old_primary_did_not_hand_on(
    new_failover: Callable[..., Failover], fault: str
) -> None:
    failover = new_failover(servers_for(fault))
    outcome = failover.run(FAULTS[fault])
    assert outcome.unexplained == []
    if fault == "cut_off":
        assert outcome.lost + outcome.codes_gone > 0  # the count can see a loss
    elif fault == "coordinated":
        assert outcome.lost == outcome.doubled == 0
    assert outcome.acknowledged > 500
    assert outcome.longest < 6  # VERIFY_REPLY_TIMEOUT is 5 s
    assert failover.ask_once_more().told == 0


@pytest.mark.slow
def test_a_primary_without_a_replica_that_must_have_one_costs_an_error_and_no_request(new_stage: NewStage) -> None:
    guard = ("--min-replicas-to-write", "1", "--min-replicas-max-lag", "1")
    stage = new_stage(watched=SentinelServers(options=guard))
    servers = stage.watched
    assert servers is not None
    [replica] = servers.others
    with VerificationClient(Settings(redis_url=servers.url())) as client:
        assert client.request(new_address()).error == 0
        replica.pause()
        eventually(lambda: client.request(new_address()).error == 1, 15)
        with pytest.raises(redis.ResponseError, match="NOREPLICAS"):
            stage.broker.lpush("verification", "never")
        replica.resume()
        ask_until_served(client, 15)
    assert_in_order(stage)


@pytest.mark.slow
def test_one_sentinel_of_three_is_enough_to_start_with(new_stage: NewStage) -> None:
    servers = SentinelServers()
    stage = new_stage(watched=servers, workers=0)
    servers.sentinels[0].kill()
    servers.sentinels[1].pause()
    stage.add_worker()
    with VerificationClient(Settings(redis_url=servers.url())) as client:
        assert client.request(new_address()).error == 0
    assert_in_order(stage)

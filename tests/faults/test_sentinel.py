"""Redis behind sentinels: the service goes on by itself when the primary dies, hangs or is replaced.

Nothing is lost but what asynchronous replication loses with a primary; docs/high-availability.md has the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import redis
from support.caller import address
from support.process import eventually
from support.rig import NewRig, Rig
from support.sentinel_servers import SentinelServers, role
from support.smtp_server import Held

from bench.soak.failover import FAULTS, Failover
from producer.client import VerificationClient
from producer.settings import Settings


@pytest.fixture
def new_failover() -> Iterator[Callable[..., Failover]]:
    with ExitStack() as stack:

        def make(servers: SentinelServers) -> Failover:
            failover = Failover(servers)
            stack.callback(failover.close)
            return failover

        yield make


def ask_until_served(client: VerificationClient) -> set[int]:
    """Ask again and again until the answer is Success; the errors before."""
    errors: set[int] = set()

    def served() -> bool:
        errors.add(int(client.request(address()).error))
        return 0 in errors

    eventually(served)
    return errors - {0}


def assert_in_order(rig: Rig) -> None:
    """Nothing is left anywhere, no key lives for ever, and no log tells of a bug or a secret."""
    eventually(lambda: not rig.held())
    rig.assert_ttls()
    rig.assert_private()
    rig.assert_no_bugs()
    assert rig.worker.alive


@pytest.mark.slow
def test_requests_that_waited_are_served_by_the_new_primary(new_rig: NewRig) -> None:
    servers = SentinelServers()
    rig = new_rig(sentinels=servers)
    with VerificationClient(Settings(redis_url=servers.url())) as client:
        assert client.request(address()).error == 0
        held = Held("250 2.0.0 ok")
        email = address()
        rig.script(email, dot=[held])
        request_id = rig.caller.request(email)
        eventually(held.reached.is_set)
        old = servers.primary
        with old.client() as direct:
            assert direct.wait(1, 30_000) == 1  # the replica has all of it
        old.kill()
        held.release.set()
        assert ask_until_served(client) <= {1, 6}
        assert rig.caller.reply(request_id)["error"] == 0
        old.start()
        eventually(lambda: role(old) == "slave")
        assert client.request(address()).error == 0
    # The worker kept the mark while there was no primary, so it does not send the accepted mail again.
    assert len(rig.dotted_to(email)) == 1
    assert_in_order(rig)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failover_loses_only_what_was_not_replicated(new_failover: Callable[..., Failover], fault: str) -> None:
    failover = new_failover(SentinelServers())
    outcome = failover.run(FAULTS[fault])
    assert outcome.unexplained == []
    if fault == "cut_off":
        assert outcome.lost + outcome.codes_gone > 0  # the count can see a loss
    elif fault == "coordinated":
        assert outcome.lost == outcome.doubled == 0
    assert outcome.acknowledged > 100
    assert outcome.longest < 5 + 10  # VERIFY_REPLY_TIMEOUT, and room for a loaded machine
    assert failover.ask_once_more().answer == 0


@pytest.mark.slow
def test_a_primary_that_lacks_its_replica_refuses_writes_and_loses_nothing(new_rig: NewRig) -> None:
    guard = ("--min-replicas-to-write", "1", "--min-replicas-max-lag", "1")
    servers = SentinelServers(options=guard)
    rig = new_rig(sentinels=servers)
    [replica] = servers.others
    with VerificationClient(Settings(redis_url=servers.url())) as client:
        assert client.request(address()).error == 0
        replica.pause()
        eventually(lambda: client.request(address()).error == 1)
        with pytest.raises(redis.ResponseError, match="NOREPLICAS"):
            rig.broker.lpush("verification", "never")
        replica.resume()
        ask_until_served(client)
    assert_in_order(rig)


@pytest.mark.slow
def test_one_sentinel_of_three_is_enough_to_start(new_rig: NewRig) -> None:
    servers = SentinelServers()
    rig = new_rig(sentinels=servers, workers=0)
    servers.sentinels[0].kill()
    servers.sentinels[1].pause()
    rig.add_worker()
    with VerificationClient(Settings(redis_url=servers.url())) as client:
        assert client.request(address()).error == 0
    assert_in_order(rig)

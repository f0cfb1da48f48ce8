"""The network fails between a worker and Redis, or between a caller and Redis."""

from __future__ import annotations

import contextlib
import time

import pytest
import redis
from support.caller import QUEUE, Load, address
from support.process import eventually
from support.rig import NewRig
from support.smtp_server import Later, ScriptedServer
from support.tcp_proxy import HOLE, MUTE, PASS, STALL, TRICKLE, TcpProxy

from producer.client import VerificationClient
from producer.contract import ErrorCode
from producer.errors import RedisUnavailable
from producer.settings import Settings


@pytest.mark.parametrize(
    "fault", ["reset", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("refuse", HOLE, STALL, TRICKLE))]
)
def test_a_worker_recovers_when_its_network_to_redis_does(new_rig: NewRig, fault: str) -> None:
    rig = new_rig(redis_proxy=True)
    proxy = rig.redis_proxy
    with Load(rig.caller, a_second=200) as load:
        eventually(lambda: len(rig.relay.mails) > 50)
        if fault == "reset":
            for _ in range(10):
                proxy.reset()
                time.sleep(0.2)
        elif fault == "refuse":
            proxy.refuse()
            time.sleep(2)
            proxy.admit()
        else:
            proxy.mode = fault
            time.sleep(3)
            proxy.mode = PASS
        rig.caller.ask(address("after"))
    assert rig.worker.alive
    finding = rig.audit(twice=load.ids)
    assert set(finding.errors.values()) <= {0, 1}


@pytest.mark.slow
def test_answers_lost_on_the_way_delay_no_request_by_a_visibility_timeout(new_rig: NewRig) -> None:
    relay = ScriptedServer({"dot": Later("250 2.0.0 ok", 0.02)})
    rig = new_rig(redis_proxy=True, relay=relay, visibility_timeout=600, relay_connections=8)
    proxy = rig.redis_proxy
    emails = [address() for _ in range(600)]
    ids = rig.caller.request_all(*emails)
    for part in range(1, 4):
        eventually(lambda part=part: len(rig.relay.mails) > 60 * part)  # type: ignore[misc]  # bound at once
        proxy.mode = MUTE
        time.sleep(2)
        proxy.reset()
        proxy.mode = PASS
    errors = rig.caller.replies(ids)
    assert set(errors) <= {0, 1}
    # Whoever was answered RedisErr may ask again at once.
    again = rig.caller.request_all(*(email for email, error in zip(emails, errors, strict=True) if error == 1))
    assert set(rig.caller.replies(again)) <= {0}
    rig.audit()


@pytest.mark.slow
def test_while_one_worker_is_cut_off_another_serves_all(new_rig: NewRig) -> None:
    rig = new_rig(redis_proxy=True)
    proxy = rig.redis_proxy
    rig.add_worker(environment={"VERIFY_REDIS_URL": rig.server.url()})
    ids: list[str] = []
    for mode in (HOLE, PASS, STALL, PASS):
        proxy.mode = mode
        for _ in range(20):
            ids += rig.caller.request_all(*(address() for _ in range(20)))
            time.sleep(0.2)
    assert set(rig.caller.replies(ids)) <= {0, 1}
    rig.audit(twice=ids)


@pytest.mark.parametrize("fault", ["refuse", pytest.param(HOLE, marks=pytest.mark.slow)])
def test_a_caller_that_was_cut_off_from_redis_can_ask_again(new_rig: NewRig, fault: str) -> None:
    rig = new_rig()
    with TcpProxy(rig.server.port) as proxy:
        settings = Settings(redis_url=f"redis://127.0.0.1:{proxy.port}")
        with VerificationClient(settings) as client:
            first = address()
            assert client.request(first).error is ErrorCode.SUCCESS
            if fault == "refuse":
                proxy.refuse()
            else:
                proxy.mode = HOLE
            with contextlib.suppress(RedisUnavailable):
                assert client.request(address()).error in {ErrorCode.REDIS_ERR, ErrorCode.TIMEOUT}
            with pytest.raises(RedisUnavailable):
                client.enqueue(address())
            if fault == "refuse":
                proxy.admit()
            else:
                proxy.mode = PASS
                proxy.reset()
            again = address()
            reply = client.request(again)
            assert reply.error is ErrorCode.SUCCESS
            assert len(rig.dotted_to(again)) == 1
            assert len(rig.dotted_to(first)) == 1


@pytest.mark.slow
def test_a_caller_on_a_trickling_network_still_pushes_whole_messages(new_rig: NewRig) -> None:
    rig = new_rig()
    with TcpProxy(rig.server.port) as proxy:
        proxy.mode, proxy.seconds_a_byte = TRICKLE, 0.001
        with redis.Redis(port=proxy.port, db=1, socket_timeout=30) as client:
            rig.caller.broker, direct = client, rig.caller.broker
            ids = rig.caller.request_all(*(address() for _ in range(5)))
            rig.caller.broker = direct
        assert rig.caller.replies(ids) == [0] * 5
        assert rig.broker.llen(QUEUE) == 0
    rig.audit()

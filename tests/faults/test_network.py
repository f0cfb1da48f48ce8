"""Networks that fail between a worker and Redis, and between a caller and Redis."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
import redis
from support.caller import QUEUE
from support.harness import Load, Stage, eventually, new_address
from support.smtp_server import Later, ScriptedServer
from support.tcp_proxy import HOLE, MUTE, PASS, STALL, TRICKLE, TcpProxy

from producer.client import VerificationClient
from producer.contract import ErrorCode
from producer.errors import RedisUnavailable
from producer.settings import Settings

NewStage = Callable[..., Stage]
RECOVERED = 5.0  # seconds
CUT = ("reset", "refuse")


@pytest.mark.parametrize(
    "fault", ["reset", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("refuse", HOLE, STALL, TRICKLE))]
)
def test_a_worker_whose_way_to_redis_fails_recovers_and_loses_nothing(new_stage: NewStage, fault: str) -> None:
    stage = new_stage(redis_proxy=True)
    proxy = stage.redis_proxy
    assert proxy is not None
    with Load(stage, a_second=200) as load:
        eventually(lambda: len(stage.sink.mails) > 50)
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
        back = time.monotonic()
        [request_id] = stage.push(new_address("after"))
        stage.reply(request_id, RECOVERED + 3)
    assert stage.worker.alive
    finding = stage.check(twice=load.ids, within=20)
    assert set(finding.errors.values()) <= {0, 1}
    assert time.monotonic() - back < 60


@pytest.mark.slow
def test_what_redis_did_without_being_heard_delays_no_request_by_a_visibility_timeout(new_stage: NewStage) -> None:
    relay = ScriptedServer({"dot": Later("250 2.0.0 ok", 0.02)})
    stage = new_stage(redis_proxy=True, sink=relay, visibility_timeout=15, relay_connections=8)
    proxy = stage.redis_proxy
    assert proxy is not None
    emails = [new_address() for _ in range(600)]
    ids = stage.push(*emails)
    for part in range(1, 4):
        eventually(lambda part=part: len(stage.sink.mails) > 60 * part)  # type: ignore[misc]  # bound at once
        proxy.mode = MUTE
        time.sleep(2)
        proxy.reset()
        proxy.mode = PASS
    errors = stage.replies(ids, RECOVERED + 2)
    assert set(errors) <= {0, 1}
    # Who was told that Redis was away may ask again at once.
    again = stage.push(*(email for email, error in zip(emails, errors, strict=True) if error == 1))
    assert set(stage.replies(again, RECOVERED)) <= {0}
    stage.check()


@pytest.mark.slow
def test_while_one_worker_is_cut_off_the_other_serves_all(new_stage: NewStage) -> None:
    stage = new_stage(redis_proxy=True)
    proxy = stage.redis_proxy
    assert proxy is not None
    stage.add_worker(environment={"VERIFY_REDIS_URL": stage.server.url()})
    ids: list[str] = []
    for mode in (HOLE, PASS, STALL, PASS):
        proxy.mode = mode
        for _ in range(20):
            ids += stage.push(*(new_address() for _ in range(20)))
            time.sleep(0.2)
    assert set(stage.replies(ids, 15)) <= {0, 1}
    stage.check(twice=ids)


@pytest.mark.parametrize("fault", ["refuse", pytest.param(HOLE, marks=pytest.mark.slow)])
def test_a_caller_cut_off_from_redis_is_told_so_in_3_seconds_and_its_next_request_works(
    new_stage: NewStage, fault: str
) -> None:
    stage = new_stage()
    with TcpProxy(stage.server.port) as proxy:
        settings = Settings(redis_url=f"redis://127.0.0.1:{proxy.port}")
        with VerificationClient(settings) as client:
            first = new_address()
            assert client.request(first).error is ErrorCode.SUCCESS
            if fault == "refuse":
                proxy.refuse()
            else:
                proxy.mode = HOLE
            began = time.monotonic()
            with contextlib.suppress(RedisUnavailable):
                assert client.request(new_address()).error in {ErrorCode.REDIS_ERR, ErrorCode.TIMEOUT}
            assert time.monotonic() - began < settings.reply_timeout + 0.5
            began = time.monotonic()
            with pytest.raises(RedisUnavailable):
                client.enqueue(new_address())
            assert time.monotonic() - began < 3
            if fault == "refuse":
                proxy.admit()
            else:
                proxy.mode = PASS
                proxy.reset()
            again = new_address()
            reply = client.request(again)
            assert reply.error is ErrorCode.SUCCESS
            assert len(stage.whole(again)) == 1
            assert len(stage.whole(first)) == 1


@pytest.mark.slow
def test_a_caller_whose_way_to_redis_trickles_still_pushes_whole_messages(new_stage: NewStage) -> None:
    stage = new_stage()
    with TcpProxy(stage.server.port) as proxy:
        proxy.mode, proxy.seconds_a_byte = TRICKLE, 0.001
        with redis.Redis(port=proxy.port, db=1, socket_timeout=30) as client:
            stage.broker, direct = client, stage.broker
            ids = stage.push(*(new_address() for _ in range(5)))
            stage.broker = direct
        assert stage.replies(ids, 10) == [0] * 5
        assert stage.broker.llen(QUEUE) == 0
    stage.check()

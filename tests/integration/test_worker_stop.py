"""A worker that is told to stop finishes what it is sending and puts the rest back on the queue."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import cast

import pytest
from celery import Celery
from support.caller import address, message
from support.process import WAIT_TIMEOUT, eventually
from support.redis_server import RedisServer
from support.rig import Rig
from support.smtp_server import Held

NewRig = Callable[..., Rig]


def on_the_wire(rig: Rig, step: str) -> tuple[str, str, Held]:
    """Start a worker and a request whose send waits at this step; returns its address, its id and what holds it."""
    rig.add_worker()
    email, hold = address(), Held("250 ok")
    rig.relay.scripts[email] = {step: [hold]}
    request_id = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
    return email, request_id, hold


def control_shutdown(rig: Rig) -> None:
    """Celery's remote control command."""
    with Celery("operator", set_as_current=False) as app:
        app.config_from_object({"broker_url": rig.url("broker"), "broker_transport": "kombu.transport.redis:Transport"})
        app.control.shutdown(destination=[rig.worker.name])


@pytest.mark.parametrize(
    ("stop", "exit_code"),
    [
        pytest.param(lambda rig: rig.worker.signal(signal.SIGTERM), 0, id="SIGTERM"),
        pytest.param(lambda rig: rig.worker.signal(signal.SIGINT), 1, id="SIGINT", marks=pytest.mark.slow),
        pytest.param(control_shutdown, 0, id="control"),
    ],
)
def test_a_send_under_way_is_finished_and_answered(
    new_rig: NewRig, stop: Callable[[Rig], None], exit_code: int
) -> None:
    rig = new_rig()
    email, request_id, hold = on_the_wire(rig, "dot")
    stop(rig)
    rig.worker.wait_for_log("Warm shutdown" if stop is not control_shutdown else "Got shutdown from remote")
    assert rig.worker.alive
    hold.release.set()
    assert rig.worker.wait() == exit_code
    assert rig.caller.reply(request_id, within=0.1) == {"email": email, "error": 0}
    assert rig.broker.exists("verification", "unacked", "unacked_index") == 0


def test_requests_that_wait_for_their_eta_or_a_retry_need_no_worker(new_rig: NewRig) -> None:
    rig = new_rig()
    rig.add_worker()
    email, deferred = address(), address()
    later = message({"email": email}, headers={"eta": "2100-01-01T00:00:00"})
    [request_id] = rig.caller.push(later)
    rig.script(deferred, rcpt="450 4.2.1 later")
    retried = rig.caller.request(deferred)
    in_an_hour = {retried: (time.time() + 3600) * 1000}
    eventually(lambda: rig.broker.zadd("verification.parked.due", in_an_hour, xx=True, ch=True))
    eventually(lambda: rig.held() == {"delayed": 2, "delayed.due": 2})
    assert rig.worker.stop() == 0
    parked = cast(dict[bytes, bytes], rig.broker.hgetall("verification.parked"))
    assert parked.pop(retried.encode())
    [(field, waiting)] = parked.items()
    assert json.loads(waiting.split(b" ", 1)[1]) == later
    later["headers"]["eta"] = datetime.now(UTC).isoformat()
    rig.broker.hset("verification.parked", field, b"1:0 " + json.dumps(later).encode())
    rig.relay.scripts.clear()
    rig.broker.zadd("verification.parked.due", dict.fromkeys((field, retried.encode()), 0))
    rig.add_worker()
    assert rig.caller.reply(request_id) == {"email": email, "error": 0}
    assert rig.caller.reply(retried) == {"email": deferred, "error": 0}
    assert [len(rig.mails_to(each)) for each in (email, deferred)] == [1, 1]


@pytest.mark.slow
def test_a_send_that_does_not_end_is_cancelled(new_rig: NewRig) -> None:
    rig = new_rig(send_timeout=60)
    email, request_id, hold = on_the_wire(rig, "rcpt")
    assert rig.worker.stop() == 0
    assert rig.broker.exists("unacked", "unacked_index") == 0
    rig.add_worker()
    assert rig.caller.reply(request_id)["error"] == 0
    hold.release.set()
    assert len(rig.mails_to(email)) == 1


def test_a_second_signal_does_not_lose_the_request(new_rig: NewRig) -> None:
    rig = new_rig(visibility_timeout=5)
    email, request_id, hold = on_the_wire(rig, "rcpt")
    rig.worker.signal(signal.SIGINT)
    rig.worker.wait_for_log("Warm shutdown")
    rig.worker.signal(signal.SIGINT)
    rig.worker.wait()
    hold.release.set()
    rig.add_worker()
    assert rig.caller.reply(request_id, within=WAIT_TIMEOUT)["error"] == 0
    assert len(rig.mails_to(email)) == 1


def test_a_worker_stops_while_redis_is_away(new_redis_server: Callable[..., RedisServer], new_rig: NewRig) -> None:
    server = new_redis_server()
    rig = new_rig(server=server)
    rig.add_worker()
    server.kill()
    rig.worker.wait_for_log("waiting for Redis")
    rig.worker.terminate()
    assert rig.worker.wait() == 0
    server.start()


def test_a_send_under_way_is_finished_if_redis_returns_during_the_stop(
    new_redis_server: Callable[..., RedisServer], new_rig: NewRig
) -> None:
    server = new_redis_server(aof=True)
    rig = new_rig(server=server)
    email, request_id, hold = on_the_wire(rig, "dot")
    time.sleep(1.1)  # appendfsync everysec: the request is on the disk by now
    server.kill()
    rig.worker.wait_for_log("waiting for Redis")
    rig.worker.terminate()
    rig.worker.wait_for_log("Warm shutdown")
    server.start()
    hold.release.set()
    assert rig.worker.wait() == 0
    assert rig.caller.reply(request_id, within=0.1) == {"email": email, "error": 0}
    assert rig.broker.exists("unacked", "unacked_index") == 0

"""A worker that is told to stop finishes what it is sending and puts the rest back on the queue."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from celery import Celery
from support.caller import address, message
from support.process import WAIT_TIMEOUT, eventually
from support.redis_server import RedisServer
from support.rig import Rig
from support.smtp_server import Held, Later, ScriptedServer

NewRig = Callable[..., Rig]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)], ids=["SIGTERM", "SIGINT"])
def test_a_send_under_way_is_finished_and_answered(new_rig: NewRig, number: signal.Signals, exit_code: int) -> None:
    rig = new_rig()
    rig.add_worker()
    email, hold = address(), Held("250 ok")
    rig.script(email, dot=[hold])
    request_id = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
    rig.worker.process.send_signal(number)
    rig.worker.wait_for_log("Warm shutdown")
    assert rig.worker.alive
    hold.release.set()
    assert rig.worker.wait() == exit_code
    assert rig.caller.reply(request_id, within=0.1) == {"email": email, "error": 0}
    assert rig.broker.exists("verification", "unacked", "unacked_index") == 0


def test_what_is_not_being_sent_stays_on_the_queue(new_rig: NewRig) -> None:
    rig = new_rig(relay=ScriptedServer({"dot": Later("250 ok", 0.3)}), relay_connections=4)
    rig.add_worker()
    emails = [address() for _ in range(20)]
    ids = rig.caller.push(*(message({"email": email}) for email in emails))
    eventually(lambda: len(rig.relay.dotted) >= 4)
    assert rig.worker.stop() == 0
    assert rig.broker.exists("unacked", "unacked_index") == 0
    answered = [each for each in ids if rig.results.exists(f"celery-task-meta-{each}")]
    assert len(answered) == len(rig.relay.mails) >= 4
    assert rig.broker.llen("verification") == len(ids) - len(answered) > 0

    rig.add_worker()
    assert rig.caller.replies(ids, within=WAIT_TIMEOUT) == [0] * len(ids)
    assert sorted(mail.recipient for mail in rig.relay.mails) == sorted(emails)


def test_requests_that_wait_for_their_eta_go_back_to_the_queue(new_rig: NewRig) -> None:
    rig = new_rig()
    rig.add_worker()
    email = address()
    later = message({"email": email}, headers={"eta": "2100-01-01T00:00:00"})
    [request_id] = rig.caller.push(later)
    eventually(lambda: rig.broker.hlen("unacked") == 1)
    assert rig.worker.stop() == 0
    assert rig.broker.exists("unacked", "unacked_index") == 0
    assert [json.loads(each) for each in rig.broker.lrange("verification", 0, -1)] == [later]
    rig.broker.delete("verification")
    later["headers"]["eta"] = datetime.now(UTC).isoformat()
    rig.caller.push(later)
    rig.add_worker()
    assert rig.caller.reply(request_id) == {"email": email, "error": 0}
    assert len(rig.mails_to(email)) == 1


def test_delayed_requests_stay_for_the_next_worker(new_rig: NewRig) -> None:
    rig = new_rig()
    rig.add_worker()
    email = address()
    rig.script(email, rcpt="450 4.2.1 later")
    request_id = rig.caller.request(email)
    in_an_hour = {request_id: (time.time() + 3600) * 1000}
    eventually(lambda: rig.broker.zadd("verification.parked.due", in_an_hour, xx=True, ch=True))
    assert rig.worker.stop() == 0
    assert rig.broker.hlen("verification.parked") == 1
    rig.relay.scripts.clear()
    rig.broker.zadd("verification.parked.due", {request_id: 0})
    rig.add_worker()
    assert rig.caller.reply(request_id, within=WAIT_TIMEOUT)["error"] == 0


@pytest.mark.slow
def test_a_send_that_does_not_end_is_cancelled(new_rig: NewRig) -> None:
    rig = new_rig(send_timeout=60)
    rig.add_worker()
    email, hold = address(), Held("250 ok")
    rig.script(email, rcpt=[hold])
    request_id = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
    assert rig.worker.stop() == 0
    assert rig.broker.exists("unacked", "unacked_index") == 0
    rig.add_worker()
    assert rig.caller.reply(request_id)["error"] == 0
    hold.release.set()
    assert len(rig.mails_to(email)) == 1


def test_a_second_signal_does_not_lose_the_request(new_rig: NewRig) -> None:
    rig = new_rig(visibility_timeout=5)
    rig.tolerated += ["never retrieved", "never awaited", "destroyed but"]  # Celery ends it mid-way
    rig.add_worker()
    email, hold = address(), Held("250 ok")
    rig.script(email, rcpt=[hold])
    request_id = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
    rig.worker.process.send_signal(signal.SIGINT)
    rig.worker.wait_for_log("Warm shutdown")
    rig.worker.process.send_signal(signal.SIGINT)
    rig.worker.wait()
    hold.release.set()
    rig.add_worker()
    assert rig.caller.reply(request_id, within=WAIT_TIMEOUT)["error"] == 0
    assert len(rig.mails_to(email)) == 1


def test_what_a_killed_worker_held_is_redelivered(new_rig: NewRig) -> None:
    rig = new_rig(visibility_timeout=5)
    rig.add_worker()
    emails = [address() for _ in range(10)]
    holds = [Held("250 ok") for _ in emails]
    for email, hold in zip(emails, holds, strict=True):
        rig.script(email, rcpt=[hold])
    ids = rig.caller.push(*(message({"email": email}) for email in emails))
    assert all(hold.reached.wait(WAIT_TIMEOUT) for hold in holds)
    rig.worker.kill()
    rig.add_worker()
    assert rig.caller.replies(ids, within=WAIT_TIMEOUT) == [0] * len(ids)
    for hold in holds:
        hold.release.set()
    assert sorted(mail.recipient for mail in rig.relay.mails) == sorted(emails)


def test_celerys_shutdown_command_stops_a_worker_the_same_way(new_rig: NewRig) -> None:
    rig = new_rig()
    rig.add_worker()
    email, hold = address(), Held("250 ok")
    rig.script(email, dot=[hold])
    request_id = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
    with Celery("operator", set_as_current=False) as app:
        app.config_from_object({"broker_url": rig.url("broker"), "broker_transport": "kombu.transport.redis:Transport"})
        app.control.shutdown(destination=[rig.worker.name])
    hold.release.set()
    assert rig.worker.wait() == 0
    assert rig.caller.reply(request_id, within=0.1)["error"] == 0
    assert rig.broker.exists("verification", "unacked", "unacked_index") == 0


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
    rig.add_worker()
    email, hold = address(), Held("250 ok")
    rig.script(email, dot=[hold])
    request_id = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
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

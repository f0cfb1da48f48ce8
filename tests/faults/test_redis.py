"""Redis dies, freezes, closes connections, is full or refuses: each request it acknowledged is served once."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

import pytest
import redis
from support.caller import Load, address, message
from support.process import WAIT_TIMEOUT, eventually
from support.rig import NewRig, Rig
from support.smtp_server import Held


def crash(rig: Rig, *, away: float) -> None:
    """Kill every Redis server and start it again `away` seconds later."""
    for server in set(rig.servers.values()):
        server.kill()
    time.sleep(away)
    for server in set(rig.servers.values()):
        server.start()


def assert_recovers(rig: Rig) -> None:
    """A new request is accepted and served."""
    envelope = message({"email": address("after")})
    deadline = time.monotonic() + WAIT_TIMEOUT
    assert rig.caller.push_despite_faults(envelope, lambda: time.monotonic() > deadline)
    rig.caller.unsure.discard(envelope["headers"]["id"])
    assert rig.caller.reply(envelope["headers"]["id"])["error"] == 0


def test_a_crash_of_redis_under_load_loses_no_acknowledged_request(new_rig: NewRig) -> None:
    rig = new_rig(aof="always", workers=2)
    with Load(rig.caller, a_second=300) as load:
        eventually(lambda: len(rig.relay.mails) > 50)
        crash(rig, away=0.2)
        assert_recovers(rig)
        eventually(lambda: len(rig.relay.mails) > 150)
        crash(rig, away=0.2)
        assert_recovers(rig)
    finding = rig.audit(twice=load.ids, heard=False)
    assert sum(len(mails) == 2 for mails in finding.mails.values()) <= 2 * 64
    assert all(worker.alive for worker in rig.workers)
    # A request that a worker had just taken may be answered RedisErr; nothing else may go wrong.
    assert set(finding.errors.values()) <= {0, 1}


def test_a_mail_accepted_while_redis_was_away_is_not_sent_again(new_rig: NewRig) -> None:
    rig = new_rig(aof="always", visibility_timeout=10)
    held, ids = rig.hold_at_dot(20)
    # So much data that the server answers LOADING for a while when it comes back.
    rig.server.client(5).eval("for i = 1, 400000 do redis.call('SET', 'filler' .. i, i, 'EX', 600) end", 0)
    rig.server.kill()
    held.release.set()
    time.sleep(0.3)
    rig.server.start()
    assert rig.caller.replies(ids) == [0] * 20
    rig.audit(heard=False)


def test_connections_that_redis_closes_are_opened_again_and_no_request_suffers(new_rig: NewRig) -> None:
    rig = new_rig(workers=1)
    with Load(rig.caller, a_second=200) as load:
        eventually(lambda: len(rig.relay.mails) > 20)
        own = {rig.broker.client_id(), rig.codes.client_id(), rig.results.client_id()}
        for _ in range(2):
            for client in rig.broker.client_list():
                if int(client["id"]) not in own and "psubscribe" not in client["cmd"]:
                    rig.broker.client_kill_filter(_id=client["id"])
                    time.sleep(0.15)
        assert_recovers(rig)
        for kind in ("normal", "pubsub"):
            rig.broker.client_kill_filter(_type=kind, skipme=True)
            assert_recovers(rig)
    finding = rig.audit(twice=load.ids, heard=False)
    assert sum(len(mails) == 2 for mails in finding.mails.values()) == 0
    assert rig.worker.alive


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ALL", "WRITE"])
def test_a_paused_redis_delays_requests_and_loses_none(new_rig: NewRig, mode: str) -> None:
    rig = new_rig()
    ids = rig.caller.request_all(*(address() for _ in range(20)))
    rig.command("CLIENT", "PAUSE", 2500, mode)
    ids += rig.caller.request_all(*(address() for _ in range(20)))
    assert set(rig.caller.replies(ids)) <= {0, 1}
    rig.audit(twice=ids, heard=False)


@pytest.mark.slow
def test_requests_are_served_once_a_full_redis_has_room_again(new_rig: NewRig) -> None:
    rig = new_rig()
    held, sent = rig.hold_at_dot(10)
    waiting = rig.caller.request_all(*(address() for _ in range(200)))
    rig.broker.config_set("maxmemory", 1)
    held.release.set()
    time.sleep(3)
    with pytest.raises(redis.OutOfMemoryError):
        rig.caller.request_all("full@example.com")
    rig.broker.config_set("maxmemory", 0)
    assert rig.caller.replies(sent) == [0] * 10
    assert set(rig.caller.replies(waiting)) <= {0, 1}
    rig.audit()


def test_a_worker_killed_while_redis_is_full_leaves_every_request_answered(new_rig: NewRig) -> None:
    rig = new_rig()
    held, ids = rig.hold_at_dot(10)
    rig.broker.config_set("maxmemory", 1)
    held.release.set()
    time.sleep(0.7)
    rig.worker.kill()
    rig.broker.config_set("maxmemory", 0)
    rig.add_worker()
    assert rig.caller.replies(ids) == [0] * 10
    rig.audit()


@pytest.mark.parametrize("rights", ["-@all", "-evalsha -eval", "-hdel -zrem", "-set", "-@write", "~nothing"])
@pytest.mark.slow
def test_no_request_is_lost_while_the_redis_user_lacks_rights(new_rig: NewRig, rights: str) -> None:
    rig = new_rig(workers=0)
    rig.command("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all")
    rig.settings["VERIFY_REDIS_URL"] = f"redis://worker:secret@127.0.0.1:{rig.server.port}"
    rig.add_worker()
    held, ids = rig.hold_at_dot(10)
    taken = ["resetkeys", rights] if rights.startswith("~") else rights.split()
    rig.command("ACL", "SETUSER", "worker", *taken)
    held.release.set()
    ids += rig.caller.request_all(*(address() for _ in range(20)))
    time.sleep(4)
    rig.command("ACL", "SETUSER", "worker", "~*", "&*", "+@all")
    assert set(rig.caller.replies(ids)) <= {0, 1}
    rig.audit(twice=ids, heard=False)


def test_a_request_with_an_eta_survives_a_restart_of_redis(new_rig: NewRig) -> None:
    rig = new_rig(aof="always")
    eta = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=4)).isoformat()
    [request_id] = rig.caller.request_all(address(), headers={"eta": eta})
    eventually(lambda: rig.held() == {"delayed": 1, "delayed.due": 1})
    crash(rig, away=0.2)
    assert rig.worker.alive
    assert rig.caller.reply(request_id)["error"] == 0
    rig.audit(heard=False)


def test_a_request_that_celery_runs_survives_a_restart_of_redis(new_rig: NewRig) -> None:
    rig = new_rig(aof="always")
    email, following = address(), address()
    held = Held("250 2.0.0 ok")
    rig.script(email, dot=[held])
    second = message({"email": following}, request_id="chained-1")
    after: dict[str, Any] = {
        "task": "verification.send_code",
        "args": [],
        "kwargs": {"email": following},
        "options": {"task_id": "chained-1"},
        "subtask_type": None,
        "immutable": True,
    }
    first = message({"email": email}, embed={"callbacks": None, "errbacks": None, "chain": [after], "chord": None})
    rig.caller.push(first)
    eventually(held.reached.is_set)
    crash(rig, away=0.2)
    held.release.set()
    assert rig.caller.reply(first["headers"]["id"])["error"] == 0
    rig.caller.pushed.append(second)
    assert rig.caller.reply("chained-1")["error"] == 0
    assert rig.worker.alive
    rig.audit(heard=False, twice=[first["headers"]["id"]])


@pytest.mark.slow
def test_redis_frozen_for_10_seconds_loses_no_request(new_rig: NewRig) -> None:
    rig = new_rig(workers=2)
    with Load(rig.caller, a_second=200) as load:
        eventually(lambda: len(rig.relay.mails) > 50)
        rig.server.pause()
        time.sleep(10)
        rig.server.resume()
        assert_recovers(rig)
    rig.audit(twice=load.ids, heard=False)


@pytest.mark.slow
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_service_resumes_after_redis_was_away_for_30_seconds(new_rig: NewRig, fsync: str) -> None:
    rig = new_rig(aof=fsync, workers=2)
    with Load(rig.caller, a_second=200) as load:
        eventually(lambda: len(rig.relay.mails) > 50)
        crash(rig, away=30)
        assert_recovers(rig)
    rig.audit(twice=load.ids, heard=False, codes_kept=fsync == "always")


@pytest.mark.slow
def test_without_an_append_only_file_a_new_request_works(new_rig: NewRig) -> None:
    rig = new_rig()
    email = address()
    assert rig.caller.ask(email)["error"] == 0
    crash(rig, away=0.2)
    rig.caller.pushed.clear()
    assert_recovers(rig)
    assert rig.caller.ask(email)["error"] == 0
    assert len(rig.dotted_to(email)) == 2


@pytest.mark.slow
def test_worker_and_redis_start_in_any_order(new_rig: NewRig) -> None:
    rig = new_rig(workers=0)
    rig.server.kill()
    worker = rig.add_worker(wait=False)
    worker.wait_for_log("waiting for Redis")
    time.sleep(2)
    rig.server.start()
    assert_recovers(rig)
    rig.audit(heard=False)

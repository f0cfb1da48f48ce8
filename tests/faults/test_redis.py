"""Redis that dies, freezes, hangs up, fills up or refuses: what it had acknowledged is served, once."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from support.harness import Asked, Load, Stage, eventually, message, new_address
from support.smtp_server import Held

NewStage = Callable[..., Stage]
RECOVERED = 5.0  # seconds after its return within which all works again


def crash(stage: Stage, *, away: float) -> None:
    """Kill every Redis server, and start it again."""
    for server in set(stage.servers.values()):
        server.kill()
    time.sleep(away)
    for server in set(stage.servers.values()):
        server.start()


def assert_recovers(stage: Stage) -> None:
    began = time.monotonic()
    while True:
        try:
            [request_id] = stage.push(new_address("after"))
            break
        except redis.RedisError:
            assert time.monotonic() - began < RECOVERED
    assert stage.reply(request_id, RECOVERED) == 0


def test_redis_killed_and_restarted_under_load_loses_nothing_that_it_acknowledged(new_stage: NewStage) -> None:
    stage = new_stage(aof="always", workers=2)
    with Load(stage, a_second=300) as load:
        eventually(lambda: len(stage.sink.mails) > 50)
        crash(stage, away=0.2)
        assert_recovers(stage)
        eventually(lambda: len(stage.sink.mails) > 150)
        crash(stage, away=0.2)
        assert_recovers(stage)
    finding = stage.check(twice=load.ids, heard=False)
    assert sum(len(mails) == 2 for mails in finding.mails.values()) <= 2 * 64
    assert all(worker.alive for worker in stage.workers)
    # A request that was taken in the very moment may be told that Redis was away; nothing else may go wrong.
    assert set(finding.errors.values()) <= {0, 1}


def test_a_mail_that_was_accepted_while_redis_was_away_is_not_sent_again(new_stage: NewStage) -> None:
    stage = new_stage(aof="always", visibility_timeout=10)
    emails = [new_address() for _ in range(20)]
    held = Held("250 2.0.0 ok")
    for email in emails:
        stage.script(email, dot=[held])
    ids = stage.push(*emails)
    eventually(lambda: len(stage.sink.dotted) == 20)
    # Enough that the server says LOADING for a while when it comes back.
    stage.server.client(5).eval("for i = 1, 400000 do redis.call('SET', 'filler' .. i, i, 'EX', 600) end", 0)
    stage.server.kill()
    held.release.set()
    time.sleep(0.3)
    stage.server.start()
    assert stage.replies(ids, RECOVERED) == [0] * 20
    stage.check(heard=False)


def test_every_connection_that_redis_hangs_up_on_is_opened_again_and_no_request_suffers(new_stage: NewStage) -> None:
    stage = new_stage(workers=1)
    with Load(stage, a_second=200) as load:
        eventually(lambda: len(stage.sink.mails) > 20)
        own = {stage.broker.client_id(), stage.codes.client_id(), stage.results.client_id()}
        for _ in range(2):
            for client in stage.broker.client_list():
                if int(client["id"]) not in own and "psubscribe" not in client["cmd"]:
                    stage.broker.client_kill_filter(_id=client["id"])
                    time.sleep(0.15)
        assert_recovers(stage)
        for kind in ("normal", "pubsub"):
            stage.broker.client_kill_filter(_type=kind, skipme=True)
            assert_recovers(stage)
    finding = stage.check(twice=load.ids, heard=False)
    assert sum(len(mails) == 2 for mails in finding.mails.values()) == 0
    assert stage.worker.alive


@pytest.mark.parametrize("mode", ["ALL", pytest.param("WRITE", marks=pytest.mark.slow)])
def test_a_paused_redis_delays_requests_and_costs_none(new_stage: NewStage, mode: str) -> None:
    stage = new_stage()
    ids = stage.push(*(new_address() for _ in range(20)))
    stage.command("CLIENT", "PAUSE", 2500, mode)
    ids += stage.push(*(new_address() for _ in range(20)))
    assert set(stage.replies(ids, 10)) <= {0, 1}
    stage.check(twice=ids, heard=False)


@pytest.mark.slow
def test_a_full_redis_serves_again_once_it_has_room(new_stage: NewStage) -> None:
    stage = new_stage()
    held = Held("250 2.0.0 ok")
    on_the_wire = [new_address() for _ in range(10)]
    for email in on_the_wire:
        stage.script(email, dot=[held])
    sent = stage.push(*on_the_wire)
    eventually(lambda: len(stage.sink.dotted) == 10)
    waiting = stage.push(*(new_address() for _ in range(200)))
    stage.broker.config_set("maxmemory", 1)
    held.release.set()
    time.sleep(3)
    with pytest.raises(redis.OutOfMemoryError):
        stage.push("full@example.com")
    stage.asked = {request_id: asked for request_id, asked in stage.asked.items() if asked.email != "full@example.com"}
    stage.broker.config_set("maxmemory", 0)
    assert stage.replies(sent, RECOVERED) == [0] * 10
    assert set(stage.replies(waiting, 15)) <= {0, 1}
    stage.check()


def test_a_worker_killed_while_redis_is_full_leaves_no_request_without_a_reply(new_stage: NewStage) -> None:
    stage = new_stage()
    held = Held("250 2.0.0 ok")
    emails = [new_address() for _ in range(10)]
    for email in emails:
        stage.script(email, dot=[held])
    ids = stage.push(*emails)
    eventually(lambda: len(stage.sink.dotted) == 10)
    stage.broker.config_set("maxmemory", 1)
    held.release.set()
    time.sleep(0.7)
    stage.worker.kill()
    stage.broker.config_set("maxmemory", 0)
    stage.add_worker()
    assert stage.replies(ids, 10) == [0] * 10
    stage.check()


@pytest.mark.parametrize("rights", ["-@all", "-evalsha -eval", "-hdel -zrem", "-set", "-@write", "~nothing"])
@pytest.mark.slow
def test_rights_that_are_taken_away_and_given_back_cost_no_request(new_stage: NewStage, rights: str) -> None:
    stage = new_stage(workers=0)
    stage.command("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all")
    stage.settings["VERIFY_REDIS_URL"] = f"redis://worker:secret@127.0.0.1:{stage.server.port}"
    stage.add_worker()
    held = Held("250 2.0.0 ok")
    on_the_wire = [new_address() for _ in range(10)]
    for email in on_the_wire:
        stage.script(email, dot=[held])
    ids = stage.push(*on_the_wire)
    eventually(lambda: len(stage.sink.dotted) == 10)
    taken = ["resetkeys", rights] if rights.startswith("~") else rights.split()
    stage.command("ACL", "SETUSER", "worker", *taken)
    held.release.set()
    ids += stage.push(*(new_address() for _ in range(20)))
    time.sleep(4)
    stage.command("ACL", "SETUSER", "worker", "~*", "&*", "+@all")
    assert set(stage.replies(ids, 15)) <= {0, 1}
    stage.check(twice=ids, heard=False)


def test_a_request_with_an_eta_survives_a_restart_of_redis(new_stage: NewStage) -> None:
    stage = new_stage(aof="always")
    eta = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=4)).isoformat()
    [request_id] = stage.push(new_address(), headers={"eta": eta})
    eventually(lambda: stage.held().get("unacked") == 1)
    crash(stage, away=0.2)
    assert stage.worker.alive
    assert stage.reply(request_id, 12) == 0
    stage.check(heard=False)


def test_a_request_that_celery_runs_while_redis_restarts_is_answered_and_the_worker_stays(new_stage: NewStage) -> None:
    stage = new_stage(aof="always")
    email, following = new_address(), new_address()
    held = Held("250 2.0.0 ok")
    stage.script(email, dot=[held])
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
    stage.push_envelopes(first, emails=[email])
    eventually(held.reached.is_set)
    crash(stage, away=0.2)
    held.release.set()
    assert stage.reply(first["headers"]["id"], 10) == 0
    stage.asked["chained-1"] = Asked(following, second)
    assert stage.reply("chained-1", 10) == 0
    assert stage.worker.alive
    stage.check(heard=False, twice=[first["headers"]["id"]])


@pytest.mark.slow
def test_redis_frozen_for_10_seconds_costs_no_request(new_stage: NewStage) -> None:
    stage = new_stage(workers=2)
    with Load(stage, a_second=200) as load:
        eventually(lambda: len(stage.sink.mails) > 50)
        stage.server.pause()
        time.sleep(10)
        stage.server.resume()
        assert_recovers(stage)
    stage.check(twice=load.ids, heard=False)


@pytest.mark.slow
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_redis_away_for_30_seconds_under_load_recovers_within_5(new_stage: NewStage, fsync: str) -> None:
    stage = new_stage(aof=fsync, workers=2)
    with Load(stage, a_second=200) as load:
        eventually(lambda: len(stage.sink.mails) > 50)
        crash(stage, away=30)
        assert_recovers(stage)
    stage.check(twice=load.ids, heard=False, codes_kept=fsync == "always")


@pytest.mark.slow
def test_without_an_append_only_file_asking_again_works(new_stage: NewStage) -> None:
    stage = new_stage()
    email = new_address()
    assert stage.ask(email) == 0
    crash(stage, away=0.2)
    stage.asked.clear()
    assert_recovers(stage)
    assert stage.ask(email) == 0
    assert len(stage.whole(email)) == 2


@pytest.mark.slow
def test_worker_and_redis_start_in_any_order(new_stage: NewStage) -> None:
    stage = new_stage(workers=0)
    stage.server.kill()
    worker = stage.add_worker(wait=False)
    worker.wait_for_log("waiting for Redis", 20)
    time.sleep(2)
    stage.server.start()
    assert_recovers(stage)
    stage.check(heard=False)

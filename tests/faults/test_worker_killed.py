"""Workers that die or stand still at the worst moment: nothing is lost, and nothing is sent that need not be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.harness import BACK, VISIBILITY, Calling, Stage, eventually, new_address
from support.smtp_server import Held, Later
from support.tcp_proxy import HOLE, STALL, in_mode
from support.worker_process import WorkerProcess

NewStage = Callable[..., Stage]


def test_a_worker_killed_in_mid_data_sends_no_mail_and_its_request_is_served_by_another(new_stage: NewStage) -> None:
    stage = new_stage()
    email = new_address()
    stage.script(email, content=[Calling("", stage.worker.kill)])
    [request_id] = stage.push(email)
    eventually(lambda: not stage.worker.alive)
    stage.add_worker()
    assert stage.reply(request_id, BACK) == 0
    # Its final dot was announced, so it counts as one that may have been accepted: once more, not twice.
    finding = stage.check(twice=[request_id])
    assert finding.errors[request_id] == 0


def test_a_worker_killed_between_250_and_mark_sends_once_more_with_the_same_code_and_message_id(
    new_stage: NewStage,
) -> None:
    stage = new_stage(redis_proxy=True)
    assert stage.redis_proxy is not None
    email = new_address()
    stage.script(email, dot=[Calling("250 2.0.0 ok", in_mode(stage.redis_proxy, STALL))])
    [request_id] = stage.push(email)
    eventually(lambda: len(stage.sink.mails) == 1)
    time.sleep(0.3)  # the worker has read the 250; what it tells Redis does not arrive
    stage.worker.kill()
    stage.redis_proxy.reset()
    stage.redis_proxy.mode = "pass"
    stage.add_worker()
    assert stage.reply(request_id, BACK) == 0
    finding = stage.check(twice=[request_id])
    assert len(finding.mails[request_id]) == 2


@pytest.mark.slow
def test_a_worker_killed_as_the_relay_accepts_sends_once_more_and_a_second_time_never(new_stage: NewStage) -> None:
    stage = new_stage()
    email = new_address()
    stage.script(email, dot=[Calling("250 2.0.0 ok", stage.kill_workers)] * 2)
    [request_id] = stage.push(email)
    eventually(lambda: not stage.alive)
    stage.add_worker()
    eventually(lambda: not stage.alive, BACK)
    stage.add_worker()
    # Twice ambiguous: it may have been accepted both times, and nobody knows.
    assert stage.reply(request_id, BACK) == 6
    assert len(stage.check(twice=[request_id]).mails[request_id]) == 2


def test_a_worker_killed_between_reserve_and_delivery_loses_nothing_and_sends_once(new_stage: NewStage) -> None:
    stage = new_stage()
    emails = [new_address() for _ in range(30)]
    killed_at_rcpt = Calling("250 2.1.5 ok", stage.worker.kill)
    for email in emails:
        stage.script(email, rcpt=[killed_at_rcpt])
    ids = stage.push(*emails)
    eventually(lambda: not stage.worker.alive)
    assert sum(stage.held().values()) >= len(ids)
    stage.add_worker()
    assert stage.replies(ids, BACK) == [0] * len(ids)
    assert all(len(mails) == 1 for mails in stage.check().mails.values())


def test_a_worker_killed_in_mid_drain_sends_again_only_what_may_not_have_been_recorded(new_stage: NewStage) -> None:
    stage = new_stage(workers=2)
    ids = stage.push(*(new_address() for _ in range(1500)))
    eventually(lambda: len(stage.sink.mails) > 500, 30)
    stage.worker.kill()
    stage.replies(ids, 30)
    finding = stage.check(twice=ids)
    doubles = [request_id for request_id, mails in finding.mails.items() if len(mails) == 2]
    assert len(doubles) <= 64  # what one worker has on the wire
    assert set(finding.errors.values()) == {0}


def test_a_worker_frozen_before_its_final_dot_does_not_send_when_it_wakes_up(new_stage: NewStage) -> None:
    stage = new_stage(workers=2)
    email = new_address()
    held = Held("354 go ahead")
    stage.script(email, data=[held])
    [request_id] = stage.push(email)
    eventually(held.reached.is_set)
    frozen, other = sorted(stage.workers, key=lambda worker: not holds(stage, worker))
    frozen.pause()
    assert stage.reply(request_id, BACK + VISIBILITY) == 0
    held.release.set()
    frozen.resume()
    time.sleep(1)
    assert len(stage.whole(email)) == 1
    assert frozen.alive
    assert other.alive
    stage.check()


def holds(stage: Stage, worker: WorkerProcess) -> bool:
    """Whether this worker, the only one with a relay connection, has the request: its process has the socket."""
    pid = worker.process.pid
    port = f":{stage.sink.port:04X}"
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[2].endswith(port) and line.split()[3] == "01"
    }
    return any(
        link.readlink().name.removeprefix("socket:[").rstrip("]") in inodes
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink() and "socket" in str(link.readlink())
    )


@pytest.mark.slow
def test_a_worker_frozen_after_its_final_dot_changes_nothing_when_it_wakes_up(new_stage: NewStage) -> None:
    stage = new_stage(workers=2)
    email = new_address()
    held = Held("250 2.0.0 ok")
    stage.script(email, dot=[held])
    [request_id] = stage.push(email)
    eventually(held.reached.is_set)
    [frozen] = [worker for worker in stage.workers if holds(stage, worker)]
    frozen.pause()
    assert stage.reply(request_id, BACK + VISIBILITY) == 0
    before = stage.stored(request_id)
    held.release.set()
    frozen.resume()
    time.sleep(1)
    assert stage.stored(request_id) == before
    assert len(stage.check(twice=[request_id]).mails[request_id]) == 2


@pytest.mark.slow
def test_a_message_that_kills_its_worker_four_times_is_answered_2_and_buried_and_its_batch_is_served_once(
    new_stage: NewStage,
) -> None:
    stage = new_stage(workers=0)
    killer = new_address("killer")
    mates = [new_address("mate") for _ in range(20)]
    stage.script(killer, rcpt=Calling("250 2.1.5 ok", stage.kill_workers))
    for mate in mates:  # on the wire, and not whole, both times that they die together
        stage.script(mate, rcpt=[Later("250 2.1.5 ok", 0.5)] * 2)
    ids = stage.push(*mates[:10], killer, *mates[10:])
    deaths = 0
    deadline = time.monotonic() + 60
    while stage.stored(ids[10]) is None:
        assert time.monotonic() < deadline
        if not stage.alive:
            deaths += bool(stage.workers)
            stage.add_worker(wait=False)
        time.sleep(0.05)
    assert stage.reply(ids[10]) == 2
    assert deaths == 4
    finding = stage.check(dead=1)
    assert [finding.errors[each] for each in ids if each != ids[10]] == [0] * 20


@pytest.mark.slow
def test_with_the_default_visibility_timeout_a_dead_workers_requests_are_served_within_18_seconds(
    new_stage: NewStage,
) -> None:
    stage = new_stage(visibility_timeout=15)
    emails = [new_address() for _ in range(20)]
    for email in emails:
        stage.script(email, rcpt=[Held("250 2.1.5 ok")])
    ids = stage.push(*emails)
    eventually(lambda: stage.held().get("unacked") == 20)
    other = stage.add_worker()
    stage.worker.kill()
    killed = time.monotonic()
    assert stage.replies(ids, 30) == [0] * 20
    assert time.monotonic() - killed < 15 + 3 + 1
    assert other.alive
    stage.check()


@pytest.mark.slow
def test_a_slow_send_is_not_redelivered_while_its_worker_lives(new_stage: NewStage) -> None:
    stage = new_stage(workers=2, send_timeout=20)
    email = new_address()
    held = Held("250 2.0.0 ok")
    stage.script(email, dot=[held])
    [request_id] = stage.push(email)
    time.sleep(3 * VISIBILITY)
    assert len(stage.whole(email)) == 1
    held.release.set()
    assert stage.reply(request_id) == 0
    stage.check()


@pytest.mark.slow
def test_a_worker_cut_off_from_redis_past_its_lease_does_not_send(new_stage: NewStage) -> None:
    stage = new_stage(redis_proxy=True)
    assert stage.redis_proxy is not None
    direct = stage.add_worker(environment={"VERIFY_REDIS_URL": stage.server.url()})
    direct.pause()
    email = new_address()
    held = Held("354 go ahead")
    stage.script(email, data=[held])
    [request_id] = stage.push(email)
    eventually(held.reached.is_set)
    stage.redis_proxy.mode = HOLE
    direct.resume()
    assert stage.reply(request_id, BACK + VISIBILITY + 2) == 0
    held.release.set()
    time.sleep(1)
    assert len(stage.whole(email)) == 1
    stage.redis_proxy.mode = "pass"
    stage.redis_proxy.reset()
    stage.check()

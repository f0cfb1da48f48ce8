"""Workers die or freeze at the worst moment: no request is lost, and no mail is sent needlessly."""

from __future__ import annotations

import time

import pytest
from support.caller import address
from support.process import eventually
from support.rig import VISIBILITY, Calling, NewRig, Rig
from support.smtp_server import Held, Later, ScriptedServer
from support.tcp_proxy import HOLE, STALL, in_mode
from support.worker_process import WorkerProcess


def test_another_worker_serves_a_request_whose_worker_was_killed_in_mid_data(new_rig: NewRig) -> None:
    rig = new_rig()
    email = address()
    rig.script(email, content=[Calling("", rig.worker.kill)])
    request_id = rig.caller.request(email)
    eventually(lambda: not rig.worker.alive)
    rig.add_worker()
    assert rig.caller.reply(request_id)["error"] == 0
    # The worker had announced its data, so the mail may have been accepted: it is sent once more, not twice.
    finding = rig.audit(twice=[request_id])
    assert finding.errors[request_id] == 0


def test_a_worker_killed_between_250_and_mark_causes_one_identical_second_mail(
    new_rig: NewRig,
) -> None:
    rig = new_rig(redis_proxy=True)
    email = address()
    rig.script(email, dot=[Calling("250 2.0.0 ok", in_mode(rig.redis_proxy, STALL))])
    request_id = rig.caller.request(email)
    eventually(lambda: len(rig.relay.mails) == 1)
    time.sleep(1)  # the worker reads the 250; what it writes to Redis does not arrive
    rig.worker.kill()
    rig.redis_proxy.reset()
    rig.redis_proxy.mode = "pass"
    rig.add_worker()
    assert rig.caller.reply(request_id)["error"] == 0
    finding = rig.audit(twice=[request_id])
    assert len(finding.mails[request_id]) == 2


@pytest.mark.slow
def test_a_mail_whose_worker_was_killed_twice_at_its_acceptance_is_sent_twice(new_rig: NewRig) -> None:
    rig = new_rig()
    email = address()
    rig.script(email, dot=[Calling("250 2.0.0 ok", rig.kill_workers)] * 2)
    request_id = rig.caller.request(email)
    eventually(lambda: not rig.alive)
    rig.add_worker()
    eventually(lambda: not rig.alive)
    rig.add_worker()
    # It may have been accepted both times, and nobody knows.
    assert rig.caller.reply(request_id)["error"] == 6
    assert len(rig.audit(twice=[request_id]).mails[request_id]) == 2


def test_a_worker_killed_before_delivery_loses_nothing_and_sends_once(new_rig: NewRig) -> None:
    rig = new_rig()
    emails = [address() for _ in range(30)]
    killed_at_rcpt = Calling("250 2.1.5 ok", rig.worker.kill)
    for email in emails:
        rig.script(email, rcpt=[killed_at_rcpt])
    ids = rig.caller.request_all(*emails)
    eventually(lambda: not rig.worker.alive)
    assert sum(rig.held().values()) >= len(ids)
    rig.add_worker()
    assert rig.caller.replies(ids) == [0] * len(ids)
    assert all(len(mails) == 1 for mails in rig.audit().mails.values())


def test_a_worker_killed_under_load_repeats_only_what_was_not_recorded(new_rig: NewRig) -> None:
    rig = new_rig(workers=2)
    ids = rig.caller.request_all(*(address() for _ in range(600)))
    eventually(lambda: len(rig.relay.mails) > 200)
    rig.worker.kill()
    rig.caller.replies(ids)
    finding = rig.audit(twice=ids)
    doubles = [request_id for request_id, mails in finding.mails.items() if len(mails) == 2]
    assert len(doubles) <= 64  # as many as one worker has on the wire
    assert set(finding.errors.values()) == {0}


def test_a_worker_frozen_before_its_final_dot_does_not_send_when_it_resumes(new_rig: NewRig) -> None:
    rig = new_rig(workers=2)
    email = address()
    held = Held("354 go ahead")
    rig.script(email, data=[held])
    request_id = rig.caller.request(email)
    eventually(held.reached.is_set)
    frozen, other = sorted(rig.workers, key=lambda worker: not holds(rig, worker))
    frozen.pause()
    assert rig.caller.reply(request_id)["error"] == 0
    held.release.set()
    frozen.resume()
    time.sleep(1)
    assert len(rig.dotted_to(email)) == 1
    assert frozen.alive
    assert other.alive
    rig.audit()


def holds(rig: Rig, worker: WorkerProcess) -> bool:
    """Whether this worker has the request on the wire: its process has the only connection to the relay."""
    return rig.relay.port in {port for _, port in worker.connections}


@pytest.mark.slow
def test_a_worker_frozen_after_its_final_dot_changes_nothing_when_it_resumes(new_rig: NewRig) -> None:
    rig = new_rig(workers=2)
    email = address()
    held = Held("250 2.0.0 ok")
    rig.script(email, dot=[held])
    request_id = rig.caller.request(email)
    eventually(held.reached.is_set)
    [frozen] = [worker for worker in rig.workers if holds(rig, worker)]
    frozen.pause()
    assert rig.caller.reply(request_id)["error"] == 0
    before = rig.caller.stored(request_id)
    held.release.set()
    frozen.resume()
    time.sleep(1)
    assert rig.caller.stored(request_id) == before
    assert len(rig.audit(twice=[request_id]).mails[request_id]) == 2


@pytest.mark.slow
def test_a_message_that_kills_its_worker_four_times_is_dead_lettered(
    new_rig: NewRig,
) -> None:
    # Without pipelining a mail is announced after its RCPT: killed twice after that, a request would be answered 6.
    rig = new_rig(workers=0, relay=ScriptedServer(offers=("8BITMIME",)))
    poison = address("poison")
    mates = [address("mate") for _ in range(20)]
    rig.script(poison, rcpt=Calling("250 2.1.5 ok", rig.kill_workers))
    for mate in mates:  # they are on the wire, not yet whole, when their worker dies
        rig.script(mate, rcpt=[Later("250 2.1.5 ok", 0.5)] * 2)
    ids = rig.caller.request_all(*mates[:10], poison, *mates[10:])
    deaths = 0
    deadline = time.monotonic() + 250
    while rig.caller.stored(ids[10]) is None:
        assert time.monotonic() < deadline
        if not rig.alive:
            deaths += bool(rig.workers)
            rig.add_worker(wait=False)
        time.sleep(0.05)
    assert rig.caller.reply(ids[10])["error"] == 2
    assert deaths == 4
    finding = rig.audit(dead=1)
    assert [finding.errors[each] for each in ids if each != ids[10]] == [0] * 20


@pytest.mark.slow
def test_requests_of_a_dead_worker_are_served_after_the_visibility_timeout(
    new_rig: NewRig,
) -> None:
    rig = new_rig(visibility_timeout=15)
    emails = [address() for _ in range(20)]
    for email in emails:
        rig.script(email, rcpt=[Held("250 2.1.5 ok")])
    ids = rig.caller.request_all(*emails)
    eventually(lambda: rig.held().get("unacked") == 20)
    other = rig.add_worker()
    rig.worker.kill()
    within = 15 + 3 + 30  # the contract's, and room for a loaded machine
    assert rig.caller.replies(ids, within) == [0] * 20
    assert other.alive
    rig.audit()


@pytest.mark.slow
def test_a_slow_send_is_not_redelivered_while_its_worker_lives(new_rig: NewRig) -> None:
    rig = new_rig(workers=2, send_timeout=20)
    email = address()
    held = Held("250 2.0.0 ok")
    rig.script(email, dot=[held])
    request_id = rig.caller.request(email)
    time.sleep(3 * VISIBILITY)
    assert len(rig.dotted_to(email)) == 1
    held.release.set()
    assert rig.caller.reply(request_id)["error"] == 0
    rig.audit()


@pytest.mark.slow
def test_a_worker_cut_off_from_redis_past_its_lease_does_not_send(new_rig: NewRig) -> None:
    rig = new_rig(redis_proxy=True)
    direct = rig.add_worker(environment={"VERIFY_REDIS_URL": rig.server.url()})
    direct.pause()
    email = address()
    held = Held("354 go ahead")
    rig.script(email, data=[held])
    request_id = rig.caller.request(email)
    eventually(held.reached.is_set)
    rig.redis_proxy.mode = HOLE
    direct.resume()
    assert rig.caller.reply(request_id)["error"] == 0
    held.release.set()
    time.sleep(1)
    assert len(rig.dotted_to(email)) == 1
    rig.redis_proxy.mode = "pass"
    rig.redis_proxy.reset()
    rig.audit()

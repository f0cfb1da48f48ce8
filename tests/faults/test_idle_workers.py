"""The idle worker that waits on the queue dies, freezes or is stopped: the next request is served, and once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from support.caller import QUEUE, address
from support.process import eventually
from support.rig import VISIBILITY, Rig
from support.worker_process import WorkerProcess

HANDOVER = "verification.handover"


@pytest.fixture(scope="module")
def one_rig() -> Iterator[Rig]:
    with Rig(visibility_timeout=VISIBILITY) as rig:
        yield rig


@pytest.fixture
def rig(one_rig: Rig) -> Rig:
    """With two workers that have nothing to do."""
    one_rig.add_workers(2 - len(one_rig.alive))
    return one_rig


def blocked(rig: Rig) -> set[int]:
    """The ports from which workers wait on the queue."""
    clients = rig.broker.client_list()
    return {
        int(each["addr"].rpartition(":")[2]) for each in clients if each["cmd"] == "blmove" and "b" in each["flags"]
    }


def blocks(rig: Rig, worker: WorkerProcess) -> bool:
    """Whether this worker waits on the queue now."""
    return bool(blocked(rig) & {port for port, _ in worker.connections})


def idle(rig: Rig) -> tuple[WorkerProcess, WorkerProcess]:
    """The worker that waits on the queue, and the other one."""
    found: list[WorkerProcess] = []

    def one_waits() -> bool:
        found[:] = sorted(rig.alive, key=lambda worker: not blocks(rig, worker))
        return [blocks(rig, worker) for worker in found] == [True, False]

    eventually(one_waits)
    waiting, other = found
    return waiting, other


def served_by(rig: Rig, request_id: str) -> list[WorkerProcess]:
    """The workers that have answered this request."""

    def those() -> list[WorkerProcess]:
        return [
            worker
            for worker in rig.workers
            if any("request answered" in line and request_id in line for line in worker.log.splitlines())
        ]

    eventually(those)
    return those()


def test_a_message_on_its_way_to_a_worker_that_died_is_served(rig: Rig) -> None:
    rig.caller.queue = HANDOVER
    request_id = rig.caller.request(address())
    rig.caller.queue = QUEUE
    assert rig.caller.reply(request_id)["error"] == 0
    rig.audit()


def test_a_worker_frozen_while_it_waits_delays_one_request_and_no_other(rig: Rig) -> None:
    waiting, other = idle(rig)

    def frozen_while_it_blocks() -> bool:
        waiting.pause()
        if blocks(rig, waiting):
            return True
        waiting.resume()
        return False

    eventually(frozen_while_it_blocks)
    first = rig.caller.request(address())
    assert rig.caller.reply(first)["error"] == 0  # its message may have gone to the frozen one: then it is restored
    later = [rig.caller.request(address()) for _ in range(3)]
    assert rig.caller.replies(later) == [0] * 3
    assert [served_by(rig, each) for each in (first, *later)] == [[other]] * 4
    waiting.resume()
    time.sleep(1)
    assert waiting.alive
    rig.audit()


def test_a_worker_stopped_while_it_waits_leaves_the_wait_to_another(rig: Rig) -> None:
    waiting, other = idle(rig)
    who = rig.broker.get("verification.waiter")
    waiting.terminate()
    early = rig.caller.request(address())  # it may still wake the one that stops
    assert waiting.wait() == 0
    assert rig.broker.get("verification.waiter") != who
    assert not rig.broker.exists(HANDOVER)
    assert rig.caller.reply(early)["error"] == 0
    request_id = rig.caller.request(address())
    assert rig.caller.reply(request_id)["error"] == 0
    assert served_by(rig, request_id) == [other]
    rig.audit()


def test_a_worker_killed_while_it_waits_is_replaced_by_another(rig: Rig) -> None:
    waiting, other = idle(rig)
    waiting.kill()
    request_id = rig.caller.request(address())
    assert rig.caller.reply(request_id)["error"] == 0
    assert served_by(rig, request_id) == [other]
    rig.audit()

"""`celery -A worker.app worker` with the options that a user may add, and with none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from celery import Celery
from support.caller import address
from support.process import START_TIMEOUT, eventually
from support.rig import Rig
from support.worker_process import WorkerProcess

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(rig: Rig) -> Iterator[Start]:
    """Starts one more worker of the rig's settings, with these words on its command line."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(WorkerProcess(rig.settings, log_level="INFO", options=options))


def test_workers_started_without_a_name_get_names_of_their_own(rig: Rig, start: Start) -> None:
    workers = [start(), start()]

    with Celery("operator", set_as_current=False) as app:
        app.config_from_object({"broker_url": rig.url("broker"), "broker_transport": "kombu.transport.redis:Transport"})
        names: set[str] = set()

        def all_answer() -> bool:
            names.update(app.control.inspect(timeout=2, limit=3).ping() or {})
            return len(names) >= 3

        eventually(all_answer, START_TIMEOUT)
    own = {f"worker-{worker.process.pid}" for worker in workers}
    assert {name.partition("@")[0] for name in names} == own | {rig.worker.name.partition("@")[0]}


def test_a_worker_of_other_queues_says_that_it_serves_no_requests(start: Start) -> None:
    said = "queue verification is not among -Q one,other: this worker serves no verification requests"
    assert said in start("-Q", "one,other").log


def test_a_worker_of_other_queues_and_ours_says_nothing_and_keeps_its_name(start: Start) -> None:
    log = start("-Q", "one,verification", "-n", "mine@here").log
    assert "mine@here ready." in log
    assert "serves no verification requests" not in log


def test_an_embedded_beat_leaves_no_file(rig: Rig, start: Start) -> None:
    worker = start("-B")
    worker.wait_for_log("beat: Starting...")
    assert rig.caller.ask(address())["error"] == 0
    assert worker.stop() == 0
    assert [path.name for path in worker.directory.iterdir()] == ["worker.log"]


def test_a_pool_of_processes_is_refused(rig: Rig) -> None:
    worker = WorkerProcess(rig.settings, options=["--pool", "processes"])
    try:
        worker.start(wait=False)
        assert worker.wait() == 2
        assert worker.log == ("--pool: the worker runs with threads only, which is the default; leave the option out\n")
    finally:
        worker.close()

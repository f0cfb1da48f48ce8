"""`celery -A worker.app worker` with the options that a user may add, and with none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
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

    said: list[str] = []

    def ping() -> str:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "inspect", "ping", "-t", "2"]
        env = rig.worker.environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        said.append(done.stdout + done.stderr)
        return said[-1]

    eventually(lambda: "3 nodes online" in ping(), START_TIMEOUT)
    assert "Duplicate" not in said[-1]
    assert all(f"worker-{worker.process.pid}@" in said[-1] for worker in workers)


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

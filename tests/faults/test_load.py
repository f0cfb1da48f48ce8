"""Very many requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.harness import Stage, new_address

NewStage = Callable[..., Stage]
MANY = 100_000


def memory(pid: int) -> int:
    """Resident, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_100_000_queued_requests_are_all_served_once_with_a_kill_on_the_way(new_stage: NewStage) -> None:
    stage = new_stage(workers=0, log_level="INFO")
    ids = stage.push(*(new_address() for _ in range(MANY)))
    first, second = stage.add_workers(2)
    most = 0
    deadline = time.monotonic() + 300
    while (left := stage.broker.llen("verification")) > 0:
        assert time.monotonic() < deadline, stage.held()
        if left < MANY // 2 and first.alive:
            first.kill()
        most = max(most, memory(second.process.pid))
        time.sleep(0.2)
    assert most < 300
    finding = stage.check(twice=ids, within=60)
    assert set(finding.errors.values()) == {0}
    assert sum(len(mails) == 2 for mails in finding.mails.values()) <= 64

"""A long queue."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.caller import address
from support.rig import NewRig

MANY = 100_000


def memory(pid: int) -> int:
    """The resident memory of a process, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_100_000_queued_requests_are_served_once_though_a_worker_is_killed(new_rig: NewRig) -> None:
    rig = new_rig(workers=0, log_level="INFO")
    ids = rig.caller.request_all(*(address() for _ in range(MANY)))
    first, second = rig.add_workers(2)
    most = 0
    deadline = time.monotonic() + 2000
    while (left := rig.broker.llen("verification")) > 0:
        assert time.monotonic() < deadline, rig.held()
        if left < MANY // 2 and first.alive:
            first.kill()
        most = max(most, memory(second.pid))
        time.sleep(0.2)
    assert most < 300
    finding = rig.audit(twice=ids)
    assert set(finding.errors.values()) == {0}
    assert sum(len(mails) == 2 for mails in finding.mails.values()) <= 64

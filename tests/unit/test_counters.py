"""What a worker counts."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from producer.contract import ErrorCode
from worker.metrics import BOUNDS, OTHER, REASONS, Counters

WORKER = Path(__file__).parents[2] / "worker"
# As they stand in the code; what is filled in is at no reason's beginning but one.
FOUND = [
    *re.findall(r"return '([^']+)'", (WORKER / "queue" / "reserve.lua").read_text()),
    *re.findall(r'Unfit\(f?"([^"]+)"\)', (WORKER / "queue" / "message.py").read_text()),
    *re.findall(r'bury\(job, "([^"]+)"', (WORKER / "service.py").read_text()),
    *(reason for module in WORKER.glob("*.py") for reason in re.findall(r'reason = "([^"]+)"', module.read_text())),
]
WRITTEN = [
    reason.replace("{name}", name)
    for reason in FOUND
    for name in (("expires", "eta") if "is not a time" in reason else ("callbacks", "errbacks", "chain", "chord"))
]


@pytest.mark.parametrize("reason", sorted(set(WRITTEN)))
def test_every_reason_that_we_write_has_its_class(reason: str) -> None:
    counters = Counters()
    counters.dead_lettered(reason)
    assert sum(counters.dead.values()) == 1
    assert counters.dead[OTHER] == 0


def test_all_classes_are_in_use_and_any_other_reason_is_counted() -> None:
    counters = Counters()
    for reason in [*WRITTEN, "it cannot be read (KeyError)"]:
        counters.dead_lettered(reason)
    assert {name for name, count in counters.dead.items() if count} == set(REASONS)


@pytest.mark.parametrize(
    ("ago", "counted"), [(0.02, 0.025), (7, 10.0), (-3600, BOUNDS[0]), (10**10, BOUNDS[-1]), (-(10**10), BOUNDS[0])]
)
def test_a_duration_falls_into_its_bucket_whatever_the_message_says(ago: float, counted: float) -> None:
    counters = Counters()
    counters.accepted(time.time() - ago)
    durations = counters.until_accepted
    assert durations.counts[BOUNDS.index(counted)] == 1
    assert 0 <= durations.total <= BOUNDS[-1]


def test_who_does_not_say_when_has_no_duration() -> None:
    counters = Counters()
    counters.replied(ErrorCode.SUCCESS, None)
    assert counters.replies[ErrorCode.SUCCESS] == 1
    assert sum(counters.until_reply.counts) == 0

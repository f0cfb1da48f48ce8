"""What a worker counts."""

from __future__ import annotations

import time

import pytest

from producer.contract import ErrorCode
from worker.metrics import BOUNDS, Counters


@pytest.mark.parametrize(
    ("ago", "counted"), [(0.02, 0.025), (7, 10.0), (-3600, BOUNDS[0]), (10**10, BOUNDS[-1]), (-(10**10), BOUNDS[0])]
)
def test_an_age_is_clamped_to_the_buckets(ago: float, counted: float) -> None:
    counters = Counters()
    counters.accepted(time.time() - ago)
    counters.replied(ErrorCode.TIMEOUT, time.time() - ago)
    for durations in (counters.until_accepted, counters.until_reply):
        assert durations.counts[BOUNDS.index(counted)] == 1
        assert 0 <= durations.total <= BOUNDS[-1]


def test_a_request_without_enqueued_at_has_no_age() -> None:
    counters = Counters()
    counters.replied(ErrorCode.SUCCESS, None)
    assert counters.replies[ErrorCode.SUCCESS] == 1
    assert sum(counters.until_reply.counts) == 0

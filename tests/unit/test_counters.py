"""What a worker counts."""

from __future__ import annotations

import time

import pytest

from producer.contract import ErrorCode
from worker.metrics import BOUNDS, Counters

REDIS_TIME = 1_000_000_000  # not this host's


@pytest.mark.parametrize(
    ("ago", "counted"), [(0.02, 0.025), (7, 10.0), (-3600, BOUNDS[0]), (10**10, BOUNDS[-1]), (-(10**10), BOUNDS[0])]
)
def test_an_age_is_clamped_to_the_buckets(ago: float, counted: float) -> None:
    counters = Counters()
    counters.clock.read([REDIS_TIME, 0], time.monotonic())
    counters.accepted(REDIS_TIME - ago)
    counters.replied(ErrorCode.TIMEOUT, REDIS_TIME - ago)
    for durations in (counters.until_accepted, counters.until_reply):
        assert durations.counts[BOUNDS.index(counted)] == 1
        assert 0 <= durations.total <= BOUNDS[-1]


def test_a_request_without_enqueued_at_has_no_age() -> None:
    counters = Counters()
    counters.replied(ErrorCode.SUCCESS, None)
    assert counters.replies[ErrorCode.SUCCESS] == 1
    assert sum(counters.until_reply.counts) == 0


def test_no_age_is_counted_while_redis_time_is_unknown() -> None:
    counters = Counters()
    counters.accepted(time.time())
    assert (counters.mails, sum(counters.until_accepted.counts)) == (1, 0)

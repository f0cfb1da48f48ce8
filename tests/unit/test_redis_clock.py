"""Redis' time, as this process counts it on."""

from __future__ import annotations

import time

import hiredis
import pytest

from producer.redis import clock
from producer.redis.clock import RedisClock


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the monotonic clock says."""
    now = [5000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_redis_read_its_clock_in_the_middle_of_the_trip(monotonic: list[float]) -> None:
    known = RedisClock()
    known.read([b"1700000000", b"250000"], asked=4999.0)
    assert known.now() == 1_700_000_000.75
    monotonic[0] += 100
    assert known.now() == 1_700_000_100.75


def test_it_is_asked_again_now_and_then_but_not_after_a_refusal(monotonic: list[float]) -> None:
    known = RedisClock()
    assert known.now() is None
    known.read([b"1700000000", b"0"], asked=5000.0)
    assert not known.stale
    monotonic[0] += clock.STALE_AFTER + 1
    assert known.stale
    known.read(hiredis.ReplyError("NOPERM this user has no permissions to run the 'time' command"), asked=5061.0)
    monotonic[0] += clock.STALE_AFTER + 1
    assert (known.now(), known.stale) == (None, False)

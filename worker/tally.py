"""What a worker counts: plain numbers, changed and read on the service's loop only. `worker/metrics.py` shows them."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Final

from producer.codes import BUCKET_HIT, COOLDOWN_HIT
from producer.contract import ErrorCode

# Seconds: from a relay that answers at once to a request that was given up after the longest VERIFY_GIVE_UP_AFTER.
BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_LONGEST: Final = BOUNDS[-1]
# Why a message was buried, in a word; by how the reason in the dead letter begins.
_REASONS: Final = {
    "unknown task": "unknown_task",
    "no ": "envelope",
    "not ": "envelope",
    "content-": "envelope",
    "body_encoding": "envelope",
    "the envelope": "envelope",
    "the body": "body",
    "an argument": "body",
    "callbacks": "body",
    "errbacks": "body",
    "chain": "body",
    "chord": "body",
    "expires": "time",
    "eta": "time",
    "the request id": "id_conflict",
    "it killed": "killer",
    "Celery": "celery",
}
OTHER: Final = "other"
REASONS: Final = (*dict.fromkeys(_REASONS.values()), OTHER)


class Durations:
    """A histogram of seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)  # not cumulative; the last one is what is beyond all bounds
        self.total = 0.0

    def since(self, moment: float | None) -> None:
        """Count the time since `moment` (Unix seconds by whoever wrote it down; None: nobody did)."""
        if moment is not None:
            # Another host's clock may be ahead, and a message may say anything.
            seconds = time.time() - moment
            if not 0.0 <= seconds <= _LONGEST:
                seconds = 0.0 if seconds < 0.0 else _LONGEST
            self.counts[bisect_left(BOUNDS, seconds)] += 1
            self.total += seconds


class Tally:
    """One worker's numbers since its start."""

    def __init__(self) -> None:
        self.taken = 0  # requests that were taken from the queue, each time they were
        self.through_celery = 0  # of these, what needed Celery's own machinery
        self.replies = dict.fromkeys((error for error in ErrorCode if error < 1000), 0)
        self.until_reply = Durations()  # from `enqueued_at`
        self.until_accepted = Durations()
        self.retries = 0
        self.joins = 0
        self.hits = dict.fromkeys((COOLDOWN_HIT, BUCKET_HIT), 0)
        self.restored = 0
        self.dead = dict.fromkeys(REASONS, 0)

    def replied(self, error: ErrorCode, enqueued_at: float | None) -> None:
        """A request has its answer."""
        self.replies[error] += 1
        self.until_reply.since(enqueued_at)

    def buried(self, reason: str) -> None:
        """A message became a dead letter."""
        found = (word for start, word in _REASONS.items() if reason.startswith(start))
        self.dead[next(found, OTHER)] += 1

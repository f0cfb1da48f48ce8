"""The result backend: Celery's own for Redis, but SUCCESS is the only state it stores or publishes.

Whoever waits under a request id takes the first thing that appears there for the reply. Celery would also write
STARTED, RETRY, FAILURE and REVOKED there.
"""

from __future__ import annotations

from typing import Any

from celery import states
from celery.backends.redis import RedisBackend


class ReplyBackend(RedisBackend):  # type: ignore[misc]  # Celery ships no types
    """`celery.backends.redis.RedisBackend`, silent about everything but success."""

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Store `result` if `state` is SUCCESS; returns `result`."""
        if state == states.SUCCESS:
            return super().store_result(task_id, result, state, *args, **kwargs)
        return result

"""The result backend: Celery's own for Redis, but the worker stores nothing through it.

Whoever waits under a request id takes the first thing that appears there for the reply. The settler stores that, for
requests that came through Celery too: before Celery begins with callbacks, whose failure would take the reply along.
Celery itself would also write STARTED, RETRY, FAILURE and REVOKED there.
"""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend


class ReplyBackend(RedisBackend):  # type: ignore[misc]  # Celery ships no types
    """`celery.backends.redis.RedisBackend`, to read replies and to count the parts of a chord."""

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Nothing; returns `result`."""
        del task_id, state, args, kwargs
        return result

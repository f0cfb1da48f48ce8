"""The result backend: Celery's own for Redis, but the worker stores nothing through it.

Whoever waits under a request id takes the first thing that appears there for the reply. The settler stores that, for
requests that came through Celery too: before Celery begins with callbacks, whose failure would take the reply along.
Celery itself would also write STARTED, RETRY, FAILURE and REVOKED there.

Flower hands out results as they are stored, so in its process they are masked as they are read.
"""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend, SentinelBackend

from producer.logs import mask_email
from producer.settings import load_or_exit
from worker.celery_side.redis_urls import sentinel_options


class ReplyBackend(RedisBackend):  # type: ignore[misc]  # Celery ships no types
    """`celery.backends.redis.RedisBackend`, to read replies and to count the parts of a chord."""

    masks = False  # whether this process shows people what it reads

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Nothing; returns `result`."""
        del task_id, state, args, kwargs
        return result

    def decode_result(self, payload: Any) -> Any:
        """What is stored under a task's id."""
        meta = super().decode_result(payload)
        if self.masks and isinstance(meta, dict) and "result" in meta:
            return {**meta, "result": _masked(meta["result"])}
        return meta


class SentinelReplyBackend(ReplyBackend, SentinelBackend):  # type: ignore[misc]  # Celery ships no types
    """The same over a server that sentinels name."""

    @property
    def _transport_options(self) -> dict[str, Any]:
        return {**super()._transport_options, "sentinel_kwargs": sentinel_options(load_or_exit().results_url)}


def _masked(result: Any) -> Any:
    """A reply as it may be shown; of what is none, nothing."""
    if isinstance(result, dict) and isinstance(result.get("error"), int):
        return {"email": mask_email(result.get("email")), "error": result["error"]}
    return None if result is None else "***"

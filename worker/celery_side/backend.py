"""The result backend: Celery's own for Redis, except that the worker stores nothing through it.

A caller takes the first thing that appears under its request id for the reply. The settler stores the reply itself, for
requests that came through Celery too: before Celery runs callbacks, whose failure would otherwise lose the reply.
Celery would also store STARTED, RETRY, FAILURE and REVOKED there.

Flower shows results as they are stored, so in its process they are masked when read.
"""

from __future__ import annotations

from typing import Any

import redis
from celery.backends.redis import RedisBackend, SentinelBackend

from producer.masking import mask_email
from worker.celery_side.connections import Connection, SSLConnection
from worker.celery_side.redis_urls import sentinel_options


class ReplyBackend(RedisBackend):  # type: ignore[misc]  # Celery ships no types
    """`celery.backends.redis.RedisBackend`, used to read replies and to count the parts of a chord."""

    def _params_from_url(self, url: str, defaults: Any) -> Any:
        params = super()._params_from_url(url, defaults)
        if "host" in params:  # not with sentinels
            secure = params.get("connection_class") is redis.SSLConnection
            params["connection_class"] = SSLConnection if secure else Connection
        return params

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Store nothing; returns `result`."""
        del task_id, state, args, kwargs
        return result

    def decode_result(self, payload: Any) -> Any:
        meta = super().decode_result(payload)
        if self.app.masks_results and isinstance(meta, dict) and meta.get("result") is not None:
            result = meta["result"]
            is_reply = isinstance(result, dict) and isinstance(result.get("error"), int)
            masked = {"email": mask_email(result.get("email")), "error": result["error"]} if is_reply else "***"
            return {**meta, "result": masked}
        return meta


class SentinelReplyBackend(ReplyBackend, SentinelBackend):  # type: ignore[misc]  # Celery ships no types
    """The same for a Redis that Sentinel manages."""

    @property
    def _transport_options(self) -> dict[str, Any]:
        return {**super()._transport_options, "sentinel_kwargs": sentinel_options(self.app.settings.results_url)}
